"""The files that a person's code is made of: which modules are theirs, and one hash of a file and all that it imports.

It goes by the text of the files: a module that is imported by a name that is computed is not seen. Installed packages
count by version, Python and what ditkit itself needs not at all: those stand in the receipt. Nothing is imported here.
Leaves out: names of objects (``identify.py``) and rows (``registry.py``)."""

import ast
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions, version
from importlib.util import resolve_name
from pathlib import Path
from uuid import uuid4

GROUND = {"torch", "numpy", "safetensors", "tokenizers", "transformers", "ftfy", "filelock", "pydantic", "typer",
          "rich", "av", "PIL"}  # fmt: skip
"""The modules of the packages that ditkit needs."""

_hashes: dict[int, tuple[object, str]] = {}


@cache
def is_ours(module: str) -> bool:
    """Whether a module is ditkit's or Python's own, and not a person's of the same name."""
    package = module.partition(".")[0]
    if package not in sys.stdlib_module_names or module == "__main__":
        return package in ("ditkit", "builtins")
    file = _file(package)
    return file is None or (file.is_relative_to(sysconfig.get_paths()["stdlib"]) and not _in_packages(file))


@cache
def is_installed(module: str) -> bool:
    """Whether a module is ditkit's, Python's or an installed package's, and not one that is installed to be edited."""
    package = module.partition(".")[0]
    return is_ours(module) or (module != "__main__" and _in_packages(_file(module)) and not _is_edited(package))


@cache
def version_of(module: str) -> str:
    """The version of the package that ``module`` is of; empty for Python's and ditkit's own, and where it has none."""
    package = module.partition(".")[0]
    if is_ours(module):
        return ""
    try:
        return version(package)
    except PackageNotFoundError:
        of = packages_distributions().get(package, ())
        return " ".join(map(version, of)) or str(getattr(sys.modules.get(package), "__version__", ""))


def files_of(*modules: str) -> dict[str, str]:
    """Module -> sha256 of its file, for ``modules``, the packages that they lie in, and all modules of a person's own
    that these import, at their top or in their functions; package -> version for installed ones. What was imported
    counts as it was when this was first asked, since an edit after that is not what runs. A module without a file has
    a name of its own in every process."""
    found, waiting = dict[str, str](), [*modules]
    while waiting:
        module = waiting.pop()
        package, _, inner = module.partition(".")
        if is_ours(module) or package in GROUND or module in found or found.get(package, "").startswith("version"):
            continue
        file = _file(module)
        if is_installed(module) and version_of(package):
            found[package] = f"version {version_of(package)}"
        elif file is not None or (module in sys.modules and not hasattr(sys.modules[module], "__path__")):  # no folder
            found[module] = _sha256(module, file)
            waiting += [*_imports(module, file), *([module.rpartition(".")[0]] if inner else [])]
    return found


def code_sha256(module: str, sha256: str = "") -> str:
    """One hash of a module's file and of what it imports. It is that of the file where that imports nothing that
    counts; else its first half is the file's. ``sha256``: the file's, where that is known. Raises ModuleNotFoundError
    for a module that is not there."""
    own = sha256 or file_sha256(module)
    more = {name: what for name, what in files_of(module).items() if name != module}
    return own[:32] + hashlib.sha256(repr(sorted(more.items())).encode()).hexdigest()[:32] if more else own


def file_sha256(module: str) -> str:
    """Of a module's file, as it was imported. Raises ModuleNotFoundError."""
    file = _file(module)
    if file is None:
        raise ModuleNotFoundError(f"No module named {module!r}")
    return _sha256(module, file)


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
    places, parts = (sysconfig.get_paths()[key] for key in ("purelib", "platlib")), {*(file or Path()).parts}
    return bool({"site-packages", "dist-packages"} & parts) or any(file and file.is_relative_to(p) for p in places)


@cache
def _is_edited(package: str) -> bool:
    """Whether a package is installed to be edited (``pip install -e``), by a link or otherwise."""
    try:
        about = json.loads(distribution(package).read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        return False
    return bool(about.get("dir_info", {}).get("editable"))


def _sha256(module: str, file: Path | None) -> str:
    """Of what was imported, where that is known; of the archive where the file lies in one."""
    there = sys.modules.get(module)
    if isinstance(given := getattr(there, "__sha256__", None), str):
        return given
    spec = getattr(there, "__spec__", None) or there  # a module that is imported again has a new spec
    known = None if spec is None else _hashes.get(id(spec))
    if known is None:
        real = next((path for path in (file, *file.parents) if os.path.isfile(path)), None) if file else None
        known = (spec, hashlib.sha256(real.read_bytes()).hexdigest() if real else uuid4().hex)
        if spec is not None:
            _hashes[id(spec)] = known
    return known[1]


def _imports(module: str, file: Path | None) -> Iterator[str]:
    """The modules that the text of a module names, with the packages around them."""
    if file is not None and file.suffix == ".py" and os.path.isfile(file):
        spec = spec_of(module)
        for name in _written(file.read_bytes(), (spec.parent if spec else None) or module.rpartition(".")[0]):
            parts = name.split(".")
            yield from (".".join(parts[:n]) for n in range(1, len(parts) + 1))


@cache
def _written(source: bytes, package: str) -> list[str]:
    found = list[str]()
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # it cannot be imported either
        return found
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += named("." * node.level + (node.module or ""), package, [alias.name for alias in node.names])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called, what = getattr(node.func, "attr", getattr(node.func, "id", "")), node.args[0].value
            if called in ("import_module", "__import__") and isinstance(what, str):
                found += named(what, package, [])
    return found


def named(base: str, package: str, members: Iterable[str]) -> list[str]:
    """The modules that ``from base import members`` may mean in a module of ``package``; none where it cannot work."""
    try:
        base = resolve_name(base, package)
    except (ImportError, ValueError):
        return []
    return [base, *(f"{base}.{member}" for member in members)]
