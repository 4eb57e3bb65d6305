"""What the video VAEs of Wan 2.1 and 2.2 have in common around their networks: chunks in time and normalisation.

A clip goes through in chunks of any length, equal to the whole at once; the memory between chunks is a dict that the
caller may hold. Leaves out: the networks (wan_vae.py, wan_vae22.py), tiling, and everything about files.
Source: the wrapper classes in Wan2.1 ``wan/modules/vae.py`` and Wan2.2 ``wan/modules/vae2_2.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from ditkit.models.vae_layers import CausalConv3d, FeatureCache
from ditkit.nn.loaded import Loaded


class Sizes(Protocol):
    """What a config has to say here. ``spatial_stride`` and ``temporal_stride``: pixels and frames of one latent."""

    @property
    def z_dim(self) -> int: ...
    @property
    def spatial_stride(self) -> int: ...
    @property
    def temporal_stride(self) -> int: ...
    @property
    def latents_mean(self) -> tuple[float, ...]: ...
    @property
    def latents_std(self) -> tuple[float, ...]: ...


class CausalVAE(Loaded):
    """Satisfies ``contracts.VAE``. ``encoder``: pixels and a cache -> twice z channels; ``decoder``: the inverse."""

    def __init__(self, config: Sizes, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.conv1 = CausalConv3d(config.z_dim * 2, config.z_dim * 2, (1, 1, 1))
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = decoder

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
        """``video`` [B, 3, T, H, W] in [-1, 1], T = 1 + 4k -> normalised posterior mean [B, z, 1 + k, h, w].

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
        """Normalised ``latents`` [B, z, F, h, w] -> chunks [B, 3, t, H, W] in [-1, 1] as they are ready.

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
