# SPDX-License-Identifier: Apache-2.0
"""The batch queue: which waiting request runs where, and when. Time is an argument."""
import ctypes
from typing import Any, List, Optional, Sequence

from . import _abi
from ._lib import Owner, check, create, lib, sized


class Queue(Owner):
    """Requests go to the home where their experts are; old ones first, tenants evenly. Any thread.

    num_homes: nodes that run requests; home_slots: requests that a home runs at once; max_age:
    seconds, the bound on waiting (1); band: homes within this share above the least cost are good.
    Times (now) are nanoseconds that do not go back, for example time.monotonic_ns().
    """

    def __init__(self, num_homes: int, home_slots: int, *, capacity: int = 0, num_tenants: int = 0,
                 max_age: float = 0.0, band: float = 0.0):
        params = sized(_abi.nep_queue_params, num_homes=num_homes, home_slots=home_slots,
                       capacity=capacity, num_tenants=num_tenants, max_age_ns=int(max_age * 1e9),
                       band=band)
        super().__init__(create(lib.nep_queue_create, ctypes.addressof(params)), lib.nep_queue_destroy)
        self.num_homes, self.home_slots = num_homes, home_slots
        self._ids = (ctypes.c_uint64 * home_slots)()

    def _scores(self, scores: Optional[Sequence[float]]) -> Any:
        if scores is None:
            return None
        if len(scores) != self.num_homes:
            raise ValueError(f"nearep: {len(scores)} scores for {self.num_homes} homes")
        return (ctypes.c_float * self.num_homes)(*scores)

    def push(self, id: int, now: int, *, scores: Optional[Sequence[float]] = None, tokens: int = 0,
             tenant: int = 0) -> None:
        """scores: cost of running at each home (Map.home_scores), None: not known yet."""
        costs = self._scores(scores)
        request = sized(_abi.nep_request, id=id, tenant=tenant, tokens=tokens,
                        scores=ctypes.addressof(costs) if costs is not None else None)
        check(lib.nep_queue_push(self.pointer, ctypes.addressof(request), now))

    def pop(self, home: int, now: int, most: Optional[int] = None) -> List[int]:
        """What home should start now, at most its free slots; running until finish()."""
        room = self.home_slots if most is None else min(most, self.home_slots)
        ids = (ctypes.c_uint64 * max(room, 1))()
        batch = sized(_abi.nep_micro_batch, ids=ctypes.addressof(ids), capacity=room)
        check(lib.nep_queue_pop(self.pointer, home, now, ctypes.addressof(batch)))
        return list(ids[:batch.num])

    def finish(self, id: int) -> None:
        """Forgets a request, running or waiting."""
        check(lib.nep_queue_finish(self.pointer, id))

    def update(self, id: int, scores: Sequence[float], *, tokens_left: int, move_cost: float) -> int:
        """New scores from decode; returns the home where the request should go on."""
        costs, home = self._scores(scores), ctypes.c_uint32()
        check(lib.nep_queue_update(self.pointer, id, ctypes.addressof(costs), tokens_left, move_cost,
                                   ctypes.addressof(home)))
        return home.value

    def stats(self) -> dict:
        """The fields of struct nep_queue_stats."""
        found = sized(_abi.nep_queue_stats)
        check(lib.nep_queue_get_stats(self.pointer, ctypes.addressof(found)))
        return {name: getattr(found, name) for name, _ in found._fields_ if name != "size"}
