"""Weights that are small and claim much: an error within seconds, in little memory, in a short sentence."""

import io
import json
import os
import pickle
import resource
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ditkit import limits
from ditkit.checkpoints.files.opening import open_source
from ditkit.checkpoints.files.pickles import PickleFile
from ditkit.checkpoints.files.safetensors import TensorFiles
from ditkit.errors import LoadError


def refused(file: Path, *parts: str, seconds: float = 8.0) -> None:
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LoadError) as error:
        open_source(file)
    assert time.process_time() - begun < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700_000  # KB
    for part in (str(file), *parts):
        assert part in str(error.value), f"{part!r} is not in {str(error.value)!r}"
    assert len(str(error.value)) < 3000


# --- pickles


def laughs(depth: int, leaf: object) -> object:
    for _ in range(depth):
        leaf = {"x": leaf, "y": leaf}
    return leaf


def saved(folder: Path, value: object) -> Path:
    torch.save(value, folder / "x.pth")
    return folder / "x.pth"


def archive(folder: Path, pickled: bytes, compress: int = zipfile.ZIP_STORED, **records: bytes) -> Path:
    with zipfile.ZipFile(folder / "x.pth", "w", compress) as file:
        for name, data in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", **records}.items():
            file.writestr(f"archive/{name}", data)
    return folder / "x.pth"


def test_dictionaries_that_share_dictionaries(tmp_path):
    refused(saved(tmp_path, laughs(62, {"w": 1})), "no dictionary that has names and tensors only")
    refused(saved(tmp_path, laughs(200, {"w": 1})), "more than 64 dictionaries within each other")
    found = PickleFile(saved(tmp_path, {"a": {"w": torch.ones(2)}} | {"deep": laughs(50, {"n": 1})}))
    assert found.entries == ("a",)


def test_one_state_dict_under_two_names_has_both(tmp_path):
    weights = {"w": torch.ones(2)}
    file = saved(tmp_path, {"generator": weights, "generator_ema": weights})
    assert PickleFile(file).entries == ("generator", "generator_ema")
    assert PickleFile(file).entry == "generator_ema"


def test_dictionaries_that_hold_themselves(tmp_path):
    around: dict = {"w": torch.ones(2)}
    around["self"] = around
    refused(saved(tmp_path, around), "no dictionary that has names and tensors only")
    inner = {"inner": {"w": torch.ones(2)}, "around": around}
    around["back"] = inner
    assert PickleFile(saved(tmp_path, inner)).entries == ("inner",)


def test_more_dictionaries_than_a_checkpoint_has(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "ENTRIES", 500)
    many = {f"n{i}": {"w": 1} for i in range(limits.ENTRIES + 1)}
    refused(archive(tmp_path, pickle.dumps(many, 2)), "more than 500 dictionaries")


def test_names_that_take_megabytes(tmp_path):
    refused(archive(tmp_path, pickle.dumps({"a": "x" * limits.PICKLE}, 2)), "its names take")


@pytest.mark.slow
def test_a_pickle_of_the_largest_size_in_its_worst_form(tmp_path):
    refused(archive(tmp_path, b"\x80\x02" + b"]" * (limits.PICKLE - 10) + b"."), str(tmp_path))


def test_a_pickle_may_not_ask_for_memory(tmp_path):
    for module in (b"__builtin__", b"builtins"):
        pickled = b"\x80\x02c" + module + b"\nbytearray\n" + b"J" + struct.pack("<i", 2_000_000_000) + b"\x85R."
        refused(archive(tmp_path, pickled), "needs to run bytearray")


def flagged(data: bytes) -> bytes:
    """The same archive, whose list says that its records are encrypted."""
    raw, at = bytearray(data), data.find(b"PK\1\2")
    while at >= 0:
        raw[at + 8] |= 1
        at = data.find(b"PK\1\2", at + 4)
    return bytes(raw)


def test_tricks_of_zips(tmp_path):
    file = saved(tmp_path, {"w": torch.ones(64)})
    whole = file.read_bytes()
    file.write_bytes(flagged(whole))
    refused(file, "its records are encrypted")
    refused(archive(tmp_path, bytes(100), zipfile.ZIP_DEFLATED), "compressed")
    refused(archive(tmp_path, pickle.dumps({}, 2), byteorder=b"x" * 10**6), "big-endian")
    at = whole.find(b"PK\1\2", whole.find(b"data/0") + 1)  # the size of a record, in the list
    for offset in (20, 24):
        raw, place = bytearray(whole), at
        while place >= 0:
            raw[place + offset : place + offset + 4] = struct.pack("<I", 2**31 - 1)
            place = whole.find(b"PK\1\2", place + 4)
        file.write_bytes(raw)
        with pytest.raises(LoadError):
            dict(open_source(file))


def test_a_list_of_records_is_limited(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({}, 2))
        info = zipfile.ZipInfo("archive/x")
        info.comment = b"x" * 65_000
        for n in range(300):
            info.filename = f"archive/{n}"
            file.writestr(info, b"")
    refused(tmp_path / "x.pth", "its list of records has")


# --- safetensors


def header(folder: Path, text: str | bytes, data: int = 8) -> Path:
    raw = text if isinstance(text, bytes) else text.encode()
    (folder / "x.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(data))
    return folder / "x.safetensors"


def one(shape: str, place: str = "[0,8]", name: str = "a") -> str:
    return f'{{"{name}":{{"dtype":"F32","shape":{shape},"data_offsets":{place}}}}}'


@pytest.mark.parametrize("shape", [
    "[" + ",".join(["9" * 4000] * 1000) + "]", "[" + ",".join(["9" * 300] * 2400) + "]", "[9223372036854775808]",
    "[-9223372036854775808]", "[" + ",".join(["1"] * 17) + "]", "[" + ",".join(["2"] * 100_000) + "]", "[1e999]",
    "[NaN]", '["1"]', "[true]", "[null]", "{}", '"ab"', "[[1]]", "1" * 5000,
])  # fmt: skip
def test_shapes_that_claim_much(tmp_path, shape):
    refused(header(tmp_path, one(shape)), "its header cannot be understood")


def test_headers_that_claim_much(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "ENTRIES", 500)
    refused(header(tmp_path, "{" + " " * limits.HEADER + "}"), "its header has 16,777,218 bytes")
    refused(header(tmp_path, '{"a":' + "[" * 100_000), "its header cannot be understood")
    refused(header(tmp_path, '{"a":' + "[" * 500 + "]" * 500 + "}"), "its header cannot be understood")
    rows = {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(limits.ENTRIES + 1)}
    refused(header(tmp_path, json.dumps(rows), 0), "it names more than 500 tensors")
    refused(header(tmp_path, one("[3]", name="n" * 10**6)), "its header cannot be understood")
    refused(header(tmp_path, one("[2]").replace("F32", "F" * 10**6)), "is stored as FFF")
    refused(header(tmp_path, '{"__metadata__":{"a":"\\ud800"},' + one("[2]")[1:]), "surrogates not allowed")


@pytest.mark.slow
def test_a_header_of_the_largest_size_in_its_worst_form(tmp_path):
    filler = ",".join(["{}"] * (limits.HEADER // 3 - 20))
    refused(header(tmp_path, f'{{"a":[{filler}]}}'), "its header cannot be understood", seconds=20)


def test_an_index_may_claim_much(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"t{n}": f"{n}.safetensors" for n in range(20_000)}}))
    refused(index, "it names 20,000 files")


# --- GGUF


def gguf(folder: Path, tensors: int, fields: int, rest: bytes = b"") -> Path:
    (folder / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + rest + bytes(4096))
    return folder / "x.gguf"


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize(
    ("tensors", "fields"), [(2**63, 0), (0, 2**63), (10**6, 0), (0, 10**6), (100, 100), (2**64 - 1, 1)]
)
def test_gguf_counts_that_lie(tmp_path, tensors, fields):
    pytest.importorskip("gguf")
    refused(gguf(tmp_path, tensors, fields), "it cannot be read as GGUF")


def test_gguf_lengths_that_lie(tmp_path):
    pytest.importorskip("gguf")
    for rest in (
        struct.pack("<Q", 2**62), text(b"a") + struct.pack("<IIQ", 9, 8, 2**40),
        text(b"a") + struct.pack("<IQ", 8, 2**40), text(b"a") + struct.pack("<IIQ", 9, 4, 2**62),
        text(b"a") + struct.pack("<I", 99), text(b"a") + struct.pack("<IIQ", 9, 9, 3),
    ):  # fmt: skip
        refused(gguf(tmp_path, 0, 1, rest), "it cannot be read as GGUF")
    rest = text(b"a") + struct.pack("<IQQQIQ", 2, 2**62, 2**62, 0, 0, 0)
    refused(gguf(tmp_path, 1, 0, rest), str(tmp_path))
    rest = text(b"a") + struct.pack("<IQIQ", 1, 2**63, 0, 0)
    refused(gguf(tmp_path, 1, 0, rest), "has an axis of")


def test_a_long_gguf_vocabulary_is_limited(tmp_path):
    pytest.importorskip("gguf")
    file = gguf(tmp_path, 0, 1, struct.pack("<Q", limits.VOCABULARY + 1))
    with file.open("r+b") as stream:
        stream.truncate(limits.VOCABULARY * 3)  # a file with holes
    refused(file, "before the data")


def test_many_gguf_tensors_take_no_time(tmp_path):
    pytest.importorskip("gguf")
    rows = b"".join(text(f"t{n}".encode()) + struct.pack("<IQIQ", 1, 0, 0, 0) for n in range(10_000))
    begun = time.process_time()
    assert len(open_source(gguf(tmp_path, 10_000, 0, rows)).tensors) == 10_000
    assert time.process_time() - begun < 5


def test_gguf_tensors_on_one_another(tmp_path):
    pytest.importorskip("gguf")
    rows = b"".join(text(name) + struct.pack("<IQIQ", 1, 64, 0, 0) for name in (b"a", b"b"))
    refused(gguf(tmp_path, 2, 0, rows), "lie on one another")


def test_one_number_that_stands_for_many(tmp_path):
    """A view of stride 0 takes four bytes in the file and any number of them in memory."""
    refused(
        saved(tmp_path, {"w": torch.ones(1).expand(2**24, 2**24)}), "stands for more numbers than the archive holds"
    )
    file = saved(tmp_path, {"w": torch.arange(3.0).expand(4, 3)})
    assert open_source(file)["w"].equal(torch.arange(3.0).expand(4, 3))


# --- only ordinary files are opened


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".gguf", ".bin", ".json"])
def test_devices_and_pipes_are_not_read(tmp_path, suffix):
    device, pipe, folder = (tmp_path / f"{name}{suffix}" for name in ("device", "pipe", "folder"))
    device.symlink_to("/dev/zero")
    os.mkfifo(pipe)
    for file in (device, pipe):
        refused(file, "ordinary file")
    folder.mkdir()
    refused(folder, "it holds no .safetensors file")


def test_a_file_that_becomes_a_pipe_is_not_waited_for(tmp_path):
    save_file({"a": torch.ones(4)}, tmp_path / "x.safetensors")
    source = TensorFiles(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").unlink()
    os.mkfifo(tmp_path / "x.safetensors")
    for read in (lambda: source["a"], lambda: source.sketch, lambda: list(source.pieces("a", 4, 4))):
        with pytest.raises(LoadError, match="ordinary file"):
            read()


def test_an_archive_in_memory_is_what_torch_writes(tmp_path):
    """The checks above refuse nothing that torch writes, with optimizers and all."""
    stream = io.BytesIO()
    state = {f"layer.{n}": {"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2), "step": 3} for n in range(200)}
    torch.save({"model": {"w": torch.ones(3)}, "optimizer": {"state": state, "groups": [{"lr": 0.1}]}}, stream)
    (tmp_path / "x.pth").write_bytes(stream.getvalue())
    assert PickleFile(tmp_path / "x.pth", "model").tensors.keys() == {"w"}
