"""The devices of this machine for torch: which of them compute, what each lacks, and which dtypes are slow on a CPU.

Leaves out: which device a part is on (``setup.py``). Torch is imported inside of functions."""

from __future__ import annotations

import re
import time
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SLOW = 2.0  # from here on it is said that another dtype takes less time
SIDE = 512  # of the matrices by which that is measured


def devices() -> dict[str, str]:
    """Each device, the CPU first -> why it does not compute, or nothing. ``cuda`` is ``cuda:0``."""
    import torch

    found = {"cpu": ""}
    if torch.cuda.is_available():
        each = {f"cuda:{i}": _cuda_fault(i) for i in range(torch.cuda.device_count())}
        found |= {"cuda": each.get("cuda:0", "there is none"), **each}
    if torch.backends.mps.is_available():
        found["mps"] = ""
    return found


def why_absent(device: str) -> str:
    """Why this machine has no ``cuda`` or no ``mps``; nothing for other names."""
    import torch

    if device.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            return f"this torch ({torch.__version__}) is built without CUDA"
        try:
            torch.cuda.init()
        except Exception as e:  # torch raises RuntimeError and AssertionError here
            return _first_sentence(e)
    if device == "mps" and not torch.backends.mps.is_available():
        built = torch.backends.mps.is_built()
        return (
            "this macOS is too old for this torch"
            if built
            else f"this torch ({torch.__version__}) is not built for Apple's GPU"
        )
    return ""


def _cuda_fault(index: int) -> str:
    """Nothing is put on the card for this."""
    import torch

    try:
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        built = torch.cuda.get_arch_list()
    except Exception as e:  # whatever its driver says
        return _first_sentence(e)
    codes = [
        (kind, divmod(int(number), 10)) for arch in built for kind, number in re.findall(r"(sm|compute)_(\d+)", arch)
    ]
    binary = any(kind == "sm" and code[0] == major and code[1] <= minor for kind, code in codes)
    if binary or not codes or any(kind == "compute" and code <= (major, minor) for kind, code in codes):
        return ""
    return f"{name} has compute capability {major}.{minor}, and this torch is built for {', '.join(built)}"


def _first_sentence(e: Exception) -> str:
    text = " ".join(str(e).split()).partition(". ")[0][:200].rstrip(".")
    return text or type(e).__name__


def lacks(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``device`` cannot hold numbers of ``dtype``: Apple's GPU has no float64, complex128 and float8, and
    bfloat16 from macOS 14 on."""
    import torch

    if device.type != "mps":
        return False
    if dtype == torch.bfloat16:
        return not torch.backends.mps.is_macos_or_newer(14, 0)
    name = str(dtype).removeprefix("torch.")
    return name in ("float64", "complex128") or name.startswith("float8")


def for_float64(device: torch.device) -> torch.device:
    """Where arithmetic in float64 for ``device`` is done: there, or on the CPU, where it has none (Apple's GPU)."""
    import torch

    return torch.device("cpu") if lacks(device, torch.float64) else device


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; float64 as float32 where the device has none."""
    import torch

    narrow = tensor.dtype == torch.float64 and lacks(device, torch.float64)
    return tensor.to(device, torch.float32) if narrow else tensor.to(device)


def slower(device: str, dtype: str) -> tuple[str, str]:
    """(why ``dtype`` is slow on ``device``, the dtype that is not); twice nothing where it is not."""
    import torch

    if device == "cpu":
        best = min(("float32", "bfloat16") if dtype == "float16" else ("float32",), key=seconds)
        times = seconds(dtype) / seconds(best)
        return (f"{dtype} takes {times:.0f} times as long as {best} on this CPU", best) if times >= SLOW else ("", "")
    if device.startswith("cuda") and dtype == "bfloat16" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"{device} (compute capability {major}.{minor}) has no bfloat16 and imitates it", "float16"
    return "", ""


@cache
def seconds(dtype: str) -> float:
    """What a product of two matrices takes on the CPU, with the threads of now: the best of three."""
    import torch

    taken = []
    with torch.inference_mode():
        a = torch.ones(SIDE, SIDE, dtype=getattr(torch, dtype), device="cpu")
        for _ in range(4):  # the first one makes the kernel
            begun = time.perf_counter()
            torch.mm(a, a)
            taken.append(time.perf_counter() - begun)
    return min(taken[1:])
