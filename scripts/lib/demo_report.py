#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""usage: demo_report.py RUN.json [RUN_WITH_MAP.json]

Says in words what nep-perf measured: what went over the wire, and why not less.
"""
import json
import sys


def load(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def kib(value):
    return f"{value / 1024:,.0f} KiB"


def one(run):
    config = run["config"]
    wire, floor = run["wire_bytes_per_rank"], run["wire_floor_bytes_per_rank"]
    row = config["hidden"] * (4 if config.get("dtype") == "fp32" else 2)
    print(f"""
What went over the wire, per rank and iteration (mean):
  {kib(wire)} to the other node, both ways; {kib(floor)} of it are rows: one per token and remote node.
  {kib(wire - floor)} ({100 * (wire - floor) / wire if wire else 0:.1f} %) are headers: row counts, source tokens, expert slots, weights.
  {kib(run["intra_bytes_per_rank"])} moved inside the node.
Why not less:
  {100 * run["local_token_share"]:.1f} % of the tokens found all their experts on their own node and sent nothing.
  Each other token has an expert over there, so one row ({row:,} bytes) must go and one summed row come back,
  however many of its {config.get("top_k", 8)} experts are there: {run["remote_nodes_per_token"]:.3f} remote nodes per token.
  Only other places for experts and requests lower that.
Every element of every iteration compared with the oracle: {run["wrong_elements"]} wrong.""")


def two(before, after):
    print(f"\n{'':<34}{'in order':>14}{'solved map':>14}{'change':>10}")
    rows = [("remote nodes per token", "remote_nodes_per_token", 1, ".3f"),
            ("wire KiB per rank and iteration", "wire_bytes_per_rank", 1 / 1024, ",.0f"),
            ("tokens that stay on their node, %", "local_token_share", 100, ".1f"),
            ("most loaded node / mean", "imbalance_node", 1, ".3f"),
            ("most loaded rank / mean", "imbalance_rank", 1, ".3f")]
    for title, key, scale, form in rows:
        old, new = before[key] * scale, after[key] * scale
        change = f"{100 * (new - old) / old:+.1f} %" if old else "-"
        print(f"{title:<34}{old:>14{form}}{new:>14{form}}{change:>10}")
    old, new = before["total_us"]["p50"], after["total_us"]["p50"]
    print(f"{'dispatch + combine, us (p50)':<34}{old:>14,.0f}{new:>14,.0f}{100 * (new - old) / old:>+8.1f} %")
    print(f"{'wrong elements':<34}{before['wrong_elements']:>14}{after['wrong_elements']:>14}")


def main():
    runs = [load(path) for path in sys.argv[1:]]
    if len(runs) == 1:
        one(runs[0])
    elif len(runs) == 2:
        two(*runs)
    else:
        sys.exit(__doc__)
    return 1 if any(run["wrong_elements"] != 0 for run in runs) else 0


sys.exit(main())
