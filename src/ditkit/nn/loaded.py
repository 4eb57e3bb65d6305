"""What a network knows of itself once it is loaded: whose weights it has, and where and in which dtype it computes.

Leaves out: loading (``checkpoints/load.py``).
"""

from collections.abc import Callable

import torch
from torch import nn


class Loaded(nn.Module):
    """A network whose weights come from files. They may lie on several devices or be held in other forms, so nothing is
    read off one of them: whoever loads it says with ``loaded`` where and in which dtype it computes. A network that
    nobody loaded is where its first parameter is."""

    def __init__(self) -> None:
        super().__init__()
        self.identify: Callable[[], str] = lambda: "not loaded from files"
        self._computes: tuple[torch.device, torch.dtype] | None = None

    def loaded(self, device: torch.device | str, dtype: torch.dtype) -> None:
        self._computes = torch.device(device), dtype

    @property
    def fingerprint(self) -> str:
        """Stands for the weights and how they compute; whoever loads the module sets ``identify``."""
        return self.identify()

    @property
    def device(self) -> torch.device:
        """Where inputs are to be."""
        return self._computes[0] if self._computes else next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self._computes[1] if self._computes else next(self.parameters()).dtype
