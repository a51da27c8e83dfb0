# SPDX-License-Identifier: Apache-2.0
"""ElasticBuffer: by token and expanded, cached, synchronous or worst case, alignment and padding."""
import itertools
import unittest

import deep_ep
import torch
import torch.distributed as dist
from device import on_device
from ranks import RANKS, arrivals, close, equal, must, run, world

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
    equal(handle.psum_num_recv_tokens_per_expert, aligned.cumsum(0).int(), "sums by expert")
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
        do_handle_copy=number % 8 < 4, expert_alignment=(1, 128)[number % 5 == 0], do_cpu_sync=waits,
        async_with_compute_stream=number % 4 == 0, allocate_on_comm_stream=number % 4 == 0, **flags)
    if number % 4 == 0:
        event.current_stream_wait()
    alignment = handle.expert_alignment
    rows = [(row, s, t) for row, s, t, _ in expanded_rows(tokens, rank, per_rank, alignment)[0]] if expand else \
        [(row, s, t) for row, (s, t) in enumerate(arrivals(tokens, rank, per_rank))]
    for row, s, t in rows:
        equal(x[row], parts[s][0][t], "fp8 bytes")
        equal(scales[row], parts[s][1][t], "their scales")
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
    must(buffer.get_physical_domain_size()[1] == len(nodes), "domains")
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


class ElasticTest(unittest.TestCase):
    def test_one_node(self):
        run(RANKS, matrix, [RANKS])

    def test_two_nodes(self):
        run(3, matrix, [2, 1])


if __name__ == "__main__":
    unittest.main()
