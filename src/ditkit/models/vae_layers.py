"""What the video VAEs of Wan 2.1 and 2.2 are made of: causal convolutions, residual blocks, halving and doubling.

A network of these is causal in time: no output frame looks at a later one. So it can work on a whole clip or on pieces
of any length, and the only thing that has to be carried from piece to piece is a few past frames in front of each
temporal convolution. Here that memory is an ordinary dict that the caller holds (``FeatureCache``), never an
attribute of a module: two threads can share one network. Every layer is called with its input and that dict.

Parameter names are those of the official checkpoints (``residual.2.weight``, ...). Leaves out: how the blocks are
joined, chunks and normalisation (wan_vae.py).
Source: Wan2.1 ``wan/modules/vae.py``, Wan2.2 ``wan/modules/vae2_2.py``, compared with diffusers ``AutoencoderKLWan``.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.nn.attention import attention
from ditkit.nn.convolution import after_zeros, convolution
from ditkit.nn.layers import Loaded

FeatureCache = dict[nn.Module, Tensor]
"""The past frames of each temporal layer. Start a stream with ``{}`` and hand the same dict to every chunk."""


class Chain(nn.Sequential):
    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, cache)
        return x


class RMSNorm(nn.Module):
    """Unit L2 norm over channels, times sqrt(C) and a gain, then SiLU if ``silu``. ``x``: [N, C, ...].

    Large frames are bound by memory, so without gradients the later steps work in place on the first one's result."""

    def __init__(self, dim: int, axes: int, silu: bool = False):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * axes))
        self.scale, self.silu = dim**0.5, silu

    def forward(self, x: Tensor, cache: FeatureCache | None = None) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-12)
        y = x * (self.scale / norm)
        in_place = not torch.is_grad_enabled()
        y = y.mul_(self.gamma) if in_place else y * self.gamma
        return F.silu(y, inplace=in_place) if self.silu else y


class CausalConv3d(nn.Conv3d):
    """A convolution whose time padding is all in the past: zeros at the start of a stream, cached frames later.
    ``every``: the stride in time."""

    def __init__(self, in_dim: int, out_dim: int, kernel: tuple[int, int, int], every: int = 1):
        self.margins = (0, kernel[1] // 2, kernel[2] // 2)
        super().__init__(in_dim, out_dim, kernel, (every, 1, 1), self.margins)
        self.past = kernel[0] - every

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:  # type: ignore[override]
        """``x`` [B, C, T, H, W] -> [B, C', T, H', W'] (T / 2 for every second, given one past frame)."""
        if self.past:
            past = cache.get(self, x[:, :, :0])
            known = torch.cat((past, x), 2) if past.shape[2] else x
            cache[self] = known[:, :, -self.past :].clone()  # a view would keep the whole chunk alive
            missing = self.past - past.shape[2]
            if missing == self.past and x.shape[2] == 1 and self.stride[0] == 1:
                # The first frame sees nothing but zeros behind it: only the last tap of the kernel counts.
                y = convolution(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], self.margins[1:])
                return y.unsqueeze(2)
            x = after_zeros(known, missing)
        return convolution(x, self.weight, self.bias, self.stride, self.margins)


def on_frames(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``x`` [B, C, T, H, W] through a layer that takes frames as samples; no copies when x is channels-last."""
    b, c, t, h, w = x.shape
    return layer(x.transpose(1, 2).reshape(b * t, c, h, w)).unflatten(0, (b, -1)).transpose(1, 2)


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        layers = {  # numbers as in the checkpoint; between them are SiLUs and a dropout of 0
            "0": RMSNorm(in_dim, 3, silu=True),
            "2": CausalConv3d(in_dim, out_dim, (3, 3, 3)),
            "3": RMSNorm(out_dim, 3, silu=True),
            "6": CausalConv3d(out_dim, out_dim, (3, 3, 3)),
        }
        self.residual = Chain(OrderedDict(layers))
        self.shortcut = CausalConv3d(in_dim, out_dim, (1, 1, 1)) if in_dim != out_dim else Chain()

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        return self.residual(x, cache) + self.shortcut(x, cache)


class AttentionBlock(nn.Module):
    """One head over the pixels of each frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        return x + on_frames(self._attended, x)

    def _attended(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        return self.proj(attention(q, k, v).squeeze(1).transpose(1, 2).reshape(x.shape))


class Halve(nn.Module):
    """Halve height and width, and with ``temporal`` also the frames after the first (T -> 1 + (T - 1) / 2)."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), 2) if temporal else None

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        x = on_frames(self.resample, x)
        if self.time_conv is None:
            return x
        if self.time_conv in cache:
            return self.time_conv(x, cache)
        # The first frame of a stream passes alone; the convolution starts with it as its past.
        first, rest = x[:, :, :1], x[:, :, 1:]
        cache[self.time_conv] = first.clone()
        return torch.cat((first, self.time_conv(rest, cache)), 2) if rest.shape[2] else first


class Double(nn.Module):
    """Double height and width, and with ``temporal`` also the frames after the first (T -> 1 + 2 (T - 1))."""

    def __init__(self, dim: int, out_dim: int, temporal: bool):
        super().__init__()
        nearest = nn.Upsample(scale_factor=2.0, mode="nearest-exact")
        self.resample = nn.Sequential(nearest, nn.Conv2d(dim, out_dim, 3, padding=1))
        self.time_conv = CausalConv3d(dim, dim * 2, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        if self.time_conv is not None:
            x = _frames_doubled(self.time_conv, x, cache)
        return on_frames(self.resample, x)


def _frames_doubled(time_conv: CausalConv3d, x: Tensor, cache: FeatureCache) -> Tensor:
    first, rest = x[:, :, :0], x
    if time_conv not in cache:  # the first frame stays single, and the convolution never sees it
        first, rest = x[:, :, :1], x[:, :, 1:]
        cache[time_conv] = first[:, :, :0]
    if rest.shape[2] == 0:
        return first
    even, odd = time_conv(rest, cache).chunk(2, dim=1)
    doubled = torch.stack((even, odd), 3).flatten(2, 3)
    return torch.cat((first, doubled), 2) if first.shape[2] else doubled


def middle(dim: int) -> Chain:
    return Chain(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))


def head(dim: int, out_dim: int) -> Chain:
    layers = {"0": RMSNorm(dim, 3, silu=True), "2": CausalConv3d(dim, out_dim, (3, 3, 3))}
    return Chain(OrderedDict(layers))


def residuals(in_dim: int, out_dim: int, count: int) -> list[nn.Module]:
    """Blocks, the first of which changes the width."""
    return [ResidualBlock(out_dim if i else in_dim, out_dim) for i in range(count)]


class VideoVAE(Loaded):
    """Satisfies ``contracts.VAE``. ``config`` has ``z_dim``, ``spatial_stride`` and ``temporal_stride``: the pixels and
    frames of one latent."""

    config: Any

    def check_video(self, video: Tensor, frames_per_chunk: int, first_alone: bool) -> None:
        """That ``video`` [B, 3, T, H, W] can be encoded. Where the first frame makes a latent alone, T is 1 more than
        a multiple of the stride. Raises ValueError."""
        stride, step = self.config.spatial_stride, self.config.temporal_stride
        _, channels, t, height, width = video.shape
        counted = t % step == 1 % step if first_alone else t > 0
        if channels != 3 or not counted or any(not side or side % stride for side in (height, width)):
            rule = f"the frame count must be {step}n + 1, the sides" if first_alone else "the sides must be"
            raise ValueError(
                f"cannot encode a video of {t} frames, {width}x{height}, {channels} channels: "
                f"{rule} multiples of {stride}, the channels 3"
            )
        if frames_per_chunk < 1 or frames_per_chunk % step:
            raise ValueError(f"frames_per_chunk is {frames_per_chunk}; it must be a multiple of {step}")

    def pieces(self, latents: Tensor, frames_per_chunk: int) -> tuple[Tensor, ...]:
        """``latents`` [B, z, F, h, w] in pieces of so many frames. Raises ValueError where they cannot be decoded."""
        z_dim = self.config.z_dim
        if latents.shape[1] != z_dim or 0 in latents.shape:
            raise ValueError(f"cannot decode latents of {list(latents.shape)}; they have {z_dim} channels")
        if frames_per_chunk < 1:
            raise ValueError(f"frames_per_chunk is {frames_per_chunk}; it must be at least 1")
        return latents.split(frames_per_chunk, dim=2)
