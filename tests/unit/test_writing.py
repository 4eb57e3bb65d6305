"""Files written tensor by tensor, read by the safetensors library and by torch."""

import os

import pytest
import torch
from forks import child
from held import Held
from safetensors.torch import load_file

from ditkit.checkpoints.convert.folders import appearing
from ditkit.checkpoints.files.safetensors import TensorFiles
from ditkit.checkpoints.files.writing import write_file, write_pickle, write_set
from ditkit.errors import LoadError, OutputError

MIXED = {
    "odd": torch.ones(3, dtype=torch.float8_e4m3fn), "half": torch.randn(5).half(), "wide": torch.randn(2, 3).double(),
    "empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5), "brain": torch.randn(7).bfloat16(),
}  # fmt: skip


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k].double(), b[k].double()) for k in a
    )


def test_the_library_reads_it_and_each_tensor_begins_at_its_own_width(tmp_path):
    write_file(tmp_path / "x.safetensors", Held(MIXED))
    assert same(load_file(tmp_path / "x.safetensors"), MIXED)
    for name, info in TensorFiles(tmp_path / "x.safetensors").tensors.items():
        assert info.start % MIXED[name].element_size() == 0, name


def test_a_state_dict_for_torch_and_nothing_beside_it(tmp_path):
    write_pickle(tmp_path / "x.pth", Held(MIXED))
    assert same(torch.load(tmp_path / "x.pth", weights_only=True), MIXED)
    assert [file.name for file in tmp_path.iterdir()] == ["x.pth"]


def test_one_tensor_is_read_at_a_time_and_once(tmp_path):
    source, seen = Held(MIXED), []
    write_set(tmp_path, "m", source, "float32", 20, lambda name, size: seen.append((name, len(source.read))))
    assert sorted(source.read) == sorted(MIXED)
    assert [count for _, count in seen] == list(range(1, len(MIXED) + 1))
    held = [load_file(file) for file in sorted(tmp_path.glob("*.safetensors"))]
    assert {k: t.dtype for part in held for k, t in part.items()} == dict.fromkeys(MIXED, torch.float32)


def test_numbers_that_are_no_weights_are_not_converted(tmp_path):
    with pytest.raises(LoadError, match="its type is I64"):
        write_file(tmp_path / "x.safetensors", Held({"ids": torch.arange(3)}), None, "bfloat16")
    write_file(tmp_path / "y.safetensors", Held({"ids": torch.arange(3)}))
    assert load_file(tmp_path / "y.safetensors")["ids"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("more", [500, 2_000])
def test_a_disk_that_is_full_for_torch_is_an_error_of_the_system(tmp_path, more):
    """The tensors fit, the state dict that torch makes of them does not."""
    source = Held({f"t{i}": torch.ones(300, 30) for i in range(5)})
    with pytest.raises(OSError, match=r"torch cannot write x\.pth \("):
        child(lambda: write_pickle(tmp_path / "x.pth", source), room=180_000 + more)


@pytest.mark.parametrize("when", ["before a rename", "after a rename", "and the way back fails"])
def test_a_folder_that_is_replaced_is_never_lost(tmp_path, monkeypatch, when):
    """Ctrl-C in the middle of a rename, and a disk that fails twice; where two folders cannot change places at once."""
    monkeypatch.setattr("ditkit.writing._exchanged", lambda one, other: False)
    target, rename, count = tmp_path / "m", os.rename, 0
    target.mkdir()
    (target / "weights").write_text("old")

    def failing(a, b):
        nonlocal count
        count += 1
        if when == "and the way back fails" and count > 1:
            raise OSError(28, "No space left on device")
        if when != "before a rename" or count > 1:
            rename(a, b)
        if when != "and the way back fails" and count == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", failing)
    kind = OutputError if when == "and the way back fails" else KeyboardInterrupt
    with pytest.raises(kind) as error, appearing(target) as new:
        (new / "weights").write_text("new")
    monkeypatch.undo()
    (left,) = tmp_path.iterdir()
    assert (left / "weights").read_text() == "old"
    assert left == target or str(left) in str(error.value)
