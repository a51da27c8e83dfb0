#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""usage: bench_table.py NAME.ROUND.json...

One line a benchmark: medians over its rounds, and over the ratios of all alternating pairs. Those
beside perftest have a table of their own: the ratio of both medians, and what it should reach.
"""
import collections
import json
import os
import statistics
import sys


PERFTEST = (("bw", "bandwidth, 64 KiB, MiB/s", "at least 0.9"),
            ("lat", "latency, 2 bytes, us", "at most 1.1"))


def beside_perftest(runs):
    print(f"{'nep-perf put beside perftest':<40} {'pairs':>5} {'ratio':>6} {'least':>6} {'most':>6} "
          f"{'nearep':>8} {'perftest':>8}  aim")
    for name, rounds in runs.items():
        for key, title, aim in PERFTEST:
            ours = [value for run in rounds for value in run[key + "_ours"]]
            theirs = [value for run in rounds for value in run[key + "_theirs"]]
            if not ours or len(ours) != len(theirs):
                print(f"{name + ' ' + title:<40} {len(ours)} and {len(theirs)} figures: a run failed")
                continue
            pairs = [mine / other for mine, other in zip(ours, theirs)]
            mine, other = statistics.median(ours), statistics.median(theirs)
            print(f"{name + ' ' + title:<40} {len(pairs):>5} {mine / other:>6.2f} {min(pairs):>6.2f} "
                  f"{max(pairs):>6.2f} {mine:>8.1f} {other:>8.1f}  {aim}")


def main():
    runs = collections.OrderedDict()
    guests = collections.OrderedDict()
    for path in sys.argv[1:]:
        name = os.path.basename(path).rsplit(".", 2)[0]
        with open(path, encoding="utf-8") as file:
            run = json.load(file)
        (guests if "bw_ours" in run else runs).setdefault(name, []).append(run)
    if guests:
        beside_perftest(guests)
    if not runs:
        return
    print(f"{'benchmark':<28} {'pairs':>5} {'nearep us':>10} {'baseline us':>11} {'ratio':>6} "
          f"{'least':>6} {'most':>6} {'% of byte floor':>16}")
    for name, rounds in runs.items():
        ours = statistics.median(run["total_us"]["p50"] for run in rounds)
        ratios = [ratio for run in rounds for ratio in run.get("speedup_pairs", [])]
        if not ratios:
            print(f"{name:<28} {'-':>5} {ours:>10.0f} {'-':>11} {'-':>6}")
            continue
        theirs = statistics.median(run["baseline_total_us"]["p50"] for run in rounds)
        floor = statistics.median(run["byte_floor_pct"] for run in rounds)
        print(f"{name:<28} {len(ratios):>5} {ours:>10.0f} {theirs:>11.0f} "
              f"{statistics.median(ratios):>6.2f} {min(ratios):>6.2f} {max(ratios):>6.2f} "
              f"{floor:>15.0f}%")


main()
