"""Files that change under an open model, files of one name, files beside a model that is replaced."""

from __future__ import annotations

import os
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import ditkit
from ditkit.assembly import Components, Model
from ditkit.checkpoints.convert.convert import convert
from ditkit.checkpoints.model.lock import lock_file, lock_text, make_lock
from ditkit.checkpoints.model.manifest import Manifest
from ditkit.cli.main import main
from ditkit.errors import LoadError, OutputError, StateError
from ditkit.setup import Setup

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("models") / "t2v")


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def lora(file, scale=1.0):
    file.parent.mkdir(parents=True, exist_ok=True)
    key, g = "diffusion_model.blocks.0.self_attn.q", torch.Generator().manual_seed(1)
    save_file({f"{key}.lora_A.weight": scale * torch.randn(2, 64, generator=g),
               f"{key}.lora_B.weight": torch.randn(64, 2, generator=g)}, file)  # fmt: skip
    return str(file)


def test_weights_with_another_header_are_not_read_at_the_old_places(folder):
    pipe = ditkit.load(folder)
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"a longer header": "x" * 64})
    with pytest.raises(LoadError, match="has changed since the model was opened"):
        pipe.components["transformer"]
    ditkit.load(folder, share_with=pipe).components["transformer"]


def test_a_config_that_changes_after_opening_is_not_the_one_that_was_read(folder):
    pipe = ditkit.load(folder)
    os.utime(folder / "transformer/config.json", ns=(1, 1))
    with pytest.raises(LoadError, match=r"config\.json has changed"):
        pipe.components["transformer"]


def test_a_lock_also_counts_for_parts_that_another_pipe_has_loaded(folder):
    file = lock_file(Manifest.open(folder))
    text = lock_text(make_lock(Manifest.open(folder)))
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    first = ditkit.load(folder)
    first.components["transformer"]
    file.write_text(text)
    locked = ditkit.load(folder, share_with=first)
    assert locked.components["vae"] is first.components["vae"]
    with pytest.raises(LoadError, match="not what it was when it was pinned"):
        locked.components["transformer"]


def test_precision_is_the_transformers_alone(folder):
    first = ditkit.load(folder)
    second = ditkit.load(folder, share_with=first, dtype_policy="float32")
    assert second.components["vae"] is first.components["vae"]
    assert second.components["text_encoder"] is first.components["text_encoder"]
    assert second.components["transformer"] is not first.components["transformer"]


@pytest.mark.parametrize("mode", ["side", "fused"])
def test_loras_of_one_name_are_all_in_the_receipt(whole, tmp_path, mode):
    names = [lora(tmp_path / "a" / "x.safetensors", 1.0), lora(tmp_path / "b" / "x.safetensors", 2.0)]
    base = lora(tmp_path / "c" / "diffusion_pytorch_model.safetensors", 3.0)
    setup = Setup.of({"model": str(whole), "loras": [*names, names[0], base], "lora_mode": mode})
    files = Components(Model.open(str(whole), setup), setup).files("transformer")
    plain = ditkit.load(whole).components.files("transformer")["diffusion_pytorch_model.safetensors"]
    assert files["diffusion_pytorch_model.safetensors"] == plain
    assert list(files)[1:] == ["x.safetensors", "x.safetensors (2)", "diffusion_pytorch_model.safetensors (2)"]
    assert len(set(files.values())) == 4


@pytest.mark.parametrize("mode", ["side", "fused"])
def test_a_lora_with_undefined_numbers_is_refused(whole, tmp_path, mode):
    pipe = ditkit.load(whole, loras=[lora(tmp_path / "nan.safetensors", float("nan"))], lora_mode=mode)
    with pytest.raises(LoadError, match="infinite or undefined"):
        pipe.components["transformer"]


def test_overwriting_a_model_loses_nothing_else(folder, whole):
    (folder / "loras").mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "README.md").write_text("the model's")
    with pytest.raises(OutputError, match=r"other things too \(loras, notes\.txt\), which would be lost"):
        convert(whole, folder, "native", overwrite=True)
    (folder / "notes.txt").unlink()
    (folder / "loras").rmdir()
    convert(whole, folder, "native", overwrite=True)
    convert(folder, folder, "diffusers", overwrite=True)
    assert sorted(x.name for x in folder.iterdir()) == sorted(
        ["model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae"]
    )


def test_ctrl_c_between_the_two_moves_brings_the_old_model_back(folder, whole, monkeypatch):
    monkeypatch.setattr("ditkit.writing._exchanged", lambda one, other: False)
    rename = os.rename

    def interrupted(src, dst):
        if str(src).endswith(".part"):
            raise KeyboardInterrupt
        rename(src, dst)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(whole, folder, "native", overwrite=True)
    assert (folder / WEIGHTS).is_file()
    assert sorted(x.name for x in folder.parent.iterdir()) == [folder.name]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_a_lora_of_whole_numbers_without_scales_is_refused(whole, tmp_path, dtype):
    file = tmp_path / "x.safetensors"
    key = "diffusion_model.blocks.0.self_attn.q"
    save_file({f"{key}.lora_A.weight": torch.ones(2, 64, dtype=dtype), f"{key}.lora_B.weight": torch.ones(64, 2),
               f"{key}.alpha": torch.tensor(2)}, file)  # fmt: skip
    with pytest.raises(LoadError, match=r"1 keys are stored as (I8|U8|I32), which ditkit cannot apply"):
        ditkit.load(whole, loras=[str(file)])


def test_a_state_of_the_same_model_with_another_part_is_told_so(whole, tmp_path):
    size = {"width": 32, "height": 32, "frames": 5, "steps": 2}
    first = ditkit.load(whole)
    state = first.begin(first.model.request({"prompt": "a red circle", **size}))
    other = tmp_path / "other.safetensors"
    save_file({name: x + 0.01 for name, x in load_file(whole / WEIGHTS).items()}, other)
    (tmp_path / "config.json").write_text((whole / "transformer/config.json").read_text())
    second = ditkit.load(whole, components={"transformer": str(other)})
    with pytest.raises(StateError, match="begun with other files of it or with other parts"):
        second.run(state)


def test_relative_paths_outlive_a_change_of_folder(whole, tmp_path, monkeypatch):
    lora(tmp_path / "x.safetensors")
    vae = whole / "vae"
    (tmp_path / "vae").symlink_to(vae)
    (tmp_path / "m").symlink_to(whole)
    monkeypatch.chdir(tmp_path)
    pipe = ditkit.load("m", components={"vae": "vae"}, loras=["x.safetensors"])
    monkeypatch.chdir("/")
    assert pipe.components["transformer"] is not None
    assert pipe.components["vae"] is not None


def test_a_part_that_no_stage_would_use_is_refused(whole, tmp_path):
    i2v = tiny.write(tmp_path / "i2v", "i2v")
    with pytest.raises(LoadError, match="its transformer has no image branch"):
        ditkit.load(whole, components={"image_encoder": str(i2v / "image_encoder")})


def test_one_good_part_beside_a_damaged_one_cannot_be_used(whole, tmp_path, capsys):
    folder = tmp_path / "native"
    folder.mkdir()
    shutil.copy(whole / "vae/diffusion_pytorch_model.safetensors", folder / "vae.safetensors")
    shutil.copy(whole / "vae/config.json", folder)
    assert main(["inspect", str(folder)]) == 0
    (folder / "transformer.safetensors").write_bytes((whole / WEIGHTS).read_bytes()[:-1])
    assert main(["inspect", str(folder)]) == 2
    assert "transformer.safetensors: it has" in " ".join(capsys.readouterr().out.split())
