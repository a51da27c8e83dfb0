# SPDX-License-Identifier: Apache-2.0
"""Events and streams. On host memory everything has happened when a call returns, so events are
empty; on a GPU they are torch's."""
from __future__ import annotations

import contextlib
from typing import Any, Callable, List, Optional, Tuple, Union

import torch

from .rows import _raw_stream


def _has_gpu() -> bool:
    return torch.cuda.is_available()


class EventHandle:
    """A point in the current stream of torch at construction; without a GPU, a point that has passed."""

    def __init__(self, stream: Optional[torch.cuda.Stream] = None):
        self.event: Optional[torch.cuda.Event] = None
        if _has_gpu():
            self.event = torch.cuda.Event()
            self.event.record(stream if stream is not None else torch.cuda.current_stream())

    def current_stream_wait(self) -> None:
        """Makes torch's current stream wait for it."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)


class EventOverlap:
    """What a call returns to be waited for; event is None when the call has waited itself. As a
    context manager it waits at the end of the block. extra_tensors stay alive as long as this does."""

    def __init__(self, event: Optional[EventHandle] = None, extra_tensors: Optional[Tuple[torch.Tensor, ...]] = None):
        self.event = event
        self.extra_tensors = extra_tensors
        self.hook_after_wait: Optional[Callable[[], Any]] = None
        self._releases = False

    def current_stream_wait(self, release_handle: bool = False) -> Any:
        """Makes torch's current stream wait for it, then runs the hook, if there is one, and returns what it
        gives: the result of a deferred call. release_handle: forgets the event."""
        if self.event is None:
            raise RuntimeError("deep_ep: there is no event to wait for: the call that returned this has waited "
                               "itself (pass async_finish=True to get an event)")
        self.event.current_stream_wait()
        hook, self.hook_after_wait = self.hook_after_wait, None
        result = hook() if hook is not None else None
        if release_handle:
            self.event = None
        return result

    def wait(self) -> Any:
        """The same."""
        return self.current_stream_wait()

    def register_hook_after_wait(self, hook_after_wait: Callable[[], Any]) -> None:
        """Runs once, after the wait."""
        if self.hook_after_wait is not None:
            raise RuntimeError("deep_ep: this EventOverlap has a hook already")
        self.hook_after_wait = hook_after_wait

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        """For `with event(release_handle=True)`."""
        self._releases = release_handle
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.event is not None:
            self.current_stream_wait(self._releases)
        self._releases = False


class Streams:
    """Where the operations of a buffer run: on a communication stream, made when it is first needed, or
    on the current stream, where a call would make either wait for the other anyway."""

    def __init__(self) -> None:
        self._comm: Optional[torch.cuda.Stream] = None
        self._last: Optional[int] = None  # address of the stream of the last operation: nearep's are ordered as made
        self._event: Optional[torch.cuda.Event] = None

    @property
    def comm(self) -> torch.cuda.Stream:
        """The communication stream; an error without a GPU."""
        if self._comm is None:
            if not _has_gpu():
                raise RuntimeError("deep_ep: there is no communication stream without a GPU: tokens in host "
                                   "memory are moved by the calling thread")
            self._comm = torch.cuda.Stream(priority=-1)
        return self._comm

    def order(self, before: torch.cuda.Stream, after: torch.cuda.Stream) -> None:
        """`after` waits for what `before` has now."""
        if self._event is None:
            self._event = torch.cuda.Event()
        self._event.record(before)
        after.wait_event(self._event)

    def follow(self, address: int, stream: Optional[torch.cuda.Stream]) -> None:
        """Operations go on on this stream: its address, and the object or None for the current one."""
        last, self._last = self._last, address
        if last is not None and last != address and not torch.cuda.is_current_stream_capturing():
            self.order(torch.cuda.ExternalStream(last) if last else torch.cuda.default_stream(),
                       stream if stream is not None else torch.cuda.current_stream())

    def on(self, tensor: torch.Tensor, previous_event: Union[EventOverlap, EventHandle, None] = None,
           is_async: bool = False, allocate: bool = False, use_comm: bool = True) -> Union[_HostScope, _CudaScope]:
        """The scope of one call on tensors that are where this one is."""
        if allocate and not (previous_event is not None and is_async):
            raise ValueError("deep_ep: allocate_on_comm_stream needs previous_event and async_finish=True")
        if not tensor.is_cuda:
            return _HostScope(is_async)
        return _CudaScope(self, tensor.get_device(), previous_event, is_async, allocate, use_comm)


class _HostScope:
    pointer = None

    def __init__(self, is_async: bool):
        self._is_async = is_async

    def __enter__(self) -> _HostScope:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def keep(self, *_: Any) -> None:
        """Nothing outlives the call here."""

    def allocated(self) -> None:
        """Nothing to wait for."""

    def current(self) -> Any:
        """Where torch's own kernels on results belong."""
        return contextlib.nullcontext()

    @staticmethod
    def contiguous(tensor: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
        return tensor if tensor is None else tensor.contiguous()

    def finish(self) -> EventOverlap:
        """What the call returns."""
        return EventOverlap(EventHandle() if self._is_async else None)


class _CudaScope:
    """The communication stream waits for previous_event, or for all that the current stream has; at
    the end the current stream waits for it, unless the call is asynchronous. A call with neither event
    runs on the current stream, which is the same with fewer waits. Outputs are allocated on the current
    stream unless `allocate`; allocated() comes before the first kernel that uses them."""

    def __init__(self, streams: Streams, device: int, previous_event: Any, is_async: bool, allocate: bool,
                 use_comm: bool):
        self._streams = streams
        self._is_apart = use_comm and (is_async or previous_event is not None)
        self._stream: Any = None  # both are not needed where the call runs on the current stream
        self._current: Any = None
        if self._is_apart or previous_event is not None or is_async:
            self._current = torch.cuda.current_stream()
            self._stream = streams.comm if self._is_apart else self._current
        self._address = self._stream.cuda_stream if self._stream is not None else _raw_stream(device)
        self._previous, self._is_async, self._allocate = previous_event, is_async, allocate
        self._kept: List[torch.Tensor] = []
        self._scope: Any = None
        self.pointer = self._address or None

    def __enter__(self) -> _CudaScope:
        self._streams.follow(self._address, self._stream)
        event = getattr(self._previous, "event", self._previous)
        event = getattr(event, "event", event)
        if event is not None:
            self._stream.wait_event(event)
        elif self._is_apart:
            self._streams.order(self._current, self._stream)
        if self._allocate:
            self._scope = torch.cuda.stream(self._stream)
            self._scope.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._scope is not None:
            self._scope.__exit__(*error)

    def allocated(self) -> None:
        """What was allocated, filled or copied on the current stream is there for the communication
        stream: memory that torch hands out may still be read by what the current stream has queued."""
        if self._is_apart and not self._allocate:
            self._streams.order(self._current, self._stream)

    def current(self) -> Any:
        """Where torch's own kernels on results belong."""
        return torch.cuda.stream(self._stream) if self._is_apart else contextlib.nullcontext()

    def stream(self) -> torch.cuda.Stream:
        """The stream of the operation, as an object."""
        return self._stream if self._stream is not None else torch.cuda.current_stream()

    def contiguous(self, tensor: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
        if tensor is None or tensor.is_contiguous():
            return tensor
        copied = tensor.contiguous()
        self.allocated()
        self.keep(copied)
        return copied

    def keep(self, *tensors: Optional[torch.Tensor]) -> None:
        """Tensors that the communication stream uses."""
        if self._is_apart:
            self._kept += [tensor for tensor in tensors if tensor is not None]

    def finish(self) -> EventOverlap:
        """What the call returns."""
        if not self._is_apart:
            return EventOverlap(EventHandle(self._stream) if self._is_async else None)
        for tensor in self._kept:
            tensor.record_stream(self._stream)
            tensor.record_stream(self._current)
        if self._is_async:
            return EventOverlap(EventHandle(self._stream), tuple(self._kept))
        self._streams.order(self._stream, self._current)
        return EventOverlap()
