/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Kernels on the CPU, for tests where there is no GPU: included before every .cu file, which is
 * compiled as C++ after emu.sh has rewritten its launches. A block is a thread of the system, a
 * thread of a block a fiber that goes on until it waits: at a barrier, at an operation of its warp,
 * or in a look at a word. Blocks of a launch, launches of different streams, and ranks run side by
 * side, so kernels wait for each other as they do on a GPU. Weak memory is not imitated.
 */
#ifndef NEP_TESTS_GPU_EMU_H
#define NEP_TESTS_GPU_EMU_H

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

namespace emu
{

struct index {
    uint32_t x;
};

void *dynamic_shared();
/* Lets other fibers go on: in everything that may be part of a loop that waits. */
void look();
/* By all fibers of a block that have not ended; how many said true. */
uint32_t barrier(bool is_true, uint32_t *num_p);
/* By all lanes of a warp that have not ended: what each of them gave. */
const uint64_t *exchange(uint64_t value, uint32_t *live_p);
void enqueue(cudaStream_t stream, std::function<void()> what);
void run(dim3 grid, dim3 block, size_t shared, const std::function<void()> &kernel);

template <class... Params> struct launcher {
    void (*kernel)(Params...);
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
    template <class... Args> void operator()(Args &&...args) const
    {
        std::tuple<Params...> copy(std::forward<Args>(args)...);
        auto call = *this;
        enqueue(stream, [call, copy] {
            run(call.grid, call.block, call.shared, [&] { std::apply(call.kernel, copy); });
        });
    }
};

template <class... Params>
launcher<Params...> launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared,
                           cudaStream_t stream)
{
    return {kernel, grid, block, shared, stream};
}

} // namespace emu

/* Of the fiber that runs. */
extern thread_local emu::index threadIdx, blockIdx, blockDim, gridDim;

#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#undef __noinline__
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __grid_constant__
#define __noinline__ __attribute__((noinline))

template <class Args>
static inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Args),
                                             const Args &args)
{
    emu::launch(kernel, config->gridDim, config->blockDim, config->dynamicSmemBytes,
                config->stream)(args);
    return cudaSuccess;
}

/* ---- barriers and warps ---------------------------------------------------------------------- */

static inline void __syncthreads()
{
    uint32_t num;
    emu::barrier(false, &num);
}
static inline int __syncthreads_and(int is_true)
{
    uint32_t num;
    return emu::barrier(is_true != 0, &num) == num;
}
static inline int __syncthreads_or(int is_true)
{
    uint32_t num;
    return emu::barrier(is_true != 0, &num) != 0;
}
static inline void __syncwarp()
{
    uint32_t live;
    emu::exchange(0, &live);
}
static inline uint32_t __ballot_sync(uint32_t, int is_true)
{
    uint32_t live, mask = 0;
    const uint64_t *all = emu::exchange(is_true != 0, &live);
    for (uint32_t i = 0; i < 32; i++) {
        mask |= (live >> i & 1) && all[i] ? 1u << i : 0;
    }
    return mask;
}
static inline int __any_sync(uint32_t mask, int is_true)
{
    return __ballot_sync(mask, is_true) != 0;
}
static inline uint32_t __match_any_sync(uint32_t, uint32_t value)
{
    uint32_t live, mask = 0;
    const uint64_t *all = emu::exchange(value, &live);
    for (uint32_t i = 0; i < 32; i++) {
        mask |= (live >> i & 1) && all[i] == value ? 1u << i : 0;
    }
    return mask;
}
static inline uint32_t __reduce_add_sync(uint32_t, uint32_t value)
{
    uint32_t live, sum = 0;
    const uint64_t *all = emu::exchange(value, &live);
    for (uint32_t i = 0; i < 32; i++) {
        sum += (live >> i & 1) ? (uint32_t)all[i] : 0;
    }
    return sum;
}
static inline uint32_t __reduce_max_sync(uint32_t, uint32_t value)
{
    uint32_t live, most = 0;
    const uint64_t *all = emu::exchange(value, &live);
    for (uint32_t i = 0; i < 32; i++) {
        most = (live >> i & 1) && all[i] > most ? (uint32_t)all[i] : most;
    }
    return most;
}
template <class T> static inline T emu_take(T value, uint32_t lane)
{
    uint64_t bits = 0;
    uint32_t live;
    std::memcpy(&bits, &value, sizeof value);
    bits = emu::exchange(bits, &live)[lane % 32];
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
template <class T> static inline T __shfl_sync(uint32_t, T value, uint32_t lane)
{
    return emu_take(value, lane);
}
template <class T> static inline T __shfl_xor_sync(uint32_t, T value, uint32_t mask)
{
    return emu_take(value, threadIdx.x % 32 ^ mask);
}
template <class T> static inline T __shfl_up_sync(uint32_t, T value, uint32_t by)
{
    uint32_t lane = threadIdx.x % 32;
    return emu_take(value, lane >= by ? lane - by : lane);
}

/* ---- arithmetic ------------------------------------------------------------------------------ */

static inline uint32_t __popc(uint32_t x)
{
    return (uint32_t)__builtin_popcount(x);
}
static inline uint32_t __ffs(uint32_t x)
{
    return (uint32_t)__builtin_ffs((int)x);
}
static inline uint32_t min(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}
static inline uint32_t max(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}
static inline float __uint_as_float(uint32_t bits)
{
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
static inline uint32_t __float_as_uint(float x)
{
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
static inline float __fadd_rn(float a, float b)
{
    return a + b;
}
static inline float __fmul_rn(float a, float b)
{
    return a * b;
}
static inline float __fdiv_rn(float a, float b)
{
    return a / b;
}
static inline float __frcp_rn(float a)
{
    return 1.0f / a;
}
static inline float __fmaf_rn(float a, float b, float c)
{
    return std::fmaf(a, b, c);
}
static inline uint32_t atomicAdd(uint32_t *word, uint32_t value)
{
    return __atomic_fetch_add(word, value, __ATOMIC_RELAXED);
}
static inline unsigned long long atomicAdd(unsigned long long *word, unsigned long long value)
{
    return __atomic_fetch_add(word, value, __ATOMIC_RELAXED);
}
static inline unsigned long long atomicCAS(unsigned long long *word, unsigned long long expected,
                                           unsigned long long value)
{
    __atomic_compare_exchange_n(word, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}

#endif
