# SPDX-License-Identifier: Apache-2.0
"""The eps behind a Buffer: one for each shape that it meets, made when it first does.

Upstream's Buffer learns hidden size, experts, top-k and types from its calls; nearep fixes them when an
ep is made, collectively. All ranks issue the same calls in the same order, so all make the same eps at
the same call; a rank that does not is named. The most tokens of a call in normal mode is agreed then:
the largest of all ranks, rounded up to a power of two, and at least `max_tokens` of the Buffer or
NEP_DEEP_EP_MAX_TOKENS (8192). Nothing in nearep's region grows with it, handles do.
"""
import os

import torch

from .rows import RowPool

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
FP8 = getattr(torch, "float8_e4m3fn", torch.uint8)  # a torch without the type: its bytes


def executor_of(tensor):
    return "cuda" if tensor.is_cuda else "host"


class Seat:
    """An ep, its free handles, and what belongs to it."""

    def __init__(self, ep, num_experts):
        self.ep, self.num_experts = ep, num_experts
        self.free = []
        self.pool = None  # of receive buffers, on a GPU
        self.captured = []
        self.waited = [0] * ep.comm.num_ranks
        self.waiting = []  # halves that are open, oldest first
        self.parity = 0
        self.buffers = []

    def rotate(self):
        self.parity ^= 1
        return self.parity


class Seats:
    def __init__(self, comm, allgather, placement, max_tokens):
        self.comm, self.placement = comm, placement
        self._allgather = allgather
        self._max_tokens = max_tokens or int(os.environ.get("NEP_DEEP_EP_MAX_TOKENS", "8192"))
        self._seats = {}
        self.num_sms = 0
        self.receive_bytes = 0  # for receive buffers of each normal shape, on a GPU

    def sms(self, executor):
        """What Buffer.set_num_sms asked for; nearep's own choice until it is called."""
        return {"num_sms": self.num_sms} if executor == "cuda" and self.num_sms else {}

    def slots(self, num_experts):
        if self.placement is not None:
            return self.placement.shape.slots_per_rank
        return -(-num_experts // self.comm.num_ranks)

    def _agree(self, num_tokens):
        most = max(int(text) for text in self._allgather(str(num_tokens)))
        rounded = 1
        while rounded < most:
            rounded *= 2
        return max(rounded, self._max_tokens)

    def normal(self, kind, num_experts, top_k, num_tokens, executor, layout="rank", alignment=0):
        """kind: (dtype, hidden, row bytes and scale bytes of an opaque payload, or None)."""
        key = (layout, kind, num_experts, top_k, alignment, executor)
        seat = self._seats.get(key)
        if seat is None:
            dtype, hidden, opaque = kind
            extra = dict(wire="opaque", row_bytes=opaque[0], scale_bytes=opaque[1]) if opaque else {}
            if executor == "cuda" and self.receive_bytes:
                extra["pool_bytes"] = self.receive_bytes
            ep = self.comm.ep(num_experts=num_experts, top_k=top_k, hidden=hidden, dtype=dtype,
                              max_tokens=self._agree(num_tokens), layout=layout, map=self.placement,
                              expert_alignment=alignment, executor=executor, **self.sms(executor), **extra)
            seat = self._seats[key] = Seat(ep, num_experts)
            if executor == "cuda" and self.receive_bytes:
                seat.pool = RowPool(ep, self.receive_bytes)
        if num_tokens > seat.ep.max_tokens:
            raise ValueError(f"deep_ep: a dispatch of {num_tokens} tokens, but the first one of this shape "
                             f"made room for {seat.ep.max_tokens} on all ranks: give Buffer max_tokens=, or set "
                             "NEP_DEEP_EP_MAX_TOKENS, to the most tokens of any call")
        return seat

    def low_latency(self, shape, top_k, wire, executor):
        """shape: (M, H, E); wire: (type, scale)."""
        key = ("low latency", shape, top_k, wire, executor)
        seat = self._seats.get(key)
        if seat is None:
            tokens, hidden, experts = shape
            rows = self.slots(experts) * self.comm.num_ranks * tokens
            kind, scale = wire
            row = 2 * hidden if kind == "bf16" else hidden + 4 * -(-hidden // 128)
            ep = self.comm.ep(num_experts=experts, top_k=top_k, hidden=hidden, max_tokens=tokens,
                              layout="front", wire=kind, scale=scale, outstanding=2, map=self.placement,
                              pool_bytes=2 * (rows * row + 16384), executor=executor, **self.sms(executor))
            seat = self._seats[key] = Seat(ep, experts)
            seat.buffers = [self._landing(ep, rows) for _ in range(2)]
        return seat

    def _landing(self, ep, rows):
        x = ep.alloc(rows * ep.row_bytes).as_torch()
        if ep.scale_row_bytes == 0:
            return x, None
        return x, ep.alloc(rows * ep.scale_row_bytes).as_torch()

    def low_latency_combine(self, shape, top_k, executor):
        """An ep whose dispatched rows are 16 bytes of nothing: it carries the weights, which upstream
        gives to combine, to where the sums are made; and it combines rows of H."""
        key = ("combine", shape, top_k, executor)
        seat = self._seats.get(key)
        if seat is None:
            tokens, hidden, experts = shape
            rows = self.slots(experts) * self.comm.num_ranks * tokens
            ep = self.comm.ep(num_experts=experts, top_k=top_k, hidden=hidden, max_tokens=tokens,
                              layout="front", wire="opaque", row_bytes=16, outstanding=2,
                              map=self.placement, executor=executor, **self.sms(executor),
                              pool_bytes=2 * (rows * 2 * hidden + 8192) + rows * 16 + 8192)
            seat = self._seats[key] = Seat(ep, experts)
            seat.nothing = torch.zeros(tokens, 16, dtype=torch.uint8,
                                       device="cuda" if executor == "cuda" else "cpu")
            seat.landing = ep.alloc(rows * 16).as_torch()
            seat.rows = rows
            seat.buffers = [None, None]  # of zero-copy, made when asked for
        return seat

    def combine_buffer(self, seat):
        """[L, R * M, H] bf16: the send buffer of the next low-latency combine."""
        if seat.buffers[seat.parity] is None:
            ep = seat.ep
            raw = ep.alloc(seat.rows * 2 * ep.hidden).as_torch()
            seat.buffers[seat.parity] = raw.view(torch.bfloat16).view(
                ep.slots_per_rank, -1, ep.hidden)
        return seat.buffers[seat.parity]

    def forget(self):
        """After a recovery: nothing is under way any more."""
        for seat in self._seats.values():
            seat.waiting.clear()

    def close(self):
        for seat in self._seats.values():
            if seat.pool is not None:
                seat.pool.close()
        self._seats.clear()
        self.comm.close()
