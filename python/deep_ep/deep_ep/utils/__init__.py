# SPDX-License-Identifier: Apache-2.0
"""What callers import from deep_ep.utils."""
from typing import Any

from ..events import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap", "check_nvlink_connections"]


def check_nvlink_connections(group: Any) -> None:
    """Nothing to check: nearep finds out how ranks reach each other, and works without NVLink."""
