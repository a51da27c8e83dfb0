#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# usage: scripts/gpu-test.sh [PART...]: tests and figures on a machine with an NVIDIA GPU.
# Parts: build threads faults processes sanitizer perf staged decode sweep tool nodes ring far dmabuf;
# without arguments all. It starts and ends an MPS daemon of its own. Part ring runs the litmus test
# for NEP_GPU_LITMUS seconds (60).
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
export LD_LIBRARY_PATH=$bin/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

run() { # SECONDS COMMAND...
    local limit=$1 result
    shift
    timeout -k 5 "$limit" "$@"
    result=$?
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

part_nodes() { # the same over emulated nodes
    mps start
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
    run $((${NEP_GPU_LITMUS:-60} + 60)) "$bin/gpu_ring" litmus "${NEP_GPU_LITMUS:-60}"
}

part_far() { # two hops between emulated nodes
    run 120 "$bin/gpu_far" random "$seed" "$count"
    run 60 "$bin/gpu_far" faults
    run 60 "$bin/gpu_far" perf 2 4 14 128 bf16
    run 60 "$bin/gpu_far" perf 2 4 14 128 fp8
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

if [ "${1:-}" = pack ]; then
    pack "${2:?a folder}"
    exit $failed
fi
parts=("$@")
if [ $# -eq 0 ]; then
    parts=(build threads faults processes sanitizer perf staged decode sweep tool nodes ring far dmabuf)
fi
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || true
for part in "${parts[@]}"; do
    start=$SECONDS
    "part_$part"
    echo "-- $part: $((SECONDS - start)) s"
done
exit $failed
