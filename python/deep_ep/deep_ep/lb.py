# SPDX-License-Identifier: Apache-2.0
"""Redundant experts of V2.5: weights to the ranks that borrow an expert, gradients back to its owner. Both
are dispatches: a token is a piece of an expert's tensor, an expert of nearep a borrowed slot or an owner's
expert. Over any number of nodes; nothing waits for the host."""
from __future__ import annotations

from typing import Any, Dict, List, Tuple

import torch

from .events import EventOverlap
from .normal import _pointer
from .seats import executor_of

PIECE = 1 << 16  # bytes of a row at most
MOST_SLOTS = 32  # that one token goes to: nearep's top-k


def get_num_tma_alignment() -> int:
    """Bytes that an expert's tensors must be a multiple of."""
    return 32


def get_num_allocation_alignment() -> int:
    """Bytes that buffer sizes are rounded to by upstream's callers."""
    return 1 << 21


class BufferAllocator:
    """Upstream plans tensors of a buffer before it exists; here each is memory of its own at once."""

    def __init__(self) -> None:
        self.alignment = get_num_allocation_alignment()
        self.allocations: List[Tuple[torch.Tensor, int]] = []
        self.num_bytes = 0
        self.materialized = False

    def allocate(self, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        """A tensor on the current device, of host memory where there is no GPU."""
        tensor = torch.empty(shape, dtype=dtype, device="cuda" if torch.cuda.is_available() else "cpu")
        self.allocations.append((tensor, self.num_bytes))
        size = tensor.numel() * tensor.element_size()
        self.num_bytes += -(-size // self.alignment) * self.alignment
        return tensor


def _bytes(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """[experts, bytes of one], the same memory."""
    if tensor.dim() < 1 or not tensor.is_contiguous() or tensor.shape[0] == 0:
        raise ValueError(f"deep_ep: {what} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; it must be "
                         "contiguous and have an expert or more in the first dimension")
    return tensor.view(tensor.shape[0], -1).view(torch.uint8)


class LoadBalance:
    """Of one EPBuffer."""

    def __init__(self, buffer: Any):
        self._buffer = buffer
        self._eps: Dict[Any, Any] = {}

    def _ep(self, key: Any, **shape: Any) -> Tuple[Any, Any]:
        if key not in self._eps:
            ep = self._buffer._comm.ep(hidden=16, wire="opaque", **shape)
            self._eps[key] = (ep, ep.handle())
        return self._eps[key]

    def _check(self, mapping: torch.Tensor, num_slots: int) -> None:
        ranks = self._buffer.group_size
        if tuple(mapping.shape) != (ranks, num_slots) or mapping.dtype != torch.int32:
            raise ValueError(f"deep_ep: redundancy_mapping has shape {tuple(mapping.shape)} of {mapping.dtype}; it "
                             f"must be int32 [{ranks}, {num_slots}]")

    def prefetch(self, redundant: List[torch.Tensor], weights: List[torch.Tensor], mapping: torch.Tensor, previous: Any
                 ) -> EventOverlap:
        """See EPBuffer.lb_prefetch_weights."""
        if len(redundant) != len(weights) or not weights:
            raise ValueError(f"deep_ep: {len(weights)} expert weights for {len(redundant)} redundant ones")
        buffer = self._buffer
        with buffer._lock, buffer._streams.on(mapping, previous, True) as scope:
            for to, source in zip(redundant, weights):
                given, taken = _bytes(source, "expert_weights"), _bytes(to, "redundant_expert_weights")
                if given.shape[1] != taken.shape[1] or given.shape[1] % 16:
                    raise ValueError(f"deep_ep: {given.shape[1]} bytes an expert for {taken.shape[1]} of a redundant "
                                     "one; they must be equal, and a multiple of 16")
                self._check(mapping, taken.shape[0])
                with scope.current():
                    self._push(given, taken, mapping, scope)
                scope.keep(to, source)
            scope.keep(mapping)
            return scope.finish()

    def _push(self, given: torch.Tensor, taken: torch.Tensor, mapping: torch.Tensor, scope: Any) -> None:
        rank, ranks, device = self._buffer.rank, self._buffer.group_size, given.device
        experts, size = given.shape
        slots = taken.shape[0]
        piece = min(size, PIECE)
        pieces = -(-size // piece)
        if size % piece:
            given = torch.nn.functional.pad(given, (0, pieces * piece - size))
        tokens = experts * pieces
        mine = torch.arange(rank * experts, (rank + 1) * experts, dtype=torch.int32, device=device)
        wanted = mapping.view(1, -1) == mine[:, None]
        places = torch.arange(ranks * slots, dtype=torch.int32, device=device).expand_as(wanted)
        ids = torch.where(wanted, places, torch.full_like(places, -1))
        is_mine = (mapping[rank] >= 0) & (mapping[rank] < ranks * experts)
        first = (is_mine.long().cumsum(0) - is_mine.long()) * pieces
        for begin in range(0, ranks * slots, MOST_SLOTS):
            part = ids[:, begin:begin + MOST_SLOTS]
            top_k = part.shape[1]
            ep, handle = self._ep(("push", piece, tokens, ranks * slots, top_k, executor_of(given)),
                                  num_experts=ranks * slots, top_k=top_k, max_tokens=tokens, layout="packed",
                                  row_bytes=piece, executor=executor_of(given))
            routed = part.repeat_interleave(pieces, 0).contiguous()
            rows = torch.empty(slots * pieces, piece, dtype=torch.uint8, device=device)
            ep.send_raw(handle, tokens, _pointer(given), None, _pointer(routed), 0, None, 0, scope.pointer)
            ep.recv_raw(handle, _pointer(rows), slots * pieces, None, None, None, None, None, scope.pointer)
            scope.keep(given, routed, rows)
            # slots of this rank that this part served, where their pieces lie among those that came
            here = torch.arange(rank * slots, (rank + 1) * slots, device=device)
            served = is_mine & (here >= begin) & (here < begin + top_k)
            skipped = (is_mine & (here < begin)).sum() * pieces
            at = (first - skipped).clamp(0, (slots - 1) * pieces)[:, None] + torch.arange(pieces, device=device)
            came = rows[at].view(slots, pieces * piece)[:, :size]
            taken.copy_(torch.where(served[:, None], came, taken))

    def reduce(self, redundant: torch.Tensor, grads: torch.Tensor, mapping: torch.Tensor, previous: Any
               ) -> EventOverlap:
        """See EPBuffer.lb_reduce_grads."""
        given, into = _bytes(redundant, "redundant_expert_grads"), _bytes(grads, "expert_grads")
        if redundant.dtype != torch.float32 or grads.dtype != torch.float32 or given.shape[1] != into.shape[1] or \
                given.shape[1] % 16:
            raise ValueError(f"deep_ep: gradients of {given.shape[1]} and {into.shape[1]} bytes an expert, "
                             f"{redundant.dtype} and {grads.dtype}; they must be float32 of equal sizes, a multiple "
                             "of 4 numbers")
        self._check(mapping, given.shape[0])
        buffer = self._buffer
        with buffer._lock, buffer._streams.on(mapping, previous, True) as scope:
            with scope.current():
                self._pull(given, grads.view(grads.shape[0], -1), mapping, scope)
            scope.keep(redundant, grads, mapping)
            return scope.finish()

    def _pull(self, given: torch.Tensor, grads: torch.Tensor, mapping: torch.Tensor, scope: Any) -> None:
        rank, ranks, device = self._buffer.rank, self._buffer.group_size, given.device
        slots, size = given.shape
        experts = grads.shape[0]
        piece = min(size, PIECE)
        pieces = -(-size // piece)
        if size % piece:
            given = torch.nn.functional.pad(given, (0, pieces * piece - size))
        tokens, most = slots * pieces, ranks * slots * pieces
        ep, handle = self._ep(("pull", piece, tokens, ranks * experts, executor_of(given)), num_experts=ranks * experts,
                              top_k=1, max_tokens=tokens, layout="rank", row_bytes=piece, executor=executor_of(given))
        ids = mapping[rank]
        ids = torch.where(ids < ranks * experts, ids, torch.full_like(ids, -1)).clamp(min=-1)
        routed = ids.repeat_interleave(pieces).contiguous()
        rows = torch.empty(most, piece, dtype=torch.uint8, device=device)
        sources = torch.full((2, most), -1, dtype=torch.int32, device=device)
        ep.send_raw(handle, tokens, _pointer(given), None, _pointer(routed), 0, None, 0, scope.pointer)
        ep.recv_raw(handle, _pointer(rows), most, None, None, None, _pointer(sources[0]), _pointer(sources[1]),
                    scope.pointer)
        scope.keep(given, routed, rows, sources)
        # what did not come is added to a place of its own
        came = sources[0] >= 0
        token = sources[1].clamp(min=0).long()
        slot = torch.div(token, pieces, rounding_mode="floor")
        expert = mapping[sources[0].clamp(min=0).long(), slot] - rank * experts
        at = torch.where(came, expert.long() * pieces + token % pieces, torch.full_like(token, experts * pieces))
        sums = torch.zeros(experts * pieces + 1, piece // 4, dtype=torch.float32, device=device)
        nothing = torch.zeros((), dtype=torch.float32, device=device)
        values = torch.where(came[:, None], rows.view(torch.float32), nothing)
        sums.index_add_(0, at, values)
        grads += sums[:-1].view(experts, -1)[:, :size // 4]
