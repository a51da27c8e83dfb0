#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Dispatch and combine between hosts over UCX: every element right, the bytes that nearep counts
# near their floor, and the interfaces' own counters in accord.
# usage: test_ep.sh HOSTS RANKS LAYOUT TOKENS [OPTION...]
. "$(dirname "$0")/lib.sh"

num_hosts=$1 ranks=$2 layout=$3 tokens=$4
shift 4
iters=3 warmup=1
hosts up "$num_hosts" 1gbit
mapfile -t before < <(hosts counters)
NEP_TIMEOUT=60s hosts run "$ranks" "$tools/nep-perf" ep --inter ucx --layout "$layout" \
    --tokens "$tokens" --iters $iters --warmup $warmup --seed $RANDOM --verify \
    --json "$work/result.json" "$@"
mapfile -t after < <(hosts counters)

python3 - "$work/result.json" $((num_hosts * ranks)) $((iters + warmup)) "$tokens" "${before[@]}" \
    -- "${after[@]}" <<'PY'
import json, sys
result = json.load(open(sys.argv[1]))
ranks, rounds, tokens = map(int, sys.argv[2:5])
cut = sys.argv.index("--")
before, after = sys.argv[5:cut], sys.argv[cut + 1:]
sent = [int(b.split()[0]) - int(a.split()[0]) for a, b in zip(before, after)]
dropped = sum(int(b.split()[1]) - int(a.split()[1]) for a, b in zip(before, after))
counted = result["wire_bytes_per_rank"] * ranks * rounds
floor = result["wire_floor_bytes_per_rank"] * ranks * rounds
wire = sum(sent)
print(f"floor {floor / 1e6:.2f} MB, counted {counted / 1e6:.2f} MB ({counted / floor:.4f}), "
      f"interfaces {wire / 1e6:.2f} MB ({wire / floor:.4f}), {dropped} packets dropped")
errors = []
if result["wrong_elements"] != 0:
    errors.append(f"{result['wrong_elements']} wrong elements")
if not 1.0 <= counted / floor <= 1.02:
    errors.append("nearep's count is not within 1.02 of the floor")
# What creates the group and its connections costs some 100 KB a rank, whatever the tokens.
if not counted <= wire <= 1.04 * floor + 2e5 * ranks:
    errors.append("the interfaces' counters are not within 1.04 of the floor")
for error in errors:
    print("FAILED:", error, file=sys.stderr)
sys.exit(len(errors) != 0)
PY
