# SPDX-License-Identifier: Apache-2.0
"""Harm to a group that lives through it (chaos_seat.c): ranks die, the others go on, newcomers take
the empty seats. A group's own store outlives every rank, so any rank may die, rank 0 too."""
import json
import os
import random
import signal
import subprocess
import threading
import time

import worlds
from common import Harm, Strangers, counts, wait_for_server

OUT = 4  # how chaos_seat ends when the group went on without it


class Seat:
    """One process, and what it has said so far."""

    def __init__(self, command, env, error):
        self.said, self.changed, self.error, self.read = [], threading.Condition(), error, 0
        with open(error, "ab") as file:
            self.process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL,
                                            stdout=subprocess.PIPE, stderr=file)
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()

    def listen(self):
        for line in self.process.stdout:
            if not line.startswith(b"{"):  # UCX's own warnings
                with open(self.error, "ab") as file:
                    file.write(line)
                continue
            event = json.loads(line)
            if event["e"] == "vain":
                counts["preparations that failed"] += 1
                counts["newcomers let in while all wait, after two"] += event["times"] == 2
            with self.changed:
                self.said.append(event)
                self.changed.notify_all()
        with self.changed:
            self.said.append({"e": "silence", "t": time.monotonic_ns()})
            self.changed.notify_all()

    def wait(self, wanted, seconds):
        """The first event from self.read on for which wanted(event) holds; None: not in time, or
        the process has ended."""
        end = time.monotonic() + seconds
        at = self.read
        with self.changed:
            while True:
                while at < len(self.said):
                    if wanted(self.said[at]):
                        return self.said[at]
                    if self.said[at]["e"] == "silence":
                        return None
                    at += 1
                if not self.changed.wait(end - time.monotonic()) and at == len(self.said):
                    return None

    def since(self):
        with self.changed:
            return self.said[self.read:]

    def signal(self, number):
        try:
            self.process.send_signal(number)
        except ProcessLookupError:
            pass

    def last_words(self):
        with open(self.error, encoding="utf-8", errors="replace") as file:
            return file.read()[-1500:]


class Group:
    def __init__(self, args, inter, folder):
        self.args, self.folder, self.seats, self.server = args, folder, {}, None
        self.world = worlds.make(args, inter)
        self.inter = inter.removeprefix("hosts:")
        self.num = self.world.num_ranks
        self.shape = random.choice([[], ["--rank-layout"], ["--mapped"]])
        self.shape = [*self.shape, "--tokens", str(random.choice([1, 16, 64]))]
        self.shape += getattr(args, "join", random.choice([[], [], ["--waits"]]))
        self.gaps = [0, 0, 0]
        where = os.path.dirname(args.perf)
        host, port = self.world.place()
        self.address = (host, port)
        self.program = os.path.join(where, "chaos_seat")
        try:
            serve = [os.path.join(where, "nep-info"), "--serve", f"{host}:{port}", "--ranks",
                     str(self.num)]
            self.server = subprocess.Popen(self.world.serve(serve), stdin=subprocess.DEVNULL,
                                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if not inter.startswith("hosts:"):
                wait_for_server(self.address)
            for rank in range(self.num):
                self.start(rank)
            for rank in range(self.num):
                self.must(rank, "ready", 4 * args.patience)
            self.forget()
        except Harm:
            self.destroy()
            raise

    def start(self, rank, *more):
        timeout = ["--timeout-ms", str(int(self.args.timeout * 1000))]
        if self.args.wait:
            timeout += ["--wait-ms", str(int(self.args.wait * 1000))]
        command = [self.program, str(rank), f"{self.address[0]}:{self.address[1]}",
                   self.world.sizes, self.inter, *timeout, *self.shape, *more]
        env = {**os.environ, "NEP_LOG": os.environ.get("NEP_LOG", "warn"),
               "NEP_ADVERSARY_SEED": str(random.getrandbits(31))}
        self.seats[rank] = Seat(self.world.on(rank, command), env,
                                os.path.join(self.folder, f"{rank}.err"))

    def forget(self):
        """What was said until here is checked."""
        for seat in self.seats.values():
            seat.read = len(seat.said)

    def words(self):
        return "".join(f"\n--- rank {rank} ({seat.process.poll()}): "
                       f"{[e['e'] for e in seat.since()]}\n{seat.last_words()}"
                       for rank, seat in sorted(self.seats.items()))

    def require(self, condition, *what):
        if not condition:
            raise Harm(" ".join(str(part) for part in what) + self.words())

    def must(self, rank, event, seconds, wanted=lambda e: True):
        seat = self.seats[rank]
        found = seat.wait(lambda e: (e["e"] == event and wanted(e)), seconds)
        state = "still runs" if seat.process.poll() is None else f"ended: {seat.process.poll()}"
        self.require(found, "HANG or worse: rank", rank, "did not come to", event, "within",
                     f"{seconds:.1f} s; it", state)
        return found

    def peace(self):
        """Nobody has reported a loss, and nobody has ended."""
        for rank, seat in self.seats.items():
            bad = [e for e in seat.since() if e["e"] in ("fault", "wrong", "out", "silence")]
            self.require(not bad, "rank", rank, "was not harmed, but says", bad)

    def all_good(self, seconds, start_ns):
        """All who are left are in one group of just these, and have done a step in it."""
        last = 0
        for rank, seat in self.seats.items():
            done = self.must(rank, "recovered", seconds,
                             lambda e: e["live"] == len(self.seats) and e["t"] > start_ns)
            good = self.must(rank, "good", seconds,
                             lambda e, d=done: e["generation"] >= d["generation"])
            last = max(last, good["t"])
            self.require(not [e for e in seat.since() if e["e"] == "wrong"], "wrong elements")
        return (last - start_ns) / 1e9

    def lose(self, ranks, number=signal.SIGKILL):
        lost = [self.seats.pop(rank) for rank in ranks]
        for idx, seat in enumerate(lost):
            if idx > 0:
                time.sleep(random.choice([0, random.uniform(0, 0.05)]))
            seat.signal(number)
        return lost, time.monotonic_ns()

    def empty(self):
        return [rank for rank in range(self.num) if rank not in self.seats]

    def fill(self, ranks):
        """Newcomers in those seats; all have done a step with them."""
        if not ranks:
            return 0
        start_ns = time.monotonic_ns()
        for rank in ranks:
            self.start(rank, "--joins")
        took = self.all_good(4 * self.args.patience, start_ns)
        for rank, seat in self.seats.items():
            faults = [e for e in seat.since() if e["e"] == "fault"]
            self.require(not faults, "rank", rank, "reports", faults, "while newcomers come")
        joined = [seat for rank, seat in self.seats.items() if rank not in ranks]
        goods = [e for seat in joined for e in seat.since() if e["e"] == "good"]
        self.gaps = [max([e[what] for e in goods], default=0) for what in ("call", "gap", "calm")]
        counts["newcomers let in"] += len(ranks)
        self.forget()
        return took

    def end(self):
        for seat in self.seats.values():
            seat.signal(signal.SIGTERM)
        for rank, seat in self.seats.items():
            self.must(rank, "end", 4 * self.args.patience)
            status = seat.process.wait(20)
            self.require(status == 0, "rank", rank, "ended with", status)
            counts["steps"] += [e for e in seat.said if e["e"] == "end"][0]["steps"]

    def destroy(self):
        for seat in self.seats.values():
            seat.signal(signal.SIGKILL)
            seat.process.wait()
        if self.server is not None:
            self.server.kill()
            self.server.wait()
        self.world.close()


# ---- harms: each leaves a group that goes on; they return seconds ---------------------------------

def named(group, victims, start_ns, exactly):
    """Every survivor names a victim (exactly: and none other) within twice the deadline."""
    bound = 2 * (group.args.wait or group.args.timeout)
    slowest, hits = 0, 0
    for rank in group.seats:
        fault = group.must(rank, "fault", bound + group.args.patience, lambda e: e["t"] > start_ns)
        late = (fault["t"] - start_ns) / 1e9
        slowest = max(slowest, late)
        hits += fault["rank"] in victims
        group.require(not exactly or fault["rank"] in victims, "rank", rank, "names",
                      fault["rank"], "instead of", victims)
        group.require(late < bound, "rank", rank, f"names it after {late:.2f} s")
    group.require(hits > 0, "nobody names", victims)
    counts["faults that name the lost rank"] += hits
    counts["faults"] += len(group.seats)
    counts["slowest to name, ms"] = max(counts["slowest to name, ms"], int(slowest * 1e3))


def kill(group, num=1):
    refill(group, 1 + num)
    victims = random.sample(sorted(group.seats), num)
    time.sleep(random.uniform(0, group.args.spread / 4))
    group.peace()
    group.forget()
    start_ns = time.monotonic_ns()
    lost, _ = group.lose(victims)
    for seat in lost:
        seat.process.wait()
    named(group, victims, start_ns, True)
    took = group.all_good(4 * group.args.patience, start_ns)
    group.forget()
    counts["kills"] += num
    counts["slowest to go on, ms"] = max(counts["slowest to go on, ms"], int(took * 1e3))
    return took


def twice(group):
    """Two die, at once or one in the recovery from the other."""
    return kill(group, 2)


def rejoin(group):
    """A rank dies, a newcomer takes the seat."""
    if not group.empty():
        kill(group)
    took = group.fill(group.empty())
    counts["rejoins"] += 1
    return took


def refill(group, least):
    """At least so many more than one live, so that somebody is left."""
    if len(group.seats) <= least:
        group.fill(group.empty())


def late(group):
    """A rank stands still until the others have gone on without it, then wakes: it is out, and what
    it still writes harms nobody. A newcomer takes the seat."""
    refill(group, 2)
    victim = random.choice(sorted(group.seats))
    group.peace()
    group.forget()
    start_ns = time.monotonic_ns()
    (seat,), _ = group.lose([victim], signal.SIGSTOP)
    try:
        named(group, [victim], start_ns, False)
        took = group.all_good(4 * group.args.patience, start_ns)
        group.forget()
        seat.signal(signal.SIGCONT)
        try:
            status = seat.process.wait(4 * group.args.patience)
        except subprocess.TimeoutExpired:
            raise Harm(f"HANG: rank {victim} woke and does not end" + seat.last_words()) from None
        group.require(status == OUT, "rank", victim, "woke and ended with", status,
                      seat.last_words())
        group.peace()
    finally:
        seat.signal(signal.SIGKILL)
        seat.process.wait()
    return took


def pause(group):
    """Ranks stand still for less than the deadline: nobody is lost."""
    for _ in range(3):
        seat = random.choice(list(group.seats.values()))
        time.sleep(random.uniform(0, 0.1))
        seat.signal(signal.SIGSTOP)
        time.sleep(random.uniform(0.01, 0.25 * (group.args.wait or group.args.timeout)))
        seat.signal(signal.SIGCONT)
    return still_right(group)


def still_right(group):
    """Nobody has noticed: the group changes without a fault when one more comes, or not at all."""
    start = time.monotonic()
    time.sleep(0.1)
    group.peace()
    return time.monotonic() - start


def scan(group):
    """Strangers at the store, while a newcomer joins through it too."""
    with Strangers(group.address):
        time.sleep(0.2)
        took = rejoin(group) if random.random() < 0.5 else still_right(group)
    return took


def stillborn(group):
    """A newcomer dies while it joins: the others let it in and lose it, or never notice."""
    if not group.empty():
        kill(group)
    seat = random.choice(group.empty())
    members = dict(group.seats)
    group.start(seat, "--joins")
    time.sleep(random.uniform(0, group.args.spread / 2))
    newcomer = group.seats.pop(seat)
    newcomer.signal(signal.SIGKILL)
    newcomer.process.wait()
    group.seats = members
    # Whatever they made of it, a second one finds them working.
    took = 0
    start_ns = time.monotonic_ns()
    group.start(seat, "--joins")
    took = group.all_good(6 * group.args.patience, start_ns)
    for rank, other in group.seats.items():
        named_ranks = {e["rank"] for e in other.since() if e["e"] == "fault"}
        group.require(named_ranks <= {seat, -1}, "rank", rank, "names", named_ranks, "not", seat)
    group.forget()
    return took


def blink(group):
    """A link is down for a moment, less than what its transport bridges: nobody is lost."""
    name = random.choice(group.world.links())
    group.world.link(name, "down")
    time.sleep(random.uniform(0, 1) * group.world.short_s())
    group.world.link(name, "up")
    time.sleep(0.5)
    return still_right(group)


def slow(group):
    """Packets are late, and some are lost: nobody is, nothing is wrong."""
    name = random.choice(group.world.links())
    group.world.slow(name, ["delay", f"{random.choice([1, 5, 20])}ms", "1ms", "loss",
                            f"{random.choice([0, 1, 3])}%"])
    try:
        time.sleep(random.uniform(0.3, 1))
        took = rejoin(group) if random.random() < 0.5 else still_right(group)
    finally:
        group.world.slow(name, None)
    return took


def cut(group):
    """A link is down until somebody was given up; then it is back and the seats are taken again. Two
    halves that cannot see each other agree through the store on which of them goes on."""
    group.fill(group.empty())
    name = random.choice(group.world.links())
    start_ns = time.monotonic_ns()
    group.world.link(name, "down")
    try:
        end = time.monotonic() + 4 * group.args.patience
        while time.monotonic() < end and not any(
                e["e"] == "fault" for seat in group.seats.values() for e in seat.since()):
            time.sleep(0.05)
        time.sleep(random.uniform(0, 0.5))
    finally:
        group.world.link(name, "up")
    group.require(any(e["e"] == "fault" for seat in group.seats.values() for e in seat.since()),
                  "link", name, "is down and nobody notices")
    # Those that are out end; the others are in one generation at last, all of the same size.
    end = time.monotonic() + 8 * group.args.patience
    while time.monotonic() < end:
        for rank in list(group.seats):
            if group.seats[rank].process.poll() is not None:
                seat = group.seats.pop(rank)
                group.require(seat.process.poll() == OUT, "rank", rank, "ended with",
                              seat.process.poll(), seat.last_words())
        last = [[e for e in seat.since() if e["e"] in ("good", "fault")][-1:]
                for seat in group.seats.values()]
        sizes = [[e for e in seat.since() if e["e"] == "recovered"][-1:]
                 for seat in group.seats.values()]
        if all(e and e[0]["e"] == "good" for e in last) and all(
                s and s[0]["live"] == len(group.seats) for s in sizes) and \
                len({e[0]["generation"] for e in last}) == 1:
            break
        time.sleep(0.05)
    else:
        raise Harm("HANG: after a cut the group does not come together again" + group.words())
    group.require(len(group.seats) > 0, "nobody is left")
    counts["given up in cuts"] += len(group.empty())
    took = (time.monotonic_ns() - start_ns) / 1e9
    group.forget()
    group.fill(group.empty())
    return took


HARMS = {"kill": kill, "twice": twice, "rejoin": rejoin, "late": late, "pause": pause,
         "scan": scan, "stillborn": stillborn, "blink": blink, "slow": slow, "cut": cut}
WIRE = ("blink", "slow", "cut")
