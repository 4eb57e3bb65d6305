"""Who may import whom: the table of guides/design.md, read from there and held against the code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "ditkit"
TABLE = (ROOT / "guides" / "design.md").read_text().split("| rank | rooms |")[1].split("\n\n")[0]
ROWS = {int(rank): cells for rank, cells in re.findall(r"\| (\d+) \| (.+) \|", TABLE)}
RANK = {room: rank for rank, cells in ROWS.items() for room in re.split(r", | and ", cells)}
TOGETHER = {room: group for cells in ROWS.values() for group in cells.split(", ") for room in group.split(" and ")}
FRONT = ("__init__", "__main__")  # the public names and the way to the command line
FILES = sorted(f for f in PACKAGE.rglob("*.py") if "assets" not in f.parts)


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path) -> set[str]:
    """Rooms that a file imports anywhere, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            inside = (
                [f"ditkit.{alias.name}" for alias in node.names] if node.module == "ditkit" else [node.module or ""]
            )
            names |= set(inside)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1, f"{file} imports from above its room with dots"
    return {name.split(".")[1] for name in names if name.startswith("ditkit.")} - {room(file)}


def test_every_room_has_a_rank():
    assert {room(file) for file in FILES} - set(FRONT) == set(RANK)


@pytest.mark.parametrize("file", [f for f in FILES if room(f) not in FRONT], ids=lambda f: str(f.relative_to(PACKAGE)))
def test_a_file_imports_lower_ranks_only(file):
    own = room(file)
    for other in imported(file) - {"__version__"}:
        allowed = RANK[other] < RANK[own] or TOGETHER[other] == TOGETHER[own]
        assert allowed, f"{own} (rank {RANK[own]}) imports {other} (rank {RANK[other]})"
