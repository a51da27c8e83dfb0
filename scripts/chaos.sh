#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Harm at random moments, and what must hold after it (tests/chaos/chaos.py, docs/chaos.md):
# scripts/chaos.sh [MINUTES] [OPTIONS OF chaos.py]   all harms over shm, ucx and the adversary (5)
# scripts/chaos.sh guest [MINUTES] [OPTIONS]         over verbs, in the guest of tests/vm (5)
# scripts/chaos.sh soak [MINUTES] [OPTIONS]          both, hosts and shm and ucx at once (60)
# scripts/chaos.sh kills [OPTIONS]                   500 random kills, each seat taken again by a
#                                                    newcomer: 200 over shm, 200 ucx, 100 verbs
# scripts/chaos.sh measure                           how soon a loss is seen and gone on without
set -euo pipefail
cd "$(dirname "$0")/.."
chaos=tests/chaos/chaos.py
perf=$PWD/build/bin/nep-perf
if [ "${1:-}" = --help ]; then
    sed -n '3,9s/^# //p' "$0"
    exec $chaos --help
fi
if [ ! -x "$perf" ] || [ ! -x build/bin/chaos_seat ]; then
    cmake --preset release > /dev/null
    cmake --build build -j "$(nproc)" -t nep-perf nep-info chaos_seat
fi
form=run
case ${1:-} in
    guest | soak | kills | measure) form=$1; shift ;;
esac
minutes=5
[ $form != soak ] || minutes=60
case ${1:-} in
    [0-9]*) minutes=$1; shift ;;
esac
long=(--rounds 1000000 --seconds $((minutes * 60)))
fabrics=shm,ucx,adversary:shm,adversary:ucx
# Emulation is slow: operations wait a shorter time than what is done once.
guest=(tests/vm/nep-vm -n 4 -t $((minutes * 60 + 3600)) -e NEP_VERBS_ACK_TIMEOUT=16
    -e NEP_VERBS_RETRY=6 --)
in_guest=(--world guest --inter "verbs,adversary:verbs" --timeout 30 --wait 4 --patience 20)
wire=+blink,+slow,+cut
alive=+kill,+twice,+rejoin,+late,+pause,+scan,+stillborn

status=0
case $form in
    run) exec $chaos "$perf" "${long[@]}" "$@" ;;
    guest) exec "${guest[@]}" python3 $chaos "$perf" "${long[@]}" "${in_guest[@]}" \
        --harms $alive,$wire "$@" ;;
    soak)
        "${guest[@]}" python3 $chaos "$perf" "${long[@]}" "${in_guest[@]}" --harms $alive,$wire "$@" &
        $chaos "$perf" "${long[@]}" --inter $fabrics,hosts:ucx --timeout 5 --patience 20 "$@" || status=1
        wait $! || status=1
        ;;
    kills)
        again=(--rounds 1000000 --harms "+rejoin,+twice" --timeout 5 --patience 20)
        $chaos "$perf" "${again[@]}" --kills 200 --inter shm,adversary:shm "$@" || status=1
        $chaos "$perf" "${again[@]}" --kills 200 --inter ucx,adversary:ucx "$@" || status=1
        "${guest[@]}" python3 $chaos "$perf" --rounds 1000000 --harms +rejoin,+twice --kills 100 \
            "${in_guest[@]}" "$@" || status=1
        ;;
    measure)
        tests/chaos/measure.py build/bin --inter $fabrics
        tests/chaos/measure.py build/bin --inter ucx --sizes 2,2
        "${guest[@]/RETRY=6/RETRY=3}" python3 tests/chaos/measure.py "$PWD/build/bin" --world guest --inter verbs \
            --sizes 2,2 --timeout 30 --wait 1 --times 5
        build/bin/test_recover 2>&1 | grep 'first good step'
        ;;
esac
exit $status
