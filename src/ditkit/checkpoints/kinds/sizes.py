"""The sizes of a network, told by the names and shapes of its tensors alone.

Each reader gives the fields of one config class, as a plain dict, and of each field the tensor that tells it. What
shapes cannot tell is apart: ``assumed`` holds the official value, for weights that come without a config, ``undecided``
names what has none. All this is joined with a config that came along; where the two disagree it is an error.
Leaves out: what kind of network it is (detect.py), the kinds' own readers, and the spelling of configs (configs.py)."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ditkit.checkpoints.views.key_table import KeyTable
from ditkit.checkpoints.views.source import Facts
from ditkit.errors import LoadError

Tensors = Mapping[str, Facts]
Fields = Mapping[str, Any]
LARGEST = 2**24  # of an axis; the largest one in use is a vocabulary of 256384. A file of no data can claim any


@dataclass(frozen=True)
class Sizes:
    """``fields``: what shapes tell. ``where``: field -> the tensor, or the words for several. ``lengths``: fields of
    which only the number of values is told. ``assumed`` and ``undecided``: see the top of the file."""

    fields: Fields
    where: Mapping[str, str]
    assumed: Fields = field(default_factory=dict)
    lengths: Mapping[str, int] = field(default_factory=dict)
    undecided: tuple[str, ...] = ()

    @property
    def guess(self) -> dict[str, Any]:
        """The fields with official values where shapes tell none, and 0 for what is only counted."""
        return {**self.fields, **{key: (0,) * n for key, n in self.lengths.items()}, **self.assumed}

    def alone(self, asked: str) -> dict[str, Any]:
        """All fields of weights without a config. Raises LoadError."""
        if self.undecided:
            found = f"shapes do not tell {' and '.join(self.undecided)}, and there is no config"
            raise LoadError(asked, found, "Put the model's config.json beside the weights")
        return {**self.fields, **self.assumed}

    def beside(self, asked: str, config: Fields, said: Mapping[str, str], advice: Mapping[str, str]) -> dict[str, Any]:
        """All fields of weights with a config, which gave the fields ``config``. ``said``: field -> the config's own
        words for it. ``advice``: field -> what to do about a contradiction, which raises LoadError."""
        told = [("", key, config.get(key, value), value, self.where[key]) for key, value in self.fields.items()]
        told += [("the length of ", key, len(config.get(key, (0,) * count)), count, "the names of the blocks")
                 for key, count in self.lengths.items()]  # fmt: skip
        for what, key, value, has, where in told:
            if value != has:
                found = f"{what}{said.get(key, key)} is {_shown(value)} in the config and {_shown(has)} in {where}"
                raise LoadError(asked, found, advice.get(key, "Use the config of these weights"))
        return {**self.fields, **config}


def _shown(value: Any) -> Any:
    return "absent" if value is None else list(value) if isinstance(value, tuple) else value


class SizeReader:
    """Reads sizes of a network from its tensors, and remembers which tensor told each of them. With ``keys``, the table
    of a network of one block, tensors of any layout are asked for by their native names."""

    def __init__(self, tensors: Tensors, layout: str, keys: KeyTable | None = None):
        self.tensors, self.layout = tensors, layout
        rules = {} if keys is None or layout == "native" else keys.by_name("native")
        self.names = {name: rule.other[0] for name, rule in rules.items()}
        self.fields: dict[str, Any] = {}
        self.where: dict[str, str] = {}

    def error(self, found: str) -> LoadError:
        asked = f"reading sizes from weights in the {self.layout} layout"
        return LoadError(asked, found, "Use whole, unmodified weights")

    def name(self, native: str) -> str:
        return self.names.get(native, native)

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        name = self.name(name)
        if name not in self.tensors:
            raise self.error(f"the weights have no {name}")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != axes:
            raise self.error(f"{name} has the shape {list(shape)}, not {axes} axes")
        if not 0 < min(shape) <= max(shape) <= LARGEST:
            raise self.error(f"{name} has the shape {list(shape)}, which no network has")
        return shape

    def tell(self, key: str, value: Any, where: str) -> Any:
        self.fields[key], self.where[key] = value, self.name(where)
        return value

    def axis(self, key: str, name: str, axis: int, axes: int, divisor: int = 1) -> int:
        size = self.shape(name, axes)[axis]
        if size % divisor:
            raise self.error(f"axis {axis} of {self.name(name)} is {size}, no multiple of {divisor}")
        return int(self.tell(key, size // divisor, name))

    def optional_axis(self, there: bool, key: str, name: str, axis: int, axes: int) -> None:
        """None where the branch is not ``there``."""
        if there:
            self.axis(key, name, axis, axes)
        else:
            self.tell(key, None, f"the weights, which have no {self.name(name)}")

    def side(self, key: str, name: str, axes: int) -> int:
        """Of the square patches of RGB pixels that are the input channels of ``name``."""
        pixels = self.shape(name, axes)[1]
        if pixels != 3 * math.isqrt(pixels // 3) ** 2:
            raise self.error(f"{self.name(name)} has {pixels} input channels, not 3 times a square")
        return int(self.tell(key, math.isqrt(pixels // 3), name))

    def count(self, key: str, pattern: str, what: str) -> int:
        return int(self.tell(key, count(self.tensors, pattern), what))

    def sizes(self, undecided: tuple[str, ...] = (), lengths: Mapping[str, int] = {}, **official: Any) -> Sizes:
        """``official``: values where shapes tell none; None where there is none either, and the field is undecided."""
        assumed = {key: value for key, value in official.items() if value is not None}
        undecided += tuple(key for key in official if key not in assumed)
        return Sizes(self.fields, self.where, assumed, lengths, undecided)


def count(tensors: Mapping[str, Any], pattern: str) -> int:
    """How many numbers ``pattern`` captures in the names. They must run from 0 without a gap, or it raises LoadError:
    by the largest of them one name could ask for a billion blocks."""
    found = {match[1] for name in tensors if (match := re.match(pattern, name))}
    if gaps := {str(n) for n in range(len(found))} - found:
        blocks = pattern.replace(r"(\d+)", min(gaps, key=int)).replace("\\", "")
        told = f"their names count {len(found)} of them, and none begins with {blocks!r}"
        raise LoadError("counting the blocks of the weights", told, "Use whole, unmodified weights")
    return len(found)
