"""Clips with their cards, made again (``replay``), and pictures."""

from __future__ import annotations

import io
import json

import numpy as np
from PIL import Image

from ditkit import media, replay
from ditkit.media import card as cards

from .. import bases
from ..mutate import Raw, as_json, bytes_mutated, copied, entry_mutated, put, tree_mutated
from ..watch import command

NAMED = ("clip", "picture", "replay")
CLIPS = ("c.mp4", "c.gif", "c.npz", "c/0000.png")


def prepare(folder):
    global CLIP, CARD, VIDEO, PICTURES
    pipe, CLIP = bases.pipeline(folder, "t2v"), folder / "clip"
    result = pipe("a red circle", seed=1, **{**bases.SIZE, "steps": 2})
    VIDEO = result.videos[0]
    for suffix in ("gif", "npz", "mp4", "png"):
        (CLIP / "c.json").unlink(missing_ok=True)
        result.save(CLIP / f"c.{suffix}")
    CARD = json.loads((CLIP / "c.json").read_text())
    PICTURES = dict(_pictures())


def _pictures():
    colours = Image.fromarray((np.arange(64 * 64 * 3) % 255).astype(np.uint8).reshape(64, 64, 3))
    for mode in ("RGB", "RGBA", "L", "P", "1", "CMYK", "I;16", "LA"):
        deep = Image.fromarray((np.arange(4096) * 16).astype(np.uint16).reshape(64, 64))
        image = deep if mode == "I;16" else colours.convert(mode)
        for kind in ("PNG", "TIFF", "WEBP", "JPEG", "GIF", "BMP"):
            out = io.BytesIO()
            try:
                image.save(out, kind)
            except (OSError, ValueError, KeyError):  # not every kind has every mode
                continue
            yield f"{mode}.{kind.lower()}", out.getvalue()


def _with_card(rng, folder, card: bytes) -> None:
    """A clip that carries ``card``, as it stands."""
    kind = rng.choice(("json", "json", "json", "mp4", "gif", "npz", "png"))
    if kind == "json" or len(card) > 60_000:
        put(folder / "c.json", card)
        return
    text, line = card.decode("utf-8", "surrogatepass").encode("ascii", "backslashreplace").decode(), cards.line
    cards.line = lambda _: text
    try:
        media.write_video(folder / f"c.{kind}", VIDEO, 16)
    finally:
        cards.line = line
    (folder / "c.json").unlink(missing_ok=True)


def _npz(rng) -> bytes:
    out, card, how = io.BytesIO(), np.array(cards.line(CARD)), rng.randrange(10)
    if how == 0:
        np.savez(out, video=np.array([{"a": 1}], dtype=object), fps=1.0, card=card)
    elif how == 1:
        np.savez(out, video=VIDEO, fps=np.array([1, 2]), card=card)
    elif how == 2:
        np.savez(
            out, video=VIDEO.astype(rng.choice((np.float32, np.int64, np.complex64, "U5", bool))), fps=1.0, card=card
        )
    elif how == 3:
        np.savez(out, video=VIDEO, fps=np.array("x"), card=np.array([str(card), "x"]))
    elif how == 4:
        np.savez(out, video=VIDEO[:, :, :, :1], fps=np.nan, card=np.array(str(card).encode()))
    elif how == 5:
        np.savez_compressed(out, video=np.zeros((40, 1000, 1000, 3), np.uint8), fps=1.0, card=card)
    elif how == 6:
        np.savez(out, a=VIDEO)
    elif how == 7:
        np.save(out, VIDEO)
    elif how == 8:
        np.savez(out, video=VIDEO[rng.choice((slice(0), 0))], fps=rng.choice((0, -1, 1e400, 16)), card=card)
    else:  # it claims terabytes
        np.savez(out, video=VIDEO, fps=1.0, card=card)
        shape = str(VIDEO.shape).encode()
        return out.getvalue().replace(
            shape + b", }", rng.choice((b"(999999, 99999, 9, 3)", b"(-1,)")).ljust(len(shape)) + b", }"
        )
    return out.getvalue()


def make(rng, folder) -> str:
    what = rng.choice(
        ("bytes", "bytes", "card", "card", "card", "manifest", "manifest", "manifest", "picture", "picture", "npz")
    )
    if what == "picture":
        name = rng.choice(sorted(PICTURES))
        path = put(folder / f"p.{name.partition('.')[2]}", bytes_mutated(rng, PICTURES[name], 16)[0])
        if rng.random() < 0.02:
            entry_mutated(rng, path)
        return "picture"
    if what == "bytes":
        name = rng.choice(CLIPS)
        if "/" in name:
            copied(CLIP / "c", folder / "c")
        put(folder / name, bytes_mutated(rng, (CLIP / name).read_bytes(), 16)[0])
        if rng.random() < 0.05:
            entry_mutated(rng, folder / name)
    elif what == "npz":
        put(folder / "c.npz", _npz(rng))
    elif what == "card":
        _with_card(rng, folder, as_json(tree_mutated(rng, {**CARD, "manifest": {"manifest": 1}})[0]))
    else:
        manifest = as_json(tree_mutated(rng, CARD["manifest"])[0]).decode("utf-8", "surrogatepass")
        _with_card(rng, folder, as_json({**CARD, "manifest": Raw(manifest)}))
    return rng.choice((*["clip"] * 30, "replay"))


def run(folder, how):
    path = next(iter(sorted(folder.iterdir())), folder / "c.mp4")
    if how == "picture":
        media.read_image(path)
    elif how == "replay":
        command("replay", path, "--quiet")
    else:
        try:
            script = replay.read(path)
            replay.machine_differences(script.manifest)
        finally:
            if path.suffix != ".json":
                media.read_video(path)
