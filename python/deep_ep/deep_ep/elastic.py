# SPDX-License-Identifier: Apache-2.0
"""ElasticBuffer and EPBuffer: dispatch and combine of DeepEP's V2 and V2.5 interfaces, on the same machinery."""
from __future__ import annotations

import functools
from typing import Any, List, Optional, Sequence, Tuple, Union

import torch

from .buffer import Buffer
from .events import EventHandle, EventOverlap
from .halves import EPHandle, Halves, Wish
from .lb import BufferAllocator, LoadBalance
from .normal import Event, Payload, Rows

Bias = Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor], None]


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
        self.num_bytes = num_bytes or self.get_buffer_size_hint(group, num_max_tokens_per_rank, hidden, num_topk)
        self._buffer = Buffer(group, self.num_bytes // 128 * 128, explicitly_destroy=True, placement=placement,
                              max_tokens=num_max_tokens_per_rank or None, ranks_per_node=ranks_per_node)
        self._halves = Halves(self._buffer)
        self.explicitly_destroy = explicitly_destroy
        self.num_max_tokens_per_rank, self.hidden, self.num_topk = num_max_tokens_per_rank, hidden, num_topk
        self.group, self.rank_idx, self.num_ranks = group, self._buffer.rank, self._buffer.group_size
        self.num_rdma_ranks, self.num_nvlink_ranks = self.get_physical_domain_size()
        self.num_scaleout_ranks, self.num_scaleup_ranks = self.get_logical_domain_size()
        topology = self._buffer._comm.topology
        self.scaleout_rank_idx, self.scaleup_rank_idx = topology.node, topology.local

    @property
    def runtime(self) -> Any:
        """None once it is destroyed."""
        return self._buffer.runtime

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
        """(nodes, ranks of this node): upstream's RDMA and NVLink ranks."""
        topology = self._buffer._comm.topology
        return topology.num_nodes, topology.node_ranks[topology.node]

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
            raise NotImplementedError(f"deep_ep: {type(self).__name__}.{name} belongs to another family of calls "
                                      "than dispatch and combine; nearep does not have it")
        raise AttributeError(name)

    # ---- dispatch and combine -----------------------------------------------------------------

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
        use_tma_aligned_col_major_sf: received scales [N, S] have tokens contiguous and columns at
        multiples of 16 bytes. handle: its routing again, without topk_idx; topk_weights may be new.

        Returns (recv_x, recv_topk_idx, recv_topk_weights, EPHandle, EventOverlap).
        """
        wish = Wish(num_experts or 0, num_max_tokens_per_rank or self.num_max_tokens_per_rank, expert_alignment or 1,
                    num_sms, do_expand, do_cpu_sync is None or do_cpu_sync, do_zero_padding,
                    use_tma_aligned_col_major_sf, cumulative_local_expert_recv_stats)
        events = (previous_event, async_with_compute_stream, allocate_on_comm_stream)
        return self._dispatch(x, topk_idx, topk_weights, handle, do_handle_copy, wish, events, False)

    def _dispatch(self, x: Rows, topk_idx: Optional[torch.Tensor], topk_weights: Optional[torch.Tensor],
                  handle: Optional[EPHandle], copies: bool, wish: Wish, events: Tuple[Any, bool, bool], defers: bool
                  ) -> Any:
        payload = Payload(x)
        if handle is not None:
            if topk_idx is not None:
                raise ValueError("deep_ep: a dispatch with a handle takes no topk_idx")
            start: Any = functools.partial(self._halves.dispatch_again, payload, handle, topk_weights, wish)
            return self._halves.run(payload.x, events, start, defers)
        if topk_idx is None or not wish.num_experts:
            raise ValueError("deep_ep: a dispatch without a handle needs topk_idx and num_experts")
        if wish.most and payload.x.shape[0] > wish.most:
            raise ValueError(f"deep_ep: x has {payload.x.shape[0]} tokens, beyond num_max_tokens_per_rank, {wish.most}")
        ids = topk_idx.clone() if copies else topk_idx
        start = functools.partial(self._halves.dispatch, payload, ids, topk_weights, wish)
        return self._halves.run(payload.x, events, start, defers)

    def combine(self, x: torch.Tensor, handle: EPHandle, topk_weights: Optional[torch.Tensor] = None,
                bias: Bias = None, num_sms: int = 0, num_qps: int = 0, previous_event: Event = None,
                previous_event_before_epilogue: Event = None, async_with_compute_stream: bool = False,
                allocate_on_comm_stream: bool = False
                ) -> Tuple[torch.Tensor, Optional[torch.Tensor], EventOverlap]:
        """Sums the rows of each token, unweighted (the experts have weighed them). topk_weights: [N, K], or
        [rows] of an expanded dispatch. Returns (combined_x [T, H], combined_topk_weights [T, K] or None,
        EventOverlap)."""
        return self._combine(x, handle, topk_weights, bias,
                             (previous_event, async_with_compute_stream, allocate_on_comm_stream), False)

    def _combine(self, x: torch.Tensor, handle: EPHandle, weights: Optional[torch.Tensor], bias: Bias,
                 events: Tuple[Any, bool, bool], defers: bool) -> Any:
        start = functools.partial(self._halves.combine, x, handle, weights, bias)
        return self._halves.run(x, events, start, defers)


class EPBuffer(ElasticBuffer):
    """V2.5: the same operations, their second halves put off where the caller wants it, and redundant experts.
    lb_allocation_plan_or_num_bytes: accepted; any tensors do for lb_prefetch_weights and lb_reduce_grads."""

    def __init__(self, group: Any, num_bytes: Optional[int] = None, num_max_tokens_per_rank: int = 0,
                 hidden: int = 0, num_topk: int = 0, use_fp8_dispatch: bool = False,
                 lb_allocation_plan_or_num_bytes: Union[BufferAllocator, int] = 0, deterministic: bool = False,
                 allow_hybrid_mode: bool = True, allow_multiple_reduction: bool = True,
                 prefer_overlap_with_compute: bool = True, sl_idx: Optional[int] = None,
                 num_allocated_qps: int = 0, num_cpu_timeout_secs: int = 300, num_gpu_timeout_secs: int = 100,
                 explicitly_destroy: bool = False, *, placement: Any = None,
                 ranks_per_node: Optional[Sequence[int]] = None):
        super().__init__(group, num_bytes, num_max_tokens_per_rank=num_max_tokens_per_rank, hidden=hidden,
                         num_topk=num_topk, explicitly_destroy=explicitly_destroy, placement=placement,
                         ranks_per_node=ranks_per_node)
        plan = lb_allocation_plan_or_num_bytes
        self.num_lb_bytes = plan if isinstance(plan, int) else plan.num_bytes
        self._lb = LoadBalance(self._buffer)

    def dispatch(self, x: Rows, topk_idx: Optional[torch.Tensor] = None,  # type: ignore[override]
                 topk_weights: Optional[torch.Tensor] = None,
                 cumulative_local_expert_recv_stats: Optional[torch.Tensor] = None,
                 num_experts: Optional[int] = None, num_max_tokens_per_rank: Optional[int] = None,
                 expert_alignment: Optional[int] = None, num_sms: int = 0, num_qps: int = 0,
                 previous_event: Event = None, async_with_compute_stream: bool = False,
                 allocate_on_comm_stream: bool = False, handle: Optional[EPHandle] = None,
                 do_handle_copy: bool = False, do_cpu_sync: Optional[bool] = None, do_expand: bool = False,
                 do_zero_padding: bool = False, use_tma_aligned_col_major_sf: bool = False,
                 defer_epilogue: bool = False) -> Any:
        """As ElasticBuffer's; topk_idx is kept by reference and must stay as it is. defer_epilogue (with
        async_with_compute_stream): returns an EventOverlap alone, whose wait() receives and gives (recv_x,
        recv_topk_idx, recv_topk_weights, handle); the next operation of this buffer receives before it."""
        if do_handle_copy:
            raise ValueError("deep_ep: do_handle_copy must be False: EPBuffer keeps topk_idx by reference")
        wish = Wish(num_experts or 0, num_max_tokens_per_rank or self.num_max_tokens_per_rank, expert_alignment or 1,
                    num_sms, do_expand, do_cpu_sync is None or do_cpu_sync, do_zero_padding,
                    use_tma_aligned_col_major_sf, cumulative_local_expert_recv_stats)
        events = (previous_event, async_with_compute_stream, allocate_on_comm_stream)
        return self._dispatch(x, topk_idx, topk_weights, handle, False, wish, events, defer_epilogue)

    def combine(self, x: torch.Tensor, handle: EPHandle,  # type: ignore[override]
                topk_weights: Optional[torch.Tensor] = None, bias: Bias = None, num_sms: int = 0, num_qps: int = 0,
                previous_event: Event = None, async_with_compute_stream: bool = False,
                allocate_on_comm_stream: bool = False, defer_epilogue: bool = False) -> Any:
        """As ElasticBuffer's; defer_epilogue: an EventOverlap whose wait() gives (combined_x,
        combined_topk_weights)."""
        return self._combine(x, handle, topk_weights, bias,
                             (previous_event, async_with_compute_stream, allocate_on_comm_stream), defer_epilogue)

    def lb_get_theoretical_num_sms(self) -> int:
        """What Buffer.set_num_sms said."""
        return Buffer.num_sms

    def lb_prefetch_weights(self, redundant_expert_weights: Union[torch.Tensor, Sequence[torch.Tensor]],
                            expert_weights: Union[torch.Tensor, Sequence[torch.Tensor]],
                            redundancy_mapping: torch.Tensor, num_sms: int = 0, previous_event: Event = None
                            ) -> EventOverlap:
        """Collective: this rank's experts into the redundant slots that ask for them. redundant_expert_weights:
        each [C, ...], contiguous, written where the mapping has an expert; expert_weights: each [L, ...] with as
        many bytes an expert; redundancy_mapping [R, C] int32, equal on all ranks: expert r * L + l, or -1."""
        return self._lb.prefetch(_several(redundant_expert_weights), _several(expert_weights), redundancy_mapping,
                                 previous_event)

    def lb_reduce_grads(self, redundant_expert_grads: torch.Tensor, expert_grads: torch.Tensor,
                        redundancy_mapping: torch.Tensor, num_sms: int = 0, previous_event: Event = None
                        ) -> EventOverlap:
        """Collective, the way back: adds the gradients [C, n] f32 of redundant slots to expert_grads [L, n] f32 of
        the ranks that own the experts."""
        return self._lb.reduce(redundant_expert_grads, expert_grads, redundancy_mapping, previous_event)


def _several(tensors: Union[torch.Tensor, Sequence[torch.Tensor]]) -> List[torch.Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
