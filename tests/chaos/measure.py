#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How soon a loss is seen, and how soon the others go on: a table of times, not a test.

A group of chaos_seat is harmed again and again; times are from the signal to what the ranks say,
all on one clock. killed: the process ends, which others see. stopped: it does not, so the deadline
must pass. named: all survivors have reported it. good: all have done a step without it. Then a
newcomer takes the seat, prepared beside the steps, or (--waits) while all wait. call: the longest
nep_comm_recover of a member; gap: the longest time between two steps of a member meanwhile; calm: the
same before the newcomer came."""
import argparse
import os
import random
import signal
import statistics
import tempfile
import time

import groups
from common import Harm


def lose_one(group, number):
    victim = random.choice(sorted(group.seats))
    time.sleep(random.uniform(0.05, 0.2))
    group.peace()
    group.forget()
    start_ns = time.monotonic_ns()
    (seat,), _ = group.lose([victim], number)
    named = max(group.must(rank, "fault", 20, lambda e: e["t"] > start_ns)["t"]
                for rank in group.seats)
    good = group.all_good(20, start_ns)
    seat.signal(signal.SIGKILL)
    seat.process.wait()
    group.forget()
    joined = group.fill([victim])
    return (named - start_ns) / 1e9, good, joined, *group.gaps


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("bin", help="folder of chaos_seat and nep-info")
    parser.add_argument("--inter", default="shm,ucx,adversary:shm,adversary:ucx")
    parser.add_argument("--sizes", default="4,4")
    parser.add_argument("--world", choices=["machine", "guest"], default="machine")
    parser.add_argument("--timeout", type=float, default=1.0)
    parser.add_argument("--wait", type=float, default=0)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--waits", action="store_true", help="newcomers join while all wait")
    parser.add_argument("--only", choices=["killed", "stopped"])
    args = parser.parse_args()
    args.perf, args.patience, args.spread = os.path.join(args.bin, "nep-perf"), 10, 0
    args.join = ["--waits"] if args.waits else []
    random.seed(args.seed)
    print(f"{args.sizes} ranks, timeout {args.wait or args.timeout} s, {args.times} times each: "
          "median (slowest), s")
    for inter in args.inter.split(","):
        for how, number in ("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP):
            if args.only in (None, how):
                measure(args, inter, how, number)


def measure(args, inter, how, number):
    """A try in which a rank that only had no core for a second was given up is made again."""
    group, all_times, failed = None, [], 0
    while len(all_times) < args.times and failed <= args.times:
        with tempfile.TemporaryDirectory() as folder:
            try:
                group = groups.Group(args, inter, folder)
                while len(all_times) < args.times:
                    all_times.append(lose_one(group, number))
                group.end()
            except Harm as reason:
                failed += 1
                print(str(reason).split("\n", maxsplit=1)[0], flush=True)
            finally:
                if group is not None:
                    group.destroy()
    texts = [f"{statistics.median(times):.3f} ({max(times):.3f})" for times in zip(*all_times)]
    print(f"{inter:<14} {how:<8} named {texts[0]}  good {texts[1]}  newcomer's {texts[2]}"
          f"  call {texts[3]}  gap {texts[4]}  calm {texts[5]}"
          f"  {failed} again" if texts else f"{inter}: nothing was measured", flush=True)


if __name__ == "__main__":
    main()
