"""Print the lower bounds of pyproject.toml as constraints of pip; ``make test-oldest`` installs them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
FOR_DEVELOPERS = {"test", "oracles", "lint"}
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[[\w,-]+\])?>=(?P<bound>[\d.]+)(; .+)?")


def oldest(project: dict[str, Any]) -> dict[str, str]:
    """The lower bound of each package that a user installs, with every extra that is meant for users."""
    extras = project["optional-dependencies"]
    users = [extras[name] for name in sorted(extras.keys() - FOR_DEVELOPERS)]
    return dict(_bounds([*project["dependencies"], *(line for lines in users for line in lines)]))


def _bounds(requirements: list[str]) -> Iterator[tuple[str, str]]:
    for line in requirements:
        found = REQUIREMENT.fullmatch(line)
        if found is None:
            raise SystemExit(f"pyproject.toml: {line!r} is not NAME>=VERSION, so it has no lower bound to test.")
        yield found["name"], found["bound"]


if __name__ == "__main__":
    for name, bound in oldest(tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]).items():
        print(f"{name}=={bound}")
