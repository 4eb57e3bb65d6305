"""State files: read, checked, split, saved again, gone on from, and runs from them at the command line."""

from __future__ import annotations

import json
import struct

from ditkit import samples
from ditkit.checking import check_state
from ditkit.state import State

from .. import bases
from ..mutate import as_json, bytes_mutated, entry_mutated, put, tree_mutated
from ..watch import command

NAMED = ("load", "from")
HOWS = (*["load"] * 30, *["check"] * 30, "go", "go", "from", "from")


def prepare(folder):
    global MODEL, PIPE, WHOLE, PARTS
    MODEL, PIPE = bases.model(folder, "t2v", "diffusers"), bases.pipeline(folder, "t2v")
    WHOLE = [state.to_bytes() for state in bases.states(folder)]
    PARTS = [parts(data) for data in WHOLE]


def parts(data: bytes):
    """The header without its metadata, what the State says in plain values, the tensors."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    about = json.loads(header.pop("__metadata__")["ditkit.state"])
    return header, about, data[8 + size :]


def joined(header: dict, about: str, data: bytes) -> bytes:
    text = as_json({"__metadata__": {"ditkit.state": about}, **header})
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def mutated(rng, data: bytes) -> bytes:
    """Another State file: its bytes, its header or what it says changed."""
    how = rng.choice(("bytes", "header", "about", "about", "plain", "plain", "plain"))
    if how == "bytes":
        return bytes_mutated(rng, data, 16)[0]
    header, about, tensors = parts(data)
    if how == "header":
        header = tree_mutated(rng, header)[0]
        return joined(header if isinstance(header, dict) else {"a": header}, json.dumps(about), tensors)
    tree = about if how == "about" else about["plain"]
    text = as_json(tree_mutated(rng, tree)[0]).decode("utf-8", "surrogatepass")
    if how == "plain":
        text = f'{{"schema":1,"fingerprints":{json.dumps(about["fingerprints"])},"plain":{text}}}'
    return joined(header, text, tensors)


def make(rng, folder) -> str:
    path, how = folder / "half.safetensors", rng.choice(HOWS)
    if rng.random() < 0.02:
        entry_mutated(rng, path)
    else:
        put(path, mutated(rng, rng.choice(WHOLE)))
    return how


def run(folder, how):
    path = folder / "half.safetensors"
    if how == "from":
        command("run", "--from", path, "--model", MODEL, "--out", folder / "o.npz", "--no-sheet", "--quiet",
                "--save-state", folder / "o.safetensors")  # fmt: skip
        return
    state = State.load(path)
    repr(state)
    if how == "load":
        state.save(folder / "again.safetensors")
        if not State.load(folder / "again.safetensors").equal(state):
            raise AssertionError("it came back as another one")
    elif how == "check":
        check_state(state)
        samples.split(state)
    else:
        PIPE.run(state, stop_at_step=None if state.get("step") else 2)
