# SPDX-License-Identifier: Apache-2.0
"""Low-latency calls: rows by expert, packed at the front of R * M places each; halves with hooks.

Outputs have places of known size, so nothing waits for counts on the host before it can be returned.
Operations complete in the order in which they were sent: a hook that is called early, or another call,
first completes what came before. A result of dispatch lives until the second dispatch after it.
"""
import functools

import nearep
import torch

from .events import EventOverlap
from .handles import LowLatencyHandle, Owned
from .layout import owners
from .normal import _ID_TYPES, _pointer
from .seats import FP8, executor_of


class _Half:
    """The receiving half of an operation, run once: by its hook, or by whatever comes after it."""

    def __init__(self, seat, receive):
        self.seat, self._receive = seat, receive
        seat.waiting.append(self)

    def finish(self):
        while self in self.seat.waiting:
            first = self.seat.waiting.pop(0)
            first._receive()
            first._receive = None


def settle(seat, most):
    """At most `most` operations of this seat stay open."""
    while len(seat.waiting) > most:
        seat.waiting[0].finish()


FORKS = {"use_nvfp4", "x_global_scale", "overlap", "packed_recv_count", "comp_signal", "block_m", "threshold",
         "num_sms", "src_signals", "src_signal_expect_value", "topk_weights"}


def _refuse(name, fork):
    """Keywords of upstream's forks: fine while they ask for nothing."""
    for key, value in fork.items():
        if key not in FORKS:
            raise TypeError(f"deep_ep: {name} has no argument '{key}'")
        if key in ("use_nvfp4", "overlap") and value:
            raise NotImplementedError(f"deep_ep: {name}({key}={value}) belongs to a fork of DeepEP, and nearep "
                                      "does not have it")


def shrinking(method):
    """With enable_shrink, a rank that is lost in this call is masked and the others go on; the call itself
    has failed on all of them, at the same step or the next half of it, and says so."""
    @functools.wraps(method)
    def call(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        except (nearep.DeadlineError, nearep.PeerLostError) as error:
            if not self.enable_shrink or getattr(error, "is_told", False):
                raise
            told = self._shrink(error)
        raise told
    return call


class LowLatency:
    """The low-latency calls of Buffer."""

    def _init_low_latency(self):
        self._masked = set()

    def low_latency_dispatch_fp4(self, *_, **__):
        """Of TensorRT-LLM's fork; not there."""
        raise NotImplementedError("deep_ep: low_latency_dispatch_fp4 belongs to a fork of DeepEP; use "
                                  "low_latency_dispatch with fp8 or bf16")

    def low_latency_combine_low_precision(self, *_, **__):
        """Of TensorRT-LLM's fork; not there."""
        raise NotImplementedError("deep_ep: low_latency_combine_low_precision belongs to a fork of DeepEP; use "
                                  "low_latency_combine")

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank, hidden, num_experts):
        """Nothing to do: the calls of both modes have memory of their own."""

    def _ids(self, topk_idx, num_experts):
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

    @shrinking
    def low_latency_dispatch(self, x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts,
                             cumulative_local_expert_recv_stats=None, dispatch_wait_recv_cost_stats=None,
                             use_fp8=True, round_scale=False, use_ue8m0=False, async_finish=False,
                             return_recv_hook=False, **fork):
        """Sends each (token, expert) pair's row to the expert's rank.

        x: [T <= M, H] bf16; topk_idx [T, K], -1 = none. use_fp8: rows in e4m3 with a scale for each 128
        channels, round_scale: a power of two, use_ue8m0: its exponent, four in an int32.
        cumulative_local_expert_recv_stats i32[L]: rows received are added; dispatch_wait_recv_cost_stats
        i64[R]: nanoseconds that this rank waited for each are added (host memory alone).

        Returns (recv_x [L, R*M, H] bf16, or (fp8 [L, R*M, H], scales [L, R*M, H/128] f32, or i32
        [L, R*M, H/512], both with tokens contiguous), packed_recv_count i32[L], handle, EventOverlap, hook
        or None). With return_recv_hook the rows are there when the hook has run.
        """
        if async_finish and return_recv_hook:
            raise ValueError("deep_ep: async_finish and return_recv_hook exclude each other")
        _refuse("low_latency_dispatch", fork)
        if use_ue8m0 and not round_scale:
            raise ValueError("deep_ep: use_ue8m0 needs round_scale=True")
        most, hidden = num_max_dispatch_tokens_per_rank, x.shape[1]
        if x.dtype != torch.bfloat16 or x.shape[0] > most or x.shape[0] != topk_idx.shape[0]:
            raise ValueError(f"deep_ep: x has shape {tuple(x.shape)} of {x.dtype} for {topk_idx.shape[0]} rows of "
                             f"topk_idx; it must be bf16 of at most {most} tokens")
        if use_fp8 and hidden % 128 or use_ue8m0 and hidden % 512:
            raise ValueError(f"deep_ep: hidden is {hidden}; scales need a multiple of "
                             f"{512 if use_ue8m0 else 128}")
        wire = ("bf16", None) if not use_fp8 else \
            ("fp8", "ue8m0" if use_ue8m0 else "pow2" if round_scale else "fp32")
        with self._lock:
            self._check_alive()
            shape = (most, hidden, num_experts)
            seat = self._seats.low_latency(shape, topk_idx.shape[1], wire, executor_of(x))
            settle(seat, 1)
            stats = (cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats)
            return self._ll_dispatch(seat, shape, x.contiguous(), self._ids(topk_idx, num_experts), stats,
                                     async_finish, return_recv_hook)

    def _ll_dispatch(self, seat, shape, x, ids, stats, is_async, wants_hook):
        ep = seat.ep
        rows = ep.slots_per_rank * self.group_size * shape[0]
        raw, raw_scales = seat.buffers[seat.rotate()]
        sources = torch.empty(2, ep.slots_per_rank, rows // ep.slots_per_rank, dtype=torch.int32, device=x.device)
        count = torch.empty(ep.slots_per_rank, dtype=torch.int32, device=x.device)
        owned = Owned(seat)
        handle = LowLatencyHandle(owned, shape, sources[0], sources[1], count)
        scales = self._ll_scales(ep, raw_scales, rows, x.device)
        scope = self._streams.on(x, None, is_async, use_comm=not wants_hook)
        owned.is_idle = False
        with scope:
            if x.is_cuda:
                ep.bind_raw(owned.handle, _pointer(raw), rows, _pointer(raw_scales), _pointer(sources[1]),
                            _pointer(sources[0]))
            ep.send_raw(owned.handle, x.shape[0], _pointer(x), None, ids.data_ptr() or 8, _ID_TYPES[ids.dtype],
                        None, 0, scope.pointer)

        @shrinking
        def receive(self):
            with self._lock:
                here = scope if not wants_hook else self._streams.on(x, use_comm=False)
                self._ll_receive(ep, owned, (raw, raw_scales, rows), scales, sources, count, stats, here)
        half = _Half(seat, functools.partial(receive, self))
        handle.complete = half.finish
        kind = torch.bfloat16 if ep.wire == "bf16" else FP8
        recv_x = raw.view(kind).view(ep.slots_per_rank, -1, shape[1])
        result = recv_x if scales is None else (recv_x, scales)
        if wants_hook:
            return result, count, handle, EventOverlap(), half.finish
        half.finish()
        scope.keep(x, ids, count, sources)
        return result, count, handle, scope.finish(), None

    @staticmethod
    def _ll_scales(ep, raw_scales, rows, device):
        """Tokens contiguous, as grouped matrix multiplies with TMA read them."""
        if raw_scales is None:
            return None
        slots, blocks = ep.slots_per_rank, ep.hidden // 128
        is_packed = ep.scale_row_bytes == blocks
        stored = torch.empty(slots, blocks // 4 if is_packed else blocks, rows // slots, device=device,
                             dtype=torch.int32 if is_packed else torch.float32)
        return stored.transpose(1, 2)

    def _ll_receive(self, ep, owned, landing, scales, sources, count, stats, scope):
        raw, raw_scales, rows = landing
        ep.recv_raw(owned.handle, _pointer(raw), rows, _pointer(raw_scales), None, None, _pointer(sources[1]),
                    _pointer(sources[0]), scope.pointer)
        owned.is_idle = True
        received, cost = stats
        if cost is not None:
            self._add_waits(owned.seat, cost)
        with scope.torch():
            if count.is_cuda:
                if not hasattr(owned.handle, "device_count"):
                    view = torch.as_tensor(ep.device_counts(owned.handle), device=count.device)
                    owned.handle.device_count = view.view(torch.int32)
                count.copy_(owned.handle.device_count)
            else:
                count.copy_(torch.tensor(ep.dispatch_counts(owned.handle).rows_per_slot, dtype=torch.int32))
            if scales is not None:
                scales.copy_(raw_scales.view(scales.dtype).view(scales.shape))
            if received is not None:
                received += count

    def _add_waits(self, seat, cost):
        """Time waited for each rank since this was last asked. Kernels do not tell the host."""
        if cost.is_cuda:
            return
        now = seat.ep.wait_by_rank()
        cost += torch.tensor([a - b for a, b in zip(now, seat.waited)], dtype=cost.dtype)
        seat.waited = now

    def get_next_low_latency_combine_buffer(self, handle):
        """[L, R*M, H] bf16: write the experts' outputs here, then combine with zero_copy=True."""
        with self._lock:
            return self._seats.combine_buffer(self._ll_combine_seat(handle, handle.owned.seat.ep.top_k))

    def _ll_combine_seat(self, handle, top_k):
        return self._seats.low_latency_combine(handle.shape, top_k, handle.owned.seat.ep.executor)

    @shrinking
    def low_latency_combine(self, x, topk_idx, topk_weights, handle, use_logfmt=False, zero_copy=False,
                            async_finish=False, return_recv_hook=False, out=None,
                            combine_wait_recv_cost_stats=None, **fork):
        """Sums each token's rows: over k, weight times row, in fp32, rounded once a level.

        x: [L, R*M, H] bf16, rows beyond an expert's count may hold anything; topk_idx [T, K] of the
        dispatch, topk_weights f32 [T, K]. zero_copy: x was written into
        get_next_low_latency_combine_buffer(handle). use_logfmt: accepted; rows travel as bf16, which loses
        less. out: [T, H] bf16. Returns (combined_x [T, H], EventOverlap, hook or None).
        """
        if async_finish and return_recv_hook:
            raise ValueError("deep_ep: async_finish and return_recv_hook exclude each other")
        _refuse("low_latency_combine", fork)
        if use_logfmt and zero_copy:
            raise ValueError("deep_ep: use_logfmt and zero_copy exclude each other")
        tokens, hidden, experts = handle.shape
        tokens_here, top_k = topk_idx.shape
        wanted = (handle.owned.seat.ep.slots_per_rank, self.group_size * tokens, hidden)
        if tuple(x.shape) != wanted or x.dtype != torch.bfloat16 or (not zero_copy and not x.is_contiguous()):
            raise ValueError(f"deep_ep: x has shape {tuple(x.shape)} of {x.dtype}; it must be contiguous bf16 of "
                             f"shape {wanted}")
        if topk_weights.dtype != torch.float32 or topk_weights.shape != topk_idx.shape:
            raise ValueError(f"deep_ep: topk_weights have shape {tuple(topk_weights.shape)} of "
                             f"{topk_weights.dtype}; they must be [{tokens_here}, {top_k}] of float32")
        if out is not None and (tuple(out.shape) != (tokens_here, hidden) or out.dtype != torch.bfloat16 or
                                not out.is_contiguous()):
            raise ValueError(f"deep_ep: out has shape {tuple(out.shape)} of {out.dtype}; it must be contiguous "
                             f"bf16 [{tokens_here}, {hidden}]")
        with self._lock:
            self._check_alive()
            settle(handle.owned.seat, 0) if handle.complete is None else handle.complete()
            seat = self._ll_combine_seat(handle, top_k)
            settle(seat, 0)
            y = out if out is not None else torch.empty(tokens_here, hidden, dtype=x.dtype, device=x.device)
            source = self._seats.combine_buffer(seat) if zero_copy else x
            seat.rotate()
            return self._ll_combine(seat, source, self._ids(topk_idx, experts), topk_weights.contiguous(), y,
                                    combine_wait_recv_cost_stats, async_finish, return_recv_hook)

    def _ll_combine(self, seat, x, ids, weights, y, cost, is_async, wants_hook):
        ep, owned = seat.ep, Owned(seat)
        scope = self._streams.on(x, None, is_async, use_comm=not wants_hook)
        owned.is_idle = False
        with scope:
            ep.send_raw(owned.handle, ids.shape[0], seat.nothing.data_ptr(), None, ids.data_ptr() or 8,
                        _ID_TYPES[ids.dtype], _pointer(weights), 0, scope.pointer)
            ep.recv_raw(owned.handle, seat.landing.data_ptr(), seat.rows, None, None, None, None, None,
                        scope.pointer)
            ep.combine_send_raw(owned.handle, _pointer(x), None, scope.pointer)

        @shrinking
        def receive(self):
            with self._lock:
                here = scope if not wants_hook else self._streams.on(x, use_comm=False)
                ep.combine_recv_raw(owned.handle, _pointer(y), None, (None, None), here.pointer)
                owned.is_idle = True
                if cost is not None:
                    self._add_waits(seat, cost)
                scope.keep(x, ids, weights, y)
        half = _Half(seat, functools.partial(receive, self))
        if wants_hook:
            return y, EventOverlap(), half.finish
        half.finish()
        return y, scope.finish(), None

    def _shrink(self, error):
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

    def _check_shrink(self):
        if not self.enable_shrink:
            raise RuntimeError("deep_ep: the mask calls need enable_shrink=True in the constructor")

    def low_latency_update_mask_buffer(self, rank_to_mask, mask=False):
        """Masks (True) or unmasks a rank: its experts get no rows and add nothing to sums."""
        self._check_shrink()
        if not 0 <= rank_to_mask < self.group_size:
            raise ValueError(f"deep_ep: there is no rank {rank_to_mask}; the group has {self.group_size}")
        (self._masked.add if mask else self._masked.discard)(rank_to_mask)

    def low_latency_query_mask_buffer(self, mask_status):
        """Writes 1 for each masked rank into mask_status i32[R]."""
        self._check_shrink()
        if tuple(mask_status.shape) != (self.group_size,) or mask_status.dtype != torch.int32:
            raise ValueError(f"deep_ep: mask_status must be int32 [{self.group_size}]")
        mask_status.zero_()
        if self._masked:
            mask_status[sorted(self._masked)] = 1

    def low_latency_clean_mask_buffer(self):
        """Unmasks all ranks."""
        self._check_shrink()
        self._masked.clear()
