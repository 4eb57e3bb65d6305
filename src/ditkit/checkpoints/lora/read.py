"""LoRA files of every family that Wan has, read strictly: each key is used, or the file is refused.

``read_lora`` makes an ``Adapter``: for each parameter of the transformer what is added to it at strength 1. It is used
as side weights (``nn/lora.py``) or merged while weights stream (merge.py). ``inspect_lora`` tells what a file is. What
keys mean is in names.py, the arithmetic in deltas.py, scales in scale.py.
Leaves out: what is no addition to a weight (OFT, Control-LoRA, Stand-In, UniAnimate); it is refused by name."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ditkit.checkpoints.files.stored import FLOATS
from ditkit.checkpoints.files.text import some
from ditkit.checkpoints.kinds.kind import KINDS, LoraTargets
from ditkit.checkpoints.lora.deltas import Change, Decomposed, Delta, Shape, form_of
from ditkit.checkpoints.lora.names import OTHER_NETWORKS, Key, Names, blocks_in, read_key, refused
from ditkit.checkpoints.lora.scale import read_scale
from ditkit.checkpoints.views.source import TensorSource
from ditkit.contracts import EXPERTS
from ditkit.errors import LoadError, check_known

WHOLE = ("I64", "I32", "I16", "I8", "U8")  # an alpha may be a whole number
LARGEST = torch.finfo(torch.float32).max
PLAIN_PARAMETERS = ("modulation", "emb_pos")  # they belong to no layer of their own

ALLOWANCES: Mapping[str, str] = MappingProxyType({
    "image_branch": "parts for an image branch that the transformer does not have",
    "vace": "parts for a control branch that the transformer does not have",
    "text_encoder": "parts for the text encoder",
    "patch_embedding": "a patch embedding of another number of input channels",
    "lone_alpha": "scales without factors",
})  # fmt: skip
"""What may be left out when it is asked for by name: ``allow=("image_branch",)``."""


class Fault(NamedTuple):
    """Why so many ``keys`` cannot be used. ``rule``: the allowance that lets them be left out, if there is one."""

    text: str
    keys: int
    rule: str | None


@dataclass(frozen=True)
class Adapter:
    """What a LoRA adds to each parameter, by native name. Its factors stay in the file until they are asked for.

    ``report``: what ``inspect_lora`` says of it. ``options``: how it was read."""

    source: TensorSource
    deltas: Mapping[str, tuple[Delta, ...]]
    report: Mapping[str, Any]
    options: str

    @property
    def path(self) -> Path:
        return self.source.path

    @cached_property
    def fingerprint(self) -> str:
        """Stands for the file's content and for how it was read."""
        return self._with_options(self.source.fingerprint)

    @cached_property
    def sketch(self) -> str:
        return self._with_options(self.source.sketch)

    def _with_options(self, base: str) -> str:
        return hashlib.sha256(json.dumps([base, self.options]).encode()).hexdigest()

    def added(self, name: str, weight: Tensor) -> Tensor:
        """What is added to parameter ``name`` at strength 1, given its plain ``weight``; in float32, or in float64 if
        that has it. Shape and device are the weight's."""
        total, *rest = (delta.of(weight) for delta in self.deltas[name])
        for more in rest:
            total = total + more
        return total

    def low_rank(self, name: str) -> list[tuple[Tensor, Tensor, float]] | None:
        """(down [r, i], up [o, r], scale) whose products are all that is added to ``name``; None when there is more."""
        found = [delta for delta in self.deltas[name] if isinstance(delta, Change) and delta.kind == "lora"]
        return [(*d.factors(), d.scale) for d in found] if len(found) == len(self.deltas[name]) else None


def read_lora(
    source: TensorSource, targets: Mapping[str, Shape], *, kind: str = "wan", expert: str | None = None,
    allow: Collection[str] = (),
) -> Adapter:  # fmt: skip
    """The adapter in ``source`` for a transformer of that kind with these native parameter names and shapes.

    ``expert``: transformer or transformer_2, needed for files with parts for both. ``allow``: names of ``ALLOWANCES``.
    Raises LoadError for any key that has no use here."""
    for name in allow:
        check_known(name, ALLOWANCES, f"allowing {name!r} for {source.path}", "there is no such rule", LoadError)
    survey = _Survey(source, targets, kind, expert, allow)
    if survey.faults:
        raise survey.error()
    options = json.dumps([expert, None, None, sorted(allow)])  # the places of two old options, for old fingerprints
    deltas = MappingProxyType({name: tuple(deltas) for name, deltas in survey.deltas.items()})
    return Adapter(source, deltas, MappingProxyType(survey.report()), options)


def inspect_lora(
    source: TensorSource, targets: Mapping[str, Shape] | None = None, *, kind: str | None = None,
    allow: Collection[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """What ``source`` is, as plain values for printing and JSON; ``usable`` tells whether ``read_lora`` would take it.

    Without ``targets`` names are checked against the whole kind, and shapes only against each other; without ``kind``
    it is the kind that the keys are about. ``groups`` counts changed tensors by part of the network; ``ranks`` factor
    pairs by rank, 0 for whole factors; ``kinds`` changes by kind; ``left_out`` keys by the allowance that left them
    out."""
    return _Survey(source, targets, kind or lora_kind(source), None, allow).report()


def experts_of(source: TensorSource, kind: str = "wan") -> tuple[str, ...]:
    """The experts that a file names, by its prefixes; () for a file that could be for either."""
    return _experts(_keys(source, kind).values())


def _experts(keys: Collection[Key | None]) -> tuple[str, ...]:
    found = {key.expert for key in keys if key}
    return EXPERTS if EXPERTS[1] in found and len(found) > 1 else tuple(e for e in EXPERTS[1:] if e in found)


def lora_kind(source: TensorSource) -> str:
    """The kind of network that most keys of ``source`` are about."""
    keys = {kind.name: _keys(source, kind.name).values() for kind in KINDS.values() if kind.lora}
    return max(keys, key=lambda kind: sum(key is not None and key.module is not None for key in keys[kind]))


def _targets(kind: str) -> LoraTargets:
    found = KINDS[kind].lora
    if found is None:
        raise LoadError(f"reading a LoRA for {kind}", "nothing is known of LoRAs for this kind", "Leave it out")
    return found


def _keys(source: TensorSource, kind: str, beside: Collection[str] = ()) -> dict[str, Key | None]:
    """Every key of a file, taken apart; None for one without a role. ``beside``: names of the network itself."""
    targets = _targets(kind)
    names = Names.of(targets, max(blocks_in(source.tensors, targets), blocks_in(beside, targets)))
    return {text: read_key(text, names) for text in source.tensors}


class _Survey:
    """All keys of a file, sorted into changes and faults. Data is read of the scales only."""

    def __init__(
        self, source: TensorSource, targets: Mapping[str, Shape] | None, kind: str, expert: str | None,
        allow: Collection[str],
    ):  # fmt: skip
        self.source, self.targets, self.allow, self.about = source, targets, allow, _targets(kind)
        self.scale = read_scale(source, expert or EXPERTS[0])
        self.faults: list[Fault] = []
        self.deltas: dict[str, list[Delta]] = {}
        self.kinds, self.left_out = Counter[str](), Counter[str]()
        self.ranks, self.widths = Counter[int](), Counter[int]()
        keys = _keys(source, kind, targets or ())
        self.experts = _experts(keys.values())
        chosen = self._of_expert(self._usable(keys), expert)
        self.families = sorted({key.families[0] if key.families else "bare" for key in chosen})
        for name, roles in self._modules(chosen).items():
            self._module(name, roles)
        if not self.deltas and not self.faults and not self.left_out:
            self._fault("it holds no LoRA tensors", len(keys))

    def _fault(self, text: str, keys: int, rule: str | None = None) -> None:
        if rule is not None and rule in self.allow:
            self.left_out[rule] += keys
        else:
            self.faults.append(Fault(text, keys, rule))

    def _shape(self, key: Key) -> Shape:
        return self.source.tensors[key.text].shape

    # Which keys there are

    def _usable(self, keys: Mapping[str, Key | None]) -> list[Key]:
        """The keys with a role, of one adapter. What has none is a fault, and so are numbers that are none."""
        found: list[Key] = []
        unused: dict[str, list[str]] = {}
        strange = "no part of a LoRA"
        for text, key in keys.items():
            what, dtype = refused(text), self.source.tensors[text].dtype
            if what is None and key and dtype not in FLOATS and key.role != "alpha":
                what = f"stored as {dtype}"
            if what or key is None:
                unused.setdefault(f"{what}, which ditkit cannot apply" if what else strange, []).append(text)
            else:
                found.append(key)
        for what in sorted(unused, key=lambda what: what == strange):
            self._fault(f"{len(unused[what])} keys are {what} ({some(unused[what])})", len(unused[what]))
        if len(adapters := {key.adapter for key in found if key.adapter}) > 1:
            self._fault(f"it holds {len(adapters)} adapters in one file ({some(adapters)})", len(found))
            return []
        return found

    def _of_expert(self, keys: list[Key], expert: str | None) -> list[Key]:
        second = [key for key in keys if key.expert == EXPERTS[1]]
        if not second:
            return keys
        if expert is None:
            if self.targets is None:
                return [key for key in keys if key.expert != EXPERTS[1]] or keys
            self._fault(f"{len(second)} keys are for the expert {EXPERTS[1]}, and no expert was named", len(second))
            return []
        chosen = [key for key in keys if (key.expert or EXPERTS[0]) == expert]
        if not chosen:
            self._fault(f"it has nothing for the expert {expert}", len(keys))
        return chosen

    def _modules(self, keys: list[Key]) -> dict[str, dict[str, Key]]:
        """native module -> role -> key. A module that the family does not have is a fault, for each with its keys."""
        modules: dict[str, dict[str, Key]] = {}
        lost: dict[str, list[Key]] = {}
        for key in keys:
            if key.module is None:
                lost.setdefault(key.spelled, []).append(key)
            elif (other := modules.setdefault(key.module, {}).setdefault(key.role, key)) is not key:
                self._fault(f"{other.text} and {key.text} are the same thing twice", 1)
        for spelled, members in lost.items():
            rule = "text_encoder" if members[0].text.startswith(OTHER_NETWORKS) else None
            self._fault(f"the family has no module {spelled!r}", len(members), rule)
        return modules

    # What one module gets

    def _module(self, name: str, roles: Mapping[str, Key]) -> None:
        rest = dict(roles)
        if full := rest.pop("diff", None):
            self._full(name if name.split(".")[-1] in PLAIN_PARAMETERS else f"{name}.weight", full, "diff")
        if full := rest.pop("diff_b", None):
            self._full(f"{name}.bias", full, "bias")
        if full := rest.pop("diff_m", None):
            self._full(f"{name}.modulation", full, "modulation")
        keys = len(rest)
        alpha, bias = rest.pop("alpha", None), rest.pop("up_bias", None)
        magnitude = rest.pop("magnitude", None) or rest.pop("dora_scale", None)
        if not rest:
            if lone := [key.text for key in (alpha, bias, magnitude) if key]:
                rule = "lone_alpha" if alpha and not (bias or magnitude) else None
                self._fault(f"{', '.join(lone)} stand without factors", len(lone), rule)
            return
        form = form_of({role: self._shape(key) for role, key in rest.items()})
        if form is None:
            texts = some(key.text for key in roles.values() if key.role not in ("diff", "diff_b", "diff_m"))
            self._fault(f"the factors of {name} are incomplete or do not fit each other ({texts})", keys)
            return
        if not self._fits(f"{name}.weight", form.size, keys):
            return
        stored_alpha = None if alpha is None else self._number(alpha)
        factor = self.scale.of(next(iter(rest.values())).spelled, form.rank, stored_alpha)
        if abs(factor) > LARGEST:
            self._fault(f"the scale of {name} is {factor:.3g}, beyond float32", keys)
            return
        matrices = tuple(tuple(rest[role].text for role in matrix) for matrix in form.matrices)
        change, kind = Change(form.kind, self.source.__getitem__, matrices, factor), form.kind
        delta: Delta = change
        if magnitude is not None:
            axis = self._dora_axis(magnitude, form.size)
            if axis is None:
                shape = list(self._shape(magnitude))
                self._fault(f"{magnitude.text} has {shape}, one number for neither outputs nor inputs", keys)
                return
            delta, kind = Decomposed(change, magnitude.text, axis), f"dora {kind}"
        self._add(f"{name}.weight", delta, kind)
        self.ranks[form.rank or 0] += 1
        if "attn" in self.about.group(f"{name}.weight"):
            self.widths[form.size[0]] += 1
        if bias is not None:
            self._full(f"{name}.bias", bias, "bias", factor)

    def _full(self, target: str, key: Key, kind: str, factor: float = 1.0) -> None:
        if self._fits(target, self._shape(key), 1):
            self._add(target, Change("full", self.source.__getitem__, ((key.text,),), factor), kind)

    def _add(self, target: str, delta: Delta, kind: str) -> None:
        self.deltas.setdefault(target, []).append(delta)
        self.kinds[kind] += 1

    def _number(self, key: Key) -> float:
        facts = self.source.tensors[key.text]
        found = math.nan
        if prod(facts.shape) == 1 and facts.dtype in (*FLOATS, *WHOLE):
            found = float(self.source[key.text].reshape(()).to(torch.float64))
        if not math.isfinite(found):
            self._fault(f"{key.text} is not one finite number", 1)
            return 1.0
        return found

    def _dora_axis(self, key: Key, size: Shape) -> bool | None:
        """True for one magnitude for each output, False for each input, None for neither."""
        shape = self._shape(key)
        by_input = len(shape) > 1 and shape[0] == 1 and key.role == "dora_scale"
        return not by_input if prod(shape) == size[int(by_input)] else None

    def _fits(self, target: str, size: Shape, keys: int) -> bool:
        """Whether the transformer has ``target`` in this size: its shape, or (outputs, inputs times kernel)."""
        if self.targets is None:
            return True
        part = self.about.group(target)
        if target not in self.targets:
            self._fault(f"the transformer has no {target}", keys, part if part in ("image_branch", "vace") else None)
            return False
        shape = tuple(self.targets[target])
        if _same(size, shape):
            return True
        rule: str | None = None
        text = f"{target} has {list(shape)} where the LoRA is made for {list(size)}"
        if part == "patch_embedding" and size[:1] == shape[:1]:
            if prod(size) < prod(shape):
                rule = part
            else:
                text += ", more input channels: it is a Control-LoRA, or for an image-to-video model"
        self._fault(text, keys, rule)
        return False

    # What is said of it

    def report(self) -> dict[str, Any]:
        total = len(self.source.tensors)
        return {
            "family": " + ".join(self.families),
            "experts": list(self.experts),
            "width": self.widths.most_common(1)[0][0] if self.widths else None,
            "blocks": blocks_in(self.source.tensors, self.about),
            "keys": total,
            "pairs": self.ranks.total(),
            "kinds": dict(self.kinds),
            "ranks": {str(rank): count for rank, count in sorted(self.ranks.items())},
            "scale": self.scale.text,
            "groups": dict(Counter(map(self.about.group, self.deltas))),
            "left_out": dict(self.left_out),
            "coverage": (total - sum(fault.keys for fault in self.faults)) / max(total, 1),
            "problems": [fault.text for fault in self.faults],
            "usable": not self.faults,
        }

    def error(self) -> LoadError:
        """All faults in one sentence; the advice is that for the first of them which has one."""
        targets = self.targets or {}
        width = targets["patch_embedding.weight"][0] if "patch_embedding.weight" in targets else "?"
        blocks = blocks_in(targets, self.about)
        asked = f"using the LoRA {self.source.path} with a transformer of width {width}, {blocks} blocks"
        unused, (first, *more) = sum(fault.keys for fault in self.faults), self.faults
        found = f"{unused} of {len(self.source.tensors)} keys have no use: {first.text}"
        if more:
            found += f" (and {len(more)} more such reasons, the last: {more[-1].text})"
        if not self.deltas:
            return LoadError(asked, f"it does nothing here; {found}", "Use a LoRA that was made for this model")
        rules = sorted({fault.rule for fault in self.faults if fault.rule})
        if all(fault.rule for fault in self.faults):
            what = " and ".join(ALLOWANCES[rule] for rule in rules)
            given = ", ".join([*sorted(self.allow), *rules])
            return LoadError(asked, found, f"Use a LoRA for this model, or lora_allow={given} leaves out {what}")
        return LoadError(asked, found, "Use a LoRA that was made for this model; `ditkit inspect` lists its parts")


def _same(size: Shape, shape: Shape) -> bool:
    """Equal up to axes of length 1, or as the matrix that a convolution's weight is."""
    flat = (*shape[:1], prod(shape[1:]))
    return size == flat or [n for n in size if n > 1] == [n for n in shape if n > 1]
