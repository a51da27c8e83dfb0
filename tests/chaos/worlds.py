# SPDX-License-Identifier: Apache-2.0
"""Where ranks run, and what can be done to the wire between them: processes of this machine, hosts
that are network namespaces (tests/hosts/hosts.sh), devices of the guest of tests/vm."""
import os
import random
import subprocess


from common import Harm, free_port, require


class Machine:
    """Processes on emulated nodes; no wire."""

    def __init__(self, args):
        self.timeout, self.sizes = args.timeout, args.sizes
        self.num_ranks = sum(int(size) for size in self.sizes.split(","))

    def place(self):
        """Host and port for the store."""
        return "127.0.0.1", free_port()

    def serve(self, command):
        return command

    def on(self, rank, command):
        del rank
        return command

    def links(self):
        """Names of what can be cut; none."""
        return []

    def link(self, name, state):
        raise NotImplementedError

    def slow(self, name, how):
        raise NotImplementedError

    def short_s(self):
        """A link may be down for so long without anybody being lost."""
        return 0.25 * self.timeout

    def close(self):
        pass


class Guest(Machine):
    """In the guest: rank r at device rxe<r>, a cable p<r> for each; the store is not on them."""

    def links(self):
        return [str(rank) for rank in range(self.num_ranks)]

    def link(self, name, state):
        subprocess.run(["ip", "link", "set", f"p{name}", state], check=True)

    def slow(self, name, how):
        change = ["replace", "dev", f"n{name}", "root", "netem", *how] if how else \
            ["del", "dev", f"n{name}", "root"]
        subprocess.run(["tc", "qdisc", *change], check=True)

    def short_s(self):
        """Below the device's own retries (NEP_VERBS_ACK_TIMEOUT, NEP_VERBS_RETRY); the kernel takes
        note of a link that is up again within a second. Seven retries are endless there."""
        ack = int(os.environ.get("NEP_VERBS_ACK_TIMEOUT", "14"))
        retry = int(os.environ.get("NEP_VERBS_RETRY", "7"))
        return max(0, 0.8 * 4.096e-6 * 2**ack * (retry + 1) - 1.1)


class Hosts(Machine):
    """Two hosts, two ranks each. The store is on the first, whose cable is therefore left alone."""

    def __init__(self, args):
        super().__init__(args)
        self.sizes, self.num_ranks = "=4", 4
        here = os.path.dirname(os.path.abspath(__file__))
        self.tool = os.path.join(here, "..", "hosts", "hosts.sh")
        self.env = {**os.environ, "HOSTS_GROUP": f"nep{os.getpid()}"}
        self.run("up", "2", "1gbit")

    def run(self, *words):
        done = subprocess.run(["bash", self.tool, *words], env=self.env, stdin=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                              timeout=60, check=False)
        require(done.returncode == 0, "hosts.sh", *words, "failed:", done.stderr)

    def place(self):
        return "198.18.7.1", random.randrange(20000, 40000)

    def serve(self, command):
        return ["env", f"HOSTS_GROUP={self.env['HOSTS_GROUP']}", "bash", self.tool, "exec", "0",
                *command]

    def on(self, rank, command):
        return ["env", f"HOSTS_GROUP={self.env['HOSTS_GROUP']}", "bash", self.tool, "exec",
                str(rank // 2), *command]

    def links(self):
        return ["1"]

    def link(self, name, state):
        self.run("link", name, state)

    def slow(self, name, how):
        if how is None:
            self.run("slow", name, "none")
            return
        try:
            self.run("slow", name, "netem", *how)
        except Harm:  # a kernel without netem: a wire so narrow that packets queue, and are dropped
            self.run("slow", name, "tbf", "rate", "4mbit", "burst", "16kb", "latency", "50ms")

    def close(self):
        self.run("down")


def without_hosts():
    """Why there can be none here, or nothing."""
    tool = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "hosts", "hosts.sh")
    return subprocess.run(["bash", tool, "check"], stdout=subprocess.PIPE, text=True,
                          check=False).stdout.strip()


def make(args, inter):
    if args.world == "guest":
        return Guest(args)
    return Hosts(args) if inter.startswith("hosts:") else Machine(args)
