"""A part of a model, opened but not read, and a whole model as parts that were held against each other. Leaves out:
opening (open_part.py), finding (find.py) and judging them (fits.py)."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ditkit.checkpoints.kinds.configs import Rules
from ditkit.checkpoints.kinds.detect import Detected
from ditkit.checkpoints.kinds.kind import KINDS, Kind
from ditkit.checkpoints.views.source import TensorSource
from ditkit.errors import LoadError

T = TypeVar("T")
EXPERTS = {"high_noise_model": "transformer", "low_noise_model": "transformer_2"}
"""Folder of the native layout -> component, by diffusers' rule that ``transformer`` is the one for high noise."""
ORDER = (*EXPERTS.values(), "vae", "text_encoder", "image_encoder", "preview_decoder")
SIDE = ("image_processor", "scheduler")
"""Components without weights whose configs are read."""
WITHOUT_WEIGHTS = (*SIDE, "feature_extractor", "video_processor", "guider")
"""Components that an index lists and whose work our own code does; but for the first they are passed over by name."""


def component_names() -> list[str]:
    """All components that a kind of network may be, the usual ones first."""
    return list(dict.fromkeys([*ORDER, *(name for kind in KINDS.values() for name in kind.components)]))


def main_of(parts: Mapping[str, T]) -> T | None:
    """The transformer; of two, the first that is there."""
    return next((parts[name] for name in EXPERTS.values() if name in parts), None)


@dataclass(frozen=True)
class Part:
    """One component. ``config``: keywords of the kind's config class. ``source``: tensors under the names of our
    module, without scales; None for a tokenizer. ``layout`` is the file's.
    ``notes``: what was left out or chosen on the way, in plain words.

    A part that lies at a host has the host's address as its ``place``, no source, and in ``told`` what that host says
    of it besides."""

    component: str
    kind: str
    path: Path
    config: Mapping[str, Any]
    source: TensorSource | None
    layout: str
    quantization: str | None = None
    detected: Detected | None = None
    notes: tuple[str, ...] = ()
    place: str | None = None
    told: Mapping[str, Any] = field(default_factory=dict)

    @property
    def row(self) -> Kind:
        return KINDS[self.kind]


@dataclass(frozen=True)
class Scope:
    """Which parts of a model matter on this machine.

    ``only``: those that are opened; None for all. Of two experts one is enough then. ``elsewhere``: of parts that may
    lie at a host, what asks that host (None: it has no such part); one that is here, or that the model does not need,
    is not asked for. ``meant``: those of them that are to be the host's, whatever lies here. ``experts``: transformers
    that the user named: a second one is asked for."""

    only: Collection[str] | None = None
    elsewhere: Mapping[str, Callable[[], Part | None]] = field(default_factory=dict)
    meant: Collection[str] = ()
    experts: Collection[str] = ()

    def opens(self, name: str) -> bool:
        return name not in self.meant and (self.only is None or name in self.only)


WHOLE = Scope()


@dataclass(frozen=True)
class Options:
    """How parts are opened. ``variant``: of the weights in each folder of diffusers. ``instead``: component -> a file
    or folder that stands in for the model's own, or for one that it does not have. ``scope``: which parts matter."""

    variant: str | None = None
    instead: Mapping[str, Path] = field(default_factory=dict)
    rules: Rules = ()
    scope: Scope = WHOLE


@dataclass(frozen=True)
class ModelParts:
    """A model's parts: ``parts`` are here, ``elsewhere`` at hosts. ``boundary``: the sigma below which
    ``transformer_2`` runs. ``expand_timesteps``: each token has its own timestep. ``unused``: files beside the parts,
    and why they are none. ``problems``: what keeps the model from running; ``check`` raises the first.

    ``flow_shift``: of its scheduler. ``processor``: its own words on how pictures are prepared. ``tables``: those of
    ``ditkit.toml`` that speak of requests, and ``file``, where they stand. ``verify``: for each part of a locked
    manifest, what raises LoadError unless its files are those that were locked."""

    path: Path | str
    layout: str
    parts: Mapping[str, Part]
    task: str | None = None
    boundary: float | None = None
    expand_timesteps: bool = False
    unused: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[LoadError, ...] = ()
    elsewhere: Mapping[str, Part] = field(default_factory=dict)
    flow_shift: float | None = None
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    file: Path = Path()
    processor: Mapping[str, Any] | None = None
    verify: Mapping[str, Callable[[], Any]] = field(default_factory=dict)

    def check(self) -> "ModelParts":
        if self.problems:
            raise self.problems[0]
        return self
