"""The card that every clip carries: how fast it plays, the hash of its frames, and the caller's manifest.

It is one line of canonical ASCII JSON, so that any container takes it unharmed. The same card, indented and readable,
lies beside the clip as ``NAME.json``. Leaves out: what a manifest says."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ditkit.errors import OutputError

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


def parse(text: str | bytes | None) -> Card | None:
    """None when there is no card, or when the text is somebody else's."""
    try:
        card = json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None
    return card if isinstance(card, dict) and card.get(_VERSION) == 1 else None


def check_sidecar(path: Path) -> None:
    """``NAME.json`` may be replaced if it is the card of this clip, or of one that is gone. Anything else there is a
    person's own file."""
    beside, found = path.with_suffix(".json"), "which is something else"
    try:
        card = parse(beside.read_bytes())
        if card is not None:
            other = _clip_of(path, card)
            if other == path or not other.exists():
                return
            found = f"which is that of {other}"
    except FileNotFoundError:
        return
    except OSError:  # a folder, or not for us to read
        pass
    raise OutputError(f"writing {path}", f"its manifest goes to {beside}, {found}", "Choose another file name")


def _clip_of(path: Path, card: Card) -> Path:
    """The clip that ``card``, found beside ``path``, was written with: a file, or a folder of frames."""
    suffix = card.get("suffix")
    if suffix == path.suffix or not isinstance(suffix, str) or not re.fullmatch(r"\.\w+", suffix):
        return path
    return path.with_suffix("" if suffix.lower() == ".png" else suffix)
