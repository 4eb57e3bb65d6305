"""Write a clip where it was asked for, in the format that the path's suffix names."""

import importlib
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ditkit.errors import MissingDependency, OutputError, nearest

from . import card as cards
from . import encode, files
from .pixels import check_frames

NEEDS = {".mp4": "av", ".gif": "PIL", ".png": "PIL", ".npz": "numpy"}
"""The known suffixes, and the package that writes each."""
_INSTALL = {"av": "av", "PIL": "pillow"}


def write_video(
    path: str | Path,
    video: np.ndarray,
    fps: float,
    manifest: Mapping[str, Any] | None = None,
    crf: int = encode.CRF,
) -> Path:
    """Write ``video`` uint8 [T, H, W, 3] and return the path of the file, or of the folder of frames for ``.png``.

    A card with fps, frame hash and ``manifest`` goes into the file, and with a manifest also beside it as
    ``NAME.json``. What was there before is replaced; parents are created. ``crf`` is for mp4 only.

    Raises:
        OutputError: an unknown suffix, an odd size for mp4, a manifest that is not JSON, a path that cannot be
            written. Then nothing new is left at the path.
    """
    check_frames(video)
    target = check_writable(path, width=video.shape[2], height=video.shape[1], fps=fps)
    suffix = Path(path).suffix.lower()
    if crf != encode.CRF and suffix != ".mp4":
        raise OutputError(f"crf {crf} for {path}", "only .mp4 has one", "leave it out, or choose .mp4")
    if not 0 <= crf <= 51:
        raise OutputError(f"crf {crf}", "it is out of range", "use 0 (best) to 51")
    card = cards.make_card(video, fps, manifest, Path(path).suffix)
    encoders: dict[str, Callable[[], files.Content]] = {
        ".mp4": lambda: encode.mp4(video, card, crf),
        ".gif": lambda: encode.gif(video, card),
        ".png": lambda: encode.png(video, card),
        ".npz": lambda: encode.npz(video, card),
    }
    content = encoders[suffix]()
    beside = cards.sidecar(Path(path))
    files.write_together({target: content} if manifest is None else {target: content, beside: cards.pretty(card)})
    if manifest is None:
        beside.unlink(missing_ok=True)  # the card of the clip that was here before
    return target


def check_writable(
    path: str | Path, *, width: int | None = None, height: int | None = None, fps: float | None = None
) -> Path:
    """Fail before a long run rather than after it: suffix, packages, folder, room for a first block, what is there.

    Creates the parents; returns the path that will be written. Size and fps are checked if given."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in NEEDS:
        hint = nearest(suffix, NEEDS) if suffix else ""
        raise OutputError(
            f"writing {path}",
            f"{suffix or 'a name without suffix'} is no known format{hint}",
            f"use {', '.join(NEEDS)}",
        )
    try:
        importlib.import_module(NEEDS[suffix])
    except ImportError:
        package = _INSTALL[NEEDS[suffix]]
        raise MissingDependency(f"writing {suffix}", f"{package} is not installed", f"pip install {package}") from None
    if fps is not None and not (0 < fps < math.inf):
        raise OutputError(f"{fps} frames per second", "it is out of range", "use a positive number")
    if suffix == ".gif" and fps is not None and fps > encode.GIF_MAX_FPS:
        raise OutputError(
            f"a gif of {fps:g} frames per second", f"viewers show at most {encode.GIF_MAX_FPS}", "use .mp4 or fewer"
        )
    if suffix == ".mp4" and width is not None and height is not None:
        encode.check_even(width, height, path)
    target = path.with_suffix("") if suffix == ".png" else path
    files.probe(target)
    if suffix == ".png":
        _check_folder(target)
    elif target.is_dir():
        raise OutputError(
            f"writing {target}", "it is a folder", f"name a file in it, such as {target / 'clip'}{suffix}"
        )
    cards.check_sidecar(path)
    return target


def _check_folder(folder: Path) -> None:
    """A folder of frames replaces an older one, and nothing else."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"writing frames into {folder}", "it is a file", "choose another name")
    names = [file.name for file in folder.iterdir()] if folder.exists() else []
    strangers = [name for name in names if not re.fullmatch(r"\d{4,}\.png", name)]
    if strangers:
        raise OutputError(
            f"writing frames into {folder}", f"it holds other files ({strangers[0]})", "choose a new or empty folder"
        )
