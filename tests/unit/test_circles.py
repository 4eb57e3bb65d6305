"""No circle of files: no file imports itself through others, imports in functions and for annotations included."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

from ditkit import __file__ as home

PACKAGE = Path(home).parent


def modules(package: Path) -> dict[str, Path]:
    """Dotted name under the package -> file; that of an ``__init__.py`` is its folder's."""
    names = {file: ".".join(file.relative_to(package).with_suffix("").parts) for file in package.rglob("*.py")}
    return {name.removesuffix("__init__").rstrip("."): file for file, name in names.items()}


def imported(file: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """The modules that are imported anywhere in ``file``. A package counts where a name is taken out of it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("ditkit.") for alias in node.names if alias.name.startswith("ditkit."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "ditkit":
            base = str(node.module).removeprefix("ditkit").lstrip(".")
            inner = [f"{base}.{alias.name}".lstrip(".") for alias in node.names]
            yield from (name if name in known else base for name in inner)


def circles(package: Path) -> set[frozenset[str]]:
    """Groups of files of which each reaches each other (Tarjan)."""
    known = modules(package)
    arrows = {name: sorted({*imported(file, known)} & {*known} - {name}) for name, file in known.items()}
    number, low, stack, found = dict[str, int](), dict[str, int](), list[str](), set[frozenset[str]]()

    def visit(name: str) -> None:
        number[name] = low[name] = len(number)
        stack.append(name)
        for other in arrows[name]:
            if other not in number:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == number[name]:
            at = stack.index(name)
            if len(stack) - at > 1:
                found.add(frozenset(stack[at:]))
            del stack[at:]

    for name in arrows:
        if name not in number:
            visit(name)
    return found


def test_no_circle_of_files():
    found = [sorted(circle) for circle in circles(PACKAGE)]
    assert found == []


def test_a_circle_is_found_wherever_the_import_stands(tmp_path):
    (tmp_path / "room").mkdir()
    files = {
        "room/__init__.py": "",
        "a.py": "from ditkit import b",
        "b.py": "def f():\n    from ditkit.room.c import g",
        "room/c.py": "if TYPE_CHECKING:\n    import ditkit.a",
        "d.py": "from ditkit.a import x\nfrom ditkit.d import y",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert circles(tmp_path) == {frozenset({"a", "b", "room.c"})}
