"""What a transformer is told at each step of a run besides the noisy latents: text, pictures, control, timesteps.

Made once for each transformer of a run. Leaves out: the loop (``denoise.py``) and where these inputs come from (the
``encode_*`` stages).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ditkit.contracts import Predict, Step, wrap
from ditkit.errors import StateError
from ditkit.execution.stage_list import Context
from ditkit.nn.attention import ATTENTION

CONDITIONING = ("image_embeds", "condition", "clean_latents", "control")
"""State fields that reach the transformer, each made by a stage of its own and there only when it is needed."""


def forward_pass(
    name: str, inputs: Mapping[str, Any], ctx: Context, attention: str, remember: bool, control_scale: float = 1.0
) -> Predict:
    """``predict(x, step)`` of one transformer: one forward pass of the branch that the step names."""
    transformer = ctx.components[name]
    texts = _texts(transformer, inputs, ctx, remember)
    condition = _fitting(inputs, "condition", transformer.condition_channels)
    control = _fitting(inputs, "control", transformer.control_channels)
    told: dict[str, Any] = {} if control is None else {"control": control, "control_scale": control_scale}
    attend = wrap(ATTENTION[attention], ctx.seams.attend)
    run_blocks = wrap(transformer.run_blocks, ctx.seams.run_blocks)

    @torch.inference_mode()
    def forward(x: Tensor, step: Step) -> Tensor:
        timestep = timesteps(x, step, inputs)
        seen = x if condition is None else torch.cat((x, condition.to(x)), 1)
        text = texts[step.branch]
        velocity = transformer(seen, timestep, text, **told, run_blocks=run_blocks, attend=attend, step=step)
        return velocity.to(x.dtype)

    return forward


def timesteps(x: Tensor, step: Step, inputs: Mapping[str, Any]) -> Tensor:
    """[B], or [B, F] with 0 at the frames that are given (Wan2.2 ``textimage2video.py``)."""
    if "clean_latents" not in inputs:
        return torch.full((len(x),), step.timestep, dtype=torch.float64, device=x.device)
    each = torch.full((len(x), x.shape[2]), step.timestep, dtype=torch.float64, device=x.device)
    each[:, : inputs["clean_latents"].shape[2]] = 0
    return each


def _texts(transformer: Any, inputs: Mapping[str, Any], ctx: Context, remember: bool) -> dict[str, Any]:
    """For each branch its text; the pictures are the same in both, as in the official code."""
    branches = {"cond": "prompt"}
    if _guides(ctx):
        if "negative_prompt_embeds" not in inputs:
            raise StateError(
                "guiding away from the negative prompt",
                "the State has no negative_prompt_embeds",
                "Run encode_text with this guidance scale, or set it to 1",
            )
        branches["uncond"] = "negative_prompt"
    image = inputs.get("image_embeds")
    more = {} if image is None else {"image": image}
    try:
        with torch.inference_mode():
            return {
                branch: transformer.prepare_text(
                    inputs[f"{field}_embeds"].split(inputs[f"{field}_lengths"]), remember, **more
                )
                for branch, field in branches.items()
            }
    except ValueError as e:
        raise StateError("conditioning on what a State holds", str(e), "Use the encoders of this model") from None


def _guides(ctx: Context) -> bool:
    return any(scale not in (None, 1) for scale in (ctx.settings.guidance_scale, ctx.settings.guidance_scale_2))


def _fitting(inputs: Mapping[str, Any], field: str, channels: int) -> Tensor | None:
    """The input that goes with the latents; there exactly when the transformer has channels for it."""
    given = inputs.get(field)
    has = 0 if given is None else given.shape[1]
    if has != channels:
        raise StateError(
            f"denoising with {field!r} of {has} channels",
            f"this transformer takes {channels}",
            "Use the model that it was made for" if has else f"Run the stage that writes {field!r} first",
        )
    return given
