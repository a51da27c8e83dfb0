# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine of V2 and V2.5 in two halves: what sends, and what receives. A call runs both, or
leaves the second to whoever waits for its event. By token: one row for each rank that needs it; expanded:
one for each expert, grouped by expert."""
from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Callable, List, Optional, Tuple

import torch

from .handles import NormalHandle, Owned
from .layout import version_of
from .normal import _ID_TYPES, Payload, Rows, _pointer
from .rows import columns_for, element_size
from .seats import executor_of

Result = Tuple[Any, ...]
Finish = Callable[[Any], Result]  # given the scope that it runs in


@dataclass
class EPHandle:
    """Where the rows of a dispatch went. Fields of upstream whose content is of its kernels only
    (metadata, linked lists) are None.

    psum_num_recv_tokens_per_expert [L]: by token, sums of the counts rounded up to the alignment;
    expanded, where each expert's rows end: that rounded up is where the next one's start.
    """

    do_expand: bool
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: torch.Tensor
    num_recv_tokens_per_expert_list: List[int]
    num_recv_tokens: int
    num_expanded_tokens: int
    psum_num_recv_tokens_per_scaleup_rank: Optional[torch.Tensor] = None
    psum_num_recv_tokens_per_expert: Optional[torch.Tensor] = None
    num_unaligned_recv_tokens_per_expert: Optional[torch.Tensor] = None
    recv_src_metadata: Any = None
    dst_buffer_slot_idx: Any = None
    token_metadata_at_forward: Any = None
    channel_linked_list: Any = None
    inner: Any = None  # nearep's


@dataclass
class Wish:
    """What a dispatch asks for besides the tokens. most: tokens of any rank, 0: not said."""

    num_experts: int = 0
    most: int = 0
    alignment: int = 1
    num_sms: int = 0
    expand: bool = False
    sync: bool = True
    zero: bool = False
    aligned_scales: bool = False
    stats: Optional[torch.Tensor] = None


class Deferred:
    """The second half of an operation: run when its event is waited for, or before the next operation."""

    def __init__(self, pending: List["Deferred"], work: Callable[[], Result]):
        self._pending, self._work = pending, work
        self._result: Result = ()
        pending.append(self)

    def run(self) -> Result:
        """Its result; what was deferred earlier comes first."""
        while self in self._pending:
            first = self._pending.pop(0)
            first._result = first._work()
        return self._result


class Halves:
    """The operations of one ElasticBuffer or EPBuffer on its Buffer."""

    def __init__(self, buffer: Any):
        self._buffer = buffer
        self._pending: List[Deferred] = []

    def run(self, tensor: torch.Tensor, events: Tuple[Any, bool, bool], start: Callable[[Any, bool], Finish],
            defers: bool) -> Any:
        """start(scope, is_whole) sends; what it returns receives. events: previous_event, whether the compute
        stream goes on, allocate_on_comm_stream."""
        previous, is_async, allocate = events
        if defers and not is_async:
            raise ValueError("deep_ep: defer_epilogue needs async_with_compute_stream=True")
        buffer = self._buffer
        with buffer._lock:
            buffer._check_alive()
            while self._pending:
                self._pending[-1].run()
            # V2's callers always ask for it; it changes something where both streams are named
            allocate = allocate and is_async and previous is not None
            with buffer._streams.on(tensor, previous, is_async, allocate) as scope:
                finish = start(scope, not defers)
                if not defers:
                    return (*finish(scope), scope.finish())
                event = scope.finish()

            def later() -> Result:
                with buffer._lock, buffer._streams.on(tensor) as here:
                    result = finish(here)
                    here.finish()
                    return result
            event.register_hook_after_wait(Deferred(self._pending, later).run)
            return event

    # ---- dispatch -----------------------------------------------------------------------------

    def dispatch(self, payload: Payload, ids: torch.Tensor, weights: Optional[torch.Tensor], wish: Wish, scope: Any,
                 _is_whole: bool) -> Finish:
        """A fresh one."""
        seats, tokens = self._buffer._seats, payload.x.shape[0]
        ids, most = ids.contiguous(), seats.most(tokens)
        seat = seats.normal(payload.kind, wish.num_experts, ids.shape[1], most, executor_of(payload.x),
                            "packed" if wish.expand else "rank", wish.alignment if wish.expand else 0,
                            wish.aligned_scales and payload.scales is not None and
                            element_size(payload.scales.dtype) == 4)
        inner = NormalHandle(Owned(seat), payload.kind, 1)
        inner.routing, inner.num_tokens, inner.most = (ids, version_of(ids), weights), tokens, most
        inner.alignment = wish.alignment
        inner.set_nodes(self._buffer._comm.topology)
        self._buffer._send(seat, inner.owned, payload, ids, weights, scope)
        return functools.partial(self._finish_dispatch, payload, inner, wish)

    def _finish_dispatch(self, payload: Payload, inner: NormalHandle, wish: Wish, scope: Any) -> Result:
        ep, ids = inner.owned.seat.ep, inner.routing[0]
        per_token = ids.shape[1] if wish.expand else 1
        worst = 0 if wish.sync else self._worst(ep, wish, per_token)
        if wish.expand:
            slots = None
            counts = ep.dispatch_counts(inner.owned.handle) if wish.sync else None
            inner.num_rows = worst if counts is None else counts.num_rows
            x, weights = self._land(inner.owned, inner.num_rows, payload, scope)
        else:
            x, slots, weights, counts = self._buffer._receive(inner.owned.seat, inner, payload, True, worst, scope)
        made = EPHandle(wish.expand, wish.num_experts, wish.alignment, wish.most, wish.num_sms, ids, [],
                        0 if wish.expand else inner.num_rows, inner.num_rows if wish.expand else 0, inner=inner)
        self._count(made, counts, wish.stats, scope)
        if wish.expand:
            self._clear_gaps(made, x if wish.zero else None, weights, scope)
        return self._given(x, wish, scope), slots, weights, made

    @staticmethod
    def _worst(ep: Any, wish: Wish, rows_per_token: int) -> int:
        """Rows for so many tokens of every rank."""
        align = wish.alignment if wish.expand else 1
        if not wish.most:
            return ep.max_rows()
        rows = wish.most * ep.comm.num_ranks * rows_per_token + ep.slots_per_rank * (align - 1)
        return min(ep.max_rows(), -(-rows // align) * align)

    @staticmethod
    def _land(owned: Owned, rows: int, payload: Payload, scope: Any) -> Tuple[Rows, torch.Tensor]:
        """Expanded rows, and the weight of each."""
        x, scales = payload.empty(rows, owned.seat, scope)
        weights = torch.empty(rows, dtype=torch.float32, device=payload.x.device)
        scope.allocated()
        owned.seat.ep.recv_raw(owned.handle, _pointer(x), rows, _pointer(scales), None, _pointer(weights), None, None,
                               scope.pointer)
        owned.is_idle = True
        scope.keep(x, scales, weights)
        return payload.give(x, scales), weights

    @staticmethod
    def _given(x: Rows, wish: Wish, scope: Any) -> Rows:
        """Scales as asked for; they came so unless a handle was made for the other order, or types are odd."""
        if not isinstance(x, tuple) or x[1].numel() == 0:
            return x
        scales = x[1]
        is_aligned = scales.stride(0) == 1 and scales.shape[1] > 1
        if wish.aligned_scales == is_aligned:
            return x
        with scope.current():
            if wish.aligned_scales:
                scales = columns_for(scales.shape[0], scales.shape[1], scales.dtype, scales.device).copy_(scales)
            else:
                scales = scales.contiguous()
        scope.keep(scales)
        return x[0], scales

    @staticmethod
    def _count(handle: EPHandle, counts: Any, stats: Optional[torch.Tensor], scope: Any) -> None:
        """The handle's list and sums; without counts on the host, sums of what kernels wrote."""
        inner, device, align = handle.inner, handle.topk_idx.device, handle.expert_alignment
        ep = inner.owned.seat.ep
        with scope.current():
            if counts is None and handle.topk_idx.is_cuda:
                plain, by_source = (torch.as_tensor(memory, device=device).view(torch.int32).clone()
                                    for memory in ep.device_counts(inner.owned.handle))
            else:
                known = counts if counts is not None else ep.dispatch_counts(inner.owned.handle)
                plain = torch.tensor(known.rows_per_slot, dtype=torch.int32, device=device)
                by_source = torch.tensor(known.rows_per_source, dtype=torch.int32, device=device)
            aligned = torch.div(plain + (align - 1), align, rounding_mode="floor") * align
            sums = aligned.cumsum(0)
            handle.num_unaligned_recv_tokens_per_expert = plain
            handle.psum_num_recv_tokens_per_scaleup_rank = by_source.cumsum(0).int()
            handle.psum_num_recv_tokens_per_expert = (sums - aligned + plain if handle.do_expand else sums).int()
            if stats is not None:
                stats += plain
        if counts is not None:
            handle.num_recv_tokens_per_expert_list = [-(-num // align) * align for num in counts.rows_per_slot]
        scope.keep(plain, handle.psum_num_recv_tokens_per_scaleup_rank, handle.psum_num_recv_tokens_per_expert)

    @staticmethod
    def _clear_gaps(handle: EPHandle, x: Optional[Rows], weights: torch.Tensor, scope: Any) -> None:
        """Zeros in the rows [rows, ...] between experts and behind them; executors may write anything there."""
        with scope.current():
            ends: Any = handle.psum_num_recv_tokens_per_expert
            starts = ends - handle.num_unaligned_recv_tokens_per_expert
            at = torch.arange(weights.shape[0], dtype=torch.int32, device=weights.device)
            is_gap = at >= ends[torch.searchsorted(starts, at, right=True) - 1]
            weights.masked_fill_(is_gap, 0)
            if x is not None:
                rows = x[0] if isinstance(x, tuple) else x
                rows.view(torch.uint8).masked_fill_(is_gap[:, None], 0)

    def dispatch_again(self, payload: Payload, handle: EPHandle, weights: Optional[torch.Tensor], wish: Wish,
                       scope: Any, is_whole: bool) -> Finish:
        """With the routing of a handle."""
        inner, buffer = handle.inner, self._buffer
        if payload.x.shape[0] != inner.num_tokens:
            raise ValueError(f"deep_ep: x has {payload.x.shape[0]} tokens; the dispatch of this handle had "
                             f"{inner.num_tokens}")
        if handle.do_expand and payload.kind != inner.key:
            raise ValueError("deep_ep: an expanded handle is for the type of x that it was made with")
        if not handle.do_expand and is_whole and weights is None:
            def whole(here: Any) -> Result:
                x = buffer._dispatch_cached(payload, inner, here)[0]
                return self._given(x, wish, here), None, None, handle
            return whole
        seat, owned, ids = buffer._twin(inner, payload.kind, payload.x)
        buffer._send(seat, owned, payload, ids, weights if ids is None or weights is not None else inner.routing[2],
                     scope)
        return functools.partial(self._finish_again, payload, handle, owned, weights is not None, wish)

    def _finish_again(self, payload: Payload, handle: EPHandle, owned: Owned, has_weights: bool, wish: Wish, scope: Any
                      ) -> Result:
        inner, ep = handle.inner, owned.seat.ep
        weights: Optional[torch.Tensor] = None
        if handle.do_expand:
            x, weights = self._land(owned, inner.num_rows, payload, scope)
            self._clear_gaps(handle, x if wish.zero else None, weights, scope)
            return self._given(x, wish, scope), None, weights, handle
        rows, scales = payload.empty(inner.num_rows, owned.seat, scope)
        if has_weights:
            weights = torch.empty(inner.num_rows, ep.top_k, dtype=torch.float32, device=rows.device)
        scope.allocated()
        ep.recv_raw(owned.handle, _pointer(rows), inner.num_rows, _pointer(scales), None, _pointer(weights), None, None,
                    scope.pointer)
        owned.is_idle = True
        scope.keep(rows, scales, weights)
        return self._given(payload.give(rows, scales), wish, scope), None, weights, handle

    # ---- combine ------------------------------------------------------------------------------

    def combine(self, x: torch.Tensor, handle: EPHandle, weights: Optional[torch.Tensor], bias: Any, scope: Any,
                is_whole: bool) -> Finish:
        """By token: x [N, H], weights [N, K]; expanded: x [rows, H], weights [rows]."""
        biases = bias if isinstance(bias, (tuple, list)) else (bias, None)
        if not handle.do_expand:
            self._buffer._check_combine(x, handle.inner)
            if is_whole:
                return lambda here: self._buffer._combine(x, handle.inner, weights, biases, here)[:2]
            return self._buffer._combine_begin(x, handle.inner, weights, biases, scope)
        inner = handle.inner
        ep = inner.owned.seat.ep
        if tuple(x.shape) != (inner.num_rows, ep.hidden) or not x.is_contiguous():
            raise ValueError(f"deep_ep: x has shape {tuple(x.shape)}; combine needs contiguous rows "
                             f"[{inner.num_rows}, {ep.hidden}]")
        if weights is not None and (weights.shape != (inner.num_rows,) or weights.dtype != torch.float32):
            raise ValueError(f"deep_ep: topk_weights have shape {tuple(weights.shape)} of {weights.dtype}; an expanded "
                             f"combine needs one for each row, [{inner.num_rows}] of float32")
        owned, ones = self._ones(handle, x, scope)
        biases = [scope.contiguous(value) for value in biases]
        y = torch.empty(inner.num_tokens, ep.hidden, dtype=x.dtype, device=x.device)
        owned.is_idle = False
        scope.allocated()
        owned.seat.ep.combine_send_raw(owned.handle, _pointer(x), None, scope.pointer, ones)

        def finish(here: Any) -> Result:
            owned.seat.ep.combine_recv_raw(owned.handle, _pointer(y), None, [_pointer(b) for b in biases], here.pointer)
            owned.is_idle = True
            here.keep(x, y, inner.ones, *biases)
            return y, None if weights is None else self._weights_back(handle, weights, here)
        return finish

    def _ones(self, handle: EPHandle, x: torch.Tensor, scope: Any) -> Tuple[Owned, Optional[int]]:
        """nearep weighs the rows of expert layouts itself: what to combine with so that all weights are one,
        and their address. One node: the handle itself; several: the routing again without weights."""
        inner = handle.inner
        ep = inner.owned.seat.ep
        if self._buffer._seats.weighs_late:
            if inner.ones is None:
                inner.ones = torch.ones(inner.num_tokens, ep.top_k, dtype=torch.float32, device=x.device)
            return inner.owned, inner.ones.data_ptr() or 8
        if "ones" not in inner.twins:
            owned = self._carrier(handle, (ep.dtype, ep.hidden, (16, 0)), x)
            self._carry(handle, owned, True, None, scope)
            inner.twins["ones"] = owned
        return inner.twins["ones"], None

    def _carrier(self, handle: EPHandle, kind: Any, x: torch.Tensor) -> Owned:
        """A handle to route as the expanded one was, on an ep whose dispatched rows are 16 bytes of nothing."""
        inner = handle.inner
        return Owned(self._buffer._seats.normal(kind, handle.num_experts, inner.owned.seat.ep.top_k, inner.most,
                                                executor_of(x), "packed", inner.alignment))

    @staticmethod
    def _carry(handle: EPHandle, owned: Owned, is_first: bool, weights: Optional[torch.Tensor], scope: Any
               ) -> torch.Tensor:
        """Dispatches nothing with these weights [T, K] (None: 1); returns those that come, [rows]."""
        inner, ids, ep = handle.inner, handle.topk_idx.contiguous(), owned.seat.ep
        most = max(inner.num_tokens, inner.num_rows)
        nothing = torch.zeros(most, 16, dtype=torch.uint8, device=ids.device)
        rows = torch.empty(inner.num_rows, 16, dtype=torch.uint8, device=ids.device)
        came = torch.empty(inner.num_rows, dtype=torch.float32, device=ids.device)
        owned.is_idle = False
        scope.allocated()
        routed = (ids.data_ptr() or 8) if is_first else None
        ep.send_raw(owned.handle, inner.num_tokens, _pointer(nothing), None, routed, _ID_TYPES[ids.dtype],
                    None if weights is None else weights.data_ptr() or 8, 0, scope.pointer)
        ep.recv_raw(owned.handle, _pointer(rows), inner.num_rows, None, None, _pointer(came), None, None, scope.pointer)
        owned.is_idle = True
        scope.keep(ids, nothing, rows, came, weights)
        return came

    def _weights_back(self, handle: EPHandle, weights: torch.Tensor, scope: Any) -> torch.Tensor:
        """[T, K] the weights [rows] of expanded rows at home: as rows that are 0 but for the place k of the pair.
        Which k a row is of is asked once for a handle."""
        inner, top_k = handle.inner, handle.topk_idx.shape[1]
        width = -(-top_k // 16) * 16
        if "weights" not in inner.twins:
            owned = self._carrier(handle, ("fp32", width, (16, 0)), weights)
            with scope.current():
                numbers = torch.arange(top_k, dtype=torch.float32, device=weights.device)
                numbers = numbers.expand(inner.num_tokens, top_k).contiguous()
            came = self._carry(handle, owned, True, numbers, scope)
            self._clear_gaps(handle, None, came, scope)
            with scope.current():
                inner.row_k = came.long()
                ones = torch.ones_like(numbers)
            self._carry(handle, owned, False, ones, scope)
            inner.twins["weights"] = owned
        owned = inner.twins["weights"]
        with scope.current():
            rows = torch.zeros(inner.num_rows, width, dtype=torch.float32, device=weights.device)
            rows.scatter_(1, inner.row_k[:, None], weights[:, None])
        sums = torch.empty(inner.num_tokens, width, dtype=torch.float32, device=weights.device)
        owned.is_idle = False
        scope.allocated()
        owned.seat.ep.combine_raw(owned.handle, _pointer(rows), None, _pointer(sums), None, (None, None), scope.pointer)
        owned.is_idle = True
        scope.keep(rows, sums, inner.row_k)
        with scope.current():
            return sums[:, :top_k].contiguous()
