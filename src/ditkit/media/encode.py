"""Frames to the bytes of a file, one function a format. The same frames and card give the same bytes.

| suffix | what | loses |
|---|---|---|
| .mp4 | H.264, yuv420p, BT.709 limited range, card in the container's metadata (``ditkit``) | chroma halved, CRF 16 |
| .gif | one palette of 255 colours for the whole clip, looped, card in the comment | colours |
| .png | a folder ``NAME/0000.png``, ``NAME/0001.png``, ...; card as text of the first | nothing |
| .npz | arrays ``video`` uint8 [T, H, W, 3], ``fps`` and ``card`` | nothing |

Everything is made in memory: an encoded clip is small beside its frames, and a disk that fails cannot confuse an
encoder. Leaves out: paths.
"""

import io
from fractions import Fraction

import numpy as np

from ditkit.errors import MissingDependency, OutputError

from . import card as cards
from .card import Card

CRF = 16  # x264's own default is 23; 18 is commonly taken for visually lossless
GIF_COLORS = 255  # one of 256 stays free for "as before", which keeps still regions small
GIF_MAX_FPS = 50  # browsers slow down anything with a shorter delay than 20 ms


def _bayer(size: int) -> np.ndarray:
    """The recursive threshold matrix [size, size] (a power of two), in -0.5 to 0.5."""
    matrix = np.zeros((1, 1))
    while len(matrix) < size:
        matrix = np.block([[4 * matrix, 4 * matrix + 2], [4 * matrix + 3, 4 * matrix + 1]])
    return ((matrix + 0.5) / matrix.size - 0.5).astype(np.float32)


# Moved from channel to channel, so that it reaches colours on all sides of a pixel and not only lighter and darker.
_DITHER = np.stack([np.roll(_bayer(8), move, (0, 1)) for move in ((0, 0), (3, 5), (5, 2))], -1)


def mp4(video: np.ndarray, card: Card, crf: int = CRF) -> bytes:
    """``crf``: 0 (lossless but for the chroma) to 51. Width and height must be even."""
    import av

    if "libx264" not in av.codecs_available:
        raise MissingDependency("writing .mp4", "this PyAV has no libx264", "pip install --force-reinstall av")
    text = cards.line(card)
    buffer = io.BytesIO()
    options = {
        "movflags": "use_metadata_tags",  # else the mp4 muxer drops names that it does not know
        "moov_size": str(len(text) + 64 * len(video) + 8192),  # index in front, so that browsers can start at once
        "fflags": "+bitexact",
    }
    with av.open(buffer, "w", format="mp4", options=options) as container:
        container.metadata[cards.KEY] = text
        stream = container.add_stream("libx264", rate=Fraction(card["fps"]).limit_denominator(1001))
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf), "preset": "medium"}
        codec = stream.codec_context
        codec.thread_count = 1  # the number of threads changes the bits
        codec.colorspace = codec.color_primaries = codec.color_trc = 1  # BT.709
        codec.color_range = 1  # limited
        for frame in video:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()


def gif(video: np.ndarray, card: Card) -> bytes:
    """Delays are whole hundredths of a second, so their sum is kept right rather than each of them."""
    from PIL import Image

    ends = np.rint(np.arange(len(video) + 1) * 100 / card["fps"])
    picked = video[np.unique(np.linspace(0, len(video) - 1, 16).round().astype(int))].reshape(1, -1, 3)
    sample = np.linspace(0, picked.shape[1] - 1, min(picked.shape[1], 65_536)).astype(int)
    picked = np.ascontiguousarray(picked[:, sample])
    palette = Image.fromarray(picked).quantize(GIF_COLORS, Image.Quantize.MEDIANCUT, kmeans=1)

    def indices(frame: np.ndarray) -> Image.Image:
        return Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)

    # Ordered dither, as strong as the palette is coarse (a step d errs by d / sqrt(12)): none where 255 colours are
    # enough. Its pattern stands still, so what does not move does not flicker.
    error = np.array(indices(picked).convert("RGB"), np.float32) - picked
    step = min(float(np.sqrt(12 * np.mean(error**2))), 32.0)
    down, across = (-(-size // 8) for size in video.shape[1:3])
    pattern = step * np.tile(_DITHER, (down, across, 1))[: video.shape[1], : video.shape[2]]
    first, *rest = (indices(np.clip(np.rint(frame + pattern), 0, 255).astype(np.uint8)) for frame in video)
    buffer = io.BytesIO()
    first.save(
        buffer,
        "GIF",
        save_all=True,
        append_images=rest,
        duration=(np.diff(ends) * 10).astype(int).tolist(),
        loop=0,
        comment=cards.line(card).encode(),
        optimize=False,
    )
    return buffer.getvalue()


def png(video: np.ndarray, card: Card) -> dict[str, bytes]:
    """File names and their bytes."""
    from PIL import Image, PngImagePlugin

    files = {}
    for index, frame in enumerate(video):
        info = PngImagePlugin.PngInfo()
        if index == 0:
            info.add_text(cards.KEY, cards.line(card))
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "PNG", pnginfo=info)
        files[f"{index:04d}.png"] = buffer.getvalue()
    return files


def npz(video: np.ndarray, card: Card) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, video=video, fps=np.float64(card["fps"]), card=np.array(cards.line(card)))
    return buffer.getvalue()


def check_even(width: int, height: int, path: object) -> None:
    if width % 2 or height % 2:
        raise OutputError(
            f"writing {path}",
            f"H.264 in yuv420p needs an even width and height, and this is {width} x {height}",
            "choose .gif, .png or .npz, or an even size",
        )
