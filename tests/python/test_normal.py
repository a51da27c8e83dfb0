# SPDX-License-Identifier: Apache-2.0
"""The matrix of upstream's intranode and internode tests, with a bound for each element."""
import itertools
import threading
import unittest

import deep_ep
import torch
import torch.distributed as dist
from device import DEVICE, on_device
from ranks import RANKS, Tokens, arrivals, close, equal, must, run, world

H, K = 256, 4
FP8 = getattr(torch, "float8_e4m3fn", torch.uint8)


def payload_of(kind, given, rank):
    """As upstream's three: random bf16, bf16 that names its rank, fp8 bytes with column-major scales."""
    if kind == "random":
        return given.x
    if kind == "rank":
        return torch.full_like(given.x, rank)
    data = (given.x.view(torch.int16).to(torch.int32) & 0xFF).to(torch.uint8)
    scales = given.x.float()[:, :H // 128].t().contiguous().t()
    return data.view(FP8), scales


def expected(kind, tokens, rows):
    parts = [payload_of(kind, given, source) for source, given in enumerate(tokens)]
    if kind != "fp8":
        return torch.stack([parts[s][t] for s, t in rows]) if rows else parts[0][:0]
    return (torch.stack([parts[s][0].view(torch.uint8)[t] for s, t in rows]) if rows else
            parts[0][0].view(torch.uint8)[:0],
            torch.stack([parts[s][1][t] for s, t in rows]) if rows else parts[0][1][:0])


def check_x(got, want, what):
    if isinstance(want, tuple):
        equal(got[0].view(torch.uint8), want[0], what + " bytes")
        equal(got[1], want[1], what + " scales")
    else:
        equal(got, want, what)


def check_layout(found, mine, experts, ranks, nodes, sizes):
    per_rank, per_node, per_expert, in_rank, event = found
    owner = torch.div(mine.ids, experts // ranks, rounding_mode="floor")
    owner = torch.where(mine.ids >= 0, owner, torch.full_like(owner, -1))
    want = torch.stack([(owner == r).any(1) for r in range(ranks)], 1)
    equal(in_rank, want, "is_token_in_rank")
    equal(per_rank, want.sum(0).int(), "num_tokens_per_rank")
    equal(per_expert, torch.stack([(mine.ids == e).sum() for e in range(experts)]).int(), "per expert")
    must((per_node is None) == (nodes == 1), "num_tokens_per_rdma_rank on one node is None")
    if per_node is not None:
        begins = [sum(sizes[:n]) for n in range(nodes + 1)]
        want_nodes = [int(want[:, begins[n]:begins[n + 1]].any(1).sum()) for n in range(nodes)]
        must(per_node.tolist() == want_nodes, "num_tokens_per_rdma_rank")
    return in_rank


def check_case(buffer, rank, ranks, nodes, tokens, kind, with_topk, is_async, has_previous, alignment, experts):
    mine, per_rank = tokens[rank], experts // ranks
    what = f"{kind}, topk {with_topk}, async {is_async}, previous {has_previous}, alignment {alignment}"
    events = dict(async_finish=is_async)
    if has_previous:
        events["previous_event"] = buffer.capture()
    found = buffer.get_dispatch_layout(mine.ids, experts, **events)
    in_rank = check_layout(found, mine, experts, ranks, len(nodes), nodes)
    if is_async:
        found[4].current_stream_wait()
    arguments = dict(num_tokens_per_rank=found[0], num_tokens_per_rdma_rank=found[1], is_token_in_rank=in_rank,
                     num_tokens_per_expert=found[2], config=buffer.get_dispatch_config(ranks),
                     expert_alignment=alignment, **events)
    if with_topk:
        arguments.update(topk_idx=mine.ids, topk_weights=mine.weights)
    recv_x, recv_ids, recv_weights, listed, handle, event = buffer.dispatch(payload_of(kind, mine, rank), **arguments)
    must((event.event is not None) == is_async, "an event exactly where asked for")
    rows = arrivals(tokens, rank, per_rank)
    check_x(recv_x, expected(kind, tokens, rows), "recv_x: " + what)
    pairs = [sum(int((given.ids == rank * per_rank + i).sum()) for given in tokens) for i in range(per_rank)]
    must(listed == [-(-n // alignment) * alignment for n in pairs], f"list {listed}: {what}")
    prefix = handle[0][:, rank] if len(nodes) == 1 else handle[-4]
    sources = torch.tensor([s for s, _ in rows])
    must(prefix.tolist() == [int((sources <= s).sum()) for s in range(ranks)], "prefix by source: " + what)
    if with_topk:
        check_topk(tokens, rows, rank, per_rank, recv_ids, recv_weights)
        check_worst(buffer, kind, mine, rank, ranks, arguments, recv_x, recv_ids, recv_weights)
    else:
        must(recv_ids is None and recv_weights is None, "no topk came back")
    again = buffer.dispatch(payload_of(kind, mine, rank), handle=handle, **events)
    check_x(again[0], expected(kind, tokens, rows), "cached: " + what)
    must(again[1:5] == (None,) * 4, "a cached dispatch returns rows alone")
    check_combine(buffer, rank, ranks, tokens, rows, handle, recv_weights, per_rank, nodes, events, what)


def check_topk(tokens, rows, rank, per_rank, ids, weights):
    want_ids = torch.stack([tokens[s].ids[t] for s, t in rows]) if rows else ids[:0]
    is_here = (want_ids >= 0) & (torch.div(want_ids, per_rank, rounding_mode="floor") == rank)
    equal(ids, torch.where(is_here, want_ids - rank * per_rank, torch.full_like(want_ids, -1)), "recv_topk_idx")
    want = torch.stack([tokens[s].weights[t] for s, t in rows]) if rows else weights[:0]
    equal(weights, want * is_here, "recv_topk_weights")


def check_worst(buffer, kind, mine, rank, ranks, arguments, recv_x, recv_ids, recv_weights):
    worst = 64 * ranks
    found = buffer.dispatch(payload_of(kind, mine, rank), num_worst_tokens=worst, **arguments)
    num = recv_ids.shape[0]
    first = (found[0][0][:num], found[0][1][:num]) if isinstance(found[0], tuple) else found[0][:num]
    want = (recv_x[0].view(torch.uint8), recv_x[1]) if isinstance(recv_x, tuple) else recv_x
    check_x(first, want, "worst case")
    must(found[1].shape[0] == worst and bool((found[1][num:] == -1).all()), "the tail is -1")
    equal(found[1][:num], recv_ids, "worst case ids")
    equal(found[2][:num], recv_weights, "worst case weights")
    must(found[3] == [], "no list in the worst case")


def check_combine(buffer, rank, ranks, tokens, rows, handle, weights, per_rank, nodes, events, what):
    mine = tokens[rank]
    sent = torch.stack([tokens[s].x[t] for s, t in rows]) if rows else mine.x[:0]
    scaled = (sent.float() * (1 + rank)).bfloat16()
    owner = torch.where(mine.ids >= 0, torch.div(mine.ids, per_rank, rounding_mode="floor"),
                        torch.full_like(mine.ids, -1))
    in_rank = torch.stack([(owner == r).any(1) for r in range(ranks)], 1)
    terms = [(mine.x.float() * (1 + r)).bfloat16().double() * in_rank[:, r:r + 1] for r in range(ranks)]
    biases = [torch.ones_like(mine.x), mine.x.flip(1).contiguous()]
    for bias in (None, biases[0], tuple(biases)):
        y, sums, event = buffer.combine(scaled.contiguous(), handle, topk_weights=weights, bias=bias,
                                        config=buffer.get_combine_config(ranks), **events)
        used = list(bias) if isinstance(bias, tuple) else [bias] if bias is not None else []
        every = terms + [b.double() for b in used]
        close(y, sum(every), sum(t.abs() for t in every), "combine: " + what, roundings=len(nodes) + 1)
        if weights is not None:
            close(sums, (mine.weights * (mine.ids >= 0)).double(), torch.ones_like(mine.weights).double(),
                  "combined weights: " + what, bits=23)


def matrix(rank, ranks, nodes, experts, sizes):
    buffer = on_device(deep_ep.Buffer(dist.group.WORLD, 1 << 20, 0, ranks_per_node=nodes, explicitly_destroy=True))
    cases = itertools.product(("random", "rank", "fp8"), (True, False), (False, True), (False, True))
    for number, (kind, with_topk, is_async, has_previous) in enumerate(cases):
        tokens = world(ranks, sizes, H, experts, K, salt=number)
        check_case(buffer, rank, ranks, nodes, tokens, kind, with_topk, is_async, has_previous,
                   (1, 16)[number % 2], experts)
    pressure(buffer, rank, ranks, experts, sizes)
    dist.barrier()
    buffer.destroy()


def pressure(buffer, rank, ranks, experts, sizes):
    """The same input gives the same bits, whatever happened in between."""
    mine = Tokens(rank, sizes[rank], H, experts, K, salt=99)
    seen = None
    for _ in range(20):
        found = buffer.get_dispatch_layout(mine.ids, experts)
        x, ids, weights, _, handle, _ = buffer.dispatch(
            mine.x, num_tokens_per_rank=found[0], num_tokens_per_rdma_rank=found[1], is_token_in_rank=found[3],
            num_tokens_per_expert=found[2], topk_idx=mine.ids, topk_weights=mine.weights)
        y = buffer.combine(x, handle, topk_weights=weights)[0]
        now = (x, ids, weights, y)
        for a, b in zip(seen or now, now):
            equal(a, b, "the same input again")
        seen = now


def weights_apart(rank, ranks, nodes):
    """Weights that come back as rows of their own, as with GPUs of several nodes."""
    buffer = on_device(deep_ep.Buffer(dist.group.WORLD, ranks_per_node=nodes))
    buffer._seats.returns_weights = set()
    for step, top_k in enumerate((4, 17, 4)):
        tokens = world(ranks, [0 if r == step else 5 + 4 * r for r in range(ranks)], H, 6 * ranks, top_k, salt=step)
        mine = tokens[rank]
        found = buffer.get_dispatch_layout(mine.ids, 6 * ranks)
        x, _, weights, _, handle, _ = buffer.dispatch(
            mine.x, num_tokens_per_rank=found[0], num_tokens_per_rdma_rank=found[1], is_token_in_rank=found[3],
            num_tokens_per_expert=found[2], topk_idx=mine.ids, topk_weights=mine.weights)
        for _ in range(2):
            sums = buffer.combine(x, handle, topk_weights=weights)[1]
            equal(sums, torch.where(mine.ids >= 0, mine.weights, torch.zeros_like(mine.weights)), f"top-{top_k}")
    dist.barrier()


def row_pool(rank, ranks):
    """Blocks that become tensors and come back, on host memory: when the last view ends, and not before."""
    import gc
    import weakref
    from deep_ep import rows
    buffer = deep_ep.Buffer(dist.group.WORLD)
    ep = buffer._comm.ep(num_experts=2, top_k=1, hidden=16, max_tokens=4, pool_bytes=3 * rows.GRAIN)
    rows.LEAST = 1024
    pool = rows.RowPool(ep, 3 * rows.GRAIN)
    must(pool.empty(1, 16, torch.bfloat16, None) is None, "too little to be worth it")
    first = pool.empty(512, 1024, torch.bfloat16, None)
    must(first.shape == (512, 1024) and first.is_contiguous() and int(first.float().abs().sum()) == 0, "a tensor")
    at, view = first.data_ptr(), first[100:200].view(torch.int16)
    second = pool.empty(100, 1024, torch.float32, None)
    must(second.data_ptr() != at and pool.num_lent == 2, "two blocks")
    first[150] = 7
    alive = weakref.ref(first)
    del first
    gc.collect()
    must(alive() is None and pool.num_lent == 2 and int(view[50].sum()) == 1024 * 0x40e0, "a view keeps its block")
    third = pool.empty(512, 2048, torch.bfloat16, None)
    must(third.data_ptr() not in (at, second.data_ptr()), "a third block")
    must(pool.empty(512, 2048, torch.bfloat16, None) is None, "no room for a fourth")
    del view
    again = pool.empty(256, 1024, torch.bfloat16, None)
    must(again.data_ptr() == at and pool.num_lent == 3, "the block is used again")
    holder = threading.Thread(target=lambda tensors: tensors.clear(), args=([second],))
    del second
    holder.start()
    holder.join()
    del holder
    gc.collect()
    must(pool.num_lent == 2, "freed by another thread")
    pool.close()
    del again, third
    must(pool.num_lent == 0, "after its end")
    dist.barrier()


def oddities(rank, ranks):
    """What upstream refuses or forgets: ranks without tokens, ids beyond the experts, uneven experts,
    int32 ids, handles used across types, made-up layouts."""
    buffer = on_device(deep_ep.Buffer(dist.group.WORLD))
    must(buffer.group_size == ranks and buffer.runtime is not None and not buffer.low_latency_mode, "attributes")
    experts, sizes = 3 * ranks - 1, [0 if r == 1 else 5 + r for r in range(ranks)]
    tokens = world(ranks, sizes, H, experts, K, dtype=torch.int32)
    mine = tokens[rank]
    ids = torch.where(mine.ids < 0, torch.full_like(mine.ids, experts + 7), mine.ids)
    found = buffer.get_dispatch_layout(ids, experts)
    arguments = dict(num_tokens_per_rank=found[0], is_token_in_rank=found[3], num_tokens_per_expert=found[2])
    x, got_ids, weights, listed, handle, _ = buffer.dispatch(mine.x, topk_idx=ids, topk_weights=mine.weights,
                                                             **arguments)
    rows = arrivals(tokens, rank, 3)
    check_x(x, expected("random", tokens, rows), "uneven experts")
    must(got_ids.dtype == torch.int32 and len(listed) == 3, "types and list")
    equal(handle[3], torch.tensor([t for _, t in rows], dtype=torch.int32), "recv_src_idx")
    other = buffer.dispatch(payload_of("fp8", mine, rank), handle=handle)[0]
    check_x(other, expected("fp8", tokens, rows), "fp8 with a handle of bf16")
    y = buffer.combine(x, handle)[0]
    in_rank = found[3].sum(1, keepdim=True).double()
    close(y, mine.x.double() * in_rank, mine.x.double().abs() * in_rank, "combine after another type")
    plain = found[3].clone()  # a layout of the caller's own
    arguments["is_token_in_rank"] = plain
    arguments["num_tokens_per_expert"] = torch.nn.functional.pad(found[2], (0, 1))
    x2, _, _, listed2, _, _ = buffer.dispatch(mine.x, **arguments)
    equal(x2, x, "without ids")
    must(listed2 == listed, f"counts without ids: {listed2}, {listed}")
    for bad, word in ((dict(topk_idx=ids), "both"), (dict(num_worst_tokens=5), "num_worst_tokens")):
        try:
            buffer.dispatch(mine.x, **arguments, **bad)
            must(False, word)
        except ValueError as error:
            must(word in str(error), f"{word}: {error}")
    dist.barrier()


def through(buffer, tokens, rank, ranks, experts, kind="random"):
    """A fresh dispatch with every row checked; (rows, handle, arrivals)."""
    mine = tokens[rank]
    found = buffer.get_dispatch_layout(mine.ids, experts)
    x, _, weights, _, handle, _ = buffer.dispatch(
        payload_of(kind, mine, rank), num_tokens_per_rank=found[0], num_tokens_per_rdma_rank=found[1],
        is_token_in_rank=found[3], num_tokens_per_expert=found[2], topk_idx=mine.ids, topk_weights=mine.weights)
    rows = arrivals(tokens, rank, experts // ranks)
    check_x(x, expected(kind, tokens, rows), f"{mine.x.shape[0]} tokens")
    return x, handle, rows


def back(buffer, x, handle, tokens, rank, ranks, experts, what):
    """Its combine, every element."""
    owner = torch.where(tokens[rank].ids >= 0, torch.div(tokens[rank].ids, experts // ranks, rounding_mode="floor"),
                        torch.full_like(tokens[rank].ids, -1))
    num = torch.stack([(owner == r).any(1) for r in range(ranks)], 1).sum(1, keepdim=True).double()
    y = buffer.combine(x, handle)[0]
    close(y, tokens[rank].x.double() * num, tokens[rank].x.double().abs() * num, what, roundings=3)


def growth(rank, ranks, nodes):
    """Batches grow, on one rank first, and nobody says so: room is made on all; older handles live on."""
    deep_ep.seats.LEAST_TOKENS = 16
    buffer = on_device(deep_ep.Buffer(dist.group.WORLD, ranks_per_node=nodes, explicitly_destroy=True))
    experts, kept = 2 * ranks, []
    for step, size in enumerate((3, 16, 17, 40, 5, 100, 129, 0, 300, 64)):
        sizes = [size if r == step % ranks else min(size, 2 + r) for r in range(ranks)]
        tokens = world(ranks, sizes, H, experts, K, salt=step)
        x, handle, rows = through(buffer, tokens, rank, ranks, experts)
        if step % 3 == 1:
            kept.append((tokens, x, handle, rows))
        else:
            back(buffer, x, handle, tokens, rank, ranks, experts, f"step {step}")
    for number, (tokens, x, handle, rows) in enumerate(kept):
        again = buffer.dispatch(tokens[rank].x, handle=handle)[0]
        check_x(again, expected("random", tokens, rows), f"older handle {number}")
        other = buffer.dispatch(payload_of("fp8", tokens[rank], rank), handle=handle)[0]
        check_x(other, expected("fp8", tokens, rows), f"older handle {number}, another type")
        back(buffer, x, handle, tokens, rank, ranks, experts, f"older handle {number}")
    seats = buffer._seats
    must(max(seat.ep.max_tokens for seat in seats._seats.values()) == 512, "the next power of two")
    if DEVICE == "cpu":
        must(len(seats._outgrown) <= len(kept), f"{len(seats._outgrown)} outgrown eps for {len(kept)} handles")
    del kept, handle
    tokens = world(ranks, [600] * ranks, H, experts, K)
    through(buffer, tokens, rank, ranks, experts)
    must(DEVICE != "cpu" or len(seats._outgrown) <= 1, f"{len(seats._outgrown)} outgrown eps and no handle")
    dist.barrier()
    buffer.destroy()


def promised(rank, ranks):
    """max_tokens is a promise: nothing is exchanged, and more is refused with a sentence, before it is sent."""
    buffer = on_device(deep_ep.Buffer(dist.group.WORLD, max_tokens=20))
    tokens = world(ranks, [20] * ranks, H, 2 * ranks, K)
    through(buffer, tokens, rank, ranks, 2 * ranks)
    must(buffer._seats._agreement is None, "no exchange")
    try:
        through(buffer, world(ranks, [21] * ranks, H, 2 * ranks, K), rank, ranks, 2 * ranks)
        must(False, "more than promised")
    except ValueError as error:
        must("21 tokens" in str(error) and "NEP_DEEP_EP_MAX_TOKENS" in str(error), str(error))
    through(buffer, tokens, rank, ranks, 2 * ranks)
    dist.barrier()


def inference(rank, ranks):
    """Engines run in inference mode, whose tensors count no writes; normal and low-latency calls alike."""
    with torch.inference_mode():
        buffer = on_device(deep_ep.Buffer(dist.group.WORLD))
        experts = 2 * ranks
        tokens = world(ranks, [7 + r for r in range(ranks)], H, experts, K)
        x, handle, _ = through(buffer, tokens, rank, ranks, experts)
        buffer.dispatch(payload_of("fp8", tokens[rank], rank), handle=handle)
        back(buffer, x, handle, tokens, rank, ranks, experts, "in inference mode")
        mine = tokens[rank]
        x, _, handle, _, _ = buffer.low_latency_dispatch(mine.x, mine.ids, 16, experts, use_fp8=False)
        y = buffer.low_latency_combine(x, mine.ids, mine.weights, handle)[0]
        total = ((mine.ids >= 0) * mine.weights).sum(1, keepdim=True).double()
        close(y, mine.x.double() * total, mine.x.double().abs() * total, "low latency in inference mode", roundings=4)
    dist.barrier()


class NormalTest(unittest.TestCase):
    def test_matrix_one_node(self):
        run(RANKS, matrix, [RANKS], 4 * RANKS, [33 + 7 * (r % 2) for r in range(RANKS)])

    def test_matrix_two_nodes(self):
        run(4, matrix, [2, 2], 8, [20, 0, 33, 7])

    def test_growth(self):
        run(RANKS, growth, None)

    def test_growth_two_nodes(self):
        run(3, growth, [2, 1])

    def test_weights_apart(self):
        run(3, weights_apart, [2, 1])

    @unittest.skipIf(DEVICE != "cpu", "of host memory")
    def test_row_pool(self):
        run(1, row_pool)

    def test_a_promise(self):
        run(2, promised)

    def test_inference_mode(self):
        run(2, inference)

    def test_three_ranks_oddities(self):
        run(3, oddities)


if __name__ == "__main__":
    unittest.main()
