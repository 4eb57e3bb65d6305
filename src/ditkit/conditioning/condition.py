"""What a transformer is conditioned on: for image-to-video known pictures at their places in an otherwise empty video,
and a mask; for VACE what is kept, what is made anew, where, and what shall appear.

Legend: B clips, T pixel frames, F = 1 + (T - 1) / t latent frames, s and t the VAE's strides in space and time,
C latent channels, H x W pixels, h x w latents, N reference pictures. Leaves out: sizes and resizing (``images.py``),
CLIP features, the scale of VACE's hints (the transformer's).
Sources: Wan2.1 ``wan/image2video.py``, ``wan/first_last_frame2video.py``, ``wan/vace.py``; diffusers
``WanImageToVideoPipeline``, ``WanVACEPipeline``."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.errors import RequestError
from ditkit.state import digest

Strides = tuple[int, int, int]
"""Of the VAE: (frames, height, width)."""

Encode = Callable[[Tensor], Tensor]
"""Pixels [B, 3, T, H, W] in [-1, 1] -> normalised latents [B, C, F, h, w] float32: a VAE's ``encode``."""


def known_frames(frames: int, last: bool, height: int, width: int, stride: int = 4) -> Tensor:
    """The mask [t, F, h, w]: 1 where a pixel frame is given (the first; the last too if ``last``), 0 elsewhere.

    Latent frame 0 stands for one pixel frame, which fills all t channels; every other for t frames, one a channel."""
    mask = torch.zeros(frames)
    mask[[0, -1] if last else 0] = 1
    rows = torch.cat([mask[:1].expand(stride), mask[1:]]).view(-1, stride)
    return rows.T[:, :, None, None].expand(-1, -1, height, width).contiguous()


def image_condition(encode: Encode, first: Tensor, last: Tensor | None, frames: int, stride: int = 4) -> Tensor:
    """``first`` and ``last`` [B, 3, H, W] -> [B, t + C, F, h, w] float32: the mask, then the latents of the video
    first, zeros, last. It stands behind the noisy latents on the channel axis; with and without text it is the same.

    The video is ``frames`` long in float32; the VAE takes it piece by piece. The zeros cannot be cut off early: the
    encoder remembers the first frame for 28 latent ones. Raises RequestError for a count of frames that the VAE does
    not make, or with no room for a last one."""
    if frames < 1 or (frames - 1) % stride or (last is not None and frames == 1):
        pictures, more = ("a picture", "") if last is None else ("a first and a last picture", ", more than 1")
        raise RequestError(f"a video of {frames} frames from {pictures}", f"the frames must be {stride}n + 1{more}",
                           f"Use {max(1, frames // stride) * stride + 1}")  # fmt: skip
    video = first.new_zeros(*first.shape[:2], frames, *first.shape[2:])
    video[:, :, 0] = first
    if last is not None:
        video[:, :, -1] = last
    latents = encode(video).float()
    expected = (frames - 1) // stride + 1
    assert latents.shape[2] == expected, f"{frames} frames became {latents.shape[2]} latent frames, not {expected}"
    mask = known_frames(frames, last is not None, latents.shape[3], latents.shape[4], stride).to(latents.device)
    return torch.cat([mask.expand(len(latents), -1, -1, -1, -1), latents], dim=1)


def fold_mask(mask: Tensor, strides: Strides = (4, 8, 8)) -> Tensor:
    """[T, H, W] -> [s * s, F, H/s, W/s]: the pixels under one latent become channels (row by row), and of the T
    frames F are picked, each the nearest to the middle of its share."""
    (count, height, width), (t, rows, columns) = mask.shape, strides
    cells = mask.view(count, height // rows, rows, width // columns, columns).permute(2, 4, 0, 1, 3).flatten(0, 1)
    return F.interpolate(cells[None], size=((count - 1) // t + 1, *cells.shape[2:]), mode="nearest-exact")[0]


def control_context(
    encode: Encode, video: Tensor, mask: Tensor, references: Tensor | None = None, strides: Strides = (4, 8, 8)
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


def per_clip(compute: Callable[..., Tensor], *fields: Tensor | None) -> Tensor:
    """``compute`` on the slices [1, ...] of the ``fields`` [B, ...], clip after clip -> its results [1, ...] joined to
    [B, ...] on the CPU. A field that is None stays None."""
    count = next(len(field) for field in fields if field is not None)
    done: dict[str, Tensor] = {}
    made = []
    for index in range(count):
        one = [None if field is None else field[index : index + 1] for field in fields]
        if (key := digest(*one)) not in done:
            done[key] = compute(*one).cpu()
        made.append(done[key])
    return torch.cat(made)
