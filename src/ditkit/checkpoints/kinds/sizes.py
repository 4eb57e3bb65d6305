"""The sizes of a network, told by the names and shapes of its tensors alone.

Each reader gives the fields of one config class, as a plain dict, and of each field the tensor that tells it. What
shapes cannot tell is apart: ``assumed`` holds the official value, for weights that come without a config, ``undecided``
names what has none. ``settle`` joins all this with a config that came along; where the two disagree it is an error.
Leaves out: what kind of network it is (detect.py), the kinds' own readers, and the spelling of configs (configs.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ditkit.checkpoints.views.source import Facts
from ditkit.errors import LoadError

Tensors = Mapping[str, Facts]
NOTHING: Mapping[str, Any] = MappingProxyType({})

LARGEST = 2**24  # of an axis; the largest one in use is a vocabulary of 256384. A file of no data can claim any


@dataclass(frozen=True)
class Sizes:
    """``fields``: what shapes tell. ``where``: field -> the tensor, or the words for several. ``lengths``: fields of
    which only the number of values is told. ``assumed`` and ``undecided``: see the top of the file."""

    fields: Mapping[str, Any]
    where: Mapping[str, str]
    assumed: Mapping[str, Any] = field(default_factory=dict)
    lengths: Mapping[str, int] = field(default_factory=dict)
    undecided: tuple[str, ...] = ()

    @property
    def guess(self) -> dict[str, Any]:
        """The fields with official values where shapes tell none, and 0 for what is only counted."""
        return {**self.fields, **{key: (0,) * n for key, n in self.lengths.items()}, **self.assumed}


@dataclass
class SizeReader:
    """Reads sizes of a network from its tensors, and remembers which tensor told each of them."""

    tensors: Tensors
    layout: str
    fields: dict[str, Any] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)

    def error(self, found: str, do: str = "Use whole, unmodified weights") -> LoadError:
        return LoadError(f"reading sizes from weights in the {self.layout} layout", found, do)

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        if name not in self.tensors:
            raise self.error(f"the weights have no {name}")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != axes:
            raise self.error(f"{name} has the shape {list(shape)}, not {axes} axes")
        if not 0 < min(shape) <= max(shape) <= LARGEST:
            raise self.error(f"{name} has the shape {list(shape)}, which no network has")
        return shape

    def tell(self, key: str, value: Any, where: str) -> Any:
        self.fields[key], self.where[key] = value, where
        return value

    def axis(self, key: str, name: str, axis: int, axes: int, divisor: int = 1) -> int:
        size = self.shape(name, axes)[axis]
        if size % divisor:
            raise self.error(f"axis {axis} of {name} is {size}, no multiple of {divisor}")
        return int(self.tell(key, size // divisor, name))

    def side(self, key: str, name: str, axes: int) -> int:
        """Of the square patches of RGB pixels that are the input channels of ``name``."""
        pixels = self.shape(name, axes)[1]
        if pixels != 3 * math.isqrt(pixels // 3) ** 2:
            raise self.error(f"{name} has {pixels} input channels, not 3 times a square")
        return int(self.tell(key, math.isqrt(pixels // 3), name))

    def count(self, key: str, pattern: str, what: str) -> int:
        return int(self.tell(key, count(self.tensors, pattern), what))

    def sizes(self, **more: Any) -> Sizes:
        return Sizes(self.fields, self.where, **more)


def count(tensors: Mapping[str, Any], pattern: str) -> int:
    """How many numbers ``pattern`` captures in the names. They must run from 0 without a gap, or it raises LoadError:
    by the largest of them one name could ask for a billion blocks."""
    found = {match[1] for name in tensors if (match := re.match(pattern, name))}
    if gaps := {str(n) for n in range(len(found))} - found:
        blocks = pattern.replace(r"(\d+)", min(gaps, key=int)).replace("\\", "")
        told = f"their names count {len(found)} of them, and none begins with {blocks!r}"
        raise LoadError("counting the blocks of the weights", told, "Use whole, unmodified weights")
    return len(found)


def settle(
    asked: str,
    sizes: Sizes,
    config: Mapping[str, Any] | None,
    said: Mapping[str, str] = NOTHING,
    advice: Mapping[str, str] = NOTHING,
) -> dict[str, Any]:
    """The whole config: the json's where there is one, checked against the shapes; theirs where there is none.

    ``config``: our fields as the json gave them. ``said``: field -> the json's own words for it, for messages.
    ``advice``: field -> what to do about a contradiction of it. Raises LoadError with the key and both values."""
    if config is None:
        if sizes.undecided:
            found = f"shapes do not tell {' and '.join(sizes.undecided)}, and there is no config"
            raise LoadError(asked, found, "Put the model's config.json beside the weights")
        return {**sizes.fields, **sizes.assumed}
    told = [(said.get(key, key), key, config.get(key, value), value, sizes.where[key])
            for key, value in sizes.fields.items()]  # fmt: skip
    told += [(f"the length of {said.get(key, key)}", key, len(config.get(key, (0,) * count)), count,
              "the names of the blocks") for key, count in sizes.lengths.items()]  # fmt: skip
    for what, key, value, has, where in told:
        if value != has:
            found = f"{what} is {_shown(value)} in the config and {_shown(has)} in {where}"
            raise LoadError(asked, found, advice.get(key, "Use the config of these weights"))
    return {**sizes.fields, **config}


def _shown(value: Any) -> Any:
    if value is None:
        return "absent"
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
