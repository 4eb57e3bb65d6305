"""Key tables: the names and shapes of one network's tensors in two layouts, such as Wan's own and that of diffusers.

A table is data: rules with the names on both sides and, where a tensor is not the same on both, what is done to it.
It lists every full name that a network of the given sizes can have, so a lookup is exact: nothing is replaced inside a
name and nothing unknown passes. ``mapped.py`` applies a table to tensors; each kind of network has its own (``kinds``).
Leaves out: prefixes of whole files, LoRA, quantized flavours, GGUF's names."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, Self, TypeVar

from ditkit.checkpoints.files.text import some
from ditkit.errors import LoadError

WB = ("weight", "bias")
T = TypeVar("T")
Side = Literal["native", "other"]
Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Rule:
    """A tensor in both layouts: one name on each side, or one name and several.

    Several tensors lie in the one as equal shares of its first axis, in this order. ``ones``: so many leading axes of
    length 1 has the native tensor more."""

    native: tuple[str, ...]
    other: tuple[str, ...]
    ones: int = 0

    def __post_init__(self) -> None:
        few, many = sorted((len(self.native), len(self.other)))
        if few != 1 or (many > 1 and self.ones):
            raise ValueError(f"a rule for {self.native} and {self.other} does one thing, to one tensor of one side")

    @property
    def renames(self) -> bool:
        return len(self.native) == len(self.other) == 1 and not self.ones

    def names(self, side: Side) -> tuple[str, ...]:
        return self.native if side == "native" else self.other


@dataclass(frozen=True)
class KeyTable:
    """Rules of a whole network. ``aliases``: a second name in the other layout -> the name in the rules.
    ``ignored_native``, ``ignored_other``: what such files hold besides the network, as whole names or, with a dot at
    the end, as beginnings."""

    rules: tuple[Rule, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored_native: tuple[str, ...] = ()
    ignored_other: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for side in ("native", "other"):
            names = [name for rule in self.rules for name in rule.names(side)]
            if len(set(names)) != len(names):
                raise ValueError("a name stands twice in a key table")

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, str]], *rules: Rule, **more: Any) -> Self:
        """Renamed ``pairs`` (native, other), then ``rules`` that do more."""
        return cls((*(Rule((native,), (other,)) for native, other in pairs), *rules), **more)

    def by_name(self, side: Side) -> dict[str, Rule]:
        return {name: rule for rule in self.rules for name in rule.names(side)}

    def ignores(self, name: str, side: Side) -> bool:
        rules = self.ignored_native if side == "native" else self.ignored_other
        return any(name.startswith(rule) if rule.endswith(".") else name == rule for rule in rules)

    @cached_property
    def to_other(self) -> Mapping[str, str]:
        """Native name -> other name, read-only. Only for tables that rename and do no more."""
        if changed := [rule.native[0] for rule in self.rules if not rule.renames]:
            raise TypeError(f"the table does more than rename ({some(changed)}); use Mapped")
        return MappingProxyType({rule.native[0]: rule.other[0] for rule in self.rules})


def rename(tensors: Mapping[str, T], names: Mapping[str, str]) -> dict[str, T]:
    """``tensors`` under their new names. Raises LoadError for names that the table does not have."""
    if unknown := tensors.keys() - names.keys():
        found = f"{len(unknown)} names are unknown ({some(unknown)})"
        raise LoadError(f"renaming {len(tensors)} tensors", found, "Use weights of a supported model")
    return {names[name]: tensor for name, tensor in tensors.items()}


def leaves(native: str, other: str, names: Iterable[str] = WB) -> Pairs:
    """The pairs of a layer's tensors, by default its weight and its bias."""
    return [(f"{native}.{leaf}", f"{other}.{leaf}") for leaf in names]
