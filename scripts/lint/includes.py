#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Who includes whom. Prints the table of folders and fails on an arrow that must not be there.

base knows nothing of the rest; transport and placement never include each other; dispatch joins
them, and of transport it sees the contract alone; headers of one transport stay in its folder.
"""
import collections
import os
import re
import subprocess
import sys

MAY = {  # folder -> folders that it may include
    "include": set(),
    "base": {"base", "include"},
    "transport": {"transport", "base", "include"},
    "placement": {"placement", "base", "include"},
    "dispatch": {"dispatch", "transport", "placement", "base", "include"},
    "perftest": {"perftest", "tools", "dispatch", "transport", "placement", "base", "include"},
    "tools": {"tools", "dispatch", "transport", "placement", "base", "include"},
    "examples": {"include"},
}
# What dispatch may see of transport. How ranks meet and where they are is for what is created
# collectively: the communicator and the ep, also when the members change.
CONTRACT = {"transport/transport.h"}
CONTRACT_CREATE = {
    "dispatch/comm.c": CONTRACT | {
        "transport/bootstrap.h", "transport/clocks.h", "transport/rendezvous.h",
        "transport/topology.h"},
    "dispatch/comm.h": CONTRACT | {"transport/clocks.h"},
    "dispatch/generation.h": {"transport/group.h", "transport/topology.h"},
    "dispatch/generation.c": {"transport/bootstrap.h"},
    "dispatch/ep.c": CONTRACT | {"transport/bootstrap.h"},
    "dispatch/cuda/exec.c": CONTRACT | {"transport/bootstrap.h"},
    "dispatch/cuda/exec_far.c": CONTRACT | {"transport/bootstrap.h"},
    "dispatch/cuda/windows.c": CONTRACT | {"transport/bootstrap.h"},
    "dispatch/build.c": CONTRACT | {"transport/bootstrap.h"},
    "dispatch/buffers.h": CONTRACT | {"transport/share.h"},
    "dispatch/buffers.c": CONTRACT | {"transport/bootstrap.h"},
}
# Headers of others that only one place may know.
OUTSIDE = [
    (re.compile(r"^(infiniband|rdma)/"), ("transport/verbs",)),
    (re.compile(r"^uc[mpst]/"), ("transport/ucx",)),
    (re.compile(r"^(cuda|nv)[a-z_0-9]*\.h$"),
     ("dispatch/cuda/", "transport/cuda/", "transport/proxy/", "transport/verbs",
      "perftest/gpu.c")),
    (re.compile(r"^mpi\.h$"), ("perftest/", "tests/")),
]
INCLUDE = re.compile(r'^\s*#\s*include\s*(["<])([^">]+)[">]')


def files():
    out = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], check=True,
                         capture_output=True, text=True).stdout
    return [f for f in out.split("\n") if re.search(r"\.(c|h|cu|cuh|cc|cpp)$", f)]


def resolve(source, name):
    for base in (os.path.dirname(source), "", "include"):
        path = os.path.normpath(os.path.join(base, name))
        if os.path.exists(path):
            return path
    return None


def broken_rule(source, target):
    home, there = source.split("/")[0], target.split("/")[0]
    if home not in MAY:  # tests see everything
        return None
    if home == "perftest" and target == "tests/ref/ref.h":  # the oracle of --verify
        return None
    if there not in MAY[home]:
        return f"{home} must not include {there}"
    if home == "dispatch" and there == "transport":
        if target not in CONTRACT_CREATE.get(source, CONTRACT):
            return "dispatch sees transport/transport.h alone; " + "; ".join(
                f"{file} also {', '.join(sorted(more - CONTRACT))}"
                for file, more in sorted(CONTRACT_CREATE.items()))
    parts = target.split("/")
    if there == "transport" and len(parts) > 2:
        own = "/".join(parts[:2]) + "/"
        if home in ("base", "dispatch", "placement") or (
                home == "transport" and not source.startswith(own)
                and os.path.basename(source) != "list.c"
                and source.count("/") > 1 and os.path.basename(target) != parts[1] + ".h"):
            return f"headers of {own} stay there"
    return None


def main():
    os.chdir(subprocess.run(["git", "rev-parse", "--show-toplevel"], check=True,
                            capture_output=True, text=True).stdout.strip())
    table, faults = collections.Counter(), []
    for source in files():
        with open(source, encoding="utf-8", errors="replace") as text:
            for number, line in enumerate(text, 1):
                match = INCLUDE.match(line)
                if not match:
                    continue
                name = match.group(2)
                for pattern, homes in OUTSIDE:
                    if pattern.match(name) and not source.startswith(homes + ("tests/",)):
                        faults.append(f"{source}:{number}: <{name}> belongs to {', '.join(homes)}")
                target = resolve(source, name) if match.group(1) == '"' else None
                if target is None:
                    continue
                table[source.split("/")[0], target.split("/")[0]] += 1
                rule = broken_rule(source, target)
                if rule:
                    faults.append(f"{source}:{number}: includes {target}: {rule}")
    rows = sorted({a for a, _ in table})
    columns = [c for c in ("include", "base", "transport", "placement", "dispatch", "tools",
                           "perftest", "tests") if any((r, c) in table for r in rows)]
    print(f"{'includes of':<12}" + "".join(f"{c:>11}" for c in columns))
    for row in rows:
        print(f"{row:<12}" + "".join(f"{table[row, c] or '-':>11}" for c in columns))
    for fault in faults:
        print(fault)
    return 1 if faults else 0


sys.exit(main())
