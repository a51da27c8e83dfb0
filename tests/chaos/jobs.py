# SPDX-License-Identifier: Apache-2.0
"""Harm to jobs of nep-perf ep, which end of it, recover, or do not notice. What is checked is what
nep-perf prints and how it ends, so it is the library's own sentences and its own comparison of every
element (--verify) that are put to the test."""
import functools
import json
import os
import random
import re
import signal
import subprocess
import time

from common import Harm, Strangers, counts, free_port, require, wait_for_server

RANKS = 4
SHAPE = ["--ranks", str(RANKS), "--ranks-per-node", "2", "--hidden", "256", "--experts", "16",
         "--top-k", "4", "--warmup", "0"]
ENDLESS = ["--iters", "100000000"]


class Job:
    """nep-perf ep. spawned: one process that starts the ranks; else a process for each rank."""

    def __init__(self, args, arguments, spawned, inter, folder, wrap=(), more=None):
        self.folder, self.spawned = folder, spawned
        self.timeout = args.timeout
        port = free_port()
        self.address = ("127.0.0.1", port)
        base = {**os.environ, "NEP_TIMEOUT": f"{int(args.timeout * 1000)}ms",
                "NEP_LOG": "warn", "NEP_ADVERSARY_SEED": str(random.getrandbits(31)),
                "NEP_RENDEZVOUS": f"127.0.0.1:{port}", **(more or {})}
        command = [*wrap, args.perf, "ep", *SHAPE, "--inter", inter, *arguments]
        self.processes, self.errors, self.server = [], [], None
        if not spawned:  # the store outlives every rank, as docs/bootstrap.md recommends
            info = os.path.join(os.path.dirname(args.perf), "nep-info")
            self.server = subprocess.Popen([info, "--serve", f"127.0.0.1:{port}", "--ranks",
                                            str(RANKS)], stdout=subprocess.DEVNULL,
                                           stderr=subprocess.DEVNULL)
            wait_for_server(self.address)
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
                    command, env=env, stdout=subprocess.DEVNULL, stderr=error))

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


def lose(args, inter, folder, sig, wrap=(), more=None):
    """A rank that is not the store's host goes; every survivor names it."""
    victim = random.randrange(1, RANKS)
    job = Job(args, ["--tokens", str(random.choice([1, 16, 64, 300])), *ENDLESS], False, inter,
              folder, wrap, more)
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
            late = re.findall(r"did not (?:come|join) .*: ranks? ([0-9, -]+)", text)
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
    """Strangers at the rendezvous. The job does not notice."""
    job = Job(args, ["--tokens", "16", "--iters", "50", "--verify"], False, inter, folder)
    try:
        with Strangers(job.address):
            statuses = job.end(60 + 2 * args.timeout)
        require(statuses == [0] * RANKS, "ended with", statuses, job.text(0))
        return 0
    finally:
        job.destroy()


def full(args, inter, folder):
    """No file may grow beyond a few KB to a few MB: windows, logs, traces. A refusal or success."""
    blocks = 1 << random.randrange(1, 17)
    wrap = ["sh", "-c", f'trap "" XFSZ; ulimit -f {blocks}; exec "$@"', "sh"]
    job = Job(args, ["--tokens", "16", "--iters", "20", "--verify"], False, inter, folder, wrap,
              {"NEP_TRACE": os.path.join(folder, "trace.%r")})
    try:
        statuses = job.end(60 + 2 * args.timeout)
        refused_or_right(job, statuses)
        require(not [n for n in os.listdir(folder) if n.endswith(".tmp")], "half a trace is left")
        return 0
    finally:
        job.destroy()


def refused_or_right(job, statuses):
    texts = [job.text(idx) for idx in range(len(statuses))]
    require(set(statuses) <= {0, 1, 2}, "ended with", statuses, *texts)
    require(all(status == 0 or text for status, text in zip(statuses, texts)),
            "failed without a sentence:", statuses)
    counts["refusals where a disk was full"] += 1 in statuses or 2 in statuses


def small(where, kilobytes):
    """The words before a command that give it a small file system there, of its own."""
    return ["unshare", "-m", "sh", "-c",
            f'mount -t tmpfs -o size={kilobytes}k tmpfs "{where}" && exec "$@"', "sh"]


@functools.cache
def without_small():
    """Why there can be no small file system here: it takes root's rights, which a container may not
    have, and a root that is a mount, which a chroot has not. "" where there can."""
    try:
        tried = subprocess.run([*small("/dev/shm", 4), "true"], capture_output=True, text=True,
                               timeout=60, check=False)
    except OSError as error:
        return str(error)
    return tried.stderr.strip() or f"unshare ended with {tried.returncode}" \
        if tried.returncode != 0 else ""


def shm_full(args, inter, folder):
    """/dev/shm has 16 KB to 64 MB, which is found out at some point of the set-up, or never."""
    if without_small():
        return full(args, inter, folder)
    job = Job(args, ["--tokens", "16", "--iters", "20", "--verify"], True, inter, folder,
              small("/dev/shm", 1 << random.randrange(4, 17)))
    try:
        refused_or_right(job, job.end(60 + 2 * args.timeout))
        return 0
    finally:
        job.destroy()


def dump_full(args, inter, folder):
    """The trace that is dumped at a fault does not fit: the fault is reported as without it."""
    if without_small():
        return full(args, inter, folder)
    where = os.path.join(folder, "trace")
    os.mkdir(where)
    return lose(args, inter, folder, signal.SIGKILL, small(where, 4 << random.randrange(6)),
                {"NEP_TRACE": os.path.join(where, "trace.%r")})


HARMS = {"kill": kill, "stop": stop, "continue": go_on, "pause": pause, "scan": scan, "full": full,
         "shmfull": shm_full, "dumpfull": dump_full}
