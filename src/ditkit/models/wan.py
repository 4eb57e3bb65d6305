"""The Wan diffusion transformer: noisy latents, a timestep and text in, a velocity out.

All of the family is this one class; sizes and branches are data (``WanConfig``), never subclasses. Parameter names are
those of the official checkpoint. There are two openings and no others: the one ``run_blocks`` line and the ``attend``
calls. The module holds weights only; whatever belongs to one run (text keys and values, rotary tables) is in objects
that the caller holds, so threads can share it.
Leaves out: guidance, schedules, files, and making the condition and control inputs (``conditioning/``).
Source: Wan2.1 and Wan2.2 ``wan/modules/model.py``; numerics of both conventions in ``nn/precision.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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

    def __post_init__(self):
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2 or self.dim // self.num_heads < 6:
            raise ValueError(f"dim {self.dim} over {self.num_heads} heads: the head width must be even and at least 6")
        layers = self.vace_layers
        if layers and (layers[0] != 0 or sorted(set(layers)) != [*layers] or layers[-1] >= self.num_layers):
            raise ValueError(f"vace_layers {layers}: they must rise from 0 and stay below {self.num_layers}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclass
class Text:
    """The text of one run, embedded: ``rows`` [B, 512, dim]; and the image, where there is one: ``image`` [B, n, dim].
    ``keys_values`` keeps what each cross-attention made of them, because it is the same at every step; None makes it
    anew each time. Equal results either way."""

    rows: Tensor
    keys_values: dict[tuple[nn.Module, str], tuple[Tensor, Tensor]] | None
    image: Tensor | None = None


@dataclass(frozen=True)
class Modulation:
    """What the timestep does to blocks and head: ``values`` [B, n, dim], or one row for each different timestep and
    ``token`` [B, L], which says whose row each token takes (a few rows stand for 30,000 tokens)."""

    values: Tensor
    token: Tensor | None = None

    def parts(self, own: Tensor, wide: torch.dtype) -> Iterator[Tensor]:
        """``own`` [1, n, dim] added, then the n parts one by one: [B, 1, dim], or [B, L, dim]."""
        for part in (own.to(wide) + self.values.to(wide)).chunk(own.shape[1], dim=1):
            yield part if self.token is None else part.squeeze(1)[self.token]


@dataclass
class Control:
    """The control branch of VACE during one forward pass: its tokens so far, and how much each hint counts."""

    tokens: Tensor
    scales: Sequence[float]


@dataclass(frozen=True)
class BlockContext:
    """What a block needs besides the tokens. ``rope`` is a pair of [L, 1, d/2]."""

    modulation: Modulation
    rope: tuple[Tensor, Tensor]
    text: Text
    attend: Attend
    grid: tuple[int, int, int]
    precision: Precision
    step: Step | None = None
    control: Control | None = None


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
    """Attends to the text and, with keys and values of its own, to the image. The two results are added."""

    def __init__(self, config: WanConfig, block: int):
        super().__init__(config, block)
        if config.image_dim is not None:
            self.k_img, self.v_img = Linear(config.dim, config.dim), Linear(config.dim, config.dim)
            self.norm_k_img = RMSNorm(config.dim, config.eps)

    def forward(self, x: Tensor, ctx: BlockContext) -> Tensor:
        x = x.to(ctx.precision.compute)
        q = self.split(self.norm_q(self.q(x))).to(x.dtype)
        text = ctx.text
        k, v = self.keys_values(text, "cross", text.rows, lambda rows: self.norm_k(self.k(rows)), self.v)
        out = ctx.attend(q, k, v, Site(self.block, "cross", ctx.grid, ctx.step)).flatten(2)
        if text.image is not None:
            k, v = self.keys_values(text, "image", text.image, lambda rows: self.norm_k_img(self.k_img(rows)), self.v_img)
            out = out + ctx.attend(q, k, v, Site(self.block, "image", ctx.grid, ctx.step)).flatten(2)
        return self.o(out)

    def keys_values(self, text: Text, kind: str, rows: Tensor, key: Callable, value: Callable) -> tuple[Tensor, Tensor]:
        known = text.keys_values.get((self, kind)) if text.keys_values is not None else None
        if known is None:
            known = self.split(key(rows)).to(rows.dtype), self.split(value(rows))
            if text.keys_values is not None:
                text.keys_values[self, kind] = known
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
        part = ctx.modulation.parts(self.modulation, wide)  # shift, scale and gate, twice
        y = self.self_attn(torch.addcmul(next(part), self.norm1(x), 1 + next(part)), ctx)  # shift + norm * (1 + scale)
        x = torch.addcmul(x.to(wide), y.to(wide), next(part)).to(stream)
        x = x + self.cross_attn(self.norm3(x), ctx).to(stream)
        y = self.ffn(torch.addcmul(next(part), self.norm2(x), 1 + next(part)).to(compute))
        return torch.addcmul(x.to(wide), y.to(wide), next(part)).to(stream)


class Head(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.norm = LayerNorm(config.dim, config.eps)
        self.head = Linear(config.dim, patch * config.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, time: Modulation, policy: Precision) -> Tensor:
        shift, scale = time.parts(self.modulation, policy.wide)
        return self.head(torch.addcmul(shift, self.norm(x), 1 + scale).to(policy.head))


class ImageEmbedding(nn.Module):
    """CLIP features [B, n, image_dim] -> rows [B, n, dim]. First and last frame: the rows of both, with positions."""

    def __init__(self, config: WanConfig):
        super().__init__()
        width = config.image_dim
        assert width is not None
        self.proj = nn.Sequential(
            LayerNorm(width, 1e-5, affine=True),
            Linear(width, width),
            nn.GELU(),
            Linear(width, config.dim),
            LayerNorm(config.dim, 1e-5, affine=True),
        )
        self.emb_pos = None if config.image_tokens is None else nn.Parameter(torch.zeros(1, config.image_tokens, width))

    def forward(self, features: Tensor, compute: torch.dtype) -> Tensor:
        x = features.to(compute)
        if self.emb_pos is not None:
            x = x + self.emb_pos.to(compute)
        for layer in self.proj:
            x = layer(x).to(compute)
        return x


def run_in_order(blocks: Iterable[nn.Module], x: Tensor, ctx: BlockContext) -> Tensor:
    """Seam B at its neutral setting."""
    for block in blocks:
        x = block(x, ctx)
    return x


def patches(latents: Tensor, embedding: nn.Conv3d) -> Tensor:
    """[B, C, F, h, w] -> tokens [B, L, dim], column fastest. The same sum as a convolution with stride = kernel."""
    b, c, f, h, w = latents.shape
    p, q, r = embedding.kernel_size
    x = latents.reshape(b, c, f // p, p, h // q, q, w // r, r).permute(0, 2, 4, 6, 1, 3, 5, 7)
    weight, bias = embedding.weight, embedding.bias
    assert bias is not None  # the convolution was made with one
    return F.linear(x.flatten(4).flatten(1, 3), weight.flatten(1).to(x.dtype), bias.to(x.dtype))


class ControlBlock(Block):
    """A block of VACE's control branch: an ordinary one with a projection behind it, and before the first of them.
    Its attention sites have the number of the main block that takes its hint."""

    def __init__(self, config: WanConfig, number: int):
        super().__init__(config, config.vace_layers[number])
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
        branch, compute = ctx.control, ctx.precision.compute
        assert branch is not None
        tokens = branch.tokens
        if self.control.before_proj is not None:
            tokens = self.control.before_proj(tokens.to(compute)) + x
        branch.tokens = self.control(tokens, ctx)
        hint = self.control.after_proj(branch.tokens.to(compute))
        return self.block(x, ctx) + hint.to(ctx.precision.stream) * branch.scales[self.number]


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
    return Control(patches(control.to(model.device, model.precision.compute), model.vace_patch_embedding), scales)


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
        if config.image_dim is not None:
            self.img_emb = ImageEmbedding(config)
        if config.vace_layers:
            self.vace_patch_embedding = nn.Conv3d(
                config.vace_in_dim, config.dim, config.patch_size, config.patch_size
            )
            self.vace_blocks = nn.ModuleList(ControlBlock(config, n) for n in range(len(config.vace_layers)))

    @property
    def fingerprint(self) -> str:
        """Stands for the weights and how they compute; whoever loads the module sets ``identify``."""
        return self.identify()

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    @property
    def latent_channels(self) -> int:
        return self.config.out_dim

    @property
    def condition_channels(self) -> int:
        return self.config.in_dim - self.config.out_dim

    @property
    def control_channels(self) -> int:
        return self.config.vace_in_dim if self.config.vace_layers else 0

    def prepare_text(self, rows: Sequence[Tensor], remember: bool = True, image: Tensor | None = None) -> Text:
        """``rows``: one [length, text_dim] for each sample. Zero rows fill up to ``text_len`` *after* the text encoder
        and *before* the embedding, and all of them are attended: that is what Wan was trained with.

        ``image``: CLIP features [B, n, image_dim]; None attends to the text alone."""
        widths = {r.shape[-1] for r in rows}
        if widths != {self.config.text_dim}:
            raise ValueError(f"text rows of width {widths} were given; the transformer takes {self.config.text_dim}")
        longest = max(len(r) for r in rows)
        if longest > self.config.text_len:
            raise ValueError(f"{longest} rows of text were given; the transformer takes {self.config.text_len}")
        padded = torch.stack([F.pad(r, (0, 0, 0, self.config.text_len - len(r))) for r in rows])
        device, compute = self.patch_embedding.weight.device, self.precision.compute
        return Text(
            self.text_embedding(padded.to(device, compute)), {} if remember else None, self._image(image, len(rows))
        )

    def _image(self, image: Tensor | None, count: int) -> Tensor | None:
        if image is None:
            return None
        width, tokens = self.config.image_dim, self.config.image_tokens
        if width is None:
            raise ValueError("image features were given; this transformer has no image branch")
        if image.shape != (count, tokens or image.shape[1], width):
            wanted = [count, tokens or "any number", width]
            raise ValueError(f"image features of shape {list(image.shape)} were given; the transformer takes {wanted}")
        return self.img_emb(image.to(self.device), self.precision.compute)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Text,
        *,
        control: Tensor | None = None,
        control_scale: float | Sequence[float] = 1.0,
        run_blocks: RunBlocks = run_in_order,
        attend: Attend = sdpa,
        step: Step | None = None,
    ) -> Tensor:
        policy = self.precision
        grid = self._grid(latents)
        x = patches(latents.to(policy.compute), self.patch_embedding)
        time, modulation = self._time(timestep, x.shape[1])
        rope = rope_table(grid, self.config.head_dim, latents.device, policy.wide)
        branch = begin_control(self, control, control_scale, latents.shape)
        ctx = BlockContext(modulation, rope, text, attend, grid, policy, step, branch)
        x = run_blocks(self.blocks if branch is None else controlled(self), x, ctx)
        return self._unpatch(self.head(x, time, policy), grid)

    def _grid(self, latents: Tensor) -> tuple[int, int, int]:
        size, patch = latents.shape[2:], self.config.patch_size
        if latents.shape[1] != self.config.in_dim or any(s % p for s, p in zip(size, patch, strict=True)):
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} were given; the transformer takes {self.config.in_dim} "
                f"channels and sizes (frames, height, width) that {patch} divides"
            )
        return size[0] // patch[0], size[1] // patch[1], size[2] // patch[2]

    def _time(self, timestep: Tensor, tokens: int) -> tuple[Modulation, Modulation]:
        """[B], or [B, L] with one timestep for each token -> the modulations of the head and of the blocks."""
        policy, token = self.precision, None
        if timestep.dim() == 2:
            if timestep.shape[1] != tokens:
                raise ValueError(f"{timestep.shape[1]} timesteps were given for {tokens} tokens")
            timestep, token = timestep.unique(return_inverse=True)
        sinusoid = timestep_sinusoid(timestep, self.config.freq_dim, policy.sinusoid).to(policy.wide)
        time = self.time_embedding(sinusoid).to(policy.projection)
        blocks = self.time_projection(time).unflatten(-1, (6, -1))
        return Modulation(time.unsqueeze(1), token), Modulation(blocks, token)

    def _unpatch(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, L, patch * C], channel fastest -> [B, C, F, h, w]."""
        x = x.unflatten(-1, (*self.config.patch_size, -1)).unflatten(1, grid)
        b, f, h, w, p, q, r, c = x.shape
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(b, c, f * p, h * q, w * r)
