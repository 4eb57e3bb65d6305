"""Fill a module with tensors, strictly: every parameter once, in its shape, and nothing left over.

The module should have been built on the meta device. Names and shapes are compared before any data is read; then
tensors come one by one and are cast and placed, so memory holds one copy of the weights and one tensor more.
Leaves out: where tensors come from (files.py) and what they are called elsewhere (keys.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ditkit.checkpoints.files.opening import DTYPES, some
from ditkit.checkpoints.views.source import TensorSource, cast, no_inspection
from ditkit.errors import LoadError

NOTHING: Mapping[str, str] = MappingProxyType({})


def load_into(
    module: nn.Module,
    source: TensorSource,
    names: Mapping[str, str] | None = None,
    *,
    dtype_of: Callable[[str], torch.dtype | None] = lambda name: None,
    device: torch.device | str = "cpu",
    aliases: Mapping[str, str] = NOTHING,
    check_finite: bool = False,
) -> None:
    """Replace every parameter and persistent buffer of ``module`` by the tensor of that name in ``source``.

    ``names``: the source's name -> the module's name; None when they are equal, and then nothing is unknown.
    ``dtype_of``: the module's full name of a tensor -> its dtype; None keeps the stored one.
    ``aliases``: second name -> first name of one parameter, in the module's names. The source may have either or both;
    both must be equal. The module has one parameter under both names afterwards.
    ``check_finite`` refuses infinities and NaN after the cast; each part is looked at just after it was read.
    Raises LoadError for unknown, missing, doubled, mis-shaped and non-float tensors, counting all of them."""
    asked = f"loading {type(module).__name__} from {source.path}"
    target = fit(asked, _wanted(module, aliases), source, names, aliases=aliases)
    with torch.inference_mode(False):  # a parameter made in inference mode could never be trained
        filled: dict[str, Tensor] = {}
        for key in source.tensors:
            name = target[key]
            tensor = read(asked, source, key, dtype_of(name), check_finite=check_finite).to(device)
            if name in filled:
                if not torch.equal(filled[name], tensor):
                    raise two_names_differ(asked, key, name)
                continue
            filled[name] = tensor
            _assign(module, name, tensor)
            del tensor
        for second, first in aliases.items():
            parent, leaf = _parent(module, second)
            setattr(parent, leaf, module.get_parameter(first))
    if left := [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]:
        raise LoadError(asked, f"{len(left)} tensors stayed without data ({some(left)})", "Report this as a bug")


def mismatches(
    module: nn.Module,
    source: TensorSource,
    names: Mapping[str, str] | None = None,
    *,
    aliases: Mapping[str, str] = NOTHING,
) -> list[str]:
    """What ``load_into`` would refuse about names, shapes and types, as words; it reads no data."""
    return _compare(_wanted(module, aliases), source, names, aliases)[1]


def fit(
    asked: str,
    wanted: Mapping[str, Tensor],
    source: TensorSource,
    names: Mapping[str, str] | None = None,
    *,
    aliases: Mapping[str, str] = NOTHING,
) -> dict[str, str]:
    """The source's names -> those of ``wanted`` (tensors on the meta device), all found; it reads no data. Raises
    LoadError as ``load_into`` does. With ``read`` this is for weights that no module of torch holds."""
    target, problems = _compare(wanted, source, names, aliases)
    if problems:
        raise LoadError(asked, "; ".join(problems), "Use the weights and the config of one and the same model")
    return target


def read(asked: str, source: TensorSource, key: str, dtype: torch.dtype | None, *, check_finite: bool = True) -> Tensor:
    """One tensor as ``dtype`` (None: as it is stored), on the CPU. Raises LoadError where it is not finite."""
    seen = _Seen()
    tensor = cast(source, key, dtype, seen if check_finite else no_inspection)
    if not seen.all_finite:
        raise LoadError(asked, f"{key} holds infinite or undefined numbers as {tensor.dtype}", "Use other weights")
    return tensor


def two_names_differ(asked: str, key: str, name: str) -> LoadError:
    return LoadError(asked, f"{key} differs from its other name {name}", "Use unmodified weights")


def _wanted(module: nn.Module, aliases: Mapping[str, str]) -> dict[str, Tensor]:
    wanted = {name: t for name, t in module.state_dict(keep_vars=True).items() if name not in aliases}
    if len({id(tensor) for tensor in wanted.values()}) < len(wanted):
        raise ValueError(f"{type(module).__name__} has one tensor under two names; list the second in aliases")
    return wanted


def _compare(
    wanted: Mapping[str, Tensor], source: TensorSource, names: Mapping[str, str] | None, aliases: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """(source name -> wanted name, what does not fit)."""
    target, unknown, doubled = _match(source, wanted, names, aliases)
    missing = wanted.keys() - target.values()
    shapes = [
        f"{name} has {list(info.shape)} where the model has {list(wanted[target[name]].shape)}"
        for name, info in source.tensors.items()
        if name in target and info.shape != tuple(wanted[target[name]].shape)
    ]
    kinds = [
        f"{name} is {info.dtype}"
        for name, info in source.tensors.items()
        if name in target
        and getattr(torch, DTYPES[info.dtype]).is_floating_point != wanted[target[name]].dtype.is_floating_point
    ]
    return target, [
        f"{len(items)} {text} ({some(items)})"
        for items, text in (
            (missing, "tensors are missing"),
            (unknown, "tensors are unknown to the model"),
            (doubled, "tensors come twice under two names"),
            (shapes, "tensors have another shape"),
            (kinds, "tensors have a type that is no weight"),
        )
        if items
    ]


class _Seen:
    """Looks at the parts of a tensor for numbers that are not finite.

    A sum carries infinities and NaN on, and is one pass without a copy: many times faster than ``isfinite``, twice as
    fast as least and greatest. A sum of finite numbers can be infinite too, so then they are looked at one by one."""

    def __init__(self) -> None:
        self.all_finite = True

    def __call__(self, part: Tensor) -> None:
        if not part.is_floating_point() or not self.all_finite:
            return
        if part.element_size() == 1:  # torch sums no 8-bit floats
            part = part.float()
        if not math.isfinite(part.sum().item()):
            self.all_finite = bool(part.isfinite().all())


def _match(
    source: TensorSource, wanted: Mapping[str, Tensor], names: Mapping[str, str] | None, aliases: Mapping[str, str]
) -> tuple[dict[str, str], set[str], list[str]]:
    """(source name -> module name, unknown source names, source names whose module name is taken)."""
    target: dict[str, str] = {}
    unknown, doubled, taken = set(), [], set()
    for key in source.tensors:
        name = key if names is None else names.get(key, "")
        first = aliases.get(name, name)
        if first not in wanted:
            unknown.add(key)
        elif name in taken:
            doubled.append(key)
        else:
            taken.add(name)
            target[key] = first
    return target, unknown, doubled


def _parent(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    parent, leaf = _parent(module, name)
    old = getattr(parent, leaf)
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
    setattr(parent, leaf, tensor)
