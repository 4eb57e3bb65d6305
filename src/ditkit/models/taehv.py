"""TAEHV, a tiny VAE for Wan latents: hundreds of times less work than the real one, for previews and drafts.

Frames go through plain 2D convolutions; a block sees, besides its own frame, what it was given at the frame before.
That one frame of memory for each block is in a dict that the caller holds, so latents can come one by one.
Frames are [B, T, C, H, W] inside, pixels in [0, 1]; ``encode`` and ``decode`` speak as the other VAEs do
([B, 3, T, H, W] in [-1, 1], normalised latents). Parameter names are those of the official files.
Leaves out: everything about which file is which. Source: madebyollin/taehv ``taehv.py`` (structure, both variants)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.checkpoints.load import Device, identify_weights, load_into
from ditkit.checkpoints.views.source import Facts, Inspect, TensorSource, View
from ditkit.contracts import Swap
from ditkit.models.vae_layers import FeatureCache, VideoVAE

VARIANTS = ("base", "super")
BLOCKS = 3  # in each level, in both variants


@dataclass(frozen=True)
class TAEHVConfig:
    """Sizes; the defaults are ``taew2_1`` (11,315,539 parameters).

    ``taew2_2``: z_dim 48, patch_size 2. ``taew2_2_super``: also variant "super", decoder_widths (512, 256, 128, 64).
    ``temporal_downsample`` and ``temporal_upsample`` tell which levels halve or double the frames."""

    z_dim: int = 16
    patch_size: int = 1
    variant: str = "base"
    encoder_width: int = 64
    decoder_widths: tuple[int, ...] = (256, 128, 64, 64)
    temporal_downsample: tuple[bool, ...] = (True, True, False)
    temporal_upsample: tuple[bool, ...] = (False, True, True)

    def __post_init__(self) -> None:
        levels = {len(self.temporal_downsample), len(self.temporal_upsample), len(self.decoder_widths) - 1}
        if self.variant not in VARIANTS or len(levels) > 1:
            raise ValueError(f"no TAEHV has this shape: {self}; variants are {', '.join(VARIANTS)}")

    @property
    def spatial_stride(self) -> int:
        return self.patch_size * 2 ** len(self.temporal_downsample)

    @property
    def temporal_stride(self) -> int:
        """Frames that one latent frame is made of."""
        return 2 ** sum(self.temporal_downsample)

    @property
    def frames_of_a_latent(self) -> int:
        """Frames that the decoder makes of one latent frame; of the first, all but the last are dropped."""
        return 2 ** sum(self.temporal_upsample)


def conv(in_dim: int, out_dim: int, bias: bool = True, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_dim, out_dim, 3, stride, 1, bias=bias)


class SoftClamp(nn.Module):
    """Keeps latents within -3 and 3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemBlock(nn.Module):
    """A frame, and what its convolutions make of it and of the one before it (zeros before the first). ``wide``: those
    of the "super" variant, a depthwise 7x7 and two pointwise layers."""

    def __init__(self, dim: int, wide: bool = False):
        super().__init__()
        self.wide = wide
        if wide:
            across = nn.Conv2d(2 * dim, 2 * dim, 7, padding=3, groups=2 * dim, bias=False)
            up, back = nn.Conv2d(2 * dim, 4 * dim, 1), nn.Conv2d(4 * dim, dim, 1, bias=False)
            self.conv = nn.Sequential(across, up, nn.ReLU(), back)
        else:
            self.conv = nn.Sequential(conv(2 * dim, dim), nn.ReLU(), conv(dim, dim), nn.ReLU(), conv(dim, dim))

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        past = cache[self] if self in cache else torch.zeros_like(x[:, :1])
        cache[self] = x[:, -1:].clone()  # a view would keep the whole piece alive
        pairs = torch.cat((x, torch.cat((past, x[:, :-1]), 1)), 2).flatten(0, 1)
        y = self.conv(pairs).view_as(x) + x
        return y if self.wide else F.relu(y)


class JoinFrames(nn.Module):
    """``frames`` neighbours become one: [B, T, C, H, W] -> [B, T / frames, C, H, W]."""

    def __init__(self, dim: int, frames: int):
        super().__init__()
        self.frames = frames
        self.conv = nn.Conv2d(dim * frames, dim, 1, bias=False)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        return self.conv(x.unflatten(1, (-1, self.frames)).flatten(2, 3).flatten(0, 1)).unflatten(0, (len(x), -1))


class GrowFrames(nn.Module):
    """One frame becomes ``frames``: [B, T, C, H, W] -> [B, T * frames, C, H, W]."""

    def __init__(self, dim: int, frames: int):
        super().__init__()
        self.frames = frames
        self.conv = nn.Conv2d(dim, dim * frames, 1, bias=False)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        return self.conv(x.flatten(0, 1)).unflatten(1, (self.frames, -1)).unflatten(0, (len(x), -1)).flatten(1, 2)


def encoder(config: TAEHVConfig) -> nn.Sequential:
    dim = config.encoder_width
    layers: list[nn.Module] = [conv(3 * config.patch_size**2, dim), nn.ReLU()]
    for halves in config.temporal_downsample:
        layers += [JoinFrames(dim, 1 + halves), conv(dim, dim, bias=False, stride=2)]
        layers += [MemBlock(dim) for _ in range(BLOCKS)]
    return nn.Sequential(*layers, conv(dim, config.z_dim))


def decoder(config: TAEHVConfig) -> nn.Sequential:
    widths, wide = config.decoder_widths, config.variant == "super"
    layers: list[nn.Module] = [SoftClamp(), conv(config.z_dim, widths[0]), nn.ReLU()]
    if wide:
        layers = [nn.Conv2d(config.z_dim, widths[0], 1, bias=False)]
    for (dim, next_dim), doubles in zip(pairwise(widths), config.temporal_upsample, strict=True):
        layers += [MemBlock(dim, wide) for _ in range(BLOCKS)]
        if wide:
            layers += [conv(dim, 4 * next_dim), nn.ReLU(), nn.PixelShuffle(2), GrowFrames(next_dim, 1 + doubles)]
        else:
            layers += [nn.Upsample(scale_factor=2), GrowFrames(dim, 1 + doubles), conv(dim, next_dim, bias=False)]
    return nn.Sequential(*layers, *([] if wide else [nn.ReLU()]), conv(widths[-1], 3 * config.patch_size**2))


def run(layers: nn.Sequential, x: Tensor, cache: FeatureCache) -> Tensor:
    """``x`` [B, T, C, H, W] through all layers; those that do not look along time take frames as samples."""
    for layer in layers:
        if isinstance(layer, MemBlock | JoinFrames | GrowFrames):
            x = layer(x, cache)
        else:
            x = layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    return x


class LastRows(View):
    """``source`` with no more than ``rows[name]`` rows of each of these tensors, the last ones.

    A file made for a finer rate in time has more rows in its frame-growing layers; the last belong to the last frame
    of each group, which is the one to keep (``patch_tgrow_layers`` in ``taehv.py``)."""

    def __init__(self, source: TensorSource, rows: Mapping[str, int]):
        stored = {name: source.tensors[name].shape[0] for name in rows if name in source.tensors}
        self.rows = {name: rows[name] for name, n in stored.items() if n > rows[name] and n % rows[name] == 0}
        super().__init__(source, tuple(f"{name}: the last {n} of {stored[name]} rows" for name, n in self.rows.items()))
        self.tensors = {
            name: Facts(facts.dtype, (self.rows.get(name, facts.shape[0]), *facts.shape[1:]))
            for name, facts in source.tensors.items()
        }

    def same(self, name: str) -> str | None:
        return None if name in self.rows else name

    def made(self, name: str, dtype: torch.dtype | None, look: Inspect) -> Tensor:
        tensor = self.source[name][-self.rows[name] :].to(dtype, copy=True)
        look(tensor.reshape(-1))
        return tensor


class TAEHV(VideoVAE):
    def __init__(self, config: TAEHVConfig | None = None):
        super().__init__()
        self.config = config = config or TAEHVConfig()
        self.encoder = encoder(config)
        self.decoder = decoder(config)

    @classmethod
    def load(
        cls,
        config: TAEHVConfig,
        source: TensorSource,
        dtype: torch.dtype = torch.float32,
        device: Device = "cpu",
        device_of: Callable[[str], Device] | None = None,
        swaps: Sequence[Swap] = (),
    ) -> Self:
        """``source`` has the official names. Strict but for the rows that ``LastRows`` leaves out. Raises LoadError."""
        with torch.device("meta"):
            module = cls(config).eval().requires_grad_(False)
        growing = {name: part for name, part in module.named_modules() if isinstance(part, GrowFrames)}
        rows = {f"{name}.conv.weight": part.conv.out_channels for name, part in growing.items()}
        source, where = LastRows(source, rows), device_of or device
        load_into(module, source, dtype_of=lambda name: dtype, device_of=where, swaps=swaps, check_finite=True)
        module.loaded(device, dtype)
        module.identify = identify_weights(source, dtype, config, swaps)
        return module

    def encode(self, video: Tensor, frames_per_chunk: int = 4) -> Tensor:
        """``video`` [B, 3, T, H, W] in [-1, 1] -> normalised latents [B, z, ceil(T / 4), h, w].

        The last frame is repeated until the count is a multiple of the stride, as officially. Works piece by piece.
        Raises ValueError for a size that the stride does not divide."""
        self.check_video(video, frames_per_chunk, first_alone=False)
        frames, cache = video.transpose(1, 2), FeatureCache()
        missing = -frames.shape[1] % self.config.temporal_stride
        frames = torch.cat((frames, frames[:, -1:].expand(-1, missing, -1, -1, -1)), 1)
        pixels = (F.pixel_unshuffle(x * 0.5 + 0.5, self.config.patch_size) for x in frames.split(frames_per_chunk, 1))
        return torch.cat([run(self.encoder, x, cache) for x in pixels], 1).transpose(1, 2)

    def decode(self, latents: Tensor, frames_per_chunk: int = 1, cache: FeatureCache | None = None) -> Iterator[Tensor]:
        """Normalised ``latents`` [B, z, F, h, w] -> chunks [B, 3, t, H, W] in [-1, 1] as they are ready.

        The first latent frame gives 1 pixel frame, every other one 4. ``frames_per_chunk`` counts latent frames.
        Pass a ``cache`` to go on with a stream. Raises ValueError, when first asked for a chunk."""
        pieces = self.pieces(latents, frames_per_chunk)
        cache = {} if cache is None else cache
        for piece in pieces:
            unneeded = 0 if cache else self.config.frames_of_a_latent - 1  # frames before the first of a stream
            frames = run(self.decoder, piece.transpose(1, 2), cache)[:, unneeded:]
            pixels = F.pixel_shuffle(frames, self.config.patch_size).clamp(0, 1)
            yield (pixels * 2 - 1).transpose(1, 2)
