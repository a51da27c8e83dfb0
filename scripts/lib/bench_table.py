#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""usage: bench_table.py NAME.ROUND.json...

One line a benchmark: medians over its rounds, and over the ratios of all alternating pairs.
"""
import collections
import json
import os
import statistics
import sys


def main():
    runs = collections.OrderedDict()
    for path in sys.argv[1:]:
        name = os.path.basename(path).rsplit(".", 2)[0]
        with open(path, encoding="utf-8") as file:
            runs.setdefault(name, []).append(json.load(file))
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
