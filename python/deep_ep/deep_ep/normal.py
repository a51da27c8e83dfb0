# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine in normal mode: one row per token and rank, ordered by source rank, then token."""
from __future__ import annotations

from typing import Any, Callable, List, Optional, Tuple, Union

import torch
from nearep import InvalidError

from .config import Config
from .events import EventHandle, EventOverlap
from .handles import NormalHandle, Owned
from .layout import ids_from_ranks, version_of
from .rows import columns_for, element_size
from .seats import DTYPES, Kind, Seat, executor_of

_ID_TYPES = {torch.int32: 0, torch.int64: 1}
Rows = Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]
Event = Union[EventOverlap, EventHandle, None]


def _pointer(tensor: Optional[torch.Tensor]) -> Optional[int]:
    return None if tensor is None else tensor.data_ptr() or None


class Payload:
    """x of a dispatch: a tensor [T, H], or (tensor [T, H], scales [T, S]) whose bytes pass through."""

    def __init__(self, x: Rows):
        self.is_pair = isinstance(x, tuple)
        self.x, self.scales = x if isinstance(x, tuple) else (x, None)
        if self.x.dim() != 2 or not self.x.is_contiguous():
            raise ValueError(f"deep_ep: x has shape {tuple(self.x.shape)} and strides {self.x.stride()}; it must be "
                             "a contiguous [T, H] tensor")
        if self.scales is not None:
            scales = self.scales if self.scales.dim() == 2 else self.scales[:, None]
            if scales.shape[0] != self.x.shape[0]:
                raise ValueError(f"deep_ep: {scales.shape[0]} rows of scales for {self.x.shape[0]} tokens")
            self.scales = scales.contiguous()
        elif self.x.dtype not in DTYPES:
            raise ValueError(f"deep_ep: x is of type {self.x.dtype}; pass bf16, fp16, fp32, or (fp8, scales)")

    @property
    def kind(self) -> Kind:
        """What an ep for it must be."""
        hidden = self.x.shape[1]
        if self.scales is None:
            return DTYPES[self.x.dtype], hidden, None
        return "bf16", hidden, (hidden * element_size(self.x.dtype),
                                self.scales.shape[1] * element_size(self.scales.dtype))

    def empty(self, rows: int, seat: Optional[Seat] = None, scope: Any = None
              ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Outputs of the same kind; x in memory that the node maps where the seat has some."""
        x = None
        if seat is not None and seat.pool is not None:
            x = seat.pool.empty(rows, self.x.shape[1], self.x.dtype, scope)
        if x is None:
            x = torch.empty(rows, self.x.shape[1], dtype=self.x.dtype, device=self.x.device)
        if self.scales is None:
            return x, None
        if seat is not None and seat.columns:
            return x, columns_for(rows, self.scales.shape[1], self.scales.dtype, self.x.device)
        return x, torch.empty(rows, self.scales.shape[1], dtype=self.scales.dtype, device=self.x.device)

    def give(self, x: torch.Tensor, scales: Optional[torch.Tensor]) -> Rows:
        """[N, H], or with [N, S], as x came."""
        return (x, scales) if scales is not None and self.is_pair else x


class Normal:
    """The normal calls of Buffer."""

    # of the Buffer
    rank: int
    group_size: int
    num_sms: int
    runtime: Any
    _comm: Any
    _seats: Any
    _streams: Any
    _lock: Any
    _allgather: Any

    def dispatch(self, x: Rows, handle: Optional[NormalHandle] = None,
                 num_tokens_per_rank: Optional[torch.Tensor] = None,
                 num_tokens_per_rdma_rank: Optional[torch.Tensor] = None,
                 is_token_in_rank: Optional[torch.Tensor] = None,
                 num_tokens_per_expert: Optional[torch.Tensor] = None,
                 topk_idx: Optional[torch.Tensor] = None, topk_weights: Optional[torch.Tensor] = None,
                 expert_alignment: int = 1, num_worst_tokens: int = 0, config: Optional[Config] = None,
                 previous_event: Event = None, async_finish: bool = False,
                 allocate_on_comm_stream: bool = False) -> Tuple[Any, ...]:
        """Sends each token once to every rank that holds one of its experts.

        x: [T, H] bf16 (fp16, fp32), or (fp8 [T, H], scales [T, S] of any 4-byte or 1-byte type).
        handle: of an earlier dispatch: its routing again, without topk. Else the results of
        get_dispatch_layout, and topk_idx [T, K] with topk_weights f32 [T, K], both or neither.
        expert_alignment: the list of received tokens per expert is rounded up to it.
        num_worst_tokens: rows of the outputs; counts are not waited for on the host, the tail of
        recv_topk_idx is -1 and the list is empty. config: accepted.

        Returns (recv_x [N, H] like x, recv_topk_idx [N, K] local ids or -1, recv_topk_weights [N, K] 0
        where -1, list of L numbers, handle, EventOverlap); with a handle (recv_x, None, None, None, None,
        EventOverlap).
        """
        with self._lock:
            self._check_alive()
            payload = Payload(x)
            with self._streams.on(payload.x, previous_event, async_finish,
                                  allocate_on_comm_stream) as scope:
                scope.keep(payload.x, payload.scales, topk_idx, topk_weights)
                if handle is not None:
                    if topk_idx is not None or topk_weights is not None:
                        raise ValueError("deep_ep: a dispatch with a handle takes no topk_idx and topk_weights")
                    return self._dispatch_cached(payload, handle, scope)
                return self._dispatch_fresh(payload, is_token_in_rank, num_tokens_per_expert, topk_idx,
                                            topk_weights, expert_alignment, num_worst_tokens, config, scope)

    internode_dispatch = dispatch

    def _check_alive(self) -> None:
        if self.runtime is None:
            raise RuntimeError("deep_ep: this Buffer is destroyed")

    def _experts_of(self, num_tokens_per_expert: torch.Tensor, routing: Any) -> int:
        if routing is not None:
            return routing.num_experts
        if self._seats.placement is not None:
            return self._seats.placement.shape.num_experts
        return num_tokens_per_expert.numel()

    @staticmethod
    def _check_fresh(tokens: int, in_rank: Any, per_expert: Any, topk_idx: Any, topk_weights: Any, worst: int) -> None:
        if (topk_idx is None) != (topk_weights is None):
            raise ValueError("deep_ep: give both topk_idx and topk_weights, or neither")
        if in_rank is None or per_expert is None:
            raise ValueError("deep_ep: a fresh dispatch needs is_token_in_rank and num_tokens_per_expert of "
                             "get_dispatch_layout")
        if worst and topk_idx is None:
            raise ValueError("deep_ep: num_worst_tokens needs topk_idx and topk_weights")
        if in_rank.dim() != 2 or in_rank.shape[0] != tokens:
            raise ValueError(f"deep_ep: is_token_in_rank has shape {tuple(in_rank.shape)}, x has {tokens} tokens")
        if topk_idx is None:
            return
        if topk_idx.dim() != 2 or topk_idx.shape[0] != tokens or topk_idx.dtype not in _ID_TYPES:
            raise ValueError(f"deep_ep: topk_idx has shape {tuple(topk_idx.shape)} of {topk_idx.dtype}; it must be "
                             f"[{tokens}, K] of int64 or int32")
        if topk_weights.shape != topk_idx.shape or topk_weights.dtype != torch.float32:
            raise ValueError(f"deep_ep: topk_weights have shape {tuple(topk_weights.shape)} of {topk_weights.dtype}; "
                             f"they must be {list(topk_idx.shape)} of float32")

    def _clean_ids(self, in_rank: torch.Tensor, topk_idx: Optional[torch.Tensor], routing: Any, num_experts: int,
                   scope: Any) -> torch.Tensor:
        """[T, K] with -1 for what counts nowhere, or as given where the library says so itself."""
        if topk_idx is None:
            return scope.contiguous(routing.cleaned if routing is not None else ids_from_ranks(in_rank, num_experts))
        ids = topk_idx
        if routing is not None and routing.is_of(topk_idx):
            ids = routing.cleaned
        elif topk_idx.is_cuda:  # kernels refuse ids beyond the experts; nobody has looked at these
            is_used = (topk_idx >= 0) & (topk_idx < num_experts)
            ids = torch.where(is_used, topk_idx, torch.full_like(topk_idx, -1))
            scope.allocated()
            scope.keep(ids)
        return scope.contiguous(ids)

    def _dispatch_fresh(self, payload: Payload, in_rank: Any, per_expert: Any, topk_idx: Optional[torch.Tensor],
                        topk_weights: Optional[torch.Tensor], alignment: int, worst: int, config: Optional[Config],
                        scope: Any) -> Tuple[Any, ...]:
        tokens = payload.x.shape[0]
        self._check_fresh(tokens, in_rank, per_expert, topk_idx, topk_weights, worst)
        routing = getattr(in_rank, "nearep_routing", None)
        num_experts = self._experts_of(per_expert, routing)
        has_topk = topk_idx is not None
        ids = self._clean_ids(in_rank, topk_idx, routing, num_experts, scope)
        most = self._seats.most(tokens)
        seat = self._seats.normal(payload.kind, num_experts, ids.shape[1], most, executor_of(payload.x))
        handle = NormalHandle(Owned(seat), payload.kind,
                              max((config.num_sms if config is not None else self.num_sms) // 2, 1))
        handle.routing = (ids, version_of(ids), topk_weights)
        handle.num_tokens, handle.most, handle.is_token_in_rank = tokens, most, in_rank
        handle.set_nodes(self._comm.topology)
        self._send(seat, handle.owned, payload, ids, topk_weights, scope)
        recv_x, recv_ids, recv_weights, counts = self._receive(seat, handle, payload, has_topk, worst, scope)
        listed = []
        if not worst:
            listed = [-(-num // alignment) * alignment for num in counts.rows_per_slot]
            if not has_topk and routing is None:  # ids were made up: the true counts are with the sources
                listed = self._counts_of_all(per_expert, alignment)
        return recv_x, recv_ids, recv_weights, listed, handle, scope.finish()

    def _counts_of_all(self, per_expert: torch.Tensor, alignment: int) -> List[int]:
        mine = slice(self.rank * (per_expert.numel() // self.group_size),
                     (self.rank + 1) * (per_expert.numel() // self.group_size))
        rows = self._allgather(per_expert.tolist())
        return [-(-sum(column) // alignment) * alignment for column in list(zip(*rows))[mine]]

    def _send(self, seat: Seat, owned: Owned, payload: Payload, ids: Optional[torch.Tensor],
              weights: Optional[torch.Tensor], scope: Any) -> None:
        """Starts it; ids that no expert has count nowhere, but nearep refuses them: then once more
        without them. Nothing was sent by the refused call."""
        owned.is_idle = False
        arguments = (owned.handle, payload.x.shape[0], _pointer(payload.x), _pointer(payload.scales))
        weights = scope.contiguous(weights)
        tail = (_pointer(weights), 0, scope.pointer)
        if ids is None:
            seat.ep.send_raw(*arguments, None, 0, *tail)
            return
        kind = _ID_TYPES[ids.dtype]
        try:
            seat.ep.send_raw(*arguments, ids.data_ptr() or 8, kind, *tail)
        except InvalidError:
            is_used = (ids >= 0) & (ids < seat.num_experts)
            cleaned = torch.where(is_used, ids, torch.full_like(ids, -1))
            seat.ep.send_raw(*arguments, cleaned.data_ptr() or 8, kind, *tail)

    def _receive(self, seat: Seat, handle: NormalHandle, payload: Payload, has_topk: bool, worst: int, scope: Any
                 ) -> Tuple[Rows, Optional[torch.Tensor], Optional[torch.Tensor], Any]:
        """Completes a fresh dispatch; the sizes come first, outputs are allocated then."""
        counts: Any = None if worst else seat.ep.dispatch_counts(handle.owned.handle)
        rows, device, top_k = worst or counts.num_rows, payload.x.device, seat.ep.top_k
        x, scales = payload.empty(rows, seat, scope)
        slots = weights = None
        if has_topk:
            slots = torch.full((rows, top_k), -1, dtype=torch.int32, device=device) if worst else \
                torch.empty(rows, top_k, dtype=torch.int32, device=device)
            weights = torch.empty(rows, top_k, dtype=torch.float32, device=device)
        sources = torch.full((2, rows), -1, dtype=torch.int32, device=device) if worst else \
            torch.empty(2, rows, dtype=torch.int32, device=device)
        scope.allocated()
        seat.ep.recv_raw(handle.owned.handle, _pointer(x), rows, _pointer(scales), _pointer(slots),
                         _pointer(weights), _pointer(sources[0]), _pointer(sources[1]), scope.pointer)
        handle.owned.is_idle = True
        handle.num_rows = rows
        handle.rows_per_source = counts.rows_per_source if counts is not None else None
        handle.source_rank, handle.source_token = sources[0], sources[1]
        scope.keep(x, scales, slots, weights, sources)
        if slots is not None and handle.routing is not None:
            with scope.current():
                slots = slots.to(handle.routing[0].dtype)
            scope.keep(slots)
        return payload.give(x, scales), slots, weights, counts

    def _twin(self, handle: NormalHandle, kind: Kind, payload_x: torch.Tensor
              ) -> Tuple[Seat, Owned, Optional[torch.Tensor]]:
        """(seat, nearep's handle, ids to route with or None when it is routed): the handle itself, or the
        same routing on an ep for another payload."""
        if kind == handle.key:
            return handle.owned.seat, handle.owned, None
        if kind in handle.twins:
            owned = handle.twins[kind]
            return owned.seat, owned, None
        ids, version, _ = handle.routing
        if version_of(ids) != version:
            raise ValueError("deep_ep: topk_idx was changed after the dispatch whose handle is used for another "
                             "type of x; keep it as it was")
        seat = self._seats.normal(kind, handle.owned.seat.num_experts, ids.shape[1], handle.most,
                                  executor_of(payload_x))
        owned = handle.twins[kind] = Owned(seat)
        return seat, owned, ids

    def _dispatch_cached(self, payload: Payload, handle: NormalHandle, scope: Any) -> Tuple[Any, ...]:
        if payload.x.shape[0] != handle.num_tokens:
            raise ValueError(f"deep_ep: x has {payload.x.shape[0]} tokens; the dispatch of this handle had "
                             f"{handle.num_tokens}")
        seat, owned, ids = self._twin(handle, payload.kind, payload.x)
        x, scales = payload.empty(handle.num_rows, seat, scope)
        scope.allocated()
        if ids is None:
            owned.is_idle = False
            seat.ep.dispatch_raw(owned.handle, handle.num_tokens, _pointer(payload.x), _pointer(payload.scales), None,
                                 0, None, _pointer(x), handle.num_rows, _pointer(scales), scope.pointer)
        else:
            self._send(seat, owned, payload, ids, handle.routing[2], scope)
            seat.ep.recv_raw(owned.handle, _pointer(x), handle.num_rows, _pointer(scales), None, None, None, None,
                             scope.pointer)
        owned.is_idle = True
        scope.keep(x, scales)
        return payload.give(x, scales), None, None, None, None, scope.finish()

    def combine(self, x: torch.Tensor, handle: NormalHandle, topk_weights: Optional[torch.Tensor] = None,
                bias: Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor], None] = None,
                config: Optional[Config] = None, previous_event: Event = None, async_finish: bool = False,
                allocate_on_comm_stream: bool = False
                ) -> Tuple[torch.Tensor, Optional[torch.Tensor], EventOverlap]:
        """Sums, for each token of the dispatch, the rows of all ranks: fp32, fixed order, rounded once a
        level.

        x: [N, H] in the rows' order; topk_weights: [N, K] f32, summed alike, all ranks or none; bias:
        [T, H] of x's type, or a pair of them. Returns (combined_x [T, H], combined_topk_weights [T, K] or
        None, EventOverlap).
        """
        with self._lock:
            self._check_alive()
            self._check_combine(x, handle)
            biases = bias if isinstance(bias, (tuple, list)) else (bias, None)
            with self._streams.on(x, previous_event, async_finish, allocate_on_comm_stream) as scope:
                return self._combine(x, handle, topk_weights, biases, scope)

    internode_combine = combine

    @staticmethod
    def _check_combine(x: torch.Tensor, handle: NormalHandle) -> None:
        ep = handle.owned.seat.ep
        if x.dim() != 2 or not x.is_contiguous() or x.shape != (handle.num_rows, ep.hidden):
            raise ValueError(f"deep_ep: x has shape {tuple(x.shape)}; combine needs contiguous rows "
                             f"[{handle.num_rows}, {ep.hidden}] of the dispatch")
        if DTYPES.get(x.dtype) != ep.dtype:
            raise ValueError(f"deep_ep: x is of type {x.dtype}; the dispatch of this handle was made for "
                             f"{ep.dtype}")

    def _combine_arrays(self, x: torch.Tensor, handle: NormalHandle, weights: Optional[torch.Tensor], biases: Any,
                        scope: Any) -> Tuple[torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor], List[Any]]:
        """(y, sums of weights where the executor makes them, weights, biases)."""
        ep, device = handle.owned.seat.ep, x.device
        biases = [scope.contiguous(value) for value in (*biases, None)[:2]]
        for value in biases:
            if value is not None and (value.shape != (handle.num_tokens, ep.hidden) or value.dtype != x.dtype):
                raise ValueError(f"deep_ep: bias has shape {tuple(value.shape)} of {value.dtype}; it must be "
                                 f"[{handle.num_tokens}, {ep.hidden}] of {x.dtype}")
        y = torch.empty(handle.num_tokens, ep.hidden, dtype=x.dtype, device=device)
        sums = None
        if weights is not None:
            weights = scope.contiguous(weights)
            if weights.dtype != torch.float32 or weights.shape != (handle.num_rows, ep.top_k):
                raise ValueError(f"deep_ep: topk_weights have shape {tuple(weights.shape)} of {weights.dtype}; "
                                 f"they must be [{handle.num_rows}, {ep.top_k}] of float32")
            if ep.executor in self._seats.returns_weights:
                sums = torch.empty(handle.num_tokens, ep.top_k, dtype=torch.float32, device=device)
        return y, sums, weights, biases

    def _combine(self, x: torch.Tensor, handle: NormalHandle, weights: Optional[torch.Tensor], biases: Any,
                 scope: Any) -> Tuple[torch.Tensor, Optional[torch.Tensor], EventOverlap]:
        """Both halves in one call, which is a launch less on a GPU."""
        ep, owned = handle.owned.seat.ep, handle.owned
        y, sums, weights, biases = self._combine_arrays(x, handle, weights, biases, scope)
        given = weights.data_ptr() or 8 if weights is not None and sums is not None else None
        owned.is_idle = False
        scope.allocated()
        ep.combine_raw(owned.handle, _pointer(x), given, _pointer(y), _pointer(sums), [_pointer(b) for b in biases],
                       scope.pointer)
        owned.is_idle = True
        if weights is not None and sums is None:
            sums = self._combine_weights(handle, weights, scope)
        scope.keep(x, y, weights, sums, *biases)
        return y, sums, scope.finish()

    def _combine_begin(self, x: torch.Tensor, handle: NormalHandle, weights: Optional[torch.Tensor], biases: Any,
                       scope: Any) -> Callable[[Any], Tuple[torch.Tensor, Optional[torch.Tensor]]]:
        """The sending half; what it returns, given a scope, is the other one."""
        ep, owned = handle.owned.seat.ep, handle.owned
        y, sums, weights, biases = self._combine_arrays(x, handle, weights, biases, scope)
        given = weights.data_ptr() or 8 if weights is not None and sums is not None else None
        owned.is_idle = False
        scope.allocated()
        ep.combine_send_raw(owned.handle, _pointer(x), given, scope.pointer)

        def finish(here: Any) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
            ep.combine_recv_raw(owned.handle, _pointer(y), _pointer(sums), [_pointer(b) for b in biases], here.pointer)
            owned.is_idle = True
            here.keep(x, y, weights, sums, *biases)
            if weights is not None and sums is None:
                return y, self._combine_weights(handle, weights, here)
            return y, sums
        return finish

    def _combine_weights(self, handle: NormalHandle, weights: torch.Tensor, scope: Any) -> torch.Tensor:
        """The weights [N, K] as rows of their own, fp32 and up to 16 wide, on a twin of the handle: the same sum,
        for executors that do not bring them back beside the rows. Returns [T, K]."""
        top_k = weights.shape[1]
        width = -(-top_k // 16) * 16
        seat, owned, ids = self._twin(handle, ("fp32", width, (16, 0)), weights)
        with scope.current():
            rows = torch.nn.functional.pad(weights, (0, width - top_k)).contiguous()
        nothing = torch.empty(max(handle.num_rows, handle.num_tokens), 16, dtype=torch.uint8, device=weights.device)
        sums = torch.empty(handle.num_tokens, width, dtype=torch.float32, device=weights.device)
        scope.allocated()
        owned.is_idle = False
        if ids is not None:
            seat.ep.send_raw(owned.handle, handle.num_tokens, _pointer(nothing), None, ids.data_ptr() or 8,
                             _ID_TYPES[ids.dtype], None, 0, scope.pointer)
            seat.ep.recv_raw(owned.handle, _pointer(nothing), handle.num_rows, None, None, None, None, None,
                             scope.pointer)
        seat.ep.combine_raw(owned.handle, _pointer(rows), None, _pointer(sums), None, (None, None), scope.pointer)
        owned.is_idle = True
        scope.keep(rows, nothing, sums)
        with scope.current():
            return sums[:, :top_k].contiguous()
