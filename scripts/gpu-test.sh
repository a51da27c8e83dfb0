#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# usage: scripts/gpu-test.sh [PART...]: tests and figures on a machine with an NVIDIA GPU.
# Parts: build threads faults processes sanitizer perf staged decode sweep tool nodes ring litmus far
# farperf dmabuf; without arguments all. It starts and ends an MPS daemon of its own. Part litmus runs
# for NEP_GPU_LITMUS seconds (60), alone: what shares the GPU with it makes it miss its deadlines.
#   scripts/gpu-test.sh first|second|third|fourth: everything, in four turns of NEP_GPU_SECONDS (530)
# each, what matters most first: figures beside what they must be; every element; the litmus test;
# the sanitizers. What a turn has no time left for is named and fails it.
#   NEP_GPU_BIN    where gpu_check, gpu_perf and nep-perf are: then nothing is built here
#   NEP_GPU_SEED, NEP_GPU_COUNT    shapes of the tests: from where, how many (random, 40)
# A machine that lacks what the library is built from (scripts/packages.txt) and has no network gets
# the programs from one that has both: `scripts/gpu-test.sh pack DIR` there puts them into DIR with
# the shared libraries that they need; copy DIR and name it in NEP_GPU_BIN here.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
tree=${NEP_GPU_TREE:-build-gpu} failed=0
bin=${NEP_GPU_BIN:-$tree/bin}
seed=${NEP_GPU_SEED:-$RANDOM$RANDOM} count=${NEP_GPU_COUNT:-40}
programs=(gpu_check gpu_perf gpu_ring gpu_far nep-perf)
until=1000000 # in SECONDS of this shell
log=$(mktemp) && trap 'rm -f "$log"' EXIT
export LD_LIBRARY_PATH=$bin/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

run() { # SECONDS COMMAND...
    local limit=$1 result left=$((until - SECONDS))
    shift
    if [ "$left" -lt 5 ]; then
        echo "SKIPPED, no time is left: $*"
        failed=1
        return
    fi
    timeout -k 5 $((limit < left ? limit : left)) "$@" | tee -a "$log"
    result=${PIPESTATUS[0]}
    if [ $result != 0 ]; then
        echo "FAILED ($result): $*"
        failed=1
    fi
}

part_build() {
    if [ -n "${NEP_GPU_BIN:-}" ]; then
        return
    fi
    if ! cmake -G Ninja -B "$tree" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DNEP_CUDA=ON \
        "-DCMAKE_CUDA_ARCHITECTURES=${NEP_GPU_ARCH:-90}" -DNEP_BUILD_MAN=OFF ||
        ! cmake --build "$tree" --target "${programs[@]}"; then
        echo "gpu-test: it cannot be built here; see the head of this script for another way"
        exit 1
    fi
    cmake --build "$tree" --target gpu_dmabuf || echo "gpu-test: built without verbs: no part dmabuf"
}

pack() { # DIR: programs and the libraries that are not part of every system
    mkdir -p "$1/lib"
    part_build
    local program library
    [ ! -x "$bin/gpu_dmabuf" ] || programs+=(gpu_dmabuf)
    for program in "${programs[@]}"; do
        cp "$bin/$program" "$1/" && strip "$1/$program"
        for library in $(ldd "$bin/$program" | awk '/sodium|hwloc|libz|udev|xml|cmocka/ { print $3 }'); do
            cp -L "$library" "$1/lib/"
        done
    done
}

mps() { # start|stop: a daemon of our own
    export CUDA_MPS_PIPE_DIRECTORY=$PWD/$tree/mps CUDA_MPS_LOG_DIRECTORY=$PWD/$tree/mps-log
    if [ "$1" = start ]; then
        mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
        unset CUDA_DEVICE_MAX_CONNECTIONS # 16 and more break the third client and later ones
        nvidia-cuda-mps-control -d || failed=1
        sleep 1
    else
        echo quit | timeout 20 nvidia-cuda-mps-control
        unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    fi
}

part_threads() {
    run 20 "$bin/gpu_check" refusal
    export CUDA_DEVICE_MAX_CONNECTIONS=32
    local ranks
    for ranks in 1 2 3 4 5 6 7 8; do
        run 120 "$bin/gpu_check" random threads $ranks "$seed" "$count"
    done
}

part_faults() {
    NEP_LOG=none CUDA_DEVICE_MAX_CONNECTIONS=32 run 60 "$bin/gpu_check" faults threads
    mps start
    NEP_LOG=none run 60 "$bin/gpu_check" faults processes
    mps stop
}

part_processes() {
    mps start
    local ranks
    for ranks in 2 4 8; do
        run 120 "$bin/gpu_check" random processes $ranks "$seed" "$count"
    done
    mps stop
}

part_sanitizer() {
    local sanitizer tool
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2> /dev/null)
    if [ -z "$sanitizer" ]; then
        echo "sanitizer: compute-sanitizer is not here; nothing was looked at"
        return
    fi
    # memcheck and synccheck let kernels of two threads run one after the other now and then, which
    # those that wait for each other do not survive: one rank, and two where they run together.
    for tool in memcheck racecheck synccheck; do
        CUDA_DEVICE_MAX_CONNECTIONS=32 run 100 "$sanitizer" --tool $tool --error-exitcode 9 \
            "$bin/gpu_check" random threads 1 "$seed" 6
        # Two hops: launch by launch, so that no kernel waits for one that has not ended.
        CUDA_DEVICE_MAX_CONNECTIONS=32 run 100 "$sanitizer" --tool $tool --error-exitcode 9 \
            "$bin/gpu_far" lockstep "$seed" 6
    done
    CUDA_DEVICE_MAX_CONNECTIONS=32 run 100 "$sanitizer" --tool racecheck --error-exitcode 9 \
        "$bin/gpu_check" random threads 2 "$seed" 4
}

part_perf() {
    mps start
    local setting
    for setting in "2 16" "4 16" "8 16" "2 8" "4 8" "8 8"; do
        # shellcheck disable=SC2086
        run 100 "$bin/gpu_perf" $setting 4096 bf16 rank mapped
    done
    for setting in "2 16" "4 16" "8 16" "2 8"; do
        # shellcheck disable=SC2086
        run 100 "$bin/gpu_perf" $setting 4096 fp8 rank mapped
    done
    mps stop
}

part_staged() {
    mps start
    local setting
    for setting in "2 16" "4 16" "8 16" "2 8"; do
        # shellcheck disable=SC2086
        run 100 "$bin/gpu_perf" $setting 4096 bf16 rank private
        # shellcheck disable=SC2086
        run 100 "$bin/gpu_perf" $setting 4096 fp8 rank private
    done
    mps stop
}

part_sweep() { # over num_sms
    mps start
    local ranks sms
    for ranks in 2 4 8; do
        for sms in 4 8 12 16 20 24; do
            if [ $((ranks * sms)) -le 132 ]; then
                run 60 "$bin/gpu_perf" $ranks $sms 4096 bf16 rank mapped
            fi
        done
    done
    mps stop
}

part_tool() { # nep-perf itself: every element, halves and several operations outstanding
    mps start
    run 100 "$bin/nep-perf" ep --executor cuda --ranks 4 --ranks-per-node 4 --tokens 256 \
        --layout rank --iters 5 --warmup 1 --verify
    run 100 "$bin/nep-perf" ep --executor cuda --ranks 4 --ranks-per-node 4 --tokens 128 --wire fp8 \
        --outstanding 2 --memory private --num-sms 8 --iters 5 --warmup 1 --verify
    mps stop
}

part_nodes() { # the same over emulated nodes, all ways of calling, several operations outstanding
    mps start
    run 120 "$bin/gpu_check" random processes 4 "$seed" "$count" 2
    run 120 "$bin/gpu_check" random processes 6 "$seed" "$count" 3
    run 60 "$bin/nep-perf" ep --executor cuda --ranks 8 --ranks-per-node 4 --tokens 64 \
        --layout rank --num-sms 14 --iters 3 --warmup 1 --verify
    run 60 "$bin/nep-perf" ep --executor cuda --ranks 8 --ranks-per-node 4 --tokens 64 --wire fp8 \
        --memory private --num-sms 14 --iters 3 --warmup 1 --verify
    run 60 "$bin/nep-perf" ep --executor cuda --ranks 16 --ranks-per-node 4 --tokens 32 \
        --hidden 2048 --layout rank --num-sms 8 --iters 3 --warmup 1 --verify
    mps stop
    CUDA_DEVICE_MAX_CONNECTIONS=32 run 60 "$bin/nep-perf" ep --executor cuda --ranks 8 --threads \
        --ranks-per-node 4 --tokens 64 --layout rank --num-sms 14 --iters 3 --warmup 1 --verify
}

part_decode() {
    mps start
    run 60 "$bin/gpu_perf" 8 16 128 bf16 rank mapped
    run 60 "$bin/gpu_perf" 8 16 128 fp8 expert mapped
    run 60 "$bin/gpu_perf" 8 16 8 bf16 rank mapped
    mps stop
}

part_ring() {
    run 60 "$bin/gpu_ring" figures
    run 60 "$bin/gpu_ring" faults
}

part_litmus() {
    run $((${NEP_GPU_LITMUS:-60} + 60)) "$bin/gpu_ring" litmus "${NEP_GPU_LITMUS:-60}"
}

part_far() { # two hops between emulated nodes
    run 120 "$bin/gpu_far" random "$seed" "$count"
    run 60 "$bin/gpu_far" faults
}

part_farperf() {
    run 60 "$bin/gpu_far" perf 2 4 14 128 bf16
    run 60 "$bin/gpu_far" perf 2 4 14 128 fp8
    local tiles
    for tiles in 1 4 8; do # 2 is what the library takes
        run 60 "$bin/gpu_far" perf 2 4 14 128 bf16 $tiles
    done
    run 60 "$bin/gpu_far" perf 2 4 14 8 bf16
    run 60 "$bin/gpu_far" perf 2 4 14 128 bf16 staged
    run 60 "$bin/gpu_far" perf 4 4 6 128 bf16
    run 60 "$bin/gpu_far" perf 2 4 14 4096 bf16
}

# GPU memory for a NIC, as far as it goes without one.
part_dmabuf() {
    if [ -x "$bin/gpu_dmabuf" ]; then
        run 30 "$bin/gpu_dmabuf"
    else
        echo "dmabuf: not there, nearep is built without verbs"
    fi
}

# Rows of the log beside what they must be: of gpu_perf `ranks SMs tokens type layout memory` and the
# GB/s of dispatch and combine, or of small batches their microseconds.
judge() {
    awk '
    function row(what, is, must, more_is_better) {
        ok = more_is_better ? is + 0 >= must : is + 0 <= must
        bad += !ok
        printf "%-58s %8s  must %4s %s\n", what, is, must, ok ? "met" : "MISSED"
    }
    BEGIN {
        n = split("2 16 4096 bf16 rank mapped 520 620;4 16 4096 bf16 rank mapped 340 420;" \
            "8 16 4096 bf16 rank mapped 210 240;2 8 4096 bf16 rank mapped 320 440;" \
            "2 16 4096 fp8 rank mapped 420 0;4 16 4096 fp8 rank mapped 320 0;" \
            "8 16 4096 fp8 rank mapped 200 0;2 8 4096 fp8 rank mapped 290 0;" \
            "2 16 4096 bf16 rank private 290 240;4 16 4096 bf16 rank private 220 165;" \
            "8 16 4096 bf16 rank private 125 85;2 8 4096 bf16 rank private 170 150;" \
            "2 16 4096 fp8 rank private 230 0;4 16 4096 fp8 rank private 210 0;" \
            "8 16 4096 fp8 rank private 120 0;2 8 4096 fp8 rank private 140 0;" \
            "8 16 128 bf16 rank mapped 60 60;8 16 128 fp8 expert mapped 75 140;" \
            "8 16 8 bf16 rank mapped 22 22", rows, ";")
        for (i = 1; i <= n; i++) {
            split(rows[i], f, " ")
            key = f[1] " " f[2] " " f[3] " " f[4] " " f[5] " " f[6]
            dispatch[key] = f[7]
            combine[key] = f[8]
        }
    }
    /ranks x .* tokens, .*dispatch/ && /given up/ {
        gsub(/,/, " ")
        key = $1 " " $6 " " $4 " " $8 " " $9 " " $11
        sub(/:$/, "", key)
        is_large = $4 > 1000
        if (key in dispatch) {
            row("dispatch " key, is_large ? $15 : $13, dispatch[key], is_large)
        }
        if (combine[key] != 0) {
            row("combine " key, is_large ? $20 : $18, combine[key], is_large)
        }
        if (is_large && $11 == "mapped:" && $6 == 16) {
            row("layout " key, $23, 15, 0)
        }
        seen[key] = 1
    }
    /^command -> proxy/ { print }
    /^whole loop.*112 KiB/ { print }
    /nodes x .* ranks x .* tokens.*dispatch/ { print }
    END {
        for (key in dispatch) {
            if (!(key in seen)) {
                print "no figure: " key
                bad++
            }
        }
        print bad + 0 " rows missed or without a figure"
        exit bad != 0
    }' "$log"
}

# A turn: its parts until its time is over.
turn() {
    until=$((SECONDS + ${NEP_GPU_SECONDS:-530}))
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || true
    local part start
    for part in "$@"; do
        start=$SECONDS
        "part_$part"
        echo "-- $part: $((SECONDS - start)) s"
    done
}

case "${1:-}" in
first)
    turn build decode farperf perf staged ring sweep dmabuf decode
    judge || failed=1
    exit $failed
    ;;
second)
    count=${NEP_GPU_COUNT:-12}
    turn build far nodes faults processes tool threads
    exit $failed
    ;;
third)
    NEP_GPU_LITMUS=${NEP_GPU_LITMUS:-450}
    turn build litmus
    exit $failed
    ;;
fourth)
    turn build sanitizer
    exit $failed
    ;;
esac

if [ "${1:-}" = pack ]; then
    pack "${2:?a folder}"
    exit $failed
fi
parts=("$@")
if [ $# -eq 0 ]; then
    parts=(build threads faults processes sanitizer perf staged decode sweep tool nodes ring litmus far
        farperf dmabuf)
fi
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || true
for part in "${parts[@]}"; do
    start=$SECONDS
    "part_$part"
    echo "-- $part: $((SECONDS - start)) s"
done
exit $failed
