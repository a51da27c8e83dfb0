# SPDX-License-Identifier: Apache-2.0
"""ElasticBuffer: by token and expanded, cached, synchronous or worst case, alignment and padding."""
import itertools
import unittest

import deep_ep
import torch
import torch.distributed as dist
from device import DEVICE, on_device
from deep_ep.utils.envs import get_physical_domain_size
from ranks import RANKS, arrivals, close, equal, generator, must, run, world

H, K = 256, 4


def expanded_rows(tokens, rank, per_rank, alignment):
    """[(row, source, token, k)] and the number of rows."""
    found, end = [], 0
    for local in range(per_rank):
        begin = -(-end // alignment) * alignment
        end = begin
        for s, given in enumerate(tokens):
            for t, k in torch.nonzero(given.ids == rank * per_rank + local).tolist():
                found.append((end, s, t, k))
                end += 1
    return found, -(-end // alignment) * alignment


def one(buffer, rank, ranks, experts, tokens, expand, sync, alignment, bias):
    mine, per_rank = tokens[rank], experts // ranks
    stats = torch.zeros(per_rank, dtype=torch.int32)
    x, ids, weights, handle, event = buffer.dispatch(
        mine.x, topk_idx=mine.ids, topk_weights=mine.weights, num_experts=experts, num_max_tokens_per_rank=16,
        expert_alignment=alignment, do_expand=expand, do_cpu_sync=sync, do_zero_padding=True,
        cumulative_local_expert_recv_stats=stats, async_with_compute_stream=True)
    event.current_stream_wait()
    pairs = [sum(int((g.ids == rank * per_rank + i).sum()) for g in tokens) for i in range(per_rank)]
    must(stats.tolist() == pairs, "statistics")
    must(handle.num_recv_tokens_per_expert_list ==
         ([-(-n // alignment) * alignment for n in pairs] if sync else []), "list")
    aligned = torch.tensor([-(-n // alignment) * alignment for n in pairs])
    ends = aligned.cumsum(0) - ((aligned - torch.tensor(pairs)) if expand else 0)
    equal(handle.psum_num_recv_tokens_per_expert, ends.int(), "sums by expert")
    equal(handle.num_unaligned_recv_tokens_per_expert, torch.tensor(pairs).int(), "rows by expert")
    from_rank = [s for _, s, _, _ in expanded_rows(tokens, rank, per_rank, alignment)[0]] if expand else \
        [s for s, _ in arrivals(tokens, rank, per_rank)]
    equal(handle.psum_num_recv_tokens_per_scaleup_rank,
          torch.tensor([from_rank.count(s) for s in range(ranks)]).cumsum(0).int(), "sums by rank")
    must(sync or x.shape[0] <= 16 * ranks * (K if expand else 1) + 3 * alignment, "the worst case of this call")
    if expand:
        rows, total = expanded_rows(tokens, rank, per_rank, alignment)
        must(ids is None and (not sync or x.shape[0] == total), "rows of the expanded layout")
        factor = torch.zeros(x.shape[0], 1)
        for row, s, t, k in rows:
            equal(x[row], tokens[s].x[t], "expanded row")
            must(float(weights[row]) == float(tokens[s].weights[t, k]), "its weight")
            factor[row] = float(tokens[s].weights[t, k])
        used = torch.ones(x.shape[0], dtype=torch.bool)
        used[[row for row, _, _, _ in rows]] = False
        must(float(x[used].abs().sum()) == 0, "padding is zero")
        y_in = (x.float() * factor).bfloat16()
        want = (mine.x.double() * ((mine.ids >= 0) * mine.weights).sum(1, keepdim=True).double())
        again = buffer.dispatch(mine.x, handle=handle, do_zero_padding=True)
        equal(again[0], x, "cached")
    else:
        rows = arrivals(tokens, rank, per_rank)
        equal(x[:len(rows)], torch.stack([tokens[s].x[t] for s, t in rows]) if rows else x[:0], "rows")
        must(bool((ids[len(rows):] == -1).all()), "tail")
        y_in = x
        owner = torch.where(mine.ids >= 0, torch.div(mine.ids, per_rank, rounding_mode="floor"),
                            torch.full_like(mine.ids, -1))
        num = torch.stack([(owner == r).any(1) for r in range(ranks)], 1).sum(1, keepdim=True)
        want = mine.x.double() * num
    add = mine.x.flip(0).contiguous() if bias else None
    y = buffer.combine(y_in.contiguous(), handle, bias=add)[0]
    want = want + (add.double() if bias else 0)
    close(y, want, want.abs() + (2 * add.double().abs() if bias else 0) + mine.x.double().abs() * K, "combine",
          roundings=3)


def fp8(buffer, rank, ranks, experts, number):
    """Rows of fp8 bytes with scales, by token and expanded; ids by reference or copied; each way to wait."""
    tokens = world(ranks, [5 + 3 * r for r in range(ranks)], H, experts, K, salt=100 + number)
    mine, per_rank, expand = tokens[rank], experts // ranks, number % 2 == 1
    parts = [(given.x.view(torch.uint8)[:, :H].contiguous(), given.x.float()[:, :H // 128]) for given in tokens]
    flags = dict(previous_event=buffer.capture()) if number % 4 < 2 else {}
    waits = number % 3 != 0
    (x, scales), ids, weights, handle, event = buffer.dispatch(
        parts[rank], topk_idx=mine.ids, topk_weights=mine.weights, num_experts=experts, do_expand=expand,
        do_handle_copy=number % 8 < 4, use_tma_aligned_col_major_sf=number % 3 == 1,
        expert_alignment=(1, 128)[number % 5 == 0], do_cpu_sync=waits,
        async_with_compute_stream=number % 4 == 0, allocate_on_comm_stream=number % 4 == 0, **flags)
    if number % 4 == 0:
        event.current_stream_wait()
    alignment = handle.expert_alignment
    rows = [(row, s, t) for row, s, t, _ in expanded_rows(tokens, rank, per_rank, alignment)[0]] if expand else \
        [(row, s, t) for row, (s, t) in enumerate(arrivals(tokens, rank, per_rank))]
    for row, s, t in rows:
        equal(x[row], parts[s][0][t], "fp8 bytes")
        equal(scales[row], parts[s][1][t], "their scales")
    pitch = -(-x.shape[0] // 4) * 4
    must(number % 3 != 1 or x.shape[0] < 2 or DEVICE != "cpu" or scales.stride() == (1, pitch), "tokens contiguous")
    y_in = torch.zeros(x.shape[0], H).bfloat16()
    for row, s, t in rows:
        y_in[row] = tokens[s].x[t]
    biases = (mine.x, mine.x.flip(1).contiguous())
    y = buffer.combine(y_in, handle, bias=biases)[0]
    owner = torch.where(mine.ids >= 0, torch.div(mine.ids, per_rank, rounding_mode="floor"),
                        torch.full_like(mine.ids, -1))
    num = (mine.ids >= 0).sum(1, keepdim=True) if expand else \
        torch.stack([(owner == r).any(1) for r in range(ranks)], 1).sum(1, keepdim=True)
    want = mine.x.double() * num + sum(bias.double() for bias in biases)
    close(y, want, mine.x.double().abs() * (num + 1) + biases[1].double().abs(), "combine after fp8", roundings=3)


def matrix(rank, ranks, nodes):
    experts = 3 * ranks
    buffer = on_device(deep_ep.ElasticBuffer(dist.group.WORLD, num_max_tokens_per_rank=64, hidden=H, num_topk=K,
                                             explicitly_destroy=True, ranks_per_node=nodes))
    must(buffer.get_physical_domain_size()[0] == len(nodes), "domains")
    cases = itertools.product((False, True), (True, False), (1, 16), (False, True))
    for number, (expand, sync, alignment, bias) in enumerate(cases):
        sizes = [0 if r == number % ranks else max(1, 9 - r) for r in range(ranks)]
        tokens = world(ranks, sizes, H, experts, K, salt=number)
        one(buffer, rank, ranks, experts, tokens, expand, sync, alignment, bias)
    for number in range(16):
        fp8(buffer, rank, ranks, experts, number)
    try:
        mine = world(ranks, [17] * ranks, H, experts, K)[rank]
        buffer.dispatch(mine.x, topk_idx=mine.ids, topk_weights=mine.weights, num_experts=experts,
                        num_max_tokens_per_rank=16)
        must(False, "more tokens than said")
    except ValueError as error:
        must("17 tokens" in str(error), str(error))
    try:
        buffer.engram_fetch()
        must(False, "another family")
    except NotImplementedError as error:
        must("engram_fetch" in str(error), str(error))
    buffer.barrier()
    buffer.destroy()


def deferred(rank, ranks, nodes):
    """EPBuffer: second halves put off, waited for in any order or not at all; new weights with a handle, weights
    back of both layouts."""
    experts, per_rank = 3 * ranks, 3
    buffer = on_device(deep_ep.EPBuffer(dist.group.WORLD, num_max_tokens_per_rank=64, hidden=H, num_topk=K,
                                        explicitly_destroy=True, ranks_per_node=nodes))
    for turn in range(4):
        expand, sync = turn % 2 == 1, turn < 2
        tokens = [world(ranks, [5 + 3 * r for r in range(ranks)], H, experts, K, salt=salt)
                  for salt in (turn, 10 + turn)]
        events = [buffer.dispatch(given[rank].x, topk_idx=given[rank].ids, topk_weights=given[rank].weights,
                                  num_experts=experts, do_expand=expand, do_cpu_sync=sync, expert_alignment=8,
                                  async_with_compute_stream=True, defer_epilogue=True) for given in tokens]
        results = [event.wait() for event in (events if turn % 2 else events[::-1])]
        for given, (x, ids, weights, handle) in zip(tokens, results if turn % 2 else results[::-1]):
            mine = given[rank]
            rows = [(row, s, t, k) for row, s, t, k in expanded_rows(given, rank, per_rank, 8)[0]] if expand else \
                [(row, s, t, None) for row, (s, t) in enumerate(arrivals(given, rank, per_rank))]
            for row, s, t, k in rows:
                equal(x[row], given[s].x[t], "row")
                must(k is None or float(weights[row]) == float(given[s].weights[t, k]), "weight")
            event = buffer.combine(x.clone(), handle, topk_weights=weights, async_with_compute_stream=True,
                                   defer_epilogue=True)
            again = buffer.dispatch(mine.x, topk_weights=mine.weights * 2, handle=handle)
            for row, s, t, k in rows:  # what was deferred is done; the same routing with other weights
                equal(again[0][row], given[s].x[t], "cached row")
                must(k is None or float(again[2][row]) == 2 * float(given[s].weights[t, k]), "new weight")
            y, back = event.wait()
            equal(back, torch.where(mine.ids >= 0, mine.weights, torch.zeros(())), "weights back")
            owner = torch.where(mine.ids >= 0, torch.div(mine.ids, per_rank, rounding_mode="floor"),
                                torch.full_like(mine.ids, -1))
            num = (mine.ids >= 0).sum(1, keepdim=True) if expand else \
                torch.stack([(owner == r).any(1) for r in range(ranks)], 1).sum(1, keepdim=True)
            close(y, mine.x.double() * num, mine.x.double().abs() * (num + 1), "combine", roundings=3)
            y = buffer.combine(again[0], handle, topk_weights=again[2])
            equal(y[1], back * 2, "weights back, again")
    for bad, word in ((dict(defer_epilogue=True), "async_with_compute_stream"),
                      (dict(do_handle_copy=True), "by reference")):
        try:
            buffer.dispatch(mine.x, topk_idx=mine.ids, topk_weights=mine.weights, num_experts=experts, **bad)
            must(False, word)
        except ValueError as error:
            must(word in str(error), str(error))
    buffer.destroy()


def redundant(rank, ranks, nodes, slots):
    """Weights of several tensors to borrowed slots and gradients back; slots that nobody asked for stay as they are."""
    experts = 2
    buffer = on_device(deep_ep.EPBuffer(dist.group.WORLD, explicitly_destroy=True, ranks_per_node=nodes))
    rng = generator(0, 5)  # the same on all ranks
    for sizes in ((16,), (70000, 48), (1 << 16,)):
        mapping = torch.randint(-1, ranks * experts, (ranks, slots), generator=rng, dtype=torch.int32)
        whole = [torch.randint(0, 256, (ranks * experts, size), generator=rng, dtype=torch.uint8) for size in sizes]
        mine = [part[rank * experts:(rank + 1) * experts].contiguous() for part in whole]
        into = [torch.full((slots, size), 7, dtype=torch.uint8) for size in sizes]
        buffer.lb_prefetch_weights(into, mine, mapping).wait()
        for got, part in zip(into, whole):
            for slot, expert in enumerate(mapping[rank].tolist()):
                equal(got[slot], part[expert] if expert >= 0 else torch.full_like(part[0], 7), "borrowed weights")
        lent = [torch.randint(-99, 99, (slots, sizes[0] // 4), generator=rng).float() for _ in range(ranks)]
        grads = torch.ones(experts, sizes[0] // 4)
        buffer.lb_reduce_grads(lent[rank], grads, mapping).wait()
        want = torch.ones(experts, sizes[0] // 4)
        for borrower in range(ranks):
            for slot, expert in enumerate(mapping[borrower].tolist()):
                if expert >= 0 and expert // experts == rank:
                    want[expert % experts] += lent[borrower][slot]
        equal(grads, want, "gradients")
    plan = deep_ep.BufferAllocator()
    must(plan.allocate((2, 3), torch.float32).shape == (2, 3) and plan.num_bytes == 1 << 21, "plan")
    must(get_physical_domain_size(dist.group.WORLD) == (1, ranks), "domains without a buffer")
    try:
        buffer.lb_prefetch_weights(into, mine, mapping[:, :1])
        must(slots == 1, "another shape of the mapping")
    except ValueError as error:
        must("redundancy_mapping" in str(error), str(error))
    buffer.destroy()


class ElasticTest(unittest.TestCase):
    def test_deferred(self):
        run(RANKS, deferred, [RANKS])

    def test_deferred_two_nodes(self):
        run(3, deferred, [2, 1])

    def test_redundant_experts(self):
        run(RANKS, redundant, [RANKS], 3)
        run(3, redundant, [2, 1], 12)  # more slots than a token can go to at once

    def test_one_node(self):
        run(RANKS, matrix, [RANKS])

    def test_two_nodes(self):
        run(3, matrix, [2, 1])


if __name__ == "__main__":
    unittest.main()
