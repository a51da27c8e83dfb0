# SPDX-License-Identifier: Apache-2.0
"""The shared library: where it is, its functions with their types, failures as exceptions.

ctypes, with declarations made from nearep.h when the package is built (_abi.py). One wheel serves
every Python, a call costs well under a microsecond, and the interpreter's lock is released for the
length of each call, so that a rank that waits never stops the other threads of its process.
Rejected: a compiled extension, which would have to be written, built and kept for each function by
hand to save a fraction of a microsecond.
"""
import ctypes
import os
import threading
import weakref
from typing import Any, Callable, Dict, Iterator, Optional

from . import _abi
from .errors import raise_status


def _candidates() -> Iterator[str]:
    named = os.environ.get("NEAREP_LIBRARY")
    if named:
        yield named
        return
    yield os.path.join(os.path.dirname(os.path.abspath(__file__)), "libnearep.so")
    yield f"libnearep.so.{_abi.NEP_VERSION_MAJOR}"


def _load() -> ctypes.CDLL:
    failures = []
    for path in _candidates():
        try:
            return ctypes.CDLL(path)
        except OSError as error:
            failures.append(str(error))
    raise ImportError("nearep: the library could not be loaded: " + "; ".join(failures) +
                      ". Install the package with pip, or name a libnearep.so in NEAREP_LIBRARY.")


lib = _load()
for _name, (_result, _arguments) in _abi.FUNCTIONS.items():
    _function = getattr(lib, _name, None)
    if _function is None:
        raise ImportError(f"nearep: {lib._name} has no {_name}: it is another version than this package "
                          f"({_abi.NEP_VERSION_MAJOR}.{_abi.NEP_VERSION_MINOR})")
    _function.restype = _result
    _function.argtypes = _arguments
_built = _abi.NEP_VERSION_MAJOR * 10000 + _abi.NEP_VERSION_MINOR * 100 + _abi.NEP_VERSION_PATCH
if lib.nep_version() // 100 != _built // 100:
    raise ImportError(f"nearep: {lib._name} is version {lib.nep_version_string().decode()}, this package "
                      f"was made for {_abi.NEP_VERSION_MAJOR}.{_abi.NEP_VERSION_MINOR}")


def check(status: int) -> None:
    """Raises what a failed call means, with the library's sentence."""
    if status != 0:
        raise_status(status, lib.nep_last_message().decode(errors="replace"))


def sized(kind: Any, **fields: Any) -> Any:
    """A structure of nearep.h with its size filled in."""
    value = kind(**fields)
    value.size = ctypes.sizeof(kind)
    return value


def text(value: Any) -> Optional[bytes]:
    """str or path -> bytes for the library; None stays."""
    return None if value is None else os.fsencode(value)


def create(function: Callable[..., int], *arguments: Any) -> int:
    """Calls function(*arguments, &pointer) and returns the pointer."""
    pointer = ctypes.c_void_p()
    check(function(*arguments, ctypes.byref(pointer)))
    return pointer.value or 0


class Owner:
    """Something that the library made and destroys; its children go first."""

    def __init__(self, pointer: int, destroy: Callable[[int], Any], parent: Optional["Owner"] = None):
        self._pointer: Optional[int] = pointer
        self._destroy = destroy
        self._parent = parent
        self._children: Dict[int, weakref.ref] = {}
        self._closing = threading.Lock()
        if parent is not None:
            parent._children[id(self)] = weakref.ref(self)

    @property
    def pointer(self) -> int:
        """The address, for calls of the C interface; refuses what was closed."""
        if self._pointer is None:
            raise ValueError(f"nearep: this {type(self).__name__} is closed")
        return self._pointer

    def close(self) -> None:
        """Frees it, and what was made from it. Closing twice is fine."""
        with self._closing:
            pointer, self._pointer = self._pointer, None
        if pointer is None:
            return
        for child in list(self._children.values()):
            alive = child()
            if alive is not None:
                alive.close()
        self._destroy(pointer)
        if self._parent is not None:
            self._parent._children.pop(id(self), None)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __del__(self) -> None:
        try:
            self.close()
        except (AttributeError, TypeError):  # half made, or the interpreter is ending
            pass
