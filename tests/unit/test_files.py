"""Opening tensors on disk: what is read, and a clear error for everything that can be wrong with the files."""

import hashlib
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ditkit.checkpoints.files.formats import kind_of
from ditkit.checkpoints.files.opening import open_source
from ditkit.checkpoints.files.pickles import PickleFile
from ditkit.checkpoints.files.safetensors import TensorFiles
from ditkit.checkpoints.files.stored import DTYPES
from ditkit.errors import LoadError


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "a.weight": torch.randn(3, 5, generator=generator),
        "a.bias": torch.randn(5, generator=generator).to(torch.bfloat16),
        "half": torch.randn(2, 1, 4, generator=generator).half(),
        "fp8": torch.randn(4, generator=generator).to(torch.float8_e4m3fn),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "nothing": torch.empty(0, 3),
    }


def sharded(folder: Path, base: str = "model") -> dict[str, dict[str, torch.Tensor]]:
    """Two shards and their index, as diffusers and transformers write them."""
    tensors = some_tensors()
    shards = {
        f"{base}-00001-of-00002.safetensors": {k: tensors[k] for k in ("a.weight", "half")},
        f"{base}-00002-of-00002.safetensors": {k: tensors[k] for k in ("a.bias", "count")},
    }
    for name, part in shards.items():
        save_file(part, folder / name)
    names = {key: name for name, part in shards.items() for key in part}
    (folder / f"{base}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return shards


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def says(*parts: str):
    """The block must raise a LoadError whose message has all these parts."""

    class Says:
        def __enter__(self):
            self.raises = pytest.raises(LoadError)
            self.info = self.raises.__enter__()

        def __exit__(self, *error):
            done = self.raises.__exit__(*error)
            for part in parts:
                assert part in str(self.info.value), f"{part!r} is not in {str(self.info.value)!r}"
            return done

    return Says()


def test_one_file_is_read_bit_for_bit(tmp_path):
    tensors = some_tensors()
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, {"format": "pt"})
    files = TensorFiles(file)
    with safe_open(file, "pt") as reference:
        assert set(files.tensors) == set(reference.keys())
        for name, info in files.tensors.items():
            part = reference.get_slice(name)
            assert (info.dtype, list(info.shape)) == (part.get_dtype(), part.get_shape())
    streamed = dict(files)
    for name, tensor in tensors.items():
        assert same(streamed[name], tensor)
        assert same(files[name], tensor)


def test_every_type_of_the_table_is_torchs(tmp_path):
    for name, dtype in DTYPES.items():
        tensor = torch.zeros(2, dtype=dtype)
        save_file({"x": tensor}, tmp_path / "x.safetensors")
        assert TensorFiles(tmp_path / "x.safetensors").tensors["x"].dtype == name
        assert TensorFiles(tmp_path / "x.safetensors")["x"].dtype == tensor.dtype


def test_opening_reads_no_data(tmp_path):
    """A file with a hole of 64 GB opens at once."""
    file = tmp_path / "x.safetensors"
    size = 64 * 2**30
    header = json.dumps({"x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(file, 8 + len(header) + size)
    assert TensorFiles(file).tensors["x"].shape == (size // 4,)


def test_loaded_tensors_are_no_view_of_the_file(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(1000)}, file)
    tensor = TensorFiles(file)["x"]
    file.write_bytes(b"\xff" * file.stat().st_size)
    assert torch.equal(tensor, torch.ones(1000))


def test_r3_all_shards_of_a_set_are_read(tmp_path):
    """A predecessor read the first shard only and left the rest of the model as it was."""
    shards = sharded(tmp_path)
    files = TensorFiles(tmp_path)
    expected = {key: tensor for part in shards.values() for key, tensor in part.items()}
    found = dict(files)
    assert found.keys() == expected.keys() == files.tensors.keys()
    assert all(same(found[key], expected[key]) for key in expected)
    assert [file.name for file in files.files] == sorted(shards)


def test_hashes_are_those_of_the_files_and_follow_changes(tmp_path):
    sharded(tmp_path)
    files = TensorFiles(tmp_path)
    assert files.sha256 == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files.files}
    before = files.fingerprint
    save_file({"a.weight": torch.zeros(3, 5), "half": torch.zeros(2, 1, 4)}, files.files[0])
    again = TensorFiles(tmp_path)
    assert again.sha256[files.files[0].name] == hashlib.sha256(files.files[0].read_bytes()).hexdigest()
    assert again.fingerprint != before


def test_a_hash_is_counted_once_while_the_file_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("ditkit.store.hashes.SETTLED", -1.0)  # as if the file were older
    save_file(some_tensors(), tmp_path / "x.safetensors")
    first = TensorFiles(tmp_path).sha256
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert TensorFiles(tmp_path).sha256 == first


def test_the_fingerprint_is_of_contents_not_of_names(tmp_path):
    for folder, name in (("a", "x"), ("b", "y"), ("c", "x")):
        (tmp_path / folder).mkdir()
        content = some_tensors() if folder != "c" else some_tensors() | {"a.weight": torch.zeros(3, 5)}
        save_file(content, tmp_path / folder / f"{name}.safetensors")
    a, b, c = (TensorFiles(tmp_path / folder).fingerprint for folder in "abc")
    assert a == b != c


def test_a_variant_is_chosen_by_name_and_the_plain_set_is_the_default(tmp_path):
    base = "diffusion_pytorch_model"
    save_file({"x": torch.zeros(1)}, tmp_path / f"{base}.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / f"{base}.fp16.safetensors")
    assert TensorFiles(tmp_path)["x"] == 0
    assert TensorFiles(tmp_path, variant="fp16")["x"] == 1
    with says("variant 'bf16'", "fp16, none"):
        TensorFiles(tmp_path, variant="bf16")
    os.remove(tmp_path / f"{base}.safetensors")
    with says("other variants (fp16)"):
        TensorFiles(tmp_path)
    with says("variant 'fp16' was given with a file"):
        TensorFiles(tmp_path / f"{base}.fp16.safetensors", variant="fp16")


def test_a_sharded_variant(tmp_path):
    sharded(tmp_path, "model.fp16")
    os.rename(tmp_path / "model.fp16.safetensors.index.json", tmp_path / "model.safetensors.index.fp16.json")
    assert len(TensorFiles(tmp_path, variant="fp16").tensors) == 4


def test_a_missing_folder_and_a_missing_file(tmp_path):
    with says("nowhere", "there is no such folder"):
        TensorFiles(tmp_path / "nowhere")
    with says("Wan2.1-T2V-1.3B", "there is no such folder"):
        TensorFiles(tmp_path / "Wan2.1-T2V-1.3B")
    with says("x.safetensors", "there is no such file"):
        TensorFiles(tmp_path / "x.safetensors")


def test_a_folder_without_weights(tmp_path):
    with says("it holds no .safetensors file, and no .bin"):
        TensorFiles(tmp_path)
    with says("it holds no .safetensors file"):
        open_source(tmp_path)


def test_other_formats_are_not_safetensors(tmp_path):
    torch.save({}, tmp_path / "pytorch_model.bin")
    with says("pytorch_model.bin", "it is a checkpoint of torch, not safetensors", "Convert it to safetensors"):
        TensorFiles(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with says("it is a GGUF file, not safetensors"):
        TensorFiles(tmp_path / "model.gguf")


def test_the_format_is_told_by_content_not_by_name(tmp_path):
    tensors = {"x": torch.ones(3)}
    torch.save(tensors, tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.pth")
    sources = [open_source(tmp_path / name) for name in ("a.safetensors", "b.pth")]
    assert [type(source) for source in sources] == [PickleFile, TensorFiles]
    assert all(same(source["x"], tensors["x"]) for source in sources)
    with says("it is a checkpoint of torch, not safetensors"):
        TensorFiles(tmp_path / "a.safetensors")


@pytest.mark.parametrize("mark", [b"PK\x03\x04", b"GGUF", b"\x80\x02\x00\x00"])
def test_a_header_whose_length_looks_like_the_mark_of_another_format(tmp_path, mark):
    length = struct.unpack("<Q", mark + b"\0" * 4)[0]
    head = struct.pack("<Q", length) + b"{"
    (tmp_path / "x").write_bytes(head)
    assert kind_of(tmp_path / "x") == "safetensors"


def test_safetensors_are_taken_where_a_pickle_holds_the_same(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    torch.save({"x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert open_source(tmp_path)["x"] == 1


def test_a_folder_with_one_pickle_and_with_two(tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    torch.save({"x": torch.zeros(1)}, tmp_path / "pytorch_model.fp16.bin")
    assert open_source(tmp_path)["x"] == 1
    assert open_source(tmp_path, variant="fp16")["x"] == 0
    torch.save({"x": torch.ones(1)}, tmp_path / "other.pt")
    with says("2 sets of weights could be meant (other.pt, pytorch_model.bin)"):
        open_source(tmp_path)


def test_an_entry_of_a_file_without_entries(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with says("no name of its tensors begins with 'ema.'"):
        open_source(tmp_path, entry="ema")


def test_metadata_of_a_file_and_of_shards(tmp_path):
    for n, notes in ((1, {"format": "pt", "part": "a"}), (2, {"format": "pt", "part": "b"}), (3, {"format": "pt"})):
        save_file({f"x{n}": torch.ones(1)}, tmp_path / f"model-0000{n}-of-00003.safetensors", notes)
    names = {f"x{n}": f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert open_source(tmp_path).metadata == {"format": "pt", "part": ("a", "b")}
    assert TensorFiles(tmp_path / names["x1"]).metadata == {"format": "pt", "part": "a"}


def test_two_sets_of_weights(tmp_path):
    sharded(tmp_path)
    save_file(some_tensors(), tmp_path / "other.safetensors")
    with says("2 sets of weights could be meant (model.safetensors.index.json, other.safetensors)"):
        TensorFiles(tmp_path)
    assert len(TensorFiles(tmp_path / "model.safetensors.index.json").tensors) == 4


def test_a_shard_that_the_index_names_is_absent(tmp_path):
    sharded(tmp_path)
    os.remove(tmp_path / "model-00002-of-00002.safetensors")
    with says("1 of them are not there (model-00002-of-00002.safetensors)"):
        TensorFiles(tmp_path)


def test_shards_without_an_index(tmp_path):
    sharded(tmp_path)
    os.remove(tmp_path / "model.safetensors.index.json")
    with says("2 shards are named by no index", "model-00001-of-00002.safetensors"):
        TensorFiles(tmp_path)


def test_index_and_shards_disagree(tmp_path):
    sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    right = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": right | {"ghost": "model-00001-of-00002.safetensors"}}))
    with says("1 tensors of the index are not in their shard (ghost in model-00001-of-00002.safetensors)"):
        TensorFiles(tmp_path)
    index.write_text(json.dumps({"weight_map": {k: v for k, v in right.items() if k != "half"}}))
    with says("1 tensors that the index does not name (half in model-00001-of-00002.safetensors)"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds a list"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": 1}}', "no weight_map"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "names ../x.safetensors"),
        ('{"weight_map": {"a": "x.bin"}}', "names x.bin"),
    ],
)
def test_a_bad_index(tmp_path, content, part):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with says("model.safetensors.index.json", part):
        TensorFiles(tmp_path)


def test_truncated_and_empty_files(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(some_tensors(), file)
    whole = file.read_bytes()
    for length, part in (
        (0, "it is empty (0 bytes)"),
        (5, "it has only 5 bytes"),
        (8, "too few for a header"),
        (100, "too few for a header"),
        (len(whole) - 1, f"it has {len(whole) - 1} bytes where its header asks for {len(whole)}"),
    ):
        file.write_bytes(whole[:length])
        with says(str(file), part, "Download the file again"):
            TensorFiles(file)
    file.write_bytes(whole + b"x")
    with says(f"it has {len(whole) + 1} bytes"):
        TensorFiles(file)


def write_header(file: Path, header: object, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "part"),
    [
        (b"not json", "header cannot be understood"),
        (b"\xff\xfe", "header cannot be understood"),
        ([], "header cannot be understood"),
        ({"a": 1}, "header cannot be understood"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "header cannot be understood"),
        ({"a": entry([3], 0, 8)}, "do not fit its shape [3]"),
        ({"a": entry([1], 4, 8)}, "do not fit"),
        ({"a": entry([-1, -2], 0, 8)}, "do not fit"),
        ({"a": entry([1], 0, 4), "b": entry([1], 0, 4), "c": entry([1], 4, 8)}, "do not fit"),
        (b'{"a": %s, "a": %s}' % ((json.dumps(entry([2], 0, 8)).encode(),) * 2), "a name appears twice"),
        ({"a": entry([2], 0, 8, "F4")}, "a is stored as F4"),
        ({"a": entry([1], 0, 4)}, "bytes where its header asks for"),
        ({}, "bytes where its header asks for"),
    ],
)  # fmt: skip
def test_a_corrupt_header(tmp_path, header, part):
    write_header(tmp_path / "x.safetensors", header, b"12345678")
    with says("x.safetensors", part):
        TensorFiles(tmp_path)


def test_a_file_without_tensors(tmp_path):
    write_header(tmp_path / "x.safetensors", {})
    with says("it holds no tensors"):
        TensorFiles(tmp_path)


def test_a_header_longer_than_the_file(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with says("too few for a header of 9223372036854775808"):
        TensorFiles(tmp_path)


def test_a_file_cut_while_it_is_open(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(1000)}, file)
    files = TensorFiles(file)
    os.truncate(file, 200)
    with says("reading x from", "the file became shorter"):
        dict(files)


@settings(deadline=None)
@given(position=st.integers(0, 400), byte=st.integers(0, 255))
def test_a_flipped_byte_never_opens_what_the_library_refuses(tmp_path_factory, position, byte):
    file = tmp_path_factory.mktemp("flip") / "x.safetensors"
    save_file(some_tensors(), file)
    content = bytearray(file.read_bytes())
    content[position % len(content)] = byte
    file.write_bytes(content)
    try:
        ours = dict(TensorFiles(file))
    except LoadError:
        return
    try:
        with safe_open(file, "pt") as reference:
            assert ours.keys() == set(reference.keys())
            assert all(same(ours[name], reference.get_tensor(name)) for name in ours)
    except SafetensorError as error:  # pragma: no cover - the failure this test is for
        pytest.fail(f"opened a file that safetensors refuses: {error}")
