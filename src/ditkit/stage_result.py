"""What comes of running a stage, and what is known of it before: plain values that travel and are kept.

Leaves out: where a stage runs (``execution/place.py``) and where results are kept (``store``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StageResult:
    """``written``: the fields that the stage wrote. ``settings``: those that it read, with their values. ``plugs``:
    what was in the seams, None if it never asked for them; that is not the same as nothing. ``stopped``: it was
    interrupted; ``written`` is as far as it came. Not ``cacheable``: a makeshift, which must not serve other runs."""

    written: Mapping[str, Any]
    settings: Mapping[str, Any]
    plugs: Mapping[str, list[str]] | None
    stopped: bool = False
    cacheable: bool = True


@dataclass(frozen=True)
class CacheKey:
    """What is known of a result before it is computed: all of its record but the settings that the stage will read.
    ``request``, with the settings that follow from others, and ``plugs`` tell what it would find if it looked.
    ``code`` stands for the classes of the stage and their source text; empty if nothing tells them from others.
    ``software``: versions of what computes where the stage runs, where they are not those of this process."""

    stage: str
    version: int
    code: str
    options: Mapping[str, Any]
    weights: Mapping[str, str]
    inputs: Mapping[str, str]
    request: Mapping[str, Any]
    plugs: Mapping[str, list[str]]
    software: Mapping[str, str] = field(default_factory=dict)
