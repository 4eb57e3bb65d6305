"""The control input of VACE: what is kept, what is made anew, where, and what shall appear.

Legend: T pixel frames, F latent frames, N reference pictures, C latent channels, s and t the VAE's strides in space
and time. Leaves out: sizes and resizing (``images.py``), the scale of the hints (the transformer's).
Source: Wan2.1 ``wan/vace.py``; diffusers ``WanVACEPipeline``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.conditioning.condition import Encode


def fold_mask(mask: Tensor, strides: tuple[int, int, int] = (4, 8, 8)) -> Tensor:
    """[T, H, W] -> [s * s, F, H/s, W/s]: the pixels under one latent become channels (row by row), and of the T
    frames F are picked, each the nearest to the middle of its share."""
    (count, height, width), (t, rows, columns) = mask.shape, strides
    cells = mask.view(count, height // rows, rows, width // columns, columns).permute(2, 4, 0, 1, 3).flatten(0, 1)
    return F.interpolate(cells[None], size=((count - 1) // t + 1, *cells.shape[2:]), mode="nearest-exact")[0]


def control_context(
    encode: Encode,
    video: Tensor,
    mask: Tensor,
    references: Tensor | None = None,
    strides: tuple[int, int, int] = (4, 8, 8),
) -> Tensor:
    """``video`` [3, T, H, W] in [-1, 1], ``mask`` [1, T, H, W] (1: to be made), ``references`` [N, 3, H, W] ->
    [2C + s * s, N + F, h, w] float32.

    Channels: latents of what is kept, latents of what is to be made, the mask. For the two videos the mask counts from
    above 0.5, in its channels it stays as it is. Each reference is a latent frame of its own in front, in their order,
    with zeros in place of the second latents and of the mask; a run makes N frames more and drops them at the end."""
    new = (mask > 0.5).float()
    latents = torch.cat([encode((video * part)[None])[0].float() for part in (1 - new, new)])
    context = torch.cat([latents, fold_mask(mask[0].float(), strides).to(latents.device)])
    # A copy of its own: a view into the others' memory can move the last bit of a convolution.
    layout = torch.contiguous_format
    pictures = [] if references is None else [x[None, :, None].clone(memory_format=layout) for x in references]
    ahead = [encode(picture)[0].float() for picture in pictures]
    blank = [x.new_zeros(len(context) - len(x), *x.shape[1:]) for x in ahead]
    return torch.cat([*(torch.cat(pair) for pair in zip(ahead, blank, strict=True)), context], dim=1)
