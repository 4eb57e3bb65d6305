"""What the path in a command stands for: weights, a model's folder, a manifest, or a model that comes with the package.

Leaves out: repositories on the hub, which a command that only looks should not download.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ditkit.checkpoints.parts import Located


def packaged(path: Path) -> Path:
    """The folder of a packaged model, when ``path`` is its name and there is nothing else of that name."""
    from ditkit.build import MODELS

    return path if path.exists() else MODELS.get(str(path), path)


def located(path: Path, variant: str | None = None, *, verify: bool = False) -> Located:
    """The parts in ``path``. ``verify``: those of a locked manifest are held against their hashes. Raises LoadError."""
    from ditkit.checkpoints.find import parts_of

    return parts_of(path, variant, verify=verify)
