"""Known faults of other loaders, each shown to be absent here: R of the predecessors, F of diffusers, L of the tools
around ComfyUI; and what a file, a config or a disk can get wrong, which is one sentence and never a traceback.

Kept elsewhere: R3 one shard of several (``test_files.py``, ``test_load.py``), code in pickles (``test_pickles.py``),
F16 parts that fail (``test_predecessors.py``), F19 to F22 saving and revisions (``test_manifest.py``, ``test_hub.py``),
F23 and the traps of LoRAs (``test_lora.py``, ``test_lora_peft.py``), all layouts (``test_detect.py``)."""

import contextlib
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from shell import alone

import ditkit
from ditkit.assembly.components import Components
from ditkit.assembly.model import Model
from ditkit.checkpoints.convert.convert import convert
from ditkit.checkpoints.files.opening import open_source
from ditkit.checkpoints.kinds.kind import KINDS
from ditkit.checkpoints.model.find import locate
from ditkit.checkpoints.model.open_part import open_part
from ditkit.checkpoints.views.mapped import Mapped
from ditkit.checkpoints.views.source import Facts, View
from ditkit.cli.weights import examine
from ditkit.errors import DitkitError, LoadError
from ditkit.models import clip, umt5
from ditkit.models.published import OFFICIAL
from ditkit.models.wan import WanConfig, WanTransformer
from ditkit.models.wan_vae import WanVAE, WanVAE22, WanVAE22Config, WanVAEConfig
from ditkit.setup import Setup

WEIGHTS = "diffusion_pytorch_model.safetensors"
T5, VAE = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    at = tmp_path_factory.mktemp("models")
    made = {}

    def model(task: str, layout: str) -> Path:
        if (task, layout) not in made:
            made[task, layout] = tiny.write(at / layout / task, task, layout)
        return made[task, layout]

    return model


@pytest.fixture
def copy(models, tmp_path):
    count = iter(range(1000))

    def make(task: str = "t2v", layout: str = "diffusers") -> Path:
        return Path(shutil.copytree(models(task, layout), tmp_path / f"copy{next(count)}"))

    return make


def components(folder: Path, **options) -> Components:
    setup = Setup(model=str(folder), **options)
    return Components(Model.open(str(folder), setup), setup)


def load_all(folder: Path) -> None:
    parts = components(folder)
    for name in parts:
        parts[name]


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(folder: Path, *said: str) -> None:
    """Loading it is an error that says so, and inspecting it does not find it usable."""
    with pytest.raises(LoadError) as error:
        load_all(folder)
    for part in said:
        assert part in str(error.value), f"{part!r} is not in {str(error.value)!r}"
    with contextlib.suppress(LoadError):
        assert not examine(folder)["usable"]


def tensors_of(file: Path) -> dict[str, torch.Tensor]:
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)


def store(tensors: dict[str, torch.Tensor], file: Path) -> None:
    save_file(tensors, file) if file.suffix == ".safetensors" else torch.save(tensors, file)


# --- strict loading

FILES = {
    ("diffusers", "transformer"): f"transformer/{WEIGHTS}",
    ("diffusers", "vae"): f"vae/{WEIGHTS}",
    ("diffusers", "text_encoder"): "text_encoder/model.safetensors",
    ("diffusers", "image_encoder"): "image_encoder/model.safetensors",
    ("native", "transformer"): WEIGHTS,
    ("native", "vae"): VAE,
    ("native", "text_encoder"): T5,
    ("native", "image_encoder"): "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
}


@pytest.mark.parametrize(("layout", "component"), FILES)
@pytest.mark.parametrize("number", [0, -1])
def test_r17_one_renamed_tensor_fails_the_load(copy, layout, component, number):
    """Loaders with strict=False report success and leave what they do not find random."""
    folder = copy("i2v", layout)
    tensors = tensors_of(folder / FILES[layout, component])
    ignored = ("textual.", "log_scale", "visual.head")
    name = sorted(name for name in tensors if not name.startswith(ignored))[number]
    head, _, leaf = name.rpartition(".")
    tensors[f"{head}.{leaf}_" if head else f"{leaf}_"] = tensors.pop(name)
    store(tensors, folder / FILES[layout, component])
    refused(folder)


@pytest.mark.parametrize(("layout", "component"), FILES)
@pytest.mark.parametrize("lost", [True, False])
def test_r17_a_tensor_that_is_lost_and_one_too_many(copy, layout, component, lost):
    """Each for itself: a renamed tensor is both, and one of the two checks would find it."""
    folder = copy("i2v", layout)
    tensors = tensors_of(folder / FILES[layout, component])
    name = next(name for name in sorted(tensors, reverse=True) if name.endswith(".weight") and "textual" not in name)
    if lost:
        tensors.pop(name)
    else:
        tensors[name.replace(".weight", ".wait")] = tensors[name].clone()
    store(tensors, folder / FILES[layout, component])
    refused(folder)


def test_r17_an_image_encoder_is_loaded_whole_or_not_at_all(copy):
    """The image-to-video fork of a predecessor "loaded" CLIP without one name that fitted, and it stayed random."""
    folder = copy("i2v")
    file = folder / FILES["diffusers", "image_encoder"]
    before = load_file(file)
    loaded = dict(components(folder)["image_encoder"].model.named_parameters())
    assert len(loaded) > 20
    assert all(torch.equal(value, before[f"vision_model.{name}"]) for name, value in loaded.items())
    for prefix in ("image_model.", "vision_model.vision_model."):
        renamed = {prefix + name.removeprefix("vision_model."): value for name, value in before.items()}
        save_file(renamed, file)
        loaded = dict(components(folder)["image_encoder"].model.named_parameters())
        assert all(torch.equal(value, before[f"vision_model.{name}"]) for name, value in loaded.items())
        half = len(renamed) // 2
        save_file(dict([*list(renamed.items())[:half], *list(before.items())[half:]]), file)
        refused(folder, "image_encoder")


def test_r17_a_tensor_of_another_shape_or_type_fails_the_load(copy):
    folder = copy("i2v")
    file = folder / FILES["diffusers", "image_encoder"]
    whole = load_file(file)
    name = "vision_model.encoder.layers.1.layer_norm1.bias"
    for wrong in (whole[name][:-1].clone(), whole[name].long(), whole[name][None].clone()):
        save_file({**whole, name: wrong}, file)
        refused(folder, "layer_norm1.bias")


def test_k5_a_pickle_that_would_run_code_fails_the_load_of_its_model(copy, tmp_path):
    """Weights that are opened with the full unpickler run what their maker wanted."""
    folder = copy("t2v", "native")

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({**tensors_of(folder / VAE), "evil": Evil()}, folder / VAE)
    refused(folder, "it needs a Wan VAE", "it is a pickle that needs to run")
    assert not (tmp_path / "ran").exists()


# --- F12 and K4: the true shapes of all official models, in files of headers alone


class Shapes(View):
    """The facts of a module without memory."""

    path, notes = Path("x"), ()

    def __init__(self, module):
        self.tensors = {name: Facts("BF16", tuple(t.shape)) for name, t in module.state_dict().items()}


def on_meta(make):
    with torch.device("meta"):
        return Shapes(make())


def hollow(file: Path, tensors, prefix: str = "") -> Path:
    """A safetensors file of these shapes that takes no room: its data is a hole of zeros."""
    header, end = {}, 0
    for name, facts in tensors.items():
        size = 2 * torch.Size(facts.shape).numel()
        header[prefix + name] = {"dtype": "BF16", "shape": list(facts.shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        stream.truncate(8 + len(raw) + end)
    return file


SIZES = {"1.3b": "1.3B", "14b": "14B", "a14b": "14B", "5b": "5B"}


@pytest.mark.parametrize(("layout", "prefix"), [("native", "diffusion_model."), ("diffusers", "")])
@pytest.mark.parametrize("name", OFFICIAL)
def test_f12_every_official_transformer_in_one_file(name, layout, prefix, tmp_path):
    """A single file of I2V-A14B, FLF2V or TI2V-5B gets another model's config, one with the prefix
    ``diffusion_model.`` that of Stable Diffusion 1.5."""
    official = OFFICIAL[name]
    source = on_meta(lambda: WanTransformer(official.config))
    if layout == "diffusers":
        source = Mapped(source, KINDS["wan"].keys(asdict(official.config)), "other")
    report = examine(hollow(tmp_path / "wan2.1_t2v_1.3B_fp16.safetensors", source.tensors, prefix))
    assert report["usable"], report["problems"]
    (part,) = report["parts"].values()
    version, task, size = name.removeprefix("wan").split("-")
    assert (part["variant"], part["size_name"], part["prefix"], part["layout"]) == (task, SIZES[size], prefix, layout)
    assert f"Wan {version}" in part["family"]
    assert any(one.startswith(f"Wan {version} {task.upper()}") for one in part["possible"])
    assert (part["parameters"], part["tensors"]) == (official.parameters, official.tensors)
    told = {key: tuple(value) if isinstance(value, list) else value for key, value in part["config"].items()}
    assert WanConfig(**told) == official.config


PARTS = {
    "VAE 2.1": (lambda: WanVAE(WanVAEConfig()), "wan_vae", asdict(WanVAEConfig()), 126_892_531),
    "VAE 2.2": (lambda: WanVAE22(WanVAE22Config()), "wan_vae22", asdict(WanVAE22Config()), 704_688_668),
}


@pytest.mark.parametrize(("layout", "prefix"), [("native", "module."), ("diffusers", "")])
@pytest.mark.parametrize("name", PARTS)
def test_f12_both_vaes_in_one_file(name, layout, prefix, tmp_path):
    """The Wan 2.2 VAE gets the config of the 2.1 one."""
    make, kind, config, parameters = PARTS[name]
    source = on_meta(make)
    if layout == "diffusers":
        source = Mapped(source, KINDS[kind].keys(config), "other")
    report = examine(hollow(tmp_path / "x.safetensors", source.tensors, prefix))
    assert report["usable"], report["problems"]
    part = report["parts"]["vae"]
    assert (part["kind"], part["layout"], part["parameters"]) == (kind, layout, parameters)
    for key in ("dim", "z_dim", "num_res_blocks"):
        assert part["config"][key] == config[key]


@pytest.mark.parametrize("layout", ["native", "transformers"])
def test_k4_both_encoders_at_full_size(layout, tmp_path):
    for module, table, wanted, kind in (
        (
            umt5.build_umt5(umt5.UMT5Config()),
            KINDS["umt5"].keys(asdict(umt5.UMT5Config())),
            asdict(umt5.UMT5Config()),
            "umt5",
        ),
        (
            clip.build_clip(clip.CLIPConfig()),
            KINDS["clip"].keys(asdict(clip.CLIPConfig())),
            asdict(clip.CLIPConfig()),
            "clip",
        ),
    ):
        shapes = Shapes(module)
        shapes.tensors.pop("encoder.embed_tokens.weight", None)
        source = Mapped(shapes, table, "native") if layout == "native" else shapes
        file = hollow(tmp_path / "x.safetensors", source.tensors)
        report = examine(file)
        assert report["usable"], report["problems"]
        (part,) = report["parts"].values()
        assert part["kind"] == kind
        assert {key: part["config"][key] for key in part["config"]}.items() <= wanted.items()


@pytest.mark.parametrize(("channels", "image", "relative"), [(48, False, "Fun-Control"), (48, True, "Fun-Control"),
                                                             (32, False, "control by extra channels")])  # fmt: skip
def test_f12_fun_control_is_named_and_not_taken_for_another(channels, image, relative, tmp_path):
    """Fun-Control 1.3B gets a text-to-video config, and fails later or makes noise."""
    config = WanConfig(in_dim=channels, image_dim=1280 if image else None)
    report = examine(hollow(tmp_path / "x.safetensors", on_meta(lambda: WanTransformer(config)).tensors))
    assert not report["usable"]
    assert relative in report["problems"][0]


# --- names of files


@pytest.mark.parametrize("name", ["wan_720p_high_noise_flf2v.safetensors", "fun_control_480_low_5B_vace.pt"])
def test_l14_the_name_of_a_file_changes_nothing(models, copy, name):
    """A tool that looks for "480", "high", "fun" or "flf2v" in the file name computes something else after a rename."""
    request = {"prompt": "a red circle", "width": 32, "height": 32, "frames": 5, "steps": 2}
    plain = ditkit.load(models("t2v", "native"))
    folder = copy("t2v", "native")
    (folder / WEIGHTS).rename(folder / name)
    (folder / VAE).rename(folder / "transformer.ckpt")
    renamed = ditkit.load(folder)
    assert renamed.model.task == plain.model.task
    assert renamed.model.defaults_for({}) == plain.model.defaults_for({})
    assert renamed.model.identity == plain.model.identity
    assert (renamed(**request).video == plain(**request).video).all()


def test_l14_weights_under_each_others_names(copy):
    """In folders of components, what a file holds goes before what its folder is called: it is refused."""
    folder = copy()
    first, second = folder / "vae" / WEIGHTS, folder / "transformer" / WEIGHTS
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    refused(folder, "as transformer: its tensors are those of wan_vae")


def test_a_lora_is_no_model_and_a_model_is_no_lora(models, copy):
    pair = {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 64),
            "diffusion_model.blocks.0.self_attn.q.lora_B.weight": torch.zeros(64, 4)}  # fmt: skip
    folder = copy()
    save_file(pair, folder / "transformer" / WEIGHTS)
    refused(folder, "it is a lora")
    model = models("t2v", "native")
    for file in (WEIGHTS, VAE, T5):
        with pytest.raises(LoadError, match="it does nothing here"):
            ditkit.load(str(model), loras=[str(model / file)])
    for file in ("config.json", "google", "google/umt5-xxl/tokenizer.json"):
        with pytest.raises(LoadError):
            ditkit.load(str(model), loras=[str(model / file)])


# --- folders


def test_two_transformers_in_one_native_folder(models, copy):
    folder = copy("t2v", "native")
    shutil.copy(folder / WEIGHTS, folder / "another.safetensors")
    refused(folder, "both another.safetensors and", "are its transformer")
    folder = copy("t2v", "native")
    shutil.copytree(models("t2v_a14b", "native") / "low_noise_model", folder / "low_noise_model")
    refused(folder, f"it has the transformer {WEIGHTS} and another one in low_noise_model")


def test_an_empty_folder_of_an_expert_is_not_passed_over(copy):
    for name in ("low_noise_model", "high_noise_model"):
        folder = copy("t2v", "native")
        (folder / name).mkdir()
        refused(folder, name)


def test_f1_each_expert_has_its_own_weights(models):
    """Blocks of the second expert are read from files of the first one, because both are told by their numbers."""
    for layout in tiny.LAYOUTS:
        parts = components(models("t2v_a14b", layout))
        high, low = (dict(parts[name].named_parameters()) for name in ("transformer", "transformer_2"))
        for loaded, made in zip((high, low), tiny.experts("t2v_a14b"), strict=True):
            wanted = dict(made.named_parameters())
            assert loaded.keys() == wanted.keys()
            assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)
        assert not any(torch.equal(high[name], low[name]) for name in high)


def test_f2_files_that_change_are_another_model(copy):
    """What an earlier run or another model left in a folder is taken for this model's own."""
    folder = copy()
    before = ditkit.load(folder)
    kept = {name: value.clone() for name, value in before.components["transformer"].named_parameters()}
    file = folder / "transformer" / WEIGHTS
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    after = ditkit.load(folder, share_with=before)
    assert all(torch.equal(kept[name], value) for name, value in before.components["transformer"].named_parameters())
    assert all(torch.equal(kept[name] + 1, v) for name, v in after.components["transformer"].named_parameters())
    assert after.model.identity != before.model.identity


def test_f13_a_boundary_is_written_for_two_experts_only(models, tmp_path):
    """A converted Wan 2.1 with a boundary asks for an expert that it does not have."""
    for task in ("t2v", "i2v", "ti2v", "t2v_a14b", "i2v_a14b"):
        convert(models(task, "native"), tmp_path / task, "diffusers")
        index = json.loads((tmp_path / task / "model_index.json").read_text())
        assert index.get("boundary_ratio") == tiny.BOUNDARY.get(task)
        second = index.get("transformer_2", [None, None]) != [None, None]
        assert second == (task in tiny.BOUNDARY)
        assert index.get("expand_timesteps", False) == (task == "ti2v")
        assert locate(tmp_path / task).check().boundary == tiny.BOUNDARY.get(task)


def test_f14_a_dtype_is_the_one_that_was_asked_for(models, tmp_path):
    """Without a dtype any checkpoint is widened to float32, on every device, and nothing says so."""
    convert(models("t2v", "native"), tmp_path / "half", "diffusers", "bfloat16")
    part = open_part(tmp_path / "half" / "transformer", "transformer")
    assert {facts.dtype for facts in part.source.tensors.values()} == {"BF16"}
    for asked in ("bfloat16", "float16", "float32"):
        parts = components(tmp_path / "half", dtype=asked, dtype_policy="float32")
        parts["transformer"], parts["text_encoder"]
        wide = {p.dtype for p in parts["transformer"].parameters()}
        assert getattr(torch, asked) in wide
        assert parts.describe()["transformer"]["dtype"] == asked
    parts = components(tmp_path / "half")
    parts["transformer"]
    expected = "bfloat16" if torch.cuda.is_available() else "float32"
    assert parts.describe()["transformer"]["dtype"] == expected  # auto goes by the device, and is told
    done = convert(tmp_path / "half", tmp_path / "again", "native")
    assert set(done.types.values()) == {"BF16"}  # kept unless it is asked for


def test_f17_dtype_precision_and_content_are_part_of_an_identity(models, copy):
    """Two loads of one repository in different types look the same."""
    folder = models("t2v", "diffusers")
    seen = {
        components(folder, **how)["transformer"].identify()
        for how in ({}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "dtype_policy": "diffusers"}, {"dtype": "float64"})
    }
    other = copy()
    file = other / "transformer" / WEIGHTS
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1  # one bit of the last number
    file.write_bytes(raw)
    assert len({*seen, components(other)["transformer"].identify()}) == 5
    same = copy()
    assert components(same)["transformer"].identify() == components(folder)["transformer"].identify()


def test_f18_the_same_model_twice_is_held_once(models):
    first = ditkit.load(models("t2v", "diffusers"))
    second = ditkit.load(models("t2v", "diffusers"), share_with=first)
    assert all(first.components[name] is second.components[name] for name in first.components)


# --- damage


def test_shards_of_another_model(models, copy):
    def shards(folder: Path) -> Path:
        part = folder / "transformer"
        tensors = load_file(part / WEIGHTS)
        (part / WEIGHTS).unlink()
        names = sorted(tensors)
        index = {}
        for n, half in enumerate((names[::2], names[1::2]), 1):
            file = f"diffusion_pytorch_model-{n:05}-of-00002.safetensors"
            save_file({name: tensors[name] for name in half}, part / file)
            index |= dict.fromkeys(half, file)
        (part / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}))
        return part

    one, other = copy("t2v"), copy("ti2v")
    mine, theirs = shards(one), shards(other)
    load_all(one)
    name = "diffusion_pytorch_model-00002-of-00002.safetensors"
    shutil.copy(theirs / name, mine / name)
    refused(one, "in_channels is 16 in the config and 48")
    index = mine / f"{WEIGHTS}.index.json"
    good = json.loads(index.read_text())["weight_map"]
    first = next(iter(good))
    outside = ("../x.safetensors", "/etc/passwd", "", ".", "a/../b.safetensors", "x\0.safetensors", 5, None, ["x"])
    for place in outside:
        index.write_text(json.dumps({"weight_map": good | {first: place}}))
        refused(one)


@pytest.mark.parametrize("index", [[1], {"weight_map": [1, 2]}, {"weight_map": {"a": ["x"]}}, {"weight_map": {}}, {}])
def test_a_bad_index_in_a_native_folder(copy, index):
    folder = copy("t2v", "native")
    (folder / "x.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "x.safetensors.index.json")


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, "not made of whole numbers"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "not made of whole numbers"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4]}}, "not made of whole numbers"),
        ({"a": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4 * 10**18]}}, "its header asks for"),
        ({"\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "cannot be understood"),
        ({"__metadata__": {"_quantization_metadata": 5}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
         "something other than texts"),
    ],
)  # fmt: skip
def test_headers_that_end_in_a_traceback_elsewhere(tmp_path, header, said):
    raw = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * 4)
    with pytest.raises(LoadError, match=said) as error:
        examine(tmp_path / "x.safetensors")
    str(error.value).encode()


def test_tensors_on_one_storage(copy):
    """A file whose tensors are views of one big storage is read whole for each, or loses all but the first."""
    folder = copy("t2v", "native")
    tensors = tensors_of(folder / VAE)
    flat = torch.cat([value.reshape(-1) for value in tensors.values()])
    shared, start = {}, 0
    for name, value in tensors.items():
        shared[name] = flat[start : start + value.numel()].view(value.shape)
        start += value.numel()
    torch.save(shared, folder / VAE)
    loaded = dict(components(folder)["vae"].named_parameters())
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


def test_a_gguf_file_with_other_dimensions(models, tmp_path):
    """Its shapes are written in reverse, and the five axes of the first layer in a field of their own."""
    gguf = pytest.importorskip("gguf")
    tensors = load_file(models("t2v", "native") / WEIGHTS)

    def written(name: str, changes: dict, original=None) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, "wan")
        for key, value in {**tensors, **changes}.items():
            writer.add_tensor(key, value.reshape(value.shape[0], -1).numpy() if value.ndim == 5 else value.numpy())
            if value.ndim == 5:
                shape = original or list(value.shape)
                writer.add_array(f"comfy.gguf.orig_shape.{key}", shape)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    shutil.copy(models("t2v", "native") / "config.json", tmp_path)
    assert examine(written("good.gguf", {}))["usable"]
    turned = {"blocks.1.ffn.0.weight": tensors["blocks.1.ffn.0.weight"].T.contiguous()}
    report = examine(written("turned.gguf", turned))
    assert not report["usable"]
    assert "blocks.1.ffn.0.weight has [64, 112] where the model has [112, 64]" in str(report["problems"])
    for original in ([64, 16, 1, 2, 4], [64, -16, 1, -2, 2], [0], [10**9, 16, 1, 2, 2], [64.0, 16.0, 1.0, 2.0, 2.0]):
        with pytest.raises(LoadError, match=r"patch_embedding.weight has the shape \[64, 64\] and the original shape"):
            examine(written("bad.gguf", {}, original))
    whole, chance = (tmp_path / "good.gguf").read_bytes(), random.Random(1)
    for _ in range(60):
        raw = bytearray(whole)
        raw[chance.randrange(6000)] = chance.randrange(256)
        (tmp_path / "flipped.gguf").write_bytes(raw)
        with contextlib.suppress(DitkitError):
            examine(tmp_path / "flipped.gguf")


def memory() -> int:
    """The most that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


BOMBS = {
    "a block number": ({"blocks.1000000000.modulation": torch.zeros(0)}, "none begins with 'blocks.2.'"),
    "a longer one": ({f"blocks.{'9' * 5000}.modulation": torch.zeros(0)}, "none begins with 'blocks.2.'"),
    "a control block": ({"vace_blocks.1000000000.after_proj.weight": torch.zeros(0)}, "'vace_blocks.0.'"),
    "an empty width": ({"patch_embedding.weight": torch.zeros(0, 16, 1, 2, 2)}, "which no network has"),
    "an empty patch": ({"patch_embedding.weight": torch.zeros(64, 16, 1, 0, 2)}, "which no network has"),
    "an empty head": ({"head.head.weight": torch.zeros(0, 64)}, "which no network has"),
    "a wide view": ({"patch_embedding.weight": torch.zeros(1).expand(10**10, 16, 1, 2, 2)}, "stands for more numbers"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_one_tensor_cannot_ask_for_all_memory(models, tmp_path, name):
    """Networks are built by what names and shapes say, so these must be possible before anything is built."""
    wrong, said = BOMBS[name]
    before = memory()
    torch.save({**load_file(models("t2v", "native") / WEIGHTS), **wrong}, tmp_path / "x.pt")
    with pytest.raises(LoadError, match=said):
        examine(tmp_path / "x.pt")
    assert memory() - before < 2**26


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("vae", "encoder.downsamples.1000000000.residual.2.weight", torch.zeros(4, 4, 3, 3, 3)),
        ("vae", "encoder.conv1.weight", torch.zeros(0, 3, 3, 3, 3)),
        ("umt5", "blocks.1000000000.norm1.weight", torch.zeros(32)),
        ("umt5", "blocks.0.pos_embedding.embedding.weight", torch.zeros(32, 0)),
        ("clip", "encoder.layers.1000000000.mlp.fc1.weight", torch.zeros(3)),
        ("clip", "embeddings.position_embedding.weight", torch.zeros(0, 64)),
        ("clip", "embeddings.patch_embedding.weight", torch.zeros(64, 3, 0, 0)),
    ],
)
def test_nor_can_one_of_another_part(models, tmp_path, kind, name, value):
    native = models("t2v", "native")
    whole = tiny.image_encoder().state_dict() if kind == "clip" else tensors_of(native / {"vae": VAE, "umt5": T5}[kind])
    torch.save({**whole, name: value}, tmp_path / "x.pt")
    before = memory()
    with contextlib.suppress(LoadError):
        assert not examine(tmp_path / "x.pt")["usable"]
    assert memory() - before < 2**26


# --- configs

WRONG = {
    "transformer": [
        {"num_attention_heads": 10**9}, {"attention_head_dim": 10**9}, {"num_layers": 10**9}, {"num_layers": -2},
        {"ffn_dim": 10**30}, {"eps": float("nan")}, {"eps": float("inf")}, {"eps": -1e-6}, {"eps": 0}, {"eps": 1e300},
        {"in_channels": 0}, {"out_channels": "16"}, {"patch_size": [10**9, 2, 2]}, {"patch_size": [1, 0, 0]},
        {"text_dim": True}, {"freq_dim": 32.0}, {"_class_name": ["a"]}, {"_class_name": 5}, {"num_layers": None},
        {"num_attention_heads": 64, "attention_head_dim": 1}, {"num_attention_heads": 16, "attention_head_dim": 4},
        {"image_dim": 1280, "added_kv_proj_dim": 64}, {"vace_layers": [0]}, {"quantization_config": {"a": 1}},
    ],
    "vae": [
        {"base_dim": 10**9}, {"dim_mult": [1, 2, 4, 10**9]}, {"dim_mult": []}, {"z_dim": -3}, {"num_res_blocks": 10**9},
        {"latents_mean": [float("nan")] * 16}, {"latents_std": [0] * 16}, {"latents_mean": "abc"},
        {"temperal_downsample": [1, 0, 1]}, {"scale_factor_spatial": 7}, {"is_residual": "yes"}, {"patch_size": 10**9},
    ],
    "text_encoder": [
        {"vocab_size": 10**12}, {"d_kv": 10**9}, {"num_heads": 0}, {"layer_norm_epsilon": float("nan")},
        {"layer_norm_epsilon": -1}, {"relative_attention_max_distance": 8}, {"model_type": "t5"}, {"model_type": []},
        {"num_layers": 10**9},
    ],
    "image_encoder": [
        {"hidden_size": 10**12}, {"image_size": 10**9}, {"num_attention_heads": 3}, {"hidden_act": "relu"},
        {"hidden_act": []}, {"layer_norm_eps": -1}, {"num_channels": 4}, {"num_hidden_layers": 10**9},
    ],
}  # fmt: skip


@pytest.mark.parametrize(("part", "change"), [(part, change) for part, all_ in WRONG.items() for change in all_])
def test_a_config_that_cannot_be_is_refused_before_anything_is_built(copy, part, change):
    folder = copy("i2v")
    edit(folder / part / "config.json", **change)
    before = memory()
    with pytest.raises(LoadError) as error:
        Model.open(str(folder))
    assert str(folder / part) in str(error.value), error.value
    assert memory() - before < 2**26


@pytest.mark.parametrize(
    "layers", [[0, 10**9], [0, -1], [2, 0], [0, 0], [1, 2], [], [True, 2], None, "02", list(range(10**5))]
)
@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_hints_for_blocks_that_are_not_there(copy, layers, layout):
    folder = copy("vace", layout)
    if layers is None and layout == "native":
        return  # the class itself has a default
    edit(folder / ("transformer/config.json" if layout == "diffusers" else "config.json"), vace_layers=layers)
    refused(folder, "vace_layers")


def test_a_text_length_that_would_take_all_memory(copy):
    folder = copy("t2v", "native")
    edit(folder / "config.json", text_len=10**9)
    refused(folder, "text_len is 1000000000")


@pytest.mark.parametrize("shift", ["3", float("nan"), float("inf"), -1, 0, True, [3]])
def test_a_shift_that_is_no_number_is_not_passed_over(copy, shift):
    folder = copy()
    edit(folder / "scheduler/scheduler_config.json", flow_shift=shift)
    refused(folder, "scheduler_config.json: its shift is")


@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoModel": "x.Y"}}, {"vae": ["x", "../../y"]}, {"vae": "../../y"},
        {"transformer": ["a"]}, {"transformer": [1, 2]}, {"transformer": [None, None]}, {"boundary_ratio": 0.5},
        {"boundary_ratio": "0.5"}, {"boundary_ratio": float("nan")}, {"expand_timesteps": True},
        {"expand_timesteps": "no"}, {"tokenizer": ["ditkit", "evil"]},
        {"transformer_2": ["diffusers", "X"]}, {"image_encoder": ["transformers", "X"]},
        {"preview_decoder": ["diffusers", "X"]},
    ],
)  # fmt: skip
def test_what_an_index_can_get_wrong(copy, change):
    """Also what it promises and the folder does not hold: inspect must not find usable what would not load."""
    folder = copy()
    edit(folder / "model_index.json", **change)
    refused(folder)


# --- the disk


def test_things_that_are_no_files(copy, tmp_path):
    for place in ("/dev/null", "/dev/zero", "a" * 5000, "\0", "~no-such-user/x", ""):
        with pytest.raises(LoadError):
            Model.open(place)
        with pytest.raises(LoadError):
            locate(place or "no such place")
    os.mkfifo(tmp_path / "pipe.safetensors")  # reading it would wait for ever
    with pytest.raises(LoadError, match="no ordinary file"):
        open_source(tmp_path / "pipe.safetensors")
    folder = copy("t2v", "native")
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "folder.safetensors").mkdir()
    (folder / "nowhere.safetensors").symlink_to("nowhere")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    load_all(folder)


def test_weights_behind_links_are_weights(copy, tmp_path):
    """The cache of the hub is made of links."""
    folder = copy("t2v", "native")
    shutil.move(folder / WEIGHTS, tmp_path / "blob")
    (folder / WEIGHTS).symlink_to(tmp_path / "blob")
    load_all(folder)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_what_may_not_be_read_is_one_sentence(models, copy):
    """In another process, which is no longer root if this one is."""
    cases = []
    locked = (("diffusers", "tokenizer/tokenizer.json"), ("native", "google"), ("diffusers", "."), ("native", "."))
    for layout, name in locked:
        folder = copy("t2v", layout)
        for place, _, files in os.walk(folder):
            for one in (place, *(Path(place) / file for file in files)):
                Path(one).chmod(0o755)
        (folder / name).chmod(0)
        cases.append(str(folder))
    for above in Path(cases[0]).parents[:3]:
        above.chmod(0o755)
    code = (
        "import os, sys\nfrom ditkit.errors import LoadError\nfrom ditkit.assembly.model import Model\n"
        "from ditkit.assembly.components import Components\nfrom ditkit.setup import Setup\n"
        "def load(path): return Components(Model.open(path), Setup(model=path))['tokenizer']\n"
        "load(sys.argv[1])\n"  # imports everything, while it may
        "if os.getuid() == 0: os.setuid(65534)\n"
        "for path in sys.argv[2:]:\n"
        "    try:\n"
        "        print('loaded', load(path))\n"
        "    except LoadError as error:\n"
        "        print('LoadError', error)\n"
    )
    command = [sys.executable, "-c", code, str(models("t2v", "diffusers")), *cases]
    done = subprocess.run(command, capture_output=True, text=True, env=alone(), check=False)
    for case in cases:
        Path(case).chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("LoadError") == len(cases), done.stdout


# --- a great many small damages: an error of ours, or a model that loads; nothing else


def mutated(value, chance: random.Random):
    """``value`` with one place of it changed, at any depth."""
    odd = [None, True, -1, 0, 10**9, 10**30, 1.5, float("nan"), "", "x", "\ud800", [], [0], {}, {"a": 1}]
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(list(value))
        new = dict(value)
        kind = chance.randrange(5)
        if kind == 0:
            del new[key]
        elif kind == 1:
            new[key + chance.choice(["x", ".0", ""])] = new.pop(key)
        elif kind == 2:
            new[chance.choice(["extra", "blocks.7.x", "_x"])] = chance.choice(odd)
        else:
            new[key] = mutated(value[key], chance)
        return new
    if isinstance(value, list) and value and chance.random() < 0.8:
        place = chance.randrange(len(value))
        return [*value[:place], mutated(value[place], chance), *value[place + 1 :]]
    return chance.choice(odd)


def only_our_errors(folder: Path, asked: Path, what: object) -> None:
    for call in (lambda: Model.open(str(folder)), lambda: examine(folder), lambda: examine(asked)):
        try:
            call()
        except DitkitError as error:
            str(error).encode()  # it can be printed
        except Exception as error:  # the finding of this test
            pytest.fail(f"{type(error).__name__}: {error} for {what}")


JSONS = (
    "model_index.json", "transformer/config.json", "vae/config.json", "text_encoder/config.json",
    "image_encoder/config.json", "scheduler/scheduler_config.json", "image_processor/preprocessor_config.json",
)  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_mutated_configs_raise_nothing_else(copy, seed):
    folder, chance = copy("i2v"), random.Random(seed)
    for _ in range(25):
        file = folder / chance.choice(JSONS)
        whole = file.read_text()
        changed = mutated(json.loads(whole), chance)
        file.write_text(json.dumps(changed))
        only_our_errors(folder, file.parent, changed)
        file.write_text(whole)


@pytest.mark.parametrize("seed", range(3))
def test_mutated_native_configs_raise_nothing_else(copy, seed):
    folder, chance = copy("vace", "native"), random.Random(seed)
    whole = (folder / "config.json").read_text()
    for _ in range(20):
        changed = mutated(json.loads(whole), chance)
        (folder / "config.json").write_text(json.dumps(changed))
        only_our_errors(folder, folder / WEIGHTS, changed)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "image_encoder"])
@pytest.mark.parametrize("seed", range(2))
def test_mutated_headers_raise_nothing_else(copy, seed, part):
    folder, chance = copy("i2v"), random.Random(seed)
    file = next((folder / part).glob("*.safetensors"))
    whole = file.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    for _ in range(12):
        changed = mutated(header, chance)
        if isinstance(changed, dict):
            changed = reshaped(changed, chance) if chance.random() < 0.5 else changed
        raw = json.dumps(changed).encode()
        file.write_bytes(struct.pack("<Q", len(raw)) + raw + whole[8 + length :])
        only_our_errors(folder, file, "a header")


def reshaped(header: dict, chance: random.Random) -> dict:
    """A header that fits its data and lies about a shape or a name."""
    names = [key for key in header if key != "__metadata__"]
    name = chance.choice(names or [""])
    entry = header.get(name)
    if not (isinstance(entry, dict) and isinstance(entry.get("shape"), list)):
        return header
    shape = [n for n in entry["shape"] if type(n) is int]
    kind = chance.randrange(4)
    if kind == 0:
        entry = {**entry, "shape": [1, *shape]}
    elif kind == 1:
        entry = {**entry, "shape": shape[::-1]}
    elif kind == 2:
        entry = {**entry, "dtype": {"F32": "I32", "BF16": "I16"}.get(entry["dtype"], "F32")}
    new = {**header, name: entry}
    if kind == 3:
        new[name.replace("0", chance.choice(["1", "00", "-1", "٣"]), 1)] = new.pop(name)
    return new


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bytes_raise_nothing_else(copy, seed):
    """Of a pickle, its archive and a sharded index: anywhere in the first and the last kilobytes."""
    folder, chance = copy("t2v", "native"), random.Random(seed)
    file = folder / chance.choice([VAE, T5])
    whole = file.read_bytes()
    for _ in range(10):
        raw = bytearray(whole)
        for _ in range(chance.choice([1, 4, 64])):
            place = chance.choice([chance.randrange(4096), len(raw) - 1 - chance.randrange(4096)])
            raw[place] = chance.randrange(256)
        file.write_bytes(raw)
        only_our_errors(folder, file, "flipped bytes")
        file.write_bytes(whole[: chance.randrange(len(whole))])
        only_our_errors(folder, file, "a cut file")
