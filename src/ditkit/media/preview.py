"""A small picture in a terminal: two pixels per character, by half blocks in true colour."""

from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rich.text import Text


def preview_blocks(frame: np.ndarray, columns: int = 32) -> "Text":
    """``frame`` uint8 [h, w, 3] -> rich Text of ``columns`` characters (w at most) and about h/w/2 times as many lines.

    A character is twice as high as wide, so the two halves of each are square. rich turns the colours into those
    that the terminal has."""
    from PIL import Image
    from rich.style import Style
    from rich.text import Text

    height, width = frame.shape[:2]
    columns = max(1, min(columns, width))
    lines = max(1, round(columns * height / width / 2))
    small = np.asarray(Image.fromarray(np.ascontiguousarray(frame)).resize((columns, 2 * lines), Image.Resampling.BOX))
    text = Text(no_wrap=True, end="")
    for line in range(lines):
        if line:
            text.append("\n")
        pairs = zip(map(_hex, small[2 * line]), map(_hex, small[2 * line + 1]), strict=True)
        for (upper, lower), run in groupby(pairs):
            text.append("\u2580" * sum(1 for _ in run), Style(color=upper, bgcolor=lower))
    return text


def _hex(pixel: np.ndarray) -> str:
    return "#{:02x}{:02x}{:02x}".format(*pixel)
