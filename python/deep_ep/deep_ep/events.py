# SPDX-License-Identifier: Apache-2.0
"""Events and streams. On host memory everything has happened when a call returns, so events are
empty; on a GPU they are torch's."""
import contextlib

import torch


def _has_gpu():
    return torch.cuda.is_available()


class EventHandle:
    """A point in the current stream of torch at construction; without a GPU, a point that has passed."""

    def __init__(self, stream=None):
        self.event = None
        if _has_gpu():
            self.event = torch.cuda.Event()
            self.event.record(stream if stream is not None else torch.cuda.current_stream())

    def current_stream_wait(self):
        """Makes torch's current stream wait for it."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)


class EventOverlap:
    """What a call returns to be waited for; event is None when the call has waited itself. As a
    context manager it waits at the end of the block. extra_tensors stay alive as long as this does."""

    def __init__(self, event=None, extra_tensors=None):
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self):
        if self.event is None:
            raise RuntimeError("deep_ep: there is no event to wait for: the call that returned this has waited "
                               "itself (pass async_finish=True to get an event)")
        self.event.current_stream_wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.event is not None:
            self.event.current_stream_wait()


class Streams:
    """Where the operations of a buffer run: one communication stream, made when it is first needed."""

    def __init__(self):
        self._comm = None

    @property
    def comm(self):
        if self._comm is None:
            if not _has_gpu():
                raise RuntimeError("deep_ep: there is no communication stream without a GPU: tokens in host "
                                   "memory are moved by the calling thread")
            self._comm = torch.cuda.Stream(priority=-1)
        return self._comm

    def on(self, is_cuda, previous_event=None, is_async=False, allocate=False, use_comm=True):
        """The scope of one call."""
        return _CudaScope(self, previous_event, is_async, allocate, use_comm) if is_cuda else _HostScope(is_async)


class _HostScope:
    pointer = None

    def __init__(self, is_async):
        self._is_async = is_async

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def keep(self, *_):
        """Nothing outlives the call here."""

    def allocated(self):
        """Nothing to wait for."""

    def torch(self):
        """Where torch's own kernels on results belong."""
        return contextlib.nullcontext()

    @staticmethod
    def contiguous(tensor):
        return tensor if tensor is None else tensor.contiguous()

    def finish(self):
        return EventOverlap(EventHandle() if self._is_async else None)


class _CudaScope:
    """The communication stream waits for previous_event, or for all that the current stream has; at
    the end the current stream waits for it, unless the call is asynchronous. Outputs are allocated
    before the wait, on the current stream unless `allocate`: a fill by torch cannot race with it."""

    def __init__(self, streams, previous_event, is_async, allocate, use_comm):
        if allocate and not (previous_event is not None and is_async):
            raise ValueError("deep_ep: allocate_on_comm_stream needs previous_event and async_finish=True")
        self._current = torch.cuda.current_stream()
        self._stream = streams.comm if use_comm else self._current
        self._previous, self._is_async, self._allocate = previous_event, is_async, allocate
        self._kept = []
        self.pointer = self._stream.cuda_stream or None

    def __enter__(self):
        if self._stream is not self._current:
            event = getattr(self._previous, "event", self._previous)
            event = getattr(event, "event", event)
            if event is not None:
                self._stream.wait_event(event)
            else:
                self._stream.wait_stream(self._current)
        self._scope = torch.cuda.stream(self._stream) if self._allocate else None
        if self._scope is not None:
            self._scope.__enter__()
        return self

    def __exit__(self, *error):
        if self._scope is not None:
            self._scope.__exit__(*error)

    def allocated(self):
        """What was allocated, filled or copied on the current stream is there for the communication
        stream: memory that torch hands out may still be read by what the current stream has queued."""
        if self._stream is not self._current and not self._allocate:
            self._stream.wait_stream(self._current)

    def torch(self):
        """Where torch's own kernels on results belong."""
        return torch.cuda.stream(self._stream)

    def contiguous(self, tensor):
        if tensor is None or tensor.is_contiguous():
            return tensor
        copied = tensor.contiguous()
        self.allocated()
        self.keep(copied)
        return copied

    def keep(self, *tensors):
        """Tensors that the communication stream uses."""
        self._kept += [tensor for tensor in tensors if tensor is not None]

    def finish(self):
        if self._stream is self._current:
            return EventOverlap(EventHandle(self._stream) if self._is_async else None)
        for tensor in self._kept:
            tensor.record_stream(self._stream)
            tensor.record_stream(self._current)
        if self._is_async:
            return EventOverlap(EventHandle(self._stream), tuple(self._kept))
        self._current.wait_stream(self._stream)
        return EventOverlap()
