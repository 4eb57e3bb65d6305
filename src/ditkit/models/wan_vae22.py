"""The video VAE of Wan 2.2 TI2V-5B: pixels <-> latents, 16x16 in space and 4x in time.

The 2.1 blocks in stages, with two more ideas: pixels come in 2x2 patchify as channels, and each stage adds a shortcut
without weights that averages or repeats what the stage was given. Parameter names are those of the official
checkpoint (``encoder.downsamples.1.downsamples.0.residual.2.weight``, ...).
Leaves out: tiling, and everything about files.
Source: Wan2.2 ``wan/modules/vae2_2.py`` (structure and constants), compared with diffusers
``AutoencoderKLWan(is_residual=True)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.checkpoints.kinds.wan_vae import WAN22_MEAN, WAN22_STD
from ditkit.models.causal_vae import CausalVAE
from ditkit.models.vae_layers import CausalConv3d, Downsample, FeatureCache, ResidualBlock, Upsample, head, middle


@dataclass(frozen=True)
class WanVAE22Config:
    """Sizes of a Wan 2.2 VAE; the defaults are the official ones (704,688,668 parameters).

    ``dim`` is the encoder's width, ``dec_dim`` the decoder's; the decoder uses the other tuples from the end."""

    dim: int = 160
    dec_dim: int = 256
    z_dim: int = 48
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    patch_size: int = 2
    latents_mean: tuple[float, ...] = WAN22_MEAN
    latents_std: tuple[float, ...] = WAN22_STD

    @property
    def spatial_stride(self) -> int:
        return self.patch_size * 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_stride(self) -> int:
        return 2 ** sum(self.temporal_downsample)


def patchify(x: Tensor, size: int) -> Tensor:
    """[B, c, T, size * H, size * W] -> [B, c * size * size, T, H, W]; channels are ordered (c, column, row)."""
    x = x.unflatten(4, (-1, size)).unflatten(3, (-1, size))  # B, c, T, H, row, W, column
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unpatchify(x: Tensor, size: int) -> Tensor:
    """The inverse of ``patchify``."""
    x = x.unflatten(1, (-1, size, size))  # B, c, column, row, T, H, W
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


def average_down(x: Tensor, out_dim: int, frames: int, pixels: int) -> Tensor:
    """[B, C, T, H, W] -> [B, out_dim, ceil(T / frames), H / pixels, W / pixels].

    Each block of ``frames`` x ``pixels`` x ``pixels`` values becomes channels, ordered (C, frame, row, column), and as
    many neighbouring channels as needed are averaged. An odd first frame gets zeros in front, as a stream begins."""
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % frames, 0))
    x = x.unflatten(4, (-1, pixels)).unflatten(3, (-1, pixels)).unflatten(2, (-1, frames))
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
    return x.unflatten(1, (out_dim, -1)).mean(2)


def repeat_up(x: Tensor, out_dim: int, frames: int, pixels: int) -> Tensor:
    """[B, C, T, H, W] -> [B, out_dim, T * frames, H * pixels, W * pixels].

    Each channel is repeated; the result's channels are ordered (out_dim, frame, row, column) and spread over a
    block of that size."""
    repeats = out_dim * frames * pixels * pixels // x.shape[1]
    x = x.repeat_interleave(repeats, 1).unflatten(1, (out_dim, frames, pixels, pixels))
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)


class DownStage(nn.Module):
    """Residual blocks, then a halving unless it is the last stage; plus the averaged input."""

    def __init__(self, in_dim: int, out_dim: int, blocks: int, halves: bool, temporal: bool):
        super().__init__()
        self.out_dim, self.frames, self.pixels = out_dim, 2 if halves and temporal else 1, 2 if halves else 1
        if in_dim * self.frames * self.pixels**2 % out_dim:
            raise ValueError(f"{in_dim} channels cannot be averaged to {out_dim} in a shortcut")
        layers: list[nn.Module] = [ResidualBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(blocks)]
        if halves:
            layers.append(Downsample(out_dim, temporal))
        self.downsamples = nn.Sequential(*layers)

    def forward(self, x: Tensor, cache: FeatureCache | None) -> Tensor:
        y = x
        for layer in self.downsamples:
            y = layer(y, cache)
        return y + average_down(x, self.out_dim, self.frames, self.pixels)


class UpStage(nn.Module):
    """Residual blocks, then a doubling and the repeated input; the last stage has neither."""

    def __init__(self, in_dim: int, out_dim: int, blocks: int, doubles: bool, temporal: bool):
        super().__init__()
        self.out_dim, self.frames = out_dim, 2 if temporal else 1
        if doubles and out_dim * self.frames * 4 % in_dim:
            raise ValueError(f"{in_dim} channels cannot be repeated to {out_dim} in a shortcut")
        layers: list[nn.Module] = [ResidualBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(blocks)]
        if doubles:
            layers.append(Upsample(out_dim, out_dim, temporal))
        self.upsamples = nn.Sequential(*layers)

    def forward(self, x: Tensor, cache: FeatureCache | None) -> Tensor:
        cache = {} if cache is None else cache
        last = self.upsamples[-1]
        begins = isinstance(last, Upsample) and last.time_conv is not None and last.time_conv not in cache
        y = x
        for layer in self.upsamples:
            y = layer(y, cache)
        if not isinstance(last, Upsample):
            return y
        shortcut = repeat_up(x, self.out_dim, self.frames, 2)
        return y + (shortcut[:, :, 1:] if begins else shortcut)  # the first frame of a stream stays single


class Encoder(nn.Module):
    def __init__(self, config: WanVAE22Config):
        super().__init__()
        self.patch_size = config.patch_size
        dims = [config.dim * m for m in (1, *config.dim_mult)]
        self.conv1 = CausalConv3d(3 * config.patch_size**2, dims[0], (3, 3, 3))
        temporal = (*config.temporal_downsample, False)
        last = len(config.dim_mult) - 1
        self.downsamples = nn.Sequential(*(
            DownStage(in_dim, out_dim, config.num_res_blocks, level < last, temporal[level])
            for level, (in_dim, out_dim) in enumerate(pairwise(dims))
        ))  # fmt: skip
        self.middle = middle(dims[-1])
        self.head = head(dims[-1], config.z_dim * 2)

    def forward(self, x: Tensor, cache: FeatureCache | None) -> Tensor:
        x = patchify(x, self.patch_size).contiguous(memory_format=torch.channels_last_3d)
        x = self.conv1(x, cache)
        for block in (*self.downsamples, *self.middle):
            x = block(x, cache)
        return self.head[2](self.head[0](x), cache)


class Decoder(nn.Module):
    def __init__(self, config: WanVAE22Config):
        super().__init__()
        self.patch_size = config.patch_size
        dims = [config.dec_dim * m for m in (config.dim_mult[-1], *config.dim_mult[::-1])]
        self.conv1 = CausalConv3d(config.z_dim, dims[0], (3, 3, 3))
        self.middle = middle(dims[0])
        temporal = (*config.temporal_downsample[::-1], False)
        last = len(config.dim_mult) - 1
        self.upsamples = nn.Sequential(*(
            UpStage(in_dim, out_dim, config.num_res_blocks + 1, level < last, temporal[level])
            for level, (in_dim, out_dim) in enumerate(pairwise(dims))
        ))  # fmt: skip
        self.head = head(dims[-1], 3 * config.patch_size**2)

    def forward(self, x: Tensor, cache: FeatureCache | None) -> Tensor:
        x = self.conv1(x, cache)
        for block in (*self.middle, *self.upsamples):
            x = block(x, cache)
        return unpatchify(self.head[2](self.head[0](x), cache), self.patch_size)


class WanVAE22(CausalVAE):
    """Encoder and decoder. Pixels are [B, 3, T, H, W] in [-1, 1]; latents [B, z, 1 + (T - 1) / 4, H / 16, W / 16],
    normalised channel by channel with ``latents_mean`` and ``latents_std`` as the transformer wants them.

    Raises ValueError for widths that the shortcuts cannot bridge."""

    config: WanVAE22Config

    def __init__(self, config: WanVAE22Config | None = None):
        config = config or WanVAE22Config()
        super().__init__(config, Encoder(config), Decoder(config))
