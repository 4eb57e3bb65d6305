"""What a clip of the drawn world shows, measured from its pixels: colour, shape, motion, background. No model.

The background is the colour of the frame's border; the object is the largest connected region unlike it; its cover
(how much of each pixel is object) gives area and centre to a fraction of a pixel. Motion is a line through the
centres, shape is the drawn outline of the same area that fits the cover best. Whatever is not clear is None, and so
is wrong in ``score``. Leaves out: anything that a clip of one plain object on a plain ground does not have."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ditkit.errors import RequestError
from ditkit.shapes import draw
from ditkit.shapes.draw import BACKGROUNDS, COLORS, SHAPES, Scene

# Limits, with the drawn world in mind. Lengths are in frame widths: drawn shapes travel 0.34 to 0.47.
SPREAD = 36.0  # median distance of border pixels from the background, above which there is none (RGB levels)
CONTRAST = 40.0  # least distance of object from background; the closest drawn pair has 113
COLOR_ERROR = 80.0  # most distance from a named colour; the closest named pair has 127
MIN_AREA = 0.004  # of the frame; the smallest drawn shape has 0.017
SEEN = 0.6  # share of frames that must show the object
SECOND = 0.3  # a second region of this share of the object's area is a second object
MOVING, STILL = 0.11, 0.07  # travel from which it moves, and up to which it stands
AXIS = 2.0  # along its axis it must go this many times as far as across
WANDER = 0.06  # most deviation (root mean square) from a straight way at an even pace
GROWING, STEADY = 1.6, 1.35  # last radius / first: from which it grows, up to which it keeps its size
SOFTNESS = (0.0, 1.0, 1.75, 2.5)  # pixels of blur (sigma) that an outline is tried with
FIT, FIT_LEAD = 0.78, 0.01  # least overlap with the best outline, and least lead over the next

Named = Mapping[str, tuple[int, int, int]]
DOWN, UP, RIGHT, LEFT = np.s_[:, 1:], np.s_[:, :-1], np.s_[:, :, 1:], np.s_[:, :, :-1]
NEIGHBOURS = ((DOWN, UP), (UP, DOWN), (RIGHT, LEFT), (LEFT, RIGHT))  # pixels of [T, H, W], and those beside them


@dataclass(frozen=True)
class Reading:
    """What was seen; None is "not clear".

    ``travel`` (x, y) in frame widths and heights, downwards positive; ``growth`` last radius over first; ``fit`` the
    overlap (soft intersection over union) with each outline; ``seen`` the share of frames with an object; ``objects``
    how many regions a frame has (median)."""

    color: str | None = None
    shape: str | None = None
    motion: str | None = None
    background: str | None = None
    travel: tuple[float, float] = (0.0, 0.0)
    growth: float = 1.0
    fit: Mapping[str, float] = field(default_factory=dict)
    seen: float = 0.0
    objects: int = 0


def measure(video: np.ndarray) -> Reading:
    """``video`` uint8 [T, H, W, 3]. Large frames are averaged down to about 64 pixels first."""
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or min(video.shape) < 1:
        raise RequestError("measuring a clip", f"it is {video.dtype} {list(video.shape)}", "Use uint8 [T, H, W, 3]")
    pixels = _shrink(video)
    frames, height, width = pixels.shape[:3]

    border = np.concatenate([pixels[:, [0, 1, -2, -1]].reshape(-1, 3), pixels[:, :, [0, 1, -2, -1]].reshape(-1, 3)])
    ground = np.median(border, axis=0)
    if np.median(_distance(border, ground)) > SPREAD:
        return Reading()
    empty = Reading(background=_name(ground, BACKGROUNDS, COLORS))

    unlike = _distance(pixels, ground)
    strong = float(np.quantile(unlike, 0.995))
    if strong < CONTRAST:
        return empty
    largest, objects = _largest(unlike > max(CONTRAST * 0.75, 0.35 * strong))
    seen = largest.sum((1, 2)) >= MIN_AREA * height * width
    if not seen.any():
        return empty
    core = largest & (unlike >= np.quantile(unlike[largest], 0.4))  # the inner part, without the soft edge
    rgb = np.median(pixels[core], axis=0)
    axis = rgb - ground
    if np.linalg.norm(axis) < CONTRAST:
        return empty

    cover = np.clip((pixels - ground) @ axis / (axis @ axis), 0, 1)
    largest, _ = _largest(cover > 0.5)
    region = _widen(largest, 3)
    cover = np.where(region, cover, 0)
    areas = cover.sum((1, 2))
    seen = largest.sum((1, 2)) >= MIN_AREA * height * width
    count = int(np.median(objects[seen])) if seen.any() else 0
    whole = replace(empty, seen=float(seen.mean()), objects=count)
    if seen.mean() < SEEN or count != 1:
        return whole

    moments = np.arange(frames)[seen]
    areas, cover, region = areas[seen], cover[seen], region[seen]
    x = (cover * np.arange(width)).sum((1, 2)) / areas
    y = (cover * np.arange(height)[:, None]).sum((1, 2)) / areas
    radius = np.sqrt(areas / np.pi)
    (left, right, off_x), (top, bottom, off_y) = _line(moments, x / width, frames), _line(moments, y / height, frames)
    travel = (right - left, bottom - top)
    begin, end, _ = _line(moments, radius, frames)
    growth = max(end, 0.1) / max(begin, 0.1)

    clear = len(moments) > 1 and np.hypot(off_x, off_y) <= WANDER
    some = np.unique(np.linspace(0, len(moments) - 1, 7).round().astype(int))
    fit = {shape: _fit(cover[some], region[some], x[some], y[some], radius[some], shape) for shape in SHAPES}
    best, second = sorted(SHAPES, key=lambda shape: -fit[shape])[:2]
    return replace(
        whole, color=_name(rgb, COLORS, BACKGROUNDS), motion=_motion(travel, growth) if clear else None,
        shape=best if fit[best] >= FIT and fit[best] - fit[second] >= FIT_LEAD else None,
        travel=travel, growth=growth, fit=fit,
    )  # fmt: skip


def score(reading: Reading, wanted: Scene) -> dict[str, bool]:
    """Which attributes of ``reading`` are as ``wanted``. What is None is wrong."""
    return {key: getattr(reading, key) == getattr(wanted, key) for key in ("color", "shape", "motion", "background")}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 clips of the same shape in dB (peak 255); inf when they are equal."""
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8:
        found = f"{a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
        raise RequestError("comparing two clips", f"they are {found}", "Use uint8 clips of the same shape")
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float(10 * np.log10(255.0**2 / error)) if error else float("inf")


def _shrink(pixels: np.ndarray) -> np.ndarray:
    """Means over square blocks, so that the shorter side is 64 to 127 pixels; a rest at the far edges is left out."""
    pixels = pixels.astype(np.float32)
    factor = max(1, min(pixels.shape[1:3]) // draw.HEIGHT)
    height, width = (size // factor * factor for size in pixels.shape[1:3])
    rows = np.add.reduce([pixels[:, offset:height:factor, :width] for offset in range(factor)])
    return np.add.reduce([rows[:, :, offset::factor] for offset in range(factor)]) / factor**2


def _distance(pixels: np.ndarray, color: np.ndarray) -> np.ndarray:
    return np.linalg.norm(pixels - color, axis=-1)


def _name(rgb: np.ndarray, names: Named, others: Named) -> str | None:
    """The nearest of ``names``, unless it is far or one of ``others`` is nearer."""
    near, name = min((float(np.linalg.norm(rgb - value)), name) for name, value in names.items())
    other = min(float(np.linalg.norm(rgb - value)) for value in others.values())
    return name if near <= min(COLOR_ERROR, other) else None


def _largest(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per frame of ``mask`` [T, H, W]: the largest 4-connected region, and how many have SECOND of its size or more."""
    largest, objects = np.zeros_like(mask), np.zeros(len(mask), int)
    for index, frame in enumerate(_regions(mask)):
        found, sizes = np.unique(frame[frame >= 0], return_counts=True)
        if len(found):
            largest[index] = frame == found[sizes.argmax()]
            objects[index] = np.count_nonzero(sizes >= SECOND * sizes.max())
    return largest, objects


def _regions(mask: np.ndarray) -> np.ndarray:
    """Pixels of one region share a number, the others have -1. Each pixel takes the largest number around it, then
    the number that the owner of its number has: the way shortens by half each time."""
    labels = np.where(mask, np.arange(mask.size).reshape(mask.shape), -1)
    while True:
        grown = labels.copy()
        for here, beside in NEIGHBOURS:
            np.maximum(grown[here], labels[beside], out=grown[here], where=mask[here])
        grown[mask] = grown.ravel()[grown[mask]]
        if np.array_equal(grown, labels):
            return labels
        labels = grown


def _widen(mask: np.ndarray, by: int) -> np.ndarray:
    for _ in range(by):
        wide = mask.copy()
        for here, beside in NEIGHBOURS:
            wide[here] |= mask[beside]
        mask = wide
    return mask


def _line(moments: np.ndarray, values: np.ndarray, frames: int) -> tuple[float, float, float]:
    """The straight line through ``values``: where it begins and ends in the whole clip, and how far they are off it."""
    if len(moments) < 2:
        return float(values[0]), float(values[0]), 0.0
    slope, begin = np.polyfit(moments, values, 1)
    off = np.sqrt(np.mean((begin + slope * moments - values) ** 2))
    return float(begin), float(begin + slope * (frames - 1)), float(off)


def _motion(travel: tuple[float, float], growth: float) -> str | None:
    x, y = travel
    length = float(np.hypot(x, y))
    if growth >= GROWING:
        return "growing" if length < MOVING else None
    if not 1 / STEADY <= growth <= STEADY:
        return None
    if length <= STILL:
        return "still"
    main, across = (x, y) if abs(x) > abs(y) else (y, x)
    if length < MOVING or abs(main) < AXIS * abs(across):
        return None
    names = ("left", "right") if main == x else ("up", "down")
    return names[int(main > 0)]


def _fit(cover: np.ndarray, region: np.ndarray, x: np.ndarray, y: np.ndarray, radius: np.ndarray, shape: str) -> float:
    """Mean over frames of the overlap of ``cover`` [T, H, W] with the outline of the same centre and area, as sharp
    as it is drawn or blurred, whichever fits best. Both are looked at inside ``region`` only."""
    down, across = np.flatnonzero(region.any((0, 2))), np.flatnonzero(region.any((0, 1)))
    window = slice(None), slice(down[0], down[-1] + 1), slice(across[0], across[-1] + 1)
    rows, columns = np.mgrid[window[1:]][:, None]
    cover, region = cover[window], region[window]
    x, y, radius = (value[:, None, None] for value in (x, y, radius))
    sharp = np.clip(0.5 - draw.signed_distance(shape, columns - x, rows - y, radius), 0, 1)
    fits = []
    for sigma in SOFTNESS:
        ideal = np.where(region, _blur(sharp, sigma), 0)
        fits.append(np.minimum(cover, ideal).sum((1, 2)) / np.maximum(cover, ideal).sum((1, 2)))
    return float(np.mean(fits, axis=1).max())


def _blur(planes: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian over the last two axes (sigma at least 1, or 0), black outside."""
    if not sigma:
        return planes
    down, across = (
        np.exp(-0.5 * (np.subtract.outer(np.arange(size), np.arange(size)) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
        for size in planes.shape[1:]
    )
    return down @ planes @ across
