"""A model's own notes, ``ditkit.toml``: its defaults for a Request and its latent-to-RGB preview, each one checked.

Leaves out: reading the file, and the tables that say where parts come from (``checkpoints/model/manifest.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ditkit.errors import LoadError, RequestError
from ditkit.request import Request, renamed

LatentsRgb = tuple[list[list[float]], list[float]]


def check_defaults(defaults: Mapping[str, Any], file: Path, multiple: int, temporal: int) -> dict[str, Any]:
    """Each default as if it had been asked for. ``multiple`` and ``temporal``: what sides and frames are made of."""
    fitting = {"width": multiple, "height": multiple, "frames": 1}  # so that only a fault of the file is found
    try:
        request = Request.parse({**fitting, **defaults}, str(file), LoadError)
        request.samples()
        request.check_size(multiple, temporal)
    except RequestError as e:
        raise LoadError(f"{e.asked} ({file})", e.found, e.do) from None
    return renamed(defaults)


def check_preview(preview: Mapping[str, Any] | None, file: Path, channels: int) -> LatentsRgb | None:
    """``channels`` of the latents. Raises LoadError."""
    if preview is None:
        return None
    factors, bias = preview.get("factors"), preview.get("bias")
    if set(preview) != {"factors", "bias"} or not (_is_row(bias) and _is_matrix(factors, channels)):
        raise LoadError(
            f"reading {file}",
            f"its [preview] does not consist of factors, {channels} rows of 3 numbers, and bias, 3 numbers",
            "Correct it, or remove [preview]",
        )
    return factors, bias  # type: ignore[return-value]


def _is_row(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 3 and all(type(x) in (int, float) and math.isfinite(x) for x in value)
    )


def _is_matrix(value: Any, rows: int) -> bool:
    return isinstance(value, list) and len(value) == rows and all(map(_is_row, value))
