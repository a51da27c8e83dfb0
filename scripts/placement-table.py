#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/performance-placement.md, from a folder of traces with own/ and external/.

usage: scripts/placement-table.py TRACES [--seeds N] [--jobs N] [--only PART] [--match TEXT]
                                           [--nearep]

All tables of the page but "In time" (scripts/placement-time.sh) and "Other figures".

Every figure is the mean of N seeds (5), each of the split by request and of the solver, and the
least and most of them in brackets. nep-place is build/bin/nep-place, or NEP_PLACE. Times are taken
last, one run at a time; they are of the processor, which other work on the machine leaves alone.
"""
import argparse
import concurrent.futures
import json
import os
import random
import resource
import struct
import subprocess
import tempfile
import time
import zlib

TOOL = os.environ.get("NEP_PLACE", os.path.join(os.path.dirname(__file__), "../build/bin/nep-place"))
ROWS = [("own/small256", "math-word", 4, 12.5), ("own/small128", "math-word", 4, 12.5),
        ("external/dsv2lite", "summary", 4, 12.5), ("own/small256", "math-word", 8, 12.5),
        ("own/small128", "math-word", 8, 12.5), ("external/dsv2lite", "summary", 8, 12.5),
        ("external/gptoss20b", "gpqa", 4, 12.5), ("external/gptoss20b", "gpqa", 8, 25),
        ("own/small256", "math-word", 4, 25), ("external/gptoss20b", "gpqa", 4, 25)]

# What must be reached: change and imbalance without copies, with them, and of the unseen domain.
MUSTS = {("small256", 4, 12.5): (-29, 1.15, -36, 1.12, -19.5),
         ("small256", 8, 12.5): (-33.5, 1.22, -39, 1.16, -25),
         ("small128", 4, 12.5): (-22, 1.12, -28.5, 1.10, -16),
         ("small128", 8, 12.5): (-25.5, 1.14, -31.5, 1.13, -19),
         ("dsv2lite", 4, 12.5): (-22, 1.16, -29, 1.17, -21.5),
         ("dsv2lite", 8, 12.5): (-21.5, 1.29, -28, 1.29, -22),
         ("gptoss20b", 4, 12.5): (-29.5, 1.38, -39, 1.36, -34),
         ("gptoss20b", 8, 25): (-18.5, 1.51, -35, 1.60, -31)}


def place(*args):
    out = subprocess.run([TOOL, *map(str, args), "--json", "-"], check=True, capture_output=True,
                         text=True).stdout
    return json.loads(out)


class Traces:
    def __init__(self, source, folder):
        self.source, self.folder = source, folder

    def cut(self, trace, part, seed, *options):
        name = "-".join([trace.replace("/", "."), part, str(seed), *options]).replace("--", "")
        path = os.path.join(self.folder, name)
        if not os.path.exists(path):
            mine = f"{path}.{random.getrandbits(40)}"
            place("slice", "--trace", f"{self.source}/{trace}.nept", "--part", part, "--seed", seed,
                  *options, "-o", mine)
            os.replace(mine, path)
        return path

    def compare(self, row, seed, *options):
        trace, domain, nodes, replicas = row
        return place("compare", "--train", self.cut(trace, "train", seed, "--leave-out", domain),
                     "--test", self.cut(trace, "test", seed), "--nodes", nodes, "--replicas",
                     replicas, "--seed", seed, *options)


def span(values, digits=1):
    mean, least, most = sum(values) / len(values), min(values), max(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}".replace("-", "−")
    return f"{mean:.{digits}f} ({least:.{digits}f}, {most:.{digits}f})".replace("-", "−")


def cell(results, *path):
    items = []
    for result in results:
        for key in path:
            result = result[key]
        items.append(result)
    change = [item["change_pct"] for item in items]
    return f"{span(change)} / {sum(i['imbalance_node'] for i in items) / len(items):.3f}"


def mean_of(results, *path):
    total = 0.0
    for result in results:
        for key in path:
            result = result[key]
        total += result
    return total / len(results)


def must_row(row, results):
    """One line of what must be and what is, by the means."""
    key = (os.path.basename(row[0]), *row[2:])
    plain, plain_load, copies, copies_load, unseen = MUSTS[key]
    line = [f"{key[0]}, {key[1]}" + (" (25 %)" if key[2] == 25 else "")]
    for must, load, path in ((plain, plain_load, ("methods", "nearep")),
                             (copies, copies_load, ("methods", "nearep_replicas")),
                             (unseen, None, ("unseen", "methods", "nearep_replicas"))):
        change = mean_of(results, *path, "change_pct")
        loads = mean_of(results, *path, "imbalance_node")
        is_met = change <= must and (load is None or loads <= load)
        line += [f"{must:g}" + (f" / {load:.2f}" if load else ""),
                 f"{change:.1f}" + (f" / {loads:.3f}" if load else "") +
                 ("" if is_met else ": missed")]
    return [cell.replace("-", "−") for cell in line]


def name_of(row):
    return f"{os.path.basename(row[0])}, {row[2]}, {row[3]:g} %, {row[1]}"


def table(title, heads, rows):
    print(f"\n{title}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def uniform(path):
    """A trace of picks that know nothing of each other: 2 layers, 64 experts, top-4."""
    rng, requests, tokens = random.Random(1), 96, 96
    ids = bytearray()
    for _ in range(requests * tokens * 2):
        ids += bytes(rng.sample(range(64), 4))
    head = struct.pack("<8sIIIIIIQII64s32s", b"NEPTRACE", 1, 2, 64, 4, requests, 1,
                       requests * tokens, 1, 0, b"uniform", b"none")
    for i in range(requests):
        head += struct.pack("<IIIIQ", 0, tokens // 2, tokens // 2, 0, i * tokens)
    with open(path, "wb") as file:
        file.write(head + ids + struct.pack("<I", zlib.crc32(head + ids)))


def main_tables(traces, pool, seeds, match, is_short):
    options = ["--online"]
    if is_short:
        options += ["--methods", "nearep,nearep_replicas,nearep_online"]
    jobs = {row: [pool.submit(traces.compare, row, seed, *options) for seed in seeds]
            for row in ROWS if match in name_of(row)}
    done = {row: [job.result() for job in jobs[row]] for row in jobs}
    first, second = [], []
    for row, results in done.items():
        moved = sum(r["methods"]["nearep_online"]["moved_copies"] for r in results) / len(results)
        first.append([name_of(row), cell(results, "methods", "nearep"),
                      cell(results, "methods", "nearep_replicas"),
                      cell(results, "unseen", "methods", "nearep_replicas"),
                      cell(results, "methods", "nearep_online"),
                      cell(results, "unseen", "methods", "nearep_online"), f"{moved:.0f}"])
        if is_short:
            continue
        second.append([name_of(row), *(cell(results, "methods", m) for m in (
            "eplb", "eplb_replicas", "paper", "spectral")),
            *(cell(results, "references", m) for m in ("oracle_homes", "solved_on_test"))])
    table("### nearep", ["trace, nodes, copies, left out", "no copies, all", "copies, all",
                         "copies, unseen", "online, all", "online, unseen", "copies moved"], first)
    table("### Must and reached",
          ["trace, nodes", "must, no copies", "reached", "must, copies", "reached", "must, unseen",
           "reached"], [must_row(row, results) for row, results in done.items()
                        if (os.path.basename(row[0]), *row[2:]) in MUSTS])
    if not is_short:
        table("### Baselines and references, all requests",
              ["trace, nodes, copies, left out", "EPLB", "EPLB, the same copies", "paper", "spectral",
               "oracle homes", "solved on test"], second)


def control_tables(traces, pool, seeds):
    rows = [ROWS[0], ROWS[2], ROWS[5], ROWS[6]]
    options = ["--shuffled", "--methods", "nearep,nearep_replicas,eplb_replicas"]
    jobs = [(f"{name_of(row)}, limit {limit}", [
        pool.submit(traces.compare, row, seed, *options, "--max-imbalance", limit)
        for seed in seeds]) for row in rows for limit in (1.10, 1.04)]
    path = os.path.join(traces.folder, "uniform")
    uniform(path)
    jobs.append(("uniform routing, 4, 12.5 %", [
        pool.submit(place, "compare", "--train", path, "--test", path, "--nodes", 4, "--replicas",
                    12.5, *options[1:])]))
    table("### Controls: picks exchanged between tokens, and uniform routing",
          ["trace", "no copies", "copies", "EPLB, the same copies"],
          [[name, *(cell([j.result() for j in job], "methods", m) for m in (
              "nearep", "nearep_replicas", "eplb_replicas"))] for name, job in jobs])
    large = [pool.submit(traces.compare, (*ROWS[0][:2], 8, 0), seed, "--gpus-per-node", 8)
             for seed in seeds]
    large = [job.result() for job in large]
    ranks = {m: span([r[where][m]["ranks_per_token"] for r in large], 2) for where, m in (
        ("methods", "linear"), ("methods", "eplb"), ("references", "packed_inside"),
        ("methods", "nearep"))}
    table("### Ranks per token, small256, 8 nodes of 8",
          ["contiguous", "EPLB", "the map, ranks packed by load", "the map"], [list(ranks.values())])


def resolve(traces, row, seed):
    """From the map of the others, on two thirds of the unseen domain; scored on its last third."""
    trace, domain, nodes, replicas = row
    shape = ["--nodes", nodes, "--replicas", replicas]
    maps = os.path.join(traces.folder, f"map.{trace.replace('/', '.')}.{nodes}.{seed}")
    place("solve", "--trace", traces.cut(trace, "train", seed, "--leave-out", domain), *shape,
          "-o", maps)
    seen = traces.cut(trace, "train", seed, "--only", domain)
    test = traces.cut(trace, "test", seed, "--only", domain)
    base = place("compare", "--train", seen, "--test", test, *shape, "--methods", "linear")
    base = base["methods"]["linear"]["remote_nodes_per_token"]
    out = []
    for i, limit in enumerate((None, 400, 0)):
        moved = 0
        if limit is not None:
            moved = place("solve", "--trace", seen, *shape, "--warm", maps, "--max-moves", limit,
                          "-o", f"{maps}.{i}")["moved_copies"]
        score = place("eval", "--trace", test, "--map", f"{maps}.{i}" if i else maps)
        out.append((100 * (score["remote_nodes_per_token"] / base - 1), score["imbalance_node"],
                    moved))
    return out


def other_tables(traces, pool, seeds):
    rows = [ROWS[0], ROWS[3], ROWS[2], ROWS[5]]
    jobs = [[pool.submit(resolve, traces, row, seed) for seed in seeds] for row in rows]
    lines = []
    for row, job in zip(rows, jobs):
        runs = [j.result() for j in job]
        lines.append([name_of(row)] + [
            f"{span([r[i][0] for r in runs])} / {sum(r[i][1] for r in runs) / len(runs):.3f}, "
            f"{sum(r[i][2] for r in runs) / len(runs):.0f} moved" for i in range(3)])
    table("### Solving again from the running map, on the unseen domain's earlier requests",
          ["trace, nodes, copies, domain", "before", "at most 400 copies moved", "no limit"], lines)
    trace, domain, _, replicas = ROWS[0]
    rules = ("nearep", "fcfs", "least_loaded")
    lines = []
    for nodes in (4, 8):
        path = os.path.join(traces.folder, f"queue.{nodes}")
        place("solve", "--trace", traces.cut(trace, "train", 3), "--nodes", nodes, "--replicas",
              replicas, "-o", path)
        runs = [place("queue", "--trace", traces.cut(trace, "test", 3), "--map", path, "--seed", s)
                for s in seeds]
        for rule in rules:
            mine = [r["rules"][rule] for r in runs]
            lines.append([f"{nodes} homes, {rule}"] + [
                span([m[k] for m in mine], d) for k, d in (
                    ("rows_over_oracle_pct", 1), ("mean_wait", 1), ("p99_wait", 1),
                    ("max_wait", 0), ("jain", 4))])
    table("### The queue: small256, Poisson at 0.8, age bound 512 ticks",
          ["rule", "rows over oracle, %", "mean wait", "p99 wait", "longest", "Jain"], lines)


def seconds(*args):
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime, time.monotonic()
    place(*args)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    return spent, time.monotonic() - start


def deepseek(path):
    """DeepSeek-V3's shape, made up: 58 layers, 256 experts, top-8 of four of eight groups, 100
    requests of ten kinds with 16 + 200 tokens each, so that 20,000 a layer are scored."""
    rng, layers, requests = random.Random(3), 58, 100
    kinds = [[rng.sample(range(8), 4) for _ in range(layers)] for _ in range(10)]
    pools = [[[g * 32 + e for g in groups for e in rng.sample(range(32), 12)] for groups in kind]
             for kind in kinds]
    ids = bytearray()
    for i in range(requests):
        pool = pools[i % 10]
        for _ in range(216):
            for picks in pool:
                ids += bytes(rng.sample(picks, 8))
    head = struct.pack("<8sIIIIIIQII64s32s", b"NEPTRACE", 1, layers, 256, 8, requests, 1,
                       requests * 216, 1, 0, b"DeepSeek-V3's shape", b"none")
    for i in range(requests):
        head += struct.pack("<IIIIQ", 0, 16, 200, 0, i * 216)
    with open(path, "wb") as file:
        file.write(head + ids + struct.pack("<I", zlib.crc32(head + ids)))


def time_table(traces):
    lines = []
    for row in ROWS:
        trace, domain, nodes, replicas = row
        whole = f"{traces.source}/{trace}.nept"
        path = os.path.join(traces.folder, "timed")
        shape = ["--trace", whole, "--nodes", nodes]
        plain = seconds("solve", *shape, "-o", path)
        full = seconds("solve", *shape, "--replicas", replicas, "-o", path)
        only = traces.cut(trace, "all", 1, "--only", domain)
        warm = [seconds("solve", "--trace", only, "--nodes", nodes, "--replicas", replicas,
                        "--warm", path, "--max-moves", limit, "-o", f"{path}.warm")
                for limit in (400, 0)]
        lines.append([f"{os.path.basename(trace)}, {nodes}, {replicas:g} %",
                      *(f"{t[0]:.2f}" for t in (plain, full, *warm)), f"{full[1]:.2f}"])
    table("### Seconds of the processor, one thread, the whole trace",
          ["trace, nodes, copies", "without copies", "with copies", "again, 400 copies",
           "again, no limit", "with copies, on the clock"], lines)
    path = os.path.join(traces.folder, "deepseek")
    deepseek(path)
    spent, clock = seconds("solve", "--trace", path, "--nodes", 18, "--replicas", 12.5,
                           "--threads", 2, "-o", f"{path}.map")
    print(f"\nDeepSeek-V3's shape, 18 nodes, 32 copies, 2 threads: {clock:.1f} s, of the processor "
          f"{spent:.1f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("traces")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", choices=["main", "controls", "others", "times"])
    parser.add_argument("--match", default="", help="only rows of the first tables named so")
    parser.add_argument("--nearep", action="store_true",
                        help="first table only, without the methods of others")
    args = parser.parse_args()
    seeds = list(range(1, args.seeds + 1))
    with tempfile.TemporaryDirectory() as folder, \
            concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        traces = Traces(args.traces, folder)
        parts = {"main": lambda: main_tables(traces, pool, seeds, args.match, args.nearep),
                 "controls": lambda: control_tables(traces, pool, seeds),
                 "others": lambda: other_tables(traces, pool, seeds),
                 "times": lambda: time_table(traces)}
        commit = subprocess.run(["git", "-C", os.path.dirname(__file__) or ".", "describe",
                                 "--always", "--dirty"], capture_output=True, text=True,
                                check=False).stdout.strip()
        print(f"commit {commit or 'unknown'}, {time.strftime('%Y-%m-%d')}, {args.seeds} seeds")
        for name, part in parts.items():
            if args.only in (None, name):
                part()


main()
