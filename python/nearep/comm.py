# SPDX-License-Identifier: Apache-2.0
"""A rank's seat in a group, made from the environment, a torch process group, MPI, or functions."""
import ctypes
import datetime
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, List, Optional, Sequence

from . import _abi
from ._lib import Owner, check, create, lib, sized, text

if TYPE_CHECKING:
    from .ep import Ep

_ALLGATHER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p,
                              ctypes.c_size_t, ctypes.c_uint64)
_PUT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p,
                        ctypes.c_size_t, ctypes.c_uint64)
_GET = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p,
                        ctypes.c_size_t, ctypes.POINTER(ctypes.c_size_t), ctypes.c_uint64)
_CAS = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p,
                        ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p,
                        ctypes.c_size_t, ctypes.POINTER(ctypes.c_size_t), ctypes.c_uint64)


@dataclass(frozen=True)
class Topology:
    """Where ranks are. node_of_rank, local_of_rank: [R]; node_ranks: [N] ranks on each node."""

    rank: int
    num_ranks: int
    node: int
    num_nodes: int
    local: int
    node_of_rank: List[int]
    local_of_rank: List[int]
    node_ranks: List[int]


@dataclass(frozen=True)
class Fault:
    """The first failure of a communicator; rank and node are None where no single one is to blame."""

    status: int
    rank: Optional[int]
    node: Optional[int]
    op: int
    expected: int
    arrived: int
    idle_ns: int
    phase: str
    message: str


def _number(value: int) -> Optional[int]:
    return None if value == 0xFFFFFFFF else value


def _array(pointer: int, num: int) -> List[int]:
    return list((ctypes.c_uint32 * num).from_address(pointer)) if num else []


class _Bootstrap:
    """The caller's allgather and store as C functions. An exception inside becomes a failure there,
    and is raised again by the call that needed it."""

    def __init__(self, num_ranks: int, allgather: Callable[[bytes], Sequence[bytes]], store: Any = None):
        self.error: Optional[BaseException] = None
        self._num_ranks = num_ranks
        self._gather = allgather
        self._store = store
        self._functions = [_ALLGATHER(self._allgather)]
        if store is not None:
            self._functions += [_PUT(self._put), _GET(self._get), _CAS(self._cas)]
        pointers: List[Any] = [ctypes.cast(function, ctypes.c_void_p) for function in self._functions]
        pointers += [None] * (4 - len(pointers))
        self.struct = sized(_abi.nep_bootstrap, allgather=pointers[0], put=pointers[1], get=pointers[2],
                            cas=pointers[3])

    def _guard(self, work: Callable[[], Any]) -> int:
        try:
            work()
            return 0
        except BaseException as error:  # it must not cross C frames
            self.error = error
            return 1

    def _allgather(self, _ctx: Any, source: int, target: int, num: int, _timeout: int) -> int:
        def work() -> None:
            parts = self._gather(ctypes.string_at(source, num) if num else b"")
            if len(parts) != self._num_ranks or any(len(part) != num for part in parts):
                raise ValueError("nearep: allgather must return one value of equal length per rank")
            whole = b"".join(parts)
            if whole:
                ctypes.memmove(target, whole, len(whole))
        return self._guard(work)

    def _put(self, _ctx: Any, key: bytes, value: int, num: int, _timeout: int) -> int:
        return self._guard(lambda: self._store.set(key.decode(), ctypes.string_at(value, num).hex()))

    @staticmethod
    def _give(value: bytes, target: int, cap: int, num_p: Any) -> None:
        if len(value) > cap:
            raise ValueError("nearep: a value of the store is larger than its reader expects")
        ctypes.memmove(target, value, len(value))
        num_p[0] = len(value)

    def _get(self, _ctx: Any, key: bytes, target: int, cap: int, num_p: Any, timeout: int) -> int:
        def work() -> None:
            self._store.wait([key.decode()], datetime.timedelta(microseconds=max(timeout // 1000, 1)))
            self._give(bytes.fromhex(self._store.get(key.decode()).decode()), target, cap, num_p)
        try:
            work()
            return 0
        except Exception:  # a key that does not come is an answer, not an error of ours
            return 1

    def _cas(self, _ctx: Any, key: bytes, expected: int, expected_num: int, desired: int, desired_num: int,
             target: int, cap: int, num_p: Any, _timeout: int) -> int:
        def work() -> None:
            before = ctypes.string_at(expected, expected_num).hex() if expected_num else ""
            after = self._store.compare_set(key.decode(), before,
                                            ctypes.string_at(desired, desired_num).hex())
            self._give(bytes.fromhex(after.decode()), target, cap, num_p)
        return self._guard(work)


def _torch_store(allgather: Callable[[Any], List[Any]]) -> Any:
    """The store behind torch's groups, under a name that the ranks agree on: each communicator has keys of
    its own. None where torch does not show it."""
    name = allgather(uuid.uuid4().hex)[0]
    try:
        from torch.distributed import PrefixStore
        from torch.distributed import distributed_c10d as c10d
        return PrefixStore(f"nearep/{name}", c10d._get_default_store())
    except Exception:  # a torch that has it elsewhere: faults are reported, not recovered from
        return None


class Comm(Owner):
    """This rank's seat in a group. Collective: all ranks make it, with equal arguments.

    Comm() takes rank, size and address from the launcher (torchrun, mpirun, srun, NEP_RANK).
    Comm.from_torch(group) and Comm.from_mpi(comm) take them from there; Comm(rank, num_ranks,
    allgather=...) from any function that gives every rank's bytes in rank order.

    ranks_per_node: emulate nodes of these sizes, in rank order; None: detect.
    intra, inter: transports ("shm", "loop"; "ucx", "verbs", "shm", ...); None: choose.
    timeout: seconds that any wait may take; None: NEP_TIMEOUT (100 s).
    """

    def __init__(self, rank: Optional[int] = None, num_ranks: Optional[int] = None, *,
                 rendezvous: Optional[str] = None, allgather: Optional[Callable] = None,
                 store: Any = None, ranks_per_node: Optional[Sequence[int]] = None,
                 intra: Optional[str] = None, inter: Optional[str] = None,
                 timeout: Optional[float] = None):
        if (rank is None) != (num_ranks is None):
            raise ValueError("nearep: give both rank and num_ranks, or neither")
        if allgather is not None and num_ranks is None:
            raise ValueError("nearep: allgather needs rank and num_ranks")
        params = sized(_abi.nep_comm_params, rank=rank or 0, num_ranks=num_ranks or 0,
                       rendezvous=text(rendezvous), intra=text(intra), inter=text(inter),
                       timeout_ns=int((timeout or 0) * 1e9))
        self._bootstrap = None
        if allgather is not None and num_ranks is not None:
            self._bootstrap = _Bootstrap(num_ranks, allgather, store)
        if self._bootstrap is not None:
            params.bootstrap = ctypes.addressof(self._bootstrap.struct)
        if ranks_per_node is not None:
            sizes = (ctypes.c_uint32 * len(ranks_per_node))(*ranks_per_node)
            params.ranks_per_node, params.num_nodes = ctypes.addressof(sizes), len(ranks_per_node)
        pointer = self.guarded(create, lib.nep_comm_create, ctypes.addressof(params))
        super().__init__(pointer, lib.nep_comm_destroy)
        self.topology: Topology = self._read_topology()

    @classmethod
    def from_torch(cls, group: Any = None, **options: Any) -> "Comm":
        """From a torch.distributed process group of any backend (None: the default group)."""
        import torch
        import torch.distributed as dist
        rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)

        def allgather(value: Any) -> List[Any]:
            parts: List[Any] = [None] * num_ranks
            with torch.inference_mode(False):  # gloo cannot write to tensors made in it
                dist.all_gather_object(parts, value, group=group)
            return parts
        return cls(rank, num_ranks, allgather=allgather, store=_torch_store(allgather), **options)

    @classmethod
    def from_mpi(cls, comm: Any = None, **options: Any) -> "Comm":
        """From an mpi4py communicator (None: COMM_WORLD)."""
        if comm is None:
            from mpi4py import MPI
            comm = MPI.COMM_WORLD
        return cls(comm.Get_rank(), comm.Get_size(), allgather=comm.allgather, **options)

    def guarded(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls function; an exception inside the caller's allgather or store comes out of it."""
        try:
            return function(*arguments)
        except Exception as failure:
            bootstrap = getattr(self, "_bootstrap", None)
            if bootstrap is None or bootstrap.error is None:
                raise
            cause, bootstrap.error = bootstrap.error, None
            raise failure from cause

    def _read_topology(self) -> Topology:
        found = sized(_abi.nep_topology)
        check(lib.nep_comm_topology(self.pointer, ctypes.addressof(found)))
        return Topology(found.rank, found.num_ranks, found.node, found.num_nodes, found.local,
                        _array(found.node_of_rank, found.num_ranks),
                        _array(found.local_of_rank, found.num_ranks),
                        _array(found.node_ranks, found.num_nodes))

    @property
    def rank(self) -> int:
        """Of this seat, 0 to num_ranks - 1."""
        return self.topology.rank

    @property
    def num_ranks(self) -> int:
        """R; seats whose rank was lost count."""
        return self.topology.num_ranks

    def fault(self) -> Optional[Fault]:
        """The first failure, also one that a background thread found; None if there is none."""
        found = sized(_abi.nep_fault)
        check(lib.nep_comm_fault(self.pointer, ctypes.addressof(found)))
        if found.status == 0:
            return None
        return Fault(found.status, _number(found.rank), _number(found.node), found.op, found.expected,
                     found.arrived, found.idle_ns, found.phase.decode(), found.message.decode())

    def recover(self, *, lost: Sequence[int] = (), num_joining: int = 0, timeout: float = 0.0) -> List[int]:
        """After a fault: agrees on who lives and goes on with those; collective over them. Operations
        under way have failed, handles hold no dispatch. lost: ranks known to be gone. Returns the live
        ranks. Needs a store (Comm() and Comm.from_torch have one)."""
        flags = (ctypes.c_uint8 * self.num_ranks)()
        for rank in lost:
            flags[rank] = 1
        params = sized(_abi.nep_recover_params, is_lost=ctypes.addressof(flags), num_joining=num_joining,
                       timeout_ns=int(timeout * 1e9))
        found = sized(_abi.nep_recovery)
        self.guarded(lambda: check(lib.nep_comm_recover(self.pointer, ctypes.addressof(params),
                                                        ctypes.addressof(found))))
        live = (ctypes.c_uint8 * self.num_ranks).from_address(found.is_live)
        return [rank for rank in range(self.num_ranks) if live[rank]]

    def newcomers(self) -> int:
        """How many wait to be let in by recover(). Asks the store."""
        num = ctypes.c_uint32()
        self.guarded(lambda: check(lib.nep_comm_newcomers(self.pointer, ctypes.addressof(num))))
        return num.value

    def metrics(self) -> str:
        """Counters of all its eps, waits and state as Prometheus text. While no other thread is inside a call
        on these eps."""
        length = ctypes.c_size_t(0)
        for _ in range(8):
            room = ctypes.create_string_buffer(length.value + 1024)
            status = lib.nep_comm_metrics(self.pointer, room, len(room), ctypes.addressof(length))
            if status != _abi.NEP_ERR_OVERFLOW:
                break
        check(status)
        return room.value.decode()

    def dump_events(self, path: Any) -> None:
        """Writes what happened last on this rank's wire as trace JSON for Perfetto; %r in path is the rank, %p the
        process, %h the host."""
        check(lib.nep_comm_dump_events(self.pointer, text(path)))

    def grow_begin(self, num_joining: int = 1) -> None:
        """Prepares for newcomers while operations go on; all members call it. When grow_ready() says
        so on all of them, recover() changes over at once."""
        params = sized(_abi.nep_grow_params, num_joining=num_joining)
        self.guarded(lambda: check(lib.nep_comm_grow_begin(self.pointer, ctypes.addressof(params))))

    def grow_ready(self) -> bool:
        """Whether this member has all that the larger group needs. Raises when it is not going to
        have: begin again, or call recover(), which then makes everything anew."""
        is_ready = ctypes.c_uint32()
        self.guarded(lambda: check(lib.nep_comm_grow_ready(self.pointer, ctypes.addressof(is_ready))))
        return is_ready.value != 0

    def ep(self, **shape: Any) -> "Ep":
        """An Ep on this communicator; collective. See Ep."""
        from .ep import Ep
        return Ep(self, **shape)
