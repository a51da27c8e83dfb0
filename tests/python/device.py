# SPDX-License-Identifier: Apache-2.0
"""The same tests on a GPU: NEP_TEST_DEVICE=cuda wraps deep_ep's buffers so that tensors go to the device
before each call and come back after it. Without it nothing is wrapped."""
import os

import torch

DEVICE = os.environ.get("NEP_TEST_DEVICE", "cpu")


def settle():
    """All that was launched is done. Any name of the CPU but "cpu" tries the wrapping without a GPU."""
    if DEVICE.startswith("cuda"):
        torch.cuda.synchronize()


class _Handle:
    def __init__(self, inner):
        self.inner = inner

    def __getitem__(self, index):
        settle()
        return home(self.inner[index], {})

    def __getattr__(self, name):
        settle()
        return home(getattr(self.inner, name), {})


_known = {}  # by id: (tensor, its version, the same on the device): the same tensor again is the same there


def away(value, seen):
    if isinstance(value, torch.Tensor):
        known = None if value.is_inference() else _known.get(id(value))
        if id(value) not in seen and known is not None and known[0] is value and known[1] == value._version:
            seen[id(value)] = (value, known[2])
        if id(value) not in seen:
            moved = value.to(DEVICE, copy=True)
            if value.dim() == 2 and value.stride(0) == 1 and value.shape[0] > 1:
                moved = value.t().contiguous().to(DEVICE, copy=True).t()
            routing = getattr(value, "nearep_routing", None)
            if routing is not None:
                moved.nearep_routing = routing
            if value.numel() < 4096 and not value.is_inference():
                _known[id(value)] = (value, value._version, moved)
            seen[id(value)] = (value, moved)
        return seen[id(value)][1]
    if isinstance(value, (tuple, list)):
        return type(value)(away(part, seen) for part in value)
    return value.inner if isinstance(value, _Handle) else value


def home(value, back):
    if isinstance(value, torch.Tensor):
        if value.data_ptr() in back and value.numel():
            return back[value.data_ptr()]
        moved = value.cpu()
        if hasattr(value, "nearep_routing"):
            moved.nearep_routing = value.nearep_routing
        return moved
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(home(part, back) for part in value)
    hook = getattr(value, "hook_after_wait", None)
    if hook is not None:
        def come():
            result = hook()
            settle()
            return home(result, {})
        value.hook_after_wait = come
    return _Handle(value) if hasattr(value, "owned") or hasattr(value, "inner") else value


def same(a, b):
    """Bit for bit."""
    a, b = a.contiguous().view(-1), b.contiguous().view(-1)
    return torch.equal(a.view(torch.uint8) if a.numel() else a, b.view(torch.uint8) if b.numel() else b)


class _Wrapped:
    """A buffer whose calls take and give tensors in host memory."""

    def __init__(self, inner):
        object.__setattr__(self, "_inner", inner)

    def __getattr__(self, name):
        found = getattr(self._inner, name)
        if not callable(found) or name.startswith("get_next") or name in ("capture", "destroy", "barrier"):
            if name.startswith("get_next"):
                return lambda handle: found(away(handle, {}))
            return found

        def call(*args, **kwargs):
            seen = {}
            args = [away(value, seen) for value in args]
            kwargs = {key: away(value, seen) for key, value in kwargs.items()}
            result = found(*args, **kwargs)
            if isinstance(result, tuple) and callable(result[-1]) and not hasattr(result[-1], "event"):
                result[-1]()
                result = (*result[:-1], lambda: None)
            settle()
            for original, moved in seen.values():
                if not same(original, moved.to("cpu")):
                    original.copy_(moved)
            return home(result, {moved.data_ptr(): original for original, moved in seen.values()})
        return call


def on_device(buffer):
    """The buffer itself, or wrapped where the tests run on a GPU."""
    return buffer if DEVICE == "cpu" else _Wrapped(buffer)
