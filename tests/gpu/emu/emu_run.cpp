// SPDX-License-Identifier: Apache-2.0
/* Fibers, blocks, streams and graphs of emu.h. */
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <sched.h>
#include <sys/mman.h>
#include <thread>
#include <vector>

#include "tests/gpu/emu/emu.h" /* last: it names attributes anew */

/* Saves what a call preserves, the stack pointer at *rdi, and goes on from rsi. */
extern "C" void emu_switch(void **from, void *to);
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch, @function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emu_switch, .-emu_switch
)");

thread_local emu::index threadIdx, blockIdx, blockDim, gridDim;

namespace emu
{

namespace
{

enum { STACK = 64 << 10 };
enum class state { READY, BARRIER, WARP, DONE };

struct fiber {
    void *stack;
    state is;
};

/* Where fibers meet: a block, or a warp. */
struct meeting {
    uint32_t live;
    uint32_t arrived;
    uint32_t trues;
    uint32_t result_trues;
    uint32_t result_live;
    uint32_t lanes; /* of a warp, that live */
    uint32_t
        result_lanes;   /* those that gave: who has its result may end before others have theirs */
    uint64_t given[32]; /* of a warp */
    uint64_t result[32];
};

struct block_state {
    const std::function<void()> *kernel;
    std::vector<fiber> fibers;
    std::vector<meeting> warps;
    meeting all = {};
    char *stacks = nullptr;
    char *shared = nullptr;
    void *scheduler = nullptr;
    uint32_t now = 0;
    bool has_moved = false; /* since the last look at whether anything does */
};

thread_local block_state *block;

void leave(state is)
{
    uint32_t self = block->now;
    block->fibers[self].is = is;
    emu_switch(&block->fibers[self].stack, block->scheduler);
}

void wake(uint32_t begin, uint32_t end, state from)
{
    for (uint32_t i = begin; i < end && i < block->fibers.size(); i++) {
        if (block->fibers[i].is == from) {
            block->fibers[i].is = state::READY;
        }
    }
    block->has_moved = true;
}

/* All are there: what they gave is the result. The last to arrive does not wait. */
bool is_complete(meeting &m)
{
    if (m.arrived == 0 || m.arrived != m.live) {
        return false;
    }
    m.result_trues = m.trues;
    m.result_live = m.live;
    m.result_lanes = m.lanes;
    std::memcpy(m.result, m.given, sizeof m.result);
    m.arrived = m.trues = 0;
    return true;
}

void end_fiber()
{
    uint32_t self = block->now;
    meeting &warp = block->warps[self / 32];
    block->fibers[self].is = state::DONE;
    block->has_moved = true;
    warp.live--;
    warp.lanes &= ~(1u << self % 32);
    block->all.live--;
    if (is_complete(warp)) {
        wake(self / 32 * 32, self / 32 * 32 + 32, state::WARP);
    }
    if (is_complete(block->all)) {
        wake(0, (uint32_t)block->fibers.size(), state::BARRIER);
    }
    leave(state::DONE);
}

void begin_fiber()
{
    (*block->kernel)();
    end_fiber();
}

void prepare(uint32_t self)
{
    void **top = (void **)(block->stacks + (size_t)(self + 1) * STACK);
    *--top = nullptr; /* begin_fiber never returns; aligned as at a call */
    *--top = (void *)begin_fiber;
    for (int i = 0; i < 6; i++) {
        *--top = nullptr;
    }
    block->fibers[self] = {top, state::READY};
}

void run_fibers()
{
    uint32_t num = (uint32_t)block->fibers.size();
    while (block->all.live != 0) {
        bool any = false;
        block->has_moved = false;
        for (uint32_t i = 0; i < num; i++) {
            if (block->fibers[i].is == state::READY) {
                any = true;
                block->now = i;
                threadIdx.x = i;
                emu_switch(&block->scheduler, block->fibers[i].stack);
            }
        }
        if (!any) {
            std::fprintf(stderr, "emu: all fibers of a block wait for one another\n");
            std::abort();
        }
        if (!block->has_moved) {
            sched_yield();
        }
    }
}

void run_block(uint32_t which, dim3 grid, dim3 threads, size_t shared,
               const std::function<void()> &kernel)
{
    block_state here;
    here.kernel = &kernel;
    here.fibers.resize(threads.x);
    here.warps.resize((threads.x + 31) / 32);
    here.stacks = (char *)mmap(nullptr, (size_t)threads.x * STACK, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    here.shared = (char *)std::aligned_alloc(256, (shared + 511) / 256 * 256);
    if (here.stacks == MAP_FAILED || here.shared == nullptr) {
        std::fprintf(stderr, "emu: no memory for a block\n");
        std::abort();
    }
    std::memset(here.shared, 0xc5, shared);
    here.all.live = threads.x;
    for (uint32_t i = 0; i < threads.x; i++) {
        here.warps[i / 32].live++;
        here.warps[i / 32].lanes |= 1u << i % 32;
    }
    block = &here;
    blockIdx.x = which;
    blockDim.x = threads.x;
    gridDim.x = grid.x;
    for (uint32_t i = 0; i < threads.x; i++) {
        prepare(i);
    }
    run_fibers();
    munmap(here.stacks, (size_t)threads.x * STACK);
    std::free(here.shared);
}

} // namespace

void *dynamic_shared()
{
    return block->shared;
}

void look()
{
    leave(state::READY);
}

uint32_t barrier(bool is_true, uint32_t *num_p)
{
    meeting &m = block->all;
    m.arrived++;
    m.trues += is_true;
    if (is_complete(m)) {
        wake(0, (uint32_t)block->fibers.size(), state::BARRIER);
    } else {
        leave(state::BARRIER);
    }
    *num_p = m.result_live;
    return m.result_trues;
}

const uint64_t *exchange(uint64_t value, uint32_t *live_p)
{
    uint32_t self = block->now;
    meeting &m = block->warps[self / 32];
    m.given[self % 32] = value;
    m.arrived++;
    if (is_complete(m)) {
        wake(self / 32 * 32, self / 32 * 32 + 32, state::WARP);
    } else {
        leave(state::WARP);
    }
    *live_p = m.result_lanes;
    return m.result;
}

void run(dim3 grid, dim3 threads, size_t shared, const std::function<void()> &kernel)
{
    std::vector<std::thread> blocks;
    for (uint32_t b = 0; b < grid.x; b++) {
        blocks.emplace_back(run_block, b, grid, threads, shared, std::cref(kernel));
    }
    for (std::thread &thread : blocks) {
        thread.join();
    }
}

} // namespace emu

/* ---- streams and graphs ---------------------------------------------------------------------- */

struct CUgraph_st {
    std::vector<std::function<void()>> nodes;
};

struct CUstream_st {
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::function<void()>> queue;
    CUgraph_st *capture = nullptr;
    bool is_busy = false;
    bool is_over = false;
    std::thread worker;

    CUstream_st() : worker([this] { work(); })
    {
    }
    void work()
    {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            changed.wait(lock, [this] { return is_over || !queue.empty(); });
            if (queue.empty()) {
                return;
            }
            std::function<void()> next = std::move(queue.front());
            queue.pop_front();
            is_busy = true;
            lock.unlock();
            next();
            lock.lock();
            is_busy = false;
            changed.notify_all();
        }
    }
    void put(std::function<void()> what)
    {
        std::lock_guard<std::mutex> lock(mutex);
        if (capture != nullptr) {
            capture->nodes.push_back(std::move(what));
            return;
        }
        queue.push_back(std::move(what));
        changed.notify_all();
    }
    void wait()
    {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [this] { return !is_busy && queue.empty(); });
    }
};

void emu::enqueue(cudaStream_t stream, std::function<void()> what)
{
    if (stream == nullptr) {
        what();
    } else {
        stream->put(std::move(what));
    }
}

extern "C" {

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream_p, unsigned)
{
    *stream_p = new CUstream_st;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    if (stream != nullptr) {
        stream->wait();
    }
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream)
{
    if (stream == nullptr) {
        return cudaSuccess;
    }
    std::lock_guard<std::mutex> lock(stream->mutex);
    return stream->is_busy || !stream->queue.empty() ? cudaErrorNotReady : cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    stream->wait();
    {
        std::lock_guard<std::mutex> lock(stream->mutex);
        stream->is_over = true;
        stream->changed.notify_all();
    }
    stream->worker.join();
    delete stream;
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status_p)
{
    *status_p = stream != nullptr && stream->capture != nullptr ? cudaStreamCaptureStatusActive
                                                                : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode)
{
    stream->capture = new CUgraph_st;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph_p)
{
    *graph_p = stream->capture;
    stream->capture = nullptr;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec_p, cudaGraph_t graph, unsigned long long)
{
    *exec_p = (cudaGraphExec_t) new CUgraph_st(*graph);
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream)
{
    for (const std::function<void()> &node : ((CUgraph_st *)exec)->nodes) {
        stream->put(node);
    }
    return cudaSuccess;
}

cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t)
{
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec)
{
    delete (CUgraph_st *)exec;
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    delete graph;
    return cudaSuccess;
}
}
