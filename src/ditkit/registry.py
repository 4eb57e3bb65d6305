"""Registries: rows by name. A row is what ditkit knows of one kind of network, one stage, one plug or one kernel.

Rows come from three places: ditkit's own tables (imported when they are asked for), installed packages (entry points)
and a person's file or module that is handed over by name (``bring``). Leaves out: what rows hold.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Generic, TypeVar

from ditkit.errors import SetupError, nearest

R = TypeVar("R", bound="Row")


class Row:
    """Base of all rows. A subclass names the registry that it belongs to, and is a frozen dataclass with a ``name``."""

    registry: ClassVar[Registry[Any]]
    name: str


class Registry(Mapping[str, R], Generic[R]):
    """Rows by name. ``own``: name -> ``module:attribute`` of ditkit's rows, imported when first asked for. ``group``:
    the entry points of other packages, each of which names a row. ``noun`` is what messages call one."""

    def __init__(self, noun: str, group: str, own: Mapping[str, str]):
        self.noun, self.group, self._own = noun, group, dict(own)
        self._rows: dict[str, R] = {}
        self._origins: dict[str, str] = {}

    @cached_property
    def _installed(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group) if point.name not in self._own}

    def __getitem__(self, name: str) -> R:
        """Raises SetupError for a name that nobody brought."""
        if name not in self._rows:
            if name in self._own:
                self._rows[name] = resolve(self._own[name])
            elif name in self._installed:
                self._rows[name] = self._installed[name].load()
            else:
                known = ", ".join(self)
                raise SetupError(f"the {self.noun} {name!r}", f"there is none of that name{nearest(name, self)}",
                                 f"Choose one of {known}, or bring it with --plug FILE.py")  # fmt: skip
        return self._rows[name]

    def __contains__(self, name: object) -> bool:  # a Mapping's own one would import the row
        return name in self._own or name in self._rows or name in self._installed

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._own, *self._installed, *self._rows)))

    def __len__(self) -> int:
        return len([*self])

    def add(self, row: R, origin: str) -> None:
        """Make ``row`` known. The same origin may bring it again, changed; another one may not take its name."""
        if row.name in self and self._origins.get(row.name) != origin:
            whose = self._origins.get(row.name, "ditkit" if row.name in self._own else "an installed package")
            raise SetupError(f"the {self.noun} {row.name!r} of {origin}", f"{whose} has one of that name", "Rename it")
        self._rows[row.name], self._origins[row.name] = row, origin

    def remove(self, origin: str) -> None:
        """Forget all rows of ``origin``."""
        for name in [name for name, whose in self._origins.items() if whose == origin]:
            del self._rows[name], self._origins[name]


def resolve(text: str) -> Any:
    """The object that ``module:attribute`` names."""
    module, _, attribute = text.partition(":")
    return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True)
class Brought:
    """A module that a person named: its code, and the sha256 of its file (empty for an installed module)."""

    name: str
    module: ModuleType
    sha256: str

    @property
    def rows(self) -> list[Row]:
        """The rows that stand at the top of the module."""
        return list({id(value): value for value in vars(self.module).values() if isinstance(value, Row)}.values())


def bring(name: str) -> Brought:
    """Import ``name``, a file (``my_kind.py``) or an installed module, and make all of its rows known.

    This runs code: only what a person names on the command line, in the environment, in a config of theirs or in
    Python may come here, never what a State, a manifest or a model's folder says. Raises SetupError."""
    path = Path(name).expanduser()
    asked = f"bringing {name}"
    if path.suffix != ".py":
        try:
            found = Brought(name, importlib.import_module(name), "")
        except ModuleNotFoundError as e:
            raise SetupError(asked, f"{e}", "Give a file that ends in .py, or an installed module") from None
    else:
        if not path.is_file():
            raise SetupError(asked, "there is no such file", "Check the path")
        found = _from_file(name, path.resolve(), asked)
    for row in found.rows:
        row.registry.add(row, found.module.__name__)
    return found


def _from_file(name: str, path: Path, asked: str) -> Brought:
    """One import for one content: a file that was changed is read anew."""
    data = path.read_bytes()
    sha256, module_name = hashlib.sha256(data).hexdigest(), f"ditkit_plug_{path.stem}_{_short(str(path))}"
    module = sys.modules.get(module_name)
    if module is not None and getattr(module, "__sha256__", None) == sha256:
        return Brought(name, module, sha256)
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__sha256__ = sha256  # type: ignore[attr-defined]
    sys.modules[module_name] = module
    try:
        exec(compile(data, str(path), "exec"), module.__dict__)
    except Exception as e:
        del sys.modules[module_name]
        raise SetupError(asked, f"it fails with {type(e).__name__}: {e}", "Correct the file") from e
    return Brought(name, module, sha256)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
