"""Clips back into frames, and the manifests that they carry. What a file is, its first bytes tell, not its name."""

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ditkit.errors import StateError
from ditkit.reading import open_ordinary, read_bytes

from . import animations, containers, stored
from . import card as cards
from .card import Card
from .clip import Clip, Timed
from .guard import check_clip, guarded, said
from .kinds import Kind, kind_of

_DAMAGED = "it is damaged, or not what it says"
_NO_CLIP = {
    "picture": "it is a single picture",
    "npy": "it is a single array",
    "text": "it is a text",
    "empty": "it is empty",
}


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest inside a clip, its first frame or a folder of frames; or of the ``.json`` beside a clip, if that is
    what ``path`` names. Raises StateError where there is no such file, or it is not readable or carries no manifest."""
    path, asked = _there(path), f"reading the manifest of {path}"
    with _opened(path, asked) as (kind, stream), guarded(asked, StateError, found=_DAMAGED):
        card = _card(path, kind, stream, asked)
    if card is None or card.get("manifest") is None:
        do = "Name a clip that ditkit wrote, or its .json"
        raise StateError(asked, "the file carries none", do)
    manifest: dict[str, Any] = card["manifest"]
    return manifest


def read_video(path: str | Path) -> tuple[np.ndarray, float]:
    """uint8 [T, H, W, 3] and frames per second, of any video that PyAV decodes, a gif, webp, avif, apng, npz or a
    folder of frames (``NAME`` or ``NAME.png``).

    An animation of another program has the mean rate of its delays; a folder of one has none, which is 0. Raises
    StateError for what is missing, no clip, damaged, or larger than ``limits`` allow."""
    with open_clip(path) as clip:
        return clip.take(clip.count)[0], clip.rate or 0.0


@contextmanager
def open_clip(path: str | Path) -> Iterator[Clip]:
    """The clip in a file or folder; a frame is decoded when it is taken. Raises StateError, as ``read_video``."""
    path, asked = _there(path), f"reading {path}"
    with _opened(path, asked) as (kind, stream), guarded(asked, StateError, found=_DAMAGED):
        if stream is None:
            with stored.folder(path, asked) as clip:
                yield clip
            return
        size = path.stat().st_size
        if kind in _NO_CLIP:
            raise StateError(asked, f"its format is not known as that of a clip: {_NO_CLIP[kind]}", containers.USE)
        if kind == "npz":
            with stored.arrays(stream, size, asked) as clip:
                yield clip
        elif kind == "video" or not animations.known(kind):
            with containers.video(stream, size, asked) as clip:
                yield clip
        else:
            with animations.animation(stream, size, kind, asked) as clip:
                card = cards.of_picture(path, asked) if kind == "gif" else None
                yield clip if card is None else _spread(clip, card)


def is_picture(path: str | Path) -> bool:
    """Is it to be read as one picture? Raises StateError where there is no such file, or the animation is damaged."""
    path, asked = _there(path), f"reading {path}"
    with _opened(path, asked) as (kind, _):
        pass
    if kind in ("gif", "webp", "avif"):
        with open_clip(path) as clip:
            return clip.count == 1
    return kind == "picture"


def _there(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix.lower() == ".png" and not os.path.exists(path) and os.path.isdir(path.with_suffix("")):
        return path.with_suffix("")
    return path


@contextmanager
def _opened(path: Path, asked: str) -> Iterator[tuple[Kind, BinaryIO | None]]:
    try:
        stream = None if os.path.isdir(path) else open_ordinary(path)
    except FileNotFoundError:
        found = "it is a link to what is not there" if os.path.islink(path) else "there is no such file"
        raise StateError(asked, found, "Check the path") from None
    except (OSError, ValueError) as e:
        raise StateError(asked, f"it cannot be read ({said(e).lower()})", "Check the path") from None
    try:
        try:
            kind = kind_of(path, stream)
        except OSError as e:
            raise StateError(asked, f"it cannot be read ({said(e).lower()})", "Check its disk") from None
        yield kind, stream
    finally:
        if stream is not None:
            stream.close()


def _card(path: Path, kind: Kind, stream: BinaryIO | None, asked: str) -> Card | None:
    if kind == "folder":
        frames = stored.frames_in(path)
        return cards.of_picture(frames[0], asked) if frames else None
    assert stream is not None
    if kind in ("picture", "gif", "apng"):
        return cards.of_picture(path, asked)
    if kind == "npz":
        with zipfile.ZipFile(stream) as archive:
            return cards.parse(stored.text(archive, "card", asked), asked)
    if kind == "text" or path.suffix.lower() == ".json":
        return cards.parse(read_bytes(path, asked, StateError), asked)
    if kind == "video":
        return cards.parse(containers.card_text(stream, asked, cards.KEY), asked)
    return None


def _spread(clip: Clip, card: Card) -> Clip:
    """A gif of ditkit's: equal neighbours were stored once, with the sum of their delays."""
    count, fps = card["frames"], float(card["fps"])
    check_clip(count, clip.width, clip.height, clip.size, clip.asked, StateError)

    def timed() -> Timed:
        stored, shown = iter(clip.timed), None
        following = next(stored, None)
        for index in range(count):
            begins = round(index * 100 / fps) / 100
            if clip.seconds is None or begins > clip.seconds - 0.001:
                found = f"it has fewer frames than the {count} that its card says"
                raise StateError(clip.asked, found, "Write it again")
            while following is not None and following[0] <= begins + 0.001:
                shown, following = following[1], next(stored, None)
            assert shown is not None
            yield index / fps, shown

    return replace(clip, count=count, rate=fps, seconds=count / fps, timed=timed())
