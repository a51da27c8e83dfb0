#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""usage: demo_report.py RUN.json RUN_WITH_MAP.json

Two runs of nep-perf side by side: what a solved map changed.
"""
import json
import sys


def load(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def two(before, after):
    print(f"\n{'':<34}{'in order':>14}{'solved map':>14}{'change':>10}")
    rows = [("remote nodes per token", "remote_nodes_per_token", 1, ".3f"),
            ("wire KiB per rank and iteration", "wire_bytes_per_rank", 1 / 1024, ",.0f"),
            ("tokens that stay on their node, %", "local_token_share", 100, ".1f"),
            ("most loaded node / mean", "imbalance_node", 1, ".3f"),
            ("most loaded rank / mean", "imbalance_rank", 1, ".3f")]
    for title, key, scale, form in rows:
        old, new = before[key] * scale, after[key] * scale
        change = f"{new - old:+.1f} pt" if title.endswith("%") else \
            f"{100 * (new - old) / old:+.1f} %" if old else "-"
        print(f"{title:<34}{old:>14{form}}{new:>14{form}}{change:>10}")
    old, new = before["total_us"]["p50"], after["total_us"]["p50"]
    print(f"{'dispatch + combine, us (p50)':<34}{old:>14,.0f}{new:>14,.0f}{100 * (new - old) / old:>+8.1f} %")
    print(f"{'wrong elements':<34}{before['wrong_elements']:>14}{after['wrong_elements']:>14}")


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    runs = [load(path) for path in sys.argv[1:]]
    two(*runs)
    return 1 if any(run["wrong_elements"] != 0 for run in runs) else 0


sys.exit(main())
