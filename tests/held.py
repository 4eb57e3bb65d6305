"""Tensors in memory, or on the meta device, as a source to load from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ditkit.checkpoints.files.stored import DTYPES
from ditkit.checkpoints.views.source import Facts, TensorSource

SPELLED = {ours: theirs for theirs, ours in DTYPES.items()}


class Held(TensorSource):
    """``read`` lists the names in the order in which their data was asked for."""

    path, files = Path("held"), ()
    sha256: Mapping[str, str] = {}
    fingerprint, sketch = "fingerprint", "sketch"

    def __init__(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None = None):
        self.held, self.metadata, self.read = dict(tensors), dict(metadata or {}), []
        self.tensors = {name: Facts(SPELLED[t.dtype], tuple(t.shape)) for name, t in self.held.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read.append(name)
        return self.held[name].clone()


def shapes(source) -> dict[str, tuple[int, ...]]:
    return {name: tuple(facts.shape) for name, facts in source.tensors.items()}
