"""Fill a module with tensors, strictly: every parameter once, in its shape, and nothing left over.

The module should have been built on the meta device. Names and shapes are compared before any data is read, then swaps
(seam C) put other modules in, and then tensors come one by one; each is cast and goes straight to its own device, so
memory holds one copy of the weights and one tensor more.
Leaves out: where tensors come from (``files/``, ``views/``) and what they are called elsewhere (``kinds``)."""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditkit.checkpoints.files.stored import DTYPES
from ditkit.checkpoints.files.text import some
from ditkit.checkpoints.views.source import Stored, TensorSource, no_inspection
from ditkit.contracts import Swap
from ditkit.devices import lacks, put
from ditkit.errors import LoadError, SetupError, noted

Device = torch.device | str
Slot = tuple[nn.Module, str]
"""A module, and the name of one of its own parameters or buffers."""


def load_into(
    module: nn.Module, source: TensorSource, *,
    dtype_of: Callable[[str], torch.dtype | None] = lambda name: None,
    device_of: Device | Callable[[str], Device] = "cpu", swaps: Sequence[Swap] = (),
    aliases: Mapping[str, str] = {}, check_finite: bool = False,
) -> None:  # fmt: skip
    """Replace every parameter and persistent buffer of ``module`` by the tensor of that name in ``source``.

    ``dtype_of``: the module's full name of a tensor -> its dtype; None keeps the stored one.
    ``device_of``: one device, or the module's full name of a tensor -> its device. What is to be on ``meta`` is not
    read: it stays without data, for whoever brings it later.
    ``swaps`` (``contracts.Swap``) act after the names have been compared. All names are those of before.
    ``aliases``: second name -> first name of one parameter, in the module's names. The source may have either or both;
    both must be equal. The module has one parameter under both names afterwards.
    ``check_finite`` refuses infinities and NaN after the cast; each part is looked at just after it was read.
    Raises LoadError for unknown, missing, mis-shaped and non-float tensors, counting all of them; for those
    that have no place after the swaps, and those that stay without data. SetupError for a swap that matches nothing."""
    asked = f"loading {type(module).__name__} from {source.path}"

    def device(name: str) -> torch.device:
        return torch.device(device_of if isinstance(device_of, str | torch.device) else device_of(name))

    wanted = _wanted(module, aliases)
    target = fit(asked, wanted, source, aliases)
    own = {id(tensor): name for name, tensor in wanted.items()}
    own |= {id(t): aliases[n] for n, t in module.state_dict(keep_vars=True).items() if n in aliases}
    later: set[tuple[int, str]] = set()
    with torch.inference_mode(False):  # a parameter made in inference mode could never be trained
        apply_swaps(module, swaps)
        slots, brought = _slots(asked, module, wanted, own)
        for place, (owner, leaf) in brought.items():
            old, where = getattr(owner, leaf), device(place)
            if "meta" not in (old.device.type, where.type) and old.device != where:
                setattr(owner, leaf, _like(old, put(old.detach(), where)))
        done: dict[str, tuple[SourceTensor, Tensor | None]] = {}
        for key in source.tensors:
            name = target[key]
            tensor = SourceTensor(asked, source, key, dtype_of(name), device(name), check_finite)
            if tensor.device.type == "meta":
                later |= {(id(owner), leaf) for owner, leaf in slots[name]}
            elif name not in done:
                done[name] = tensor, _fill(tensor, slots[name])
            else:
                first, held = done[name]
                if not torch.equal(first.read() if held is None else held, tensor.read()):
                    raise two_names_differ(asked, key, name)
    left = [n for n, owner, leaf, t in _tensors(module) if t.is_meta and (id(owner), leaf) not in later]
    if left:
        do = "Fill them where the module is swapped in" if swaps else "Report this as a bug"
        raise LoadError(asked, f"{len(left)} tensors stayed without data ({some(left)})", do)


def apply_swaps(module: nn.Module, swaps: Iterable[Swap]) -> None:
    """Replace every module that a swap matches. Raises SetupError for a swap that matches none."""
    for swap in swaps:
        with noted(f"making the swap {swap.name!r} in {type(module).__name__}"):
            found = [name for name, child in module.named_modules() if name and swap.match(name, child)]
            if not found:
                told = f"it matches no module of {type(module).__name__}"
                raise SetupError(f"swap {swap.name!r}", told, "Compare with named_modules()")
            for name in found:
                path, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(path), leaf, swap.make(module.get_submodule(name)))


@dataclass
class SourceTensor:
    """One tensor of a source on its way into a module: ``key`` is its name there, ``dtype`` and ``device`` are what it
    is to have in the module (dtype None: as it is stored). A module that fills itself is given it (``Swap``)."""

    asked: str
    source: TensorSource
    key: str
    dtype: torch.dtype | None
    device: torch.device
    check_finite: bool = True
    used: bool = False

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Its numbers as ``dtype`` (None: that of the module), on its device. Raises LoadError."""
        self.used, dtype = True, dtype or self.dtype
        return read(self.asked, self.source, self.key, dtype, check_finite=self.check_finite).to(self.device)

    def stored(self) -> Stored:
        """Codes, scales and format, on its device. Its numbers are looked at too, where that was asked for, which takes
        as long as to read them. Raises LoadError for what has no stored form, such as a weight with a LoRA merged."""
        self.used, found = True, self.source.stored(self.key)
        if lacks(self.device, found.codes.dtype):
            told = f"{self.device} does not have {str(found.codes.dtype).removeprefix('torch.')}"
            raise LoadError(f"{self.asked}, {self.key} as it is stored", told, "Take its numbers, or another device")
        if self.check_finite:
            read(self.asked, self.source, self.key, self.dtype)
        return found.to(self.device)


def identify_weights(
    source: TensorSource, dtype: torch.dtype, config: Any, swaps: Sequence[Swap] = (), *more: str
) -> Callable[[], str]:
    """What tells the fingerprint of a component made of these. When first asked it reads all files; then it remembers.
    ``config``: a dataclass of sizes. Components of one fingerprint give the same bits on the same kind of device."""

    @functools.cache
    def identify() -> str:
        about = [source.fingerprint, str(dtype), asdict(config), *more, *(swap.fingerprint for swap in swaps)]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    return identify


def mismatches(module: nn.Module, source: TensorSource, aliases: Mapping[str, str]) -> list[str]:
    """What ``load_into`` would refuse about names, shapes and types, as words; it reads no data."""
    return _compare(_wanted(module, aliases), source, aliases)[1]


def fit(asked: str, wanted: Mapping[str, Tensor], source: TensorSource, aliases: Mapping[str, str]) -> dict[str, str]:
    """The source's names -> those of ``wanted`` (tensors on the meta device), all found; it reads no data. Raises
    LoadError as ``load_into`` does. With ``read`` this is for weights that no module of torch holds."""
    target, problems = _compare(wanted, source, aliases)
    if problems:
        raise LoadError(asked, "; ".join(problems), "Use the weights and the config of one and the same model")
    return target


def read(asked: str, source: TensorSource, key: str, dtype: torch.dtype | None, *, check_finite: bool = True) -> Tensor:
    """One tensor as ``dtype`` (None: as it is stored), on the CPU. Raises LoadError where it is not finite."""
    finite = True

    def look(part: Tensor) -> None:
        nonlocal finite
        finite = finite and _is_finite(part)

    tensor = source.cast(key, dtype, look if check_finite else no_inspection)
    if not finite:
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
    wanted: Mapping[str, Tensor], source: TensorSource, aliases: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """(source name -> wanted name, what does not fit)."""
    target = {key: name for key in source.tensors if (name := aliases.get(key, key)) in wanted}
    shapes, kinds = [], []
    for key, name in target.items():
        info, tensor = source.tensors[key], wanted[name]
        if info.shape != tuple(tensor.shape):
            shapes.append(f"{key} has {list(info.shape)} where the model has {list(tensor.shape)}")
        if DTYPES[info.dtype].is_floating_point != tensor.dtype.is_floating_point:
            kinds.append(f"{key} is {info.dtype}")
    problems = {
        "tensors are missing": wanted.keys() - target.values(),
        "tensors are unknown to the model": source.tensors.keys() - target.keys(),
        "tensors have another shape": shapes, "tensors have a type that is no weight": kinds,
    }  # fmt: skip
    return target, [f"{len(items)} {text} ({some(items)})" for text, items in problems.items() if items]


def _is_finite(part: Tensor) -> bool:
    """A sum carries infinities and NaN on, in one pass without a copy: many times faster than ``isfinite``. A sum of
    finite numbers can be infinite too, so then they are looked at one by one."""
    if not part.is_floating_point():
        return True
    if part.element_size() == 1:  # torch sums no 8-bit floats
        part = part.float()
    return math.isfinite(part.sum().item()) or bool(part.isfinite().all())


def _tensors(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(full name, owner, name there, tensor) of every parameter and buffer."""
    for path, owner in module.named_modules():
        for leaf, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None:
                yield f"{path}.{leaf}" if path else leaf, owner, leaf, tensor


def _slots(
    asked: str, module: nn.Module, wanted: Mapping[str, Tensor], own: Mapping[int, str]
) -> tuple[dict[str, list[Slot]], dict[str, Slot]]:
    """(name before the swaps -> where its tensor goes now, name of a tensor that a swap brought -> where it is).

    ``own``: id of a tensor of before -> its name. A new tensor on the meta device has the name of its place."""
    found: dict[str, list[Slot]] = {}
    brought: dict[str, Slot] = {}
    for name, owner, leaf, tensor in _tensors(module):
        if (known := own.get(id(tensor))) is not None:
            found.setdefault(known, []).append((owner, leaf))
        else:
            brought[name] = owner, leaf
    for name in wanted.keys() - found.keys() & brought.keys():
        owner, leaf = brought[name]
        if (tensor := getattr(owner, leaf)).is_meta and tensor.shape == wanted[name].shape:
            found[name] = [brought.pop(name)]
    if lost := wanted.keys() - found.keys():
        do = "Let the new modules take over the old parameters (not copies of them), or have some of the same names"
        raise LoadError(asked, f"{len(lost)} tensors have no place after the swaps ({some(lost)})", do)
    return found, brought


def _fill(tensor: SourceTensor, slots: Iterable[Slot]) -> Tensor | None:
    """One tensor for all ``slots``; a module that fills itself makes its own."""
    value: Tensor | None = None
    for owner, leaf in slots:
        old = getattr(owner, leaf)
        if (fill := getattr(owner, f"load_{leaf}", None)) is not None:
            delattr(owner, leaf)
            vars(owner).pop(f"load_{leaf}", None)
            made = fill(tensor)
            if not tensor.used:
                found = f"load_{leaf} of {type(owner).__name__} did not look at {tensor.key}"
                raise LoadError(tensor.asked, found, "Let it read the tensor, or leave that to the loader")
            if made is not None and isinstance(old, nn.Parameter):
                setattr(owner, leaf, _like(old, made))
            elif made is not None:
                owner.register_buffer(leaf, made)
        else:
            value = _like(old, tensor.read()) if value is None else value
            setattr(owner, leaf, value)
    return value


def _like(old: Tensor, new: Tensor) -> Tensor:
    """``new``, a parameter where ``old`` was one."""
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
