#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Inside the guest: dispatch and combine over verbs, every element checked, equal bits to the other
# transports, without and with packet loss. usage: guest_ep.sh BUILD_BIN [ITERS]: at most ITERS
# iterations each, for a look by hand.
set -u
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tests/vm/lib.sh
. "$here/lib.sh"
bin=$1
most=${2:-200}
export NEP_VERBS_ACK_TIMEOUT=16 NEP_VERBS_RETRY=6 UCX_TLS=tcp,self,shm NEP_TIMEOUT=60s
small="--tokens 4 --hidden 256 --experts 16 --top-k 4 --seed 11"

ep() { # ep NAME OPTIONS...: runs, checks, leaves the digest in $digest
    name=$1
    shift
    "$bin/nep-perf" ep --verify --json /run/ep.json "$@" >/run/ep.out 2>&1
    check "$name" 0 $?
    wrong=$(sed -n 's/.*"wrong_elements": *\([0-9]*\).*/\1/p' /run/ep.json | head -n 1)
    check "  wrong elements" 0 "$wrong"
    digest=$(sed -n 's/.*"output_digest": *"\{0,1\}\([0-9a-fx]*\).*/\1/p' /run/ep.json | head -n 1)
    [ "$wrong" = 0 ] || tail -n 20 /run/ep.out
    rm -f /run/ep.json
}

# shellcheck disable=SC2086
same_bits() { # same_bits NAME ITERS OPTIONS...: verbs against shm and ucx
    title=$1 iters=$2
    [ "$iters" -lt "$most" ] || iters=$most
    shift 2
    ep "$title, verbs" --inter verbs --iters "$iters" $small "$@"
    verbs=$digest
    ep "$title, shm" --inter shm --iters "$iters" $small "$@"
    check "  bits as over shm" "$digest" "$verbs"
    if [ "${with_ucx:-}" = 1 ]; then
        ep "$title, ucx" --inter ucx --iters "$iters" $small "$@"
        check "  bits as over ucx" "$digest" "$verbs"
    fi
}

echo "guest: $(uname -r), $(nproc) processors"
with_ucx=1
same_bits "expert layout, 2 nodes of 2" 200 --ranks 4 --ranks-per-node 2
with_ucx=0
same_bits "rank layout, 4 nodes of 1" 100 --ranks 4 --ranks-per-node 1 --layout rank
same_bits "expert layout, fp8 on the wire" 100 --ranks 4 --ranks-per-node 2 --wire fp8
same_bits "rank layout, fp8 on the wire, uneven nodes" 50 --ranks 3 --ranks-per-node 2,1 \
    --layout rank --wire fp8
export NEP_VERBS_PATHS=2 NEP_VERBS_SPLIT=512
same_bits "two paths, split from 512 bytes" 50 --ranks 2 --ranks-per-node 1
unset NEP_VERBS_PATHS NEP_VERBS_SPLIT
ep "hidden 7168, 2 nodes of 2" --inter verbs --ranks 4 --ranks-per-node 2 --tokens 2 --experts 32 \
    --iters 3 --warmup 1
export NEP_VERBS_QPS=8
ep "24 QPs on each rank" --inter verbs --ranks 4 --ranks-per-node 1 --iters 20 $small
unset NEP_VERBS_QPS

for i in 0 1 2 3; do
    tc qdisc add dev "n$i" root netem loss 1%
done
same_bits "1 % loss, expert layout" 200 --ranks 4 --ranks-per-node 2
same_bits "1 % loss, rank layout, fp8" 50 --ranks 4 --ranks-per-node 2 --layout rank --wire fp8
retries=0
for i in 0 1 2 3; do
    for counter in duplicate_request out_of_seq_request completer_retry_err; do
        more=$(cat "/sys/class/infiniband/rxe$i/ports/1/hw_counters/$counter")
        retries=$((retries + more))
    done
done
check "packets were lost and sent again" yes "$([ "$retries" -gt 0 ] && echo yes || echo no)"
finish
