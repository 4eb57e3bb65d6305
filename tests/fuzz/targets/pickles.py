"""Checkpoints of torch: archives and old files, pickles that call what they should not, that refer to themselves, that
claim much. None of what they name may run."""

from __future__ import annotations

import builtins
import collections
import io
import os
import pickle
import shutil
import struct
import subprocess
import warnings
import zipfile

import torch

from ditkit.checkpoints.files.opening import open_source

from ..mutate import INTS, bytes_mutated, entry_mutated, put
from ..watch import command

NAMED = ("open", "entry", "inspect")


class Call:
    """Whoever loads it calls ``what``."""

    def __init__(self, what, *args):
        self.what, self.args = what, args

    def __reduce__(self):
        return self.what, self.args


def prepare(folder):
    global BASES, WEIGHT
    torch.manual_seed(0)
    WEIGHT = torch.randn(4, 6)
    good = {"a.weight": WEIGHT, "b.bias": torch.arange(5), "view": WEIGHT.T, "c": torch.zeros(0),
            "h": torch.ones(3, dtype=torch.bfloat16)}  # fmt: skip
    BASES = [
        _saved(good), _saved({"generator": good, "generator_ema": good, "critic": {"x": WEIGHT}, "step": 3}),
        _saved(collections.OrderedDict(good)), _saved({"model": good, "opt": {"lr": 0.1, "n": [1, 2]}}),
        _saved({"p": torch.nn.Parameter(WEIGHT)}), _saved(good, _use_new_zipfile_serialization=False),
        _saved({"q": torch.sparse_coo_tensor([[0], [1]], [1.0], (2, 2), check_invariants=False)}),
        _saved({"z": torch.randn(2, dtype=torch.complex64).conj()}),
    ]  # fmt: skip


def _saved(value, **more) -> bytes:
    out = io.BytesIO()
    try:
        torch.save(value, out, **more)
    except (TypeError, AttributeError):  # torch will not write it
        return _archive(pickle.dumps(str(value), 2))
    return out.getvalue()


def _archive(data: bytes, records=None, order=b"little", packed=zipfile.ZIP_STORED, name="archive") -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", packed) as archive:
        warnings.simplefilter("ignore")
        archive.writestr(f"{name}/data.pkl", data)
        archive.writestr(f"{name}/byteorder", order)
        for member, content in records or [("data/0", bytes(96)), ("version", b"3\n")]:
            archive.writestr(member if "/" in member and member.startswith("/") else f"{name}/{member}", content)
    return out.getvalue()


def _calling(rng) -> bytes:
    mark = os.path.join(os.getcwd(), "ran")
    what = rng.choice((
        Call(os.system, f"touch {mark}"), Call(eval, f"open({mark!r}, 'w')"), Call(exec, f"open({mark!r}, 'w')"),
        Call(subprocess.Popen, ["touch", mark]), Call(torch.load, mark), Call(getattr, torch, "nn"),
        Call(open, mark, "w"),
        Call(bytearray, rng.choice((10, 10**9, 10**12))), Call(shutil.rmtree, os.path.dirname(mark)),
        Call(builtins.__import__, "antigravity"), Call(torch.hub.load, "a/b", "c"), Call(torch.empty, 10**12),
        Call(str.join, "a", ["b"] * 10), Call(map, print, [1]),
    ))  # fmt: skip
    return _saved({"a": what, "b": WEIGHT})


def _nested(rng) -> bytes:
    how = rng.randrange(7)
    if how < 2:
        value = {"w": WEIGHT} if how else {"w": 1}
        for _ in range(rng.choice((10, 16, 25, 60))):
            value = {"x": value, "y": value}
    elif how == 2:
        value = {"w": WEIGHT}
        value["self"] = value
    elif how == 3:
        value = [WEIGHT]
        value.append(value)
        value = {"w": value}
    elif how == 4:
        value = inner = {}
        for _ in range(rng.choice((50, 300, 900))):
            inner["x"] = {}
            inner = inner["x"]
        inner["w"] = WEIGHT
    elif how == 5:
        value = {str(i): {"w": WEIGHT} for i in range(rng.choice((100, 5000)))}
    else:
        value = dict.fromkeys((1, 2.5, None, True, b"a", (1, 2)), WEIGHT)
    try:
        return _saved(value)
    except RecursionError:
        return BASES[0]


def _stream(rng) -> bytes:
    """A pickle that no pickler writes."""
    return _archive(rng.choice((
        lambda: pickle.dumps({"a": [0] * 10}, 2) + b"....", lambda: rng.randbytes(200),
        lambda: b"\x80\x02" + b"(" * rng.choice((10, 100_000)) + b".", 
        lambda: b"\x80\x02" + b"]" * 1000 + b"a" * 999 + b".",
        lambda: b"\x80\x02\x8b" + struct.pack("<i", rng.choice((2**31 - 1, -1, 100))) + b"a.",
        lambda: b"\x80\x04\x8d" + struct.pack("<Q", rng.choice(INTS)) + b"abc.",
        lambda: b"\x80\x02r" + struct.pack("<I", 2**31 - 1) + b".", lambda: b"\x80\x05\x97.", lambda: b".", lambda: b"",
        lambda: b"\x80\x02X" + struct.pack("<I", 3) + b"\xff\xfe\xfd.", lambda: b"I" + b"9" * 5000 + b"\n.",
    ))())  # fmt: skip


def _packed(rng) -> bytes:
    """The archive around it changed."""
    base, how = bytearray(rng.choice(BASES[:5])), rng.randrange(7)
    entries, at = [], base.find(b"PK\x01\x02")
    while at >= 0:
        entries.append(at)
        at = base.find(b"PK\x01\x02", at + 4)
    if how == 0:  # encrypted
        for at in entries:
            base[at + 8] |= 1
    elif how < 3:
        at, width = (
            rng.choice(entries) + rng.choice((6, 8, 10, 12, 16, 20, 24, 28, 30, 32, 34, 36, 38, 42)),
            rng.choice((2, 4)),
        )
        base[at : at + width] = (rng.choice(INTS) & (256**width - 1)).to_bytes(width, "little")
    elif how == 3:
        at = base.rfind(b"PK\x05\x06") + rng.choice((4, 6, 8, 10, 12, 16, 20))
        base[at : at + 4] = (rng.choice(INTS) & 0xFFFFFFFF).to_bytes(4, "little")
    elif how == 4:
        names = rng.choice(
            (["../../x/data/0"], ["data/0", "data/0"], ["code/x"], ["constants.pkl"], ["/abs"], ["data.pkl"])
        )
        return _archive(pickle.dumps({}, 2), [(name, bytes(96)) for name in names])
    elif how == 5:
        return _archive(pickle.dumps({}, 2), order=rng.choice((b"big", b"", b"little\n", b"x" * 1000)))
    else:
        return _archive(
            pickle.dumps({"a": 1}, 2), packed=rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        )
    return bytes(base)


def _repickled(rng) -> bytes:
    source, out = zipfile.ZipFile(io.BytesIO(rng.choice(BASES[:5]))), io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for member in source.infolist():
            data = source.read(member)
            archive.writestr(
                member.filename, bytes_mutated(rng, data, 4)[0] if member.filename.endswith("data.pkl") else data
            )
    return out.getvalue()


def make(rng, folder) -> str:
    how = rng.choice(("bytes", _calling, _nested, _stream, _packed, _packed, _repickled, _repickled))
    data = bytes_mutated(rng, rng.choice(BASES), 16)[0] if how == "bytes" else how(rng)
    path = put(folder / "weights.pth", data)
    if rng.random() < 0.01:
        entry_mutated(rng, path)
    return rng.choice((*["open"] * 20, *["entry"] * 10, "inspect"))


def run(folder, how):
    path = folder / "weights.pth"
    try:
        if how == "inspect":
            command("inspect", path)
            return
        source = open_source(path, entry="generator" if how == "entry" else None)
        for _, tensor in source:
            tensor.sum()
        repr(source), source.sketch
    finally:
        if (folder / "ran").exists():
            raise SystemError("its code ran")
