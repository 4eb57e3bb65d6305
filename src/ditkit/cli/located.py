"""What the path in a command stands for: weights, a model's folder, a manifest, or a model that comes with the package.

Leaves out: repositories on the hub, which a command that only looks should not download.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ditkit.errors import LoadError

if TYPE_CHECKING:
    from ditkit.checkpoints.model.part import ModelParts


def packaged(path: Path) -> Path:
    """The folder of a packaged model, when ``path`` is its name and there is nothing else of that name.

    Raises LoadError for a repository, which none of these commands downloads."""
    from ditkit.checkpoints.model.find import MODELS
    from ditkit.checkpoints.model.hub import HubName

    if path.exists():
        return path
    if (name := HubName.parse(str(path))) is not None:
        do = f"Download it first (hf download {name.repo}) and give its folder, or load it with --model {path}"
        raise LoadError(f"looking into {path}", "this command looks at files on this machine only", do)
    return MODELS.get(str(path), path)


def located(path: Path, variant: str | None = None, *, verify: bool = False) -> ModelParts:
    """The parts in ``path``. ``verify``: those of a locked manifest are held against their hashes. Raises LoadError."""
    from ditkit.checkpoints.model.find import parts_of

    return parts_of(path, variant, verify=verify)
