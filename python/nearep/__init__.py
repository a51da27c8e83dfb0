# SPDX-License-Identifier: Apache-2.0
"""nearep: tokens near their experts. Dispatch and combine for expert-parallel mixture-of-experts.

    comm = nearep.Comm.from_torch(group)          # or Comm(), Comm.from_mpi()
    ep = comm.ep(num_experts=256, top_k=8, hidden=7168, max_tokens=4096)
    handle = ep.handle()
    ep.dispatch_send(handle, x, topk_ids, topk_weights)
    counts = ep.dispatch_counts(handle)
    ep.dispatch_recv(handle, rows)
    ep.combine_send(handle, y)
    ep.combine_recv(handle, out)

Importing needs neither a GPU nor torch; a call that needs what is not here says what is missing.
"""
from . import eplb
from ._lib import lib as _library
from .balance import Balance, BalanceResult, map_pays
from .comm import Comm, Fault, Topology
from .ep import Buffer, Counts, Ep, Handle
from .errors import (BrokenError, BusyError, DeadlineError, Error, FormatError, InternalError, InvalidError,
                     MismatchError, NoMemoryError, NotFoundError, PeerLostError, RoomError,
                     SystemCallError, UnsupportedError)
from .maps import Map, MapShape, Move
from .queue import Queue
from .trace import Recorder, Request, Trace, TraceShape, TraceWriter, from_sglang, from_vllm

__version__ = _library.nep_version_string().decode()

__all__ = [
    "Balance", "BalanceResult",
    "BrokenError", "Buffer", "BusyError", "Comm", "Counts", "DeadlineError", "Ep", "Error", "Fault",
    "FormatError", "Handle", "InternalError", "InvalidError", "Map", "MapShape", "MismatchError", "Move",
    "NoMemoryError", "NotFoundError", "PeerLostError", "Queue", "Recorder", "Request", "RoomError",
    "SystemCallError", "Topology", "Trace", "TraceShape", "TraceWriter", "UnsupportedError", "eplb",
    "from_sglang", "from_vllm", "map_pays",
]


def has_cuda() -> bool:
    """Whether this build has the CUDA executor. A GPU need not be there."""
    from .ep import build_has_cuda
    return build_has_cuda()
