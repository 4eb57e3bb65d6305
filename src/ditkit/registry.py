"""Registries: rows by name. A row is what ditkit knows of one kind of network, one stage, one plug or one kernel.

Rows come from three places: ditkit's own tables (imported when they are asked for), installed packages (entry points)
and a person's file or module that is handed over by name (``bring``). Leaves out: what rows hold."""

import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, ClassVar, Generic, Self, TypeVar

from ditkit.errors import SetupError, nearest
from ditkit.sources import code_sha256, file_sha256

R = TypeVar("R", bound="Row")


class Row:
    """Base of all rows. A subclass names the registry that it belongs to, and is a frozen dataclass with a ``name``.
    ``make``, where there is one: what it stands for, or ``module:attribute`` of that. ``help``: one line."""

    registry: ClassVar["Registry[Any]"]
    name: str
    make: Any = None
    help: str = ""

    @property
    def made(self) -> Any:
        return resolve(self.make) if isinstance(self.make, str) else self.make


class Registry(Mapping[str, R], Generic[R]):
    """Rows by name. ``own``: name -> ``module:attribute`` of ditkit's rows, imported when first asked for. ``group``:
    the entry points of other packages, each of which names a row. ``noun`` is what messages call one.

    ``NAME@SHA256`` is the row of that name if its code is that one (``pinned``)."""

    every: ClassVar[list["Registry[Any]"]] = []

    def __init__(self, noun: str, group: str, own: Mapping[str, str] = MappingProxyType({})):
        self.noun, self.group, self._own = noun, group, dict(own)
        self._rows: dict[str, R] = {}
        self._origins: dict[str, tuple[str, str]] = dict.fromkeys(own, ("ditkit", ""))
        self.every.append(self)

    @cached_property
    def _installed(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=self.group):
            found.setdefault(point.name, []).append(point)
        return found

    def __getitem__(self, name: str) -> R:
        """Raises SetupError for a name that nobody brought, or whose code is another one."""
        name, at, pinned = str(name).partition("@")
        asked = f"the {self.noun} {name!r}"
        if name not in self:
            do = f"Choose one of {', '.join(self)}, or bring it with --plug FILE.py"
            raise SetupError(asked, f"there is none of that name{nearest(name, self)}", do)
        if at and pinned != self.code(name):
            found = f"its code is {self.code(name)[:16] or 'of ditkit'}, and {pinned[:16]} is asked for"
            raise SetupError(asked, found, "Use the same code as there")
        if name not in self._rows:
            self._rows[name] = resolve(self._own[name]) if name in self._own else self._point(name).load()
        return self._rows[name]

    def _point(self, name: str) -> EntryPoint:
        if len(points := self._installed[name]) > 1:
            whose = " and ".join(str(point.dist and point.dist.name) for point in points)
            raise SetupError(f"the {self.noun} {name!r}", f"{whose} bring one of that name", "Uninstall one of them")
        return points[0]

    def __contains__(self, name: object) -> bool:  # a Mapping's own one would import the row
        return name in self._origins or name in self._installed

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._origins, *self._installed)))

    def __len__(self) -> int:
        return sum(1 for _ in self)  # a list would ask for the length

    def add(self, row: R, origin: str, code: str = "") -> None:
        """Make ``row`` known. The same origin may bring it again, changed; another one may not take its name. ``code``:
        the sha256 of what it was made from; a copy of the same is the same."""
        known = row.name in self and self.origin(row.name) != origin
        if known and not (code and code == self.code(row.name)):
            asked = f"the {self.noun} {row.name!r} of {origin}"
            raise SetupError(asked, f"{self.origin(row.name)} has one of that name", "Rename it")
        self._rows[row.name], self._origins[row.name] = row, (origin, code)

    def remove(self, origin: str, but: str | None = None) -> None:
        """Forget all rows of ``origin``, but for those with the code ``but``."""
        for name in [name for name, (whose, code) in self._origins.items() if whose == origin and code != but]:
            del self._origins[name]
            self._rows.pop(name, None)

    def origin(self, name: str) -> str:
        """Who brought it: ``ditkit``, a package with its version, a file or a module."""
        if name in self._origins:
            return self._origins[name][0]
        dist = self._point(name).dist
        return f"{dist.name} {dist.version}" if dist else "an installed package"

    def code(self, name: str) -> str:
        """The sha256 of the code that a row was brought with; of an installed one that of its module and its
        package's version. Empty for ditkit's own rows and for a name that nobody brought."""
        if name in self._origins or name not in self:
            return self._origins.get(name, ("", ""))[1]
        return hashlib.sha256(f"{self.origin(name)} {code_sha256(self._point(name).module)}".encode()).hexdigest()

    def pinned(self, name: str) -> str:
        """``name``, with its code where it is not ditkit's own: equal names compute the same."""
        return f"{name}@{code}" if (code := self.code(name)) else name


def resolve(text: str) -> Any:
    """The object that ``module:attribute`` names; a file's module may have a name that Python's own way refuses."""
    module, _, attribute = text.partition(":")
    return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True)
class PlugSpec:
    """One entry of the setting ``plugs``. ``code``: the name of a row, a file that ends in .py, or a module;
    ``attribute``: what is meant of it, empty for all of its rows; ``sha256``: what its code must be, empty for any."""

    code: str
    sha256: str = ""
    attribute: str = ""
    options: str = ""

    _FORM: ClassVar[re.Pattern[str]] = re.compile(
        r"([\w.+-]+|.+?\.py)(?:@([0-9a-f]{8,64}))?(?::([^\W\d]\w*)(?=:|$))?(?::(\s*[^\W\d]\w*\s*=.*))?", re.S
    )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises SetupError."""
        if (found := cls._FORM.fullmatch(text)) is None:
            do = "Write NAME, FILE.py, FILE.py:NAME or module:NAME, with :OPTION=VALUE,..."
            raise SetupError(f"the plug {text!r}", f"{text!r} has none of the forms of a plug", do)
        return cls(*(part or "" for part in found.groups()))

    @property
    def is_code(self) -> bool:
        """Whether it names code to import, and not a row that is known here."""
        return bool(self.attribute) or "." in self.code

    @property
    def is_file(self) -> bool:
        return self.code.endswith(".py")

    def __str__(self) -> str:
        parts = ("@", self.sha256), (":", self.attribute), (":", self.options)
        return self.code + "".join(f"{sign}{part}" for sign, part in parts if part)

    @property
    def short(self) -> str:
        """As a person writes it."""
        return str(replace(self, sha256=""))

    def placed(self) -> Self:
        """The same code, wherever it is asked for: with the whole path, and the sha256 of its file. Nothing is
        imported: what a file imports is looked at when it is brought. Raises SetupError."""
        if not self.is_code:
            return self
        asked, path = f"bringing {self.code}", Path(os.path.expanduser(self.code)).absolute()
        try:
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest() if self.is_file else file_sha256(self.code)
        except (OSError, ModuleNotFoundError) as e:
            found = (e.strerror or str(e)).lower() if isinstance(e, OSError) else str(e)
            raise SetupError(asked, found, "Give a file that ends in .py, or an installed module") from None
        if not sha256.startswith(self.sha256[:32]):
            raise SetupError(asked, f"its sha256 is {sha256[:16]}, and {self.sha256[:16]} is asked for", LOOK)
        whole = self.sha256 if len(self.sha256) == len(sha256) else sha256
        return replace(self, code=str(path) if self.is_file else self.code, sha256=whole)


LOOK = "Look at what has changed, and name it without a hash if you trust it"


@dataclass(frozen=True)
class Brought:
    """A module that a person named. ``sha256``: of its file and of what that imports (``sources.code_sha256``)."""

    name: str
    module: ModuleType
    sha256: str

    @property
    def rows(self) -> list[Row]:
        """The rows that stand at the top of the module."""
        return list({id(value): value for value in vars(self.module).values() if isinstance(value, Row)}.values())


FILES = "files"

BROUGHT: dict[str, Brought] = {}
"""What was brought in this process, by the half of the sha256 that is its file's; an edited file counts once for each
of its contents."""


def brought(sha256: str) -> Brought | None:
    """What was brought in this process with that sha256, of the file alone or with what it imports."""
    found = BROUGHT.get(sha256[:32])
    known = found and (found.sha256, getattr(found.module, "__sha256__", "") or file_sha256(found.module.__name__))
    return found if known and sha256 in known else None


def bring(name: str, sha256: str = "") -> Brought:
    """Import ``name``, a file (``my_kind.py``) or an installed module, and make all of its rows known. ``sha256``: what
    it has to be, looked at before it is run; what it imports is looked at after that. A whole one that was brought
    before is not looked for again.

    This runs code: only what a person names on the command line, in the environment, in a config of theirs or in
    Python may come here, never what a State, a manifest or a model's folder says. Raises SetupError."""
    spec = PlugSpec(name, sha256)
    if (found := brought(sha256)) is None:
        spec = spec.placed()
        found = brought(spec.sha256) or _imported(spec)
    for registry in Registry.every:
        registry.remove(spec.code, but=found.sha256)
    for row in found.rows:
        row.registry.add(row, spec.code, found.sha256)
    return BROUGHT.setdefault(found.sha256[:32], found)


def known_code() -> dict[str, dict[str, str]]:
    """The code that is known here and is not ditkit's own: files by sha256, and for each kind of row its code by name.
    Plain values."""
    files = {brought.sha256: Path(brought.name).name for brought in BROUGHT.values()}
    rows = {of.group: {name: code for name in of if (code := of.code(name))} for of in Registry.every}
    return {FILES: files, **rows}


def _imported(spec: PlugSpec) -> Brought:
    """A file's module has a name that tells its content and not its place: two machines call its classes the same."""
    asked = f"bringing {spec.code}"
    try:
        if not spec.is_file:
            module = importlib.import_module(spec.code)
            return _checked(spec, module, file_sha256(spec.code))
        data = Path(spec.code).read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256[:32] != spec.sha256[:32]:
            raise OSError("it was changed a moment ago")
        name = f"ditkit_plug_{Path(spec.code).stem}_{sha256[:16]}"
        about = importlib.util.spec_from_file_location(name, spec.code)
        assert about is not None
        module = sys.modules[name] = importlib.util.module_from_spec(about)
        module.__sha256__ = sha256  # type: ignore[attr-defined]
        try:
            exec(compile(data, spec.code, "exec"), module.__dict__)
        except BaseException:
            del sys.modules[name]
            raise
        return _checked(spec, module, sha256)
    except SetupError:
        raise
    except (Exception, SystemExit) as e:
        raise SetupError(asked, f"it fails with {type(e).__name__}: {e}", "Correct it") from e


def _checked(spec: PlugSpec, module: ModuleType, sha256: str) -> Brought:
    """``sha256``: of its file. Raises SetupError where another whole was asked for."""
    whole = code_sha256(module.__name__, sha256)
    if not any(known.startswith(spec.sha256) for known in (sha256, whole)):
        found = "its file is the one that is asked for, and what that imports is not"
        raise SetupError(f"bringing {spec.code}", found, LOOK)
    return Brought(spec.code, module, whole)
