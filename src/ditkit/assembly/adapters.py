"""The LoRAs of a Setup, opened against the transformers that they are for: side weights (seam C), or added on loading.
Leaves out: file formats and arithmetic (``checkpoints/lora/read.py``, ``nn/lora.py``)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditkit.checkpoints.model.part import Part
from ditkit.contracts import EXPERTS, Swap
from ditkit.errors import LoadError, SetupError
from ditkit.reading import check_path
from ditkit.registry import PlugSpec
from ditkit.setup import Setup

if TYPE_CHECKING:
    from ditkit.checkpoints.lora.read import Adapter


LARGEST = 3e38  # of a strength: float32 has no more


def named_expert(text: str) -> tuple[str | None, str]:
    """The expert that an entry of ``Setup.loras`` names, if it names one, and the rest of the entry."""
    head, equals, rest = text.partition("=")
    return (head, rest) if equals and head in (*EXPERTS, "both") else (None, text)


@dataclass(frozen=True)
class Wanted:
    """One entry of ``Setup.loras``: ``expert`` is None where it was not said."""

    text: str
    path: Path
    strength: float
    expert: str | None

    @classmethod
    def parse(cls, text: str) -> Wanted:
        """``FILE``, ``FILE:STRENGTH`` or ``EXPERT=FILE:STRENGTH``; a file of the whole name comes first. Raises
        SetupError."""
        check_path(text, f"loras={text!r:.200}", SetupError)
        expert, place = named_expert(text)
        file, colon, last = place.rpartition(":")
        try:
            strength = float(last if colon and not os.path.lexists(os.path.expanduser(place)) else "")
        except ValueError:
            file, strength = place, 1.0
        path = Path(os.path.expanduser(file)).absolute()
        if not abs(strength) <= LARGEST:
            raise SetupError(f"loras={text!r}", f"its strength is {strength}", "Give a finite number")
        if not os.path.exists(path):
            raise SetupError(f"loras={text!r}", f"there is no file {path}", "Check the path")
        return cls(text, path, strength, expert)

    @property
    def placed(self) -> str:
        """The same entry with the file's whole path."""
        return f"{self.expert}=" * (self.expert is not None) + f"{self.path}:{self.strength}"


def placed(setup: Setup) -> Setup:
    """``setup`` with whole paths of stand-in parts, LoRAs and plugs, so that a clip finds them from every folder; a
    plug's code with its sha256. Raises SetupError."""
    there = {name: Path(os.path.expanduser(where)) for name, where in setup.components.items()}
    parts = {name: str(path.absolute()) for name, path in there.items() if os.path.exists(path)}
    loras = [Wanted.parse(text).placed for text in setup.loras]
    plugs = [str(PlugSpec.parse(text).placed()) for text in setup.plugs]
    return setup.model_copy(update={"components": {**setup.components, **parts}, "loras": loras, "plugs": plugs})


@dataclass(frozen=True)
class Adapters:
    """For each transformer its LoRAs with their strengths, in the order in which they were given."""

    mode: str = "side"
    by_expert: Mapping[str, Sequence[tuple[Adapter, float]]] = field(default_factory=dict)

    @classmethod
    def open(cls, setup: Setup, parts: Mapping[str, Part]) -> Adapters:
        """Headers are read, and every key of every file has found its place. Raises SetupError, LoadError."""
        if not setup.loras:
            return cls(setup.lora_mode)
        from ditkit.checkpoints.files.opening import open_source
        from ditkit.checkpoints.lora.read import experts_of, read_lora

        found: dict[str, list[tuple[Adapter, float]]] = {}
        there = [name for name in EXPERTS if name in parts]
        for wanted in map(Wanted.parse, setup.loras):
            source = open_source(wanted.path)
            named = experts_of(source, parts[there[0]].kind) if there else ()
            for expert in _experts(wanted, named, there):
                part = parts[expert]
                assert part.source is not None
                targets = {name: tuple(facts.shape) for name, facts in part.source.tensors.items()}
                section = expert if named else None
                adapter = read_lora(source, targets, kind=part.kind, expert=section, allow=tuple(setup.lora_allow))
                found.setdefault(expert, []).append((adapter, wanted.strength))
        return cls(setup.lora_mode, found)

    def swaps(self, component: str) -> tuple[Swap, ...]:
        from ditkit.nn.lora import lora_swaps

        return lora_swaps(self.by_expert.get(component, ())) if self.mode == "side" else ()

    def fused(self, component: str, source: Any) -> Any:
        """``source`` with the LoRAs added while it streams, in mode fused; else ``source`` itself."""
        from ditkit.checkpoints.lora.merge import Merged

        own = self.by_expert.get(component, ())
        return Merged(source, own) if own and self.mode == "fused" else source

    def describe(self, component: str) -> list[dict[str, Any]]:
        """For the receipt: each file with its strength, its mode and how many tensors it changes."""
        return [{"file": adapter.path.name, "strength": strength, "mode": self.mode, "tensors": len(adapter.deltas),
                 "left_out": dict(adapter.report["left_out"])}
                for adapter, strength in self.by_expert.get(component, ())]  # fmt: skip


def _experts(wanted: Wanted, named: Sequence[str], there: Sequence[str]) -> list[str]:
    """Which transformers a file is for. With two of them it has to be said, by its keys or by the user: a LoRA for the
    one runs on the other without an error, and worse."""
    if wanted.expert not in (None, "both", *there):
        raise SetupError(f"loras={wanted.text!r}", f"this model has no {wanted.expert}", f"It has {', '.join(there)}")
    if wanted.expert is not None:
        return list(there) if wanted.expert == "both" else [wanted.expert]
    if named:
        if lost := [name for name in named if name not in there]:
            found = f"it is for {', '.join(lost)}, which this model does not have"
            raise LoadError(f"applying {wanted.path}", found, "Name the transformer that it is for: transformer=FILE")
        return list(named)
    if len(there) == 2:
        found = "this model has two transformers and the file does not say which it is for"
        do = "Write transformer=FILE (high noise), transformer_2=FILE (low noise) or both=FILE"
        raise SetupError(f"loras={wanted.text!r}", found, do)
    return list(there)
