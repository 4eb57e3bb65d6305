"""Pictures to pixels of the right size: uint8 in, float32 in [-1, 1] out, on the CPU.

``wan`` and ``diffusers`` differ in filter, in cropping and in the last bit of the scaling; both are here by name.
Legend: B clips, T frames, I x J the picture's rows and columns, H x W the video's.
Leaves out: which size (``sizes.py``), reading files (``media``), the resizing for CLIP (the encoder's own)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit import limits
from ditkit.errors import RequestError


def signed(pixels: Tensor, processing: str = "wan") -> Tensor:
    """uint8 [..., H, W, 3] -> float32 [..., 3, H, W] in [-1, 1]. The two ways differ by a rounding at most."""
    x = pixels.movedim(-1, -3).float() / 255
    return (x - 0.5) / 0.5 if processing == "wan" else 2 * x - 1


def _pil(pixels: Tensor, width: int, height: int) -> Tensor:
    """uint8 [I, J, 3] or [I, J] -> uint8 of ``height`` x ``width``: Lanczos of PIL, which rounds to 8 bits."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(pixels.numpy()))
    return torch.from_numpy(np.array(picture.resize((width, height), Image.Resampling.LANCZOS)))


def _cover(rows: int, columns: int, height: int, width: int) -> tuple[int, int, int, int]:
    """The size that just covers H x W, and where the centre H x W begins in it: (rows, columns, top, left). Raises
    RequestError for a picture that is so narrow that this would be larger than any."""
    scale = max(width / columns, height / rows)
    asked = f"covering {width} x {height} with a picture of {columns} x {rows} pixels"
    rows, columns = round(scale * rows), round(scale * columns)
    if rows * columns > limits.PICTURE:
        raise RequestError(asked, f"it would be resized to {columns} x {rows}", "Cut it to the proportions first")
    return rows, columns, (rows - height) // 2, (columns - width) // 2


def resize_exact(images: Tensor, height: int, width: int, processing: str = "wan") -> Tensor:
    """uint8 [B, I, J, 3] -> float32 [B, 3, H, W], squeezed to the size whatever the proportions.

    ``wan``: bicubic without antialiasing (Wan2.1 ``wan/image2video.py``); values may leave [-1, 1] a little.
    ``diffusers``: Lanczos of PIL (``VideoProcessor.preprocess``)."""
    if processing == "wan":
        return F.interpolate(signed(images), size=(height, width), mode="bicubic", align_corners=False)
    return signed(torch.stack([_pil(image, width, height) for image in images]), processing)


def resize_and_crop(images: Tensor, height: int, width: int) -> Tensor:
    """uint8 [B, I, J, 3] -> float32 [B, 3, H, W]: Lanczos of PIL to the size that covers H x W, then its centre.

    Source: Wan2.2 ``wan/textimage2video.py``, for the first frame of TI2V-5B."""
    rows, columns, top, left = _cover(images.shape[1], images.shape[2], height, width)
    resized = torch.stack([_pil(image, columns, rows) for image in images])
    return signed(resized[:, top : top + height, left : left + width])


def resize_to_fit(images: Tensor, rows: int, columns: int) -> Tensor:
    """The largest centre piece of uint8 [B, I, J, 3] that has the proportions of ``rows`` x ``columns``.

    For a last picture of another shape than the first: what Wan2.1 ``wan/first_last_frame2video.py`` documents. Its
    code mixes width and height up and never resizes, which is not repeated here."""
    scale = max(rows / images.shape[1], columns / images.shape[2])
    height, width = max(1, round(rows / scale)), max(1, round(columns / scale))
    top, left = (images.shape[1] - height) // 2, (images.shape[2] - width) // 2
    return images[:, top : top + height, left : left + width]


def pad_on_white(images: Tensor, height: int, width: int, processing: str = "wan") -> Tensor:
    """uint8 [N, U, V, 3] -> float32 [N, 3, H, W]: as large as fits, its proportions kept, in the middle of white.

    Bilinear without antialiasing. Source: Wan2.1 ``wan/vace.py`` (prepare_source); diffusers' ``WanVACEPipeline``
    first brings the sides down to multiples of 8 by Lanczos."""
    if processing == "diffusers":
        if min(images.shape[1:3]) < 8:
            raise RequestError(f"a reference picture of {images.shape[2]}x{images.shape[1]}",
                               "diffusers brings its sides down to multiples of 8, and one would be 0",
                               "Give a larger picture, or image_processing=wan")  # fmt: skip
        images = torch.stack([_pil(x, x.shape[1] // 8 * 8, x.shape[0] // 8 * 8) for x in images])
    pictures = signed(images, processing)
    if pictures.shape[-2:] == (height, width):
        return pictures
    scale = min(height / pictures.shape[-2], width / pictures.shape[-1])
    rows, columns = (max(1, int(side * scale)) for side in pictures.shape[-2:])
    top, left = (height - rows) // 2, (width - columns) // 2
    canvas = torch.ones(len(pictures), 3, height, width)
    canvas[:, :, top : top + rows, left : left + columns] = F.interpolate(
        pictures, size=(rows, columns), mode="bilinear", align_corners=False
    )
    return canvas


def one_size(images: list[Tensor], height: int, width: int, processing: str = "wan") -> Tensor:
    """Pictures uint8 [U, V, 3] -> uint8 [N, U, V, 3]. If their sizes differ each is put ``pad_on_white`` in the video's
    size first, which rounds it to 8 bits once more."""
    if len({image.shape for image in images}) == 1:
        return torch.stack(images)
    placed = torch.cat([pad_on_white(image[None], height, width, processing) for image in images])
    return ((placed.movedim(1, -1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def video_pixels(video: Tensor, height: int, width: int, processing: str = "wan") -> Tensor:
    """uint8 [T, I, J, 3] -> float32 [3, T, H, W] in [-1, 1].

    ``wan``: antialiased bicubic on bytes to the size that covers H x W, then its centre (Wan2.1
    ``wan/utils/vace_processor.py``); ``diffusers``: each frame squeezed by Lanczos (``preprocess_video``)."""
    frames = _resized(video.movedim(-1, 1), height, width, processing).transpose(0, 1).float()
    return frames / 127.5 - 1 if processing == "wan" else 2 * (frames / 255) - 1


def mask_pixels(mask: Tensor, height: int, width: int, processing: str = "wan") -> Tensor:
    """float32 [T, I, J] in [0, 1] -> float32 [1, T, H, W], resized as ``video_pixels`` resizes the video.

    A mask of the right size stays as it is. Another goes through 8 bits, as a mask video of either code does."""
    if mask.shape[1:] == (height, width):
        return mask[None].float()
    levels = (mask * 255).round().to(torch.uint8)
    return _resized(levels[:, None], height, width, processing).transpose(0, 1).float() / 255


def _resized(frames: Tensor, height: int, width: int, processing: str) -> Tensor:
    """uint8 [T, C, I, J], C 1 or 3 -> uint8 [T, C, H, W]."""
    if frames.shape[-2:] == (height, width):
        return frames
    if processing == "diffusers":
        planes = [_pil(plane, width, height) for frame in frames for plane in frame]
        return torch.stack(planes).unflatten(0, frames.shape[:2])
    rows, columns, top, left = _cover(frames.shape[-2], frames.shape[-1], height, width)
    resized = F.interpolate(frames.contiguous(), size=(rows, columns), mode="bicubic", antialias=True)
    return resized[..., top : top + height, left : left + width]
