"""LoRA files of every family that Wan has, read strictly: each key is used, or the file is refused.

``read_lora`` makes an ``Adapter``: for each parameter of the transformer what is added to it at strength 1. It is used
as side weights (``nn/lora.py``) or merged while weights stream (``lora_merge.py``). ``inspect_lora`` tells what a file
is. What keys mean is in lora_names.py, the arithmetic in lora_deltas.py, scales in lora_scale.py.
Leaves out: what is no addition to a weight (OFT, Control-LoRA, Stand-In, UniAnimate); it is refused by name.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ditkit.checkpoints.files.text import some
from ditkit.checkpoints.kinds.kind import KINDS, LoraTargets
from ditkit.checkpoints.lora.deltas import Decomposed, Delta, Full, Hadamard, Kronecker, LowRank, Product
from ditkit.checkpoints.lora.names import OTHER_NETWORKS, Key, Names, blocks_in, read_key, refused
from ditkit.checkpoints.lora.scale import Scale, read_scale
from ditkit.checkpoints.views.source import TensorSource
from ditkit.contracts import EXPERTS
from ditkit.errors import LoadError, nearest

Shape = tuple[int, ...]
Roles = Mapping[str, Key]
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # without scales, other codes stand for no numbers
PLAIN_PARAMETERS = ("modulation", "emb_pos")  # they belong to no layer of their own

ALLOWANCES: Mapping[str, str] = MappingProxyType(
    {
        "image_branch": "parts for an image branch that the transformer does not have",
        "vace": "parts for a control branch that the transformer does not have",
        "text_encoder": "parts for the text encoder",
        "patch_embedding": "a patch embedding of another number of input channels",
        "lone_alpha": "scales without factors",
    }
)
"""What may be left out when it is asked for by name: ``allow=("image_branch",)``."""


@dataclass(frozen=True)
class Fault:
    """Why keys cannot be used. ``rule`` names the allowance that lets them be left out, None when there is none."""

    text: str
    keys: tuple[str, ...]
    rule: str | None = None


@dataclass(frozen=True)
class Report:
    """What a file holds, and how it meets a transformer. ``applied`` counts changed tensors by part of the network;
    ``ranks`` factor pairs by rank, 0 for whole factors; ``kinds`` changes by kind; ``left_out`` keys by the allowance
    that left them out."""

    families: tuple[str, ...]
    keys: int
    pairs: int
    kinds: Mapping[str, int]
    ranks: Mapping[int, int]
    scale: str
    applied: Mapping[str, int]
    left_out: Mapping[str, int]
    width: int | None
    blocks: int
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class Adapter:
    """What a LoRA adds to each parameter, by native name. Its factors stay in the file until they are asked for."""

    source: TensorSource
    deltas: Mapping[str, tuple[Delta, ...]]
    report: Report
    options: str

    @property
    def path(self) -> Path:
        return self.source.path

    @cached_property
    def fingerprint(self) -> str:
        """Stands for the file's content and for how it was read."""
        return _hash(self.source.fingerprint, self.options)

    @cached_property
    def sketch(self) -> str:
        return _hash(self.source.sketch, self.options)

    def added(self, name: str, weight: Tensor) -> Tensor:
        """What is added to parameter ``name`` at strength 1, given its plain ``weight``; in float32, or in float64 if
        that has it. Shape and device are the weight's."""
        total, *rest = (delta.of(weight) for delta in self.deltas[name])
        for more in rest:
            total = total + more
        return total

    def low_rank(self, name: str) -> list[tuple[Tensor, Tensor, float]] | None:
        """(down [r, i], up [o, r], scale) whose products are all that is added to ``name``; None when there is more."""
        found = [delta for delta in self.deltas[name] if isinstance(delta, LowRank)]
        return [(*d.factors(), d.scale) for d in found] if len(found) == len(self.deltas[name]) else None


def _hash(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read_lora(
    source: TensorSource,
    targets: Mapping[str, Shape],
    *,
    kind: str = "wan",
    expert: str | None = None,
    alpha: float | None = None,
    rs_lora: bool | None = None,
    allow: Collection[str] = (),
) -> Adapter:
    """The adapter in ``source`` for a transformer of that kind with these native parameter names and shapes.

    ``expert``: transformer or transformer_2, needed for files with parts for both. ``alpha``: for all pairs, in place
    of what the file says. ``rs_lora``: divide alpha by the root of the rank; None does what the file's settings say.
    ``allow``: names of ``ALLOWANCES``. Raises LoadError for any key that has no use here."""
    for name in allow:
        if name not in ALLOWANCES:
            raise LoadError(
                f"allowing {name!r} for {source.path}",
                f"there is no such rule{nearest(name, ALLOWANCES)}",
                f"Choose among {', '.join(ALLOWANCES)}",
            )
    survey = _Survey(source, targets, kind, expert, read_scale(source, alpha, rs_lora, expert), frozenset(allow))
    if survey.faults:
        raise survey.error()
    options = json.dumps([expert, alpha, rs_lora, sorted(allow)])
    deltas = MappingProxyType({name: tuple(deltas) for name, deltas in survey.deltas.items()})
    return Adapter(source, deltas, survey.report(), options)


def experts_of(source: TensorSource, kind: str = "wan") -> tuple[str, ...]:
    """The experts that a file names, by its prefixes; () for a file that could be for either."""
    names = _names(kind, source.tensors)
    found = {key.expert for text in source.tensors if (key := read_key(text, names))}
    return EXPERTS if EXPERTS[1] in found and len(found) > 1 else tuple(e for e in EXPERTS[1:] if e in found)


def is_lora(source: TensorSource) -> bool:
    """Whether any key has the role of a factor or a difference. No data is read."""
    names = Names({}, {})
    return any(read_key(text, names) or refused(text) for text in source.tensors)


def lora_kind(source: TensorSource) -> str:
    """The kind of network that most keys of ``source`` are about."""
    kinds = [kind.name for kind in KINDS.values() if kind.lora]
    named = {kind: _names(kind, source.tensors) for kind in kinds}
    return max(kinds, key=lambda kind: sum((key := read_key(text, named[kind])) is not None and key.module is not None
                                           for text in source.tensors))  # fmt: skip


def _targets(kind: str) -> LoraTargets:
    found = KINDS[kind].lora
    if found is None:
        raise LoadError(f"reading a LoRA for {kind}", "nothing is known of LoRAs for this kind", "Leave it out")
    return found


def _names(kind: str, *names: Collection[str]) -> Names:
    targets = _targets(kind)
    return Names.of(targets, max(blocks_in(some_names, targets) for some_names in names))


def inspect_lora(
    source: TensorSource,
    targets: Mapping[str, Shape] | None = None,
    *,
    kind: str | None = None,
    expert: str | None = None,
    alpha: float | None = None,
    rs_lora: bool | None = None,
    allow: Collection[str] = (),
) -> dict[str, Any]:
    """What ``source`` is, as plain values for printing and JSON; ``usable`` tells whether ``read_lora`` would take it.

    Without ``targets`` names are checked against the whole kind, and shapes only against each other; without ``kind``
    it is the kind that the keys are about."""
    kind = kind or lora_kind(source)
    survey = _Survey(source, targets, kind, expert, read_scale(source, alpha, rs_lora, expert), frozenset(allow))
    report = survey.report()
    unused = sum(len(fault.keys) for fault in report.faults)
    return {
        "family": " + ".join(report.families),
        "experts": list(experts_of(source, kind)),
        "width": report.width,
        "blocks": report.blocks,
        "keys": report.keys,
        "pairs": report.pairs,
        "kinds": dict(report.kinds),
        "ranks": {str(rank): count for rank, count in sorted(report.ranks.items())},
        "scale": report.scale,
        "groups": dict(report.applied),
        "left_out": dict(report.left_out),
        "coverage": (report.keys - unused) / max(report.keys, 1),
        "problems": [fault.text for fault in report.faults],
        "usable": not report.faults,
    }


class _Survey:
    """All keys of a file, sorted into changes and faults. Data is read of the scales only."""

    def __init__(
        self,
        source: TensorSource,
        targets: Mapping[str, Shape] | None,
        kind: str,
        expert: str | None,
        scale: Scale,
        allow: frozenset[str],
    ):
        self.source, self.targets, self.scale, self.allow = source, targets, scale, allow
        self.faults: list[Fault] = []
        self.deltas: dict[str, list[Delta]] = {}
        self.kinds: Counter[str] = Counter()
        self.ranks: Counter[int] = Counter()
        self.left_out: Counter[str] = Counter()
        self.widths: Counter[int] = Counter()
        self.about = _targets(kind)
        self.blocks = blocks_in(source.tensors, self.about)
        names = _names(kind, source.tensors, targets or ())
        keys = self._keys(names, expert)
        self.families = tuple(sorted({_family(key) for key in keys}))
        self.total = len(source.tensors)
        for name, roles in self._modules(keys).items():
            self._module(name, roles)
        if not self.deltas and not self.faults and not self.left_out:
            self._fault("it holds no LoRA tensors", tuple(source.tensors))

    def _fault(self, text: str, keys: tuple[str, ...], rule: str | None = None) -> None:
        if rule in self.allow and rule is not None:
            self.left_out[rule] += len(keys)
        else:
            self.faults.append(Fault(text, keys, rule))

    def _shape(self, key: Key) -> Shape:
        return tuple(self.source.tensors[key.text].shape)

    # Which keys there are

    def _keys(self, names: Names, expert: str | None) -> list[Key]:
        """The keys with a role, of the one expert. What has none is a fault."""
        found: list[Key] = []
        strange: list[str] = []
        banned: dict[str, list[str]] = {}
        for text, facts in self.source.tensors.items():
            if what := refused(text):
                banned.setdefault(what, []).append(text)
            elif key := read_key(text, names):
                if facts.dtype in FLOATS or key.role == "alpha":
                    found.append(key)
                else:
                    banned.setdefault(f"stored as {facts.dtype}", []).append(text)
            else:
                strange.append(text)
        for what, members in banned.items():
            self._fault(f"{len(members)} keys are {what}, which ditkit cannot apply ({some(members)})", tuple(members))
        if strange:
            self._fault(f"{len(strange)} keys are no part of a LoRA ({some(strange)})", tuple(strange))
        if len(names_of := {key.adapter for key in found if key.adapter}) > 1:
            texts = tuple(key.text for key in found)
            self._fault(f"it holds {len(names_of)} adapters in one file ({some(names_of)})", texts)
            return []
        return self._of_expert(found, expert)

    def _of_expert(self, keys: list[Key], expert: str | None) -> list[Key]:
        if all(key.expert != EXPERTS[1] for key in keys):
            return keys
        if self.targets is None and expert is None:
            return [key for key in keys if key.expert != EXPERTS[1]] or keys
        if expert is None:
            texts = tuple(key.text for key in keys if key.expert == EXPERTS[1])
            self._fault(f"{len(texts)} keys are for the expert transformer_2, and no expert was named", texts)
            return []
        chosen = [key for key in keys if (key.expert or EXPERTS[0]) == expert]
        if not chosen:
            self._fault(f"it has nothing for the expert {expert}", tuple(key.text for key in keys))
        return chosen

    def _modules(self, keys: list[Key]) -> dict[str, dict[str, Key]]:
        """native module -> role -> key. A module that the family does not have is a fault, for each with its keys."""
        modules: dict[str, dict[str, Key]] = {}
        lost: dict[str, list[Key]] = {}
        for key in keys:
            if key.module is None:
                lost.setdefault(key.spelled, []).append(key)
            elif (other := modules.setdefault(key.module, {}).get(key.role)) is not None:
                self._fault(f"{other.text} and {key.text} are the same thing twice", (key.text,))
            else:
                modules[key.module][key.role] = key
        for spelled, members in lost.items():
            texts = tuple(key.text for key in members)
            rule = "text_encoder" if texts[0].startswith(OTHER_NETWORKS) else None
            self._fault(f"the family has no module {spelled!r}", texts, rule)
        return modules

    # What one module gets

    def _module(self, name: str, roles: Mapping[str, Key]) -> None:
        rest = dict(roles)
        read = self.source.__getitem__
        if full := rest.pop("diff", None):
            self._full(name if name.split(".")[-1] in PLAIN_PARAMETERS else f"{name}.weight", full, "diff")
        if full := rest.pop("diff_b", None):
            self._full(f"{name}.bias", full, "bias")
        if full := rest.pop("diff_m", None):
            self._full(f"{name}.modulation", full, "modulation")
        alpha, bias = rest.pop("alpha", None), rest.pop("up_bias", None)
        magnitude = rest.pop("magnitude", None) or rest.pop("dora_scale", None)
        if not rest:
            if lone := [key.text for key in (alpha, bias, magnitude) if key]:
                rule = "lone_alpha" if alpha and not (bias or magnitude) else None
                self._fault(f"{', '.join(lone)} stand without factors", tuple(lone), rule)
            return
        texts = tuple(key.text for key in roles.values() if key.role not in ("diff", "diff_b", "diff_m"))
        shapes = {role: self._shape(key) for role, key in rest.items()}
        form_of = next((form_of for possible, form_of in FORMS if rest.keys() <= possible), None)
        form = form_of(shapes) if form_of else None
        if form is None:
            self._fault(f"the factors of {name} are incomplete or do not fit each other ({some(texts)})", texts)
            return
        if not self._fits(f"{name}.weight", form.size, texts):
            return
        factor = self.scale.of(
            name=next(iter(rest.values())).spelled,
            rank=form.rank,
            alpha=None if alpha is None else self._number(alpha),
        )
        delta: Delta = form.delta(read, {role: key.text for role, key in rest.items()}, factor)
        kind = form.kind
        if magnitude is not None:
            axis = self._dora_axis(magnitude, form.size)
            if axis is None:
                shape = list(self._shape(magnitude))
                self._fault(f"{magnitude.text} has {shape}, one number for neither outputs nor inputs", texts)
                return
            delta, kind = Decomposed(delta, read, magnitude.text, axis), f"dora {kind}"
        self._add(f"{name}.weight", delta, kind)
        self.ranks[form.rank or 0] += 1
        if "attn" in self.about.group(f"{name}.weight"):
            self.widths[form.size[0]] += 1
        if bias is not None:
            self._full(f"{name}.bias", bias, "bias", factor)

    def _full(self, target: str, key: Key, kind: str, factor: float = 1.0) -> None:
        shape = self._shape(key)
        if self._fits(target, shape, (key.text,)):
            self._add(target, Full(self.source.__getitem__, key.text, factor), kind)

    def _add(self, target: str, delta: Delta, kind: str) -> None:
        self.deltas.setdefault(target, []).append(delta)
        self.kinds[kind] += 1

    def _number(self, key: Key) -> float:
        tensor = self.source[key.text]
        if tensor.numel() != 1 or not tensor.isfinite().all():
            self._fault(f"{key.text} is not one finite number", (key.text,))
            return 1.0
        return float(tensor)

    def _dora_axis(self, key: Key, size: Shape) -> bool | None:
        """True for one magnitude for each output, False for each input, None for neither."""
        shape, count = self._shape(key), prod(self._shape(key))
        by_input = len(shape) > 1 and shape[0] == 1 and key.role == "dora_scale"
        wanted = size[1] if by_input else size[0]
        return None if count != wanted else not by_input

    def _fits(self, target: str, size: Shape, texts: tuple[str, ...]) -> bool:
        """Whether the transformer has ``target`` in this size: its shape, or (outputs, inputs times kernel)."""
        if self.targets is None:
            return True
        part = self.about.group(target)
        if target not in self.targets:
            rule = part if part in ("image_branch", "vace") else None
            self._fault(f"the transformer has no {target}", texts, rule)
            return False
        shape = tuple(self.targets[target])
        if _same(size, shape):
            return True
        narrow = part == "patch_embedding" and size[0] == shape[0] and prod(size) < prod(shape)
        rule = "patch_embedding" if narrow else None
        text = f"{target} has {list(shape)} where the LoRA is made for {list(size)}"
        if part == "patch_embedding" and size[0] == shape[0] and not narrow:
            text += ", more input channels: it is a Control-LoRA, or for an image-to-video model"
        self._fault(text, texts, rule)
        return False

    # What is said of it

    def report(self) -> Report:
        return Report(
            families=self.families,
            keys=self.total,
            pairs=sum(self.ranks.values()),
            kinds=MappingProxyType(dict(self.kinds)),
            ranks=MappingProxyType(dict(self.ranks)),
            scale=self.scale.text,
            applied=MappingProxyType(dict(Counter(map(self.about.group, self.deltas)))),
            left_out=MappingProxyType(dict(self.left_out)),
            width=self.widths.most_common(1)[0][0] if self.widths else None,
            blocks=self.blocks,
            faults=tuple(self.faults),
        )

    def error(self) -> LoadError:
        """All faults in one sentence; the advice is that for the first of them which has one."""
        targets = self.targets or {}
        width = targets["patch_embedding.weight"][0] if "patch_embedding.weight" in targets else "?"
        blocks = blocks_in(targets, self.about)
        asked = f"using the LoRA {self.source.path} with a transformer of width {width}, {blocks} blocks"
        texts = [fault.text for fault in self.faults]
        found = f"{sum(len(f.keys) for f in self.faults)} of {self.total} keys have no use: {texts[0]}"
        if len(texts) > 1:
            found += f" (and {len(texts) - 1} more such reasons, the last: {texts[-1]})"
        if not self.deltas:
            return LoadError(asked, f"it does nothing here; {found}", "Use a LoRA that was made for this model")
        rules = sorted({fault.rule for fault in self.faults if fault.rule})
        if rules and all(fault.rule for fault in self.faults):
            what = " and ".join(ALLOWANCES[rule] for rule in rules)
            given = ", ".join([*sorted(self.allow), *rules])
            return LoadError(asked, found, f"Use a LoRA for this model, or lora_allow={given} leaves out {what}")
        return LoadError(asked, found, "Use a LoRA that was made for this model; `ditkit inspect` lists its parts")


def _family(key: Key) -> str:
    return key.families[0] if key.families else "bare"


def _same(size: Shape, shape: Shape) -> bool:
    """Equal up to axes of length 1, or as the matrix that a convolution's weight is."""
    flat = (shape[0], prod(shape[1:]))
    return size == flat or [n for n in size if n > 1] == [n for n in shape if n > 1]


@dataclass(frozen=True)
class _Form:
    """Factors that fit each other: what they make has ``size`` (outputs, inputs times kernel). ``rank``: None when
    nothing is factored."""

    kind: str
    size: tuple[int, int]
    rank: int | None
    delta: Any


def _product(shapes: Mapping[str, Shape], *names: str) -> tuple[tuple[str, ...], tuple[int, int], int | None] | None:
    """(the roles that are there, outputs and inputs, rank) of a matrix stored whole under the first name, or as the
    two next, with a core under the last."""
    whole, a, b, core = names
    if whole in shapes:
        shape = shapes[whole]
        return ((whole,), (shape[0], prod(shape[1:])), None) if not {a, b, core} & shapes.keys() else None
    if a not in shapes or b not in shapes or min(len(shapes[a]), len(shapes[b])) < 2:
        return None
    if core not in shapes:
        size = (shapes[a][0], prod(shapes[b][1:]))
        return ((a, b), size, shapes[b][0]) if prod(shapes[a][1:]) == shapes[b][0] else None
    kernel = shapes[core]
    if len(kernel) < 2 or kernel[:2] != (shapes[a][0], shapes[b][0]):
        return None
    return (a, b, core), (shapes[a][1], shapes[b][1] * prod(kernel[2:])), shapes[b][0]


def _lora(shapes: Mapping[str, Shape]) -> _Form | None:
    if shapes.keys() != {"down", "up"}:
        return None
    down, up = shapes["down"], shapes["up"]
    if min(len(down), len(up)) < 2 or prod(up[1:]) != down[0]:
        return None
    size = (up[0], prod(down[1:]))
    return _Form("lora", size, down[0], lambda read, keys, scale: LowRank(read, keys["down"], keys["up"], scale))


def _loha(shapes: Mapping[str, Shape]) -> _Form | None:
    pair = [_product(shapes, f"hada_w{n}", f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}") for n in (1, 2)]
    if pair[0] is None or pair[1] is None or pair[0][1] != pair[1][1]:
        return None
    return _two("loha", Hadamard, pair[0], pair[1], pair[0][1], pair[0][2])


def _lokr(shapes: Mapping[str, Shape]) -> _Form | None:
    pair = [_product(shapes, f"lokr_w{n}", f"lokr_w{n}_a", f"lokr_w{n}_b", f"lokr_t{n}") for n in (1, 2)]
    if pair[0] is None or pair[1] is None:
        return None
    size = (pair[0][1][0] * pair[1][1][0], pair[0][1][1] * pair[1][1][1])
    return _two("lokr", Kronecker, pair[0], pair[1], size, pair[1][2] or pair[0][2])


def _two(kind: str, of: Any, first: Any, second: Any, size: tuple[int, int], rank: int | None) -> _Form:
    def make(read: Any, keys: Mapping[str, str], scale: float) -> Delta:
        return of(*(Product(read, tuple(keys[role] for role in part[0])) for part in (first, second)), scale)

    return _Form(kind, size, rank, make)


FORMS = (
    (frozenset({"down", "up"}), _lora),
    (frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}), _loha),
    (frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}), _lokr),
)
