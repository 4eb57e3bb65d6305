"""Files as people have them: copied halves of caches, what systems leave beside them, wrappers' names, other formats.

Each is read as what it is, or refused in one sentence that names its file and says what to do."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from ditkit.assembly.adapters import Adapters, Wanted
from ditkit.assembly.model import Model
from ditkit.checkpoints.files.opening import open_source
from ditkit.checkpoints.kinds.detect import networks
from ditkit.checkpoints.lora.read import inspect_lora
from ditkit.checkpoints.model.find import find, locate
from ditkit.checkpoints.model.open_part import open_part
from ditkit.cli.flags import RawSettings
from ditkit.cli.main import main
from ditkit.config import settle
from ditkit.errors import LoadError, SetupError
from ditkit.setup import Setup

SMALL = ["--steps", "1", "--frames", "5", "--width", "32", "--height", "32", "--no-sheet", "-q"]
WEIGHTS = "diffusion_pytorch_model.safetensors"
APPLE = bytes.fromhex("0005160700020000") + b"Mac OS X        " + bytes(4000)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(task, layout) -> a folder that is never changed."""
    base, made = tmp_path_factory.mktemp("models"), {}

    def get(task="t2v", layout="diffusers"):
        if (task, layout) not in made:
            made[task, layout] = tiny.write(base / f"{task}-{layout}", task, layout)
        return made[task, layout]

    return get


@pytest.fixture
def model(models, tmp_path):
    """A copy of a model that may be changed."""

    def copy(task="t2v", layout="diffusers"):
        return Path(shutil.copytree(models(task, layout), tmp_path / f"{task}-{layout}"))

    return copy


@pytest.fixture(scope="module")
def wide():
    """Native tensors of a transformer whose number of heads is told by its width."""
    return {
        k: v.contiguous() for k, v in tiny.transformer(1, tiny.config("t2v", dim=128, num_heads=1)).state_dict().items()
    }


def refused(what, *parts: str) -> LoadError:
    with pytest.raises((LoadError, SetupError)) as error:
        what()
    for part in parts:
        assert part in str(error.value), f"{part!r} is not in {str(error.value)!r}"
    return error.value


def opened(folder: Path) -> Model:
    return Model.open(str(folder), Setup(model=str(folder)))


# --- whatever decides numbers is read, or absent for sure

DECIDES = [
    ("diffusers", "vae/config.json"), ("diffusers", "transformer/config.json"),
    ("diffusers", "text_encoder/config.json"), ("diffusers", "scheduler/scheduler_config.json"),
    ("diffusers", "tokenizer/tokenizer_config.json"),
    ("diffusers", "tokenizer/tokenizer.json"), ("diffusers", "model_index.json"), ("diffusers", "ditkit.toml"),
    ("diffusers", "ditkit.lock"), ("diffusers", "modular_model_index.json"), ("native", "config.json"),
    ("native", "ditkit.toml"), ("native", "google/umt5-xxl/tokenizer.json"), ("diffusers", "scheduler"),
    ("native", "high_noise_model"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "name"), DECIDES)
@pytest.mark.parametrize("how", ["to nothing", "to itself"])
def test_a_link_that_leads_nowhere_is_not_an_absent_file(model, layout, name, how):
    folder = model("t2v", layout)
    file = folder / name
    if file.is_dir():
        shutil.rmtree(file)
    file.unlink(missing_ok=True)
    file.symlink_to("../../blobs/0123" if how == "to nothing" else file.name)
    refused(lambda: opened(folder), str(file), "link")


@pytest.mark.parametrize(("layout", "name"), [one for one in DECIDES if "." in one[1]])
def test_neither_is_a_folder_or_a_pipe_of_that_name(model, layout, name):
    folder = model("t2v", layout)
    file = folder / name
    file.unlink(missing_ok=True)
    file.mkdir()
    refused(lambda: opened(folder), str(file), "folder" if "scheduler" not in name else "no ordinary file")
    file.rmdir()
    os.mkfifo(file)
    refused(lambda: opened(folder), str(file), "no ordinary file")
    file.unlink()
    file.symlink_to("/dev/zero")
    refused(lambda: opened(folder), str(file), "no ordinary file")


@pytest.mark.parametrize("task", ["i2v"])
def test_the_settings_of_pictures_are_read_or_absent_for_sure(model, task):
    folder = model(task)
    file = folder / "image_processor/preprocessor_config.json"
    file.unlink()
    file.symlink_to("nowhere")
    refused(lambda: opened(folder), str(file), "link")


def lora_beside(folder: Path) -> Path:
    name = "base_model.model.blocks.0.self_attn.q"
    folder.mkdir()
    save_file({f"{name}.lora_A.weight": torch.ones(4, 64), f"{name}.lora_B.weight": torch.ones(64, 4)},
              folder / "adapter_model.safetensors")  # fmt: skip
    return folder / "adapter_model.safetensors"


def adapted(folder: Path, *loras: object) -> Adapters:
    setup = Setup(model=str(folder), loras=[str(lora) for lora in loras])
    return Adapters.open(setup, parts_of(folder))


@functools.cache
def parts_of(folder: Path):
    return find(str(folder)).parts


def test_the_settings_of_a_lora_are_read_or_absent_for_sure(models, tmp_path):
    file = lora_beside(tmp_path / "lora")
    assert adapted(models(), file).by_expert
    (file.parent / "adapter_config.json").symlink_to("nowhere")
    refused(lambda: adapted(models(), file), "adapter_config.json", "link to what is not there")


# --- what systems and downloads leave in folders


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_what_systems_leave_beside_files_is_passed_over(model, tmp_path, layout):
    folder = model("t2v", layout)
    expected = opened(folder).identity
    for file in [file for file in folder.rglob("*") if file.is_file()]:
        file.with_name(f"._{file.name}").write_bytes(APPLE)
        for name in (".DS_Store", "Thumbs.db", "desktop.ini", ".gitattributes", ".x.safetensors.icloud"):
            file.with_name(name).write_bytes(b"x")
    (folder / "__MACOSX").mkdir(exist_ok=True)
    assert opened(folder).identity == expected
    assert main(["convert", str(folder), str(tmp_path / "other"), "--layout", "diffusers", "-q"]) == 0
    assert not [file for file in (tmp_path / "other").rglob("*") if file.name.startswith("._")]


def test_so_it_is_beside_a_lora_and_in_a_lock(models, model, tmp_path):
    file = lora_beside(tmp_path / "lora")
    file.with_name(f"._{file.name}").write_bytes(APPLE)
    assert adapted(models(), file.parent).by_expert
    folder = model()
    assert main(["lock", str(folder)]) == 0
    (folder / "vae" / "._config.json").write_bytes(APPLE)
    (folder / "vae" / "Thumbs.db").write_bytes(b"x")
    opened(folder)
    assert main(["lock", str(folder), "--check"]) == 0


@pytest.mark.parametrize("end", [".aria2", ".incomplete", ".part", ".crdownload"])
def test_a_download_that_is_not_done_is_said(model, end):
    folder = model()
    file = folder / "transformer" / WEIGHTS
    if end == ".aria2":  # the file has its whole size, and zeros where nothing came yet
        Path(f"{file}.aria2").write_bytes(b"x")
        refused(lambda: opened(folder), str(file), "its download is not finished")
        return
    file.rename(f"{file}{end}")
    refused(lambda: opened(folder), str(file.parent), f"downloads that are not finished: {WEIGHTS}{end}")
    refused(lambda: open_source(f"{file}{end}"), "download which is not finished")


NOT_WEIGHTS = {
    "a pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 99\n",
    "a web page": b"<!doctype html><title>403</title>" + b" " * 400, "it is empty": b"",
    "a server's error": b'{"error":"you must be logged in"}', "it begins with zeros": bytes(5000),
    "a packed archive": b"\x1f\x8b\x08" + bytes(100),
}  # fmt: skip


@pytest.mark.parametrize("what", NOT_WEIGHTS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".gguf"])
def test_what_is_no_weights_is_named(tmp_path, capsys, what, suffix):
    file = tmp_path / f"x{suffix}"
    file.write_bytes(NOT_WEIGHTS[what])
    refused(lambda: open_source(file), str(file), what)
    assert main(["inspect", str(file)]) == 2
    assert what in capsys.readouterr().err


def test_a_pointer_of_git_lfs_in_the_place_of_small_files_is_named(model):
    for layout, name in (("native", "google/umt5-xxl/tokenizer.json"), ("diffusers", "vae/config.json")):
        folder = model("t2v", layout)
        (folder / name).write_bytes(NOT_WEIGHTS["a pointer of git-lfs"])
        code = ["generate", "a", "--model", str(folder), *SMALL, "--out", str(folder / "o.npz")]
        assert main(code) == 2
    refused(lambda: opened(folder), "vae/config.json", "a pointer of git-lfs", "git lfs pull")


# --- names


def same(part, tensors) -> bool:
    return part.source.tensors.keys() == tensors.keys() and all(part.source[k].equal(v) for k, v in tensors.items())


@pytest.mark.parametrize("prefix", [
    "net.", "model.net.", "pipe.dit.", "dit.", "generator.", "student.", "base_model.model.", "unet.", "ema.",
    "module.", "_orig_mod.", "model.diffusion_model.", "transformer_2.", "state_dict.model._orig_mod.",
])  # fmt: skip
def test_any_prefix_of_all_names_is_understood(tmp_path, wide, prefix):
    save_file({prefix + name: tensor for name, tensor in wide.items()}, tmp_path / "x.safetensors")
    torch.save({prefix + name: tensor for name, tensor in wide.items()}, tmp_path / "x.pt")
    save_file(wide, tmp_path / "bare.safetensors")
    bare = open_part(tmp_path / "bare.safetensors")
    for file in ("x.safetensors", "x.pt"):
        part = open_part(tmp_path / file)
        assert (part.kind, dict(part.config)) == ("wan", dict(bare.config))
        assert same(part, wide)
        assert part.source.fingerprint == open_source(tmp_path / file).fingerprint


def test_a_patch_embedding_that_is_a_matrix_is_the_convolution(tmp_path, wide):
    flat = wide | {"patch_embedding.weight": wide["patch_embedding.weight"].flatten(1).contiguous()}
    for file, tensors in (("a", flat), ("b", {f"net.{name}": tensor for name, tensor in flat.items()})):
        save_file(tensors, tmp_path / f"{file}.safetensors")
        part = open_part(tmp_path / f"{file}.safetensors")
        assert same(part, wide)
        assert part.source["patch_embedding.weight"].shape == wide["patch_embedding.weight"].shape
        assert any("patch_embedding.weight [128, 64] was taken as [128, 16, 1, 2, 2]" in note for note in part.notes)
        stored = part.source.stored("patch_embedding.weight")
        assert stored.codes.equal(wide["patch_embedding.weight"])
    odd = wide | {"patch_embedding.weight": torch.zeros(128, 63)}
    save_file(odd, tmp_path / "odd.safetensors")
    refused(lambda: open_part(tmp_path / "odd.safetensors"), "patch_embedding.weight has the shape [128, 63]")


def test_a_prefix_of_some_tensors_is_said(tmp_path, wide):
    names = {f"net.{name}": tensor for name, tensor in wide.items()}
    save_file(names | {"other.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    told = ("names that begin with net., and 1 tensors that do not (other.weight)", "Give x.safetensors#net")
    refused(lambda: open_part(tmp_path / "x.safetensors"), *told)
    assert same(open_part(Path(f"{tmp_path}/x.safetensors#net")), wide)
    refused(lambda: open_part(Path(f"{tmp_path}/x.safetensors#nets")), "no name of its tensors begins with 'nets.'")


def test_two_networks_of_one_kind_have_to_be_named(tmp_path, wide):
    ema = {name: tensor + 1 for name, tensor in wide.items()}
    both = {f"generator.{k}": v for k, v in wide.items()} | {f"generator_ema.{k}": v for k, v in ema.items()}
    save_file(both, tmp_path / "x.safetensors")
    refused(lambda: open_part(tmp_path / "x.safetensors"), "2 networks of that kind", "x.safetensors#generator")
    refused(lambda: locate(tmp_path / "x.safetensors"), "two networks for the transformer", "FILE#PREFIX")
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 2
    first, second = (open_part(Path(f"{tmp_path}/x.safetensors#{name}")) for name in ("generator", "generator_ema"))
    assert same(first, wide)
    assert same(second, ema)
    assert first.source.fingerprint != second.source.fingerprint
    assert first.source.sketch != second.source.sketch


@pytest.fixture(scope="module")
def all_in_one(models, wide, tmp_path_factory):
    native = models("t2v", "native")
    parts = {
        "model.diffusion_model.": wide, "vae.": torch.load(native / "Wan2.1_VAE.pth"),
        "text_encoders.umt5xxl.transformer.": load_file(models() / "text_encoder/model.safetensors"),
    }  # fmt: skip
    file = tmp_path_factory.mktemp("all") / "all.safetensors"
    save_file({p + k: v.contiguous() for p, tensors in parts.items() for k, v in tensors.items()}, file)
    return file


def test_each_part_is_opened_from_a_checkpoint_with_all_of_them(models, wide, all_in_one):
    assert len(networks(open_source(all_in_one))) == 3
    found = locate(all_in_one).parts
    assert found.keys() == {"transformer", "vae", "text_encoder"}
    assert same(found["transformer"], wide)
    for name, other in (
        ("vae", models("t2v", "native") / "Wan2.1_VAE.pth"),
        ("text_encoder", models() / "text_encoder"),
    ):
        one, expected = open_part(all_in_one, name), open_part(other, name)
        assert same(one, dict(expected.source))
        assert one.source.fingerprint != found["transformer"].source.fingerprint
        assert any("other tensors of all.safetensors" in note for note in one.notes)
    refused(lambda: open_part(all_in_one, "image_encoder"), "Give clip")


def test_so_it_runs_and_is_inspected(models, all_in_one, tmp_path, capsys):
    job = ["generate", "a", *SMALL, "--out", str(tmp_path / "a.npz")]
    assert main([*job, "--model", str(models()), "--components", f"vae={all_in_one}"]) == 0
    assert main(["inspect", str(all_in_one)]) == 2  # no tokenizer
    out = capsys.readouterr().out
    for part in ("transformer", "vae", "text_encoder", "it needs a tokenizer"):
        assert part in out


def test_a_part_of_it_that_cannot_be_opened_is_said(models, tmp_path):
    narrow = load_file(models("t2v", "native") / WEIGHTS)
    vae = torch.load(models("t2v", "native") / "Wan2.1_VAE.pth")
    both = {f"model.diffusion_model.{k}": v for k, v in narrow.items()} | {f"vae.{k}": v for k, v in vae.items()}
    save_file(both, tmp_path / "all.safetensors")
    found = locate(tmp_path / "all.safetensors")
    assert "shapes do not tell num_heads" in found.unused["all.safetensors#model.diffusion_model"]
    refused(lambda: open_part(tmp_path / "all.safetensors", "transformer"), "shapes do not tell num_heads")


def test_a_native_folder_may_hold_such_a_checkpoint(models, all_in_one, tmp_path):
    shutil.copy(all_in_one, tmp_path / "all.safetensors")
    shutil.copytree(models("t2v", "native") / "google", tmp_path / "google")
    assert find(str(tmp_path)).check().task == "t2v"


# --- other forms of the same weights


def test_a_whole_umt5_is_read_without_its_decoder(model):
    folder = model() / "text_encoder"
    encoder = dict(open_part(folder).source)
    tensors = load_file(folder / "model.safetensors")
    names = ("decoder.block.0.layer.0.SelfAttention.q.weight", "lm_head.weight", "decoder.embed_tokens.weight")
    more = {name: torch.zeros(128, 32) for name in names}
    save_file(tensors | more, folder / "model.safetensors")
    assert same(open_part(folder), encoder)
    assert main(["inspect", str(folder)]) == 0


def test_shards_of_pickles_are_read(model):
    folder = model() / "text_encoder"
    encoder, tensors = dict(open_part(folder).source), load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, cut = list(tensors), len(tensors) // 2
    shards = {f"pytorch_model-0000{i}-of-00002.bin": part for i, part in ((1, names[:cut]), (2, names[cut:]))}
    for shard, own in shards.items():
        torch.save({name: tensors[name] for name in own}, folder / shard)
    refused(lambda: open_part(folder), "2 shards are named by no index", "Add the .bin.index.json file")
    index = {"metadata": {}, "weight_map": {name: shard for shard, own in shards.items() for name in own}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert same(open_part(folder), encoder)
    (folder / next(iter(shards))).unlink()
    refused(lambda: open_part(folder), "1 of them are not there (pytorch_model-00001-of-00002.bin)")
    save_file(tensors, folder / "model.safetensors")  # where there are safetensors, nothing else is looked at
    assert same(open_part(folder), encoder)


@pytest.mark.parametrize("arch", ["wan", "pig", "x"])
def test_a_gguf_is_told_by_its_tensors(tmp_path, wide, arch):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", arch)
    for name, tensor in wide.items():
        array = tensor.numpy()
        if array.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(array.shape))
            array = array.reshape(-1, *array.shape[2:])
        writer.add_tensor(name, array)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    assert same(open_part(tmp_path / "x.gguf"), wide)


def compressed(bits: int, kind: str) -> dict:
    weights = {"num_bits": bits, "strategy": "tensor", "type": kind}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


QUANTIZED = [
    ({"quant_method": "modelopt", "quant_algo": "FP8"}, None), (compressed(8, "float"), None),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "says"), ({"load_in_8bit": True}, "says"), ("fp8", "says"),
    (compressed(4, "int"), "says"), (compressed(8, "int"), "says"),
]  # fmt: skip


@pytest.mark.parametrize(("told", "fault"), QUANTIZED)
def test_a_quantization_config_is_held_against_the_tensors(model, told, fault):
    folder = model() / "transformer"
    tensors = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        tensors[name] = tensor
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2:
            scale, layer = tensor.abs().max() / 448, name.removesuffix("weight")
            tensors[name] = (tensor / scale).to(torch.float8_e4m3fn)
            tensors |= {f"{layer}weight_scale": scale.reshape(()), f"{layer}input_scale": torch.tensor(1.0)}
    save_file(tensors, folder / WEIGHTS)
    plain = open_part(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": told}))
    if fault is None:
        assert open_part(folder).config == plain.config
        return
    refused(
        lambda: open_part(folder), str(folder / "config.json"), "quantization_config says", "the tensors are fp8_scaled"
    )
    bare = {k: v for k, v in tensors.items() if not k.endswith("_scale")}
    save_file(bare, folder / WEIGHTS)  # its scales were lost
    told = {"quant_method": "modelopt", "quant_algo": "FP8"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": told}))
    refused(lambda: open_part(folder), "the tensors are fp8 without scales")


# --- sentences name their file


def test_problems_name_their_file(model, models, capsys):
    folder = model()
    file = folder / "scheduler/scheduler_config.json"
    for text in ("{", None):
        file.unlink()
        if text:
            file.write_text(text)
        assert main(["inspect", str(folder)]) == 2
        said = capsys.readouterr()
        assert str(file) in (said.out + said.err).replace("\n", "")
    refused(lambda: opened(models("t2v", "native") / "config.json"), "config.json", "it is a config of WanModel")


def test_shards_without_an_index_are_named_in_a_native_folder(model):
    folder = model("t2v", "native")
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    for i, names in enumerate((list(tensors)[:30], list(tensors)[30:])):
        save_file({n: tensors[n] for n in names}, folder / f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors")
    refused(lambda: opened(folder), "it is a shard that no index names. Add the .safetensors.index.json file")


def test_marks_at_the_beginning_of_texts_are_read(model):
    folder = model()
    expected = opened(folder).identity
    for file in [*folder.rglob("*config.json"), folder / "model_index.json"]:
        file.write_text("\ufeff" + file.read_text(), encoding="utf-8")
    (folder / "ditkit.toml").write_text("\ufeff[defaults]\nsteps = 3\n", encoding="utf-8")
    found = opened(folder)
    assert (found.identity, found.own_defaults) == (expected, {"steps": 3})


@pytest.mark.parametrize(
    "key", ['vae = "C:\\temp\\new"', 'vae = { path = "C:\\temp" }', 'vae = { path = ".", file = "\\n" }']
)
def test_backslashes_in_a_manifest_are_pointed_out(model, key):
    folder = model()
    (folder / "ditkit.toml").write_text(f"[components]\n{key}\n")
    refused(lambda: opened(folder), str(folder / "ditkit.toml"), "in the path", "single quotes")


def test_backslashes_in_settings_are_pointed_out(tmp_path):
    refused(lambda: find("C:\temp\new"), "there is a tab", "single quotes")
    refused(lambda: find("shapes", Setup(model="shapes", components={"vae": "C:\new"})), "line break")
    refused(lambda: Wanted.parse("C:\temp.safetensors"), "there is a tab")


NAMES = [
    "[Wan2.2] style",
    "a, b",
    "x=1",
    "c#2",
    "d@e",
    "漢字 é",
    "{f}",
    "[g]",
    "h:i",
    "100%",
    "j'k",
    'l"m',
    "k;l&m",
    "1",
]


@pytest.mark.parametrize("name", NAMES)
def test_files_of_any_name_work(models, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copy(lora_beside(tmp_path / "lora"), f"{name}.safetensors")
    (tmp_path / name).symlink_to(models() / "vae")
    for text, strength in (
        (f"{name}.safetensors", 1),
        (f"{name}.safetensors:0.5", 0.5),
        (f"./{name}.safetensors:2", 2),
    ):
        for given in (RawSettings({"loras": [text]}), RawSettings({}, [f"loras={text}"])):
            (wanted,) = map(Wanted.parse, settle(*given.layers()).setup().loras)
            assert (wanted.path, wanted.strength) == (tmp_path / f"{name}.safetensors", strength)
    components = {"components": [f"vae={name}"], "model": [str(models())]}
    setup = settle(*RawSettings(components).layers()).setup()
    assert find(setup.model, setup).parts["vae"].path.parent == tmp_path / name
    assert adapted(models(), f"both={name}.safetensors").by_expert


def test_a_file_whose_whole_name_is_there_comes_first(tmp_path):
    (tmp_path / "style:0.5").write_bytes(b"x")
    assert Wanted.parse(f"{tmp_path}/style:0.5").strength == 1.0
    assert Wanted.parse(f"{tmp_path}/style:0.5:0.25").strength == 0.25


# --- LoRAs


def lora(folder: Path, tensors: dict, settings: object = None, inside: bool = False) -> Path:
    """A LoRA with peft's settings beside it, or in it as diffusers writes them."""
    folder.mkdir(exist_ok=True)
    text = settings if isinstance(settings, str) else json.dumps(settings)
    notes = {"lora_adapter_metadata": text} if inside else None
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors", notes)
    if settings is not None and not inside:
        (folder / "adapter_config.json").write_text(text)
    return folder / "adapter_model.safetensors"


Q = "base_model.model.blocks.0.self_attn.q"
PAIR = {f"{Q}.lora_A.weight": torch.ones(4, 64) / 64, f"{Q}.lora_B.weight": torch.ones(64, 4)}
NO_NUMBER = ["8", [8], {"a": 8}, True, float("nan"), float("inf"), "nan", 10**400]
NO_RANK = [*NO_NUMBER, -4, 0, 4.5, 2**70]
WRONG = [
    *({"r": 4, "lora_alpha": value} for value in NO_NUMBER), *({"r": value, "lora_alpha": 8} for value in NO_RANK),
    *({"r": 4, "alpha": value} for value in NO_NUMBER),
    *({"r": 4, "lora_alpha": 8, "alpha_pattern": {"q": value}} for value in NO_NUMBER),
    *({"r": 4, "lora_alpha": 8, "rank_pattern": {"q": value}} for value in NO_RANK),
    {"r": 4, "alpha_pattern": ["q"]}, {"r": 4, "rank_pattern": "q"}, {"r": 4, "rank_pattern": {"[": 4}},
    {"r": 4, "rank_pattern": {"((.*)*)*!": 4}}, {"r": 4, "alpha_pattern": {"*.q": 16}}, {"r": 4, "use_rslora": "yes"},
    {"r": 4, "use_dora": [1]}, {"r": 4, "fan_in_fan_out": 1}, {"peft_type": ["LORA"]}, {"peft_type": 5}, [], "{", "5",
    "\ufeff[]", '{"r":' + "[" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("inside", [False, True])
def test_settings_that_are_none_are_refused_in_one_sentence(models, tmp_path, capsys, inside):
    for settings in WRONG:
        file = lora(tmp_path / "lora", PAIR, settings, inside)
        refused(lambda file=file: adapted(models(), file), str(file.parent))
        refused(lambda file=file: inspect_lora(open_source(file)), str(file.parent))
    for more in ([], ["--model", str(models())]):
        assert main(["inspect", str(file), *more]) == 2
        said = capsys.readouterr()
        assert said.err.count("error:") == 1
        assert str(file.parent) in said.err


def test_settings_that_are_read(models, tmp_path):
    weight = torch.zeros(64, 64)
    for settings, scale in (
        ({"r": 4, "lora_alpha": 8}, 2), ({"r": 4, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": None}, 2),
        ({"r": 8, "lora_alpha": 8, "rank_pattern": {"self_attn.q": 4}}, 2), ({"r": 4, "alpha": 8}, 2),
        ({"r": 4, "alpha_pattern": {"^blocks.0.self_attn.q": 16}}, 4), ({"r": 4, "lora_alpha": -4.0}, -1),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {r".*\.(q|k)": 16, "q": 32}}, 4),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4), ({"lora_alpha": 0, "r": 4}, 0),
    ):  # fmt: skip
        file = lora(tmp_path / "lora", PAIR, settings)
        ((adapter, _),) = adapted(models(), file).by_expert["transformer"]
        added = adapter.added("blocks.0.self_attn.q.weight", weight)
        assert added.equal(torch.full((64, 64), scale * 4 / 64)), settings


K = "diffusion_model.blocks.0.self_attn.q"
DOWN, UP = torch.ones(4, 64) / 64, torch.ones(64, 4)


@pytest.mark.parametrize("dtype", [
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32,
    torch.int8, torch.uint8,
])  # fmt: skip
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_an_alpha_of_any_type_is_a_number(models, tmp_path, dtype, shape):
    factor = dtype if dtype.is_floating_point else torch.float32
    tensors = {f"{K}.lora_down.weight": DOWN.to(factor), f"{K}.lora_up.weight": UP.to(factor)}
    file = lora(tmp_path / "lora", tensors | {f"{K}.alpha": torch.full(shape, 8).to(dtype)})
    ((adapter, _),) = adapted(models(), file).by_expert["transformer"]
    assert adapter.added("blocks.0.self_attn.q.weight", torch.zeros(64, 64)).equal(torch.full((64, 64), 8 / 64))


ODD = {
    "only A": {f"{K}.lora_down.weight": DOWN}, "only B": {f"{K}.lora_up.weight": UP},
    "only alpha": {f"{K}.alpha": torch.tensor(4.0)}, "nothing": {},
    "no rank": {f"{K}.lora_down.weight": DOWN[:0], f"{K}.lora_up.weight": UP[:, :0]},
    "no axes": {f"{K}.lora_down.weight": DOWN[0, 0], f"{K}.lora_up.weight": UP},
    "one axis": {f"{K}.lora_down.weight": DOWN[0], f"{K}.lora_up.weight": UP},
    "other ranks": {f"{K}.lora_down.weight": DOWN[:3], f"{K}.lora_up.weight": UP},
    "whole numbers": {f"{K}.lora_down.weight": DOWN.long(), f"{K}.lora_up.weight": UP},
    "truths": {f"{K}.lora_down.weight": DOWN > 0, f"{K}.lora_up.weight": UP},
    "turned": {f"{K}.lora_down.weight": DOWN.T, f"{K}.lora_up.weight": UP.T},
    "long": {f"{K}.lora_down.weight": torch.ones(4, 65), f"{K}.lora_up.weight": UP},
    "a difference of nothing": {f"{K}.diff": torch.tensor(1.0)}, "half a loha": {f"{K}.hada_w1_a": UP},
    "a lokr of numbers": {f"{K}.lokr_w1": torch.tensor(1.0), f"{K}.lokr_w2": torch.tensor(1.0)},
    "a patch of nothing": {"diffusion_model.patch_embedding.diff": torch.tensor(1.0)},
    **{f"alpha {value}": {f"{K}.lora_down.weight": DOWN, f"{K}.lora_up.weight": UP, f"{K}.alpha": value}
       for value in (torch.tensor(float("nan")), torch.tensor(float("inf")), torch.ones(3), torch.ones(0),
                     torch.tensor(True), torch.tensor(1e300, dtype=torch.float64))},
}  # fmt: skip


@pytest.mark.parametrize("what", ODD)
def test_odd_tensors_are_refused_in_one_sentence(models, tmp_path, capsys, what):
    file = lora(tmp_path / "lora", ODD[what])
    refused(lambda: adapted(models(), file), str(file))
    for more in ([], ["--model", str(models())]):
        code = main(["inspect", str(file), *more])
        fits_itself = what in ("turned", "long", "a difference of nothing", "a patch of nothing")
        assert code == (0 if fits_itself and not more else 2)
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["side", "fused"])
def test_what_is_no_number_never_becomes_a_clip(models, tmp_path, capsys, mode):
    job = ["generate", "a", "--model", str(models()), *SMALL, "--lora-mode", mode, "--out", str(tmp_path / "o.npz")]
    for value, strength in ((float("nan"), 1), (float("inf"), 1), (1e30, 1e30), (1.0, "nan"), (1.0, 1e300)):
        file = lora(tmp_path / "lora", {f"{K}.lora_down.weight": DOWN * value, f"{K}.lora_up.weight": UP * value})
        assert main([*job, "--loras", f"{file}:{strength}"]) == 2, (value, strength)
        assert capsys.readouterr().err.count("error:") == 1
    assert not (tmp_path / "o.npz").exists()


def test_loras_in_two_kinds_of_8_bits_stand_beside_each_other(models, tmp_path):
    files = []
    for name, dtype in (("a", torch.float8_e4m3fn), ("b", torch.float8_e5m2), ("c", torch.float16)):
        files.append(
            lora(tmp_path / name, {f"{K}.lora_down.weight": DOWN.to(dtype), f"{K}.lora_up.weight": UP.to(dtype)})
        )
    job = ["generate", "a", "--model", str(models()), *SMALL, "--out", str(tmp_path / "o.npz")]
    assert main([*job, *(word for file in files for word in ("--loras", str(file)))]) == 0
