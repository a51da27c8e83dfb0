# SPDX-License-Identifier: Apache-2.0
"""Receive buffers on a GPU in memory that the ranks of the node map: sources store rows there directly,
once. Blocks of an ep's pool are handed out as tensors and come back when their storage is freed; what
does not fit is torch's memory, with one more move.
"""
from __future__ import annotations

import functools
from typing import Any, Dict, List, Optional, Tuple

import torch

GRAIN = 1 << 21
LEAST = 1 << 23  # a tensor from a block costs the host some 60 us, a second move of so little less


@functools.lru_cache(maxsize=None)
def element_size(dtype: torch.dtype) -> int:
    """Bytes of an element."""
    return torch.empty(0, dtype=dtype).element_size()


class _Lease:
    """What a tensor's storage holds on to; its end gives the block back."""

    def __init__(self, pool: RowPool, block: Any, num_bytes: int):
        self._pool, self._block = pool, block
        self.__cuda_array_interface__ = {"data": (block.pointer, False), "shape": (num_bytes,),
                                         "typestr": "|u1", "version": 3}

    def __del__(self) -> None:
        try:
            self._pool.num_lent -= 1
            self._pool.give_back(self._block)
        except (AttributeError, TypeError, RuntimeError):  # the buffer or the interpreter is ending
            pass


class RowPool:
    """Of one ep. A block that comes back is used again after what the current stream had then."""

    def __init__(self, ep: Any, num_bytes: int):
        self._ep: Optional[Any] = ep
        self._left = num_bytes
        self.num_lent = 0
        self._free: List[Tuple[Any, torch.cuda.Event]] = []
        self._events: Dict[int, torch.cuda.Event] = {}

    def give_back(self, block: Any) -> None:
        """When nobody holds a tensor of it."""
        if self._ep is None or torch.cuda.is_current_stream_capturing():
            return  # a graph keeps the address for good
        event = self._events.setdefault(block.pointer, torch.cuda.Event())
        event.record()
        self._free.append((block, event))

    def _block(self, num_bytes: int, stream: torch.cuda.Stream) -> Any:
        fits = [i for i, (block, _) in enumerate(self._free) if num_bytes <= block.num_bytes]
        if fits:
            best = min(fits, key=lambda i: self._free[i][0].num_bytes)
            block, event = self._free.pop(best)
            stream.wait_event(event)
            return block
        size = -(-num_bytes // GRAIN) * GRAIN
        if self._ep is None or size > self._left or torch.cuda.is_current_stream_capturing():
            return None
        self._left -= size
        return self._ep.alloc(size)

    def empty(self, rows: int, columns: int, dtype: torch.dtype, stream: torch.cuda.Stream
              ) -> Optional[torch.Tensor]:
        """[rows, columns], or None when the pool has no room."""
        size = rows * columns * element_size(dtype)
        block = self._block(size, stream) if size >= LEAST else None
        if block is None:
            return None
        self.num_lent += 1
        raw = torch.as_tensor(_Lease(self, block, size), device="cuda")
        return raw.view(dtype).view(rows, columns)

    def close(self) -> None:
        """Nothing is handed out or taken back any more."""
        self._ep = None
        self._free.clear()
