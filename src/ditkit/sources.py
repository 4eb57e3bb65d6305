"""The files that a person's code is made of: which modules are theirs, and one hash of a file and all that it imports.

Installed packages count by version, Python and what ditkit itself needs not at all: those stand in the receipt. Nothing
is imported here. Leaves out: names of objects (``identify.py``) and rows (``registry.py``).
"""

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import resolve_name
from pathlib import Path
from types import ModuleType
from uuid import uuid4

GROUND = {"torch", "numpy", "safetensors", "tokenizers", "transformers", "ftfy", "filelock", "pydantic", "typer",
          "rich", "av", "PIL"}  # fmt: skip
"""The modules of the packages that ditkit needs."""

_hashes: dict[int, tuple[object, str]] = {}


def is_ours(module: str) -> bool:
    """Whether a module is ditkit's or Python's own."""
    return module.partition(".")[0] in ("ditkit", "builtins", *sys.stdlib_module_names) and module != "__main__"


@cache
def is_installed(module: str) -> bool:
    """Whether an imported module is ditkit's, Python's or an installed package's."""
    return is_ours(module) or (module != "__main__" and _in_packages(_file(module)))


@cache
def version_of(module: str) -> str:
    """The version of the package that ``module`` is of; empty for Python's and ditkit's own."""
    package = module.partition(".")[0]
    if is_ours(module):
        return ""
    try:
        return version(package)
    except PackageNotFoundError:
        of = packages_distributions().get(package, ())
        return " ".join(map(version, of)) or str(getattr(sys.modules.get(package), "__version__", ""))


def files_of(module: str, found: dict[str, str] | None = None) -> dict[str, str]:
    """Module -> sha256 of its file, for ``module`` and all modules of a person's own that it imports, at its top or in
    its functions; package -> version for installed ones. What was imported counts as it was when this was first asked,
    since an edit after that is not what runs. A module without a file has a name of its own in every process."""
    found = {} if found is None else found
    package = module.partition(".")[0]
    if is_ours(module) or package in GROUND or module in found or found.get(package, "").startswith("version"):
        return found
    file = _file(module)
    if _in_packages(file):
        found[package] = f"version {version_of(package)}"
    elif file is not None or (module in sys.modules and not hasattr(sys.modules[module], "__path__")):  # not a folder
        found[module] = _sha256(module, file)
        for name in _imports(module, file):
            files_of(name, found)
    return found


def code_sha256(module: str, sha256: str = "") -> str:
    """One hash of a module's file and of what it imports. It is that of the file where that imports nothing that
    counts; else its first half is the file's. ``sha256``: the file's, where that is known. Raises ModuleNotFoundError
    for a module that is not there."""
    file = _file(module)
    if file is None:
        raise ModuleNotFoundError(f"No module named {module!r}")
    own = sha256 or hashlib.sha256(file.read_bytes()).hexdigest()
    more = {name: what for name, what in files_of(module).items() if name != module}
    return own[:32] + hashlib.sha256(repr(sorted(more.items())).encode()).hexdigest()[:32] if more else own


def spec_of(module: str) -> ModuleSpec | None:
    """Where a module is or would be imported from; nothing is run for that."""
    if module in sys.modules:
        return getattr(sys.modules[module], "__spec__", None)
    path, parent = None, module.rpartition(".")[0]
    if parent:
        above = spec_of(parent)
        path = above.submodule_search_locations if above else None
        if path is None:
            return None
    finders = [finder.find_spec for finder in sys.meta_path if hasattr(finder, "find_spec")]
    return next((spec for find in finders if (spec := find(module, path)) is not None), None)


def _file(module: str) -> Path | None:
    spec = spec_of(module)
    file = getattr(sys.modules.get(module), "__file__", None) or (spec.origin if spec and spec.has_location else None)
    return Path(file) if file else None


def _in_packages(file: Path | None) -> bool:
    """Whether a file lies where packages are installed, in this environment or in the one below it."""
    places, parts = (sysconfig.get_paths()[key] for key in ("purelib", "platlib", "stdlib")), {*(file or Path()).parts}
    return bool({"site-packages", "dist-packages"} & parts) or any(file and file.is_relative_to(p) for p in places)


def _sha256(module: str, file: Path | None) -> str:
    """Of what was imported, where that is known."""
    there = sys.modules.get(module)
    if isinstance(given := getattr(there, "__sha256__", None), str):
        return given
    spec = getattr(there, "__spec__", None) or there  # a module that is imported again has a new spec
    known = None if spec is None else _hashes.get(id(spec))
    if known is None:
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest() if file and file.is_file() else uuid4().hex
        known = (spec, sha256)
        if spec is not None:
            _hashes[id(spec)] = known
    return known[1]


def _imports(module: str, file: Path | None) -> Iterator[str]:
    """The modules that a module names: in its text, and by what it holds when it is imported."""
    there, spec = sys.modules.get(module), spec_of(module)
    if file is not None and file.suffix == ".py" and file.is_file():
        package = (spec.parent if spec else None) or module.rpartition(".")[0]
        for name in _written(file.read_bytes(), package):
            parts = name.split(".")
            yield from (".".join(parts[:n]) for n in range(1, len(parts) + 1))
    for value in [*vars(there).values()] if there else []:
        home = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        if isinstance(home, str) and home in sys.modules:
            yield home


@cache
def _written(source: bytes, package: str) -> list[str]:
    found = list[str]()
    try:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                found += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = resolve_name("." * node.level + (node.module or ""), package)
                found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    except (SyntaxError, ValueError, ImportError):  # it cannot be imported either
        pass
    return found
