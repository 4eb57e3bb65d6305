"""GGUF: every type against the library's own numbers, names, shapes and damaged files."""

import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from ditkit.checkpoints.files import gguf as ours
from ditkit.checkpoints.files.gguf import BLOCKS, GGUFFile
from ditkit.checkpoints.files.opening import open_source
from ditkit.checkpoints.kinds.umt5 import umt5_keys
from ditkit.checkpoints.load import load_into
from ditkit.checkpoints.views.quantized import Dequantized
from ditkit.errors import LoadError, MissingDependency

gguf = pytest.importorskip("gguf")
Type = gguf.GGMLQuantizationType
WRITES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # the library quantises these; of the others it reads only


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def blocks(kind: str, *shape: int) -> np.ndarray:
    """Bytes of the type: quantised where the library can, else random codes with small scales of their own."""
    code = Type[kind]
    if kind in WRITES or kind in ("F16", "F32", "BF16"):
        return gguf.quants.quantize(numbers(*shape), code)
    raw = np.random.default_rng(5).integers(0, 256, gguf.quants.quant_shape_to_byte_shape(shape, code), np.uint8)
    width = gguf.GGML_QUANT_SIZES[code][1]
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]
    for place in halves:  # the float16 scales of a block; random bytes would give infinities
        raw.reshape(-1, width)[:, place : place + 2] = np.array([0.01], np.float16).view(np.uint8)
    return raw


def written(path: Path, tensors: dict[str, tuple[str, np.ndarray]], architecture: str = "wan", **fields: list) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields.items():
        writer.add_array(name, value)
    for name, (kind, data) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=Type[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_are_the_librarys_numbers(tmp_path, monkeypatch, kind, dtype):
    monkeypatch.setattr(ours, "CHUNK", 600)  # so that a tensor takes several parts
    data = blocks(kind, 6, 512)
    file = GGUFFile(written(tmp_path / "x.gguf", {"a.weight": (kind, data), "a.bias": ("F32", numbers(6))}))
    assert file.tensors["a.weight"].dtype == kind
    assert file["a.weight"].numpy().tobytes() == data.tobytes()
    source = Dequantized(file)
    assert source.quantization == f"gguf {kind}"
    assert (source.tensors["a.weight"].dtype, source.tensors["a.weight"].shape) == ("F32", (6, 512))
    loaded = {name: source.cast(name, dtype if name == "a.weight" else None) for name in source.tensors}
    expected = torch.from_numpy(gguf.quants.dequantize(data, Type[kind]))
    assert expected.isfinite().all()
    assert loaded["a.weight"].dtype == dtype
    assert torch.equal(loaded["a.weight"], expected.to(dtype))
    assert torch.equal(loaded["a.bias"], torch.from_numpy(numbers(6)))


@pytest.mark.parametrize("kind", WRITES)
def test_the_numbers_are_close_to_what_was_quantised(tmp_path, kind):
    """Against the original, so that reversed axes or a wrong block order would show."""
    path = written(tmp_path / "x.gguf", {"a.weight": (kind, blocks(kind, 6, 512))})
    error = Dequantized(GGUFFile(path))["a.weight"] - torch.from_numpy(numbers(6, 512))
    assert error.norm() / np.linalg.norm(numbers(6, 512)) < 0.1


def test_plain_types_are_bit_equal(tmp_path):
    data = numbers(4, 6)
    tensors = {kind: (kind, gguf.quants.quantize(data, Type[kind])) for kind in ("F32", "F16", "BF16")}
    source = Dequantized(GGUFFile(written(tmp_path / "x.gguf", tensors)))
    assert source.quantization is None
    for kind, dtype in (("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)):
        assert source.tensors[kind].dtype == kind
        assert source[kind].dtype == dtype
        assert torch.equal(source[kind], torch.from_numpy(data).to(dtype))


def test_shapes_are_torchs_and_the_original_shape_counts(tmp_path):
    data = numbers(8, 4, 2, 16)
    five = numbers(8, 128)
    tensors = {"conv": ("F32", data), "patch_embedding.weight": ("Q8_0", gguf.quants.quantize(five, Type.Q8_0))}
    shape = [8, 16, 1, 2, 4]
    path = written(tmp_path / "x.gguf", tensors, **{"comfy.gguf.orig_shape.patch_embedding.weight": shape})
    source = Dequantized(GGUFFile(path))
    assert torch.equal(source["conv"], torch.from_numpy(data))
    assert source.tensors["patch_embedding.weight"].shape == (8, 16, 1, 2, 4)
    found = source["patch_embedding.weight"]
    assert (found.reshape(8, 128) - torch.from_numpy(five)).abs().max() < 0.02
    wrong = {"comfy.gguf.orig_shape.conv": [3, 3]}
    with pytest.raises(LoadError, match=r"conv has the shape \[8, 4, 2, 16\] and the original shape \[3, 3\]"):
        GGUFFile(written(tmp_path / "y.gguf", {"conv": ("F32", data)}, **wrong))


def test_the_type_of_most_tensors_names_the_quantisation(tmp_path):
    tensors = {f"{n}.weight": ("Q4_0", blocks("Q4_0", 2, 32)) for n in range(3)}
    tensors |= {"x.weight": ("Q8_0", blocks("Q8_0", 2, 32)), "y": ("F32", numbers(3))}
    assert Dequantized(GGUFFile(written(tmp_path / "x.gguf", tensors))).quantization == "gguf Q4_0"


T5 = {
    "token_embd.weight": "shared.weight", "enc.output_norm.weight": "encoder.final_layer_norm.weight",
    **{f"enc.blk.0.attn_{x}.weight": f"encoder.block.0.layer.0.SelfAttention.{x}.weight" for x in "qkvo"},
    "enc.blk.0.attn_rel_b.weight": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "enc.blk.0.attn_norm.weight": "encoder.block.0.layer.0.layer_norm.weight",
    "enc.blk.0.ffn_norm.weight": "encoder.block.0.layer.1.layer_norm.weight",
    "enc.blk.0.ffn_gate.weight": "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
    "enc.blk.0.ffn_up.weight": "encoder.block.0.layer.1.DenseReluDense.wi_1.weight",
    "enc.blk.0.ffn_down.weight": "encoder.block.0.layer.1.DenseReluDense.wo.weight",
}  # fmt: skip


@pytest.mark.parametrize("architecture", ["t5", "t5encoder"])
def test_a_text_encoder_has_transformers_names(tmp_path, architecture):
    tensors = {name: ("F32", np.full((2, 2), n, np.float32)) for n, name in enumerate(T5)}
    source = open_source(written(tmp_path / "x.gguf", tensors, architecture))
    assert {name: int(tensor[0, 0]) for name, tensor in source} == {name: n for n, name in enumerate(T5.values())}
    assert source.tensors.keys() <= set(umt5_keys(1).to_other.values()), "the names of the key table"
    assert len(source.tensors) == len(umt5_keys(1).to_other)


def test_names_that_are_no_t5_stay_and_wan_is_not_renamed(tmp_path):
    tensors = {"dec.blk.0.attn_q.weight": ("F32", numbers(2)), "token_embd.weight.x": ("F32", numbers(2))}
    assert open_source(written(tmp_path / "x.gguf", tensors, "t5")).tensors.keys() == tensors.keys()
    tensors = {"token_embedding.weight": ("F32", numbers(2))}
    assert open_source(written(tmp_path / "y.gguf", tensors)).tensors.keys() == tensors.keys()


def test_a_module_loads_and_a_block_type_never_by_itself(tmp_path):
    module = nn.Linear(64, 4)
    tensors = {"weight": ("Q8_0", blocks("Q8_0", 4, 64)), "bias": ("F32", numbers(4))}
    file = GGUFFile(written(tmp_path / "x.gguf", tensors))
    load_into(module, Dequantized(file), dtype_of=lambda name: torch.bfloat16)
    expected = torch.from_numpy(gguf.quants.dequantize(tensors["weight"][1], Type.Q8_0)).bfloat16()
    assert torch.equal(module.weight, expected)


def test_long_lists_are_no_metadata(tmp_path):
    fields = {"tokenizer.ggml.tokens": [f"t{n}" for n in range(1000)], "short": [1, 2]}
    metadata = GGUFFile(written(tmp_path / "x.gguf", {"a": ("F32", numbers(2))}, **fields)).metadata
    assert metadata["general.architecture"] == "wan"
    assert metadata["short"] == [1, 2]
    assert "tokenizer.ggml.tokens" not in metadata


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(LoadError) as error:
        open_source(path)
    for part in (str(path), *parts):
        assert part in str(error.value), f"{part!r} is not in {str(error.value)!r}"


def test_other_architectures_types_and_doubled_names(tmp_path):
    one = {"a": ("F32", numbers(2))}
    assert GGUFFile(written(tmp_path / "a.gguf", one, "pig")).tensors.keys() == {"a"}
    odd = {"a": ("IQ4_NL", np.zeros((2, 18), np.uint8))}
    refused(written(tmp_path / "b.gguf", odd), "a is stored as IQ4_NL", "Q4_K")
    two = {"shared.weight": ("F32", numbers(2)), "token_embd.weight": ("F32", numbers(2))}
    refused(written(tmp_path / "c.gguf", two, "t5"), "two tensors would be shared.weight")
    refused(written(tmp_path / "d.gguf", {}), "it holds no tensors")


def test_damaged_files(tmp_path):
    fields = {"tokens": [f"t{n}" for n in range(100)], "scores": [float(n) for n in range(100)]}
    tensors = {"a": ("F32", numbers(64)), "b": ("Q8_0", blocks("Q8_0", 2, 64))}
    whole = written(tmp_path / "x.gguf", tensors, **fields).read_bytes()
    GGUFFile(tmp_path / "x.gguf")
    data = len(whole) - 64 * 4 - 2 * 2 * 34 - 24  # padded to a multiple of 32
    for length in (8, 12, 40, 100, 500, data, len(whole) - 60):
        (tmp_path / "y.gguf").write_bytes(whole[:length])
        refused(tmp_path / "y.gguf", "Download the file again")
    for content in (b"GGUF" + b"\xff" * 200, b"GGUF\x03\0\0\0" + b"\xff" * 200, b"GGUF\0\0\0\x03" + b"\0" * 90):
        (tmp_path / "y.gguf").write_bytes(content)
        refused(tmp_path / "y.gguf", "it cannot be read as GGUF")


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 400), byte=st.integers(0, 255))
def test_a_changed_byte_gives_what_the_library_reads_or_a_clear_error(tmp_path, position, byte):
    file = tmp_path / "x.gguf"
    fields = {"short": [1, 2], "long": [f"t{n}" for n in range(70)]}
    if not file.exists():
        written(file, {"a": ("F32", numbers(2, 3)), "b": ("Q8_0", blocks("Q8_0", 2, 64))}, **fields)
    content = bytearray(file.read_bytes())
    content[position % len(content)] = byte
    changed = tmp_path / "y.gguf"
    changed.write_bytes(content)
    try:
        ours = GGUFFile(changed)
    except LoadError:
        return
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(changed).tensors}
    assert ours.tensors.keys() == theirs.keys()
    for name, info in ours.tensors.items():
        assert (info.start, info.size) == (theirs[name].data_offset, theirs[name].n_bytes)
        assert list(info.shape) == theirs[name].shape.tolist()[::-1]


def test_a_large_vocabulary_is_passed_over_quickly(tmp_path):
    """The library's own reader takes seconds and half a gigabyte for the fields of a UMT5 file."""
    fields = {"tokenizer.ggml.tokens": ["word"] * 20_000, "tokenizer.ggml.scores": [0.5] * 20_000}
    path = written(tmp_path / "x.gguf", {"token_embd.weight": ("F32", numbers(2))}, "t5encoder", **fields)
    tracemalloc.start()
    assert GGUFFile(path).tensors.keys() == {"shared.weight"}
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_tensors_have_memory_of_their_own(tmp_path):
    path = written(tmp_path / "x.gguf", {"a": ("F32", numbers(8))})
    tensor = GGUFFile(path)["a"]
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert torch.equal(tensor, torch.from_numpy(numbers(8)))


def test_without_the_library_the_error_gives_the_install_line(tmp_path, monkeypatch):
    path = written(tmp_path / "x.gguf", {"a": ("F32", numbers(2))})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependency, match=r'Run: pip install "ditkit\[gguf\]"'):
        open_source(path)
