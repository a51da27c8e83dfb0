#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# usage: scripts/gpu-test.sh [PART...]: tests and figures on a machine with an NVIDIA GPU. Builds
# what they need with nvcc and gcc alone (no CMake, no network, none of the host's libraries).
# Parts: build threads faults processes sanitizer perf decode ring; without arguments all. Part ring
# runs the litmus test for NEP_GPU_LITMUS seconds (60).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
tree=${NEP_GPU_TREE:-build-gpu} failed=0
seed=${NEP_GPU_SEED:-$RANDOM$RANDOM} count=${NEP_GPU_COUNT:-40}
parts=("$@")
if [ $# -eq 0 ]; then
    parts=(build threads faults processes sanitizer perf decode ring)
fi

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

build() {
    local nvcc flags file objects=() links
    nvcc=${CUDACXX:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
    mkdir -p "$tree"
    rm -f "$tree/failed"
    flags=(-std=gnu11 -O2 -Wall -Wextra -ffp-contract=off -D_GNU_SOURCE -DNEP_HAVE_X86=1
        -DNEP_HAVE_CUDA=1 -DNEP_HAVE_UCX=0 -DNEP_HAVE_VERBS=0 -I. -Iinclude
        "-I$(dirname "$nvcc")/../include" -pthread)
    for file in dispatch/cuda/*.cu; do
        "$nvcc" -gencode arch=compute_90,code=sm_90 -gencode arch=compute_80,code=compute_80 \
            -std=c++17 -O3 -lineinfo -fmad=false -I. -Iinclude -c "$file" \
            -o "$tree/$(basename "$file").o" || touch "$tree/failed" &
        objects+=("$tree/$(basename "$file").o")
    done
    for file in dispatch/cuda/geometry.c dispatch/cuda/proxy.c dispatch/cuda/visibility.c \
        dispatch/host/kernels*.c dispatch/host/wire.c \
        base/*.c tests/ref/[cgnrs]*.c tests/gpu/gpu_[wcvp]*.c; do
        case $file in
        *_avx2.c) links=(-mavx2 -mfma -mf16c) ;;
        *_avx512.c) links=(-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c) ;;
        *) links=() ;;
        esac
        gcc "${flags[@]}" ${links[@]+"${links[@]}"} -c "$file" -o "$tree/$(basename "$file").o" ||
            touch "$tree/failed" &
        case $file in
        */gpu_check.c | */gpu_perf.c) ;;
        *) objects+=("$tree/$(basename "$file").o") ;;
        esac
    done
    gcc "${flags[@]}" -c placement/choose.c -o "$tree/place_choose.o" || touch "$tree/failed"
    objects+=("$tree/place_choose.o")
    wait
    for file in gpu_check gpu_perf; do
        "$nvcc" -o "$tree/$file" "$tree/$file.c.o" "${objects[@]}" -lpthread -lm ||
            touch "$tree/failed"
    done
    for file in fake_nic gpu_ring; do
        gcc "${flags[@]}" -c "tests/gpu/$file.c" -o "$tree/$file.c.o" || touch "$tree/failed"
    done
    for file in fake_nic gpu_ring_kernels; do
        "$nvcc" -gencode arch=compute_90,code=sm_90 -gencode arch=compute_80,code=compute_80 \
            -std=c++17 -O3 -I. -Iinclude -c "tests/gpu/$file.cu" -o "$tree/$file.cu.o" ||
            touch "$tree/failed"
    done
    "$nvcc" -o "$tree/gpu_ring" "$tree"/{gpu_ring,fake_nic}.c.o \
        "$tree"/{gpu_ring_kernels,fake_nic}.cu.o "${objects[@]}" -lpthread -lm ||
        touch "$tree/failed"
    if [ -e "$tree/failed" ]; then
        rm "$tree/failed"
        echo "gpu-test: the build failed"
        exit 1
    fi
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
    export CUDA_DEVICE_MAX_CONNECTIONS=32
    local ranks
    for ranks in 1 2 3 4 5 6 7 8; do
        run 120 "$tree/gpu_check" random threads $ranks "$seed" "$count"
    done
}

part_faults() {
    CUDA_DEVICE_MAX_CONNECTIONS=32 run 60 "$tree/gpu_check" faults
}

part_processes() {
    mps start
    local ranks
    for ranks in 2 4 8; do
        run 120 "$tree/gpu_check" random processes $ranks "$seed" "$count"
    done
    mps stop
}

part_sanitizer() {
    local tool
    tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2> /dev/null)
    if [ -z "$tool" ]; then
        echo "sanitizer: compute-sanitizer is not here; nothing was looked at"
        return
    fi
    CUDA_DEVICE_MAX_CONNECTIONS=32 run 100 "$tool" --tool memcheck --error-exitcode 9 \
        "$tree/gpu_check" random threads 2 "$seed" 4
}

part_perf() {
    mps start
    local setting
    for setting in "2 16" "4 16" "8 16" "2 8" "4 8" "8 8"; do
        # shellcheck disable=SC2086
        run 100 "$tree/gpu_perf" $setting 4096 bf16 rank
    done
    for setting in "2 16" "4 16" "8 16" "2 8"; do
        # shellcheck disable=SC2086
        run 100 "$tree/gpu_perf" $setting 4096 fp8 rank
    done
    mps stop
}

part_decode() {
    mps start
    run 60 "$tree/gpu_perf" 8 16 128 bf16 rank
    run 60 "$tree/gpu_perf" 8 16 128 fp8 expert
    run 60 "$tree/gpu_perf" 8 16 8 bf16 rank
    mps stop
}

part_ring() {
    run 60 "$tree/gpu_ring" figures
    run 60 "$tree/gpu_ring" faults
    run $((${NEP_GPU_LITMUS:-60} + 60)) "$tree/gpu_ring" litmus "${NEP_GPU_LITMUS:-60}"
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || true
for part in "${parts[@]}"; do
    start=$SECONDS
    if [ "$part" = build ]; then
        build
    else
        "part_$part"
    fi
    echo "-- $part: $((SECONDS - start)) s"
done
exit $failed
