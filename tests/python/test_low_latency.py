# SPDX-License-Identifier: Apache-2.0
"""The matrix of upstream's low-latency test: every byte, count, range and scale."""
import itertools
import os
import threading
import unittest

import deep_ep
import nearep
import torch
import torch.distributed as dist
from device import DEVICE, on_device
from ranks import RANKS, close, equal, must, run, world

H, K, M = 512, 4, 24
FORMATS = (dict(use_fp8=False), dict(use_fp8=True), dict(use_fp8=True, round_scale=True),
           dict(use_fp8=True, round_scale=True, use_ue8m0=True))


def e4m3_table():
    """The value of each byte, from the format's definition."""
    values = []
    for byte in range(256):
        sign, exponent, fraction = byte >> 7, byte >> 3 & 15, byte & 7
        value = fraction / 8 * 2.0 ** -6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
        values.append(float("nan") if byte & 127 == 127 else -value if sign else value)
    return torch.tensor(values, dtype=torch.float64)


E4M3 = e4m3_table()


def scale_of(x, rounded):
    """[T, H/128] fp64 of [T, H]."""
    amax = x.double().abs().view(x.shape[0], -1, 128).amax(2).clamp(min=1e-4)
    scale = amax / 448
    return torch.exp2(torch.ceil(torch.log2(scale))) if rounded else scale


def pairs_of(tokens, expert):
    """[(source, token)] of an expert's rows, in the order of the output."""
    return [(s, int(t)) for s, given in enumerate(tokens)
            for t in torch.nonzero((given.ids == expert).any(1))[:, 0]]


def check_rows(result, count, tokens, rank, per_rank, how):
    what = str(how)
    data, scales = result if isinstance(result, tuple) else (result, None)
    for local in range(per_rank):
        rows = pairs_of(tokens, rank * per_rank + local)
        must(int(count[local]) == len(rows), f"count of {local}: {int(count[local])}, want {len(rows)}; {what}")
        if not rows:
            continue
        want = torch.stack([tokens[s].x[t] for s, t in rows])
        got = data[local, :len(rows)]
        if scales is None:
            equal(got, want, "rows: " + what)
            continue
        found = scales[local, :len(rows)]
        if how.get("use_ue8m0"):
            must(found.dtype == torch.int32 and found.shape[1] == H // 512, "packed scales")
            bytes_ = torch.tensor(found.tolist(), dtype=torch.int32).view(torch.uint8).view(len(rows), H // 128)
            found = torch.exp2(bytes_.double() - 127)
        want_scale = scale_of(want, bool(how.get("round_scale")))
        off = (found.double() - want_scale).abs() / want_scale
        must(float(off.max()) < (1e-12 if how.get("round_scale") else 3e-7), f"scales off by {float(off.max())}")
        spread = found.double().repeat_interleave(128, 1)
        value = E4M3[got.view(torch.uint8).long()] * spread
        bound = torch.maximum(want.double().abs() * 2.0 ** -4, spread * 2.0 ** -10) * (1 + 1e-6)
        must(bool(((value - want.double()).abs() <= bound).all()), "fp8 rows beyond half a unit: " + what)
    must(scales is None or scales.stride(1) == 1, "tokens are contiguous in the scales")


def check_handle(handle, tokens, rank, ranks, per_rank):
    info, ranges = handle[0], handle[1]
    must(tuple(info.shape) == (per_rank, ranks * M) and tuple(handle[2:4]) == (M, H), "the handle's shapes")
    for local in range(per_rank):
        rows = pairs_of(tokens, rank * per_rank + local)
        must(info[local, :len(rows)].tolist() == [t for _, t in rows], "src_info")
        begin = 0
        for source in range(ranks):
            num = sum(s == source for s, _ in rows)
            must(int(ranges[local, source]) == (begin << 32 | num), "layout_range")
            begin += num


def one(buffer, rank, ranks, tokens, experts, how, mode, zero_copy, with_out, logfmt):
    mine, per_rank = tokens[rank], experts // ranks
    stats = torch.zeros(per_rank, dtype=torch.int32)
    cost = torch.zeros(ranks, dtype=torch.int64)
    flags = dict(return_recv_hook=mode == "hook", async_finish=mode == "async")
    result, count, handle, event, hook = buffer.low_latency_dispatch(
        mine.x, mine.ids, M, experts, cumulative_local_expert_recv_stats=stats,
        dispatch_wait_recv_cost_stats=cost, **how, **flags)
    must((hook is not None) == (mode == "hook"), "a hook exactly where asked for")
    if hook is not None:
        hook()
    elif mode == "async":
        event.current_stream_wait()
    else:
        must(event.event is None, "no event where the call has waited")
    check_rows(result, count, tokens, rank, per_rank, how)
    equal(stats, count, "statistics")
    must(bool((cost >= 0).all()) and int(cost[rank]) == 0, "wait statistics")
    check_handle(handle, tokens, rank, ranks, per_rank)
    y_in = torch.full((per_rank, ranks * M, H), float("nan")).bfloat16()
    for local in range(per_rank):
        for i, (s, t) in enumerate(pairs_of(tokens, rank * per_rank + local)):
            y_in[local, i] = tokens[s].x[t] * (1 + rank * per_rank + local)
    if zero_copy:
        target = buffer.get_next_low_latency_combine_buffer(handle)
        must(tuple(target.shape) == tuple(y_in.shape), "zero-copy buffer")
        target[:, :, :] = y_in
        y_in = torch.full_like(y_in, 3)  # what is combined lies in the buffer
    out = torch.empty(mine.x.shape) if with_out else None
    out = out.bfloat16() if with_out else None
    y, event, hook = buffer.low_latency_combine(y_in, mine.ids, mine.weights, handle, use_logfmt=logfmt,
                                                zero_copy=zero_copy, out=out, **flags)
    if hook is not None:
        hook()
    must(not with_out or y.data_ptr() == out.data_ptr(), "out= is used")
    used = (mine.ids >= 0).double() * mine.weights.double()
    terms = [used[:, k:k + 1] * (mine.x * (1 + mine.ids[:, k:k + 1])).double() for k in range(K)]
    # weights in fp32, one rounding by rank, by node and at home
    close(y, sum(terms), sum(t.abs() for t in terms), f"combine {how} {mode}", roundings=3.01)
    return y


def matrix(rank, ranks, nodes, experts, sizes):
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(M, H, ranks, experts)
    buffer = on_device(deep_ep.Buffer(dist.group.WORLD, 0, hint, low_latency_mode=True, enable_shrink=True,
                                      num_qps_per_rank=experts // ranks, ranks_per_node=nodes))
    buffer.clean_low_latency_buffer(M, H, experts)
    number = 0
    for how, mode, zero_copy in itertools.product(FORMATS, ("sync", "async", "hook"), (False, True)):
        number += 1
        tokens = world(ranks, sizes, H, experts, K, salt=number)
        one(buffer, rank, ranks, tokens, experts, how, mode, zero_copy, number % 2 == 0,
            number % 3 == 0 and not zero_copy)
    pressure(buffer, rank, ranks, experts, sizes)
    masks(buffer, rank, ranks, experts, sizes)
    dist.barrier()


def pressure(buffer, rank, ranks, experts, sizes):
    tokens = world(ranks, sizes, H, experts, K, salt=77)
    seen = None
    for _ in range(10):
        y = one(buffer, rank, ranks, tokens, experts, FORMATS[1], "hook", False, False, False)
        equal(y, seen if seen is not None else y, "the same input again")
        seen = y


def overlap(rank, ranks):
    """Two results alive, hooks in any order, and normal calls in between on the same buffer."""
    experts, sizes = 2 * ranks, [M - r for r in range(ranks)]
    buffer = on_device(deep_ep.Buffer(dist.group.WORLD, 0, 1 << 20, low_latency_mode=True))
    a, b = (world(ranks, sizes, H, experts, K, salt=salt) for salt in (1, 2))
    for turn in range(4):
        first = buffer.low_latency_dispatch(a[rank].x, a[rank].ids, M, experts, return_recv_hook=True)
        second = buffer.low_latency_dispatch(b[rank].x, b[rank].ids, M, experts, return_recv_hook=True)
        for found in ((first, second), (second, first))[turn % 2]:
            found[4]()
        check_rows(first[0], first[1], a, rank, 2, FORMATS[1])
        check_rows(second[0], second[1], b, rank, 2, FORMATS[1])
        found = buffer.get_dispatch_layout(a[rank].ids, experts)
        x, _, _, _, handle, _ = buffer.dispatch(
            a[rank].x, num_tokens_per_rank=found[0], is_token_in_rank=found[3], num_tokens_per_expert=found[2],
            topk_idx=a[rank].ids, topk_weights=a[rank].weights)
        buffer.combine(x, handle)
        one(buffer, rank, ranks, a, experts, FORMATS[0], "hook", False, False, False)
    for bad, word in ((dict(async_finish=True, return_recv_hook=True), "exclude"),
                      (dict(use_ue8m0=True), "round_scale"),
                      (dict(use_nfvp4=True), "use_nfvp4")):
        try:
            buffer.low_latency_dispatch(a[rank].x, a[rank].ids, M, experts, **bad)
            must(False, word)
        except (ValueError, TypeError, NotImplementedError) as error:
            must(word in str(error), str(error))
    dist.barrier()


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def nvfp4(rank, ranks, nodes):
    """Rows quantised on the way, as vLLM asks for them: each scale is the nearest that there is, each number within
    half a step of it; scales where CuTe's blocked order has them; and combine of whole rows."""
    experts, per_rank = 3 * ranks, 3
    buffer = on_device(deep_ep.Buffer(dist.group.WORLD, 0, 1 << 20, ranks_per_node=nodes))
    tokens = world(ranks, [M - r for r in range(ranks)], H, experts, K, salt=9)
    for given in tokens:
        given.x[:, :16] *= 1e-3
        given.x[:, 16:32] = 0
    mine, factor = tokens[rank], 448 * 6 / 5.0
    for step, scale in enumerate((torch.tensor([factor]), torch.full((mine.x.shape[0],), factor))):
        (data, scales), count, handle, event, hook = buffer.low_latency_dispatch(
            mine.x, mine.ids, M, experts, use_nvfp4=True, x_global_scale=scale, return_recv_hook=step == 0)
        if step == 0:
            hook()
        tiles = -(-ranks * M // 128)
        must(tuple(data.shape) == (ranks * M, H // 2, per_rank) and
             tuple(scales.shape) == (32, 4, tiles, 4, H // 64, per_rank), "shapes of nvfp4")
        bits = scales.contiguous().view(torch.uint8)
        for local in range(per_rank):
            rows = pairs_of(tokens, rank * per_rank + local)
            must(int(count[local]) == len(rows), "count")
            for n, (s, t) in enumerate(rows):
                want = tokens[s].x[t].double() * factor
                used = torch.stack([bits[n % 32, n // 32 % 4, n // 128, c % 4, c // 4, local] for c in range(H // 16)])
                stored = E4M3[used.long()]
                ideal = want.view(-1, 16).abs().amax(1) / 6
                best = (E4M3[:127][None, :] - ideal[:, None]).abs().amin(1)
                must(bool(((stored - ideal).abs() <= best + ideal * 1e-6).all()), "scales are the nearest")
                both = data[n, :, local].long()
                code = torch.stack([both & 15, both >> 4], 1).view(-1)
                value = E2M1[code & 7] * torch.where(code > 7, -1.0, 1.0).double()
                unit = stored.repeat_interleave(16)
                step_up = torch.where(value.abs() >= 4, 1.0, torch.where(value.abs() >= 2, 0.5, 0.25)).double()
                must(bool(((value * unit - want).abs() <= (step_up * unit + unit * 0.4 * (value.abs() == 6)) * 1.001
                           + 1e-9).all()), "numbers are the nearest")
        y_in = torch.ones(per_rank, ranks * M, H).bfloat16()
        y = buffer.low_latency_combine(y_in, mine.ids, mine.weights, handle)[0]
        total = ((mine.ids >= 0) * mine.weights).sum(1, keepdim=True).double().expand(-1, H)
        close(y, total, total, "combine after nvfp4", roundings=4)
    try:
        buffer.low_latency_dispatch(mine.x, mine.ids, M, experts, use_nvfp4=True)
        must(False, "without x_global_scale")
    except ValueError as error:
        must("x_global_scale" in str(error), str(error))
    dist.barrier()


def while_written(rank, ranks, nodes):
    """SGLang's single-batch overlap: combine is called before the experts have written, and waits for their flags;
    blocks that no rows are for are never raised."""
    experts, per_rank, block = 2 * ranks, 2, 8
    buffer = on_device(deep_ep.Buffer(dist.group.WORLD, 0, 1 << 20, ranks_per_node=nodes))
    for step in range(4):
        mine = world(ranks, [max(M - 5 * r, 0) for r in range(ranks)], H, experts, K, salt=step)[rank]
        x, count, handle, _, _ = buffer.low_latency_dispatch(mine.x, mine.ids, M, experts, use_fp8=False)
        blocks = -(-ranks * M // block)
        flags = torch.zeros(per_rank * (1 if step % 2 else blocks), dtype=torch.int32)
        given = dict(src_signals=flags, src_signal_expect_value=1) if step % 2 else \
            dict(packed_recv_count=count, comp_signal=flags, block_m=block, threshold=3, num_sms=3)
        y_in, late = torch.full_like(x, float("nan")), x.clone()

        def write():
            for local in range(per_rank):
                if step % 2:
                    y_in[local, :int(count[local])] = late[local, :int(count[local])]
                    flags[local] = int(count[local] > 0)
                    continue
                for begin in range(0, int(count[local]), block):
                    y_in[local, begin:begin + block] = late[local, begin:begin + block]
                    flags[local * blocks + begin // block] += 3
        writer = threading.Thread(target=write)
        if DEVICE == "cpu":
            writer.start()
        else:
            write()
        y = buffer.low_latency_combine(y_in, mine.ids, mine.weights, handle, overlap=True, **given)[0]
        total = ((mine.ids >= 0) * mine.weights).sum(1, keepdim=True).double()
        close(y, mine.x.double() * total, mine.x.double().abs() * total, "while it is written", roundings=4)
        if DEVICE == "cpu":
            writer.join()
    for bad in (dict(), dict(src_signals=flags), dict(src_signals=flags[:1].double(), src_signal_expect_value=1)):
        try:
            buffer.low_latency_combine(y_in, mine.ids, mine.weights, handle, overlap=True, **bad)
            must(False, str(bad))
        except ValueError as error:
            must("signal" in str(error), str(error))
    dist.barrier()


def masks(buffer, rank, ranks, experts, sizes):
    status = torch.full((ranks,), 7, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    must(status.tolist() == [0] * ranks, "nobody is masked at first")
    buffer.low_latency_update_mask_buffer(ranks - 1, True)
    buffer.low_latency_query_mask_buffer(status)
    must(status.tolist() == [0] * (ranks - 1) + [1], "the last rank is masked")
    tokens = world(ranks, sizes, H, experts, K, salt=55)
    for given in tokens:
        given.ids[given.ids >= experts // ranks * (ranks - 1)] = -1
    whole = world(ranks, sizes, H, experts, K, salt=55)[rank]
    result, count, handle, _, _ = buffer.low_latency_dispatch(whole.x, whole.ids, M, experts, use_fp8=False)
    check_rows(result, count, tokens, rank, experts // ranks, FORMATS[0])
    y = buffer.low_latency_combine(result, whole.ids, whole.weights, handle)[0]
    used = (tokens[rank].ids >= 0) * whole.weights
    close(y, used.sum(1, keepdim=True).double() * whole.x.double(),
          used.sum(1, keepdim=True).double() * whole.x.double().abs(), "combine with a mask", roundings=3.01)
    buffer.low_latency_clean_mask_buffer()


def weights(rank, ranks, nodes):
    """Weights given to dispatch, ids that combine leaves out, masks set in between, no tokens at all."""
    experts, per_rank = 2 * ranks, 2
    buffer = on_device(deep_ep.Buffer(dist.group.WORLD, 0, 1 << 20, ranks_per_node=nodes, enable_shrink=True))
    for step in range(3):
        tokens = world(ranks, [0 if r == step else 5 + r for r in range(ranks)], H, experts, K, salt=step)
        mine = tokens[rank]
        x, _, handle, _, _ = buffer.low_latency_dispatch(mine.x, mine.ids, M, experts, use_fp8=False,
                                                         topk_weights=mine.weights)
        if DEVICE == "cpu":
            try:
                buffer.low_latency_combine(x, mine.ids, mine.weights + 1, handle)
                must(mine.x.shape[0] == 0, "other weights than dispatch was given")
            except ValueError as error:
                must("same tensor" in str(error), str(error))
        if mine.x.shape[0] or DEVICE != "cpu":
            y = buffer.low_latency_combine(x, mine.ids, mine.weights, handle)[0]
            total = ((mine.ids >= 0) * mine.weights).sum(1, keepdim=True).double()
            close(y, mine.x.double() * total, mine.x.double().abs() * total, "weights with dispatch", roundings=4)
        x, _, handle, _, _ = buffer.low_latency_dispatch(mine.x, mine.ids, M, experts, use_fp8=False)
        fewer = mine.ids.clone()
        fewer[:, 0] = -1
        for local in range(per_rank):  # what is left out may hold anything
            expert = rank * per_rank + local
            for row, (s, t) in enumerate(pairs_of(tokens, expert)):
                if int(tokens[s].ids[t, 0]) == expert or (step == 2 and rank == ranks - 1):
                    x[local, row] = float("nan")
        buffer.low_latency_update_mask_buffer(ranks - 1, step == 2)
        y = buffer.low_latency_combine(x, fewer, mine.weights, handle)[0]
        buffer.low_latency_update_mask_buffer(ranks - 1, False)
        used = (fewer >= 0) & ((fewer < per_rank * (ranks - 1)) if step == 2 else True)
        total = (used * mine.weights).sum(1, keepdim=True).double()
        close(y, mine.x.double() * total, mine.x.double().abs() * total, f"ids left out, step {step}", roundings=4)
    dist.barrier()


def shrink(rank, ranks, when):
    """A rank ends before a dispatch, or before its combine; the others are told, mask it and go on."""
    os.environ["NEP_TIMEOUT"] = "3s"
    experts = 2 * ranks
    buffer = on_device(deep_ep.Buffer(dist.group.WORLD, 0, 1 << 20, low_latency_mode=True, enable_shrink=True))
    tokens = world(ranks, [5] * ranks, H, experts, K)
    one(buffer, rank, ranks, tokens, experts, FORMATS[0], "hook", False, False, False)
    dist.barrier()
    mine = tokens[rank]
    if rank == 1:
        if when == "combine":
            buffer.low_latency_dispatch(mine.x, mine.ids, M, experts, use_fp8=False)
        return "ended"
    try:
        for _ in range(2):  # the loss may show in this step's second half, or in the next step
            found = buffer.low_latency_dispatch(mine.x, mine.ids, M, experts, use_fp8=False, return_recv_hook=True)
            found[4]()
            buffer.low_latency_combine(found[0], mine.ids, mine.weights, found[2])
        must(False, "nobody noticed that rank 1 has ended")
    except (nearep.DeadlineError, nearep.PeerLostError) as error:
        must("[1] are masked" in str(error), str(error))
    status = torch.empty(ranks, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    must(status.tolist() == [int(r == 1) for r in range(ranks)], f"masks {status.tolist()}")
    for _ in range(3):
        x, count, handle, _, hook = buffer.low_latency_dispatch(mine.x, mine.ids, M, experts, use_fp8=False,
                                                                return_recv_hook=True)
        hook()
        y = buffer.low_latency_combine(x, mine.ids, mine.weights, handle)[0]
        is_used = (mine.ids >= 0) & (torch.div(mine.ids, 2, rounding_mode="floor") != 1)
        want = mine.x.double() * (is_used * mine.weights).sum(1, keepdim=True).double()
        close(y, want, want.abs(), "after the loss", roundings=4)
    return "alive"


class LowLatencyTest(unittest.TestCase):
    def test_matrix_one_node(self):
        run(RANKS, matrix, [RANKS], 3 * RANKS, [M if r % 2 == 0 else 11 for r in range(RANKS)])

    def test_matrix_two_nodes(self):
        run(4, matrix, [2, 2], 8, [M, 0, 3, 17])

    @unittest.skipIf(DEVICE != "cpu", "ranks that end are tested on host memory")
    def test_a_lost_rank_is_masked(self):
        for when in ("dispatch", "combine"):
            self.assertEqual(run(3, shrink, when, is_together=False), ["alive", "ended", "alive"])

    def test_weights(self):
        run(3, weights, [3])

    def test_weights_two_nodes(self):
        run(4, weights, [2, 2])

    def test_while_written(self):
        run(RANKS, while_written, [RANKS])

    def test_while_written_two_nodes(self):
        run(3, while_written, [2, 1])

    def test_nvfp4(self):
        run(RANKS, nvfp4, [RANKS])

    def test_nvfp4_two_nodes(self):
        run(4, nvfp4, [2, 2])

    def test_overlap(self):
        run(max(RANKS, 3), overlap)


if __name__ == "__main__":
    unittest.main()
