#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What a placement map saves in time and not only in bytes: dispatch + combine of a trace between
# four emulated hosts of two ranks at 1 Gbit/s, with contiguous placement and random homes, and with
# a map and predicted homes. The map is solved on two thirds of the requests, the others are sent.
# Pairs alternate; the falls are those of the medians. Needs root.
#   scripts/placement-time.sh TRACE [PAIRS] [REPLICAS]      (3 pairs, 12.5 % second copies)
set -euo pipefail
trace=$(realpath "${1:?usage: scripts/placement-time.sh TRACE [PAIRS] [REPLICAS]}")
pairs=${2:-3} replicas=${3:-12.5}
cd "$(dirname "$0")/.."
tests/hosts/hosts.sh check
dir=$(mktemp -d)
export HOSTS_GROUP=nepmap
trap 'tests/hosts/hosts.sh down; rm -rf "$dir"' EXIT
bin=$PWD/build/bin
"$bin/nep-place" slice --trace "$trace" --part train --seed 3 -o "$dir/train.nept" > /dev/null
"$bin/nep-place" slice --trace "$trace" --part test --seed 3 -o "$dir/test.nept" > /dev/null
"$bin/nep-place" solve --trace "$dir/train.nept" --nodes 4 --gpus-per-node 2 \
    --replicas "$replicas" -o "$dir/map" > /dev/null
tests/hosts/hosts.sh up 4 1gbit

measure() { # NAME OPTION...
    local name=$1
    shift
    tests/hosts/hosts.sh run 2 "$bin/nep-perf" ep --inter ucx --hidden 7168 --tokens 256 \
        --iters 14 --warmup 7 --routing "trace:$dir/test.nept" --json "$dir/$name.json" "$@" \
        > "$dir/log" 2>&1 || { cat "$dir/log" >&2; exit 1; }
}
for ((i = 0; i < pairs; i++)); do
    measure "contiguous.$i" --homes random
    measure "map.$i" --map "$dir/map" --homes predicted
done
python3 - "$dir" "$pairs" << 'PY'
import json
import statistics
import sys

folder, pairs = sys.argv[1], int(sys.argv[2])
runs = {name: [json.load(open(f"{folder}/{name}.{i}.json", encoding="utf-8"))
               for i in range(pairs)] for name in ("contiguous", "map")}
keys = {"wire bytes, busiest node": lambda r: r["wire_bytes_max_node"],
        "wire bytes per rank": lambda r: r["wire_bytes_per_rank"],
        "remote nodes per token": lambda r: r["remote_nodes_per_token"],
        "dispatch us, p50": lambda r: r["dispatch_us"]["p50"],
        "combine us, p50": lambda r: r["combine_us"]["p50"],
        "total us, p50": lambda r: r["total_us"]["p50"]}
fall = {}
print(f"{'':<26} {'contiguous':>12} {'map':>12} {'fall':>8}")
for key, get in keys.items():
    before, after = (statistics.median(get(r) for r in runs[n]) for n in ("contiguous", "map"))
    fall[key] = 1.0 - after / before
    print(f"{key:<26} {before:>12.4g} {after:>12.4g} {100 * fall[key]:>7.1f}%")
each = [1.0 - m["total_us"]["p50"] / c["total_us"]["p50"]
        for c, m in zip(runs["contiguous"], runs["map"])]
print(f"fall of the time in each of {pairs} pairs:", ", ".join(f"{100 * x:.1f}%" for x in each))
print("fall of the time / fall of the busiest node's bytes: "
      f"{fall['total us, p50'] / fall['wire bytes, busiest node']:.3f}")
PY
