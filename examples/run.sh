#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# usage: examples/run.sh RANKS PROGRAM [ARGUMENT...]
# Starts RANKS processes of PROGRAM here, as torchrun, mpirun or srun would on many machines. The
# first of them hosts the rendezvous. Exit status 1 if any of them failed.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '3,5s/^# //p' "$0" >&2; exit 2; }
ranks=$1
shift
# A port of this machine's that nobody listens on; 127.0.0.1 alone.
for port in $(shuf -i 20000-29999 -n 20); do
    (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null || break
done
export NEP_RANKS=$ranks NEP_RENDEZVOUS=127.0.0.1:$port
pids=()
for ((rank = 0; rank < ranks; rank++)); do
    NEP_RANK=$rank "$@" &
    pids+=($!)
done
failed=0
for pid in "${pids[@]}"; do
    wait "$pid" || failed=1
done
exit $failed
