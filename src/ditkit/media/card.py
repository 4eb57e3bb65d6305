"""The card that every clip carries: how fast it plays, the hash of its frames, and the caller's manifest.

It is one line of canonical ASCII JSON, so that any container takes it unharmed. The same card, indented and readable,
lies beside the clip as ``NAME.json``. Leaves out: what a manifest says."""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ditkit import limits
from ditkit.errors import OutputError, StateError
from ditkit.reading import open_ordinary, read_bytes, value_of

from . import png
from .guard import guarded
from .pixels import frames_sha256

KEY = "ditkit"
"""Name of the card in the metadata of a file."""

Card = dict[str, Any]
_VERSION = "ditkit_clip"


def make_card(video: np.ndarray, fps: float, manifest: Mapping[str, Any] | None, suffix: str) -> Card:
    """``suffix`` is that of the clip: it tells to which of several files of one name ``NAME.json`` belongs."""
    card = {
        _VERSION: 1, "suffix": suffix, "fps": fps, "frames": len(video), "frames_sha256": frames_sha256(video),
        "manifest": None if manifest is None else dict(manifest),
    }  # fmt: skip
    try:
        pretty(card)
    except (TypeError, ValueError, RecursionError) as error:  # a tensor, NaN, a lone surrogate, a loop
        do = "Use text, numbers, lists and dicts"
        raise OutputError("writing a manifest", f"it is not JSON ({error})", do) from None
    return card


def line(card: Card) -> str:
    """Canonical: keys sorted, no spaces, ASCII."""
    return json.dumps(card, sort_keys=True, separators=(",", ":"), allow_nan=False)


def pretty(card: Card) -> bytes:
    return (json.dumps(card, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def parse(text: str | bytes | None, asked: str) -> Card | None:
    """None when there is no card, or when the text is somebody else's. Raises StateError for a card whose entries are
    not what ``make_card`` writes; what the manifest says is not looked at."""
    try:
        if not text or len(text) > limits.TEXT:
            return None
        card = value_of(text.removeprefix("\ufeff") if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(card, dict) or type(card.get(_VERSION)) is not int or card[_VERSION] != 1:
        return None
    for key, right in _RIGHT.items():
        if not right(card.get(key)):
            raise StateError(asked, f"its card has no usable {key!r}", "Use an untouched file")
    return card


def _is_rate(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


_RIGHT: dict[str, Callable[[Any], bool]] = {
    "fps": _is_rate,
    "frames": lambda value: type(value) is int and 0 < value <= limits.FRAMES,
    "manifest": lambda value: value is None or isinstance(value, dict),
}


def of_picture(path: Path, asked: str) -> Card | None:
    """The card in a still or moving picture. Raises StateError, also where it is damaged."""
    from PIL import Image, UnidentifiedImageError

    with guarded(asked, StateError), open_ordinary(path) as stream:
        whole = png.lean(stream, KEY) if stream.read(8) == png.SIGNATURE else stream
        whole.seek(0)
        try:
            with Image.open(whole, formats=["PNG", "GIF"]) as picture:
                text = picture.info.get(KEY) or picture.info.get("comment")
        except UnidentifiedImageError:
            return None
    return parse(text if isinstance(text, str | bytes) else None, asked)


def check_sidecar(path: Path) -> None:
    """``NAME.json`` may be replaced if it is the card of this clip, or of one that is gone. Anything else there is a
    person's own file."""
    beside, found = path.with_suffix(".json"), "which is something else"
    try:
        asked = f"writing {path}"
        card = parse(read_bytes(beside, asked, OutputError), asked)
        if card is not None:
            other = _clip_of(path, card)
            if other == path or not os.path.exists(other):
                return
            found = f"which is that of {other}"
    except FileNotFoundError:
        return
    except (OutputError, StateError):  # a folder, not for us to read, or a card that is no more
        pass
    raise OutputError(f"writing {path}", f"its manifest goes to {beside}, {found}", "Choose another file name")


def _clip_of(path: Path, card: Card) -> Path:
    """The clip that ``card``, found beside ``path``, was written with: a file, or a folder of frames."""
    suffix = card.get("suffix")
    if suffix == path.suffix or not isinstance(suffix, str) or not re.fullmatch(r"\.\w+", suffix):
        return path
    return path.with_suffix("" if suffix.lower() == ".png" else suffix)
