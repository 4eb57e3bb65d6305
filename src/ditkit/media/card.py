"""The card that every clip carries: how fast it plays, the hash of its frames, and the caller's manifest.

It is one line of canonical ASCII JSON, so that any container takes it unharmed. The same card, indented and readable,
lies beside the clip as ``NAME.json``. Leaves out: what a manifest says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ditkit.errors import OutputError, StateError

from .pixels import frames_sha256

KEY = "ditkit"
"""Name of the card in the metadata of a file."""

Card = dict[str, Any]
_VERSION = "ditkit_clip"


def make_card(video: np.ndarray, fps: float, manifest: Mapping[str, Any] | None) -> Card:
    card = {
        _VERSION: 1,
        "fps": fps,
        "frames": len(video),
        "frames_sha256": frames_sha256(video),
        "manifest": None if manifest is None else dict(manifest),
    }
    try:
        pretty(card)
    except (TypeError, ValueError, RecursionError) as error:  # a tensor, NaN, a lone surrogate, a loop
        raise OutputError(
            "writing a manifest", f"it is not JSON ({error})", "use text, numbers, lists and dicts"
        ) from None
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


def sidecar(path: Path) -> Path:
    return path.with_suffix(".json")


def check_sidecar(path: Path) -> None:
    """``NAME.json`` may be replaced if it is a card. Anything else there is a person's own file."""
    beside = sidecar(path)
    try:
        free = parse(beside.read_bytes()) is not None
    except FileNotFoundError:
        free = True
    except OSError:  # a folder, or not for us to read
        free = False
    if not free:
        found = f"its manifest goes to {beside}, which is something else"
        raise OutputError(f"writing {path}", found, "choose another file name")


def manifest_of(path: Path, card: Card | None) -> dict[str, Any]:
    if card is None or card["manifest"] is None:
        raise StateError(
            f"reading the manifest of {path}", "the file carries none", "name a clip that ditkit wrote, or its .json"
        )
    return card["manifest"]
