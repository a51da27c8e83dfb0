# SPDX-License-Identifier: Apache-2.0
"""Who gets which token: get_dispatch_layout and what dispatch needs of it."""
from __future__ import annotations

from typing import Any, Optional, Tuple

import torch

Layout = Tuple[torch.Tensor, Optional[torch.Tensor], torch.Tensor, torch.Tensor]


def version_of(tensor: torch.Tensor) -> int:
    """Counts writes; tensors made in inference mode do not count."""
    return -1 if tensor.is_inference() else tensor._version


class Routing:
    """What get_dispatch_layout knew, carried on the tensor is_token_in_rank that it returned."""

    def __init__(self, topk_idx: torch.Tensor, num_experts: int):
        self.topk_idx, self.num_experts = topk_idx, num_experts
        self._version = version_of(topk_idx)
        is_used = (topk_idx >= 0) & (topk_idx < num_experts)
        self.cleaned = torch.where(is_used, topk_idx, torch.full_like(topk_idx, -1))

    def is_of(self, topk_idx: torch.Tensor) -> bool:
        """Whether it was made of this tensor as it is now; then `cleaned` has -1 for all ids that count
        nowhere."""
        return topk_idx is self.topk_idx and version_of(topk_idx) == self._version


def owners(topk_idx: torch.Tensor, num_experts: int, num_ranks: int) -> torch.Tensor:
    """[T, K] rank of each id; num_ranks for those that count nowhere. Contiguous placement."""
    per_rank = -(-num_experts // num_ranks)
    is_used = (topk_idx >= 0) & (topk_idx < num_experts)
    rank = torch.div(topk_idx.long(), per_rank, rounding_mode="floor")
    return torch.where(is_used, rank, torch.full_like(rank, num_ranks))


def _members(rank: torch.Tensor, num: int) -> torch.Tensor:
    """[T, num] bool from [T, K] numbers, `num` = none."""
    found = torch.zeros(rank.shape[0], num + 1, dtype=torch.bool, device=rank.device)
    return found.scatter_(1, rank, True)[:, :num].contiguous()


def contiguous_layout(topk_idx: torch.Tensor, num_experts: int, topology: Any) -> Layout:
    """The five results without a map, by torch alone: nothing is exchanged."""
    ranks, nodes = topology.num_ranks, topology.num_nodes
    rank = owners(topk_idx, num_experts, ranks)
    in_rank = _members(rank, ranks)
    per_node = None
    if nodes > 1:
        node_of = torch.tensor(topology.node_of_rank + [nodes], device=topk_idx.device)
        per_node = _members(node_of[rank], nodes).sum(0, dtype=torch.int32)
    is_used = rank < ranks
    at = torch.where(is_used, topk_idx.long(), torch.full_like(rank, num_experts)).view(-1)
    per_expert = torch.zeros(num_experts + 1, dtype=torch.int32, device=topk_idx.device)  # no wait of the host
    per_expert = per_expert.scatter_add_(0, at, torch.ones_like(at, dtype=torch.int32))[:num_experts]
    return in_rank.sum(0, dtype=torch.int32), per_node, per_expert, in_rank


def mapped_layout(ep: Any, topk_idx: torch.Tensor, topology: Any) -> Layout:
    """The same with a map: nearep chooses the copies. num_tokens_per_expert counts slots, [R * L]."""
    device, tokens = topk_idx.device, topk_idx.shape[0]
    per_rank = torch.empty(topology.num_ranks, dtype=torch.int32, device="cpu")
    per_node = torch.empty(topology.num_nodes, dtype=torch.int32, device="cpu")
    per_slot = torch.empty(topology.num_ranks * ep.slots_per_rank, dtype=torch.int32, device="cpu")
    in_rank = torch.empty(tokens, topology.num_ranks, dtype=torch.bool, device="cpu")
    ep.layout_counts(topk_idx.cpu(), rows_per_rank=per_rank, rows_per_node=per_node, rows_per_slot=per_slot,
                     is_token_in_rank=in_rank)
    return (per_rank.to(device), per_node.to(device) if topology.num_nodes > 1 else None, per_slot.to(device),
            in_rank.to(device))


def ids_from_ranks(is_token_in_rank: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[T, K] one expert of each rank that a token goes to, for callers that give no ids."""
    tokens, ranks = is_token_in_rank.shape
    width = min(ranks, 32)
    per_rank = -(-num_experts // ranks)
    if ranks <= 32:
        first = torch.arange(ranks, device=is_token_in_rank.device) * per_rank
        return torch.where(is_token_in_rank, first[None, :], torch.full_like(first, -1)[None, :]).contiguous()
    order = torch.argsort(is_token_in_rank.int(), dim=1, descending=True, stable=True)[:, :width]
    chosen = torch.gather(is_token_in_rank, 1, order)
    if tokens and int(is_token_in_rank.sum(1).max()) > width:
        raise ValueError(f"deep_ep: a token goes to more than {width} ranks; pass topk_idx")
    return torch.where(chosen, order * per_rank, torch.full_like(order, -1)).contiguous()
