# SPDX-License-Identifier: Apache-2.0
"""What callers of V2 and V2.5 import from deep_ep.utils.envs."""
from typing import Any, Tuple

import nearep

from . import check_nvlink_connections

__all__ = ["check_nvlink_connections", "get_physical_domain_size"]


def get_physical_domain_size(group: Any) -> Tuple[int, int]:
    """(nodes, ranks of this rank's node) of a torch process group; collective. Before there is a buffer."""
    with nearep.Comm.from_torch(group) as comm:
        return comm.topology.num_nodes, comm.topology.node_ranks[comm.topology.node]
