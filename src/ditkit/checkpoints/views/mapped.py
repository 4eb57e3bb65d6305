"""A source seen through a key table: other names, and tensors cut, joined or reshaped as its rules say.

Names, shapes and types are known without reading data. Data is made when it is asked for, one tensor, or the members of
one joined tensor, at a time. Leaves out: the tables (``kinds``), dequantisation and prefixes of whole files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from ditkit.checkpoints.files.text import some
from ditkit.checkpoints.views.key_table import KeyTable, Rule, Side
from ditkit.checkpoints.views.source import Facts, Inspect, Stored, TensorSource, View
from ditkit.errors import LoadError, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class _Piece:
    """How one tensor is made: of the tensors ``members`` of the source, as share number ``share`` of the one member
    when that is cut. ``rule`` is None for a tensor that no rule knows."""

    rule: Rule | None
    members: tuple[str, ...]
    share: int = 0


class Mapped(View):
    """``source`` in the layout ``to`` of ``table``: its native side, or its other one. ``source`` is in the opposite
    one, or in the one that ``of`` says; in ``to`` itself it only loses what is ignored and what has two names.

    ``ignored``: the tensors that the table leaves out by name. ``unknown``: those that it does not know; they keep
    their names, so that whoever loads them can count them. A name that stands in the source twice, as itself and as an
    alias, is given once; its data must be equal. Raises LoadError for a tensor that cannot be cut or joined as the
    table says, for members that are missing, and for a mixture of both layouts; ``require_known`` raises for unknown
    names."""

    def __init__(self, source: TensorSource, table: KeyTable, to: Side, of: Side | None = None):
        super().__init__(source)
        self.table, self.to = table, to
        side: Side = of or ("other" if to == "native" else "native")
        rules = table.by_name(side)
        if side == to:
            rules = {name: Rule((name,), (name,)) for name in rules}
        self._known, aliases = rules.keys(), table.aliases if side == "other" else {}
        firsts = {name: aliases.get(name, name) for name in source.tensors if not table.ignores(name, side)}
        self.ignored = tuple(name for name in source.tensors if name not in firsts)
        self.unknown = tuple(name for name, first in firsts.items() if first not in rules)
        places: dict[str, list[str]] = {}  # name in the rules -> its names in the source
        for name, first in firsts.items():
            if first in rules:
                places.setdefault(first, []).append(name)
        self._twice = {names[0]: names[1:] for names in places.values() if len(names) > 1}
        self._pieces: dict[str, _Piece] = {}
        for first, names in places.items():
            self._pieces |= self._made_of(first, names[0], rules[first], places)
        if mixed := self._pieces.keys() & set(self.unknown):
            raise self._error(f"{len(mixed)} tensors are there in both layouts ({some(mixed)})")
        self._pieces |= {name: _Piece(None, (name,)) for name in self.unknown}
        self.tensors = MappingProxyType({name: self._facts(name, piece) for name, piece in self._pieces.items()})

    def require_known(self) -> Mapped:
        """Itself. Raises LoadError when the table does not know a name of the source."""
        if self.unknown:
            hint = nearest(self.unknown[0], self._known)
            raise self._error(f"{len(self.unknown)} tensors are unknown ({some(self.unknown)}){hint}")
        return self

    def same(self, name: str) -> str | None:
        piece = self._pieces[name]
        for first in piece.members:
            for second in self._twice.get(first, ()):
                if not self.source[first].equal(self.source[second]):
                    raise self._error(f"{second} differs from {first}, which is another name of the same tensor")
        return piece.members[0] if piece.rule is None or piece.rule.renames else None

    def made(self, name: str, dtype: torch.dtype | None, look: Inspect) -> Tensor:
        """Each member is cast while it is read; what is done to them afterwards moves numbers and changes none."""
        piece, shape = self._pieces[name], self.tensors[name].shape
        first = self.source.cast(piece.members[0], dtype, look)
        if len(piece.members) > 1:
            out = first.new_empty(shape)
            for share, member in zip(out.chunk(len(piece.members)), piece.members, strict=True):
                share.copy_(first if member == piece.members[0] else self.source.cast(member, dtype, look))
            return out
        assert piece.rule is not None
        if (count := len(piece.rule.names(self.to))) > 1:
            return first.chunk(count)[piece.share].clone()  # the rest of the rows can go
        return first.reshape(shape)

    def stored(self, name: str) -> Stored:
        members = self._pieces[name].members
        if self.same(name) is None and all(self.source.stored(member).format == "plain" for member in members):
            return Stored("plain", self.tensors[name].shape, self[name])
        return super().stored(name)

    def _made_of(self, first: str, name: str, rule: Rule, places: Mapping[str, list[str]]) -> dict[str, _Piece]:
        """What the source's tensor ``name`` gives. A joined tensor comes with the first of its members."""
        targets = rule.names(self.to)
        if len(targets) > 1:
            return {target: _Piece(rule, (name,), share) for share, target in enumerate(targets)}
        members = rule.names("other" if self.to == "native" else "native")
        if absent := [member for member in members if member not in places]:
            raise self._error(f"{targets[0]} is made of {some(members)}, and there is no {some(absent)}")
        if targets[0] in self._pieces:
            return {}
        return {targets[0]: _Piece(rule, tuple(places[member][0] for member in members))}

    def _facts(self, name: str, piece: _Piece) -> Facts:
        facts = self.source.tensors[piece.members[0]]
        rule, shape = piece.rule, facts.shape
        if rule is None or rule.renames:
            return facts
        if len(piece.members) > 1:
            kinds = {(other.dtype, other.shape) for other in map(self.source.tensors.__getitem__, piece.members)}
            if len(kinds) > 1 or not shape:
                raise self._error(f"{some(piece.members)} differ in type or shape and cannot be joined to {name}")
            shape = (shape[0] * len(piece.members), *shape[1:])
        elif (count := len(rule.names(self.to))) > 1:
            if not shape or shape[0] % count:
                raise self._error(f"{piece.members[0]} has the shape {list(shape)} and cannot be cut into {count}")
            shape = (shape[0] // count, *shape[1:])
        elif self.to == "native":
            shape = (1,) * rule.ones + shape
        elif shape[: rule.ones] != (1,) * rule.ones:
            raise self._error(f"{piece.members[0]} has the shape {list(shape)}, not {rule.ones} leading axes of 1")
        else:
            shape = shape[rule.ones :]
        return Facts(facts.dtype, shape)

    def _error(self, found: str) -> LoadError:
        return LoadError(f"mapping the names of {self.path}", found, "Use the unmodified weights of one model")
