"""What models are for: for each task of the family its stages, its inputs and its official sampling defaults.

Sources of the defaults: Wan2.1 and Wan2.2 ``generate.py`` and ``wan/configs/*.py``. The 480p and 720p image-to-video
models cannot be told apart, and need not be: the official code goes by the size that is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ditkit.registry import Registry, Row

AREA_480P = 832 * 480

TASKS: Registry[TaskRow] = Registry("task", "ditkit.tasks")


@dataclass(frozen=True)
class TaskRow(Row):
    """``stages``: by name, in order; one that its row does not want for a model is left out. ``inputs``: the fields
    with pictures that a caller may bring; ``needed``: those that it cannot do without. ``defaults``: of a Request, what
    is not named is as there; ``small``: other ones up to 480p; ``experts``: those of a model with two transformers."""

    name: str
    stages: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    small: Mapping[str, Any] = field(default_factory=dict)
    experts: Mapping[str, Any] = field(default_factory=dict)
    help: str = ""

    registry: ClassVar[Registry[Any]] = TASKS

    def sampling(self, experts: int, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The defaults for a model of 1 or 2 ``experts``; ``asked`` decides where the size matters."""
        found = dict(self.experts if experts == 2 else self.defaults)
        if experts == 1 and asked.get("width", 832) * asked.get("height", 480) <= AREA_480P:
            found |= self.small
        if "guidance_scale" in asked:  # one number is for both experts, in the official code and in diffusers
            found.pop("guidance_scale_2", None)
        return found


def _stages(*encoders: str) -> tuple[str, ...]:
    return "expand_prompt", "encode_text", *encoders, "denoise", "decode_latents"


PICTURES, BY_IMAGE = ("image", "last_image"), {"size_from": "image"}

for row in (
    TaskRow(
        "t2v", _stages(), help="text to video",
        defaults={"shift": 5.0, "steps": 50, "guidance_scale": 5.0},
        experts={"shift": 12.0, "steps": 40, "guidance_scale": 4.0, "guidance_scale_2": 3.0, "boundary": 0.875},
    ),
    TaskRow(
        "i2v", _stages("encode_image", "encode_condition"), PICTURES, ("image",), help="image to video",
        defaults={"shift": 5.0, "steps": 40, "guidance_scale": 5.0} | BY_IMAGE, small={"shift": 3.0},
        experts={"shift": 5.0, "steps": 40, "guidance_scale": 3.5, "guidance_scale_2": 3.5, "boundary": 0.9} | BY_IMAGE,
    ),
    TaskRow(
        "flf2v", _stages("encode_image", "encode_condition"), PICTURES, PICTURES, help="first and last frame to video",
        defaults={"shift": 16.0, "steps": 50, "guidance_scale": 5.0} | BY_IMAGE,
    ),
    TaskRow(
        "ti2v", _stages("encode_first_frame"), ("image",), help="text, or text and image, to video",
        defaults={"shift": 5.0, "steps": 50, "guidance_scale": 5.0, "frames": 121, "fps": 24, "width": 1280,
                  "height": 704} | BY_IMAGE,
    ),
    TaskRow(
        "vace", _stages("encode_control"), ("control_video", "control_mask", "reference_images"),
        help="text and control to video", defaults={"shift": 16.0, "steps": 50, "guidance_scale": 5.0},
    ),
):  # fmt: skip
    TASKS.add(row, "ditkit")
