"""Clips back into frames, and the manifests that they carry."""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ditkit.errors import DitkitError, StateError

from . import card as cards
from .card import Card


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest inside an mp4, gif, npz, png or folder of frames; or of the ``.json`` beside a clip, if that is
    what ``path`` names. Raises StateError where there is no such file, or it is not readable or carries no manifest."""
    card = _read(path, _READ_CARD)
    if card is None or card["manifest"] is None:
        do = "Name a clip that ditkit wrote, or its .json"
        raise StateError(f"reading the manifest of {path}", "the file carries none", do)
    return card["manifest"]


def read_video(path: str | Path) -> tuple[np.ndarray, float]:
    """uint8 [T, H, W, 3] and frames per second, of an mp4, gif, npz or a folder of frames (``NAME`` or ``NAME.png``).

    A gif of another program has the mean rate of its delays. Raises StateError, as ``read_manifest``."""
    return _read(path, _READ_VIDEO)


def _read(path: str | Path, readers: Mapping[str, Callable[[Path], Any]]) -> Any:
    path = Path(path)
    if path.suffix.lower() == ".png" and not path.exists() and path.with_suffix("").is_dir():
        path = path.with_suffix("")
    asked, kind = f"reading {path}", "folder" if path.is_dir() else path.suffix.lower()
    if not path.exists():
        raise StateError(asked, "there is no such file", "Check the path")
    if kind not in readers:
        raise StateError(asked, "its format is not known", f"Use {', '.join(readers)}")
    try:
        return readers[kind](path)
    except DitkitError:
        raise
    except (OSError, ValueError, KeyError, IndexError, EOFError, SyntaxError, zipfile.BadZipFile) as error:
        raise StateError(asked, f"it is damaged or not a {kind} ({error})", "Write it again") from error


def _mp4(path: Path) -> tuple[np.ndarray, float]:
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return np.stack(frames), float(stream.average_rate or stream.guessed_rate or 0)


def _mp4_card(path: Path) -> Card | None:
    import av

    with av.open(path) as container:
        return cards.parse(container.metadata.get(cards.KEY))


def _gif(path: Path) -> tuple[np.ndarray, float]:
    from PIL import Image, ImageSequence

    with Image.open(path) as image:
        card = cards.parse(image.info.get("comment"))
        shown = [(np.array(f.convert("RGB")), f.info.get("duration", 0)) for f in ImageSequence.Iterator(image)]
    frames = np.stack([frame for frame, _ in shown])
    ends = np.cumsum([duration for _, duration in shown])
    if card is None:
        return frames, 1000 * len(frames) / ends[-1] if ends[-1] else 10.0  # what viewers make of no delay
    # Equal neighbours were stored once, with the sum of their delays.
    begins = np.rint(np.arange(card["frames"]) * 100 / card["fps"]) * 10
    return frames[np.searchsorted(ends, begins, side="right")], float(card["fps"])


def _image_card(path: Path) -> Card | None:
    from PIL import Image

    with Image.open(path) as image:
        return cards.parse(image.info.get(cards.KEY) or image.info.get("comment"))


def _folder(path: Path) -> tuple[np.ndarray, float]:
    from PIL import Image

    files = sorted(path.glob("*.png"), key=lambda file: (len(file.name), file.name))
    card = _image_card(files[0]) if files else None
    if card is None or card["frames"] != len(files):
        found = f"{len(files)} frames and {'no card' if card is None else 'a card for ' + str(card['frames'])}"
        raise StateError(f"reading the frames in {path}", found, "Name a folder that ditkit wrote")
    return np.stack([np.array(Image.open(file).convert("RGB")) for file in files]), float(card["fps"])


def _npz(path: Path) -> tuple[np.ndarray, float]:
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["video"], float(arrays["fps"])


def _npz_card(path: Path) -> Card | None:
    with np.load(path, allow_pickle=False) as arrays:
        return cards.parse(str(arrays["card"])) if "card" in arrays else None


_READ_VIDEO = {".mp4": _mp4, ".gif": _gif, ".npz": _npz, "folder": _folder}
_READ_CARD = {
    ".mp4": _mp4_card, ".gif": _image_card, ".png": _image_card, ".npz": _npz_card,
    "folder": lambda path: _image_card(path / "0000.png"),
    ".json": lambda path: cards.parse(path.read_bytes()),
}  # fmt: skip
