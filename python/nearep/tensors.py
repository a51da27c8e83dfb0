# SPDX-License-Identifier: Apache-2.0
"""Where the elements of an array are: torch tensors, and whatever speaks DLPack,
__cuda_array_interface__, __array_interface__ or the buffer protocol. torch is never imported here:
what a caller passes has already imported it.
"""
import ctypes
import sys
from typing import Any, Dict, NamedTuple, Optional, Sequence, Tuple

_TORCH = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32",
          "torch.float8_e4m3fn": "fp8", "torch.int32": "int32", "torch.int64": "int64",
          "torch.uint8": "uint8", "torch.int8": "int8", "torch.bool": "bool", "torch.float64": "fp64",
          "torch.int16": "int16"}
_TYPESTR = {"f2": "fp16", "f4": "fp32", "f8": "fp64", "i4": "int32", "i8": "int64", "u1": "uint8",
            "i1": "int8", "u4": "uint32", "u8": "uint64", "b1": "bool", "u2": "uint16", "i2": "int16",
            "V2": "bf16"}
_FORMAT = {"e": "fp16", "f": "fp32", "d": "fp64", "i": "int32", "q": "int64", "l": "int64", "B": "uint8",
           "b": "int8", "I": "uint32", "Q": "uint64", "L": "uint64", "?": "bool", "H": "uint16",
           "h": "int16"}
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8, "fp8": 1, "int32": 4, "int64": 8, "uint8": 1,
         "int8": 1, "bool": 1, "uint32": 4, "uint64": 8, "uint16": 2, "int16": 2}


class Array(NamedTuple):
    """A contiguous array. keep: what keeps its memory alive."""

    pointer: int
    shape: Tuple[int, ...]
    dtype: str
    is_cuda: bool
    keep: Any


def _product(shape: Tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def _check_strides(shape: Tuple[int, ...], strides: Optional[Sequence[int]], itemsize: int) -> None:
    if strides is None or _product(shape) == 0:
        return
    expected = itemsize
    for extent, stride in zip(reversed(shape), reversed(strides)):
        if extent != 1 and stride != expected:
            raise ValueError("nearep: arrays must be contiguous in the last dimension first (C order)")
        expected *= extent


def _from_torch(value: Any) -> Array:
    if not value.is_contiguous():
        raise ValueError(f"nearep: a tensor of shape {tuple(value.shape)} is not contiguous: pass "
                         "tensor.contiguous()")
    dtype = _TORCH.get(str(value.dtype))
    if dtype is None:
        raise ValueError(f"nearep: {value.dtype} is no type that it knows")
    return Array(value.data_ptr(), tuple(value.shape), dtype, value.is_cuda, value)


def _from_interface(value: Any, interface: Dict[str, Any], is_cuda: bool) -> Array:
    dtype = _TYPESTR.get(interface["typestr"].lstrip("<|=>"))
    if dtype is None or interface["typestr"][0] == ">":
        raise ValueError(f"nearep: typestr {interface['typestr']} is no type that it knows")
    shape = tuple(interface["shape"])
    _check_strides(shape, interface.get("strides"), SIZES[dtype])
    return Array(interface["data"][0] or 0, shape, dtype, is_cuda, value)


class _DLTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
                ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
                ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
                ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64)]


_DL_CODES = {(0, 8): "int8", (0, 16): "int16", (0, 32): "int32", (0, 64): "int64", (1, 8): "uint8",
             (1, 32): "uint32", (1, 64): "uint64", (2, 16): "fp16", (2, 32): "fp32", (2, 64): "fp64",
             (4, 16): "bf16", (6, 8): "bool", (10, 8): "fp8"}
_capsule = ctypes.pythonapi.PyCapsule_GetPointer
_capsule.restype, _capsule.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _from_dlpack(value: Any) -> Array:
    capsule = value.__dlpack__()
    tensor = _DLTensor.from_address(_capsule(capsule, b"dltensor"))
    dtype = _DL_CODES.get((tensor.code, tensor.bits))
    if dtype is None or tensor.lanes != 1:
        raise ValueError(f"nearep: a DLPack type of code {tensor.code}, {tensor.bits} bits is not known")
    if tensor.device_type not in (1, 2, 3, 13):  # CPU, CUDA, pinned, managed
        raise ValueError(f"nearep: a DLPack device of type {tensor.device_type} cannot be reached")
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    if tensor.strides:
        strides = [tensor.strides[i] * SIZES[dtype] for i in range(tensor.ndim)]
        _check_strides(shape, strides, SIZES[dtype])
    return Array((tensor.data or 0) + tensor.byte_offset, shape, dtype, tensor.device_type in (2, 13),
                 (value, capsule))


def _from_buffer(value: Any) -> Array:
    view = memoryview(value)
    dtype = _FORMAT.get(view.format.lstrip("@=<"))
    if dtype is None or not view.c_contiguous:
        raise ValueError(f"nearep: a buffer of format '{view.format}' cannot be used, or is not contiguous")
    if view.readonly:
        raise ValueError("nearep: a read-only buffer has no address here: pass bytearray, array or NumPy")
    pointer = ctypes.addressof(ctypes.c_char.from_buffer(view)) if view.nbytes else 0
    return Array(pointer, tuple(view.shape or ()), dtype, False, view)


def array_of(value: Any) -> Array:
    """Where value's elements are. Raises TypeError for what has none, ValueError where they are not
    contiguous or of a type that nearep does not know. Nothing is copied."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _from_torch(value)
    for name, is_cuda in (("__cuda_array_interface__", True), ("__array_interface__", False)):
        interface = getattr(value, name, None)
        if interface is not None:
            return _from_interface(value, interface, is_cuda)
    if hasattr(value, "__dlpack__"):
        return _from_dlpack(value)
    try:
        return _from_buffer(value)
    except TypeError:
        raise TypeError(f"nearep: {type(value).__name__} is no array: pass a torch tensor, or an object with "
                        "DLPack, an array interface or a buffer") from None


def pointer_of(value: Any, what: str, dtypes: Tuple[str, ...], shape: Tuple[Optional[int], ...],
               keep: list) -> Optional[int]:
    """The address of value after checking its type and shape (None in shape: any extent); None stays.
    What must stay alive is added to keep."""
    if value is None:
        return None
    found = array_of(value)
    if found.dtype not in dtypes:
        raise ValueError(f"nearep: {what} is of type {found.dtype}; it must be {' or '.join(dtypes)}")
    if len(found.shape) != len(shape) or any(
            want is not None and want != got for want, got in zip(shape, found.shape)):
        wanted = ", ".join("any" if extent is None else str(extent) for extent in shape)
        raise ValueError(f"nearep: {what} has shape {found.shape}; it must be [{wanted}]")
    keep.append(found.keep)
    return found.pointer


class Memory:
    """Raw memory as an array interface, for frameworks to wrap without a copy."""

    def __init__(self, pointer: int, num_bytes: int, owner: Any, is_cuda: bool = False):
        self.owner = owner
        name = "__cuda_array_interface__" if is_cuda else "__array_interface__"
        setattr(self, name, {"data": (pointer, False), "shape": (num_bytes,), "typestr": "|u1",
                             "version": 3})
