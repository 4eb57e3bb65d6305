"""Components computed by MLX: the UMT5 text encoder, on Apple silicon or on a Linux CPU. This file does not import it:
what a backend is called is also asked where it is not installed."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType

BITS: Mapping[str, int | None] = MappingProxyType({"mlx": None, "mlx-8bit": 8, "mlx-4bit": 4})
"""Backend -> bits of a packed weight; None: weights stay as they are."""


def exact_name(backend: str) -> str:
    """The backend and the version of MLX, such as ``mlx-8bit (mlx 0.32.4)``: two of one name compute the same."""
    try:
        return f"{backend} (mlx {version('mlx')})"
    except PackageNotFoundError:
        return f"{backend} (mlx is not installed)"
