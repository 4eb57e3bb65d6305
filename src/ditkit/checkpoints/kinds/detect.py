"""What a set of tensors is: kind, layout, task and size, by names, shapes, types and metadata, never by file names.

One layout of one kind must fit, and one only; none and several are errors that list the candidates. What is recognised
but cannot be run (relatives of Wan with branches of their own) is named, with the reason in ``problems``.
Leaves out: the kinds themselves (their rows), the config and the other parts of a model, and the families of LoRAs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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

    unprefixed = Unprefixed(source)
    view, asked = Dequantized(unprefixed), f"recognising {source.path}"
    tensors = view.tensors
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
    sizes = kind.sizes(tensors, layout)
    about = {"family": kind.family, "config": sizes.guess, **kind.tell(layout, tensors, sizes)}
    return Detected(name, layout, unprefixed.prefix, view.quantization, **about), view


def _unknown(tensors: Tensors, known: list[tuple[str, str, tuple[str, ...]]]) -> str:
    """The layout that comes nearest, and which of its names is not there; else what the names begin with."""
    kind, layout, names = max(known, key=lambda one: sum(name in tensors for name in one[2]) / len(one[2]))
    absent = [name for name in names if name not in tensors]
    if len(absent) < len(names):
        return f"nothing fits; the nearest is {kind} ({layout}), which has {absent[0] if absent else '?'}"
    begin = sorted({name.split(".")[0] for name in tensors})
    return f"nothing fits its {len(tensors)} tensors, whose names begin with {', '.join(begin[:6])}"
