"""A stand-in for Apple's GPU: tensors that say they are on ``mps`` and are computed on the CPU.

What Metal cannot do raises as there: float64, complex128 and float8 on the device, two devices in one operation. What
some versions of torch and macOS do wrong in silence raises too (``wrong``). Leaves out: how long anything takes.
"""

from __future__ import annotations

import math
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

METAL = torch.device("mps", 0)
ABSENT = (torch.float64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2)
SEEN = ("device", "is_mps", "is_cpu", "is_cuda", "is_meta", "dtype", "shape", "ndim", "requires_grad")  # of its own
ACROSS = ("__getitem__", "__setitem__", "copy_")  # may have a tensor of the CPU beside one of the device
PRODUCTS = 2**31  # of one attention: beyond, Metal's index may wrap around


class OnMetal(torch.Tensor):
    """``held`` is the tensor on the CPU."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=METAL
        )

    def __init__(self, held: torch.Tensor):
        self.held = held

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func} on the stand-in for Metal")


class Calls(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


def computed(func, args, kwargs):
    """Any function of torch, by whichever device its tensors are on."""
    name = getattr(func, "__name__", "")
    with torch._C.DisableTorchFunction():
        if name == "__get__" and getattr(func.__self__, "__name__", "") in SEEN:
            return func(*args, **kwargs)
        if name in ("to", "cpu") and isinstance(args[0], torch.Tensor):
            return moved(name, *args, **kwargs)
        tensors: list[torch.Tensor] = []
        each(lambda x: tensors.append(x), (args, kwargs))
        ours = [x for x in tensors if isinstance(x, OnMetal)]
        made = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "mps"
        if not ours and not made:
            return func(*args, **kwargs)
        if name not in ACROSS and any(x.dim() for x in tensors if not isinstance(x, OnMetal)):
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found mps:0 and cpu")
        if why := wrong(name, *args, **kwargs):
            raise AssertionError(f"{name} on Metal {why}")
        known = {id(x.held): x for x in ours}
        args, kwargs = each(lambda x: x.held if isinstance(x, OnMetal) else x, (args, kwargs))
        found = func(*args, **(kwargs | {"device": "cpu"} if made else kwargs))
        return each(lambda x: known[id(x)] if id(x) in known else on_metal(x), found)


def each(change, value):
    """``value`` with ``change`` of each tensor in it."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: each(change, x) for key, x in value.items()}
    if isinstance(value, tuple | list) and type(value) is not torch.Size:
        made = [each(change, x) for x in value]
        return made if isinstance(value, list) else tuple(made)
    return value


def on_metal(held: torch.Tensor) -> OnMetal:
    if held.dtype in ABSENT:
        name = str(held.dtype).removeprefix("torch.")
        raise TypeError(f"Cannot convert a MPS Tensor to {name} dtype as the MPS framework doesn't support {name}")
    return OnMetal(held)


def moved(name, tensor, *args, **kwargs):
    """``Tensor.to`` and ``Tensor.cpu``."""
    args, copy = ("cpu",) if name == "cpu" else args, kwargs.pop("copy", False)
    device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
    there, dtype = isinstance(tensor, OnMetal), dtype or tensor.dtype
    target = there if device is None else device.type == "mps"
    if there and target and dtype == tensor.dtype and not copy:
        return tensor
    held, layout = tensor.held if there else tensor, {} if layout is None else {"memory_format": layout}
    held = held.to("cpu" if there or target else device or held.device, dtype, copy=copy or there != target, **layout)
    return on_metal(held) if target else held


def wrong(name, *args, **kwargs):
    """Why Metal's answer may be wrong, in silence, in versions of torch and macOS that are in use; else nothing."""
    if name == "scaled_dot_product_attention":  # pytorch 163597, 181133; 179352
        q, k, v = args[:3]
        if not all(x.is_contiguous() for x in (q, k, v)):
            return "with transposed views"
        return "with too many products" if math.prod(q.shape[:-1]) * k.shape[-2] >= PRODUCTS else ""
    if name == "conv3d":  # pytorch 141471, 197114
        return "in three dimensions"
    if name == "conv2d" and not args[1].is_contiguous():  # pytorch 192212
        return "with a weight that is a view"
    if name == "pad" and any(args[1][4:]):  # pytorch 194922
        return "along time"
    return ""


@contextmanager
def metal(monkeypatch):
    """This machine has Apple's GPU."""
    with monkeypatch.context() as machine, Calls():
        machine.setattr(torch.backends.mps, "is_available", lambda: True)
        machine.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: True)
        yield
