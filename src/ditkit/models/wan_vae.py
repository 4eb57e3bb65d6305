"""The video VAE of Wan 2.1: pixels <-> latents, 8x8 in space and 4x in time.

The network is causal in time: no output frame looks at a later one. So it can work on a whole clip or on pieces of
any length, and the only thing that has to be carried from piece to piece is a few past frames in front of each
temporal convolution. Here that memory is an ordinary dict that the caller holds (``FeatureCache``), never an
attribute of a module: two threads can share one network.

Parameter names are those of the official checkpoint (``encoder.downsamples.0.residual.2.weight``, ...).
Leaves out: tiling, the 2.2 VAE, and everything about files.
Source: Wan2.1 ``wan/modules/vae.py`` (structure and constants), compared with diffusers ``AutoencoderKLWan``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.nn.convolution import convolution

# Per-channel statistics of the official 16-channel latents (Wan2.1 ``wan/modules/vae.py``).
LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

FeatureCache = dict[nn.Module, Tensor]
"""The past frames of each temporal layer. Start a stream with ``{}`` and hand the same dict to every chunk."""


@dataclass(frozen=True)
class WanVAEConfig:
    """Sizes of a Wan 2.1 VAE; the defaults are the official ones (126,892,531 parameters)."""

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = LATENTS_MEAN
    latents_std: tuple[float, ...] = LATENTS_STD

    @property
    def spatial_stride(self) -> int:
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_stride(self) -> int:
        return 2 ** sum(self.temporal_downsample)


class RMSNorm(nn.Module):
    """Unit L2 norm over channels, times sqrt(C) and a gain, then SiLU if ``silu``. ``x``: [N, C, ...].

    Large frames are bound by memory, so without gradients the later steps work in place on the first one's result."""

    def __init__(self, dim: int, axes: int, silu: bool = False):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * axes))
        self.scale, self.silu = dim**0.5, silu

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-12)
        y = x * (self.scale / norm)
        in_place = not torch.is_grad_enabled()
        y = y.mul_(self.gamma) if in_place else y * self.gamma
        return F.silu(y, inplace=in_place) if self.silu else y


class CausalConv3d(nn.Conv3d):
    """A convolution whose time padding is all in the past: zeros at the start of a stream, cached frames later."""

    def __init__(
        self, in_dim: int, out_dim: int, kernel: tuple[int, int, int], stride: tuple[int, int, int] = (1, 1, 1)
    ):
        self.margins = (0, kernel[1] // 2, kernel[2] // 2)
        super().__init__(in_dim, out_dim, kernel, stride, self.margins)
        self.past = kernel[0] - stride[0]

    def forward(self, x: Tensor, cache: FeatureCache | None = None) -> Tensor:
        """``x`` [B, C, T, H, W] -> [B, C', T, H', W'] (T / 2 with stride 2, given one past frame)."""
        if self.past:
            past = cache.get(self) if cache is not None else None
            if past is None:
                past = x[:, :, :0]
            known = torch.cat((past, x), 2) if past.shape[2] else x
            if cache is not None:
                cache[self] = known[:, :, -self.past :].clone()  # a view would keep the whole chunk alive
            missing = self.past - past.shape[2]
            if missing == self.past and x.shape[2] == 1 and self.stride[0] == 1:
                # The first frame sees nothing but zeros behind it: only the last tap of the kernel counts.
                y = convolution(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], self.margins[1:])
                return y.unsqueeze(2)
            x = F.pad(known, (0, 0, 0, 0, missing, 0)) if missing else known
        return convolution(x, self.weight, self.bias, self.stride, self.margins)


def frames_as_batch(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B*T, C, H, W]; free of copies when x is channels-last."""
    b, c, t, h, w = x.shape
    return x.transpose(1, 2).reshape(b * t, c, h, w)


def batch_as_frames(x: Tensor, batch: int) -> Tensor:
    """The inverse: [B*T, C, H, W] -> [B, C, T, H, W]."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.residual = nn.Sequential(  # indices as in the checkpoint; 1 and 4 were SiLUs, 5 a dropout of 0
            RMSNorm(in_dim, 3, silu=True),
            nn.Identity(),
            CausalConv3d(in_dim, out_dim, (3, 3, 3)),
            RMSNorm(out_dim, 3, silu=True),
            nn.Identity(),
            nn.Identity(),
            CausalConv3d(out_dim, out_dim, (3, 3, 3)),
        )
        self.shortcut = CausalConv3d(in_dim, out_dim, (1, 1, 1)) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, cache: FeatureCache | None) -> Tensor:
        y = x
        for layer in self.residual:
            y = layer(y, cache) if isinstance(layer, CausalConv3d) else layer(y)
        return y + self.shortcut(x)


class AttentionBlock(nn.Module):
    """One head over the pixels of each frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, cache: FeatureCache | None) -> Tensor:
        b, c, _, h, w = x.shape
        frames = frames_as_batch(x)
        q, k, v = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        o = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(-1, c, h, w)
        return x + batch_as_frames(self.proj(o), b)


class Downsample(nn.Module):
    """Halve height and width, and with ``temporal`` also the frames after the first (T -> 1 + (T - 1) / 2)."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), (2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: FeatureCache | None) -> Tensor:
        x = batch_as_frames(self.resample(frames_as_batch(x)), x.shape[0])
        if self.time_conv is None:
            return x
        cache = {} if cache is None else cache
        if self.time_conv in cache:
            return self.time_conv(x, cache)
        # The first frame of a stream passes alone; the convolution starts with it as its past.
        first, rest = x[:, :, :1], x[:, :, 1:]
        cache[self.time_conv] = first.clone()
        return torch.cat((first, self.time_conv(rest, cache)), 2) if rest.shape[2] else first


class Upsample(nn.Module):
    """Double height and width, and with ``temporal`` also the frames after the first (T -> 1 + 2 (T - 1))."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        # Index 0 is the nearest-neighbour doubling, done in forward.
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(dim, dim // 2, 3, padding=1))
        self.time_conv = CausalConv3d(dim, dim * 2, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: FeatureCache | None) -> Tensor:
        if self.time_conv is not None:
            x = self._double_frames(self.time_conv, x, {} if cache is None else cache)
        y = F.interpolate(frames_as_batch(x), scale_factor=2.0, mode="nearest-exact")
        return batch_as_frames(self.resample(y), x.shape[0])

    @staticmethod
    def _double_frames(time_conv: CausalConv3d, x: Tensor, cache: FeatureCache) -> Tensor:
        first, rest = x[:, :, :0], x
        if time_conv not in cache:  # the first frame stays single, and the convolution never sees it
            first, rest = x[:, :, :1], x[:, :, 1:]
            cache[time_conv] = first[:, :, :0]
        if rest.shape[2] == 0:
            return first
        even, odd = time_conv(rest, cache).chunk(2, dim=1)
        doubled = torch.stack((even, odd), 3).flatten(2, 3)
        return torch.cat((first, doubled), 2) if first.shape[2] else doubled


def middle(dim: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))


def head(dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(RMSNorm(dim, 3, silu=True), nn.Identity(), CausalConv3d(dim, out_dim, (3, 3, 3)))


class Encoder(nn.Module):
    def __init__(self, config: WanVAEConfig):
        super().__init__()
        dims = [config.dim * m for m in (1, *config.dim_mult)]
        self.conv1 = CausalConv3d(3, dims[0], (3, 3, 3))
        layers: list[nn.Module] = []
        for level, (in_dim, out_dim) in enumerate(pairwise(dims)):
            for block in range(config.num_res_blocks):
                layers.append(ResidualBlock(in_dim if block == 0 else out_dim, out_dim))
            if level < len(config.dim_mult) - 1:
                layers.append(Downsample(out_dim, config.temporal_downsample[level]))
        self.downsamples = nn.Sequential(*layers)
        self.middle = middle(dims[-1])
        self.head = head(dims[-1], config.z_dim * 2)

    def forward(self, x: Tensor, cache: FeatureCache | None) -> Tensor:
        x = self.conv1(x, cache)
        for block in (*self.downsamples, *self.middle):
            x = block(x, cache)
        return self.head[2](self.head[0](x), cache)


class Decoder(nn.Module):
    def __init__(self, config: WanVAEConfig):
        super().__init__()
        mult = config.dim_mult[::-1]
        temporal = config.temporal_downsample[::-1]
        dim = config.dim * mult[0]
        self.conv1 = CausalConv3d(config.z_dim, dim, (3, 3, 3))
        self.middle = middle(dim)
        layers: list[nn.Module] = []
        for level, m in enumerate(mult):
            out_dim = config.dim * m
            for _ in range(config.num_res_blocks + 1):
                layers.append(ResidualBlock(dim, out_dim))
                dim = out_dim
            if level < len(mult) - 1:
                layers.append(Upsample(dim, temporal[level]))
                dim //= 2  # the convolution after the doubling halves the channels
        self.upsamples = nn.Sequential(*layers)
        self.head = head(dim, 3)

    def forward(self, x: Tensor, cache: FeatureCache | None) -> Tensor:
        x = self.conv1(x, cache)
        for block in (*self.middle, *self.upsamples):
            x = block(x, cache)
        return self.head[2](self.head[0](x), cache)


class WanVAE(nn.Module):
    """Encoder and decoder. Pixels are [B, 3, T, H, W] in [-1, 1]; latents [B, z, 1 + (T - 1) / 4, H / 8, W / 8],
    normalised channel by channel with ``latents_mean`` and ``latents_std`` as the transformer wants them."""

    def __init__(self, config: WanVAEConfig | None = None):
        super().__init__()
        self.config = config = config or WanVAEConfig()
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(config.z_dim * 2, config.z_dim * 2, (1, 1, 1))
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config)
        self.identify: Callable[[], str] = lambda: "not loaded from files"

    @property
    def fingerprint(self) -> str:
        """Stands for the weights and their dtype; whoever loads the module sets ``identify``."""
        return self.identify()

    @property
    def device(self) -> torch.device:
        return self.conv2.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.conv2.weight.dtype

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, -1, 1, 1, 1)
        mean = torch.tensor(self.config.latents_mean, dtype=like.dtype, device=like.device).view(shape)
        std = torch.tensor(self.config.latents_std, dtype=like.dtype, device=like.device).view(shape)
        return mean, std

    def moments(self, video: Tensor, cache: FeatureCache | None = None) -> tuple[Tensor, Tensor]:
        """Posterior mean and log-variance of one chunk, not normalised, each [B, z, F, h, w]."""
        video = video.contiguous(memory_format=torch.channels_last_3d)
        mean, log_variance = self.conv1(self.encoder(video, cache)).chunk(2, dim=1)
        return mean, log_variance

    def encode(self, video: Tensor, frames_per_chunk: int = 4) -> Tensor:
        """``video`` [B, 3, T, H, W] in [-1, 1], T = 1 + 4k -> normalised posterior mean [B, z, 1 + k, H/8, W/8].

        Works chunk by chunk (frame 0 alone, then ``frames_per_chunk`` pixel frames at a time), so memory does not
        grow with T. Raises ValueError for a T or a size that the strides do not divide."""
        t, stride_t, stride = video.shape[2], self.config.temporal_stride, self.config.spatial_stride
        if video.shape[1] != 3 or (t - 1) % stride_t or any(not side or side % stride for side in video.shape[3:]):
            raise ValueError(
                f"cannot encode a video of {t} frames, {video.shape[4]}x{video.shape[3]}, {video.shape[1]} channels: "
                f"the frame count must be {stride_t}n + 1, the sides multiples of {stride}, the channels 3"
            )
        if frames_per_chunk < 1 or frames_per_chunk % stride_t:
            raise ValueError(f"frames_per_chunk is {frames_per_chunk}; it must be a multiple of {stride_t}")
        cache: FeatureCache = {}
        starts = [0, *range(1, t, frames_per_chunk)]
        chunks = [self.moments(video[:, :, a:b], cache)[0] for a, b in zip(starts, [*starts[1:], t], strict=True)]
        latents = torch.cat(chunks, 2)
        mean, std = self._statistics(latents)
        return (latents - mean) * (1 / std)

    def decode(self, latents: Tensor, frames_per_chunk: int = 1, cache: FeatureCache | None = None) -> Iterator[Tensor]:
        """Normalised ``latents`` [B, z, F, h, w] -> chunks [B, 3, t, 8h, 8w] in [-1, 1] as they are ready.

        The first latent frame gives 1 pixel frame, every other one 4. ``frames_per_chunk`` counts latent frames;
        a large number does all at once (faster, more memory, equal result). Pass a ``cache`` to go on with a stream:
        the bits are those of one call with pieces of that size. Raises ValueError, when first asked for a chunk."""
        if latents.shape[1] != self.config.z_dim or 0 in latents.shape:
            raise ValueError(f"cannot decode latents of {list(latents.shape)}; they have {self.config.z_dim} channels")
        if frames_per_chunk < 1:
            raise ValueError(f"frames_per_chunk is {frames_per_chunk}; it must be at least 1")
        cache = {} if cache is None else cache
        mean, std = self._statistics(latents)
        for piece in latents.split(frames_per_chunk, dim=2):
            x = self.conv2(piece / (1 / std) + mean)
            yield self.decoder(x.contiguous(memory_format=torch.channels_last_3d), cache).clamp(-1, 1)
