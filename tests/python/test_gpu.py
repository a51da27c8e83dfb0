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


def figures(rank, ranks, tokens, hidden, top_k):
    """Microseconds: of the host in a cached dispatch while the GPU has little to do; of the device in
    dispatch and combine of `tokens` rows."""
    experts = 8 * ranks
    buffer = deep_ep.Buffer(dist.group.WORLD, 1 << 30, 0, max_tokens=tokens)
    found = {}
    for label, num in (("small", 8), ("large", tokens)):
        given = world(ranks, [num] * ranks, hidden, experts, top_k, absent=0)[rank]
        x, ids, weights = on(given)
        rows = handle = None
        layout = buffer.get_dispatch_layout(ids, experts)
        rows, _, _, _, handle, _ = buffer.dispatch(
            x, topk_idx=ids, topk_weights=weights, num_tokens_per_rank=layout[0], is_token_in_rank=layout[3],
            num_tokens_per_expert=layout[2])
        y = buffer.combine(rows, handle)[0]
        for name, call in (("dispatch", lambda: buffer.dispatch(x, handle=handle)),
                           ("combine", lambda: buffer.combine(rows, handle)),
                           ("library alone", lambda: handle.owned.seat.ep.dispatch_raw(
                              handle.owned.handle, num, x.data_ptr(), None, None, 0, None, rows.data_ptr(),
                              rows.shape[0], None, None))):
            for _ in range(5):
                call()
            torch.cuda.synchronize()
            dist.barrier()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            host = []
            start.record()
            for _ in range(20):
                before = time.perf_counter()
                call()
                host.append(time.perf_counter() - before)
                if label == "small":
                    torch.cuda.synchronize()
            end.record()
            torch.cuda.synchronize()
            dist.barrier()
            found[f"{label} {name}"] = (sorted(host)[10] * 1e6, start.elapsed_time(end) / 20 * 1000)
        must(bool(torch.isfinite(y).all()), "sums")
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
    def test_graphs(self):
        times = run(RANKS, graphs)
        print(f"graph of low-latency dispatch and combine, {RANKS} ranks, 64 tokens, H {H}: "
              f"{max(times):.1f} us a replay")

    @unittest.skipUnless(HAS, "no GPU here")
    def test_figures(self):
        for ranks in (RANKS,):
            for shape in ((4096, 7168, 8),):
                found = run(ranks, figures, *shape)
                for name in found[0]:
                    if name != "rows":
                        print(f"{ranks} ranks, {shape}, {name}: host {max(f[name][0] for f in found):.1f} us, "
                              f"device {max(f[name][1] for f in found):.1f} us")
                print("rows received:", [f["rows"] for f in found])


if __name__ == "__main__":
    unittest.main()
