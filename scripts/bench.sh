#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The side-by-side benchmarks of docs/performance.md: each against its baseline in the same run, in
# alternating blocks; medians and ratios. Nothing here is a test: figures depend on the machine.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib/packages.sh
. scripts/lib/packages.sh

usage() {
    cat <<'TEXT'
usage: scripts/bench.sh [--rounds N] [--list] [NAME...]

  --rounds N   repeat each benchmark N times; each has 7 alternating pairs of its own, verbs-put 9 (1)
  --list       names of the benchmarks, one line each

Results: a table here, and every round as JSON in build/bench/NAME.ROUND.json.
TEXT
}

# NAME|TITLE|ARGUMENTS of nep-perf. Each row of docs/performance.md has the name of its benchmark.
benches=(
    "mpi-8x128-expert|8 ranks x 128 tokens, expert layout, against MPI_Alltoallv|ep --ranks 8 --ranks-per-node 8 --tokens 128 --layout expert --baseline mpi"
    "mpi-4x1024-expert|4 ranks x 1024 tokens, expert layout, against MPI_Alltoallv|ep --ranks 4 --ranks-per-node 4 --tokens 1024 --layout expert --baseline mpi"
    "mpi-8x128-rank|8 ranks x 128 tokens, rank layout, against MPI_Alltoallv|ep --ranks 8 --ranks-per-node 8 --tokens 128 --layout rank --baseline mpi"
    "mpi-4x1024-rank|4 ranks x 1024 tokens, rank layout, against MPI_Alltoallv|ep --ranks 4 --ranks-per-node 4 --tokens 1024 --layout rank --baseline mpi"
    "mpi-8x128-expert-private|the same with the caller's own memory|ep --ranks 8 --ranks-per-node 8 --tokens 128 --layout expert --memory private --baseline mpi"
    "mpi-4x1024-expert-private|the same with the caller's own memory|ep --ranks 4 --ranks-per-node 4 --tokens 1024 --layout expert --memory private --baseline mpi"
    "mpi-8x128-rank-private|the same with the caller's own memory|ep --ranks 8 --ranks-per-node 8 --tokens 128 --layout rank --memory private --baseline mpi"
    "mpi-4x1024-rank-private|the same with the caller's own memory|ep --ranks 4 --ranks-per-node 4 --tokens 1024 --layout rank --memory private --baseline mpi"
    "hosts-4x2-1024|4 hosts of 2 ranks at 1 Gbit/s x 1024 tokens, against MPI_Alltoallv|hosts 4 1gbit 2 ep --inter ucx --tokens 1024 --layout expert --baseline mpi"
    "hosts-4x2-1024-fp8|the same with fp8 on the wire of dispatch|hosts 4 1gbit 2 ep --inter ucx --tokens 1024 --layout expert --wire fp8 --baseline mpi"
    "verbs-put|nep-perf put against ib_write_bw and ib_write_lat, in the Soft-RoCE guest|guest 9 300"
)

rounds=1 names=()
while [ $# -gt 0 ]; do
    case $1 in
    --rounds) rounds=${2:?--rounds needs a number}; shift ;;
    --list)
        for bench in "${benches[@]}"; do
            IFS='|' read -r name title _ <<< "$bench"
            printf '%-28s %s\n' "$name" "$title"
        done
        exit 0
        ;;
    --help | -h) usage; exit 0 ;;
    -*) echo "bench.sh: unknown option $1" >&2; usage >&2; exit 2 ;;
    *) names+=("$1") ;;
    esac
    shift
done

mapfile -t packages < <(nep_list scripts/packages.txt | awk '{ print $1 }')
nep_need "${packages[@]}" openmpi-bin libopenmpi-dev
cmake --preset release > /dev/null
cmake --build build -j "$(nproc)" > /dev/null
mkdir -p build/bench

printf '%s, %s cores, Linux %s, %s, commit %s\n' \
    "$(sed -n 's/^model name[[:space:]]*: //p' /proc/cpuinfo | head -n 1)" "$(nproc)" "$(uname -r)" \
    "$(date +%F)" "$(git rev-parse --short HEAD 2> /dev/null || echo unknown)"
# "hosts N RATE RANKS ..." runs under mpirun over N emulated hosts: root, and some seconds a pair;
# "guest RUNS MESSAGES" beside perftest, where there are verbs: in a guest.
measure() { # FILE ARGUMENTS
    local file=$1 status=0
    # shellcheck disable=SC2086 # arguments are words
    set -- $2
    if [ "$1" = guest ]; then
        mapfile -t packages < <(nep_list tests/vm/packages.txt | awk '{ print $1 }')
        nep_need "${packages[@]}" && tests/vm/nep-vm -n 2 -t 280 -- \
            sh "$PWD/tests/vm/guest_bench.sh" "$PWD/build/bin" "$2" "$3" | tee "$file"
        return
    fi
    if [ "$1" != hosts ]; then
        build/bin/nep-perf "$@" --verify --iters 10 --warmup 3 --json "$file"
        return
    fi
    local num=$2 rate=$3 ranks=$4
    shift 4
    export HOSTS_GROUP=nepbench
    trap 'tests/hosts/hosts.sh down' EXIT # also when this is ended from outside
    trap 'exit 1' INT TERM
    tests/hosts/hosts.sh up "$num" "$rate" || return
    tests/hosts/hosts.sh mpirun "$ranks" "$PWD/build/bin/nep-perf" "$@" --verify --iters 2 \
        --warmup 1 --json "$PWD/$file" || status=$?
    tests/hosts/hosts.sh down
    return "$status"
}

files=()
for ((round = 1; round <= rounds; round++)); do
    for bench in "${benches[@]}"; do
        IFS='|' read -r name _ arguments <<< "$bench"
        if [ ${#names[@]} -gt 0 ] && [[ " ${names[*]} " != *" $name "* ]]; then
            continue
        fi
        file=build/bench/$name.$round.json
        measure "$file" "$arguments" > build/bench/last.log 2>&1 || {
            cat build/bench/last.log >&2
            echo "bench.sh: $name failed: nep-perf $arguments" >&2
            exit 1
        }
        files+=("$file")
        [ ! -t 2 ] || printf '\rround %d of %d: %-32s' "$round" "$rounds" "$name" >&2
    done
done
[ ! -t 2 ] || printf '\r%60s\r' '' >&2
[ ${#files[@]} -gt 0 ] || { echo "bench.sh: no benchmark is called: ${names[*]}" >&2; exit 2; }
python3 scripts/lib/bench_table.py "${files[@]}"
