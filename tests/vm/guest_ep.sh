#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Dispatch and combine over verbs in the guest, every element checked, the bits equal to those over
# shm and UCX, without and with packet loss.
#
# The bits to expect are made on the host, which is faster and has other SIMD instructions than the
# emulated processor: guest_ep.sh BUILD_BIN expect DIR [ITERS]; then in the guest, which sees DIR:
# guest_ep.sh BUILD_BIN compare DIR [ITERS]. ITERS: at most so many iterations, for a look by hand.
set -u
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tests/vm/lib.sh
. "$here/lib.sh"
bin=$1 mode=$2 dir=$3
most=${4:-200}
export NEP_VERBS_ACK_TIMEOUT=16 NEP_VERBS_RETRY=6 NEP_TIMEOUT=60s
small="--tokens 4 --hidden 256 --experts 16 --top-k 4 --seed 11"
fabric=verbs
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

ep() { # ep NAME OPTIONS...: runs, checks, leaves the digest in $digest
    name=$1
    shift
    "$bin/nep-perf" ep --verify --json "$scratch/json" "$@" >"$scratch/out" 2>&1
    check "$name" 0 $?
    wrong=$(sed -n 's/.*"wrong_elements": *\([0-9]*\).*/\1/p' "$scratch/json" | head -n 1)
    check "  wrong elements" 0 "$wrong"
    digest=$(sed -n 's/.*"output_digest": *"\{0,1\}\([0-9a-fx]*\).*/\1/p' "$scratch/json" | head -n 1)
    [ "$wrong" = 0 ] || tail -n 20 "$scratch/out"
    rm -f "$scratch/json"
}

# shellcheck disable=SC2086
bits() { # bits KEY ITERS OPTIONS...: over shm and UCX and kept, or over verbs and compared
    key=$1 iters=$2
    shift 2
    [ "$iters" -lt "$most" ] || iters=$most
    if [ "$mode" = expect ]; then
        ep "$key, shm" --inter shm --iters "$iters" $small "$@"
        echo "$digest" >"$dir/$key"
        ep "$key, ucx" --inter ucx --iters "$iters" $small "$@"
        check "  bits as over shm" "$(cat "$dir/$key")" "$digest"
    else
        ep "$key, $fabric" --inter "$fabric" --iters "$iters" $small "$@"
        check "  bits as over shm and ucx" "$(cat "$dir/$key")" "$digest"
    fi
}

bits expert 200 --ranks 4 --ranks-per-node 2
bits rank-4-nodes 100 --ranks 4 --ranks-per-node 1 --layout rank
bits expert-fp8 50 --ranks 4 --ranks-per-node 2 --wire fp8
bits rank-fp8-uneven 50 --ranks 3 --ranks-per-node 2,1 --layout rank --wire fp8
bits expert-fewer 50 --ranks 4 --ranks-per-node 2
[ "$mode" = compare ] || finish

export NEP_VERBS_PATHS=2 NEP_VERBS_SPLIT=512
echo "two paths, every put of 512 bytes or more split"
bits expert-fewer 50 --ranks 4 --ranks-per-node 2
unset NEP_VERBS_PATHS NEP_VERBS_SPLIT
fabric=adversary:verbs
bits expert-fewer 50 --ranks 4 --ranks-per-node 2
fabric=verbs
ep "hidden 7168" --inter verbs --ranks 4 --ranks-per-node 2 --tokens 2 --experts 32 --iters 2 \
    --warmup 1
export NEP_VERBS_QPS=8
# shellcheck disable=SC2086
ep "24 QPs on each rank" --inter verbs --ranks 4 --ranks-per-node 1 --iters 10 $small
unset NEP_VERBS_QPS

# Requests of a rank: remote nodes x (tiles + COUNTS + CREDITs), never per token. 4 nodes, 5 steps of
# two operations, one tile each; a COUNTS, a tile and two to four CREDITs a node, and as many again
# where each is split over two paths.
requests() { # requests WHAT MOST
    export NEP_LOG=info
    # shellcheck disable=SC2086
    ep "requests, $1" --inter verbs --ranks 4 --ranks-per-node 1 $small --tokens 200 --iters 4 \
        --warmup 1
    unset NEP_LOG
    most_seen=$(sed -n 's/.* bytes in all as \([0-9]*\) requests.*/\1/p' "$scratch/out" | sort -n | tail -n 1)
    check "  at most $2 on each rank" yes "$([ "${most_seen:-0}" -gt 0 ] && [ "$most_seen" -le "$2" ] &&
        echo yes || echo "$most_seen")"
    echo "      $most_seen at most, of 200 tokens to 3 nodes in 5 steps"
}
requests "one path" $((5 * 2 * 3 * 6))
export NEP_VERBS_PATHS=2 NEP_VERBS_SPLIT=512
requests "two paths" $((5 * 2 * 3 * 6 * 2))
unset NEP_VERBS_PATHS NEP_VERBS_SPLIT

echo "1 % of packets lost"
for i in 0 1 2 3; do
    tc qdisc add dev "n$i" root netem loss 1%
done
bits expert 200 --ranks 4 --ranks-per-node 2
bits rank-fp8-uneven 50 --ranks 3 --ranks-per-node 2,1 --layout rank --wire fp8
again=0
for i in 0 1 2 3; do
    for counter in duplicate_request out_of_seq_request completer_retry_err; do
        more=$(cat "/sys/class/infiniband/rxe$i/ports/1/hw_counters/$counter")
        again=$((again + more))
    done
done
check "packets were lost and sent again" yes "$([ "$again" -gt 0 ] && echo yes || echo no)"
finish
