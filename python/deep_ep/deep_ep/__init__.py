# SPDX-License-Identifier: Apache-2.0
"""deep_ep on nearep: the V1 interface of DeepEP (Buffer) and ElasticBuffer, for any number of ranks,
without NVSHMEM, on host memory too. docs/deep_ep.md of nearep lists every call and its state."""
from . import utils
from .buffer import Buffer, topk_idx_t
from .config import Config
from .elastic import ElasticBuffer, EPBuffer
from .events import EventHandle, EventOverlap
from .halves import EPHandle
from .lb import BufferAllocator, get_num_allocation_alignment, get_num_tma_alignment

__version__ = "1.2.1+nearep"
__all__ = ["Buffer", "BufferAllocator", "Config", "EPBuffer", "EPHandle", "ElasticBuffer", "EventHandle",
           "EventOverlap", "get_num_allocation_alignment", "get_num_tma_alignment", "topk_idx_t", "utils"]
