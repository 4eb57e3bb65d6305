"""The official sampling defaults of each task of the family, for models that bring none of their own.

Sources: Wan2.1 and Wan2.2 ``generate.py`` and ``wan/configs/*.py``. The 480p and 720p image-to-video models cannot be
told apart, and need not be: the official code goes by the size that is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

AREA_480P = 832 * 480

OFFICIAL: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "t2v": {"shift": 5.0, "steps": 50, "guidance_scale": 5.0},
    "i2v": {"shift": 5.0, "steps": 40, "guidance_scale": 5.0, "size_from": "image"},
    "flf2v": {"shift": 16.0, "steps": 50, "guidance_scale": 5.0, "size_from": "image"},
    "vace": {"shift": 16.0, "steps": 50, "guidance_scale": 5.0},
    "t2v_experts": {"shift": 12.0, "steps": 40, "guidance_scale": 4.0, "guidance_scale_2": 3.0, "boundary": 0.875},
    "i2v_experts": {"shift": 5.0, "steps": 40, "guidance_scale": 3.5, "guidance_scale_2": 3.5, "boundary": 0.9,
                    "size_from": "image"},
    "ti2v": {"shift": 5.0, "steps": 50, "guidance_scale": 5.0, "frames": 121, "fps": 24, "width": 1280, "height": 704,
             "size_from": "image"},
})  # fmt: skip
"""Task -> defaults of a Request; what is not named is as in ``Request``."""


def official(task: str, experts: int, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of ``task`` for a model of 1 or 2 ``experts``; ``asked`` decides where the size matters."""
    found = dict(OFFICIAL[f"{task}_experts" if experts == 2 else task])
    area = asked.get("width", 832) * asked.get("height", 480)
    if task == "i2v" and experts == 1 and area <= AREA_480P:
        found["shift"] = 3.0
    if "guidance_scale" in asked:  # one number is for both experts, in the official code and in diffusers
        found.pop("guidance_scale_2", None)
    return found
