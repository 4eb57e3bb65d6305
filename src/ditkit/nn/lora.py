"""LoRAs beside the weights (seam C): the base stays as it is, and what is added is computed with each call.

Low-rank changes of linears become ``AdaptedLinear``. What has no such form (norms, biases, modulation, the patch
embedding, LoHa, LoKr, DoRA, written-out differences) gets a merged copy of that one parameter, in a twin of its module;
where that has no data yet, it is merged when it is read. Factors come from the LoRA's file and are there from the
start. Base tensors are never written, so a transformer that others hold too stays without LoRA.
Leaves out: reading LoRA files (``checkpoints/lora/read.py``) and merging while loading (``checkpoints/lora/merge.py``).
"""

import copy
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.contracts import Swap
from ditkit.devices import put
from ditkit.errors import LoadError, SetupError
from ditkit.nn.layers import at_least_float32


class Adapter(Protocol):
    """What a LoRA adds to each parameter; ``checkpoints.lora.Adapter`` is one."""

    @property
    def deltas(self) -> Mapping[str, Any]: ...
    @property
    def fingerprint(self) -> str: ...
    def added(self, name: str, weight: Tensor) -> Tensor: ...
    def low_rank(self, name: str) -> list[tuple[Tensor, Tensor, float]] | None: ...


Adapters = tuple[tuple[Adapter, float], ...]


class AdaptedLinear(nn.Module):
    """``base(x) + sum of factor * up(down(x))`` over pairs of down [r, in] and up [out, r].

    All pairs stand side by side, so there are two more matrix products however many LoRAs there are. Factors keep the
    dtype of their file and are cast to the input's for the call, like weights are."""

    def __init__(self, base: nn.Module, pairs: Sequence[tuple[Tensor, Tensor, float]], device: torch.device):
        super().__init__()
        self.base = base
        factors = torch.cat([torch.full((len(down),), factor, dtype=torch.float32) for down, _, factor in pairs])
        self.factors = nn.Parameter(factors.to(device), requires_grad=False)
        self.down = nn.Parameter(put(_joined([down for down, _, _ in pairs], 0), device), requires_grad=False)
        self.up = nn.Parameter(put(_joined([up for _, up, _ in pairs], 1), device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        inner = F.linear(x, self.down.to(x.dtype)) * self.factors
        inner, up = inner.to(out.dtype).flatten(0, -2), self.up.to(out.dtype)
        return torch.addmm(out.flatten(0, -2), inner, up.t()).view(out.shape)


def _joined(tensors: list[Tensor], axis: int) -> Tensor:
    wide = [torch.bfloat16 if tensor.dtype.itemsize < 2 else tensor.dtype for tensor in tensors]
    dtype = functools.reduce(torch.promote_types, wide)  # those of 8 bits have no common one
    return torch.cat([tensor.to(dtype) for tensor in tensors], axis)


def twin(module: nn.Module) -> nn.Module:
    """A module of its own with the same tensors: its parts can be replaced, and the first one does not notice."""
    new = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict):  # its parameters, its hooks ...
            new.__dict__[name] = value.copy()
    for name, child in module.named_children():
        setattr(new, name, twin(child))
    return new


@dataclass(frozen=True)
class At:
    """Matches the module of one name."""

    name: str

    def __call__(self, name: str, module: nn.Module) -> bool:
        return name == self.name


@dataclass(frozen=True)
class Adapt:
    """Makes of the module at ``where`` its twin with ``adapters`` in it."""

    where: str
    adapters: Adapters

    @property
    def fingerprint(self) -> str:
        return f"side {self.where} {[(adapter.fingerprint, strength) for adapter, strength in self.adapters]}"

    def __call__(self, module: nn.Module) -> nn.Module:
        new = twin(module)
        names = {name for adapter, _ in self.adapters for name in adapter.deltas if _top(name) == self.where}
        pairs: dict[str, list[tuple[Tensor, Tensor, float]]] = {}
        with torch.inference_mode(False):  # parameters made in inference mode could never be trained
            for name in sorted(names):
                found = _pairs(name, self.adapters)
                path, _, leaf = name.partition(".")[2].rpartition(".")
                layer = _layer(new, path, name)
                # A convolution is not called, with an input of rows: its weight is read by others.
                if found is None or isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                    _merge(layer, leaf, name, self.adapters)
                else:
                    pairs[path] = found
            for path, found in pairs.items():
                new = _replaced(new, path, found)
        return new


def lora_swaps(adapters: Sequence[tuple[Adapter, float]]) -> tuple[Swap, ...]:
    """Swaps that put LoRAs with their strengths beside the weights of a transformer; one for each of its top modules
    that changes, however many LoRAs there are. A strength of 0 is no LoRA. Raises SetupError for a strength that is no
    finite number."""
    touching: dict[str, Adapters] = {}
    for adapter, strength in adapters:
        if not abs(strength) <= torch.finfo(torch.float32).max:
            raise SetupError(f"a LoRA strength of {strength}", "it is not a finite number", "Give one, such as 1.0")
        for top in dict.fromkeys(map(_top, adapter.deltas)) if strength else ():
            touching[top] = (*touching.get(top, ()), (adapter, float(strength)))
    return tuple(Swap(f"lora {top}", At(top), Adapt(top, adapters)) for top, adapters in touching.items())


def _top(name: str) -> str:
    return name.partition(".")[0]


def _pairs(name: str, adapters: Adapters) -> list[tuple[Tensor, Tensor, float]] | None:
    """The pairs of all adapters with their whole factors; None when one of them adds something else."""
    found: list[tuple[Tensor, Tensor, float]] = []
    for adapter, strength in adapters:
        if name in adapter.deltas:
            own = adapter.low_rank(name)
            if own is None:
                return None
            found += [(down, up, factor * strength) for down, up, factor in own]
            for down, up, factor in own:
                _check_finite(name, down, up)
                most = _largest(down) * _largest(up) * len(down) * abs(factor * strength)
                if max(most, abs(factor * strength)) > torch.finfo(torch.float32).max:
                    asked = f"putting a LoRA beside {name} at strength {strength}"
                    raise LoadError(asked, "what it adds is beyond float32", "Use another LoRA or strength")
    return found


def _check_finite(name: str, *tensors: Tensor) -> None:
    """As the weights themselves are checked when they are loaded."""
    if not all(math.isfinite(_largest(tensor)) for tensor in tensors):
        found = "it holds infinite or undefined numbers for that"
        raise LoadError(f"putting a LoRA beside {name}", found, "Use another LoRA")


def _largest(tensor: Tensor) -> float:
    """The largest absolute value; undefined where one of them is."""
    wide = tensor.float() if tensor.element_size() == 1 else tensor
    return float(wide.abs().max()) if wide.numel() else 0.0


def _layer(root: nn.Module, path: str, name: str) -> nn.Module:
    """The layer that has, or had, the parameter ``name``."""
    try:
        found = root.get_submodule(path)
    except AttributeError:
        found = None
    if found is None or isinstance(found, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise SetupError(
            f"a LoRA beside the weights that changes {name}", "a swap put something else in the place of that layer",
            "Merge the LoRA (mode fused), or let the swap keep the layer where it is",
        )  # fmt: skip
    return found


def _merge(owner: nn.Module, leaf: str, name: str, adapters: Adapters) -> None:
    """A new parameter in the place of the shared one, rounded to its dtype; one without data is changed when it is
    read."""
    old, fill = owner._parameters.get(leaf), f"load_{leaf}"
    wrong = SetupError(
        f"a LoRA beside the weights that changes {name} other than by low rank",
        f"{type(owner).__name__} has no plain floating-point {leaf} there",
        "Merge the LoRA (mode fused), or leave that layer unquantized",
    )

    def merged(weight: Tensor) -> Tensor:
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise wrong
        plain = weight.to(at_least_float32(weight.dtype))
        total = plain.clone()
        for adapter, strength in adapters:
            if name in adapter.deltas:
                total.add_(adapter.added(name, plain), alpha=strength)
        _check_finite(name, total)
        return total.to(weight.dtype)

    if old is None or hasattr(owner, fill):
        raise wrong
    if old.is_meta:
        setattr(owner, fill, lambda tensor: merged(tensor.read()))
    else:
        owner._parameters[leaf] = nn.Parameter(merged(old.detach()), requires_grad=old.requires_grad)


def _replaced(root: nn.Module, path: str, pairs: list[tuple[Tensor, Tensor, float]]) -> nn.Module:
    base = root.get_submodule(path)
    tensors = (*base.parameters(), *base.buffers())  # on meta before they are loaded, which then moves the factors
    device = next((t.device for t in tensors if not t.is_meta), torch.device("cpu"))
    adapted = AdaptedLinear(base, pairs, device)
    if not path:
        return adapted
    parent, _, leaf = path.rpartition(".")
    setattr(root.get_submodule(parent), leaf, adapted)
    return root
