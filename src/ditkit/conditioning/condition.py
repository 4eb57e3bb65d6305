"""The condition of image-to-video: known pictures at their places in an otherwise empty video, and a mask.

Legend: B clips, T pixel frames, F = 1 + (T - 1) / s latent frames at a temporal stride s, C latent channels,
H x W pixels, h x w latents. Leaves out: sizes and resizing (``images.py``), CLIP features.
Sources: Wan2.1 ``wan/image2video.py`` and ``wan/first_last_frame2video.py``; diffusers ``WanImageToVideoPipeline``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ditkit.errors import RequestError

Encode = Callable[[Tensor], Tensor]
"""Pixels [B, 3, T, H, W] in [-1, 1] -> normalised latents [B, C, F, h, w] float32: a VAE's ``encode``."""


def known_frames(frames: int, last: bool, height: int, width: int, stride: int = 4) -> Tensor:
    """The mask [s, F, h, w]: 1 where a pixel frame is given (the first; the last too if ``last``), 0 elsewhere.

    Latent frame 0 stands for one pixel frame, which fills all s channels; every other for s frames, one a channel."""
    mask = torch.zeros(frames)
    mask[0] = 1
    if last:
        mask[-1] = 1
    rows = torch.cat([mask[:1].expand(stride), mask[1:]]).view(-1, stride)
    return rows.T[:, :, None, None].expand(-1, -1, height, width).contiguous()


def image_condition(encode: Encode, first: Tensor, last: Tensor | None, frames: int, stride: int = 4) -> Tensor:
    """``first`` and ``last`` [B, 3, H, W] -> [B, s + C, F, h, w] float32: the mask, then the latents of the video
    first, zeros, last. It stands behind the noisy latents on the channel axis; with and without text it is the same.

    The video is ``frames`` long in float32; the VAE takes it piece by piece. The zeros cannot be cut off early: the
    encoder remembers the first frame for 28 latent ones. Raises RequestError for a count of frames that the VAE does
    not make, or with no room for a last one."""
    if frames < 1 or (frames - 1) % stride or (last is not None and frames == 1):
        raise RequestError(
            f"a video of {frames} frames from {'a first and a last picture' if last is not None else 'a picture'}",
            f"the frames must be {stride}n + 1" + (", more than 1" if last is not None else ""),
            f"Use {max(1, frames // stride) * stride + 1}",
        )
    video = first.new_zeros(*first.shape[:2], frames, *first.shape[2:])
    video[:, :, 0] = first
    if last is not None:
        video[:, :, -1] = last
    latents = encode(video).float()
    expected = (frames - 1) // stride + 1
    assert latents.shape[2] == expected, f"{frames} frames became {latents.shape[2]} latent frames, not {expected}"
    mask = known_frames(frames, last is not None, latents.shape[3], latents.shape[4], stride).to(latents.device)
    return torch.cat([mask.expand(len(latents), -1, -1, -1, -1), latents], dim=1)
