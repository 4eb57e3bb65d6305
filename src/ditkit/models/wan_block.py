"""One block of the Wan transformer: self-attention, attention to the text and the image, and a feed-forward net.

Also the blocks of VACE's control branch, which turn a control input into hints for the main blocks, what a block needs
besides the tokens (``BlockContext``), and the sizes that all parts are made of (``WanConfig``).
Leaves out: what stands before and behind the blocks (``wan.py``).
Source: Wan2.1 and Wan2.2 ``wan/modules/model.py``; Wan2.1 ``wan/modules/vace_model.py``, which makes all hints first;
here each is made when it is needed."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor, nn

from ditkit.contracts import Attend, Site, Step
from ditkit.nn.dtype_policy import DtypePolicy
from ditkit.nn.layers import LayerNorm, Linear, Modulation, RMSNorm, modulation
from ditkit.nn.rope import Rope, rotate


@dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan transformer; the defaults are those of the 1.3B text-to-video model.

    ``in_dim`` beyond ``out_dim`` is the condition that comes with the latents (an image: 4 mask channels and 16 latent
    ones). ``image_dim`` is the width of CLIP features, None without that branch; ``image_tokens`` the rows of learned
    positions for them (514 in the first-and-last-frame model). ``vace_layers``: the blocks that get a hint."""

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    text_len: int = 512
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    image_dim: int | None = None
    image_tokens: int | None = None
    vace_layers: tuple[int, ...] = ()
    vace_in_dim: int = 96

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(f"dim {self.dim} over {self.num_heads} heads: the head width must be even and at least 6")
        layers = self.vace_layers
        if layers and (layers[0] != 0 or sorted(set(layers)) != [*layers] or layers[-1] >= self.num_layers):
            raise ValueError(f"vace_layers {layers}: they must rise from 0 and stay below {self.num_layers}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclass(frozen=True)
class Text:
    """Text rows, embedded: ``rows`` [B, 512, dim]; and the image, where there is one: ``image`` [B, n, dim].

    ``keys_values``: (block, whether it is a control block, kind) -> keys and values [B, n, N, d] that its
    cross-attention made of the rows, for they are the same at every step; None makes them anew each time. Equal results
    either way."""

    rows: Tensor
    keys_values: Mapping[tuple[int, bool, str], tuple[Tensor, Tensor]] | None = None
    image: Tensor | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of cross-attention that it takes."""
        return ("cross",) if self.image is None else ("cross", "image")


@dataclass
class Control:
    """The control branch of VACE during one forward pass: its tokens so far, and how much each hint counts."""

    tokens: Tensor
    scales: Sequence[float]


@dataclass(frozen=True)
class BlockContext:
    """What a block needs besides the tokens x [B, L, dim].

    ``tokens`` tells which rows of x are ``video``, ``text`` or ``control``; Wan's are all video. ``step``: the
    denoising step, None outside of a run. Plugs at seam B narrow it with ``rows`` and move it with ``shifted``."""

    modulation: Modulation
    positions: Rope
    text: Text
    attend: Attend
    grid: tuple[int, int, int]
    policy: DtypePolicy
    step: Step | None = None
    control: Control | None = None
    tokens: Mapping[str, slice] = field(default_factory=dict)

    @property
    def rope(self) -> tuple[Tensor, Tensor]:
        return self.positions.table

    def rows(self, index: slice) -> Self:
        """The context of the rows ``x[:, index]``: positions, timesteps and control tokens of those."""
        kept = range(math.prod(self.grid))[self.positions.index][index]
        positions = replace(self.positions, index=slice(kept.start, kept.stop, kept.step))
        modulation, control, tokens = self.modulation, self.control, {"video": slice(0, len(kept))}
        if modulation.token is not None:
            modulation = replace(modulation, token=modulation.token[:, index])
        if control is not None:
            control = replace(control, tokens=control.tokens[:, index])
        return replace(self, modulation=modulation, positions=positions, control=control, tokens=tokens)

    def shifted(self, frames: int) -> Self:
        """The context of the same tokens as if they stood ``frames`` latent frames later."""
        return replace(self, positions=replace(self.positions, start=self.positions.start + frames))


class Attention(nn.Module):
    """Projections and the norms of queries and keys, which run over the whole width, before the heads are split."""

    control = False  # for its sites: whether it is part of VACE's control branch

    def __init__(self, config: WanConfig, block: int):
        super().__init__()
        self.heads, self.block = config.num_heads, block
        self.q, self.k, self.v, self.o = (Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(config.dim, config.eps), RMSNorm(config.dim, config.eps)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


class SelfAttention(Attention):
    def forward(self, x: Tensor, ctx: BlockContext) -> Tensor:
        x = x.to(ctx.policy.compute)
        q = rotate(self.split(self.norm_q(self.q(x))), *ctx.rope).to(x.dtype)
        k = rotate(self.split(self.norm_k(self.k(x))), *ctx.rope).to(x.dtype)
        site = Site(self.block, "self", ctx.grid, ctx.step, self.control)
        return self.o(ctx.attend(q, k, self.split(self.v(x)), site).flatten(2))


class CrossAttention(Attention):
    """Attends to the text and, with keys and values of its own, to the image. The two results are added."""

    def __init__(self, config: WanConfig, block: int):
        super().__init__(config, block)
        if config.image_dim is not None:
            self.k_img, self.v_img = Linear(config.dim, config.dim), Linear(config.dim, config.dim)
            self.norm_k_img = RMSNorm(config.dim, config.eps)

    def forward(self, x: Tensor, ctx: BlockContext) -> Tensor:
        x = x.to(ctx.policy.compute)
        q = self.split(self.norm_q(self.q(x))).to(x.dtype)
        sites = [Site(self.block, kind, ctx.grid, ctx.step, self.control) for kind in ctx.text.kinds]
        rows = (ctx.attend(q, *self.keys_values(ctx.text, site.kind), site).flatten(2) for site in sites)
        return self.o(functools.reduce(torch.add, rows))

    def keys_values(self, text: Text, kind: str) -> tuple[Tensor, Tensor]:
        """Keys and values [B, n, N, d] of the text (``cross``) or of the image rows (``image``)."""
        known = None if text.keys_values is None else text.keys_values.get((self.block, self.control, kind))
        if known is not None:
            return known
        if kind == "cross":
            return self.split(self.norm_k(self.k(text.rows))).to(text.rows.dtype), self.split(self.v(text.rows))
        assert text.image is not None
        rows = text.image
        return self.split(self.norm_k_img(self.k_img(rows))).to(rows.dtype), self.split(self.v_img(rows))

    def all_keys_values(self, text: Text) -> dict[tuple[int, bool, str], tuple[Tensor, Tensor]]:
        """What ``Text.keys_values`` holds for this layer."""
        return {(self.block, self.control, kind): self.keys_values(text, kind) for kind in text.kinds}


class Block(nn.Module):
    def __init__(self, config: WanConfig, index: int = 0):
        super().__init__()
        self.norm1 = LayerNorm(config.dim, config.eps)
        self.self_attn = SelfAttention(config, index)
        self.norm3 = LayerNorm(config.dim, config.eps, affine=True)  # the official numbering
        self.cross_attn = CrossAttention(config, index)
        self.norm2 = LayerNorm(config.dim, config.eps)
        gelu = nn.GELU(approximate="tanh")
        self.ffn = nn.Sequential(Linear(config.dim, config.ffn_dim), gelu, Linear(config.ffn_dim, config.dim))
        self.modulation = modulation(6, config.dim)

    def forward(self, x: Tensor, ctx: BlockContext) -> Tensor:
        wide, stream, compute = ctx.policy.norm_dtype, ctx.policy.residual_dtype, ctx.policy.compute
        part = ctx.modulation.parts(self.modulation, wide)  # adaLN; made one by one, for each may be as large as x
        shift, scale = next(part), next(part)
        y = self.self_attn(torch.addcmul(shift, self.norm1(x), 1 + scale), ctx)
        del shift, scale
        x = torch.addcmul(x.to(wide), y.to(wide), next(part)).to(stream)  # + gate * y
        x = x + self.cross_attn(self.norm3(x), ctx).to(stream)
        shift, scale = next(part), next(part)
        y = self.ffn(torch.addcmul(shift, self.norm2(x), 1 + scale).to(compute))
        del shift, scale
        return torch.addcmul(x.to(wide), y.to(wide), next(part)).to(stream)


class ControlBlock(Block):
    """A block of VACE's control branch: an ordinary one with a projection behind it, and before the first of them.
    Its attention sites have the number of the main block that takes its hint, and ``control``."""

    def __init__(self, config: WanConfig, number: int):
        super().__init__(config, config.vace_layers[number])
        self.number = number
        self.self_attn.control = self.cross_attn.control = True
        self.before_proj = Linear(config.dim, config.dim) if number == 0 else None
        self.after_proj = Linear(config.dim, config.dim)

    def beside(self, block: nn.Module) -> "Controlled":
        return Controlled(block, self)


class Controlled(nn.Module):
    """What seam B sees of a block that takes a hint: the control block, then the block, then the hint added.

    A hint needs the earlier control blocks only, so it is made when it is needed, and one is alive at a time. The
    pair is put together for each pass; the modules in it are those of the transformer."""

    def __init__(self, block: nn.Module, control: ControlBlock):
        super().__init__()
        self.block, self.control, self.number = block, control, control.number

    def forward(self, x: Tensor, ctx: BlockContext) -> Tensor:
        branch, compute = ctx.control, ctx.policy.compute
        assert branch is not None
        tokens = branch.tokens
        if self.control.before_proj is not None:
            tokens = self.control.before_proj(tokens.to(compute)) + x
        branch.tokens = self.control(tokens, ctx)
        hint = self.control.after_proj(branch.tokens.to(compute))
        return self.block(x, ctx) + hint.to(ctx.policy.residual_dtype) * branch.scales[self.number]
