#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Reads what scripts/cost.sh measured.

usage: cost_functions.py N BASE NOW    the N functions that differ most between the profiles
                                       BASE-50/-150 and NOW-50/-150, in instructions an iteration
       cost_functions.py --pairs FILE  lines "before after": medians and how they compare
"""
import re
import statistics
import subprocess
import sys


CALLS = {"nep_dispatch_send", "nep_dispatch_counts", "nep_dispatch_recv", "nep_combine_send",
         "nep_combine_recv"}


def functions(path, inclusive):
    text = subprocess.run(["callgrind_annotate", "--threshold=100", "--tree=none",
                           f"--inclusive={inclusive}", path], check=True, capture_output=True,
                          text=True).stdout
    found = {}
    for line in text.splitlines():
        match = re.match(r"\s*([\d,]+) \(.*?\)\s+\S*?:(\w+)", line)
        if match:
            cost = int(match[1].replace(",", ""))
            # Clones of a function add up; the inclusive cost of a call is listed more than once.
            found[match[2]] = max(found.get(match[2], 0), cost) if inclusive == "yes" \
                else found.get(match[2], 0) + cost
    return found


def each(prefix, inclusive):
    less, more = functions(prefix + "-50", inclusive), functions(prefix + "-150", inclusive)
    return {name: (more[name] - less.get(name, 0)) / 100 for name in more}


def compare(num, base, now):
    calls = [sum(cost for name, cost in each(prefix, "yes").items() if name in CALLS)
             for prefix in (base, now)]
    print(f"  {calls[0]:.0f} instructions of a dispatch and a combine before, {calls[1]:.0f} now: "
          f"{(calls[1] / calls[0] - 1) * 100:+.2f} %")
    before, after = each(base, "no"), each(now, "no")
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
    if sys.argv[1] == "--pairs":
        pairs(sys.argv[2])
    else:
        compare(int(sys.argv[1]), sys.argv[2], sys.argv[3])


main()
