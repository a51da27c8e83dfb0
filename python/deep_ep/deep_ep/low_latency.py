# SPDX-License-Identifier: Apache-2.0
"""Low-latency calls: rows by expert, packed at the front of R * M places each; halves with hooks.

Outputs have places of known size, so nothing waits for counts on the host before it can be returned.
Operations complete in the order in which they were sent: a hook that is called early, or another call,
first completes what came before. A result of dispatch lives until the second dispatch after it.

Upstream gives the weights to combine. On one node they stay at home, where the sum is made, and combine
runs with the dispatch's own handle. With several nodes partial sums are made on the experts' nodes: there
combine sends the weights first, unless the dispatch was given them (topk_weights).
"""
from __future__ import annotations

import functools
from typing import Any, Callable, Dict, List, Optional, Tuple

import nearep
import torch

from .events import EventOverlap
from .handles import LowLatencyHandle, Owned
from .layout import owners, version_of
from .normal import _ID_TYPES, _pointer
from .nvfp4 import arrange, quantise, room
from .rows import element_size
from .seats import FP8, Seat, Shape, executor_of

Hook = Optional[Callable[[], None]]
Flags = Optional[Tuple[torch.Tensor, int, int, int]]  # and how many a slot, rows of each, when they are written
Stats = Tuple[Optional[torch.Tensor], Optional[torch.Tensor]]  # rows received, time waited


class _Half:
    """The receiving half of an operation, run once: by its hook, or by whatever comes after it."""

    def __init__(self, seat: Seat, is_dispatch: bool, receive: Callable[[], None]):
        self.seat, self.is_dispatch = seat, is_dispatch
        self._receive: Optional[Callable[[], None]] = receive
        seat.waiting.append(self)

    def finish(self) -> None:
        while self in self.seat.waiting:
            first = self.seat.waiting.pop(0)
            receive, first._receive = first._receive, None
            if receive is not None:
                receive()


def settle(seat: Seat, most: int) -> None:
    """At most `most` operations of this seat stay open."""
    while len(seat.waiting) > most:
        seat.waiting[0].finish()


FORKS = {"use_nvfp4", "x_global_scale", "overlap", "packed_recv_count", "comp_signal", "block_m", "threshold",
         "num_sms", "src_signals", "src_signal_expect_value"}


def _check_fork(name: str, fork: Dict[str, Any]) -> None:
    for key in fork:
        if key not in FORKS:
            raise TypeError(f"deep_ep: {name} has no argument '{key}'")


def _flags_of(fork: Dict[str, Any], slots: int) -> Flags:
    """SGLang's single-batch overlap: the flags by which the multiply that writes x says how far it is: on Hopper
    comp_signal, threshold for each block_m rows; on Blackwell src_signals, one for each expert."""
    if not fork.get("overlap"):
        return None
    by_block = fork.get("comp_signal") is not None
    flags, least, rows = (fork["comp_signal"], fork.get("threshold"), fork.get("block_m")) if by_block else \
        (fork.get("src_signals"), fork.get("src_signal_expect_value"), 0)
    if flags is None or least is None or rows is None:
        raise ValueError("deep_ep: overlap=True needs comp_signal with block_m and threshold, or src_signals with "
                         "src_signal_expect_value")
    if element_size(flags.dtype) != 4 or not flags.is_contiguous() or flags.numel() == 0 or flags.numel() % slots:
        raise ValueError(f"deep_ep: signals of shape {tuple(flags.shape)} and type {flags.dtype}; they must be "
                         f"contiguous, of 4 bytes, and as many for each of {slots} experts")
    return flags, flags.numel() // slots, int(rows), int(least)


def shrinking(method: Callable[..., Any]) -> Callable[..., Any]:
    """With enable_shrink, a rank that is lost in this call is masked and the others go on; the call itself
    has failed on all of them, at the same step or the next half of it, and says so."""
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except (nearep.DeadlineError, nearep.PeerLostError) as error:
            if not self.enable_shrink or getattr(error, "is_told", False):
                raise
            told = self._shrink(error)
        raise told
    return call


def _place_of(tensor: torch.Tensor) -> Tuple[int, int, Tuple[int, ...]]:
    """Two tensors of the same place hold the same numbers, as long as both live."""
    return tensor.data_ptr(), version_of(tensor), tuple(tensor.shape)


def _check_dispatch(x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: Optional[torch.Tensor], most: int,
                    use_fp8: bool, use_ue8m0: bool) -> None:
    if x.dim() != 2 or x.dtype != torch.bfloat16 or x.shape[0] > most or x.shape[0] != topk_idx.shape[0]:
        raise ValueError(f"deep_ep: x has shape {tuple(x.shape)} of {x.dtype} for {topk_idx.shape[0]} rows of "
                         f"topk_idx; it must be bf16 of at most {most} tokens")
    if use_fp8 and x.shape[1] % 128 or use_ue8m0 and x.shape[1] % 512:
        raise ValueError(f"deep_ep: hidden is {x.shape[1]}; scales need a multiple of "
                         f"{512 if use_ue8m0 else 128}")
    if topk_weights is not None and (topk_weights.dtype != torch.float32 or topk_weights.shape != topk_idx.shape or
                                     not topk_weights.is_contiguous()):
        raise ValueError(f"deep_ep: topk_weights have shape {tuple(topk_weights.shape)} of {topk_weights.dtype}; they "
                         f"must be contiguous {list(topk_idx.shape)} of float32")


def _check_combine(x: torch.Tensor, wanted: Tuple[int, ...], topk_idx: torch.Tensor, topk_weights: torch.Tensor,
                   zero_copy: bool, out: Optional[torch.Tensor]) -> None:
    if tuple(x.shape) != wanted or x.dtype != torch.bfloat16 or (not zero_copy and not x.is_contiguous()):
        raise ValueError(f"deep_ep: x has shape {tuple(x.shape)} of {x.dtype}; it must be contiguous bf16 of "
                         f"shape {wanted}")
    tokens, top_k = topk_idx.shape
    if topk_weights.dtype != torch.float32 or topk_weights.shape != topk_idx.shape:
        raise ValueError(f"deep_ep: topk_weights have shape {tuple(topk_weights.shape)} of "
                         f"{topk_weights.dtype}; they must be [{tokens}, {top_k}] of float32")
    if out is not None and (tuple(out.shape) != (tokens, wanted[2]) or out.dtype != torch.bfloat16 or
                            not out.is_contiguous()):
        raise ValueError(f"deep_ep: out has shape {tuple(out.shape)} of {out.dtype}; it must be contiguous "
                         f"bf16 [{tokens}, {wanted[2]}]")


class LowLatency:
    """The low-latency calls of Buffer."""

    # of the Buffer
    group_size: int
    enable_shrink: bool
    _comm: Any
    _seats: Any
    _streams: Any
    _lock: Any
    _check_alive: Any

    def _init_low_latency(self) -> None:
        self._masked: set = set()

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Nothing to do: the calls of both modes have memory of their own."""

    def _ids(self, topk_idx: torch.Tensor, num_experts: int) -> torch.Tensor:
        """Without the experts of masked ranks."""
        if topk_idx.dtype not in _ID_TYPES or topk_idx.dim() != 2:
            raise ValueError(f"deep_ep: topk_idx has shape {tuple(topk_idx.shape)} of {topk_idx.dtype}; it must "
                             "be [T, K] of int64 or int32")
        if not self._masked:
            return topk_idx.contiguous()
        rank = owners(topk_idx, num_experts, self.group_size)
        lost = torch.zeros(self.group_size + 1, dtype=torch.bool, device=topk_idx.device)
        lost[list(self._masked)] = True
        return torch.where(lost[rank], torch.full_like(topk_idx, -1), topk_idx)

    # ---- dispatch -----------------------------------------------------------------------------

    @shrinking
    def low_latency_dispatch(self, x: torch.Tensor, topk_idx: torch.Tensor, num_max_dispatch_tokens_per_rank: int,
                             num_experts: int, cumulative_local_expert_recv_stats: Optional[torch.Tensor] = None,
                             dispatch_wait_recv_cost_stats: Optional[torch.Tensor] = None, use_fp8: bool = True,
                             round_scale: bool = False, use_ue8m0: bool = False, async_finish: bool = False,
                             return_recv_hook: bool = False, topk_weights: Optional[torch.Tensor] = None,
                             **fork: Any) -> Tuple[Any, torch.Tensor, LowLatencyHandle, EventOverlap, Hook]:
        """Sends each (token, expert) pair's row to the expert's rank.

        x: [T <= M, H] bf16; topk_idx [T, K], -1 = none. use_fp8: rows in e4m3 with a scale for each 128
        channels, round_scale: a power of two, use_ue8m0: its exponent, four in an int32.
        cumulative_local_expert_recv_stats i32[L]: rows received are added; dispatch_wait_recv_cost_stats
        i64[R]: nanoseconds that this rank waited for each are added (host memory alone).
        topk_weights f32[T, K] (more than upstream, on all ranks or on none): those that combine will be
        given; with several nodes they need not travel again then.
        use_nvfp4, x_global_scale (one number, or one for each token): as the fork that vLLM calls for it.

        Returns (recv_x [L, R*M, H] bf16, or (fp8 [L, R*M, H], scales [L, R*M, H/128] f32, or i32
        [L, R*M, H/512], both with tokens contiguous, or nvfp4: uint8 [R*M, H/2, L] and scales e4m3 [32, 4,
        R*M/128, 4, H/64, L]), packed_recv_count i32[L], handle, EventOverlap, hook or None). With
        return_recv_hook the rows are there when the hook has run.
        """
        if async_finish and return_recv_hook:
            raise ValueError("deep_ep: async_finish and return_recv_hook exclude each other")
        _check_fork("low_latency_dispatch", fork)
        if use_ue8m0 and not round_scale:
            raise ValueError("deep_ep: use_ue8m0 needs round_scale=True")
        most = num_max_dispatch_tokens_per_rank
        stats = (cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats)
        if fork.get("use_nvfp4"):
            return self._ll_nvfp4(x, topk_idx, topk_weights, most, num_experts, fork.get("x_global_scale"), stats,
                                  async_finish, return_recv_hook)
        _check_dispatch(x, topk_idx, topk_weights, most, use_fp8, use_ue8m0)
        wire = ("bf16", None) if not use_fp8 else \
            ("fp8", "ue8m0" if use_ue8m0 else "pow2" if round_scale else "fp32")
        with self._lock:
            self._check_alive()
            shape = (most, x.shape[1], num_experts)
            seat = self._seats.low_latency(shape, topk_idx.shape[1], wire, executor_of(x))
            settle(seat, seat.most_open - 1)
            handle = self._ll_handle(seat, shape, topk_idx, topk_weights)
            return self._ll_dispatch(seat, handle, (x.contiguous(), None), stats, async_finish, return_recv_hook)

    def _ll_nvfp4(self, x: torch.Tensor, topk_idx: torch.Tensor, weights: Optional[torch.Tensor], most: int,
                  num_experts: int, global_scale: Any, stats: Stats, is_async: bool, wants_hook: bool
                  ) -> Tuple[Any, torch.Tensor, LowLatencyHandle, EventOverlap, Hook]:
        """Quantised here, then as rows that the caller has quantised."""
        _check_dispatch(x, topk_idx, weights, most, False, False)
        hidden = x.shape[1]
        num = global_scale.numel() if isinstance(global_scale, torch.Tensor) else 1
        if hidden % 64 or global_scale is None or num not in (1, x.shape[0]):
            raise ValueError(f"deep_ep: use_nvfp4 with hidden {hidden} and x_global_scale of {num} numbers; it needs a "
                             "multiple of 64, and one number or one for each token")
        with self._lock:
            self._check_alive()
            shape = (most, hidden, num_experts)
            seat = self._seats.low_latency(shape, topk_idx.shape[1], ("nvfp4", None), executor_of(x))
            settle(seat, seat.most_open - 1)
            handle = self._ll_handle(seat, shape, topk_idx, weights)
            return self._ll_dispatch(seat, handle, quantise(x, global_scale), stats, is_async, wants_hook, True)

    @shrinking
    def low_latency_dispatch_fp4(self, x: torch.Tensor, scales: torch.Tensor, topk_idx: torch.Tensor,
                                 num_max_dispatch_tokens_per_rank: int, num_experts: int,
                                 async_finish: bool = False, return_recv_hook: bool = False
                                 ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, LowLatencyHandle, EventOverlap,
                                            Hook]:
        """Of TensorRT-LLM's fork: rows that the caller has quantised to nvfp4 travel as they are.

        x: uint8 [T <= M, H/2], scales: uint8 [T, H/16]; topk_idx [T, K], -1 = none. Returns (recv_x uint8
        [L, R*M, H/2], recv_scales uint8 [L, R*M, H/16], packed_recv_count i32[L], handle, EventOverlap, hook
        or None); combine takes bf16 rows of H.
        """
        if async_finish and return_recv_hook:
            raise ValueError("deep_ep: async_finish and return_recv_hook exclude each other")
        most, tokens = num_max_dispatch_tokens_per_rank, topk_idx.shape[0]
        if x.dim() != 2 or x.shape[1] % 16 or x.shape[0] != tokens or tokens > most or x.dtype != torch.uint8 or \
                scales.dtype != torch.uint8 or tuple(scales.shape) != (tokens, x.shape[1] // 8):
            raise ValueError(f"deep_ep: x has shape {tuple(x.shape)} of {x.dtype}, scales {tuple(scales.shape)} of "
                             f"{scales.dtype}, for {tokens} rows of topk_idx; they must be uint8 [T, H/2] and "
                             f"[T, H/16] with H a multiple of 32 and T at most {most}")
        with self._lock:
            self._check_alive()
            shape = (most, 2 * x.shape[1], num_experts)
            seat = self._seats.low_latency(shape, topk_idx.shape[1], ("nvfp4", None), executor_of(x))
            settle(seat, seat.most_open - 1)
            handle = self._ll_handle(seat, shape, topk_idx, None)
            rows, count, handle, event, hook = self._ll_dispatch(
                seat, handle, (x.contiguous(), scales.contiguous()), (None, None), async_finish, return_recv_hook)
            return rows[0], rows[1], count, handle, event, hook

    def _ll_handle(self, seat: Seat, shape: Shape, topk_idx: torch.Tensor, weights: Optional[torch.Tensor]
                   ) -> LowLatencyHandle:
        ep, device = seat.ep, topk_idx.device
        room = self.group_size * shape[0]
        sources = torch.empty(2, ep.slots_per_rank, room, dtype=torch.int32, device=device)
        count = torch.empty(ep.slots_per_rank, dtype=torch.int32, device=device)
        handle = LowLatencyHandle(Owned(seat), shape, sources[0], sources[1], count)
        handle.topk_idx = (topk_idx, _place_of(topk_idx), frozenset(self._masked))
        handle.ids = self._ids(topk_idx, shape[2])
        handle.weights = (weights, _place_of(weights)) if weights is not None else None
        return handle

    def _ll_dispatch(self, seat: Seat, handle: LowLatencyHandle, rows: Tuple[torch.Tensor, Optional[torch.Tensor]],
                     stats: Stats, is_async: bool, wants_hook: bool, arranges: bool = False
                     ) -> Tuple[Any, torch.Tensor, LowLatencyHandle, EventOverlap, Hook]:
        """arranges: nvfp4 in the order that matrix multiplies read."""
        x, given_scales = rows
        ep, owned, ids = seat.ep, handle.owned, handle.ids
        handle.sent = rows
        seat.turn ^= 1
        raw, raw_scales = seat.landing[seat.turn]
        scales, fill = self._ll_scales(ep, raw_scales, seat.rows, arranges)
        weights = handle.weights[0] if handle.weights is not None else None
        scope = self._streams.on(x, None, is_async, use_comm=not wants_hook)
        owned.is_idle = False
        with scope:
            if x.is_cuda:
                ep.bind_raw(owned.handle, _pointer(raw), seat.rows, _pointer(raw_scales),
                            _pointer(handle.source_rank), _pointer(handle.source_token))
            ep.send_raw(owned.handle, x.shape[0], _pointer(x), _pointer(given_scales), ids.data_ptr() or 8,
                        _ID_TYPES[ids.dtype], _pointer(weights), 0, scope.pointer)

        @shrinking
        def receive(self: LowLatency) -> None:
            with self._lock:
                here = scope if not wants_hook else self._streams.on(x, use_comm=False)
                self._ll_receive(seat, handle, (raw, raw_scales), fill, stats, here)
        half = _Half(seat, True, functools.partial(receive, self))
        handle.complete = half.finish
        kind = {"bf16": torch.bfloat16, "fp8": FP8, "opaque": torch.uint8}[ep.wire]
        recv_x = raw.view(kind).view(ep.slots_per_rank, seat.rows // ep.slots_per_rank, -1)
        result = recv_x if scales is None else (recv_x.permute(1, 2, 0) if arranges else recv_x, scales)
        if wants_hook:
            return result, handle.counts, handle, EventOverlap(), half.finish
        half.finish()
        scope.keep(x, given_scales, ids, weights, handle.counts, handle.source_token)
        return result, handle.counts, handle, scope.finish(), None

    @staticmethod
    def _ll_scales(ep: Any, raw: Optional[torch.Tensor], rows: int, arranges: bool
                   ) -> Tuple[Optional[torch.Tensor], Optional[Callable[[], None]]]:
        """What is returned as scales, and what fills it when rows are there. Tokens contiguous, as grouped matrix
        multiplies with TMA read them and as they come; those of nvfp4 as they lie, or as arranged."""
        if raw is None:
            return None, None
        slots, room_of_slot = ep.slots_per_rank, rows // ep.slots_per_rank
        if ep.wire == "opaque":
            as_rows = raw.view(slots, room_of_slot, -1)
            if not arranges:
                return as_rows, None
            stored, view = room(slots, room_of_slot, as_rows.shape[2], raw.device)
            return view, functools.partial(arrange, as_rows, stored)
        is_packed = ep.scale_row_bytes == ep.hidden // 128
        columns = raw.view(torch.int32 if is_packed else torch.float32).view(slots, ep.scale_row_bytes // 4, -1)
        return columns[:, :, :room_of_slot].transpose(1, 2), None

    def _ll_receive(self, seat: Seat, handle: LowLatencyHandle, landing: Tuple[torch.Tensor, Optional[torch.Tensor]],
                    fill: Optional[Callable[[], None]], stats: Stats, scope: Any) -> None:
        ep, owned, count = seat.ep, handle.owned, handle.counts
        raw, raw_scales = landing
        ep.recv_raw(owned.handle, _pointer(raw), seat.rows, _pointer(raw_scales), None, None,
                    _pointer(handle.source_rank), _pointer(handle.source_token), scope.pointer)
        owned.is_idle = True
        handle.sent = None
        received, cost = stats
        if cost is not None:
            self._add_waits(seat, cost)
        with scope.current():
            if count.is_cuda:
                if not hasattr(owned.handle, "device_count"):
                    view = torch.as_tensor(ep.device_counts(owned.handle)[0], device=count.device)
                    owned.handle.device_count = view.view(torch.int32)
                count.copy_(owned.handle.device_count)
            else:
                rows = ep.dispatch_counts(owned.handle).rows_per_slot
                count.copy_(torch.tensor(rows, dtype=torch.int32, device="cpu"))
            if fill is not None:
                fill()
            if received is not None:
                received += count

    def _add_waits(self, seat: Seat, cost: torch.Tensor) -> None:
        """Time waited for each rank since this was last asked. Kernels do not tell the host."""
        if cost.is_cuda:
            return
        now = seat.ep.wait_by_rank()
        cost += torch.tensor([a - b for a, b in zip(now, seat.waited)], dtype=cost.dtype, device="cpu")
        seat.waited = now

    # ---- combine ------------------------------------------------------------------------------

    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> torch.Tensor:
        """[L, R*M, H] bf16: write the experts' outputs here, then combine with zero_copy=True."""
        with self._lock:
            return self._seats.combine_buffer(self._ll_combine_seat(handle, handle.shape[1]))

    def _ll_combine_seat(self, handle: LowLatencyHandle, hidden: int) -> Seat:
        """That of the dispatch, or of the ep that carries weights before it combines. TensorRT-LLM dispatches
        bytes of fp8 as half as many bf16 and combines whole rows: those are of another ep as well."""
        seat, (most, its_hidden, experts) = handle.owned.seat, handle.shape
        if hidden == its_hidden and (self._seats.weighs_late or handle.weights is not None):
            return seat
        return self._seats.low_latency_weights((most, hidden, experts), seat.ep.top_k, seat.ep.executor)

    def _late_weights(self, handle: LowLatencyHandle, topk_idx: torch.Tensor, weights: torch.Tensor
                      ) -> torch.Tensor:
        """For the routing that the handle holds: 0 for what this combine leaves out."""
        _, place, masked = handle.topk_idx
        if place != _place_of(topk_idx) or masked != self._masked:
            is_used = self._ids(topk_idx, handle.shape[2]) >= 0
            weights = torch.where(is_used, weights, torch.zeros_like(weights))
        return weights.contiguous()

    @shrinking
    def low_latency_combine(self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor,
                            handle: LowLatencyHandle, use_logfmt: bool = False, zero_copy: bool = False,
                            async_finish: bool = False, return_recv_hook: bool = False,
                            out: Optional[torch.Tensor] = None,
                            combine_wait_recv_cost_stats: Optional[torch.Tensor] = None, **fork: Any
                            ) -> Tuple[torch.Tensor, EventOverlap, Hook]:
        """Sums each token's rows: over k, weight times row, in fp32, rounded once a level.

        x: [L, R*M, H] bf16, rows beyond an expert's count may hold anything (H may be another one than the
        dispatch's); topk_idx [T, K] of the dispatch, topk_weights f32 [T, K]. zero_copy: x was written into
        get_next_low_latency_combine_buffer(handle). use_logfmt: accepted; rows travel as bf16, which loses
        less. out: [T, H] bf16. overlap: x is still being written, by something that runs beside this call and
        raises comp_signal or src_signals; it is waited for, on a GPU by the stream.
        Returns (combined_x [T, H], EventOverlap, hook or None).
        """
        if async_finish and return_recv_hook:
            raise ValueError("deep_ep: async_finish and return_recv_hook exclude each other")
        _check_fork("low_latency_combine", fork)
        if use_logfmt and zero_copy:
            raise ValueError("deep_ep: use_logfmt and zero_copy exclude each other")
        tokens, hidden = handle.shape[0], handle.shape[1] if zero_copy else x.shape[-1]
        _check_combine(x, (handle.owned.seat.ep.slots_per_rank, self.group_size * tokens, hidden), topk_idx,
                       topk_weights, zero_copy, out)
        flags = _flags_of(fork, handle.owned.seat.ep.slots_per_rank)
        if handle.weights is not None and handle.weights[1] != _place_of(topk_weights):
            raise ValueError("deep_ep: this handle's dispatch was given topk_weights; combine must be given the same "
                             "tensor, unchanged")
        with self._lock:
            self._check_alive()
            if handle.complete is not None:
                handle.complete()
            seat = self._ll_combine_seat(handle, hidden)
            settle(seat, 0 if seat is not handle.owned.seat else seat.most_open - 1)
            y = out if out is not None else torch.empty(topk_idx.shape[0], hidden, dtype=x.dtype, device=x.device)
            source = self._seats.combine_buffer(seat) if zero_copy else x
            seat.out_turn ^= 1
            return self._ll_combine(seat, handle, (source, topk_idx, topk_weights, y), flags,
                                    combine_wait_recv_cost_stats, async_finish, return_recv_hook)

    def low_latency_combine_low_precision(self, precision: str, x: torch.Tensor,
                                          global_scales: Optional[torch.Tensor], topk_idx: torch.Tensor,
                                          topk_weights: torch.Tensor, handle: LowLatencyHandle, **more: Any
                                          ) -> Tuple[torch.Tensor, EventOverlap, Hook]:
        """Of TensorRT-LLM's fork, which sends rows of "fp8" or "nvfp4" back. Here they travel as bf16, which
        loses less and moves more; global_scales are not needed. x [L, R*M, H] and the others as
        low_latency_combine's."""
        if precision not in ("fp8", "nvfp4"):
            raise ValueError(f"deep_ep: precision is {precision!r}; it must be 'fp8' or 'nvfp4'")
        return self.low_latency_combine(x, topk_idx, topk_weights, handle, **more)

    @staticmethod
    def _await(handle: LowLatencyHandle, flags: Flags, scope: Any) -> None:
        """Until x is written; what does not come in time is no fault of a rank."""
        if flags is not None:
            try:
                handle.owned.seat.ep.await_raw(handle.owned.handle, _pointer(flags[0]), *flags[1:], scope.pointer)
            except nearep.DeadlineError as error:
                setattr(error, "is_told", True)
                raise

    def _ll_combine_send(self, seat: Seat, handle: LowLatencyHandle, x: torch.Tensor, topk_idx: torch.Tensor,
                         weights: torch.Tensor, flags: Flags, scope: Any) -> Tuple[Owned, List[torch.Tensor]]:
        """Starts it; returns what it runs with, and what must stay as it is until it completes."""
        ep = seat.ep
        if seat is handle.owned.seat:
            given = None
            if handle.weights is None:
                weights = self._late_weights(handle, topk_idx, weights)
                given = weights.data_ptr() or 8
            owned = handle.owned
            with scope:
                self._await(handle, flags, scope)
                owned.is_idle = False
                ep.combine_send_raw(owned.handle, _pointer(x), None, scope.pointer, given)
            return owned, [x, weights]
        sent, place, _ = handle.topk_idx
        if place == _place_of(sent):  # the same routing, whatever combine leaves out: rows are where they were
            ids, weights = handle.ids, self._late_weights(handle, topk_idx, weights)
        else:
            ids, weights = self._ids(topk_idx, handle.shape[2]), weights.contiguous()
        owned = Owned(seat)
        owned.is_idle = False
        with scope:
            ep.send_raw(owned.handle, ids.shape[0], _pointer(seat.nothing), None, ids.data_ptr() or 8,
                        _ID_TYPES[ids.dtype], _pointer(weights), 0, scope.pointer)
            ep.recv_raw(owned.handle, _pointer(seat.nowhere), seat.rows, None, None, None, None, None,
                        scope.pointer)
            self._await(handle, flags, scope)
            ep.combine_send_raw(owned.handle, _pointer(x), None, scope.pointer)
        return owned, [x, ids, weights]

    def _ll_combine(self, seat: Seat, handle: LowLatencyHandle, tensors: Tuple[torch.Tensor, ...], flags: Flags,
                    cost: Optional[torch.Tensor], is_async: bool, wants_hook: bool
                    ) -> Tuple[torch.Tensor, EventOverlap, Hook]:
        x, topk_idx, weights, y = tensors
        scope = self._streams.on(x, None, is_async, use_comm=not wants_hook)
        owned, kept = self._ll_combine_send(seat, handle, x, topk_idx, weights, flags, scope)

        @shrinking
        def receive(self: LowLatency) -> None:
            with self._lock:
                here = scope if not wants_hook else self._streams.on(x, use_comm=False)
                seat.ep.combine_recv_raw(owned.handle, _pointer(y), None, (None, None), here.pointer)
                owned.is_idle = True
                if cost is not None:
                    self._add_waits(seat, cost)
                scope.keep(*kept, y)
        half = _Half(seat, False, functools.partial(receive, self))
        if wants_hook:
            return y, EventOverlap(), half.finish
        half.finish()
        return y, scope.finish(), None

    def _shrink(self, error: Any) -> Any:
        with self._lock:
            live = self._comm.recover()
            self._seats.forget()
            lost = sorted(set(range(self.group_size)) - set(live))
            self._masked.update(lost)
        told = type(error)(f"{error}; ranks {lost} are masked now and the others can go on: repeat the step on "
                           "all of them", error.status, error.name)
        told.is_told = True
        return told

    # ---- masks --------------------------------------------------------------------------------

    def _check_shrink(self) -> None:
        if not self.enable_shrink:
            raise RuntimeError("deep_ep: the mask calls need enable_shrink=True in the constructor")

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Masks (True) or unmasks a rank: its experts get no rows and add nothing to sums."""
        self._check_shrink()
        if not 0 <= rank_to_mask < self.group_size:
            raise ValueError(f"deep_ep: there is no rank {rank_to_mask}; the group has {self.group_size}")
        (self._masked.add if mask else self._masked.discard)(rank_to_mask)

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Writes 1 for each masked rank into mask_status i32[R]."""
        self._check_shrink()
        if tuple(mask_status.shape) != (self.group_size,) or mask_status.dtype != torch.int32:
            raise ValueError(f"deep_ep: mask_status must be int32 [{self.group_size}]")
        mask_status.zero_()
        if self._masked:
            mask_status[sorted(self._masked)] = 1

    def low_latency_clean_mask_buffer(self) -> None:
        """Unmasks all ranks."""
        self._check_shrink()
        self._masked.clear()
