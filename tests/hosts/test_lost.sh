#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A rank that is killed, a link that goes down, in the middle of dispatches and combines: every
# survivor names the right rank and ends with status 1 within twice the timeout.
# usage: test_lost.sh kill|link
. "$(dirname "$0")/lib.sh"

how=$1
num_hosts=3 ranks=2 timeout=10
victim=3 # on host 1
hosts up $num_hosts 1gbit

port=$((20000 + RANDOM % 20000))
pids=()
for ((rank = 0; rank < num_hosts * ranks; rank++)); do
    NEP_TIMEOUT=${timeout}s NEP_RANK=$rank NEP_RANKS=$((num_hosts * ranks)) \
        NEP_RENDEZVOUS=198.18.7.1:$port "$here/hosts.sh" exec $((rank / ranks)) \
        "$tools/nep-perf" ep --inter ucx --tokens 64 --hidden 1024 --iters 100000 --warmup 0 \
        > "$work/$rank.out" 2> "$work/$rank.err" &
    pids+=($!)
done

# Until ranks have moved some MB, so that it happens in the middle.
moved() {
    local bytes
    read -r bytes _ <<< "$(hosts counters)"
    [ "$bytes" -gt 20000000 ]
}
within 60 moved || { cat "$work"/*.err >&2; fail "the ranks did not get going"; }
if [ "$how" = kill ]; then
    kill -KILL "${pids[$victim]}" # hosts.sh has become nep-perf
    lost=("$victim")
else
    hosts link 1 down
    lost=(2 3)
fi
start=$SECONDS

check_rank() { # RANK CULPRITS...: status 1 and one of them named
    local rank=$1 status=0 culprit
    shift
    wait "${pids[$rank]}" || status=$?
    [ $status -eq 1 ] || fail "rank $rank ended with status $status: $(tail -n 5 "$work/$rank.err")"
    for culprit in "$@"; do
        if grep -qE "(^|[^0-9])$culprit([^0-9]|\$)" "$work/$rank.err"; then
            return
        fi
    done
    fail "rank $rank names none of $*: $(tail -n 5 "$work/$rank.err")"
}
over() {
    local rank
    for ((rank = 0; rank < num_hosts * ranks; rank++)); do
        if [ "$rank" -ne "$victim" ] || [ "$how" = link ]; then
            ! kill -0 "${pids[$rank]}" 2> /dev/null || return 1
        fi
    done
}
# Those that still run, and where.
running() {
    local rank
    for rank in "${!pids[@]}"; do
        if kill -0 "${pids[$rank]}" 2> /dev/null; then
            echo "rank $rank still runs"
            ! command -v gdb > /dev/null ||
                gdb -p "${pids[$rank]}" -batch -ex 'thread apply all bt 12' 2> /dev/null |
                grep -E '^(#|Thread)' || true
        fi
    done
}
within $((2 * timeout + 5)) over || fail "after $((2 * timeout + 5)) s:
$(running)
$(tail -n 3 "$work"/*.err)"
echo "$how: all ended within $((SECONDS - start)) s"
for rank in 0 1 4 5; do
    check_rank $rank "${lost[@]/#/rank }"
done
if [ "$how" = kill ]; then
    check_rank 2 "rank 3"
else # to the host that is cut off the others are lost, and the rendezvous of rank 0 with them
    for rank in 2 3; do
        check_rank $rank "rank 0" "rank 1" "rank 4" "rank 5" "the rendezvous at"
    done
fi
tail -n 1 "$work/0.err"
