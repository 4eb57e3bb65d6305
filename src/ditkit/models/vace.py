"""VACE's control branch: blocks that turn a control input into hints for the main blocks.

Leaves out: making the control input of videos, masks and pictures (``conditioning/condition.py``).
Source: Wan2.1 ``wan/modules/vace_model.py``, which makes all hints first; here each is made when it is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ditkit.models.wan_block import Block, BlockContext, Control, WanConfig, patchify
from ditkit.nn.layers import Linear


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


def controlled(blocks: Iterable[nn.Module], controls: Iterable[nn.Module], layers: Sequence[int]) -> list[nn.Module]:
    """The main blocks, those that take a hint (``layers``) paired with their control block."""
    numbers, pairs = {block: number for number, block in enumerate(layers)}, [*controls]
    return [
        Controlled(block, pairs[numbers[i]], numbers[i]) if i in numbers else block  # type: ignore[arg-type]
        for i, block in enumerate(blocks)
    ]


def begin_control(
    embedding: nn.Conv3d, layers: Sequence[int], control: Tensor, scale: float | Sequence[float], dtype: torch.dtype
) -> Control:
    """``control`` [B, vace_in_dim, F, h, w] -> the branch at its beginning. Raises ValueError."""
    scales = [float(scale)] * len(layers) if isinstance(scale, int | float) else [float(s) for s in scale]
    if len(scales) != len(layers):
        raise ValueError(f"{len(scales)} control scales were given for {len(layers)} layers with hints")
    return Control(patchify(control.to(embedding.weight.device, dtype), embedding), scales)
