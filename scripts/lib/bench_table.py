#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""usage: bench_table.py NAME.ROUND.json...

Medians over the rounds of each benchmark, and the spread of the ratios.
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
    print(f"{'benchmark':<28} {'rounds':>6} {'nearep us':>10} {'baseline us':>11} {'ratio':>6} "
          f"{'least':>6} {'most':>6}")
    for name, rounds in runs.items():
        ours = statistics.median(run["total_us"]["p50"] for run in rounds)
        ratios = [run["speedup"] for run in rounds if run.get("speedup")]
        if not ratios:
            print(f"{name:<28} {len(rounds):>6} {ours:>10.0f} {'-':>11} {'-':>6}")
            continue
        theirs = statistics.median(run["baseline_total_us"] if not isinstance(
            run["baseline_total_us"], dict) else run["baseline_total_us"]["p50"] for run in rounds)
        print(f"{name:<28} {len(rounds):>6} {ours:>10.0f} {theirs:>11.0f} "
              f"{statistics.median(ratios):>6.2f} {min(ratios):>6.2f} {max(ratios):>6.2f}")


main()
