"""Cheap looks at latents: one matrix from latent channels to colours, or frames from any VAE as bytes.

A matrix costs nothing and shows one coarse pixel for each latent one; a small VAE (taehv.py) shows real frames.
Leaves out: when a preview is drawn and where. Torch is imported when there are latents to look at.
Source of the numbers: ComfyUI ``comfy/latent_formats.py``, ``Wan21`` and ``Wan22``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ditkit.media import to_uint8

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ditkit.contracts import VAE

Factors = tuple[Sequence[Sequence[float]], Sequence[float]]
"""Rows of 3 (R G B), one for each latent channel, and 3 numbers to add; the result is about [-1, 1]."""

WAN21 = (
    (-0.1299, -0.1692, 0.2932), (0.0671, 0.0406, 0.0442), (0.3568, 0.2548, 0.1747), (0.0372, 0.2344, 0.1420),
    (0.0313, 0.0189, -0.0328), (0.0296, -0.0956, -0.0665), (-0.3477, -0.4059, -0.2925), (0.0166, 0.1902, 0.1975),
    (-0.0412, 0.0267, -0.1364), (-0.1293, 0.0740, 0.1636), (0.0680, 0.3019, 0.1128), (0.0032, 0.0581, 0.0639),
    (-0.1251, 0.0927, 0.1699), (0.0060, -0.0633, 0.0005), (0.3477, 0.2275, 0.2950), (0.1984, 0.0913, 0.1861),
)  # fmt: skip
WAN22 = (
    (0.0119, 0.0103, 0.0046), (-0.1062, -0.0504, 0.0165), (0.0140, 0.0409, 0.0491), (-0.0813, -0.0677, 0.0607),
    (0.0656, 0.0851, 0.0808), (0.0264, 0.0463, 0.0912), (0.0295, 0.0326, 0.0590), (-0.0244, -0.0270, 0.0025),
    (0.0443, -0.0102, 0.0288), (-0.0465, -0.0090, -0.0205), (0.0359, 0.0236, 0.0082), (-0.0776, 0.0854, 0.1048),
    (0.0564, 0.0264, 0.0561), (0.0006, 0.0594, 0.0418), (-0.0319, -0.0542, -0.0637), (-0.0268, 0.0024, 0.0260),
    (0.0539, 0.0265, 0.0358), (-0.0359, -0.0312, -0.0287), (-0.0285, -0.1032, -0.1237), (0.1041, 0.0537, 0.0622),
    (-0.0086, -0.0374, -0.0051), (0.0390, 0.0670, 0.2863), (0.0069, 0.0144, 0.0082), (0.0006, -0.0167, 0.0079),
    (0.0313, -0.0574, -0.0232), (-0.1454, -0.0902, -0.0481), (0.0714, 0.0827, 0.0447), (-0.0304, -0.0574, -0.0196),
    (0.0401, 0.0384, 0.0204), (-0.0758, -0.0297, -0.0014), (0.0568, 0.1307, 0.1372), (-0.0055, -0.0310, -0.0380),
    (0.0239, -0.0305, 0.0325), (-0.0663, -0.0673, -0.0140), (-0.0416, -0.0047, -0.0023), (0.0166, 0.0112, -0.0093),
    (-0.0211, 0.0011, 0.0331), (0.1833, 0.1466, 0.2250), (-0.0368, 0.0370, 0.0295), (-0.3441, -0.3543, -0.2008),
    (-0.0479, -0.0489, -0.0420), (-0.0660, -0.0153, 0.0800), (-0.0101, 0.0068, 0.0156), (-0.0690, -0.0452, -0.0927),
    (-0.0145, 0.0041, 0.0015), (0.0421, 0.0451, 0.0373), (0.0504, -0.0483, -0.0356), (-0.0837, 0.0168, 0.0055),
)  # fmt: skip
OFFICIAL: dict[int, Factors] = {16: (WAN21, (-0.1835, -0.0868, -0.3360)), 48: (WAN22, (0.0317, -0.0878, -0.1388))}


def factors_for(z_dim: int) -> Factors | None:
    """The official matrix for normalised latents of the Wan 2.1 (16 channels) or 2.2 VAE (48); None for others.

    A model that was not trained on these latents looks wrong through it and should bring its own."""
    return OFFICIAL.get(z_dim)


def rgb_frames(latents: Tensor, factors: Factors) -> np.ndarray:
    """Normalised ``latents`` [B, C, F, h, w] -> uint8 [B, F, h, w, 3], as ``factors`` see them.

    Raises ValueError when they are for another number of channels."""
    import torch

    rows, bias = factors
    if latents.dim() != 5 or latents.shape[1] != len(rows):
        raise ValueError(f"factors for {len(rows)} channels cannot show latents of {list(latents.shape)}")
    latents = latents.detach().float().cpu()
    rgb = torch.einsum("bcfhw,cr->brfhw", latents, torch.tensor(rows)) + torch.tensor(bias).view(3, 1, 1, 1)
    return to_uint8(rgb, "diffusers")


def preview_frames(vae: VAE, latents: Tensor, frames_per_chunk: int = 1, rounding: str = "wan") -> Iterator[np.ndarray]:
    """``latents`` [B, C, F, h, w] -> frames uint8 [B, t, H, W, 3] as any VAE makes them, chunk by chunk, no gradients.

    With a TAEHV this takes milliseconds. Nothing is decoded before the first chunk is asked for."""
    import torch

    chunks = vae.decode(latents.to(vae.device, vae.dtype), frames_per_chunk)
    while True:
        with torch.inference_mode():  # not around the yield, where it would reach into the caller's code
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield to_uint8(chunk, rounding)
