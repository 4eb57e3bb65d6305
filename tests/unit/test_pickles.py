"""Checkpoints of torch: exact tensors, no code is ever run, and the state dict that is meant."""

import collections
import io
import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from ditkit.checkpoints.files import pickles, stored
from ditkit.checkpoints.files.opening import open_source
from ditkit.checkpoints.files.pickles import PickleFile
from ditkit.checkpoints.files.safetensors import TensorFiles
from ditkit.checkpoints.load import load_into
from ditkit.errors import LoadError

GOLDEN = Path(__file__).parents[1] / "data/golden"
SELF_FORCING = GOLDEN / "causal/self_forcing_dmd.pt"


def saved(folder: Path, value: object, name: str = "x.pth") -> Path:
    torch.save(value, folder / name)
    return folder / name


def refused(path: Path, *parts: str, **options) -> None:
    with pytest.raises(LoadError) as error:
        open_source(path, **options)
    for part in (str(path), *parts):
        assert part in str(error.value), f"{part!r} is not in {str(error.value)!r}"


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def test_a_state_dict_is_read_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
    tensors = {f"layer.{dtype}": torch.randn(3, 5).to(dtype) for dtype in dtypes}
    tensors |= {"count": torch.tensor(7), "mask": torch.tensor([True, False]), "none": torch.empty(0, 3)}
    tensors["bytes"] = torch.arange(4, dtype=torch.uint8)
    tensors["parameter"] = nn.Parameter(torch.randn(2))
    source = open_source(saved(tmp_path, collections.OrderedDict(tensors)))
    assert isinstance(source, PickleFile)
    assert source.entry == ""
    assert source.tensors["layer.torch.bfloat16"].dtype == "BF16"
    streamed = dict(source)
    assert streamed.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert equal(streamed[name], tensor.detach())
        assert equal(source[name], tensor.detach())
        assert source.tensors[name].shape == tuple(tensor.shape)


def test_shared_storages_and_strided_views(tmp_path):
    base = torch.arange(60.0).reshape(3, 4, 5)
    tensors = {
        "base": base, "second name": base, "rows": base[1], "columns": base[:, :, 1:3], "turned": base.permute(2, 0, 1),
        "wide": torch.arange(3.0)[:, None].expand(3, 4), "one": base[2, 3, 4],
    }  # fmt: skip
    source = open_source(saved(tmp_path, tensors))
    for name, tensor in dict(source).items():
        assert torch.equal(tensor, tensors[name]), name
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 4, "only its own bytes"
    assert source.tensors["turned"].stride is not None
    assert source.tensors["rows"].stride is None


def test_tensors_have_memory_of_their_own(tmp_path):
    path = saved(tmp_path, {"x": torch.ones(300_000), "y": torch.ones(3)})
    loaded = dict(open_source(path))
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert torch.equal(loaded["x"], torch.ones(300_000))
    loaded["x"].zero_()
    assert torch.equal(loaded["y"], torch.ones(3))


def test_opening_reads_no_data(tmp_path, monkeypatch):
    path = saved(tmp_path, {"x": torch.ones(300_000)})
    monkeypatch.setattr(stored, "read", None)
    assert open_source(path).tensors["x"].shape == (300_000,)


def test_a_module_loads_from_it_strictly(tmp_path):
    module, other = nn.Linear(3, 4), nn.Linear(3, 4)
    load_into(other, open_source(saved(tmp_path, module.state_dict())))
    assert torch.equal(other.weight, module.weight)


class Touch:
    """Pickled, this is the order to create a file when it is opened."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


@pytest.mark.parametrize("wrap", [lambda bad: bad, lambda bad: {"x": torch.ones(2), "bad": bad}])
def test_a_malicious_pickle_does_not_run(tmp_path, wrap):
    witness = tmp_path / "it ran"
    path = saved(tmp_path, wrap(Touch(witness)))
    refused(path, "it is a pickle that needs to run", "open when it is opened", "Convert it to safetensors where you")
    assert not witness.exists()
    pickle.loads(pickle.dumps(Touch(witness))).close()
    assert witness.exists(), "the payload works where nothing stops it"


def test_a_bare_malicious_pickle_does_not_run(tmp_path):
    witness, path = tmp_path / "it ran", tmp_path / "x.ckpt"
    path.write_bytes(pickle.dumps(Touch(witness), protocol=2))
    refused(path, "it is a bare pickle")
    assert not witness.exists()


def test_the_environment_cannot_switch_the_protection_off(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    witness = tmp_path / "it ran"
    refused(saved(tmp_path, Touch(witness)), "it is a pickle that needs to run")
    assert not witness.exists()


def test_a_whole_module_is_refused(tmp_path):
    refused(saved(tmp_path, nn.Linear(2, 2)), "torch.nn.modules.linear.Linear")


def test_torchscript_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "x.pt"))
    refused(tmp_path / "x.pt", "it is a TorchScript archive, which is a program")


def test_the_old_format_is_refused(tmp_path):
    torch.save({"x": torch.ones(2)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    refused(tmp_path / "x.pth", "it is a bare pickle, the format of torch before 1.6", "Save it again")


def test_other_archives_and_damaged_ones(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("a/b.txt", "hello")
    refused(tmp_path / "x.pth", "a zip archive without a state dict")
    whole = saved(tmp_path, {"x": torch.ones(2000)}).read_bytes()
    for length in (30, 2000, len(whole) - 10):
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        refused(tmp_path / "cut.pth", "the archive cannot be read", "Download the file again")


def rewritten(path: Path, change) -> Path:
    """The archive with each record put through ``change(name, content) -> (content, compression)``."""
    out = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for member in old.infolist():
            content, compression = change(member.filename, old.read(member))
            new.writestr(member.filename, content, compression)
    path.write_bytes(out.getvalue())
    return path


def test_compressed_big_endian_and_short_records(tmp_path):
    stored, packed = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
    value = {"x": torch.ones(2000)}
    refused(rewritten(saved(tmp_path, value), lambda name, data: (data, packed)), "its records are compressed")
    big = rewritten(saved(tmp_path, value), lambda name, d: (b"big" if name.endswith("byteorder") else d, stored))
    refused(big, "its numbers are big-endian")
    short = rewritten(saved(tmp_path, value), lambda name, d: (d[:-4] if name.endswith("data/0") else d, stored))
    refused(short, "the archive does not hold the data of x", "Download the file again")


def test_a_second_archive_in_the_same_file(tmp_path):
    """Which of two records counts would be a matter of the reader, so one could be checked and another one used."""
    path = saved(tmp_path, {"x": torch.ones(2)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/byteorder", b"little")
    refused(path, "its records are not those of one archive of torch")


def test_an_archive_that_another_program_packed(tmp_path):
    """Without torch's padding between records, so the places must be read, not computed."""
    value = {"x": torch.arange(2000.0), "y": torch.arange(5.0)}
    path = rewritten(saved(tmp_path, value), lambda name, data: (data, zipfile.ZIP_STORED))
    try:
        loaded = dict(open_source(path))
    except LoadError:
        return  # refused is right as well; wrong numbers would not be
    assert all(torch.equal(loaded[name], value[name]) for name in value)


def test_things_that_are_no_plain_tensors(tmp_path):
    refused(saved(tmp_path, {"x": torch.eye(2).to_sparse()}), "x")
    refused(saved(tmp_path, {"x": torch.ones(2, dtype=torch.complex128)}), "x is no plain tensor (complex128")
    refused(saved(tmp_path, {"x": torch.ones(2), "n": 3}), "no dictionary that has names and tensors only")
    refused(saved(tmp_path, [torch.ones(2)]), "no dictionary")
    refused(saved(tmp_path, {}), "no dictionary")


def test_the_moving_average_is_taken_by_a_named_rule():
    """Both sets of weights have the same names; nothing but the entry tells them apart."""
    source = open_source(SELF_FORCING)
    assert isinstance(source, PickleFile)
    assert (source.entry, source.entries) == ("generator_ema", ("generator", "generator_ema"))
    assert "the entry generator_ema of generator, generator_ema was taken" in source.notes[0]
    reference = dict(TensorFiles(GOLDEN / "causal/model_prefix.safetensors"))
    loaded = dict(source)
    assert loaded.keys() == reference.keys()
    assert all(equal(loaded[name], reference[name]) for name in reference)


def test_another_entry_can_be_named_and_is_another_set_of_weights():
    both = [open_source(SELF_FORCING, entry=name) for name in ("generator", "generator_ema")]
    assert not any(source.notes for source in both)
    assert not torch.equal(*(source["model.head.head.weight"] for source in both))
    assert len({source.fingerprint for source in both}) == len({source.sketch for source in both}) == 2
    assert both[1].fingerprint == open_source(SELF_FORCING).fingerprint
    refused(SELF_FORCING, "it has no entry 'generator_em' (did you mean 'generator_ema'?)", entry="generator_em")


@pytest.mark.parametrize("path", ["state_dict", "model", "ema", "module", "a.b"])
def test_a_nested_state_dict_is_found(tmp_path, path):
    weights = {"w": torch.ones(2)}
    value: dict = weights
    for key in reversed(path.split(".")):
        value = {key: value, "epoch": 3, "optimizer": {"state": {0: {"m": torch.ones(2)}}, "param_groups": [{}]}}
    source = open_source(saved(tmp_path, value))
    assert isinstance(source, PickleFile)
    assert source.entry == path
    assert source.tensors.keys() == {"w"}


def test_several_entries_must_be_told_apart(tmp_path):
    value = {"model": {"w": torch.zeros(2)}, "ema": {"w": torch.ones(2), "v": torch.ones(1)}, "step": 3}
    path = saved(tmp_path, value)
    refused(path, "it holds 2 state dicts (ema, model)", "Name one of them: FILE#ENTRY")
    assert torch.equal(open_source(path, entry="ema")["w"], torch.ones(2))
    assert PickleFile(path, "ema").entries == ("model", "ema")


def test_a_critic_is_never_taken_for_the_model(tmp_path):
    one = {"w": torch.ones(1)}
    refused(saved(tmp_path, {"generator": one, "critic": one}), "it holds 2 state dicts (critic, generator)")
    path = saved(tmp_path, {"generator": one, "critic": one, "generator_ema": {"w": torch.zeros(1)}})
    assert open_source(path)["w"] == 0


def test_older_versions_of_torch_find_the_same_places(tmp_path):
    """There the meta device does not tell where storages lie; a mapping of the file does."""
    path = saved(tmp_path, {"x": torch.arange(10.0), "y": torch.arange(6.0).reshape(2, 3).T})
    records = pickles._records(path, "")
    for name, tensor in pickles._mapped(path).items():
        assert pickles._info(path, name, tensor, records, "") == open_source(path).tensors[name]
