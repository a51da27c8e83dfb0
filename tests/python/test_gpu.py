# SPDX-License-Identifier: Apache-2.0
"""What only a GPU has: streams and events, graphs, figures. Without one, that the refusal says so.
NEP_TEST_RANKS ranks share the device (MPS)."""
import os
import time
import unittest

import deep_ep
import nearep
import torch
import torch.distributed as dist
from ranks import RANKS, close, must, run, world

H, K = 1024, 4
HAS = nearep.has_cuda() and os.path.exists("/dev/nvidia0")


def on(tokens):
    return tokens.x.cuda(), tokens.ids.cuda(), tokens.weights.cuda()


def streams(rank, ranks):
    """Asynchronous calls chained by events, with work on the compute stream around them."""
    experts = 4 * ranks
    buffer = deep_ep.Buffer(dist.group.WORLD, 1 << 25, 0)
    for turn in range(12):
        tokens = world(ranks, [300 - r for r in range(ranks)], H, experts, K, salt=turn)[rank]
        x, ids, weights = on(tokens)
        torch.cuda._sleep(200000)
        scaled = x * 2  # produced late on the compute stream
        previous = buffer.capture()
        flags = dict(previous_event=previous, async_finish=True, allocate_on_comm_stream=turn % 2 == 0)
        layout = buffer.get_dispatch_layout(ids, experts, **flags)
        flags["previous_event"] = layout[4]
        rows, got_ids, got, listed, handle, event = buffer.dispatch(
            scaled, topk_idx=ids, topk_weights=weights, num_tokens_per_rank=layout[0],
            is_token_in_rank=layout[3], num_tokens_per_expert=layout[2], **flags)
        with event:
            torch.cuda._sleep(100000)
        y_in = (rows.float() * (got * (got_ids >= 0)).sum(1, keepdim=True)).bfloat16()
        flags["previous_event"] = buffer.capture()
        y, _, event = buffer.combine(y_in, handle, **flags)
        event.current_stream_wait()
        want = 2 * tokens.x.double() * ((tokens.ids >= 0) * tokens.weights).sum(1, keepdim=True).double()
        close(y.cpu(), want, want.abs(), f"turn {turn}", roundings=4)
    dist.barrier()


def while_written(rank, ranks):
    """A combine that is launched before the experts' outputs are: its stream waits for their flags."""
    experts, most, block = 2 * ranks, 64, 16
    buffer = deep_ep.Buffer(dist.group.WORLD, 0, 1 << 20, low_latency_mode=True)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10)  # loaded now: CUDA may load a kernel only when no other runs
    for turn in range(6):
        tokens = world(ranks, [max(most - 9 * r, 0) for r in range(ranks)], H, experts, K, salt=turn)[rank]
        x, ids, weights = on(tokens)
        rows, count, handle, _, _ = buffer.low_latency_dispatch(x, ids, most, experts, use_fp8=False)
        blocks = -(-ranks * most // block)
        flags = torch.zeros(2, blocks if turn % 2 else 1, dtype=torch.int32, device="cuda")
        given = dict(comp_signal=flags, block_m=block, threshold=7, packed_recv_count=count) if turn % 2 else \
            dict(src_signals=flags, src_signal_expect_value=7)
        y_in = torch.full_like(rows, float("nan"))
        used = -(-count // block) if turn % 2 else (count > 0).int()
        raised = 7 * (torch.arange(flags.shape[1], device="cuda")[None, :] < used[:, None]).int()
        torch.cuda.synchronize()
        dist.barrier()
        y = buffer.low_latency_combine(y_in, ids, weights, handle, overlap=True, **given)[0]
        with torch.cuda.stream(side):
            torch.cuda._sleep(2000000)
            y_in.copy_(rows)
            flags.copy_(raised)
        torch.cuda.synchronize()
        want = tokens.x.double() * ((tokens.ids >= 0) * tokens.weights).sum(1, keepdim=True).double()
        close(y.cpu(), want, want.abs(), f"while it is written, turn {turn}", roundings=4)
    dist.barrier()


def graphs(rank, ranks):
    """Low-latency calls in a CUDA graph, replayed with other tokens."""
    experts, most = 2 * ranks, 64
    buffer = deep_ep.Buffer(dist.group.WORLD, 0, 1 << 20, low_latency_mode=True)
    tokens = [world(ranks, [most] * ranks, H, experts, K, salt=salt)[rank] for salt in range(5)]
    x, ids, weights = on(tokens[0])
    y = torch.empty_like(x)

    def step():
        rows, count, handle, _, hook = buffer.low_latency_dispatch(x, ids, most, experts, use_fp8=False,
                                                                   return_recv_hook=True)
        hook()
        _, _, hook = buffer.low_latency_combine(rows, ids, weights, handle, return_recv_hook=True, out=y)
        hook()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        step()
    for given in tokens * 4:
        for target, source in ((x, given.x), (ids, given.ids), (weights, given.weights)):
            target.copy_(source)
        graph.replay()
        want = given.x.double() * ((given.ids >= 0) * given.weights).sum(1, keepdim=True).double()
        close(y.cpu(), want, want.abs(), "replay", roundings=4)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    dist.barrier()
    start.record()
    for _ in range(50):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    dist.barrier()
    return start.elapsed_time(end) / 50 * 1000


def in_stream(call, num=40, first=20):
    """(us of the host for each call, us of the device for each operation): launches one after the other, timed
    after the first ones, when all ranks are in step."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    dist.barrier()
    for i in range(first + num):
        if i == first:
            start.record()
            before = time.perf_counter()
        call()
    host = time.perf_counter() - before
    end.record()
    torch.cuda.synchronize()
    return host / num * 1e6, start.elapsed_time(end) / num * 1000


def in_graph(call, num=10, replays=7):
    """us of the device for each operation, the slowest rank's of the median replay: as tests/gpu/gpu_perf."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    held = [call() for _ in range(num)]  # blocks of mapped memory: a graph makes none
    torch.cuda.synchronize()
    del held
    with torch.cuda.graph(graph, stream=side):
        kept = [call() for _ in range(num)]
    times = []
    for i in range(replays + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dist.barrier()
        call()  # ends when all ranks are there
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        slowest = torch.tensor([start.elapsed_time(end) / num * 1000])
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        times += [float(slowest)] if i else []
    del kept
    return sorted(times)[replays // 2]


def host_times(call):
    """us of the host in a call while the GPU has nothing else to do: the median of 30."""
    times = []
    for _ in range(30):
        torch.cuda.synchronize()
        dist.barrier()
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    torch.cuda.synchronize()
    return sorted(times)[15] * 1e6


def figures(rank, ranks, tokens, hidden, top_k):
    """Of cached dispatch and of combine, by deep_ep and by the library with the same addresses: the host's time
    with few tokens; the device's with many, in a stream and in a graph."""
    experts = 256
    buffer = deep_ep.Buffer(dist.group.WORLD, 5 << 30, 0, max_tokens=tokens)
    found = {}
    for num in (8, tokens):
        x, ids, weights = on(world(ranks, [num] * ranks, hidden, experts, top_k, absent=0)[rank])
        layout = buffer.get_dispatch_layout(ids, experts)
        rows, _, _, _, handle, _ = buffer.dispatch(
            x, topk_idx=ids, topk_weights=weights, num_tokens_per_rank=layout[0], is_token_in_rank=layout[3],
            num_tokens_per_expert=layout[2])
        y = buffer.combine(rows, handle)[0]
        ep, inner = handle.owned.seat.ep, handle.owned.handle

        def by_library():
            ep.dispatch_raw(inner, num, x.data_ptr(), None, None, 0, None, rows.data_ptr(), rows.shape[0], None,
                            torch.cuda.current_stream().cuda_stream)
        private = rows.clone()
        for name, call in (("dispatch", lambda: buffer.dispatch(x, handle=handle)), ("dispatch, library", by_library),
                           ("combine", lambda: buffer.combine(rows, handle)),
                           ("combine of torch's memory", lambda: buffer.combine(private, handle))):
            if num == 8:
                found["host, " + name] = host_times(call)
                continue
            host, found["stream, " + name] = in_stream(call)
            found["graph, " + name] = in_graph(call)
        want = x.float() * (torch.div(ids, experts // ranks, rounding_mode="floor")[:, :, None] ==
                            torch.arange(ranks, device="cuda")).any(1).sum(1, keepdim=True)
        must(bool(((y.float() - want).abs() <= want.abs() * 2 ** -7).all()), "sums")
    found["rows"] = rows.shape[0]
    return found


class GpuTest(unittest.TestCase):
    @unittest.skipIf(HAS, "there is one")
    def test_refusal(self):
        comm = nearep.Comm(0, 1, allgather=lambda value: [value])
        with self.assertRaises(nearep.Error) as caught:
            comm.ep(num_experts=2, top_k=1, hidden=32, max_tokens=4, executor="cuda")
        print("without a GPU:", caught.exception)

    @unittest.skipUnless(HAS, "no GPU here")
    def test_streams(self):
        run(RANKS, streams)

    @unittest.skipUnless(HAS, "no GPU here")
    def test_while_written(self):
        run(RANKS, while_written)

    @unittest.skipUnless(HAS, "no GPU here")
    def test_graphs(self):
        times = run(RANKS, graphs)
        print(f"graph of low-latency dispatch and combine, {RANKS} ranks, 64 tokens, H {H}: "
              f"{max(times):.1f} us a replay")

    @unittest.skipUnless(HAS, "no GPU here")
    def test_figures(self):
        shape = (4096, 7168, 8)
        found = run(RANKS, figures, *shape)
        for name in found[0]:
            of_ranks = [f[name] for f in found]
            print(f"{RANKS} ranks, {shape}, {name}: " + (str(of_ranks) if name == "rows" else
                                                         f"{max(of_ranks):.1f} us"), flush=True)


if __name__ == "__main__":
    unittest.main()
