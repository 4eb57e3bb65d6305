"""The video VAE of Wan 2.1: pixels <-> latents, 8x8 in space and 4x in time.

Blocks are in vae_layers.py, chunks and normalisation in causal_vae.py; here is how the blocks are joined.
Parameter names are those of the official checkpoint (``encoder.downsamples.0.residual.2.weight``, ...).
Leaves out: tiling, the 2.2 VAE (wan_vae22.py), and everything about files.
Source: Wan2.1 ``wan/modules/vae.py`` (structure and constants), compared with diffusers ``AutoencoderKLWan``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from ditkit.checkpoints.kinds.wan_vae import WAN21_MEAN as LATENTS_MEAN
from ditkit.checkpoints.kinds.wan_vae import WAN21_STD as LATENTS_STD
from ditkit.models.causal_vae import CausalVAE
from ditkit.models.vae_layers import CausalConv3d, Downsample, FeatureCache, ResidualBlock, Upsample, head, middle


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
                layers.append(Upsample(dim, dim // 2, temporal[level]))
                dim //= 2
        self.upsamples = nn.Sequential(*layers)
        self.head = head(dim, 3)

    def forward(self, x: Tensor, cache: FeatureCache | None) -> Tensor:
        x = self.conv1(x, cache)
        for block in (*self.middle, *self.upsamples):
            x = block(x, cache)
        return self.head[2](self.head[0](x), cache)


class WanVAE(CausalVAE):
    """Encoder and decoder. Pixels are [B, 3, T, H, W] in [-1, 1]; latents [B, z, 1 + (T - 1) / 4, H / 8, W / 8],
    normalised channel by channel with ``latents_mean`` and ``latents_std`` as the transformer wants them."""

    config: WanVAEConfig

    def __init__(self, config: WanVAEConfig | None = None):
        config = config or WanVAEConfig()
        super().__init__(config, Encoder(config), Decoder(config))
