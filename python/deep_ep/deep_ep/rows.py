# SPDX-License-Identifier: Apache-2.0
"""Receive buffers on a GPU in memory that the ranks of the node map: sources store rows there directly,
once. Blocks of an ep's pool are handed out as tensors and come back when their storage is freed; what
does not fit is torch's memory, with one more move.

A block becomes a tensor by DLPack, whose deleter tells when no view of it is left: some 10 us of the
host, where torch's reading of __cuda_array_interface__ takes 60.
"""
from __future__ import annotations

import atexit
import ctypes
import functools
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch.utils.dlpack import from_dlpack

GRAIN = 1 << 21
LEAST = 1 << 23  # of less, a second move costs less than the tensor


@functools.lru_cache(maxsize=None)
def element_size(dtype: torch.dtype) -> int:
    """Bytes of an element."""
    return torch.empty(0, dtype=dtype).element_size()


def columns_for(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Room for [N, S] with tokens contiguous and columns at multiples of 16 bytes: as grouped matrix multiplies read
    scales by TMA, and as nearep puts pieces of 4 bytes with scale_order."""
    step = max(16 // element_size(dtype), 1)
    return torch.empty(columns, -(-rows // step) * step, dtype=dtype, device=device)[:, :rows].t()


class _Managed(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
                ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
                ("lanes", ctypes.c_uint16), ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p),
                ("byte_offset", ctypes.c_uint64), ("manager_ctx", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


_lent: Dict[int, Tuple[Any, ...]] = {}  # by address of the structure: what it needs, pool and block


def _ended(address: int) -> None:
    """The last view of a tensor is gone; torch calls this from any thread."""
    kept = _lent.pop(address, None)
    if kept is not None:
        kept[2].give_back(kept[3])


_deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_ended)
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_deleter))  # tensors may outlive this module
_deleter_at = ctypes.cast(_deleter, ctypes.c_void_p).value
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_CPU, _CUDA = 1, 2  # of DLPack


@atexit.register
def _forget() -> None:
    """Tensors that are left then end without an interpreter."""
    for kept in list(_lent.values()):
        kept[0].deleter = None
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))


def _raw_stream(device: int) -> int:
    """The address of torch's current stream; torch's own way to it builds an object, 5 us."""
    quick = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return quick(device) if quick is not None else torch.cuda.current_stream(device).cuda_stream


class RowPool:
    """Of one ep. A block that comes back is used again after what was queued when it did: on the same stream
    that is so by itself, on another one it waits for all that the first has by then."""

    def __init__(self, ep: Any, num_bytes: int):
        self._ep: Optional[Any] = ep
        self._is_cuda = ep.executor == "cuda"
        self._device = torch.cuda.current_device() if self._is_cuda else 0
        self._left = num_bytes
        self._free: List[Tuple[Any, int]] = []  # (block, the stream that was current when it came back)
        self.num_lent = 0

    def _is_capturing(self) -> bool:
        return self._is_cuda and torch.cuda.is_current_stream_capturing()

    def give_back(self, block: Any) -> None:
        """When nobody holds a tensor of it."""
        self.num_lent -= 1
        if self._ep is None or self._is_capturing():
            return  # a graph keeps the address for good
        self._free.append((block, _raw_stream(self._device) if self._is_cuda else 0))

    def _follow(self, before: int, scope: Any) -> None:
        """The stream of the call waits for another one. Not into a graph: what was queued before it was captured is
        over when it is replayed, as torch.cuda.graph sees to."""
        if self._is_cuda and before != (scope.pointer or 0) and not self._is_capturing():
            event = torch.cuda.Event()
            event.record(torch.cuda.ExternalStream(before) if before else torch.cuda.default_stream())
            scope.stream().wait_event(event)

    def _block(self, num_bytes: int, scope: Any) -> Any:
        fits = [i for i, (block, _) in enumerate(self._free) if num_bytes <= block.num_bytes]
        if fits:
            best = min(fits, key=lambda i: self._free[i][0].num_bytes)
            block, before = self._free.pop(best)
            self._follow(before, scope)
            return block
        size = -(-num_bytes // GRAIN) * GRAIN
        if self._ep is None or size > self._left or self._is_capturing():
            return None
        self._left -= size
        return self._ep.alloc(size)

    def empty(self, rows: int, columns: int, dtype: torch.dtype, scope: Any) -> Optional[torch.Tensor]:
        """[rows, columns] for the call of this scope, or None when the pool has no room."""
        size = rows * columns * element_size(dtype)
        block = self._block(size, scope) if size >= LEAST else None
        if block is None:
            return None
        extent = ctypes.c_int64(size)
        managed = _Managed(block.pointer, _CUDA if self._is_cuda else _CPU, self._device, 1, 1, 8, 1,
                           ctypes.addressof(extent), None, 0, None, _deleter_at)
        address = ctypes.addressof(managed)
        _lent[address] = (managed, extent, self, block)
        self.num_lent += 1
        return from_dlpack(_capsule(address, b"dltensor", None)).view(dtype).view(rows, columns)

    def close(self) -> None:
        """Nothing is handed out or taken back any more."""
        self._ep = None
        self._free.clear()
