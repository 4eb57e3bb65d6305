"""Files written tensor by tensor, read by the safetensors library and by torch."""

import pytest
import torch
from held import Held
from safetensors.torch import load_file

from ditkit.checkpoints.files.safetensors import TensorFiles
from ditkit.checkpoints.files.writing import write_file, write_pickle, write_set
from ditkit.errors import LoadError

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
