# SPDX-License-Identifier: Apache-2.0
# Sourced: nep_cuda FOLDER sets CUDACXX: the nvcc in PATH or /usr/local/cuda, else NVIDIA's compiler
# from its Python packages, installed into FOLDER (270 MB, no GPU or driver needed to compile).
# Returns 1, saying so, when there is neither.

# One set that belongs together; newer compilers need matching headers.
NEP_CUDA_WHEELS=(nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85)

nep_cuda() {
    local folder=$1 top
    if [ -z "${CUDACXX:-}" ]; then
        CUDACXX=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2> /dev/null || true)
    fi
    if [ -z "$CUDACXX" ]; then
        top=$folder/nvidia/cu13
        if [ ! -x "$top/bin/nvcc" ]; then
            nep_need python3-pip || return 1
            echo "cuda: no nvcc here; installing NVIDIA's wheels into $folder"
            /usr/bin/python3 -m pip install -q --root-user-action=ignore --no-deps \
                --target "$folder" "${NEP_CUDA_WHEELS[@]}" || {
                echo "cuda: neither nvcc nor its Python packages can be had here: not compiled"
                return 1
            }
            ln -sfn lib "$top/lib64" # where nvcc.profile and CMake look
        fi
        CUDACXX=$top/bin/nvcc
    fi
    export CUDACXX
    echo "cuda: $("$CUDACXX" --version | tail -n 2 | head -n 1) ($CUDACXX)"
}
