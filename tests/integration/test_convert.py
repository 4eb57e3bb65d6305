"""Whole models from one layout into the other and back, read by diffusers itself, and what stays when it goes wrong."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from ditkit.assembly import MODELS
from ditkit.checkpoints.convert.convert import convert
from ditkit.checkpoints.model.find import locate
from ditkit.checkpoints.model.open_part import open_part
from ditkit.cli.main import main
from ditkit.errors import LoadError, OutputError, SetupError

TASKS = tuple(tiny.TASKS)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """(task, layout) -> a folder, written once."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def get(task: str, layout: str) -> Path:
        if (task, layout) not in made:
            made[task, layout] = tiny.write(folder / f"{task}-{layout}", task, layout)
        return made[task, layout]

    return get


def contents(folder: Path) -> dict[str, object]:
    """Every file: tensors, the content of a json, or bytes."""
    found: dict[str, object] = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.suffix == ".safetensors":
            found[name] = load_file(file)
        elif file.suffix == ".pth":
            found[name] = dict(torch.load(file, weights_only=True))
        elif file.suffix == ".json":
            found[name] = json.loads(file.read_text())
        elif file.is_file():
            found[name] = file.read_bytes()
    return found


def equal(a: object, b: object) -> bool:
    if isinstance(a, dict) and a and isinstance(next(iter(a.values())), torch.Tensor):
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    return a == b


def left_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("task", TASKS)
def test_native_to_diffusers_to_native(task, models, tmp_path):
    source = models(task, "native")
    there = convert(source, tmp_path / "there", "diffusers")
    convert(there.path, tmp_path / "back", "native")
    before, after = contents(source), contents(tmp_path / "back")
    clip = next((name for name in before if "clip" in name), None)
    if clip:  # the text half goes, by name; the projection is not part of what Wan uses
        before[clip] = {k: v for k, v in before[clip].items() if k.startswith("visual.") and k != "visual.head"}
    for name, value in before.items():
        if name.endswith("config.json") and "tokenizer" not in name:
            value["_diffusers_version"] = after[name]["_diffusers_version"]
    assert before.keys() == after.keys()
    assert [name for name in before if not equal(before[name], after[name])] == []


@pytest.mark.parametrize("task", TASKS)
def test_diffusers_to_native_to_diffusers(task, models, tmp_path):
    source = models(task, "diffusers")
    convert(source, tmp_path / "there", "native")
    convert(tmp_path / "there", tmp_path / "back", "diffusers")
    before, after = contents(source), contents(tmp_path / "back")
    for name in before.keys() & after.keys():
        if name.endswith(".safetensors"):
            assert equal(before[name], after[name]), name
    assert {name for name in before if name.endswith(".safetensors")} <= after.keys()
    first, second = locate(source), locate(tmp_path / "back")
    assert {name: dict(part.config) for name, part in first.parts.items()} == {
        name: dict(part.config) for name, part in second.parts.items()
    }
    kept = ("task", "boundary", "expand_timesteps", "problems")
    assert [getattr(first, key) for key in kept] == [getattr(second, key) for key in kept]


@pytest.mark.parametrize("task", TASKS)
def test_diffusers_opens_what_was_converted(task, models, tmp_path):
    """With its own pipeline, and it has the weights of the native files under its own names."""
    import diffusers

    convert(models(task, "native"), tmp_path / "model", "diffusers")
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    assert index["_class_name"] == tiny.PIPELINES.get(task, "WanPipeline")
    assert index.get("boundary_ratio") == tiny.BOUNDARY.get(task)
    assert index.get("expand_timesteps", False) == (task == "ti2v")
    pipe = getattr(diffusers, index["_class_name"]).from_pretrained(tmp_path / "model")
    theirs = tiny.write(tmp_path / "same", task, "diffusers")
    expected = getattr(diffusers, index["_class_name"]).from_pretrained(theirs)
    for name in ("transformer", "transformer_2", "vae", "text_encoder", "image_encoder"):
        ours, other = getattr(pipe, name, None), getattr(expected, name, None)
        assert (ours is None) == (other is None)
        if ours is not None:
            assert equal(ours.state_dict(), other.state_dict()), name
    assert pipe.tokenizer("a red circle").input_ids == expected.tokenizer("a red circle").input_ids
    assert pipe.scheduler.config.use_flow_sigmas
    assert pipe.scheduler.config.flow_shift == {"flf2v": 16.0, "ti2v": 5.0}.get(task, 3.0)


def test_shards_with_an_index_that_diffusers_reads(models, tmp_path):
    from diffusers import WanTransformer3DModel

    done = convert(models("t2v", "native"), tmp_path / "m", "diffusers", shard_bytes=200_000)
    shards = [name for name in done.files if name.startswith("transformer/diffusion")]
    assert len(shards) > 3
    index = json.loads((tmp_path / "m/transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    tensors = {}
    for shard in sorted(set(index["weight_map"].values())):
        held = load_file(tmp_path / "m/transformer" / shard)
        assert len(held) == 1 or sum(t.numel() * 4 for t in held.values()) <= 200_000
        assert all(index["weight_map"][name] == shard for name in held)
        tensors |= held
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in tensors.values())
    model = WanTransformer3DModel.from_pretrained(tmp_path / "m/transformer")
    assert equal(tensors, dict(model.state_dict()))


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_a_type_is_that_of_every_tensor(layout, models, tmp_path):
    source = models("i2v", "diffusers")
    done = convert(source, tmp_path / "m", layout, "bfloat16")
    assert set(done.types.values()) == {"F32 -> BF16"}
    for name, part in locate(tmp_path / "m").parts.items():
        if part.source is not None:
            assert {facts.dtype for facts in part.source.tensors.values()} == {"BF16"}
            first = dict(open_part(source / name, name).source)
            assert all(torch.equal(tensor, first[key].bfloat16()) for key, tensor in part.source)


def test_what_a_type_cannot_hold_is_refused_and_nothing_is_left(models, tmp_path):
    source = tmp_path / "source"
    convert(models("t2v", "diffusers"), source, "diffusers")
    file = source / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["quant_conv.bias"][0] = 1e6
    save_file(tensors, file)
    with pytest.raises(LoadError, match=r"quant_conv.bias .*1e\+06, which is beyond that type. Choose bfloat16"):
        convert(source, tmp_path / "new", "diffusers", "float16")
    assert left_in(tmp_path) == ["source"]
    convert(source, tmp_path / "new", "diffusers", "bfloat16")


def test_an_infinity_that_was_there_before_stays(models, tmp_path):
    source = tmp_path / "source"
    convert(models("t2v", "diffusers"), source, "diffusers")
    file = source / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["quant_conv.bias"][0] = float("inf")
    save_file(tensors, file)
    convert(source, tmp_path / "new", "diffusers", "float16")
    assert load_file(tmp_path / "new/vae/diffusion_pytorch_model.safetensors")["quant_conv.bias"][0] == float("inf")


def test_what_the_native_layout_cannot_say_is_an_error(models, tmp_path):
    source = tmp_path / "source"
    convert(models("t2v", "diffusers"), source, "diffusers")
    file = source / "vae/config.json"
    config = json.loads(file.read_text())
    config["latents_mean"][3] = 0.5
    file.write_text(json.dumps(config))
    with pytest.raises(OutputError, match="it has no place for latents_mean of the vae"):
        convert(source, tmp_path / "new", "native")
    assert left_in(tmp_path) == ["source"]


def test_nothing_is_replaced_unless_it_is_asked_for(models, tmp_path):
    source = models("t2v", "diffusers")
    convert(source, tmp_path / "m", "native")
    before = contents(tmp_path / "m")
    with pytest.raises(OutputError, match="it exists already"):
        convert(source, tmp_path / "m", "native", "bfloat16")
    assert contents(tmp_path / "m").keys() == before.keys()
    convert(source, tmp_path / "m", "diffusers", overwrite=True)
    assert (tmp_path / "m/model_index.json").is_file()
    assert not list((tmp_path / "m").glob("*.pth"))
    assert left_in(tmp_path) == ["m"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="holds no model"):
        convert(source, tmp_path / "mine", "native", overwrite=True)
    with pytest.raises(OutputError, match="which would be replaced"):
        convert(tmp_path / "m" / "vae", tmp_path / "m", "native", overwrite=True)
    assert left_in(tmp_path / "mine") == ["letter.txt"]


def test_a_model_can_take_its_own_place(models, tmp_path):
    convert(models("t2v", "diffusers"), tmp_path / "m", "diffusers")
    convert(tmp_path / "m", tmp_path / "m", "native", "bfloat16", overwrite=True)
    assert locate(tmp_path / "m").check().layout == "native"
    assert left_in(tmp_path) == ["m"]


def test_a_failure_half_way_leaves_the_old_model(models, tmp_path):
    convert(models("t2v", "native"), tmp_path / "m", "native")
    before = contents(tmp_path / "m")
    written = []

    def fail(what: str, done: int, total: int) -> None:
        written.append((what, done, total))
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(models("t2v", "diffusers"), tmp_path / "m", "diffusers", overwrite=True, progress=fail)
    after = contents(tmp_path / "m")
    assert all(equal(before[name], after[name]) for name in before)
    assert left_in(tmp_path) == ["m"]
    assert written[0][0] == "transformer"
    assert [done for _, done, _ in written] == sorted(done for _, done, _ in written)


def test_progress_ends_at_the_whole(models, tmp_path):
    seen = []
    convert(models("t2v", "diffusers"), tmp_path / "m", "native", progress=lambda *told: seen.append(told))
    assert seen[-1][1] == seen[-1][2] > 0


@pytest.mark.parametrize(("component", "layout", "files"), [
    ("transformer", "native", ["config.json", "diffusion_pytorch_model.safetensors"]),
    ("transformer", "diffusers", ["config.json", "diffusion_pytorch_model.safetensors"]),
    ("vae", "native", ["Wan2.1_VAE.pth"]),
    ("text_encoder", "native", ["models_t5_umt5-xxl-enc-bf16.pth"]),
    ("image_encoder", "diffusers", ["config.json", "model.safetensors"]),
])  # fmt: skip
def test_one_component(component, layout, files, models, tmp_path):
    done = convert(models("i2v", "diffusers") / component, tmp_path / "part", layout)
    assert sorted(done.files) == files
    again = open_part(tmp_path / "part", component)
    first = open_part(models("i2v", "diffusers") / component, component)
    assert equal(dict(again.source), dict(first.source))


def test_scaled_fp8_in_one_prefixed_file_becomes_plain_weights(models, tmp_path):
    """What stands in the file is number times scale; written is the product, never the number alone."""
    native = load_file(models("t2v", "native") / "diffusion_pytorch_model.safetensors")
    tensors, expected = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}, {}
    for name, tensor in native.items():
        if name.endswith("ffn.0.weight"):
            scale = tensor.abs().max() / 448
            tensors[f"model.diffusion_model.{name}"] = (tensor / scale).to(torch.float8_e4m3fn)
            tensors[f"model.diffusion_model.{name.removesuffix('weight')}scale_weight"] = scale
            expected[name] = (tensor / scale).to(torch.float8_e4m3fn).float() * scale
        else:
            tensors[f"model.diffusion_model.{name}"] = expected[name] = tensor
    (tmp_path / "q").mkdir()
    save_file(tensors, tmp_path / "q/anything.safetensors")
    (tmp_path / "q/config.json").write_text((models("t2v", "native") / "config.json").read_text())
    convert(tmp_path / "q/anything.safetensors", tmp_path / "plain", "native", "float32")
    written = load_file(tmp_path / "plain/diffusion_pytorch_model.safetensors")
    assert equal(written, expected)


def test_unknown_and_missing_tensors_are_never_dropped(models, tmp_path):
    for change, message in (("extra", "1 tensors are unknown"), ("missing", "1 tensors are missing")):
        folder = tmp_path / change
        convert(models("t2v", "native"), folder, "native")
        file = folder / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        if change == "extra":
            tensors["blocks.0.self_attn.extra"] = torch.zeros(2)
        else:
            del tensors["blocks.1.cross_attn.o.bias"]
        save_file(tensors, file)
        for layout in ("native", "diffusers"):
            with pytest.raises(LoadError, match=message):
                convert(folder, tmp_path / "new", layout)
    assert left_in(tmp_path) == ["extra", "missing"]


def test_what_is_left_behind_is_told(models, tmp_path):
    source = tmp_path / "source"
    convert(models("t2v", "diffusers"), source, "diffusers")
    (source / "ditkit.toml").write_text("")
    assert convert(source, tmp_path / "a", "native").remarks[0].startswith("ditkit.toml was left behind")
    (tmp_path / "a/google/umt5-xxl/tokenizer.json").unlink()
    remarks = convert(tmp_path / "a", tmp_path / "b", "diffusers").remarks
    assert any(remark.startswith("incomplete: ") and "tokenizer" in remark for remark in remarks)


@pytest.mark.parametrize(("change", "message"), [
    ({"layout": "difusers"}, "did you mean 'diffusers'"), ({"dtype": "bf16"}, "dtype is 'bf16'"),
    ({"shard_bytes": 0}, "shard of 0 bytes"),
])  # fmt: skip
def test_unknown_settings(change, message, tmp_path):
    with pytest.raises(SetupError, match=message):
        convert(tmp_path, tmp_path / "new", **({"layout": "native"} | change))


def test_the_command(models, tmp_path, capsys):
    words = ["convert", str(models("t2v", "diffusers")), str(tmp_path / "m"), "--layout", "native"]
    assert main([*words, "--dtype", "bfloat16"]) == 0
    told = capsys.readouterr().out
    assert "Wan2.1_VAE.pth" in told
    assert "F32 -> BF16" in told
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--quiet", "--max-shard-size", "100KB"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "m")
    assert len(list((tmp_path / "m").glob("*-of-*.safetensors"))) > 3
    assert main([*words[:3], "--layout", "native", "--max-shard-size", "many"]) == 2
    assert "no size" in capsys.readouterr().err


def test_a_move_that_fails_brings_the_old_model_back(models, tmp_path, monkeypatch):
    """The last step of all: the new folder cannot take the place of the old one."""
    import os

    convert(models("t2v", "diffusers") / "vae", tmp_path / "m", "native")
    monkeypatch.setattr("ditkit.writing._exchanged", lambda one, other: False)
    rename = os.rename

    def full(source, target):
        if str(source).endswith(".part"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OutputError, match="no space left on device"):
        convert(models("t2v", "diffusers") / "vae", tmp_path / "m", "diffusers", overwrite=True)
    assert left_in(tmp_path) == ["m"]
    assert left_in(tmp_path / "m") == ["Wan2.1_VAE.pth"]


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_a_model_is_replaced_by_a_relative_path_too(models, tmp_path, monkeypatch, layout):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        convert(models("t2v", "diffusers") / "vae", "m/vae", layout, overwrite=True)
    for _ in range(2):
        convert(models("t2v", "diffusers"), "whole", layout, overwrite=True)
    assert left_in(tmp_path) == ["m", "whole"]


def test_a_model_out_of_many_places_becomes_one_folder(models, tmp_path, capsys):
    """shapes-i2v is a manifest; the parts that it borrows come along, and diffusers opens what was written."""
    from diffusers import WanImageToVideoPipeline

    assert main(["convert", "shapes-i2v", str(tmp_path / "own"), "--layout", "diffusers", "--quiet"]) == 0
    pipe = WanImageToVideoPipeline.from_pretrained(tmp_path / "own")
    assert pipe.transformer.config.in_channels == 36
    assert pipe.image_encoder.config.hidden_size == 64
    own, borrowed = locate(tmp_path / "own").parts["vae"].source, open_part(MODELS["shapes"] / "vae").source
    assert all(torch.equal(own[name], borrowed[name]) for name in borrowed.tensors)


def test_a_part_of_a_manifest_is_not_replaced_with_the_whole(models, tmp_path, capsys):
    place = Path(shutil.copytree(models("t2v", "diffusers"), tmp_path / "m"))
    (tmp_path / "mine.toml").write_text('[components]\n' + "".join(
        f'{name} = "m/{name}"\n' for name in ("transformer", "vae", "text_encoder", "tokenizer")
    ))  # fmt: skip
    before = contents(place)
    command = ["convert", str(tmp_path / "mine.toml"), str(place), "--layout", "diffusers", "--overwrite"]
    assert main(command) == 2
    assert "which would be replaced with it" in capsys.readouterr().err
    assert all(equal(before[k], v) for k, v in contents(place).items())


def test_a_changed_byte_of_a_locked_manifest_is_not_converted(models, tmp_path, capsys):
    place = Path(shutil.copytree(models("t2v", "diffusers"), tmp_path / "m"))
    (place / "ditkit.toml").write_text("")
    assert main(["lock", str(place)]) == 0
    file = place / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert main(["convert", str(place), str(tmp_path / "out"), "--layout", "native"]) == 2
    assert "is not what it was when it was pinned" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
