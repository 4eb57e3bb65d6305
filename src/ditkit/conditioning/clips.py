"""Clip by clip: each is encoded alone, so that it equals its single run; equal inputs are encoded once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ditkit.state import digest


def per_clip(compute: Callable[..., Tensor], *fields: Tensor | None) -> Tensor:
    """``compute`` on the slices [1, ...] of the ``fields`` [B, ...], clip after clip -> its results [1, ...] joined to
    [B, ...] on the CPU. A field that is None stays None."""
    count = next(len(field) for field in fields if field is not None)
    done: dict[str, Tensor] = {}
    keys = []
    for index in range(count):
        one = [None if field is None else field[index : index + 1] for field in fields]
        key = digest(*one)
        if key not in done:
            done[key] = compute(*one).cpu()
        keys.append(key)
    return torch.cat([done[key] for key in keys])
