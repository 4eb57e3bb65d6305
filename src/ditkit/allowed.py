"""Limits: how much a host computes for others. Its owner sets them, its description says them, and a job is held
against them twice: by the client before it sends anything, by the host before it computes anything.

A step of the loop cannot be stopped from outside, so its size is what keeps a host free: the pixels of a job bound it.
Leaves out: how fast bytes have to come (``limits.py``)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from ditkit.errors import PlaceError, RequestError
from ditkit.request import Request

ENDLESS = 1 << 62
Strides = tuple[int, int, int]


@dataclass(frozen=True)
class Limits:
    """``max_pixels``: width x height x frames of all clips that a stage works on at once. ``max_steps``: of one run.
    ``max_tokens``: of text, of all prompts together. ``max_seconds``: of one job, from when it has its turn.
    ``max_bytes``: of a State that comes in. ``queue``: jobs that may be there besides the one at work. ``alive``:
    seconds after which a silent job says that it is at work."""

    max_bytes: int = 2_000_000_000
    queue: int = 4
    alive: float = 2.0
    max_pixels: int = 250_000_000  # eight clips of 480p, or one of 720p with 270 frames
    max_steps: int = 500  # ten times the official number
    max_tokens: int = 262_144  # 512 prompts of full length
    max_seconds: float = 86_400.0

    @classmethod
    def unlimited(cls, alive: float = 2.0) -> Self:
        """For a child process, whose one caller is trusted."""
        return cls(ENDLESS, ENDLESS, alive, ENDLESS, ENDLESS, ENDLESS, math.inf)

    @classmethod
    def told(cls, said: Mapping[str, Any]) -> Self:
        """Those that a host tells of; what it does not tell of has no limit. Raises ValueError for one that is no
        number."""
        known = {each.name for each in fields(cls) if each.name.startswith("max_")} & {*said}
        if wrong := [name for name in sorted(known) if type(said[name]) not in (int, float) or not said[name] > 0]:
            raise ValueError(f"its limit {wrong[0]} is no number above 0")
        return cls(**{**vars(cls.unlimited()), **{name: said[name] for name in known}})

    def to_tell(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name.startswith("max_") and value < ENDLESS}

    def in_words(self) -> str:
        return ", ".join(f"{name.removeprefix('max_')} {value:,.0f}" for name, value in self.to_tell().items())

    def check(self, request: Request, asked: str, clips: int, together: bool, cells: int = 0) -> None:
        """``clips``: that come at once. ``together``: they are texts, of which a stage makes all clips. ``cells``:
        pixels that the latents of the job stand for, where they are known. Raises RequestError with the flag."""
        at_once = 1 if together else clips
        pixels = max(request.width * request.height * request.frames, cells) * at_once
        steps = request.steps if request.sigmas is None else len(request.sigmas)
        longest = max(request.max_sequence_length, 0 if request.expand == "no" else request.expand_max_tokens)
        for name, value in (("pixels", pixels), ("steps", steps), ("tokens", longest * clips)):
            limit = getattr(self, f"max_{name}")
            if value > limit:
                found = f"it has {value:,} {name}, and this host takes at most {limit:,}"
                do = f"Ask for less, or have its owner start it with --max-{name} {value}"
                raise RequestError(asked, found, do)

    def check_bytes(self, size: int, asked: str) -> None:
        """Raises PlaceError."""
        if size > self.max_bytes:
            found = f"its State has {size:,} bytes, and this host takes at most {self.max_bytes:,}"
            raise PlaceError(asked, found, f"Have its owner start it with --max-bytes {size}")


UNLIMITED = Limits.unlimited()


def cells_of(sizes: Mapping[str, int], request: Request, mine: Strides, asked: Strides) -> int:
    """Pixels that the largest latents of a job stand for: those that came (``sizes``, by the letters of the field
    table) and those that are made by the strides ``asked`` for. ``mine``: the strides of the model here."""
    made = (request.frames - 1) // asked[0] + 1, request.height // asked[1], request.width // asked[2]
    came = tuple(sizes.get(letter, size) for letter, size in zip("Fhw", made, strict=True))
    return max(((f - 1) * mine[0] + 1) * h * mine[1] * w * mine[2] for f, h, w in (made, came))
