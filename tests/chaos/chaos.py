#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Harm at random moments, on one machine or in a guest of it: ranks are killed, stopped, stopped for
a while, replaced; links go down, packets are late or lost; strangers scan the rendezvous; disks are
full. After each: nothing hangs, whoever lives names the right rank within twice the deadline, no
element that is not marked is wrong, no segment and no process is left. The seed is printed and
repeats the schedule. --help lists the options.

Two kinds: harm to a job of nep-perf that ends of it (jobs.py), and to a group that lives through it
again and again (groups.py, names with a "+").
"""
import argparse
import collections
import random
import sys
import tempfile
import time

import groups
import jobs
import worlds
from common import Harm, counts, segments

NAMES = [*jobs.HARMS, *("+" + name for name in groups.HARMS)]


class Plan:
    def __init__(self, args):
        self.args, self.before, self.broken = args, segments(), 0
        self.took = collections.defaultdict(list)
        self.left = args.rounds
        self.end = time.monotonic() + args.seconds if args.seconds else float("inf")
        names = args.harms.split(",")
        self.jobs = [name for name in names if name in jobs.HARMS]
        self.harms = [name[1:] for name in names if name[:1] == "+"]

    def is_over(self):
        enough = self.args.kills and counts["kills"] >= self.args.kills
        return enough or self.left <= 0 or time.monotonic() > self.end

    def note(self, reason, name, inter):
        self.broken += 1
        print(f"BROKEN ({name}, {inter}, {self.left} rounds before the end): {reason}", flush=True)

    def clean(self, name, inter):
        left = segments() - self.before
        if left:
            self.before |= left
            self.note(f"segments left: {left}", name, inter)

    def job(self, inter):
        name = random.choice(self.jobs)
        self.left -= 1
        with tempfile.TemporaryDirectory() as folder:
            try:
                self.took[name, inter].append(jobs.HARMS[name](self.args, inter, folder))
            except Harm as reason:
                self.note(reason, name, inter)
        self.clean(name, inter)

    def life(self, inter):
        """A group, harmed some times, that ends well."""
        group, name = None, "begin"
        with tempfile.TemporaryDirectory() as folder:
            try:
                group = groups.Group(self.args, inter, folder)
                possible = [harm for harm in self.harms
                            if group.world.links() or harm not in groups.WIRE]
                for _ in range(random.randrange(self.args.life // 2, self.args.life) + 1):
                    if self.is_over():
                        break
                    self.left -= 1
                    name = random.choice(possible)
                    self.took["+" + name, inter].append(groups.HARMS[name](group))
                name = "end"
                group.end()
            except Harm as reason:
                self.note(reason, "+" + name, inter)
            finally:
                if group is not None:
                    group.destroy()
        self.clean("+" + name, inter)

    def run(self):
        turn, start = 0, time.monotonic()
        told = start
        while not self.is_over():
            if time.monotonic() > told + 300:
                told = time.monotonic()
                done = sum(len(times) for times in self.took.values())
                print(f"after {told - start:.0f} s: {done} right, {self.broken} broken, "
                      f"{counts['kills']} kills", flush=True)
            inter = self.args.inter.split(",")[turn % len(self.args.inter.split(","))]
            turn += 1
            is_life = self.harms and (not self.jobs or inter.startswith("hosts:") or
                                      random.random() < self.args.share)
            if is_life:
                self.life(inter)
            elif self.jobs and not inter.startswith("hosts:"):
                self.job(inter)
            else:
                self.left -= 1

    def report(self):
        for (harm, inter), times in sorted(self.took.items()):
            print(f"{harm:<10} {inter:<14} {len(times):>4} done, slowest {max(times, default=0):.2f} s")
        print(", ".join(f"{num} {what}" if "," not in what else f"{what}: {num}"
                        for what, num in counts.items() if num))
        print(f"chaos: {sum(len(times) for times in self.took.values())} right, "
              f"{self.broken} broken")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("perf", help="path of nep-perf; chaos_seat and nep-info lie beside it")
    parser.add_argument("--rounds", type=int, default=20, help="harms done (20)")
    parser.add_argument("--kills", type=int, default=0, help="stop after so many in groups; 0: never")
    parser.add_argument("--seconds", type=float, default=0, help="stop after so long; 0: never (0)")
    parser.add_argument("--harms", default=",".join(NAMES), help="which, drawn from (all)")
    parser.add_argument("--share", type=float, default=0.3,
                        help="of turns that go to groups rather than jobs (0.3)")
    parser.add_argument("--life", type=int, default=10, help="harms to one group, at most (10)")
    parser.add_argument("--inter", default="shm,ucx,adversary:shm,adversary:ucx",
                        help="fabrics, in turn (shm, ucx and the adversary around both); hosts:ucx: "
                             "between network namespaces, groups only, needs root")
    parser.add_argument("--sizes", default="2,2", help="of the nodes of groups (2,2)")
    parser.add_argument("--world", choices=["machine", "guest"], default="machine",
                        help="guest: links are those of the guest of tests/vm")
    parser.add_argument("--timeout", type=float, default=2.0, help="NEP_TIMEOUT in seconds (2)")
    parser.add_argument("--wait", type=float, default=0,
                        help="deadline of operations of groups, where it is another; seconds")
    parser.add_argument("--patience", type=float, default=10,
                        help="what a few steps or a creation may take here, in seconds (10)")
    parser.add_argument("--spread", type=float, default=0.8,
                        help="the moment is drawn from so many seconds after the start (0.8)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the schedule (time)")
    args = parser.parse_args()
    unknown = set(args.harms.split(",")) - set(NAMES)
    if unknown:
        parser.error(f"no such harm: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    if "hosts:" in args.inter and worlds.without_hosts():
        print("without hosts:", worlds.without_hosts())
        args.inter = ",".join(i for i in args.inter.split(",") if not i.startswith("hosts:"))
    if {"shmfull", "dumpfull"} & set(args.harms.split(",")) and jobs.without_small():
        print("full in place of shmfull and dumpfull: no small file system can be had here:",
              jobs.without_small())
    random.seed(args.seed)
    print(f"chaos: seed {args.seed}, {args.rounds} rounds over {args.inter}", flush=True)
    plan = Plan(args)
    plan.run()
    plan.report()
    return 1 if plan.broken else 0


if __name__ == "__main__":
    sys.exit(main())
