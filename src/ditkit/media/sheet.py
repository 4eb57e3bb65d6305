"""What a clip does at a glance: a contact sheet to look at and to send around, and a small picture in a terminal.
Leaves out: what the caption says; the caller knows seed and steps."""

import io
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ditkit.errors import OutputError

from . import files
from .pixels import check_frames

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.text import Text

GROUND, TITLE, CAPTION, NUMBER, RULE = (17, 18, 22), (240, 240, 243), (150, 153, 163), (110, 113, 124), (44, 46, 54)
TILE = 208  # a frame is brought to about this width; by a whole factor where it is enlarged
MARGIN, GAP, FOOT = 36, 12, 24
TITLE_SIZE, CAPTION_SIZE, NUMBER_SIZE = 25, 15, 12
MOST_LINES = 6


def contact_sheet(
    video: np.ndarray,
    path: str | Path | None = None,
    title: str = "",
    caption: str = "",
    columns: int = 4,
    rows: int = 2,
    fps: float | None = None,
    font: str | Path | None = None,
) -> "Image":
    """``columns * rows`` frames of ``video`` uint8 [T, H, W, 3], evenly chosen, the first and the last among them.

    ``title`` (the prompt) is wrapped and cut after six lines; ``caption`` is one small line; under each frame stands
    its number, with ``fps`` also its time. ``font`` is a TrueType file, for scripts that Pillow's own font lacks.
    Written to ``path`` (.png) if given; the picture is returned in either case."""
    from PIL import Image, ImageDraw, ImageFont

    check_frames(video)
    if columns < 1 or rows < 1:
        raise OutputError(f"a contact sheet of {columns} x {rows} frames", "it is empty", "Use at least 1 x 1")
    if path is not None and Path(path).suffix.lower() != ".png":
        raise OutputError(f"writing the contact sheet {path}", "it is a PNG", "Give the path the suffix .png")

    def face(size: int) -> Any:
        try:
            return ImageFont.load_default(size) if font is None else ImageFont.truetype(font, size)
        except OSError as error:
            raise OutputError(f"the font {font}", str(error), "Name a .ttf or .otf file") from None

    columns = min(columns, len(video))
    rows = min(rows, -(-len(video) // columns))
    chosen = np.linspace(0, len(video) - 1, min(len(video), columns * rows)).round().astype(int)
    width, height = _tile(video.shape[2], video.shape[1])
    inner = max(columns * (width + GAP) - GAP, 320)
    title_face, caption_face, number_face = face(TITLE_SIZE), face(CAPTION_SIZE), face(NUMBER_SIZE)
    lines = _wrap(title, title_face, inner)
    caption_lines = _wrap(caption, caption_face, inner)[:1]

    line_height, head = round(TITLE_SIZE * 1.3), 0
    if lines or caption_lines:
        head = len(lines) * line_height + 26 * len(caption_lines) + 22
    whole = MARGIN + head + rows * (height + FOOT) + (rows - 1) * GAP + MARGIN - 8
    sheet = Image.new("RGB", (inner + 2 * MARGIN, whole), GROUND)
    pen = ImageDraw.Draw(sheet)
    y = MARGIN - 6
    for text in lines:
        pen.text((MARGIN, y), text, TITLE, title_face)
        y += line_height
    for text in caption_lines:
        pen.text((MARGIN, y + 3), text, CAPTION, caption_face)

    for position, index in enumerate(chosen):
        x = MARGIN + position % columns * (width + GAP)
        y = MARGIN + head + position // columns * (height + FOOT + GAP)
        filter = Image.Resampling.NEAREST if width >= video.shape[2] else Image.Resampling.LANCZOS
        frame = Image.fromarray(np.ascontiguousarray(video[index])).resize((width, height), filter)
        pen.rectangle((x - 1, y - 1, x + width, y + height), outline=RULE)  # a black frame has an edge too
        sheet.paste(frame, (x, y))
        pen.text((x + 1, y + height + 6), str(index), NUMBER, number_face)
        if fps:
            pen.text((x + width - 1, y + height + 6), f"{index / fps:.2f} s", NUMBER, number_face, anchor="ra")

    if path is not None:
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG", optimize=True)
        files.write_together({Path(path): buffer.getvalue()})
    return sheet


def _tile(width: int, height: int) -> tuple[int, int]:
    """A whole multiple of a small frame; a large frame comes down to TILE, by its longer side."""
    longer = max(width, height)
    if longer <= TILE:
        factor = round(TILE / longer)
        return width * factor, height * factor
    return max(1, round(width * TILE / longer)), max(1, round(height * TILE / longer))


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Lines that fit; words that do not fit (or scripts without spaces) are broken between characters."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines.append("")
        for character in word:
            if font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    if len(lines) > MOST_LINES:
        last = lines[MOST_LINES - 1]
        while last and font.getlength(last + " ...") > width:
            last = last[:-1]
        lines = [*lines[: MOST_LINES - 1], f"{last} ..."]
    return lines


def preview_blocks(frame: np.ndarray, columns: int = 32) -> "Text":
    """``frame`` uint8 [h, w, 3] -> rich Text of ``columns`` characters (w at most) and about h/w/2 times as many lines.

    A character is twice as high as wide, so the two halves of each are square. rich turns the colours into those
    that the terminal has."""
    from PIL import Image
    from rich.color import Color
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
        for (upper, lower), run in groupby(zip(*small[2 * line : 2 * line + 2].tolist(), strict=True)):
            style = Style(color=Color.from_rgb(*upper), bgcolor=Color.from_rgb(*lower))
            text.append("\u2580" * sum(1 for _ in run), style)
    return text
