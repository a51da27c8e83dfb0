# SPDX-License-Identifier: Apache-2.0
"""One number of each rank, and the largest of them on all: a dispatch of 16 bytes to every rank, on an ep
of its own in host memory. Microseconds, where a gather of torch.distributed takes hundreds; bounded by
NEP_TIMEOUT, and a rank that does not come is named."""
from __future__ import annotations

import ctypes
from typing import Any


class Agreement:
    """Collective, like all its calls. One thread at a time."""

    def __init__(self, comm: Any):
        self._ranks = comm.num_ranks
        words = ctypes.c_int64 * (2 * self._ranks)
        self._mine, self._all = words(), words()
        self._ids = (ctypes.c_int32 * self._ranks)(*range(self._ranks))
        self._at = [ctypes.addressof(array) for array in (self._mine, self._all, self._ids)]
        self._ep = comm.ep(num_experts=self._ranks, top_k=1, hidden=16, max_tokens=self._ranks, layout="rank",
                           wire="opaque", row_bytes=16)
        self._handle = self._ep.handle()
        self._is_routed = False

    def most(self, value: int) -> int:
        """The largest value, not below 0, that a rank came with."""
        mine, everyone, ids = self._at
        for i in range(0, 2 * self._ranks, 2):
            self._mine[i] = value
            self._all[i] = 0  # stays so for a rank that was lost
        self._ep.dispatch_raw(self._handle, self._ranks, mine, None, None if self._is_routed else ids, 0, None,
                              everyone, self._ranks, None, None)
        self._is_routed = True
        return max(self._all[::2])

    def forget(self) -> None:
        """After a recovery, handles hold no routing."""
        self._is_routed = False
