# SPDX-License-Identifier: Apache-2.0
"""What frameworks do with deep_ep, call by call, with their keyword arguments (docs/deep_ep.md names the
files), each checked against plain torch."""
import threading
import unittest

import deep_ep
import torch
import torch.distributed as dist
from deep_ep.utils import EventHandle, EventOverlap
from ranks import PLACE, close, must, on_the_device, run, world

H, K, M = 256, 4, 16
on_the_device()


def combined(tokens, factor):
    """(terms, absolute sum) of sum over k of weight * factor(expert) * x, fp64."""
    used = (tokens.ids >= 0).double() * tokens.weights.double()
    terms = [used[:, k:k + 1] * tokens.x.double() * factor(tokens.ids[:, k:k + 1].double())
             for k in range(tokens.ids.shape[1])]
    return sum(terms), sum(term.abs() for term in terms)


def experts_by_token(x, ids, weights, first):
    """What a rank's experts make of rows in normal mode: the weighted sum over its experts, bf16."""
    found = torch.zeros(x.shape[0], H, dtype=torch.float64)
    for k in range(ids.shape[1]):
        is_here = (ids[:, k:k + 1] >= 0).double()
        found += is_here * weights[:, k:k + 1].double() * (1 + ids[:, k:k + 1].double() + first) * x.double()
    return found.bfloat16()


# ---- vLLM ------------------------------------------------------------------------------------------


class VllmHighThroughput:
    """all2all.py's manager and prepare_finalize/deepep_ht.py."""

    def __init__(self, group, ranks):
        deep_ep.Buffer.set_num_sms(20)
        self.buffer = deep_ep.Buffer(group=group, num_nvl_bytes=1 << 20, num_rdma_bytes=0, low_latency_mode=False,
                                     num_qps_per_rank=1, explicitly_destroy=True)
        self.handles = [None, None]
        self.ranks = ranks

    def prepare(self, tokens, experts, ubatch=0):
        buffer = self.buffer
        previous = buffer.capture()
        per_rank, per_rdma_rank, per_expert, in_rank, event = buffer.get_dispatch_layout(
            topk_idx=tokens.ids, num_experts=experts, previous_event=previous, async_finish=False,
            allocate_on_comm_stream=False)
        found = buffer.dispatch(
            x=tokens.x, handle=None, num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, topk_idx=tokens.ids,
            topk_weights=tokens.weights, expert_alignment=1, config=buffer.get_dispatch_config(self.ranks),
            previous_event=previous, async_finish=True, allocate_on_comm_stream=False)
        x, ids, weights, listed, handle, event = found
        self.handles[ubatch] = handle
        if event.event is not None:
            event.current_stream_wait()
        return x, ids, weights, listed

    def finalize(self, output, ubatch=0):
        y, _, event = self.buffer.combine(
            x=output, handle=self.handles[ubatch], topk_weights=None,
            config=self.buffer.get_combine_config(self.ranks), previous_event=self.buffer.capture(),
            async_finish=True, allocate_on_comm_stream=False)
        if event.event is not None:
            event.current_stream_wait()
        return y


def vllm_high_throughput(rank, ranks):
    experts = 3 * ranks
    manager = VllmHighThroughput(dist.group.WORLD, ranks)
    batches = [world(ranks, [M - r for r in range(ranks)], H, experts, K, salt=s) for s in range(2)]
    turn = threading.Condition()
    state = {"next": 0}
    failures = []

    def my_turn(number):
        with turn:
            turn.wait_for(lambda: state["next"] == number or failures)

    def done(number):
        with turn:
            state["next"] = number + 1
            turn.notify_all()

    def work(ubatch):
        """Dual-batch overlap: two threads share the buffer, each with its own handle alive."""
        if PLACE[0] != "cpu":
            torch.set_default_device(PLACE[0])
        try:
            tokens = batches[ubatch][rank]
            my_turn(ubatch)
            x, ids, weights, listed = manager.prepare(tokens, experts, ubatch)
            done(ubatch)
            must(sum(listed) == int((ids >= 0).sum()), "counts")
            output = experts_by_token(x, ids, weights, rank * 3)
            my_turn(2 + ubatch)
            y = manager.finalize(output, ubatch)
            done(2 + ubatch)
            want, scale = combined(tokens, lambda e: 1 + e)
            close(y, want, scale, f"vLLM batch {ubatch}", roundings=3)
        except BaseException as error:
            failures.append(error)
            with turn:
                turn.notify_all()
    threads = [threading.Thread(target=work, args=(ubatch,)) for ubatch in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    dist.barrier()
    manager.buffer.destroy()


def vllm_low_latency(rank, ranks):
    experts = 2 * ranks
    size = deep_ep.Buffer.get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank=M, hidden=H, num_ranks=ranks, num_experts=experts)
    buffer = deep_ep.Buffer(group=dist.group.WORLD, num_nvl_bytes=1 << 20, num_rdma_bytes=size, low_latency_mode=True,
                            num_qps_per_rank=experts // ranks, allow_nvlink_for_low_latency_mode=True,
                            allow_mnnvl=False, explicitly_destroy=True, enable_shrink=True)
    status = torch.ones(ranks, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    must(int(status.sum()) == 0, "nobody is masked")
    buffer.low_latency_clean_mask_buffer()
    buffer.get_local_buffer_tensor(dtype=torch.int8, use_rdma_buffer=True).zero_()
    for step in range(4):
        tokens = world(ranks, [M] * ranks, H, experts, K, salt=step)[rank]
        x, count, handle, _, hook = buffer.low_latency_dispatch(
            tokens.x, tokens.ids, M, experts, use_fp8=False, round_scale=False, use_ue8m0=False,
            async_finish=False, return_recv_hook=True)
        hook()
        factor = torch.arange(1 + 2 * rank, 3 + 2 * rank)[:, None, None]
        output = torch.empty_like(tokens.x)
        _, _, hook = buffer.low_latency_combine(
            x * factor, tokens.ids, tokens.weights, handle, async_finish=False, zero_copy=False,
            return_recv_hook=True, out=output)
        hook()
        want, scale = combined(tokens, lambda e: 1 + e)
        close(output, want, scale, "vLLM low latency", roundings=4)
    dist.barrier()
    buffer.destroy()


# ---- SGLang ----------------------------------------------------------------------------------------


def sglang(rank, ranks):
    """token_dispatcher/deepep.py: one buffer for both modes, cleaned when it goes from one to the other."""
    experts = 2 * ranks
    config = deep_ep.Config(**{"num_sms": 20, "num_max_nvl_chunked_send_tokens": 6,
                               "num_max_nvl_chunked_recv_tokens": 256, "num_max_rdma_chunked_send_tokens": 6,
                               "num_max_rdma_chunked_recv_tokens": 128})
    nvl = max(config.get_nvl_buffer_size_hint(H * 2, ranks), 0)
    rdma = max(config.get_rdma_buffer_size_hint(H * 2, ranks),
               deep_ep.Buffer.get_low_latency_rdma_size_hint(M, H, ranks, experts))
    buffer = deep_ep.Buffer(dist.group.WORLD, nvl, rdma, low_latency_mode=True, num_qps_per_rank=2, allow_mnnvl=True)
    must(buffer.group_size == ranks and buffer.low_latency_mode, "attributes")
    tokens = world(ranks, [40 + 3 * r for r in range(ranks)], H, experts, K, salt=3)
    mine = tokens[rank]
    for turn in range(2):
        previous = deep_ep.Buffer.capture()
        layout = buffer.get_dispatch_layout(mine.ids, experts, previous_event=previous, async_finish=True,
                                            allocate_on_comm_stream=True)
        per_rank, per_rdma, per_expert, in_rank, previous = layout
        x, ids, weights, listed, handle, event = buffer.dispatch(
            mine.x, topk_idx=mine.ids, topk_weights=mine.weights, num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert,
            previous_event=previous, async_finish=True, allocate_on_comm_stream=True, expert_alignment=128,
            config=config)
        event.current_stream_wait()
        must(all(num % 128 == 0 for num in listed), "alignment of 128")
        y, _, event = buffer.combine(experts_by_token(x, ids, weights, 2 * rank), handle, async_finish=True,
                                     previous_event=deep_ep.Buffer.capture(), allocate_on_comm_stream=True,
                                     config=config)
        event.current_stream_wait()
        close(y, *combined(mine, lambda e: 1 + e), "SGLang normal", roundings=3)
        buffer.clean_low_latency_buffer(M, H, experts)
        small = world(ranks, [M] * ranks, H, experts, K, salt=4 + turn)[rank]
        result, count, handle, event, hook = buffer.low_latency_dispatch(
            small.x, small.ids, M, experts, use_fp8=True, round_scale=False, use_ue8m0=False,
            async_finish=turn == 1, return_recv_hook=turn == 0)
        hook() if turn == 0 else event.current_stream_wait()
        data, scales = result
        must(data.shape == (2, ranks * M, H) and scales.shape == (2, ranks * M, H // 128), "shapes of fp8")
        rows = torch.ones(2, ranks * M, H).bfloat16()
        y, event, hook = buffer.low_latency_combine(x=rows, topk_idx=small.ids, topk_weights=small.weights,
                                                    handle=handle, async_finish=turn == 1,
                                                    return_recv_hook=turn == 0)
        hook() if turn == 0 else event.current_stream_wait()
        used = ((small.ids >= 0) * small.weights).sum(1, keepdim=True).double().expand(-1, H)
        close(y, used, used, "SGLang low latency", roundings=4)
    dist.barrier()


# ---- V2: vLLM and SGLang ----------------------------------------------------------------------------


def expert_of_rows(x, ids, weights, first):
    """[rows, H] of rows with local ids [rows, K'] (-1 = none, whatever the row holds then)."""
    found = torch.zeros(x.shape[0], H, dtype=torch.float64)
    for k in range(ids.shape[1]):
        is_here = ids[:, k:k + 1] >= 0
        term = weights[:, k:k + 1].double() * (1 + ids[:, k:k + 1].double() + first) * x.double()
        found += torch.where(is_here, term, torch.zeros((), dtype=torch.float64))
    return found.bfloat16()


def vllm_v2(rank, ranks):
    """prepare_finalize/deepep_v2.py: prefill expands and waits, decode does neither and reads the sums."""
    experts = 2 * ranks
    with torch.inference_mode():
        buffer = deep_ep.ElasticBuffer(
            group=dist.group.WORLD, num_max_tokens_per_rank=64, hidden=H, num_topk=K, use_fp8_dispatch=False,
            allow_hybrid_mode=True, prefer_overlap_with_compute=True, allow_multiple_reduction=True,
            num_cpu_timeout_secs=1800, num_gpu_timeout_secs=1800, explicitly_destroy=True)
        buffer.get_theoretical_num_sms(num_experts=experts, num_topk=K)
        for step, decodes in enumerate((False, True, False, True)):
            mine = world(ranks, [(7 + 5 * r) * (step < 3 or r > 0) for r in range(ranks)], H, experts, K,
                         salt=step)[rank]
            x, ids, weights, handle, event = buffer.dispatch(
                x=mine.x, topk_idx=mine.ids, topk_weights=mine.weights, num_experts=experts,
                num_max_tokens_per_rank=16 if decodes else None, do_expand=not decodes, do_cpu_sync=not decodes,
                async_with_compute_stream=False)
            must(event.event is None, "synchronous")
            listed = handle.num_recv_tokens_per_expert_list
            if decodes:
                must(not listed and x.shape[0] == 16 * ranks, "rows for the largest batch that was said")
                num = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
                ids = torch.where(torch.arange(x.shape[0])[:, None] < num, ids, torch.full_like(ids, -1))
            else:
                must(ids is None and sum(listed) == x.shape[0] == weights.shape[0], "expanded rows")
                ids = torch.repeat_interleave(torch.arange(2), torch.tensor(listed))[:, None]
                weights = weights[:, None]
            y, _, event = buffer.combine(x=expert_of_rows(x, ids, weights, 2 * rank), handle=handle, topk_weights=None,
                                         async_with_compute_stream=True, allocate_on_comm_stream=True)
            event.current_stream_wait()
            close(y, *combined(mine, lambda e: 1 + e), f"vLLM V2, step {step}", roundings=4)
        dist.barrier()
        buffer.destroy()


def sglang_v2(rank, ranks, kind):
    """token_dispatcher/deepep_v2.py and deepep_v2_5.py: expanded with alignment, without a wait, and by token with
    one; its prefetcher of redundant experts."""
    experts = 2 * ranks
    buffer = getattr(deep_ep, kind)(
        dist.group.WORLD, num_max_tokens_per_rank=32, hidden=H, num_topk=K, use_fp8_dispatch=False,
        allow_hybrid_mode=True, sl_idx=0, prefer_overlap_with_compute=False)
    must(buffer.num_bytes > 0, "num_bytes")
    for step, (expands, waits) in enumerate(((True, False), (True, True), (False, True))):
        mine = world(ranks, [1 + 9 * r for r in range(ranks)], H, experts, K, salt=step)[rank]
        x, ids, weights, handle, event = buffer.dispatch(
            mine.x, topk_idx=mine.ids, topk_weights=mine.weights, num_experts=experts, num_max_tokens_per_rank=32,
            expert_alignment=128, num_sms=0, use_tma_aligned_col_major_sf=False, do_cpu_sync=waits, do_expand=expands)
        must(event.event is None, "synchronous")
        if expands:
            ends = handle.psum_num_recv_tokens_per_expert.tolist()
            used = handle.num_unaligned_recv_tokens_per_expert.tolist()
            begins = [-(-end // 128) * 128 for end in [0] + ends]
            must(weights.shape == (x.shape[0],) and x.shape[0] >= begins[-1], "room for aligned slots")
            ids = torch.full((x.shape[0], 1), -1)
            for local, (begin, end, num) in enumerate(zip(begins, ends, used)):
                must(end - begin == num, "slots as they end")
                ids[begin:end] = local
            weights = weights[:, None]
        y = buffer.combine(expert_of_rows(x, ids, weights, 2 * rank), handle)[0]
        close(y, *combined(mine, lambda e: 1 + e), f"SGLang V2, step {step}", roundings=4)
    dist.barrier()


def sglang_prefetch(rank, ranks):
    """deepep_v2_5.py: replicas planned before the buffer, filled for each layer by a mapping on the device."""
    from deep_ep import BufferAllocator, get_num_tma_alignment
    from deep_ep.utils.envs import get_physical_domain_size
    must(get_physical_domain_size(dist.group.WORLD) == (1, ranks), "one domain")
    masters, slots, pitch = 2, 3, 3 * get_num_tma_alignment()
    plan = BufferAllocator()
    replicas = tuple(plan.allocate((slots, size), torch.uint8) for size in (pitch, 4 * pitch))
    if PLACE[0] == "cpu":
        replicas = tuple(part.cpu() for part in replicas)
    buffer = deep_ep.EPBuffer(
        dist.group.WORLD, num_max_tokens_per_rank=32, hidden=H, num_topk=K, use_fp8_dispatch=False,
        allow_hybrid_mode=False, sl_idx=0, prefer_overlap_with_compute=False, lb_allocation_plan_or_num_bytes=plan)
    for layer in range(3):
        experts = [(torch.arange(ranks * masters)[:, None] * 16 + layer).expand(-1, part.shape[1]).to(torch.uint8)
                   for part in replicas]
        mapping = ((torch.arange(ranks * slots).view(ranks, slots) * 5 + layer) % (ranks * masters)).int()
        mapping[layer % ranks, 1] = -1
        event = buffer.lb_prefetch_weights(
            replicas, tuple(part[rank * masters:(rank + 1) * masters].contiguous() for part in experts), mapping,
            previous_event=None)
        event.current_stream_wait()
        for got, part in zip(replicas, experts):
            for slot, expert in enumerate(mapping[rank].tolist()):
                must(expert < 0 or bool((got[slot] == part[expert]).all()), f"replica {slot}")
    dist.barrier()


# ---- Megatron --------------------------------------------------------------------------------------


class FusedDispatch(torch.autograd.Function):
    """core/transformer/moe/fused_a2a.py."""

    @staticmethod
    def forward(ctx, x, ids, probs, experts, buffer):
        previous = EventOverlap(EventHandle())
        layout = buffer.get_dispatch_layout(ids, experts, previous_event=previous, async_finish=True,
                                            allocate_on_comm_stream=True)
        per_rank, per_rdma, per_expert, in_rank, event = layout
        x, recv_ids, recv_probs, listed, handle, event = buffer.dispatch(
            x, topk_idx=ids, topk_weights=probs.float(), num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert,
            previous_event=event, async_finish=True, allocate_on_comm_stream=True)
        event.current_stream_wait()
        ctx.buffer, ctx.handle = buffer, handle
        return x, recv_ids, recv_probs, torch.tensor(listed), handle

    @staticmethod
    def backward(ctx, grad_x, _ids, grad_probs, _listed, _handle):
        x, probs, event = ctx.buffer.combine(
            grad_x.contiguous(), ctx.handle, topk_weights=grad_probs.float(),
            previous_event=EventOverlap(EventHandle()), async_finish=True, allocate_on_comm_stream=True)
        event.current_stream_wait()
        return x, None, probs, None, None


class FusedCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, buffer, handle):
        y, _, event = buffer.combine(x, handle=handle, async_finish=True, allocate_on_comm_stream=True,
                                     previous_event=EventOverlap(EventHandle()))
        event.current_stream_wait()
        ctx.buffer, ctx.handle = buffer, handle
        return y

    @staticmethod
    def backward(ctx, grad):
        x, _, _, _, _, event = ctx.buffer.dispatch(
            grad.contiguous(), handle=ctx.handle, previous_event=EventOverlap(EventHandle()), async_finish=True,
            allocate_on_comm_stream=True)
        event.current_stream_wait()
        return x, None, None


def megatron(rank, ranks):
    """Three layers, each with its own handle until the backward pass; gradients against plain torch."""
    experts, layers = 2 * ranks, 3
    nvl = max(c.get_nvl_buffer_size_hint(H * 2, ranks) for c in
              (deep_ep.Buffer.get_dispatch_config(ranks), deep_ep.Buffer.get_combine_config(ranks)))
    rdma = max(c.get_rdma_buffer_size_hint(H * 2, ranks) for c in
               (deep_ep.Buffer.get_dispatch_config(ranks), deep_ep.Buffer.get_combine_config(ranks)))
    must(rdma == 0, "no RDMA up to 8 ranks")
    buffer = deep_ep.Buffer(dist.group.WORLD, nvl, rdma)
    mine = [world(ranks, [12 + r for r in range(ranks)], H, experts, K, salt=layer)[rank] for layer in range(layers)]
    x = mine[0].x.float().requires_grad_(True)
    probs = [tokens.weights.clone().requires_grad_(True) for tokens in mine]
    hidden, reference = x, x.detach().clone().requires_grad_(True)
    probs_reference = [p.detach().clone().requires_grad_(True) for p in probs]
    h = hidden
    for layer in range(layers):
        rows, ids, got, _, handle = FusedDispatch.apply(h, mine[layer].ids, probs[layer], experts, buffer)
        weight = (got * (ids >= 0) * (1 + ids + 2 * rank)).sum(1, keepdim=True)
        h = h + FusedCombine.apply(torch.tanh(rows) * weight, buffer, handle)
    h.square().sum().backward()
    r = reference
    for layer in range(layers):
        ids = mine[layer].ids
        weight = (probs_reference[layer] * (ids >= 0) * (1 + ids)).sum(1, keepdim=True)
        r = r + torch.tanh(r) * weight
    r.square().sum().backward()
    pairs = [(h, r), (x.grad, reference.grad)] + [(p.grad, q.grad) for p, q in zip(probs, probs_reference)]
    for number, (got, want) in enumerate(pairs):
        off = float((got - want).abs().max() / want.abs().max())
        must(off < 2e-5, f"Megatron, tensor {number}: {off}")
    dist.barrier()


# ---- TensorRT-LLM ----------------------------------------------------------------------------------


class MpiLike:
    """The part of an mpi4py communicator that is used."""

    def __init__(self, rank, ranks):
        self._rank, self._ranks = rank, ranks

    def Get_rank(self):
        return self._rank

    def Get_size(self):
        return self._ranks

    def allgather(self, value):
        parts = [None] * self._ranks
        dist.all_gather_object(parts, value)
        return parts


def tensorrt_llm(rank, ranks):
    """fused_moe/deep_ep_utils.py: fully synchronous, from MPI."""
    experts, comm = 2 * ranks, MpiLike(rank, ranks)
    buffer = deep_ep.Buffer(None, 1 << 20, 0, num_nvl_peers=ranks, comm=comm)
    mine = world(ranks, [9] * ranks, H, experts, K, dtype=torch.int32)[rank]
    per_rank, per_rdma, per_expert, in_rank, event = buffer.get_dispatch_layout(mine.ids, experts)
    must(event.event is None, "synchronous layout")
    x, ids, weights, listed, handle, event = buffer.dispatch(
        mine.x, topk_idx=mine.ids, topk_weights=mine.weights, num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_rdma, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert)
    must(event.event is None and ids.dtype == torch.int32, "synchronous dispatch")
    y, _, event = buffer.combine(experts_by_token(x, ids, weights, 2 * rank), handle)
    must(event.event is None, "synchronous combine")
    close(y, *combined(mine, lambda e: 1 + e), "TensorRT-LLM", roundings=3)
    size = deep_ep.Buffer.get_low_latency_rdma_size_hint(M, H, ranks, experts)
    buffer = deep_ep.Buffer(None, 0, size, low_latency_mode=True, num_qps_per_rank=2, comm=comm)
    x, count, handle, event, hook = buffer.low_latency_dispatch(mine.x, mine.ids, M, experts, use_fp8=False)
    must(event.event is None and hook is None, "synchronous low-latency dispatch")
    y, event, hook = buffer.low_latency_combine(x, mine.ids, mine.weights, handle)
    must(event.event is None and hook is None, "synchronous low-latency combine")
    close(y, *combined(mine, lambda e: 1), "TensorRT-LLM low latency", roundings=4)
    tensorrt_llm_fork(buffer, mine, rank, ranks, experts)
    dist.barrier()


def tensorrt_llm_fork(buffer, mine, rank, ranks, experts):
    """Rows that were quantised before: nvfp4 with its scales, and fp8 as half as many bf16; rows of the whole
    hidden size come back, in low precision where the fork would."""
    tokens = world(ranks, [9] * ranks, H, experts, K, dtype=torch.int32)
    packed = [given.x.view(torch.uint8)[:, :H // 2].contiguous() for given in tokens]
    scales = [given.x.view(torch.uint8)[:, H:H + H // 16].contiguous() for given in tokens]
    x, recv_scales, count, handle, event, hook = buffer.low_latency_dispatch_fp4(
        packed[rank], scales[rank], mine.ids, M, experts)
    must(event.event is None and hook is None, "synchronous")
    must(x.shape == (2, ranks * M, H // 2) and recv_scales.shape == (2, ranks * M, H // 16), "shapes of nvfp4")
    for local in range(2):
        rows = [(s, int(t)) for s, given in enumerate(tokens)
                for t in torch.nonzero((given.ids == 2 * rank + local).any(1))[:, 0]]
        must(int(count[local]) == len(rows), "rows of nvfp4")
        for i, (s, t) in enumerate(rows):
            must(bool((x[local, i] == packed[s][t]).all() and (recv_scales[local, i] == scales[s][t]).all()),
                 "bytes of nvfp4")
    ones = torch.ones(2, ranks * M, H).bfloat16()
    total = ((mine.ids >= 0) * mine.weights).sum(1, keepdim=True).double().expand(-1, H)
    y, event, hook = buffer.low_latency_combine_low_precision("nvfp4", ones, None, mine.ids, mine.weights, handle)
    close(y, total, total, "combine after nvfp4", roundings=4)
    halves = mine.x.view(torch.uint8)[:, :H].contiguous().view(torch.bfloat16)
    x, count, handle, _, _ = buffer.low_latency_dispatch(halves, mine.ids, M, experts, use_fp8=False)
    must(x.shape == (2, ranks * M, H // 2), "half as many bf16")
    y, _, _ = buffer.low_latency_combine_low_precision("fp8", ones, None, mine.ids, mine.weights, handle)
    close(y, total, total, "combine of whole rows", roundings=4)


# ---- placement -------------------------------------------------------------------------------------


def placement(rank, ranks):
    """A map with two copies of some experts, given to the Buffer."""
    import nearep
    experts, slots = 6, 2 * ranks
    row = [(3 * s + 1) % experts for s in range(slots)]
    row[:experts] = [5, 4, 3, 2, 1, 0]
    where = nearep.Map.from_slots([row], experts, [ranks // 2, ranks - ranks // 2])
    buffer = deep_ep.Buffer(dist.group.WORLD, placement=where, ranks_per_node=[ranks // 2, ranks - ranks // 2])
    mine = world(ranks, [20] * ranks, H, experts, K)[rank]
    per_rank, per_node, per_slot, in_rank, _ = buffer.get_dispatch_layout(mine.ids, experts)
    must(int(per_slot.sum()) == int((mine.ids >= 0).sum()) and per_slot.numel() == slots, "per slot")
    x, ids, weights, listed, handle, _ = buffer.dispatch(
        mine.x, topk_idx=mine.ids, topk_weights=mine.weights, num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node, is_token_in_rank=in_rank, num_tokens_per_expert=per_slot)
    held = torch.tensor(row[2 * rank:2 * rank + 2] + [0])
    logical = torch.where(ids >= 0, held[ids], torch.full_like(ids, -1))
    y = buffer.combine(experts_by_token(x, logical, weights, 0), handle)[0]
    close(y, *combined(mine, lambda e: 1 + e), "with a map", roundings=4)
    data, count, handle, _, _ = buffer.low_latency_dispatch(mine.x[:M], mine.ids[:M], M, experts, use_fp8=False)
    data = data * (1 + held[:2])[:, None, None]
    y = buffer.low_latency_combine(data, mine.ids[:M], mine.weights[:M], handle)[0]
    want, scale = combined(mine, lambda e: 1 + e)
    close(y, want[:M], scale[:M], "low latency with a map", roundings=5)
    dist.barrier()


class CallersTest(unittest.TestCase):
    def test_vllm_high_throughput(self):
        run(3, vllm_high_throughput)

    def test_vllm_low_latency(self):
        run(2, vllm_low_latency)

    def test_sglang(self):
        run(2, sglang)

    def test_vllm_v2(self):
        run(2, vllm_v2)

    def test_sglang_v2(self):
        run(2, sglang_v2, "ElasticBuffer")

    def test_sglang_v2_5(self):
        run(2, sglang_v2, "EPBuffer")
        run(2, sglang_prefetch)

    def test_megatron(self):
        run(3, megatron)

    def test_tensorrt_llm(self):
        run(2, tensorrt_llm)

    def test_placement(self):
        run(4, placement)


if __name__ == "__main__":
    unittest.main()
