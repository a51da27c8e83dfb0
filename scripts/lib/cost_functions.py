#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Reads what scripts/cost.sh measured.

usage: cost_functions.py N BASE NOW    the N functions that differ most between the profiles
                                       BASE-50/-150 and NOW-50/-150, in instructions an iteration
       cost_functions.py --median JSON the median of dispatch and combine in a result of nep-perf
       cost_functions.py --pairs FILE  lines "before after": medians and how they compare
"""
import json
import re
import statistics
import subprocess
import sys


def functions(path):
    text = subprocess.run(["callgrind_annotate", "--threshold=100", path], check=True,
                          capture_output=True, text=True).stdout
    found = {}
    for line in text.splitlines():
        match = re.match(r"\s*([\d,]+) \(.*?\)\s+\S*?:(\S+)", line)
        if match:
            name = re.sub(r"\.(constprop|isra|part|cold).*", "", match[2])
            found[name] = found.get(name, 0) + int(match[1].replace(",", ""))
    return found


def each(prefix):
    less, more = functions(prefix + "-50"), functions(prefix + "-150")
    return {name: (more[name] - less.get(name, 0)) / 100 for name in more}


def compare(num, base, now):
    before, after = each(base), each(now)
    names = sorted(set(before) | set(after),
                   key=lambda name: -abs(after.get(name, 0) - before.get(name, 0)))
    for name in names[:num]:
        print(f"{before.get(name, 0):10.0f} {after.get(name, 0):10.0f} "
              f"{after.get(name, 0) - before.get(name, 0):+8.0f}  {name}")


def pairs(path):
    rows = [tuple(map(float, line.split())) for line in open(path, encoding="ascii")]
    ratios = sorted(after / before for before, after in rows)
    before = statistics.median(row[0] for row in rows)
    after = statistics.median(row[1] for row in rows)
    print(f"{len(rows)} alternating pairs: medians {before:.1f} us before, {after:.1f} us now "
          f"({(after / before - 1) * 100:+.1f} %); median of the pairs' ratios "
          f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")


def main():
    if sys.argv[1] == "--median":
        print(json.load(open(sys.argv[2], encoding="utf-8"))["total_us"]["p50"])
    elif sys.argv[1] == "--pairs":
        pairs(sys.argv[2])
    else:
        compare(int(sys.argv[1]), sys.argv[2], sys.argv[3])


main()
