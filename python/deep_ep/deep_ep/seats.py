# SPDX-License-Identifier: Apache-2.0
"""The eps behind a Buffer: one for each shape that it meets, made when it first does.

Upstream's Buffer learns hidden size, experts, top-k and types from its calls; nearep fixes them when an
ep is made, collectively. All ranks issue the same calls in the same order, so all make the same eps at
the same call; a rank that does not is named.

The most tokens of a call in normal mode is fixed in an ep too, and callers' batches grow. Unless the
Buffer was told (`max_tokens`, or NEP_DEEP_EP_MAX_TOKENS), each fresh dispatch begins with an exchange of
its size (agree.py), so that all ranks know when the largest batch no longer fits: then all make a larger
ep for this shape, of the next power of two, and go on with it. Handles stay with the ep that they were
made on, which is closed once they, and the tensors in its memory, are gone.
"""
from __future__ import annotations

import os
from typing import Any, Dict, List, Optional, Tuple

import torch

from .agree import Agreement
from .rows import RowPool

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
FP8 = getattr(torch, "float8_e4m3fn", torch.uint8)  # a torch without the type: its bytes
OUTSTANDING = 2  # operations between send and complete at once, in low-latency mode
LEAST_TOKENS = 1024  # of an ep in normal mode that may grow

# (dtype, hidden, (row bytes, scale bytes) of an opaque payload or None)
Kind = Tuple[str, int, Optional[Tuple[int, int]]]
# (M, H, E) of the low-latency calls
Shape = Tuple[int, int, int]


def executor_of(tensor: torch.Tensor) -> str:
    """Of the memory that it is in."""
    return "cuda" if tensor.is_cuda else "host"


class Seat:
    """An ep, its free handles, and what belongs to it."""

    def __init__(self, ep: Any, num_experts: int):
        self.ep, self.num_experts = ep, num_experts
        self.free: List[Any] = []
        self.num_handles = 0
        self.pool: Optional[RowPool] = None  # of receive buffers, on a GPU
        self.columns = False  # scales of outputs lie in columns of tokens
        self.captured: List[Any] = []
        self.waited = [0] * ep.comm.num_ranks
        # low latency: halves that are open, oldest first; two landing buffers and two of expert outputs,
        # used in turn
        self.waiting: List[Any] = []
        self.turn = self.out_turn = 0
        self.most_open = 2
        self.landing: List[Any] = []
        self.outgoing: List[Optional[torch.Tensor]] = [None, None]
        self.rows = 0
        # of an ep that carries weights
        self.nothing: Optional[torch.Tensor] = None
        self.nowhere: Optional[torch.Tensor] = None

    def handle(self) -> Any:
        """One that nobody uses."""
        if self.free:
            return self.free.pop()
        self.num_handles += 1
        return self.ep.handle()

    def is_idle(self) -> bool:
        """Nothing that was made here is in use: it may be closed."""
        return len(self.free) == self.num_handles and not self.captured and (
            self.pool is None or self.pool.num_lent == 0)

    def close(self) -> None:
        """Frees the ep; nothing of it may be in use."""
        if self.pool is not None:
            self.pool.close()
        self.free.clear()
        self.ep.close()


class Seats:
    """All seats of a Buffer. max_tokens: what the caller promises, or None."""

    def __init__(self, comm: Any, placement: Any, max_tokens: Optional[int]):
        self.comm, self.placement = comm, placement
        promised = max_tokens or int(os.environ.get("NEP_DEEP_EP_MAX_TOKENS", "0"))
        self._promised: Optional[int] = promised or None
        self._seats: Dict[Any, Seat] = {}
        self._outgrown: List[Seat] = []
        self._agreement: Optional[Agreement] = None
        self._layout_ep: Dict[Any, Any] = {}
        self.num_sms = 0
        self.receive_bytes = 0  # for receive buffers of each normal shape, on a GPU
        # Weights that come with a combine stay at home where the whole sum is made there.
        self.weighs_late = comm.topology.num_nodes == 1
        # Executors whose combine brings top-k weights back beside the rows.
        self.returns_weights = {"host", "cuda"}

    def sms(self, executor: str) -> Dict[str, int]:
        """What Buffer.set_num_sms asked for; nearep's own choice until it is called."""
        return {"num_sms": self.num_sms} if executor == "cuda" and self.num_sms else {}

    def slots(self, num_experts: int) -> int:
        """L: experts of a rank, or slots where there is a map."""
        if self.placement is not None:
            return self.placement.shape.slots_per_rank
        return -(-num_experts // self.comm.num_ranks)

    # ---- normal mode --------------------------------------------------------------------------

    def most(self, num_tokens: int) -> int:
        """The most tokens of this call on any rank, the same number on all; collective."""
        if self._promised is not None:
            if num_tokens > self._promised:
                raise ValueError(f"deep_ep: a dispatch of {num_tokens} tokens, but the Buffer was promised at most "
                                 f"{self._promised} (max_tokens or NEP_DEEP_EP_MAX_TOKENS): raise that, or leave it "
                                 "out, and room is made when it is needed")
            return self._promised
        if self._agreement is None:
            self._agreement = Agreement(self.comm)
        return self._agreement.most(num_tokens)

    def normal(self, kind: Kind, num_experts: int, top_k: int, most: int, executor: str, layout: str = "rank",
               alignment: int = 0, columns: bool = False) -> Seat:
        """most: from the method above, or from an earlier call. columns: scales of outputs. Collective where the
        seat is new or grows, which all ranks see alike."""
        key = (layout, kind, num_experts, top_k, alignment, columns, executor)
        seat = self._seats.get(key)
        if seat is None or seat.ep.max_tokens < most:
            if seat is not None:
                self._outgrown.append(self._seats.pop(key))
                self._close_idle(executor)
            seat = self._seats[key] = self._new(key, most)
        return seat

    def _new(self, key: Any, most: int) -> Seat:
        layout, (dtype, hidden, opaque), num_experts, top_k, alignment, columns, executor = key
        rounded = LEAST_TOKENS
        while rounded < most:
            rounded *= 2
        extra: Dict[str, Any] = {}
        if opaque:
            extra = dict(wire="opaque", row_bytes=opaque[0], scale_bytes=opaque[1], scale_order=int(columns))
        has_pool = executor == "cuda" and self.receive_bytes
        if has_pool:
            extra["pool_bytes"] = self.receive_bytes
        ep = self.comm.ep(num_experts=num_experts, top_k=top_k, hidden=hidden, dtype=dtype,
                          max_tokens=self._promised or rounded, layout=layout, map=self.placement,
                          expert_alignment=alignment, executor=executor, **self.sms(executor), **extra)
        seat = Seat(ep, num_experts)
        seat.columns = columns
        if has_pool:
            seat.pool = RowPool(ep, self.receive_bytes)
        return seat

    def _close_idle(self, executor: str) -> None:
        """Of what was outgrown. Kernels of all ranks must be done with it; this is no call of the path."""
        if executor == "cuda":
            torch.cuda.synchronize()
        if self._agreement is not None:
            self._agreement.most(0)  # all ranks are here
        for seat in [seat for seat in self._outgrown if seat.is_idle()]:
            self._outgrown.remove(seat)
            seat.close()

    def layout_ep(self, num_experts: int, top_k: int) -> Any:
        """For layouts with a map: it routes and counts and sends nothing. Its most tokens cost no memory, for
        handles alone grow with it and this has none."""
        key = (num_experts, top_k)
        if key not in self._layout_ep:
            self._layout_ep[key] = self.comm.ep(num_experts=num_experts, top_k=top_k, hidden=16,
                                                max_tokens=1 << 17, layout="rank", map=self.placement)
        return self._layout_ep[key]

    # ---- low latency --------------------------------------------------------------------------

    def low_latency(self, shape: Shape, top_k: int, wire: Tuple[str, Optional[str]], executor: str) -> Seat:
        """wire: (type, scale): of bf16 and fp8 rows, made on the way, or of nvfp4 rows as they are given."""
        key = ("low latency", shape, top_k, wire, executor)
        seat = self._seats.get(key)
        if seat is None:
            tokens, hidden, experts = shape
            rows = self.slots(experts) * self.comm.num_ranks * tokens
            kind, scale = wire
            columns = kind == "fp8"  # four tokens more a column than rows at most
            row = {"bf16": 2 * hidden, "fp8": hidden + 4 * -(-hidden // 128),
                   "nvfp4": hidden // 2 + hidden // 16}[kind]
            back = 2 * rows * 2 * hidden if self.weighs_late else 0
            extra: Dict[str, Any] = {"staging_bytes": back} if executor == "cuda" and back else {}
            if kind == "nvfp4":
                kind = "opaque"
                extra.update(row_bytes=hidden // 2, scale_bytes=hidden // 16)
            ep = self.comm.ep(num_experts=experts, top_k=top_k, hidden=hidden, max_tokens=tokens,
                              layout="front", wire=kind, scale=scale, outstanding=OUTSTANDING,
                              map=self.placement,
                              pool_bytes=2 * (rows * row + self.slots(experts) * hidden // 8 + 16384) + back + 16384,
                              executor=executor, scale_order=int(columns), **self.sms(executor), **extra)
            seat = self._seats[key] = Seat(ep, experts)
            seat.most_open = OUTSTANDING
            seat.rows = rows
            seat.columns = columns
            seat.landing = [self._landing(ep, rows, columns) for _ in range(2)]
        return seat

    @staticmethod
    def _landing(ep: Any, rows: int, columns: bool) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        x = ep.alloc(rows * ep.row_bytes).as_torch()
        if ep.scale_row_bytes == 0:
            return x, None
        if columns:  # of a multiple of 4 tokens
            rows = -(-(rows // ep.slots_per_rank) // 4) * 4 * ep.slots_per_rank
        return x, ep.alloc(rows * ep.scale_row_bytes).as_torch()

    def low_latency_weights(self, shape: Shape, top_k: int, executor: str) -> Seat:
        """Several nodes: an ep whose dispatched rows are 16 bytes of nothing. It carries the weights, which
        upstream gives to combine, to where the sums are made; and it combines rows of H."""
        key = ("weights", shape, top_k, executor)
        seat = self._seats.get(key)
        if seat is None:
            tokens, hidden, experts = shape
            rows = self.slots(experts) * self.comm.num_ranks * tokens
            ep = self.comm.ep(num_experts=experts, top_k=top_k, hidden=hidden, max_tokens=tokens,
                              layout="front", wire="opaque", row_bytes=16, outstanding=OUTSTANDING,
                              map=self.placement, executor=executor, **self.sms(executor),
                              pool_bytes=2 * (rows * 2 * hidden + 8192) + rows * 16 + 8192)
            seat = self._seats[key] = Seat(ep, experts)
            seat.nothing = torch.zeros(tokens, 16, dtype=torch.uint8,
                                       device="cuda" if executor == "cuda" else "cpu")
            seat.nowhere = ep.alloc(rows * 16).as_torch()
            seat.rows = rows
        return seat

    @staticmethod
    def combine_buffer(seat: Seat) -> torch.Tensor:
        """[L, R * M, H] bf16: the send buffer of the next low-latency combine."""
        found = seat.outgoing[seat.out_turn]
        if found is None:
            ep = seat.ep
            raw = ep.alloc(seat.rows * 2 * ep.hidden).as_torch()
            found = raw.view(torch.bfloat16).view(ep.slots_per_rank, -1, ep.hidden)
            seat.outgoing[seat.out_turn] = found
        return found

    # ---- ends ---------------------------------------------------------------------------------

    def forget(self) -> None:
        """After a recovery: nothing is under way any more."""
        for seat in self._seats.values():
            seat.waiting.clear()
        if self._agreement is not None:
            self._agreement.forget()

    def close(self) -> None:
        """Of this rank alone."""
        for seat in (*self._seats.values(), *self._outgrown):
            if seat.pool is not None:
                seat.pool.close()
        self._seats.clear()
        self._outgrown.clear()
        self.comm.close()
