"""What a set of tensors is: kind, layout, task and size, by names, shapes, types and metadata, never by file names.

One layout of one kind must fit, and one only; none and several are errors that list the candidates. A file may hold
several networks, each under a prefix of its own (``networks``). What is recognised
but cannot be run (relatives of Wan with branches of their own) is named, with the reason in ``problems``.
Leaves out: the kinds themselves (their rows), the config and the other parts of a model, and the families of LoRAs."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ditkit.checkpoints.files.text import some
from ditkit.checkpoints.kinds.kind import KINDS
from ditkit.checkpoints.kinds.sizes import Tensors
from ditkit.checkpoints.views.source import TensorSource
from ditkit.errors import LoadError

LORA = re.compile(
    r".+\.(lora_(A|B|up|down)(\.\w+)?(\.weight|\.bias)?|lora_\w+\.(up|down)\.weight|lokr_\w+|hada_\w+|oft_\w+|diff(_b|_m)?)"
)
"""A tensor of an adapter; one is enough, because nothing else has such names."""


@dataclass(frozen=True)
class Detected:
    """``kind``: the name of its row, or lora or state. ``layout``: native, diffusers, transformers, or the empty
    string. ``prefix`` was in front of all names. ``variant`` is the task of a transformer.
    ``possible``: the models that these could be; when there are several, ``decides`` says what tells them apart, and
    ``two_experts`` is true if each has two. ``config``: what shapes tell of the sizes. ``problems``: why it cannot be
    run, as sentences."""

    kind: str
    layout: str
    prefix: str = ""
    quantization: str | None = None
    family: str = ""
    variant: str | None = None
    size_name: str | None = None
    possible: tuple[str, ...] = ()
    decides: str | None = None
    two_experts: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def networks(source: TensorSource) -> tuple[Any, ...]:
    """The networks in ``source``: itself, or what stands there under prefixes, as ``Section``s. Prefixes that no table
    knows are told by what stands behind them. Raises LoadError for tensors beside an only network."""
    from ditkit.checkpoints.views.prefixes import MARKERS, Section, shared_prefix, unwrapped

    if isinstance(source, Section) or _is_other(source):
        return (source,)
    names = {unwrapped(name) for name in source.tensors}
    usual = shared_prefix(names)
    bare = {name.removeprefix(usual) for name in names}
    forms = [(kind.name, form) for kind in KINDS.values() for form in kind.layouts.values()]
    if any(form.fits(bare) for _, form in forms):
        return (source,)
    found: dict[str, str] = {}  # prefix -> kind
    for kind, form in forms:
        for first, *_ in form.has:
            for name in names:
                prefix = name[: -len(first)]
                if name.endswith(f".{first}") and form.fits(_Behind(prefix, names)):
                    found[prefix] = kind
    found = {
        one: kind
        for one, kind in found.items()
        if not any(one != other and one.startswith(other) and kind == found[other] for other in found)
    }
    sections = tuple(Section(source, prefix, found) for prefix in sorted(found))
    if len(sections) == 1 and not sections[0].whole:
        (prefix,) = found
        others = [name for name in names if not name.startswith(prefix) and name not in MARKERS]
        told = f"it holds {found[prefix]} under names that begin with {prefix}, and {len(others)} tensors that do not"
        do = f"Give {source.path.name}#{prefix[:-1]} if those are not needed"
        raise LoadError(f"recognising {source.path}", f"{told} ({some(others)})", do)
    return sections or (source,)


@dataclass(frozen=True)
class _Behind:
    """The names behind a prefix."""

    prefix: str
    names: Collection[str]

    def __contains__(self, name: object) -> bool:
        return f"{self.prefix}{name}" in self.names


def _is_other(source: TensorSource) -> bool:
    return "ditkit.state" in source.metadata or any(LORA.fullmatch(name) for name in source.tensors)


def recognise(source: TensorSource) -> tuple[Detected, TensorSource]:
    """What ``source`` is, and ``source`` as it was looked at: parts of a model without the prefix that all names share,
    and dequantised if they are quantised. Raises LoadError when nothing fits, or several kinds do."""
    if "ditkit.state" in source.metadata:
        problem = "it is a saved State of ditkit, not a model"
        return Detected("state", "", family="ditkit", problems=(problem,)), source
    if any(LORA.fullmatch(name) for name in source.tensors):
        return Detected("lora", ""), source
    from ditkit.checkpoints.views.prefixes import Unprefixed
    from ditkit.checkpoints.views.quantized import Dequantized
    from ditkit.checkpoints.views.reshaped import Reshaped

    first, *more = networks(source)
    if more:
        found = f"it holds {len(more) + 1} networks ({some(one.prefix for one in (first, *more))})"
        raise LoadError(f"recognising {source.path}", found, "Name one of them by its prefix: FILE#PREFIX")
    unprefixed = first if isinstance(first, Unprefixed) else Unprefixed(first)
    view: Any = Dequantized(unprefixed)
    asked = f"recognising {source.path}"
    tensors, quantization = view.tensors, view.quantization
    layouts = {(kind.name, name): form for kind in KINDS.values() for name, form in kind.layouts.items()}
    fitting = [key for key, form in layouts.items() if form.fits(tensors)]
    if len(fitting) > 1:
        listed = " and ".join(f"{kind} ({layout})" for kind, layout in fitting)
        raise LoadError(asked, f"its tensors fit {listed}", "Give one component at a time")
    if not fitting:
        known = [(*key, names) for key, form in layouts.items() for names in form.has]
        raise LoadError(asked, _unknown(tensors, known), "Give weights of a supported model")
    ((name, layout),) = fitting
    kind = KINDS[name]
    if shapes := kind.reshaped(tensors):
        view = Reshaped(view, shapes)
    sizes = kind.sizes(view.tensors, layout)
    about = {"family": kind.family, "config": sizes.guess, **kind.tell(layout, view.tensors, sizes)}
    return Detected(name, layout, unprefixed.prefix, quantization, **about), view


def _unknown(tensors: Tensors, known: list[tuple[str, str, tuple[str, ...]]]) -> str:
    """The layout that comes nearest, and which of its names is not there; else what the names begin with."""
    kind, layout, names = max(known, key=lambda one: sum(name in tensors for name in one[2]) / len(one[2]))
    absent = [name for name in names if name not in tensors]
    if len(absent) < len(names):
        return f"nothing fits; the nearest is {kind} ({layout}), which has {absent[0] if absent else '?'}"
    begin = sorted({name.split(".")[0] for name in tensors})
    return f"nothing fits its {len(tensors)} tensors, whose names begin with {', '.join(begin[:6])}"
