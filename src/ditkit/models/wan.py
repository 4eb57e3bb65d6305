"""The Wan diffusion transformer: noisy latents, a timestep and text in, a velocity out.

Sizes are data (``WanConfig``), never subclasses. Parameter names are those of the official checkpoint. There are two
openings and no others: the one ``run_blocks`` line and the ``attend`` calls. The module holds weights only; whatever
belongs to one run (text keys and values, rotary tables) is in objects that the caller holds, so threads can share it.
Leaves out: guidance, schedules, files, and the image, VACE and per-token-timestep branches of the family.
Source: Wan2.1 ``wan/modules/model.py``; numerics of both conventions in ``nn/precision.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.contracts import Attend, RunBlocks, Site, Step
from ditkit.nn.attention import sdpa
from ditkit.nn.layers import LayerNorm, Linear, RMSNorm, timestep_sinusoid
from ditkit.nn.precision import Precision, precision
from ditkit.nn.rope import rope_table, rotate

TIMESTEP_SCALE = 1000.0  # timestep = 1000 sigma; the only place of this factor


@dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan transformer; the defaults are those of the 1.3B text-to-video model."""

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

    def __post_init__(self):
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2 or self.dim // self.num_heads < 6:
            raise ValueError(f"dim {self.dim} over {self.num_heads} heads: the head width must be even and at least 6")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclass
class Text:
    """The text of one run, embedded: ``rows`` [B, 512, dim]. ``keys_values`` keeps what each cross-attention made of
    it, because it is the same at every step; None makes it anew each time. Equal results either way."""

    rows: Tensor
    keys_values: dict[nn.Module, tuple[Tensor, Tensor]] | None


@dataclass(frozen=True)
class BlockContext:
    """What a block needs besides the tokens. ``modulation`` [B, 6, dim]; ``rope`` a pair of [L, 1, d/2]."""

    modulation: Tensor
    rope: tuple[Tensor, Tensor]
    text: Text
    attend: Attend
    grid: tuple[int, int, int]
    precision: Precision
    step: Step | None = None


class Attention(nn.Module):
    """Projections and the norms of queries and keys, which run over the whole width, before the heads are split."""

    def __init__(self, config: WanConfig, block: int):
        super().__init__()
        self.heads, self.block = config.num_heads, block
        self.q, self.k, self.v, self.o = (Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(config.dim, config.eps), RMSNorm(config.dim, config.eps)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


class SelfAttention(Attention):
    def forward(self, x: Tensor, ctx: BlockContext) -> Tensor:
        x = x.to(ctx.precision.compute)
        q = rotate(self.split(self.norm_q(self.q(x))), *ctx.rope).to(x.dtype)
        k = rotate(self.split(self.norm_k(self.k(x))), *ctx.rope).to(x.dtype)
        site = Site(self.block, "self", ctx.grid, ctx.step)
        return self.o(ctx.attend(q, k, self.split(self.v(x)), site).flatten(2))


class CrossAttention(Attention):
    def forward(self, x: Tensor, ctx: BlockContext) -> Tensor:
        x = x.to(ctx.precision.compute)
        q = self.split(self.norm_q(self.q(x))).to(x.dtype)
        k, v = self.keys_values(ctx.text)
        site = Site(self.block, "cross", ctx.grid, ctx.step)
        return self.o(ctx.attend(q, k, v, site).flatten(2))

    def keys_values(self, text: Text) -> tuple[Tensor, Tensor]:
        known = text.keys_values.get(self) if text.keys_values is not None else None
        if known is None:
            k = self.split(self.norm_k(self.k(text.rows))).to(text.rows.dtype)
            known = k, self.split(self.v(text.rows))
            if text.keys_values is not None:
                text.keys_values[self] = known
        return known


class Block(nn.Module):
    def __init__(self, config: WanConfig, index: int = 0):
        super().__init__()
        self.norm1 = LayerNorm(config.dim, config.eps)
        self.self_attn = SelfAttention(config, index)
        self.norm3 = LayerNorm(config.dim, config.eps, affine=True)  # the official numbering
        self.cross_attn = CrossAttention(config, index)
        self.norm2 = LayerNorm(config.dim, config.eps)
        self.ffn = nn.Sequential(
            Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), Linear(config.ffn_dim, config.dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, ctx: BlockContext) -> Tensor:
        wide, stream, compute = ctx.precision.wide, ctx.precision.stream, ctx.precision.compute
        modulation = self.modulation.to(wide) + ctx.modulation.to(wide)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        y = self.self_attn(torch.addcmul(shift1, self.norm1(x), 1 + scale1), ctx)  # shift + norm * (1 + scale)
        x = torch.addcmul(x.to(wide), y.to(wide), gate1).to(stream)
        x = x + self.cross_attn(self.norm3(x), ctx).to(stream)
        y = self.ffn(torch.addcmul(shift2, self.norm2(x), 1 + scale2).to(compute))
        return torch.addcmul(x.to(wide), y.to(wide), gate2).to(stream)


class Head(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.norm = LayerNorm(config.dim, config.eps)
        self.head = Linear(config.dim, patch * config.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, time: Tensor, policy: Precision) -> Tensor:
        shift, scale = (self.modulation.to(policy.wide) + time.to(policy.wide).unsqueeze(1)).chunk(2, dim=1)
        return self.head(torch.addcmul(shift, self.norm(x), 1 + scale).to(policy.head))


def run_in_order(blocks: Iterable[nn.Module], x: Tensor, ctx: BlockContext) -> Tensor:
    """Seam B at its neutral setting."""
    for block in blocks:
        x = block(x, ctx)
    return x


class WanTransformer(nn.Module):
    """``transformer(latents, timestep, text)``. Latents are [B, C, F, h, w] with h and w even; the velocity
    (noise minus data) that comes back has their shape and is float32 (bfloat16 under the diffusers policy)."""

    timestep_scale = TIMESTEP_SCALE
    run_blocks = staticmethod(run_in_order)

    def __init__(self, config: WanConfig | None = None, policy: Precision | None = None):
        super().__init__()
        self.config = config = config or WanConfig()
        self.precision = policy or precision("official", torch.float32)
        self.identify: Callable[[], str] = lambda: "not loaded from files"
        self.patch_embedding = nn.Conv3d(config.in_dim, config.dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(
            Linear(config.text_dim, config.dim), nn.GELU(approximate="tanh"), Linear(config.dim, config.dim)
        )
        self.time_embedding = nn.Sequential(
            Linear(config.freq_dim, config.dim), nn.SiLU(), Linear(config.dim, config.dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(config.dim, config.dim * 6))
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.head = Head(config)

    @property
    def fingerprint(self) -> str:
        """Stands for the weights and how they compute; whoever loads the module sets ``identify``."""
        return self.identify()

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    @property
    def latent_channels(self) -> int:
        return self.config.in_dim

    def prepare_text(self, rows: Sequence[Tensor], remember: bool = True) -> Text:
        """``rows``: one [length, text_dim] for each sample. Zero rows fill up to ``text_len`` *after* the text encoder
        and *before* the embedding, and all of them are attended: that is what Wan was trained with."""
        widths = {r.shape[-1] for r in rows}
        if widths != {self.config.text_dim}:
            raise ValueError(f"text rows of width {widths} were given; the transformer takes {self.config.text_dim}")
        longest = max(len(r) for r in rows)
        if longest > self.config.text_len:
            raise ValueError(f"{longest} rows of text were given; the transformer takes {self.config.text_len}")
        padded = torch.stack([F.pad(r, (0, 0, 0, self.config.text_len - len(r))) for r in rows])
        padded = padded.to(self.patch_embedding.weight.device, self.precision.compute)
        return Text(self.text_embedding(padded), {} if remember else None)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Text,
        *,
        run_blocks: RunBlocks = run_in_order,
        attend: Attend = sdpa,
        step: Step | None = None,
    ) -> Tensor:
        policy = self.precision
        grid = self._grid(latents)
        x = self._patches(latents.to(policy.compute))
        time, modulation = self._time(timestep)
        rope = rope_table(grid, self.config.head_dim, latents.device, policy.wide)
        ctx = BlockContext(modulation, rope, text, attend, grid, policy, step)
        x = run_blocks(self.blocks, x, ctx)
        return self._unpatch(self.head(x, time, policy), grid)

    def _grid(self, latents: Tensor) -> tuple[int, int, int]:
        size, patch = latents.shape[2:], self.config.patch_size
        if latents.shape[1] != self.config.in_dim or any(s % p for s, p in zip(size, patch, strict=True)):
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} were given; the transformer takes {self.config.in_dim} "
                f"channels and sizes (frames, height, width) that {patch} divides"
            )
        return size[0] // patch[0], size[1] // patch[1], size[2] // patch[2]

    def _patches(self, latents: Tensor) -> Tensor:
        """[B, C, F, h, w] -> tokens [B, L, dim], column fastest. The same sum as a convolution with stride = kernel."""
        b, c, f, h, w = latents.shape
        p, q, r = self.config.patch_size
        x = latents.reshape(b, c, f // p, p, h // q, q, w // r, r).permute(0, 2, 4, 6, 1, 3, 5, 7)
        weight, bias = self.patch_embedding.weight, self.patch_embedding.bias
        assert bias is not None  # the convolution was made with one
        return F.linear(x.flatten(4).flatten(1, 3), weight.flatten(1).to(x.dtype), bias.to(x.dtype))

    def _time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """[B] -> the time vector [B, dim] and the modulation of the blocks [B, 6, dim]."""
        policy = self.precision
        sinusoid = timestep_sinusoid(timestep, self.config.freq_dim, policy.sinusoid).to(policy.wide)
        time = self.time_embedding(sinusoid).to(policy.projection)
        return time, self.time_projection(time).unflatten(-1, (6, -1))

    def _unpatch(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, L, patch * C], channel fastest -> [B, C, F, h, w]."""
        x = x.unflatten(-1, (*self.config.patch_size, -1)).unflatten(1, grid)
        b, f, h, w, p, q, r, c = x.shape
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(b, c, f * p, h * q, w * r)
