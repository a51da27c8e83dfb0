# SPDX-License-Identifier: Apache-2.0
"""Buffer: DeepEP's V1 interface on nearep.

Letters: T tokens here, N rows received, H hidden, K top-k, E experts, R ranks, L experts (slots) of a
rank, M num_max_dispatch_tokens_per_rank.
"""
from __future__ import annotations

import functools
import threading
from typing import Any, Callable, List, Optional, Sequence, Tuple

import nearep
import torch

from . import config as configs
from .config import Config
from .events import EventHandle, EventOverlap, Streams
from .layout import Routing, contiguous_layout, mapped_layout
from .low_latency import LowLatency
from .normal import Event, Normal
from .rows import element_size
from .seats import Seats

topk_idx_t = torch.int64


class _Runtime:
    """What is read of upstream's C++ object."""

    def __init__(self, comm: nearep.Comm):
        self._comm = comm

    def is_available(self) -> bool:
        return True

    def get_num_rdma_ranks(self) -> int:
        return self._comm.topology.num_nodes

    def get_rdma_rank(self) -> int:
        return self._comm.topology.node

    def get_root_rdma_rank(self, _global: bool = False) -> int:
        return 0

    def is_internode_available(self) -> bool:
        return self._comm.topology.num_nodes > 1

    def get_local_device_id(self) -> int:
        return torch.cuda.current_device() if torch.cuda.is_available() else -1


def locked(method: Callable[..., Any]) -> Callable[..., Any]:
    """One operation of a buffer at a time: threads of dual-batch overlap share one."""
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            if self.runtime is None:
                raise RuntimeError("deep_ep: this Buffer is destroyed")
            return method(self, *args, **kwargs)
    return call


class Buffer(Normal, LowLatency):
    """Expert-parallel communication of one group: normal calls for training and prefill, low-latency
    calls for decode, in one object and in any order.

    group: a torch process group of any backend, or None with comm, an mpi4py communicator.
    num_nvl_bytes, num_rdma_bytes: multiples of 128. On a GPU the first is what received rows of normal calls
    may take in memory that the node maps, for each type of x; nearep sizes all else by itself.
    low_latency_mode, num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl, use_fabric: kept or
    ignored; transports are chosen by nearep (NEP_INTER, NEP_VERBS_QPS).
    explicitly_destroy: destroy() must be called; without it the buffer frees itself.
    enable_shrink: the mask calls may be used.

    Beyond upstream: placement, a nearep.Map (replicas too): expert ids are logical, received ids are
    slots; max_tokens: a promise of the most tokens of a normal call on any rank, which saves an exchange
    of sizes in each fresh dispatch (without it room is made as batches grow); ranks_per_node: emulate nodes.
    """

    num_sms = 20
    _asked_sms = 0

    def __init__(self, group: Any, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0, low_latency_mode: bool = False,
                 num_qps_per_rank: int = 24, allow_nvlink_for_low_latency_mode: bool = True,
                 allow_mnnvl: bool = False, use_fabric: bool = False, explicitly_destroy: bool = False,
                 enable_shrink: bool = False, comm: Any = None, num_nvl_peers: Optional[int] = None, *,
                 placement: Optional[nearep.Map] = None, max_tokens: Optional[int] = None,
                 ranks_per_node: Optional[Sequence[int]] = None):
        for name, size in (("num_nvl_bytes", num_nvl_bytes), ("num_rdma_bytes", num_rdma_bytes)):
            if size < 0 or size % 128:
                raise ValueError(f"deep_ep: {name} is {size}; it must be a multiple of 128")
        if (group is None) == (comm is None):
            raise ValueError("deep_ep: give either group (torch) or comm (mpi4py)")
        if group is not None:
            self._comm = nearep.Comm.from_torch(group, ranks_per_node=ranks_per_node)
        else:
            self._comm = nearep.Comm.from_mpi(comm, ranks_per_node=ranks_per_node)
        self.rank, self.group_size = self._comm.rank, self._comm.num_ranks
        self.group = group
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.explicitly_destroy = low_latency_mode, explicitly_destroy
        self.num_qps_per_rank, self.enable_shrink = num_qps_per_rank, enable_shrink
        self.runtime = _Runtime(self._comm)
        self._gather = comm.allgather if group is None else None
        self._seats = Seats(self._comm, placement, max_tokens)
        self._seats.num_sms = self._asked_sms
        self._seats.receive_bytes = num_nvl_bytes // 4096 * 4096
        self._streams = Streams()
        self._lock = threading.RLock()
        self._init_low_latency()

    def _allgather(self, value: Any) -> List[Any]:
        """[R] the ranks' values; no call of the path."""
        if self._gather is not None:
            return self._gather(value)
        import torch.distributed as dist
        parts: List[Any] = [None] * self.group_size
        with torch.inference_mode(False):  # gloo cannot write to tensors made in it
            dist.all_gather_object(parts, value, group=self.group)
        return parts

    def destroy(self) -> None:
        """Frees everything; legal with explicitly_destroy=True alone. Handles become useless."""
        if not self.explicitly_destroy:
            raise RuntimeError("deep_ep: destroy() needs explicitly_destroy=True in the constructor")
        with self._lock:
            self.runtime = None
            self._seats.close()

    # ---- static -------------------------------------------------------------------------------

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether the kernels for sm_90 are there: those of this build are compiled for sm_80 to
        sm_100 whenever CUDA is."""
        return nearep.has_cuda()

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """The class default; even."""
        if new_num_sms < 0 or new_num_sms % 2:
            raise ValueError(f"deep_ep: the number of SMs is {new_num_sms}; it must be even")
        Buffer.num_sms = Buffer._asked_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """An EventOverlap on the current stream."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int,
                                       num_experts: int) -> int:
        """Bytes of upstream's low-latency buffers, which is about what two results in flight take."""
        tokens, message = num_max_dispatch_tokens_per_rank, 16 + 2 * hidden
        back = 2 * hidden + 4 * -(-hidden // 128)
        send = max(tokens * message, num_experts * tokens * back)
        receive = num_experts * tokens * max(message, back)
        return -(-2 * (send + receive + 4 * num_experts) // 128) * 128

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """For any number of ranks."""
        return configs.dispatch_config(num_ranks, Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """For any number of ranks."""
        return configs.combine_config(num_ranks, Buffer.num_sms)

    # ---- of the object ------------------------------------------------------------------------

    def get_comm_stream(self) -> torch.cuda.Stream:
        """The communication stream, torch.cuda.Stream; an error without a GPU."""
        return self._streams.comm

    def get_local_buffer_tensor(self, dtype: torch.dtype, size: Optional[Sequence[int]] = None, offset: int = 0,
                                use_rdma_buffer: bool = False) -> torch.Tensor:
        """A tensor [as many elements as fit from byte `offset` on] or of `size`. It is memory of its own:
        writing zeros into it, as callers do to clear a buffer, touches nothing of nearep's."""
        room = (self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes) - offset
        num = room // element_size(dtype)
        device = "cuda" if torch.cuda.is_available() and nearep.has_cuda() else "cpu"
        if size is None:
            return torch.empty(max(num, 0), dtype=dtype, device=device)
        wanted = torch.Size(size)
        if wanted.numel() > num:
            raise ValueError(f"deep_ep: {wanted.numel()} elements do not fit the {room} bytes of the buffer")
        return torch.empty(wanted, dtype=dtype, device=device)

    @locked
    def get_dispatch_layout(self, topk_idx: torch.Tensor, num_experts: int, previous_event: Event = None,
                            async_finish: bool = False, allocate_on_comm_stream: bool = False
                            ) -> Tuple[torch.Tensor, Optional[torch.Tensor], torch.Tensor, torch.Tensor,
                                       EventOverlap]:
        """topk_idx [T, K] int32 or int64; ids outside [0, E) count nowhere.

        Returns (num_tokens_per_rank i32[R] distinct tokens, num_tokens_per_rdma_rank i32[nodes] or None on
        one node, num_tokens_per_expert i32[E] pairs, is_token_in_rank bool[T, R], EventOverlap).
        """
        if topk_idx.dim() != 2 or topk_idx.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"deep_ep: topk_idx has shape {tuple(topk_idx.shape)} of {topk_idx.dtype}; it must "
                             "be [T, K] of int64 or int32")
        with self._streams.on(topk_idx, previous_event, async_finish, allocate_on_comm_stream) as scope:
            with scope.current():
                if self._seats.placement is None:
                    found = contiguous_layout(topk_idx, num_experts, self._comm.topology)
                else:
                    ep = self._seats.layout_ep(num_experts, topk_idx.shape[1])
                    found = mapped_layout(ep, topk_idx.contiguous(), self._comm.topology)
                routing = Routing(topk_idx, num_experts)
            scope.keep(topk_idx, routing.cleaned, *found)
            setattr(found[3], "nearep_routing", routing)
            return (*found, scope.finish())
