"""The video VAEs of Wan 2.1 (8x8 in space) and of Wan 2.2 TI2V-5B (16x16), 4x in time: pixels <-> latents.

The 2.2 network has the blocks of 2.1 in stages, with two more ideas: pixels come in 2x2 patches as channels, and each
stage adds a shortcut without weights that averages or repeats what the stage was given. A clip goes through in chunks
of any length, equal to the whole at once; the memory between chunks is a dict that the caller may hold.
Parameter names are those of the official checkpoints (``encoder.downsamples.0.residual.2.weight``, ...; in 2.2
``encoder.downsamples.1.downsamples.0.residual.2.weight``). Blocks are in vae_layers.py.
Leaves out: tiling, and everything about files.
Source: Wan2.1 ``wan/modules/vae.py`` and Wan2.2 ``wan/modules/vae2_2.py`` (structure and constants), compared with
diffusers ``AutoencoderKLWan``."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from ditkit.checkpoints.kinds.wan_vae import WAN21_MEAN, WAN21_STD, WAN22_MEAN, WAN22_STD
from ditkit.models.vae_layers import CausalConv3d, Chain, Double, FeatureCache, Halve, VideoVAE, head, middle, residuals
from ditkit.nn.convolution import after_zeros


@dataclass(frozen=True)
class WanVAEConfig:
    """Sizes of a Wan 2.1 VAE; the defaults are the official ones (126,892,531 parameters)."""

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = WAN21_MEAN
    latents_std: tuple[float, ...] = WAN21_STD

    shortcuts: ClassVar[bool] = False

    @property
    def dec_dim(self) -> int:
        return self.dim

    @property
    def patch_size(self) -> int:
        return 1

    @property
    def spatial_stride(self) -> int:
        return self.patch_size * 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_stride(self) -> int:
        return 2 ** sum(self.temporal_downsample)


@dataclass(frozen=True)
class WanVAE22Config(WanVAEConfig):
    """Sizes of a Wan 2.2 VAE; the defaults are the official ones (704,688,668 parameters).

    ``dim`` is the encoder's width, ``dec_dim`` the decoder's; the decoder uses the other tuples from the end."""

    dim: int = 160
    z_dim: int = 48
    latents_mean: tuple[float, ...] = WAN22_MEAN
    latents_std: tuple[float, ...] = WAN22_STD
    dec_dim: int = 256
    patch_size: int = 2

    shortcuts: ClassVar[bool] = True


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
    x = after_zeros(x, -x.shape[2] % frames)
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
    """A level of the 2.2 encoder, plus its averaged input."""

    def __init__(self, level: list[nn.Module], in_dim: int, out_dim: int, time: bool | None):
        super().__init__()
        self.out_dim, self.frames, self.pixels = out_dim, 2 if time else 1, 1 if time is None else 2
        if in_dim * self.frames * self.pixels**2 % out_dim:
            raise ValueError(f"{in_dim} channels cannot be averaged to {out_dim} in a shortcut")
        self.downsamples = Chain(*level)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        return self.downsamples(x, cache) + average_down(x, self.out_dim, self.frames, self.pixels)


class UpStage(nn.Module):
    """A level of the 2.2 decoder, plus its repeated input; the last level has none."""

    def __init__(self, level: list[nn.Module], in_dim: int, out_dim: int, time: bool | None):
        super().__init__()
        self.out_dim, self.frames = out_dim, 2 if time else 1
        if time is not None and out_dim * self.frames * 4 % in_dim:
            raise ValueError(f"{in_dim} channels cannot be repeated to {out_dim} in a shortcut")
        self.upsamples = Chain(*level)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        last = self.upsamples[-1]
        if not isinstance(last, Double):
            return self.upsamples(x, cache)
        begins = last.time_conv is not None and last.time_conv not in cache
        y = self.upsamples(x, cache)
        shortcut = repeat_up(x, self.out_dim, self.frames, 2)
        return y + (shortcut[:, :, 1:] if begins else shortcut)  # the first frame of a stream stays single


def encoder(config: WanVAEConfig) -> Chain:
    dims, layers = [config.dim * m for m in (1, *config.dim_mult)], list[nn.Module]()
    first = CausalConv3d(3 * config.patch_size**2, dims[0], (3, 3, 3))
    for (dim, out_dim), time in zip(pairwise(dims), (*config.temporal_downsample, None), strict=True):
        level = residuals(dim, out_dim, config.num_res_blocks)
        level += [] if time is None else [Halve(out_dim, time)]  # the last level halves nothing
        layers += [DownStage(level, dim, out_dim, time)] if config.shortcuts else level
    last = {"middle": middle(dims[-1]), "head": head(dims[-1], config.z_dim * 2)}
    return Chain(OrderedDict(conv1=first, downsamples=Chain(*layers), **last))


def decoder(config: WanVAEConfig) -> Chain:
    """Without shortcuts a doubling halves the channels too."""
    dims, layers = [config.dec_dim * m for m in config.dim_mult[::-1]], list[nn.Module]()
    first = {"conv1": CausalConv3d(config.z_dim, dims[0], (3, 3, 3)), "middle": middle(dims[0])}
    dim = dims[0]
    for out_dim, time in zip(dims, (*config.temporal_downsample[::-1], None), strict=True):
        next_dim = out_dim if config.shortcuts else out_dim // 2
        level = residuals(dim, out_dim, config.num_res_blocks + 1)
        level += [] if time is None else [Double(out_dim, next_dim, time)]
        layers += [UpStage(level, dim, out_dim, time)] if config.shortcuts else level
        dim = next_dim
    return Chain(OrderedDict(**first, upsamples=Chain(*layers), head=head(dims[-1], 3 * config.patch_size**2)))


class WanVAE(VideoVAE):
    """Pixels are [B, 3, T, H, W] in [-1, 1]; latents [B, z, 1 + (T - 1) / 4, h, w],
    normalised channel by channel with ``latents_mean`` and ``latents_std`` as the transformer wants them.

    Raises ValueError for widths that the shortcuts of 2.2 cannot bridge."""

    def __init__(self, config: WanVAEConfig | None = None):
        super().__init__()
        self.config = config = config or WanVAEConfig()
        self.encoder, inverse = encoder(config), decoder(config)  # the order in which random weights are drawn
        self.conv1 = CausalConv3d(config.z_dim * 2, config.z_dim * 2, (1, 1, 1))
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = inverse

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.tensor((self.config.latents_mean, self.config.latents_std), dtype=like.dtype, device=like.device)
        mean, std = both.view(2, 1, -1, 1, 1, 1)
        return mean, std

    def moments(self, video: Tensor, cache: FeatureCache | None = None) -> tuple[Tensor, Tensor]:
        """Posterior mean and log-variance of one chunk, not normalised, each [B, z, F, h, w]."""
        cache = {} if cache is None else cache
        x = patchify(video, self.config.patch_size).contiguous(memory_format=torch.channels_last_3d)
        mean, log_variance = self.conv1(self.encoder(x, cache), cache).chunk(2, dim=1)
        return mean, log_variance

    def encode(self, video: Tensor, frames_per_chunk: int = 4) -> Tensor:
        """``video`` [B, 3, T, H, W] in [-1, 1], T = 1 + 4k -> normalised posterior mean [B, z, 1 + k, h, w].

        Works chunk by chunk (frame 0 alone, then ``frames_per_chunk`` pixel frames at a time), so memory does not
        grow with T. Raises ValueError for a T or a size that the strides do not divide."""
        self.check_video(video, frames_per_chunk, first_alone=True)
        cache: FeatureCache = {}
        starts = [0, *range(1, video.shape[2], frames_per_chunk), video.shape[2]]
        latents = torch.cat([self.moments(video[:, :, a:b], cache)[0] for a, b in pairwise(starts)], 2)
        mean, std = self._statistics(latents)
        return (latents - mean) * (1 / std)

    def decode(self, latents: Tensor, frames_per_chunk: int = 1, cache: FeatureCache | None = None) -> Iterator[Tensor]:
        """Normalised ``latents`` [B, z, F, h, w] -> chunks [B, 3, t, H, W] in [-1, 1] as they are ready.

        The first latent frame gives 1 pixel frame, every other one 4. ``frames_per_chunk`` counts latent frames;
        a large number does all at once (faster, more memory, equal result). Pass a ``cache`` to go on with a stream:
        the bits are those of one call with pieces of that size. Raises ValueError, when first asked for a chunk."""
        pieces = self.pieces(latents, frames_per_chunk)
        cache = {} if cache is None else cache
        mean, std = self._statistics(latents)
        for piece in pieces:
            x = self.conv2(piece / (1 / std) + mean, cache).contiguous(memory_format=torch.channels_last_3d)
            yield unpatchify(self.decoder(x, cache), self.config.patch_size).clamp(-1, 1)


class WanVAE22(WanVAE):
    def __init__(self, config: WanVAE22Config | None = None):
        super().__init__(config or WanVAE22Config())
