# SPDX-License-Identifier: Apache-2.0
"""Failures of the library as exceptions; str() is its sentence: what, where, and what to do."""
from typing import Dict, NoReturn, Optional, Tuple, Type


class Error(RuntimeError):
    """Any failure. `status` is the number of nearep.h, `name` its name ("NEP_ERR_TIMEOUT")."""

    status = 0
    name = ""

    def __init__(self, message: str, status: Optional[int] = None, name: str = ""):
        super().__init__(message)
        if status is not None:
            self.status, self.name = status, name


class InvalidError(Error, ValueError):
    """An argument is impossible; nothing changed."""


class UnsupportedError(Error, NotImplementedError):
    """Right, but not here or not in this build; nothing changed."""


class BusyError(Error):
    """Too many operations outstanding, or still in use; nothing changed."""


class NotFoundError(Error, LookupError):
    """A key, a file or a name does not exist."""


class FormatError(Error, ValueError):
    """A file or a message is damaged or of another version."""


class RoomError(Error):
    """An output is too small; the message has the size that is needed. Nothing is lost: call again."""


class NoMemoryError(Error, MemoryError):
    """Memory, shared memory or a limit on locked memory."""


class SystemCallError(Error, OSError):
    """The system refused a file, a socket or a device."""


class MismatchError(Error):
    """Ranks disagree; the message names the field and the ranks."""


class DeadlineError(Error, TimeoutError):
    """A deadline passed; the message names the rank waited for, which may only be slow."""


class PeerLostError(Error, ConnectionError):
    """A peer is gone; Comm.fault() names it."""


class BrokenError(Error):
    """Used after such a failure, or in a forked child."""


class InternalError(Error):
    """A fault of nearep itself; please report it."""


# Names as nep_status_name gives them; here, so that an exception needs no library (a test compares them).
_CLASSES: Dict[int, Tuple[str, Type[Error]]] = {
    -1: ("NEP_ERR_INVALID", InvalidError), -2: ("NEP_ERR_UNSUPPORTED", UnsupportedError),
    -3: ("NEP_ERR_BUSY", BusyError), -4: ("NEP_ERR_NOT_FOUND", NotFoundError),
    -5: ("NEP_ERR_FORMAT", FormatError), -6: ("NEP_ERR_OVERFLOW", RoomError),
    -7: ("NEP_ERR_NO_MEMORY", NoMemoryError), -8: ("NEP_ERR_IO", SystemCallError),
    -20: ("NEP_ERR_MISMATCH", MismatchError), -30: ("NEP_ERR_TIMEOUT", DeadlineError),
    -31: ("NEP_ERR_PEER_LOST", PeerLostError), -32: ("NEP_ERR_BROKEN", BrokenError),
    -40: ("NEP_ERR_INTERNAL", InternalError),
}


def raise_status(status: int, message: str) -> NoReturn:
    """Raises the exception of a status of nearep.h."""
    name, kind = _CLASSES.get(status, (f"status {status}", Error))
    raise kind(message or name, status, name)
