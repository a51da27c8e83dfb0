# SPDX-License-Identifier: Apache-2.0
"""What the harms share."""
import collections
import os
import random
import socket
import threading
import time

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


def wait_for_server(address):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with socket.socket() as probe:
            probe.settimeout(5)
            if probe.connect_ex(address) == 0:
                return
        time.sleep(0.01)
    raise Harm("nep-info --serve does not answer")


class Strangers:
    """At the rendezvous: rubbish, half a greeting, silence. with Strangers(address): ..."""

    def __init__(self, address):
        self.address, self.silent, self.over = address, [], threading.Event()
        self.thread = threading.Thread(target=self.come)

    def come(self):
        while not self.over.is_set():
            end = socket.socket()
            end.settimeout(0.2)
            try:
                end.connect(self.address)
                choice = random.randrange(4)
                if choice == 0:
                    end.sendall(random.randbytes(random.randrange(1, 4096)))
                elif choice == 1:
                    end.sendall(b"GET / HTTP/1.1\r\n\r\n")
                elif choice == 2:
                    end.sendall(b"\xff" * 65536)
                elif len(self.silent) < 100:
                    self.silent.append(end)
                    continue
            except OSError:
                pass
            end.close()
            counts["strangers"] += 1
            time.sleep(0.001)

    def __enter__(self):
        self.thread.start()

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()
        for end in self.silent:
            end.close()
