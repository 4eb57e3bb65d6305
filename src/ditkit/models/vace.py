"""VACE's control branch: blocks that turn a control input into hints for the main blocks.

Leaves out: making the control input of videos, masks and pictures (``conditioning/control.py``).
Source: Wan2.1 ``wan/modules/vace_model.py``, which makes all hints first; here each is made when it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ditkit.models.wan_block import Block, BlockContext, WanConfig, patchify
from ditkit.nn.layers import Linear

if TYPE_CHECKING:
    from ditkit.models.wan import WanTransformer


@dataclass
class Control:
    """The control branch of VACE during one forward pass: its tokens so far, and how much each hint counts."""

    tokens: Tensor
    scales: Sequence[float]


class ControlBlock(Block):
    """A block of VACE's control branch: an ordinary one with a projection behind it, and before the first of them.
    Its attention sites have the number of the main block that takes its hint, and ``control``."""

    def __init__(self, config: WanConfig, number: int):
        super().__init__(config, config.vace_layers[number])
        self.self_attn.control = self.cross_attn.control = True
        self.before_proj = Linear(config.dim, config.dim) if number == 0 else None
        self.after_proj = Linear(config.dim, config.dim)


class Controlled(nn.Module):
    """What seam B sees of a block that takes a hint: the control block, then the block, then the hint added.

    A hint needs the earlier control blocks only, so it is made when it is needed, and one is alive at a time. The
    pair is put together for each pass; the modules in it are those of the transformer."""

    def __init__(self, block: Block, control: ControlBlock, number: int):
        super().__init__()
        self.block, self.control, self.number = block, control, number

    def forward(self, x: Tensor, ctx: BlockContext) -> Tensor:
        branch, compute = ctx.control, ctx.policy.compute
        assert branch is not None
        tokens = branch.tokens
        if self.control.before_proj is not None:
            tokens = self.control.before_proj(tokens.to(compute)) + x
        branch.tokens = self.control(tokens, ctx)
        hint = self.control.after_proj(branch.tokens.to(compute))
        return self.block(x, ctx) + hint.to(ctx.policy.residual_dtype) * branch.scales[self.number]


def controlled(model: WanTransformer) -> list[nn.Module]:
    """The main blocks, those that take a hint paired with their control block."""
    numbers = {block: number for number, block in enumerate(model.config.vace_layers)}
    return [
        Controlled(block, model.vace_blocks[numbers[i]], numbers[i]) if i in numbers else block  # type: ignore[arg-type]
        for i, block in enumerate(model.blocks)
    ]


def begin_control(
    model: WanTransformer, control: Tensor | None, scale: float | Sequence[float], latents: torch.Size
) -> Control | None:
    """``control`` [B, vace_in_dim, F, h, w] -> the branch at its beginning; None for a transformer without one."""
    layers = model.config.vace_layers
    if control is None and not layers:
        return None
    wanted = (latents[0], model.control_channels, *latents[2:])
    if control is None or not layers or control.shape != wanted:
        given = "none was" if control is None else f"one of shape {list(control.shape)} was"
        takes = f"one of shape {list(wanted)}" if layers else "none"
        raise ValueError(f"a control input: {given} given; this transformer takes {takes}")
    scales = [float(scale)] * len(layers) if isinstance(scale, int | float) else [float(s) for s in scale]
    if len(scales) != len(layers):
        raise ValueError(f"{len(scales)} control scales were given for {len(layers)} layers with hints")
    return Control(patchify(control.to(model.device, model.policy.compute), model.vace_patch_embedding), scales)
