#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Inside the guest, over verbs: ranks die at every moment of an operation; a path dies in the middle of
# nep-perf ep; groups that go on without a rank and take newcomers in, and random harm to them
# (tests/chaos).
# usage: guest_loss.sh BUILD_BIN
set -u
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tests/vm/lib.sh
. "$here/lib.sh"
bin=$1
export NEP_VERBS_ACK_TIMEOUT=16 NEP_VERBS_RETRY=3 NEP_TIMEOUT=15s
small="--tokens 4 --hidden 256 --experts 16 --top-k 4 --seed 11 --ranks 4 --ranks-per-node 2"

ranks_of() { # process ids of the ranks of job $1, in order of their start
    cat "/proc/$1/task/$1/children"
}

# A rank is killed at each of 21 moments of an operation (tests/multi/test_deaths.c): all others name
# it, go on without it, and have no wrong element.
"$bin/test_deaths" verbs >/run/out 2>/run/err
status=$?
check "a rank dies at every moment of an operation" 0 $status
check "  and is named by all others" 21 "$(grep -c ' named by all others ' /run/out)"
grep ' named by all others ' /run/out
[ $status = 0 ] || tail -n 20 /run/out /run/err

# A process that comes back: the same job, started again on the devices that the dead one used.
check "no QP of the dead is left behind" 0 "$(qps_left)"
# shellcheck disable=SC2086
"$bin/nep-perf" ep --inter verbs $small --iters 10 --verify >/run/out 2>/run/err
check "reconnect: the same job again, every element right" 0 $?

# One of two paths of rank 0 dies for good: the job goes on, every element right. The bits are those
# of a run in which nothing died. A job that is over before the path dies has shown nothing: a longer
# one is tried.
export NEP_VERBS_PATHS=2 NEP_VERBS_SPLIT=512
two="--tokens 4 --hidden 256 --experts 16 --top-k 4 --seed 11 --ranks 2 --ranks-per-node 1 --verify"
sent=/sys/class/infiniband/rxe1/ports/1/hw_counters/sent_pkts
for iters in 100 1000 10000; do
    # shellcheck disable=SC2086
    "$bin/nep-perf" ep --inter verbs $two --iters $iters --json /run/whole.json >/run/out 2>/run/err
    check "two paths, whole" 0 $?
    # shellcheck disable=SC2086
    "$bin/nep-perf" ep --inter verbs $two --iters $iters --json /run/path.json >/run/out 2>/run/err &
    job=$!
    while kill -0 $job 2>/dev/null && [ "$(ranks_of $job | wc -w)" -lt 2 ]; do
        sleep 0.05
    done
    read -r before <$sent
    now=$before
    while [ "$now" -lt $((before + 40)) ] && kill -0 $job 2>/dev/null; do
        sleep 0.02
        read -r now <$sent
    done
    ip link set p1 down # where the cable of n1 ends
    wait $job
    status=$?
    if [ $status -ne 0 ] || grep -q 'carry on\|is down' /run/err; then
        break
    fi
    echo "$iters steps were over before the path died: again with more"
    ip link set p1 up
done
check "two paths, one dies" 0 "$status"
grep -m 2 'carry on' /run/err | cut -c 1-160
check "  it died during the job" yes "$(grep -q 'carry on\|is down' /run/err && echo yes || echo no)"
for what in wrong_elements output_digest; do
    check "  $what as without the death" \
        "$(sed -n "s/.*\"$what\": *\([^,}]*\).*/\1/p" /run/whole.json | head -n 1)" \
        "$(sed -n "s/.*\"$what\": *\([^,}]*\).*/\1/p" /run/path.json | head -n 1)"
done
ip link set p1 up
unset NEP_VERBS_PATHS NEP_VERBS_SPLIT
export NEP_VERBS_RETRY=6

# Going on: a rank dies, the others go on with every element right, a newcomer takes its seat.
chaos() { # chaos NAME OPTIONS...
    name=$1
    shift
    python3 "$here/../chaos/chaos.py" "$bin/nep-perf" --world guest --timeout 30 --wait 6 \
        --patience 20 "$@" >/run/out 2>&1
    check "$name" 0 $?
    sed 's/^/      /' /run/out
}
chaos "a rank is lost and replaced" --inter verbs --harms +rejoin --rounds 1 --life 1 --seed 7
chaos "random harm" --inter verbs,adversary:verbs --rounds 100 --seconds 20 --life 4 \
    --harms +kill,+twice,+rejoin,+late,+pause,+scan,+stillborn,+blink,+slow,+cut
check "no QP is left behind" 0 "$(rdma resource show qp 2>/dev/null | grep -c 'type RC')"
finish
