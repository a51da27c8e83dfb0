# SPDX-License-Identifier: Apache-2.0
"""ElasticBuffer: dispatch and combine of DeepEP's V2 interface, on the same machinery."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, List, Optional, Sequence, Tuple, Union

import torch

from .buffer import Buffer
from .events import EventHandle, EventOverlap
from .handles import NormalHandle, Owned
from .layout import version_of
from .normal import Event, Payload, Rows, _pointer
from .seats import Seat, executor_of


@dataclass
class EPHandle:
    """Where the rows of a dispatch went. Fields of upstream whose content is of its kernels only
    (metadata, linked lists) are None."""

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


class ElasticBuffer:
    """One object for prefill and decode. group: a torch process group; num_max_tokens_per_rank, hidden,
    num_topk: shape of the largest call. Arguments about kernels, queue pairs and timeouts of upstream
    are accepted; nearep's own deadline is NEP_TIMEOUT. Placement as in Buffer."""

    def __init__(self, group: Any, num_bytes: Optional[int] = None, num_cpu_bytes: int = 0,
                 num_max_tokens_per_rank: int = 0, hidden: int = 0, num_topk: int = 0,
                 use_fp8_dispatch: bool = False, deterministic: bool = False, allow_hybrid_mode: bool = True,
                 allow_multiple_reduction: bool = True, prefer_overlap_with_compute: bool = True, sl_idx: int = 3,
                 num_allocated_qps: int = 0, num_cpu_timeout_secs: int = 300, num_gpu_timeout_secs: int = 100,
                 explicitly_destroy: bool = False, *, placement: Any = None,
                 ranks_per_node: Optional[Sequence[int]] = None):
        self._buffer = Buffer(group, explicitly_destroy=True, placement=placement,
                              max_tokens=num_max_tokens_per_rank or None, ranks_per_node=ranks_per_node)
        self.explicitly_destroy = explicitly_destroy
        self.num_max_tokens_per_rank, self.hidden, self.num_topk = num_max_tokens_per_rank, hidden, num_topk
        self.group, self.rank_idx, self.num_ranks = group, self._buffer.rank, self._buffer.group_size
        self.num_bytes = num_bytes or self.get_buffer_size_hint(group, num_max_tokens_per_rank, hidden, num_topk)

    @staticmethod
    def get_buffer_size_hint(group: Any, num_max_tokens_per_rank: int, hidden: int, num_topk: int = 0,
                             use_fp8_dispatch: bool = False, **_: Any) -> int:
        """Bytes of what arrives in the worst case; nearep does not need it."""
        return group.size() * num_max_tokens_per_rank * (2 * hidden + 16 * num_topk)

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int, **_: Any) -> int:
        """What Buffer.set_num_sms said."""
        return Buffer.num_sms

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """1: nearep counts its own (NEP_VERBS_QPS)."""
        return 1

    def get_physical_domain_size(self) -> Tuple[int, int]:
        """(ranks of this node, nodes)."""
        topology = self._buffer._comm.topology
        return topology.node_ranks[topology.node], topology.num_nodes

    get_logical_domain_size = get_physical_domain_size

    def get_comm_stream(self) -> torch.cuda.Stream:
        """As Buffer's."""
        return self._buffer.get_comm_stream()

    @staticmethod
    def capture() -> EventHandle:
        """An EventHandle (not an EventOverlap) on the current stream."""
        return EventHandle()

    def barrier(self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = False) -> None:
        """Of the hosts of all ranks."""
        self._buffer._allgather("barrier")

    def destroy(self) -> None:
        """Frees everything. Handles become useless."""
        self._buffer.destroy()

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("engram_", "pp_", "agrs_", "all_gather", "lb_")):
            raise NotImplementedError(f"deep_ep: ElasticBuffer.{name} belongs to another family of calls "
                                      "than dispatch and combine; nearep does not have it")
        raise AttributeError(name)

    @staticmethod
    def _allocates(asked: bool, previous_event: Event, is_async: bool) -> bool:
        """V2's callers ask for it always; it changes something where both streams are named."""
        return asked and is_async and previous_event is not None

    # ---- dispatch -----------------------------------------------------------------------------

    def dispatch(self, x: Rows, topk_idx: Optional[torch.Tensor] = None,
                 topk_weights: Optional[torch.Tensor] = None,
                 cumulative_local_expert_recv_stats: Optional[torch.Tensor] = None,
                 num_experts: Optional[int] = None, num_max_tokens_per_rank: Optional[int] = None,
                 expert_alignment: Optional[int] = None, num_sms: int = 0, num_qps: int = 0,
                 previous_event: Event = None, previous_event_before_epilogue: Event = None,
                 async_with_compute_stream: bool = False, allocate_on_comm_stream: bool = False,
                 handle: Optional[EPHandle] = None, do_handle_copy: bool = True,
                 do_cpu_sync: Optional[bool] = None, do_expand: bool = False, do_zero_padding: bool = False,
                 use_tma_aligned_col_major_sf: bool = False
                 ) -> Tuple[Rows, Optional[torch.Tensor], Optional[torch.Tensor], EPHandle, EventOverlap]:
        """x: [T, H] bf16, or (fp8, scales); topk_idx [T, K]; topk_weights [T, K] f32.

        do_expand: rows grouped by expert, each expert's first row a multiple of expert_alignment, then
        recv_topk_weights is [rows] and recv_topk_idx None; else one row per token. do_cpu_sync=False: no
        list, and outputs for num_max_tokens_per_rank tokens of every rank (None: of the constructor); the
        sums of the handle are on the device all the same. do_zero_padding: rows between experts are zero.

        Returns (recv_x, recv_topk_idx, recv_topk_weights, EPHandle, EventOverlap).
        """
        buffer = self._buffer
        payload = Payload(x)
        with buffer._lock, buffer._streams.on(payload.x, previous_event, async_with_compute_stream,
                                              self._allocates(allocate_on_comm_stream, previous_event,
                                                              async_with_compute_stream)) as scope:
            if handle is not None:
                return self._again(payload, handle, do_zero_padding, scope)
            if topk_idx is None or num_experts is None:
                raise ValueError("deep_ep: a dispatch without a handle needs topk_idx and num_experts")
            ids = topk_idx.clone() if do_handle_copy else topk_idx
            found = self._expanded if do_expand else self._by_rank
            sync = True if do_cpu_sync is None else do_cpu_sync
            most = num_max_tokens_per_rank or self.num_max_tokens_per_rank
            if most and payload.x.shape[0] > most:
                raise ValueError(f"deep_ep: x has {payload.x.shape[0]} tokens, beyond num_max_tokens_per_rank, {most}")
            alignment = expert_alignment or 1
            recv_x, recv_ids, recv_weights, inner, counts = found(
                payload, ids.contiguous(), topk_weights, num_experts, alignment, 0 if sync else most or -1, scope)
            made = EPHandle(do_expand, num_experts, alignment, most, num_sms, ids, [],
                            0 if do_expand else inner.num_rows, inner.num_rows if do_expand else 0, inner=inner)
            self._count(made, counts, cumulative_local_expert_recv_stats, scope)
            if do_expand:
                self._clear_gaps(made, recv_x if do_zero_padding else None, recv_weights, scope)
            return recv_x, recv_ids, recv_weights, made, scope.finish()

    def _count(self, handle: EPHandle, counts: Any, stats: Optional[torch.Tensor], scope: Any) -> None:
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
            handle.num_unaligned_recv_tokens_per_expert = plain
            handle.psum_num_recv_tokens_per_scaleup_rank = by_source.cumsum(0).int()
            handle.psum_num_recv_tokens_per_expert = aligned.cumsum(0).int()
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
            plain: Any = handle.num_unaligned_recv_tokens_per_expert
            at = torch.arange(weights.shape[0], dtype=torch.int32, device=weights.device)
            slot = torch.searchsorted(ends, at, right=True).clamp_(max=ends.numel() - 1)
            begins = torch.nn.functional.pad(ends[:-1], (1, 0))
            is_gap = at >= (begins + plain)[slot]
            weights.masked_fill_(is_gap, 0)
            if x is not None:
                rows = x[0] if isinstance(x, tuple) else x
                rows.view(torch.uint8).masked_fill_(is_gap[:, None], 0)

    def _new(self, payload: Payload, ids: torch.Tensor, weights: Optional[torch.Tensor], num_experts: int, layout: str,
             alignment: int) -> Tuple[Seat, NormalHandle]:
        seats, tokens = self._buffer._seats, payload.x.shape[0]
        most = seats.most(tokens)
        seat = seats.normal(payload.kind, num_experts, ids.shape[1], most, executor_of(payload.x), layout, alignment)
        handle = NormalHandle(Owned(seat), payload.kind, 1)
        handle.routing, handle.num_tokens, handle.most = (ids, version_of(ids), weights), tokens, most
        handle.set_nodes(self._buffer._comm.topology)
        return seat, handle

    @staticmethod
    def _worst(ep: Any, most: int, rows_per_token: int, alignment: int) -> int:
        """Rows for `most` tokens of every rank (-1: of the ep)."""
        rows = most * ep.comm.num_ranks * rows_per_token + ep.slots_per_rank * (alignment - 1)
        return ep.max_rows() if most < 0 else min(ep.max_rows(), -(-rows // alignment) * alignment)

    def _by_rank(self, payload: Payload, ids: torch.Tensor, weights: Optional[torch.Tensor], num_experts: int,
                 _alignment: int, most: int, scope: Any) -> Any:
        """most: 0: counts are waited for; else outputs are for so many tokens of each rank (-1: any)."""
        buffer = self._buffer
        seat, handle = self._new(payload, ids, weights, num_experts, "rank", 0)
        buffer._send(seat, handle.owned, payload, ids, weights, scope)
        worst = self._worst(seat.ep, most, 1, 1) if most else 0
        recv_x, slots, recv_weights, counts = buffer._receive(seat, handle, payload, True, worst, scope)
        return recv_x, slots, recv_weights, handle, counts

    def _expanded(self, payload: Payload, ids: torch.Tensor, weights: Optional[torch.Tensor], num_experts: int,
                  alignment: int, most: int, scope: Any) -> Any:
        """As _by_rank."""
        seat, handle = self._new(payload, ids, weights, num_experts, "packed", alignment)
        self._buffer._send(seat, handle.owned, payload, ids, weights, scope)
        counts = None if most else seat.ep.dispatch_counts(handle.owned.handle)
        handle.num_rows = counts.num_rows if counts is not None else \
            self._worst(seat.ep, most, ids.shape[1], alignment)
        handle.alignment = alignment
        x, scales, row_weights = self._land(seat, handle.owned, handle.num_rows, payload, scope)
        return payload.give(x, scales), None, row_weights, handle, counts

    @staticmethod
    def _land(seat: Seat, owned: Owned, rows: int, payload: Payload, scope: Any
              ) -> Tuple[torch.Tensor, Optional[torch.Tensor], torch.Tensor]:
        x, scales = payload.empty(rows)
        weights = torch.empty(rows, dtype=torch.float32, device=payload.x.device)
        scope.allocated()
        seat.ep.recv_raw(owned.handle, _pointer(x), rows, _pointer(scales), None, _pointer(weights), None, None,
                         scope.pointer)
        owned.is_idle = True
        scope.keep(x, scales, weights)
        return x, scales, weights

    def _again(self, payload: Payload, handle: EPHandle, zero: bool, scope: Any) -> Any:
        inner = handle.inner
        if not handle.do_expand:
            x = self._buffer._dispatch_cached(payload, inner, scope)
            return x[0], None, None, handle, x[5]
        if payload.kind != inner.key:
            raise ValueError("deep_ep: an expanded handle is for the type of x that it was made with")
        self._buffer._send(inner.owned.seat, inner.owned, payload, None, None, scope)
        x, scales, weights = self._land(inner.owned.seat, inner.owned, inner.num_rows, payload, scope)
        self._clear_gaps(handle, x if zero else None, weights, scope)
        return payload.give(x, scales), None, weights, handle, scope.finish()

    # ---- combine ------------------------------------------------------------------------------

    def combine(self, x: torch.Tensor, handle: EPHandle, topk_weights: Optional[torch.Tensor] = None,
                bias: Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor], None] = None, num_sms: int = 0,
                num_qps: int = 0, previous_event: Event = None, previous_event_before_epilogue: Event = None,
                async_with_compute_stream: bool = False, allocate_on_comm_stream: bool = False
                ) -> Tuple[torch.Tensor, Optional[torch.Tensor], EventOverlap]:
        """Sums the rows of each token, unweighted (the experts have weighed them). Returns (combined_x
        [T, H], combined_topk_weights or None, EventOverlap)."""
        if not handle.do_expand:
            return self._buffer.combine(x, handle.inner, topk_weights, bias, None, previous_event,
                                        async_with_compute_stream,
                                        self._allocates(allocate_on_comm_stream, previous_event,
                                                        async_with_compute_stream))
        if topk_weights is not None:
            raise NotImplementedError("deep_ep: topk_weights come back from dispatches without do_expand")
        with self._buffer._lock, self._buffer._streams.on(x, previous_event,
                                                          async_with_compute_stream) as scope:
            return self._combine_expanded(x, handle, bias, scope)

    def _ones(self, handle: EPHandle, x: torch.Tensor) -> Tuple[Owned, Optional[int]]:
        """nearep weighs the rows of expert layouts itself: what to combine with so that all weights are one,
        and their address. One node: the handle itself; several: the routing again without weights."""
        inner = handle.inner
        ep = inner.owned.seat.ep
        if self._buffer._seats.weighs_late:
            if inner.ones is None:
                inner.ones = torch.ones(inner.num_tokens, ep.top_k, device=x.device)
            return inner.owned, inner.ones.data_ptr() or 8
        if "ones" not in inner.twins:
            seat = self._buffer._seats.normal((ep.dtype, ep.hidden, (16, 0)), handle.num_experts, ep.top_k,
                                              inner.most, executor_of(x), "packed", inner.alignment)
            inner.twins["ones"] = Owned(seat)
            nothing = torch.zeros(inner.num_tokens, 16, dtype=torch.uint8, device=x.device)
            payload = Payload((nothing, torch.zeros(inner.num_tokens, 0, device=x.device)))
            with self._buffer._streams.on(x) as scope:
                ids = handle.topk_idx
                self._buffer._send(seat, inner.twins["ones"], payload, ids, None, scope)
                rows = torch.empty(inner.num_rows, 16, dtype=torch.uint8, device=x.device)
                seat.ep.recv_raw(inner.twins["ones"].handle, _pointer(rows), inner.num_rows, None, None, None,
                                 None, None, scope.pointer)
            inner.twins["ones"].is_idle = True
        return inner.twins["ones"], None

    def _combine_expanded(self, x: torch.Tensor, handle: EPHandle, bias: Any, scope: Any) -> Any:
        inner = handle.inner
        ep = inner.owned.seat.ep
        if tuple(x.shape) != (inner.num_rows, ep.hidden) or not x.is_contiguous():
            raise ValueError(f"deep_ep: x has shape {tuple(x.shape)}; combine needs contiguous rows "
                             f"[{inner.num_rows}, {ep.hidden}]")
        owned, weights = self._ones(handle, x)
        biases = list(bias) if isinstance(bias, (tuple, list)) else [bias]
        y = torch.empty(inner.num_tokens, ep.hidden, dtype=x.dtype, device=x.device)
        owned.is_idle = False
        scope.allocated()
        owned.seat.ep.combine_send_raw(owned.handle, _pointer(x), None, scope.pointer, weights)
        owned.seat.ep.combine_recv_raw(owned.handle, _pointer(y), None,
                                       [_pointer(b) for b in (biases + [None])[:2]], scope.pointer)
        owned.is_idle = True
        scope.keep(x, y, inner.ones, *biases)
        return y, None, scope.finish()
