"""The Wan diffusion transformer: noisy latents, a timestep and text in, a velocity out.

All of the family is this one class; sizes and branches are data (``WanConfig``), never subclasses. Parameter names are
those of the official checkpoint. There are two openings and no others: the one ``run_blocks`` line and the ``attend``
calls of ``wan_block.py``. The module holds weights only; whatever belongs to one run (text keys and values, rotary
tables) is in objects that the caller holds, so threads can share it.
Leaves out: the blocks themselves (``wan_block.py``), guidance, schedules, files, and making the condition and control
inputs (``conditioning/``).
Source: Wan2.1 and Wan2.2 ``wan/modules/model.py``; numerics of both conventions in ``nn/dtype_policy.py``."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.contracts import Attend, RunBlocks, Step
from ditkit.errors import StateError
from ditkit.models.wan_block import Block, BlockContext, Control, ControlBlock, CrossAttention, Text, WanConfig
from ditkit.nn.attention import sdpa
from ditkit.nn.dtype_policy import DtypePolicy, dtype_policy
from ditkit.nn.layers import LayerNorm, Linear, Loaded, Modulation, modulation, patchify, timestep_embedding
from ditkit.nn.rope import Rope

TIMESTEP_SCALE = 1000.0  # timestep = 1000 sigma; the only place of this factor


FIELDS = ("image_embeds", "condition", "clean_latents", "control")
"""Fields of a State that a Wan transformer may be conditioned on besides the text; each is there when it is needed."""


@dataclass(frozen=True)
class Conditioning:
    """``condition`` [B, c, F, h, w] goes behind the channels of the latents; ``control`` [B, v, F, h, w] is VACE's
    control input, ``control_scale`` how much each hint counts; the first ``clean_frames`` frames of the latents are
    known and have timestep 0 (Wan2.2 ``textimage2video.py``)."""

    text: Text
    condition: Tensor | None = None
    control: Tensor | None = None
    control_scale: float | Sequence[float] = 1.0
    clean_frames: int = 0

    def frames(self, start: int, stop: int) -> Self:
        """What belongs to the latent frames from ``start`` to ``stop``; the text belongs to all of them."""

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:, :, start:stop]

        clean = min(max(self.clean_frames - start, 0), stop - start)
        return replace(self, condition=cut(self.condition), control=cut(self.control), clean_frames=clean)

    def latents(self, x: Tensor) -> Tensor:
        """``x`` [B, C, F, h, w] with the condition behind its channels. Raises ValueError where the frames differ."""
        if self.condition is None:
            return x
        if self.condition.shape[2:] != x.shape[2:]:
            sizes = f"{tuple(x.shape[2:])} were given with a condition of size {tuple(self.condition.shape[2:])}"
            raise ValueError(f"latents of size {sizes}; narrow it with Step.window where they are a part of the frames")
        return torch.cat((x, self.condition.to(x)), 1)

    def timesteps(self, timestep: Tensor, x: Tensor) -> Tensor:
        """``timestep`` [B] as it is, or with known frames as [B, F] with 0 at those."""
        if not self.clean_frames or timestep.dim() != 1:
            return timestep
        each = timestep[:, None].repeat(1, x.shape[2])
        each[:, : self.clean_frames] = 0
        return each


class Head(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        self.norm = LayerNorm(config.dim, config.eps)
        self.head = Linear(config.dim, math.prod(config.patch_size) * config.out_dim)
        self.modulation = modulation(2, config.dim)

    def forward(self, x: Tensor, time: Modulation, policy: DtypePolicy) -> Tensor:
        shift, scale = time.parts(self.modulation, policy.norm_dtype)
        return self.head(torch.addcmul(shift, self.norm(x), 1 + scale).to(policy.head))


class ImageEmbedding(nn.Module):
    """CLIP features [B, n, image_dim] -> rows [B, n, dim]. First and last frame: the rows of both, with positions."""

    def __init__(self, config: WanConfig):
        super().__init__()
        width = config.image_dim
        assert width is not None
        before, after = LayerNorm(width, 1e-5, affine=True), LayerNorm(config.dim, 1e-5, affine=True)
        self.proj = nn.Sequential(before, Linear(width, width), nn.GELU(), Linear(width, config.dim), after)
        self.emb_pos = None if config.image_tokens is None else nn.Parameter(torch.zeros(1, config.image_tokens, width))

    def forward(self, features: Tensor, policy: DtypePolicy) -> Tensor:
        x = features.to(policy.residual_dtype)
        if self.emb_pos is not None:
            x = x + self.emb_pos.to(policy.residual_dtype)
        for layer in self.proj:
            x = layer(x).to(policy.compute)
        return x


def run_in_order(blocks: Iterable[nn.Module], x: Tensor, ctx: BlockContext) -> Tensor:
    """Seam B at its neutral setting."""
    for block in blocks:
        x = block(x, ctx)
    return x


def text_rows(fields: Mapping[str, object], branch: str) -> Sequence[Tensor]:
    """The text rows of each sample for a branch: ``cond`` the prompt, ``uncond`` the negative prompt. What stands
    behind a colon (``cond:skip``) is for plugs. Raises StateError."""
    field = {"cond": "prompt", "uncond": "negative_prompt"}.get(branch.partition(":")[0])
    if field is None:
        raise StateError(f"a forward pass of the branch {branch!r}", "the branches are cond and uncond",
                         "Put a name of your own behind a colon: cond:NAME")  # fmt: skip
    if f"{field}_embeds" not in fields:
        asked = "guiding away from the negative prompt" if branch != "cond" else "denoising"
        do = "Run encode_text with this guidance scale, or set it to 1"
        raise StateError(asked, f"the State has no {field}_embeds", do)
    return fields[f"{field}_embeds"].split(fields[f"{field}_lengths"])  # type: ignore[attr-defined]


def fitting(fields: Mapping[str, Tensor], field: str, channels: int) -> Tensor | None:
    """The input ``field``, there exactly when the transformer has ``channels`` for it. Raises StateError."""
    given = fields.get(field)
    has = 0 if given is None else given.shape[1]
    if has != channels:
        do = "Use the model that it was made for" if has else f"Run the stage that writes {field!r} first"
        raise StateError(f"denoising with {field!r} of {has} channels", f"this transformer takes {channels}", do)
    return given


class WanTransformer(Loaded):
    """``transformer(latents, timestep, conditioning)``. Latents are [B, C, F, h, w] with h and w even; the velocity
    (noise minus data) that comes back has their shape and is float32 (bfloat16 under the diffusers policy)."""

    timestep_scale = TIMESTEP_SCALE
    reads, cfg = FIELDS, True
    run_blocks = staticmethod(run_in_order)

    def __init__(self, config: WanConfig | None = None, policy: DtypePolicy | None = None):
        super().__init__()
        self.config = config = config or WanConfig()
        self.policy = policy or dtype_policy("wan", torch.float32)
        self.patch, self.latent_channels = config.patch_size, config.out_dim
        self.condition_channels = config.in_dim - config.out_dim
        self.control_channels = config.vace_in_dim if config.vace_layers else 0
        self.patch_embedding = nn.Conv3d(config.in_dim, config.dim, config.patch_size, config.patch_size)
        dim, gelu = config.dim, nn.GELU(approximate="tanh")
        self.text_embedding = nn.Sequential(Linear(config.text_dim, dim), gelu, Linear(dim, dim))
        self.time_embedding = nn.Sequential(Linear(config.freq_dim, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.head = Head(config)
        if config.image_dim is not None:
            self.img_emb = ImageEmbedding(config)
        if config.vace_layers:
            self.vace_patch_embedding = nn.Conv3d(config.vace_in_dim, config.dim, config.patch_size, config.patch_size)
            self.vace_blocks = nn.ModuleList(ControlBlock(config, n) for n in range(len(config.vace_layers)))

    def probe_fields(self, noise: Callable[..., Tensor], rows: int) -> dict[str, Any]:
        """Fields of a State to try it with: ``rows`` rows of text, two latent frames of two patches each way.
        ``noise(channels, frames, height, width, seed=0)`` gives float32 [1, channels, frames, height, width]."""
        config, size = self.config, (2, 2 * self.config.patch_size[1], 2 * self.config.patch_size[2])
        found: dict[str, Any] = {}
        for name in ("prompt", "negative_prompt"):
            text = noise(1, 1, rows, config.text_dim, len(name))[0, 0, 0]
            found |= {f"{name}_embeds": text, f"{name}_lengths": [rows]}
        if config.image_dim is not None:
            found["image_embeds"] = noise(1, 1, config.image_tokens or rows, config.image_dim)[0, 0]
        for name, channels in (("condition", self.condition_channels), ("control", self.control_channels)):
            if channels:
                found[name] = noise(channels, *size)
        return found

    def prepare(
        self, fields: Mapping[str, Any], settings: Any, branch: str = "cond", cache_text_kv: bool = True
    ) -> Conditioning:
        """The conditioning of one branch (``cond``, ``uncond``) from fields of a State: text rows, image features,
        condition, known frames, control. ``settings``: those of the request, as attributes. Raises StateError where
        they are not what this transformer takes."""
        rows = text_rows(fields, branch)
        condition = fitting(fields, "condition", self.condition_channels)
        control = fitting(fields, "control", self.control_channels)
        scale = 1.0 if control is None else settings.control_scale
        clean = fields["clean_latents"].shape[2] if "clean_latents" in fields else 0
        try:
            text = self.prepare_text(rows, cache_text_kv, fields.get("image_embeds")).text
        except ValueError as e:
            raise StateError("conditioning on what a State holds", str(e), "Use the encoders of this model") from None
        return Conditioning(text, condition, control, scale, clean)

    def prepare_text(
        self, rows: Sequence[Tensor], cache_text_kv: bool = True, image: Tensor | None = None
    ) -> Conditioning:
        """``rows``: one [length, text_dim] for each sample. Zero rows fill up to ``text_len`` *after* the text encoder
        and *before* the embedding, and all of them are attended: that is what Wan was trained with.

        ``image``: CLIP features [B, n, image_dim]; None attends to the text alone. Raises ValueError."""
        widths = {r.shape[-1] for r in rows}
        if widths != {self.config.text_dim}:
            raise ValueError(f"text rows of width {widths} were given; the transformer takes {self.config.text_dim}")
        longest = max(len(r) for r in rows)
        if longest > self.config.text_len:
            raise ValueError(f"{longest} rows of text were given; the transformer takes {self.config.text_len}")
        padded = torch.stack([F.pad(r, (0, 0, 0, self.config.text_len - len(r))) for r in rows])
        padded = padded.to(self.device, self.policy.compute)
        text = Text(self.text_embedding(padded), None, self._image(image, len(rows)))
        if not cache_text_kv:
            return Conditioning(text)
        known: dict[tuple[int, bool, str], tuple[Tensor, Tensor]] = {}
        for module in self.modules():
            if isinstance(module, CrossAttention):
                known |= module.all_keys_values(text)
        return Conditioning(replace(text, keys_values=known))

    def _image(self, image: Tensor | None, count: int) -> Tensor | None:
        if image is None:
            return None
        width, tokens = self.config.image_dim, self.config.image_tokens
        if width is None:
            raise ValueError("image features were given; this transformer has no image branch")
        if image.shape != (count, tokens or image.shape[1], width):
            wanted = [count, tokens or "any number", width]
            raise ValueError(f"image features of shape {list(image.shape)} were given; the transformer takes {wanted}")
        return self.img_emb(image.to(self.device), self.policy)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        *,
        run_blocks: RunBlocks = run_in_order,
        attend: Attend = sdpa,
        step: Step | None = None,
    ) -> Tensor:
        policy = self.policy
        timestep, latents = conditioning.timesteps(timestep, latents), conditioning.latents(latents)
        grid = self._grid(latents)
        x = patchify(latents.to(policy.compute), self.patch_embedding)
        time, modulation = self._time(timestep, grid, latents.device)
        rope = Rope(grid, self.config.head_dim, latents.device, policy.norm_dtype)
        control = self._control(conditioning, latents)
        tokens = {"video": slice(0, x.shape[1])}
        ctx = BlockContext(modulation, rope, conditioning.text, attend, grid, policy, step, control, tokens)
        x = run_blocks(self.blocks if control is None else self._controlled(), x, ctx)
        return self._unpatchify(self.head(x, time, policy), grid)

    def _control(self, conditioning: Conditioning, latents: Tensor) -> Control | None:
        """The control branch at its beginning; None for a transformer without one."""
        given, layers = conditioning.control, self.config.vace_layers
        if given is None and not layers:
            return None
        wanted = (len(latents), self.control_channels, *latents.shape[2:])
        if given is None or not layers or given.shape != wanted:
            found = "none was" if given is None else f"one of shape {list(given.shape)} was"
            takes = f"one of shape {list(wanted)}" if layers else "none"
            raise ValueError(f"a control input: {found} given; this transformer takes {takes}")
        scale = conditioning.control_scale
        scales = [float(scale)] * len(layers) if isinstance(scale, int | float) else [float(s) for s in scale]
        if len(scales) != len(layers):
            raise ValueError(f"{len(scales)} control scales were given for {len(layers)} layers with hints")
        embedding = self.vace_patch_embedding
        return Control(patchify(given.to(embedding.weight.device, self.policy.compute), embedding), scales)

    def _controlled(self) -> list[nn.Module]:
        """The blocks, those that take a hint paired with their control block."""
        blocks: list[nn.Module] = [*self.blocks]
        for layer, control in zip(self.config.vace_layers, self.vace_blocks, strict=True):
            blocks[layer] = control.beside(blocks[layer])  # type: ignore[operator]
        return blocks

    def _grid(self, latents: Tensor) -> tuple[int, int, int]:
        size, patch = latents.shape[2:], self.config.patch_size
        if latents.shape[1] != self.config.in_dim or any(s % p for s, p in zip(size, patch, strict=True)):
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} were given; the transformer takes {self.config.in_dim} "
                f"channels and sizes (frames, height, width) that {patch} divides"
            )
        return size[0] // patch[0], size[1] // patch[1], size[2] // patch[2]

    def _time(
        self, timestep: Tensor, grid: tuple[int, int, int], device: torch.device
    ) -> tuple[Modulation, Modulation]:
        """[B], [B, F] or [B, L]: a timestep for all, for each frame, for each token -> the modulations of the head and
        of the blocks, on ``device``."""
        policy, token = self.policy, None
        if timestep.dim() == 2:
            frames, tokens = grid[0], grid[0] * grid[1] * grid[2]
            if timestep.shape[1] not in (frames, tokens):
                raise ValueError(f"{timestep.shape[1]} timesteps were given for {frames} frames of {tokens} tokens")
            timestep, token = timestep.unique(return_inverse=True)
            token = token.repeat_interleave(tokens // token.shape[1], dim=1).to(device)
        sinusoid = timestep_embedding(timestep, self.config.freq_dim, policy.sinusoid).to(policy.norm_dtype).to(device)
        time = self.time_embedding(sinusoid).to(policy.projection)
        blocks = self.time_projection(time).unflatten(-1, (6, -1))
        return Modulation(time.unsqueeze(1), token), Modulation(blocks, token)

    def _unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, L, patch * C], channel fastest -> [B, C, F, h, w]."""
        x = x.unflatten(-1, (*self.config.patch_size, -1)).unflatten(1, grid)
        b, f, h, w, p, q, r, c = x.shape
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(b, c, f * p, h * q, w * r)
