"""The size of a video that follows from a picture and an area, by the rules of the official code.

All in Python floats (float64), in the official order of operations: the results hang on single roundings, such as
832x480 on an area of 480*832, which gives 832x464. Leaves out: resizing (``images.py``)."""

import math

from ditkit.errors import RequestError


def _check(width: int, height: int, area: int, *sides: float) -> None:
    """Raises RequestError unless all are at least 1."""
    if min(width, height, area, *sides) < 1:
        asked = f"a video size for a picture of {width}x{height} on an area of {area} pixels"
        raise RequestError(asked, "one of its sides would be 0", "Take a larger area, or a picture that is less narrow")


def size_i2v(width: int, height: int, area: int, stride: int = 8, patch: int = 2) -> tuple[int, int]:
    """(width, height) of Wan2.1 I2V and FLF2V and Wan2.2 I2V-A14B: the picture's proportions on about ``area`` pixels.

    ``stride`` is the VAE's in space, ``patch`` the transformer's. Source: Wan2.1 ``wan/image2video.py``. Raises
    RequestError where a side would vanish."""
    _check(width, height, area)
    ratio = height / width
    rows = round(math.sqrt(area * ratio) // stride // patch * patch)
    columns = round(math.sqrt(area / ratio) // stride // patch * patch)
    _check(width, height, area, rows, columns)
    return columns * stride, rows * stride


def size_ti2v(width: int, height: int, area: int, multiple: int = 32) -> tuple[int, int]:
    """(width, height) of Wan2.2 TI2V-5B: multiples of ``multiple``, at most ``area`` pixels in all.

    Either the width or the height is rounded down first and the other side fills the area; the pair that is closer to
    the picture's proportions wins, the second one at a tie. Source: Wan2.2 ``wan/utils/utils.py`` (best_output_size).
    Raises RequestError where a side would vanish."""
    _check(width, height, area)
    ratio = width / height
    wide = (area * ratio) ** 0.5
    first = int(wide // multiple * multiple)
    second = int(area / wide // multiple * multiple)
    _check(width, height, area, first, second)
    by_width = first, int(area / first // multiple * multiple)
    by_height = int(area / second // multiple * multiple), second
    _check(width, height, area, *by_width, *by_height)

    def distance(size: tuple[int, int]) -> float:
        found = size[0] / size[1]
        return max(ratio / found, found / ratio)

    return by_width if distance(by_width) < distance(by_height) else by_height


def size_vace(
    width: int, height: int, frames: int, area: int, tokens: int | None = None, temporal: int = 4, multiple: int = 16
) -> tuple[int, int, int]:
    """(width, height, frames) that VACE gives to a source video: never more than ``area`` pixels, nor more than
    ``tokens`` tokens, nor larger than the source; frames of the form ``temporal`` n + 1.

    ``tokens`` is by default that of 21 latent frames on ``area``: the official 32,760 for 480*832 and 75,600 for
    720*1280. Source: Wan2.1 ``wan/utils/vace_processor.py``. Raises RequestError for a video that is smaller than one
    token."""
    _check(width, height, area)
    budget = 21 * area // multiple**2 if tokens is None else tokens
    spot = min(budget, area / multiple**2, (height // multiple) * (width // multiple))
    _check(width, height, area, spot, frames)
    count = min((frames - 1) // temporal + 1, int(budget / spot))
    spot = min(spot, int(budget / count))
    rows = round(math.sqrt(spot * (height / width)))
    _check(width, height, area, rows)
    columns = int(spot / rows)
    _check(width, height, area, columns)
    return columns * multiple, rows * multiple, (count - 1) * temporal + 1
