"""GGUF files: opened, all blocks read as numbers, inspected."""

from __future__ import annotations

import struct

import numpy as np

from ditkit.checkpoints.files.opening import open_source
from ditkit.checkpoints.views.quantized import Dequantized

from ..mutate import INTS, bytes_mutated, entry_mutated, put
from ..watch import command

NAMED = ("open", "inspect")


def prepare(folder):
    global BASES
    import gguf

    kinds, source = gguf.GGMLQuantizationType, np.random.default_rng(0)

    def numbers(*shape):
        return source.standard_normal(shape).astype(np.float32)

    def packed(kind, *shape):
        return kind, gguf.quants.quantize(numbers(*shape), kinds[kind])

    def raw(kind, *shape):
        return kind, source.integers(0, 256, gguf.quants.quant_shape_to_byte_shape(shape, kinds[kind]), np.uint8)

    def written(name, architecture, tensors, **fields):
        writer = gguf.GGUFWriter(folder / name, architecture)
        for key, value in fields.items():
            writer.add_array(key, value)
        for key, (kind, data) in tensors.items():
            writer.add_tensor(key, data, raw_dtype=kinds[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return (folder / name).read_bytes()

    many = {f"k{kind}": raw(kind, 2, 256) for kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")}
    plain = {
        "a.weight": packed("Q8_0", 4, 64),
        "b": ("F32", numbers(6)),
        "c": ("F16", numbers(2, 3).astype(np.float16)),
    }
    text = {"token_embd.weight": packed("Q4_0", 2, 32), "enc.blk.0.attn_q.weight": packed("Q5_1", 2, 32)}
    BASES = [
        written(
            "a.gguf", "wan", {**plain, **many}, **{"comfy.gguf.orig_shape.a.weight": [4, 8, 8], "v": list(range(100))}
        ),
        written("b.gguf", "t5", text, **{"tokenizer.ggml.tokens": ["a", "bb"] * 50}),
    ]


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _crafted(rng) -> bytes:
    big = rng.choice(INTS) & (2**64 - 1)
    head = b"GGUF" + struct.pack("<I", rng.choice((3, 3, 3, 2, 1, 0xFFFFFFFF)))
    architecture = _text(b"general.architecture") + struct.pack("<I", 8) + _text(b"wan")
    one = head + struct.pack("<QQ", 1, 1) + architecture
    how, data = rng.randrange(10), bytes(200)
    if how == 0:
        return head + struct.pack("<QQ", big, 1) + architecture
    if how == 1:
        return head + struct.pack("<QQ", 0, big) + architecture
    if how == 2:
        kind = rng.choice((0, 8, 9, 12, 77))
        return (
            head + struct.pack("<QQ", 0, 2) + architecture + _text(b"x") + struct.pack("<IIQ", 9, kind, big) + bytes(64)
        )
    if how == 3:
        alignment = _text(b"general.alignment") + struct.pack("<IQ", 10, big)
        return (
            head
            + struct.pack("<QQ", 1, 2)
            + architecture
            + alignment
            + _text(b"t")
            + struct.pack("<IQIQ", 1, 4, 0, 0)
            + data
        )
    if how == 4:
        return (
            one + _text(b"t") + struct.pack("<I", 8) + struct.pack("<8Q", *[big] * 8) + struct.pack("<IQ", 0, 0) + data
        )
    if how == 5:
        kind = rng.choice((0, 1, 2, 8, 16, 30, 39, 99))
        return one + _text(b"t") + struct.pack("<IQIQ", 1, 4, kind, big) + data
    if how == 6:  # many tensors over the same bytes
        count = rng.choice((10, 1000, 20_000))
        body = b"".join(_text(b"t%d" % n) + struct.pack("<IQIQ", 1, 4096, 0, 0) for n in range(count))
        return head + struct.pack("<QQ", count, 1) + architecture + body + bytes(17_000)
    if how == 7:
        shape = _text(b"comfy.gguf.orig_shape.t") + struct.pack("<IIQiii", 9, 5, 3, rng.choice((-1, 0, 2)), -2, 2)
        return (
            head
            + struct.pack("<QQ", 1, 2)
            + architecture
            + shape
            + _text(b"t")
            + struct.pack("<IQIQ", 1, 4, 0, 0)
            + data
        )
    if how == 8:
        return one + _text(b"\x1b[31m\x07") + struct.pack("<IQIQ", 1, 400, 0, 0) + data
    return (
        head
        + struct.pack("<QQ", 1, 1)
        + _text(b"general.architecture")
        + struct.pack("<I", 8)
        + _text(b"\x1b[2Jx")
        + data
    )


def make(rng, folder) -> str:
    data = _crafted(rng) if rng.random() < 0.35 else bytes_mutated(rng, rng.choice(BASES), 16)[0]
    path = put(folder / "weights.gguf", data)
    if rng.random() < 0.01:
        entry_mutated(rng, path)
    return rng.choice((*["open"] * 30, "inspect"))


def run(folder, how):
    path = folder / "weights.gguf"
    if how == "inspect":
        command("inspect", path)
        return
    source = open_source(path)
    dict(source.metadata), source.sketch
    for _ in Dequantized(source):
        pass
