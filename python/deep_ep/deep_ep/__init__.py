# SPDX-License-Identifier: Apache-2.0
"""deep_ep on nearep: the V1 interface of DeepEP (Buffer) and ElasticBuffer, for any number of ranks,
without NVSHMEM, on host memory too. docs/deep_ep.md of nearep lists every call and its state."""
from . import utils
from .buffer import Buffer, topk_idx_t
from .config import Config
from .elastic import ElasticBuffer, EPHandle
from .events import EventHandle, EventOverlap

__version__ = "1.2.1+nearep"
__all__ = ["Buffer", "Config", "EPHandle", "ElasticBuffer", "EventHandle", "EventOverlap", "topk_idx_t", "utils"]
