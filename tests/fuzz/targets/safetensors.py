"""Weights in safetensors: opened, read, cast, inspected."""

from __future__ import annotations

import json
import struct

import torch

from ditkit.checkpoints.files.opening import open_source

from .. import bases
from ..mutate import INTS, Raw, as_json, bytes_mutated, entry_mutated, put, tree_mutated
from ..watch import command

NAMED = ("open", "inspect")


def prepare(folder):
    global WHOLE, TREE, DATA
    WHOLE = (bases.model(folder, "t2v", "diffusers") / "text_encoder" / "model.safetensors").read_bytes()
    header, data = parts(WHOLE)
    first = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])[:5]
    TREE = {"__metadata__": {"format": "pt"}, **{name: header[name] for name in first}}
    DATA = data[: header[first[-1]]["data_offsets"][1]]


def parts(data: bytes):
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _crafted(rng) -> bytes:
    tree = json.loads(json.dumps(TREE))
    name = rng.choice([n for n in tree if n != "__metadata__"])
    each, how = tree[name], rng.randrange(11)
    if how == 0:
        each["data_offsets"] = rng.choice(
            ([0, 0], [-4, 4], [each["data_offsets"][0], 2**63], [0], [0, 1, 2], "0", [0, 4.0])
        )
    elif how == 1:
        each["shape"] = rng.choice(([2**62, 4, 0], [2**32, 2**32], [True, True], [-1], [1.5], "ab", [[1]], [None]))
    elif how == 2:
        each["shape"] = [Raw("1" + "0" * 4000)] * rng.choice((1, 50, 200))
    elif how == 3:
        each["shape"] = [1] * rng.choice((65, 1000, 100_000)) + each["shape"]
    elif how == 4:
        each["dtype"] = rng.choice(("F8_E4M3", "C64", "BOOL", "U16", "F4", "F6_E2M3", "", "float32", "F64", "I64"))
    elif how == 5:
        tree[f"{name}\x1b]0;title\x07\x1b[31m"] = tree.pop(name)
    elif how == 6:
        odd = ({"a": 1}, [], "x", {"a": {"b": 1}}, {"x": "\x1b[2J"}, {"lora_adapter_metadata": "{"})
        deep = ({"ditkit.state": "[" * 100_000}, {"quantization_config": "[" * 3000})
        tree["__metadata__"] = rng.choice((*odd, *deep))
    elif how == 7:
        end = len(DATA)
        tree |= {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [end, end]} for n in range(2000)}
    elif how == 8:
        tree |= {f"blocks.{n}.self_attn.q.weight": each for n in range(rng.choice((1, 400)))}
    elif how == 9:
        tree[rng.choice(("", "a" * 5000, "..", "weight", "model.diffusion_model.x"))] = tree.pop(name)
    else:
        return bytes_mutated(rng, as_json(tree))[0]
    return as_json(tree)


def make(rng, folder) -> str:
    path, how = folder / "weights.safetensors", rng.randrange(9)
    if how < 2:
        data = bytes_mutated(rng, joined(json.dumps(TREE).encode(), DATA))[0]
    elif how < 5:
        data = joined(as_json(tree_mutated(rng, TREE)[0]), DATA)
    elif how < 7:
        data = joined(_crafted(rng), DATA)
    elif how == 7:
        data = struct.pack("<Q", rng.choice(INTS)) + json.dumps(TREE).encode() + DATA
    else:
        data = bytes_mutated(rng, WHOLE, 32)[0]
    put(path, data)
    if rng.random() < 0.02:
        entry_mutated(rng, path)
    return rng.choice((*["open"] * 30, "inspect"))


def run(folder, how):
    path = folder / "weights.safetensors"
    if how == "inspect":
        command("inspect", path)
        return
    source = open_source(path)
    repr(source), dict(source.metadata), source.sketch
    for _ in source:
        pass
    for name in list(source.tensors)[:3]:
        source.cast(name, torch.bfloat16)
