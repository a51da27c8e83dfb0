#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Harm at random moments, on one machine: ranks are killed, stopped, stopped for a while; strangers
scan the rendezvous; files cannot grow. After each: nothing hangs, whoever lives names the right
rank within twice the deadline, no element that is not marked is wrong, no segment and no process is
left. The seed is printed and repeats the schedule. --help lists the options.

What is checked is what nep-perf prints and how it ends, so it is the library's own sentences and
its own comparison of every element (--verify) that are put to the test.
"""
import argparse
import collections
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

RANKS = 4
SHAPE = ["--ranks", str(RANKS), "--ranks-per-node", "2", "--hidden", "256", "--experts", "16",
         "--top-k", "4", "--warmup", "0"]
ENDLESS = ["--iters", "100000000"]


counts = collections.Counter()


class Harm(Exception):
    """A promise that was broken."""


def require(condition, *what):
    if not condition:
        raise Harm(" ".join(str(part) for part in what))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def segments():
    return {name for name in os.listdir("/dev/shm") if "nearep" in name or name.startswith("nep")}


class Job:
    """nep-perf ep. spawned: one process that starts the ranks; else a process for each rank."""

    def __init__(self, args, arguments, spawned, inter, folder, limit=None):
        self.folder, self.spawned = folder, spawned
        self.timeout = args.timeout
        port = free_port()
        self.address = ("127.0.0.1", port)
        base = {**os.environ, "NEP_TIMEOUT": f"{int(args.timeout * 1000)}ms",
                "NEP_LOG": "warn", "NEP_ADVERSARY_SEED": str(random.getrandbits(31)),
                "NEP_RENDEZVOUS": f"127.0.0.1:{port}"}
        command = [args.perf, "ep", *SHAPE, "--inter", inter, *arguments]
        self.processes, self.errors, self.server = [], [], None
        if not spawned:  # the store outlives every rank, as docs/bootstrap.md recommends
            info = os.path.join(os.path.dirname(args.perf), "nep-info")
            self.server = subprocess.Popen([info, "--serve", f"127.0.0.1:{port}", "--ranks",
                                            str(RANKS)], stdout=subprocess.DEVNULL,
                                           stderr=subprocess.DEVNULL)
            self.wait_for_server()
        for rank in range(1 if spawned else RANKS):
            env = dict(base)
            if spawned:
                del env["NEP_RENDEZVOUS"]
            else:
                env.update(NEP_RANK=str(rank), NEP_RANKS=str(RANKS))
            path = os.path.join(folder, f"{rank}.err")
            self.errors.append(path)
            with open(path, "wb") as error:
                self.processes.append(subprocess.Popen(
                    command, env=env, stdout=subprocess.DEVNULL, stderr=error,
                    preexec_fn=limit))

    def wait_for_server(self):
        end = time.monotonic() + 20
        while time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex(self.address) == 0:
                    return
            time.sleep(0.01)
        raise Harm("nep-info --serve does not answer")

    def pids(self):
        """Of the ranks, in order."""
        if not self.spawned:
            return [process.pid for process in self.processes]
        pid = self.processes[0].pid
        end = time.monotonic() + 20
        while time.monotonic() < end and self.processes[0].poll() is None:
            with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
                children = [int(child) for child in file.read().split()]
            if len(children) == RANKS:
                return children
            time.sleep(0.01)
        raise Harm("the ranks did not start:", self.text(0))

    def text(self, idx):
        with open(self.errors[idx], encoding="utf-8", errors="replace") as file:
            return file.read()

    def end(self, bound, but=()):
        """Waits for all processes but those; returns their statuses."""
        end = time.monotonic() + bound
        for idx, process in enumerate(self.processes):
            if idx in but:
                continue
            try:
                process.wait(max(0.01, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                stuck = [i for i, p in enumerate(self.processes) if p.poll() is None and i not in but]
                raise Harm(f"HANG: after {bound:.1f} s", stuck, "still run:", self.text(idx)) from None
        return [process.poll() for process in self.processes]

    def destroy(self):
        pids = []
        try:
            pids = self.pids() if self.spawned and self.processes[0].poll() is None else []
        except Harm:
            pass
        for pid in [*pids, *(p.pid for p in self.processes if p.poll() is None)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        for process in self.processes:
            process.wait()
        if self.server is not None:
            self.server.kill()
            self.server.wait()


def numbers(text):
    """"0-1, 3" as a set."""
    found = set()
    for part in text.replace(" ", "").strip(",").split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


# ---- what is done to a job --------------------------------------------------------------------

def going(job, args):
    """Some moment after the start: in the set-up now and then, else in the middle."""
    job.pids()
    time.sleep(random.uniform(0.0, args.spread))


def lose(args, inter, folder, sig):
    """A rank that is not the store's host goes; every survivor names it."""
    victim = random.randrange(1, RANKS)
    job = Job(args, ["--tokens", str(random.choice([1, 16, 64, 300])), *ENDLESS], False, inter,
              folder)
    try:
        going(job, args)
        os.kill(job.pids()[victim], sig)
        start = time.monotonic()
        statuses = job.end(2 * args.timeout + 3, but=(victim,))
        took = time.monotonic() - start
        right = 0
        for rank in range(RANKS):
            # A warning that somebody is slow is no verdict.
            text = "\n".join(line for line in job.text(rank).split("\n") if " warn: " not in line)
            if rank == victim:
                continue
            require(statuses[rank] == 1, "rank", rank, "ended with", statuses[rank], text)
            named = {int(n) for n in re.findall(r"connect to rank (\d+)", text)}
            named |= {int(n) for n in re.findall(
                r"rank (\d+) (?:\([^)]*\) )?(?:is|was|has|did|seems)", text)}
            late = re.findall(r"did not come .*: ranks? ([0-9, -]+)", text)
            named |= numbers(late[-1]) if late else set()
            right += victim in named
            if sig == signal.SIGKILL:
                require(f"rank {victim}" in text and named <= {victim, rank}, "rank", rank,
                        "names", named, "instead of", victim, text)
            else:
                require(named, "rank", rank, "names nobody:", text)
        require(right > 0 or sig == signal.SIGKILL, "nobody names", victim,
                *(job.text(rank) for rank in range(RANKS)))
        counts["survivors of a stop"] += (RANKS - 1) * (sig == signal.SIGSTOP)
        counts["that named the stopped rank"] += right * (sig == signal.SIGSTOP)
        require(took < 2 * args.timeout, f"took {took:.2f} s")
        return took
    finally:
        job.destroy()


def kill(args, inter, folder):
    return lose(args, inter, folder, signal.SIGKILL)


def stop(args, inter, folder):
    return lose(args, inter, folder, signal.SIGSTOP)


def go_on(args, inter, folder):
    """A rank is killed, the others recover and finish; every element of theirs is compared."""
    victim = random.randrange(1, RANKS)
    out = os.path.join(folder, "out.json")
    job = Job(args, ["--tokens", str(random.choice([1, 16, 64])), "--iters", "400", "--verify",
                     "--on-fault", "continue", "--json", out], True, inter, folder)
    try:
        pid = job.pids()[victim]
        time.sleep(random.uniform(0.3, 0.3 + args.spread))
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it was faster
        statuses = job.end(60 + 10 * args.timeout)
        text = job.text(0)
        if statuses == [1] and "_create: " in text:  # there was no group yet: the dead one is named
            require(re.search(rf"_create: .*rank {victim}\b", text), "names another than", victim, text)
            return 0
        require(statuses == [0], "ended with", statuses, job.text(0))
        with open(out, encoding="utf-8") as file:
            result = json.load(file)
        require(result["wrong_elements"] == 0, "wrong elements:", result["wrong_elements"])
        require(set(result["lost_ranks"]) <= {victim}, result["lost_ranks"], "lost, not", victim)
        return result["outage_ms"] / 1000
    finally:
        job.destroy()


def pause(args, inter, folder):
    """A rank stands still for less than the deadline, more than once: nobody is lost."""
    out = os.path.join(folder, "out.json")
    job = Job(args, ["--tokens", "16", "--iters", "300", "--verify", "--json", out], True, inter,
              folder)
    try:
        pids = job.pids()
        for _ in range(3):
            victim = random.choice(pids)
            time.sleep(random.uniform(0, 0.2))
            if job.processes[0].poll() is None:
                try:
                    os.kill(victim, signal.SIGSTOP)
                    time.sleep(random.uniform(0.02, 0.25 * args.timeout))
                    os.kill(victim, signal.SIGCONT)
                except ProcessLookupError:
                    pass
        statuses = job.end(60 + 4 * args.timeout)
        require(statuses == [0], "ended with", statuses, job.text(0))
        with open(out, encoding="utf-8") as file:
            require(json.load(file)["wrong_elements"] == 0, "wrong elements")
        return 0
    finally:
        job.destroy()


def scan(args, inter, folder):
    """Strangers at the rendezvous: rubbish, half a greeting, silence. The job does not notice."""
    job = Job(args, ["--tokens", "16", "--iters", "50", "--verify"], False, inter, folder)
    open_ends, stopping = [], threading.Event()

    def strangers():
        while not stopping.is_set():
            end = socket.socket()
            end.settimeout(0.2)
            try:
                end.connect(job.address)
                choice = random.randrange(4)
                if choice == 0:
                    end.sendall(random.randbytes(random.randrange(1, 4096)))
                elif choice == 1:
                    end.sendall(b"GET / HTTP/1.1\r\n\r\n")
                elif choice == 2:
                    end.sendall(b"\xff" * 65536)
                if choice == 3 and len(open_ends) < 100:
                    open_ends.append(end)
                    continue
            except OSError:
                pass
            end.close()
            time.sleep(0.001)

    thread = threading.Thread(target=strangers)
    thread.start()
    try:
        statuses = job.end(60 + 2 * args.timeout)
        require(statuses == [0] * RANKS, "ended with", statuses, job.text(0))
        return 0
    finally:
        stopping.set()
        thread.join()
        for end in open_ends:
            end.close()
        job.destroy()


def full(args, inter, folder):
    """No file may grow beyond a few KB to a few MB: windows, logs, traces. A refusal or success."""
    limit = 1 << random.randrange(10, 26)

    def before():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    os.environ["NEP_TRACE"] = os.path.join(folder, "trace.%r")
    try:
        job = Job(args, ["--tokens", "16", "--iters", "20", "--verify"], False, inter, folder, before)
    finally:
        del os.environ["NEP_TRACE"]
    try:
        statuses = job.end(60 + 2 * args.timeout)
        texts = [job.text(rank) for rank in range(RANKS)]
        require(set(statuses) <= {0, 1, 2}, "ended with", statuses, *texts)
        require(all(status == 0 or text for status, text in zip(statuses, texts)),
                "failed without a sentence:", statuses)
        require(not [n for n in os.listdir(folder) if n.endswith(".tmp")], "half a trace is left")
        return 0
    finally:
        job.destroy()


HARMS = {"kill": kill, "stop": stop, "continue": go_on, "pause": pause, "scan": scan, "full": full}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("perf", help="path of nep-perf")
    parser.add_argument("--rounds", type=int, default=20, help="harms done (20)")
    parser.add_argument("--seconds", type=float, default=0, help="stop after so long; 0: never (0)")
    parser.add_argument("--harms", default=",".join(HARMS), help="which, drawn from (all)")
    parser.add_argument("--inter", default="shm,ucx,adversary:shm,adversary:ucx",
                        help="fabrics, in turn (shm, ucx and the adversary around both)")
    parser.add_argument("--timeout", type=float, default=2.0, help="NEP_TIMEOUT in seconds (2)")
    parser.add_argument("--spread", type=float, default=0.8,
                        help="the moment is drawn from so many seconds after the start (0.8)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the schedule (time)")
    args = parser.parse_args()
    random.seed(args.seed)
    harms, fabrics = args.harms.split(","), args.inter.split(",")
    unknown = set(harms) - set(HARMS)
    if unknown:
        parser.error(f"no such harm: {', '.join(unknown)}")
    print(f"chaos: seed {args.seed}, {args.rounds} rounds over {args.inter}", flush=True)
    before, broken = segments(), 0
    took = collections.defaultdict(list)
    end = time.monotonic() + args.seconds
    for number in range(args.rounds):
        if args.seconds and time.monotonic() > end:
            break
        harm, inter = random.choice(harms), fabrics[number % len(fabrics)]
        with tempfile.TemporaryDirectory() as folder:
            try:
                took[harm, inter].append(HARMS[harm](args, inter, folder))
                left = segments() - before
                require(not left, "segments left:", left)
            except Harm as reason:
                broken += 1
                print(f"BROKEN in round {number} ({harm}, {inter}): {reason}", flush=True)
    for (harm, inter), times in sorted(took.items()):
        print(f"{harm:<9} {inter:<14} {len(times):>4} done, slowest {max(times, default=0):.2f} s")
    print(", ".join(f"{num} {what}" for what, num in counts.items() if num))
    print(f"chaos: {sum(len(times) for times in took.values())} right, {broken} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
