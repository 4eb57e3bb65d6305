"""The parts of a model: found by content, equal in every layout; what is missing or does not fit is one sentence."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from ditkit.checkpoints.files.formats import weight_files
from ditkit.checkpoints.load import load_into
from ditkit.checkpoints.model.find import locate
from ditkit.checkpoints.model.open_part import open_part
from ditkit.errors import LoadError
from ditkit.models.wan import WanConfig, WanTransformer

GOLDEN = Path(__file__).parents[1] / "data/golden"
CONFIG = "config.json"
FOLDERS = sorted(file.parent for file in GOLDEN.glob(f"transformer/**/{CONFIG}"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    at = tmp_path_factory.mktemp("models")
    return {
        (task, layout): tiny.write(at / layout / task, task, layout) for task in tiny.TASKS for layout in tiny.LAYOUTS
    }


@pytest.fixture
def copy(models, tmp_path):
    def make(task, layout):
        return Path(shutil.copytree(models[task, layout], tmp_path / f"{layout}_{task}"))

    return make


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def said(located):
    return [str(problem) for problem in located.problems]


def only(located, *parts):
    """There is one problem, and ``check`` raises it."""
    assert len(located.problems) == 1, said(located)
    with pytest.raises(LoadError) as error:
        located.check()
    for part in parts:
        assert part in str(error.value), f"{part!r} is not in {str(error.value)!r}"


def tensors(part):
    return dict(part.source)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("task", tiny.TASKS)
def test_every_model_is_the_same_in_both_layouts(models, task):
    theirs, native = locate(models[task, "diffusers"]).check(), locate(models[task, "native"]).check()
    assert (theirs.layout, native.layout) == ("diffusers", "native")
    assert theirs.parts.keys() == native.parts.keys()
    wanted = tiny.BOUNDARY.get(task)
    for located in (theirs, native):
        assert located.task == task.removesuffix("_a14b")
        assert (located.boundary, located.expand_timesteps) == (wanted, task == "ti2v")
        assert ("transformer_2" in located.parts) == (wanted is not None)
        assert ("image_encoder" in located.parts) == ("image_dim" in tiny.TASKS[task])
    for name in theirs.parts.keys() - {"tokenizer"}:
        one, other = theirs.parts[name], native.parts[name]
        assert one.kind == other.kind
        for key in one.config.keys() & other.config.keys():
            assert one.config[key] == other.config[key], (name, key)
        same(tensors(one), tensors(other))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_every_golden_transformer_loads_strictly(folder):
    part = open_part(folder / "diffusion_pytorch_model.safetensors")
    with torch.device("meta"):
        module = WanTransformer(WanConfig(**part.config))
    load_into(module, part.source)
    assert module.config.num_heads == json.loads((folder / CONFIG).read_text())["num_heads"]


def test_native_files_are_found_whatever_they_are_called(copy):
    folder = copy("i2v", "native")
    before = locate(folder)
    for n, file in enumerate(itertools.chain(*weight_files(folder))):
        file.rename(folder / f"{n}_flf2v_high_noise{file.suffix}")
    after = locate(folder).check()
    assert after.task == before.task == "i2v"
    for name in before.parts:
        assert before.parts[name].kind == after.parts[name].kind
        assert before.parts[name].config == after.parts[name].config


@pytest.mark.parametrize(("task", "layout", "away", "found"), [
    ("i2v", "diffusers", "image_encoder", ("it needs a CLIP image encoder", "image_encoder/ of a -Diffusers")),
    ("i2v", "native", "models_clip*", ("it needs a CLIP image encoder, and there is none among the files",)),
    ("t2v", "diffusers", "tokenizer/tokenizer.json", ()),
    ("t2v", "native", "google", ("it needs a tokenizer (tokenizer.json), and there is none in", "google/umt5-xxl")),
    ("t2v_a14b", "native", "low_noise_model", ("it needs the second expert, and there is none in", "low_noise_model")),
    ("t2v", "native", "models_t5*", ("it needs a UMT5 text encoder", "models_t5_umt5-xxl-enc-bf16.pth")),
    ("ti2v", "native", "Wan2.2_VAE.pth", ("it needs a Wan VAE", "Take Wan2.2_VAE.pth of Wan-AI/Wan2.2-TI2V-5B")),
    ("t2v", "diffusers", "vae", ("it needs a Wan VAE, and there is none in", "Take Wan2.1_VAE.pth")),
])  # fmt: skip
def test_a_missing_part_is_one_sentence(copy, task, layout, away, found):
    folder = copy(task, layout)
    for place in folder.glob(away):
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    if not found:  # the folder is there, its file is not
        with pytest.raises(LoadError, match=r"there is no tokenizer.json. Take the folder google/umt5-xxl"):
            locate(folder)
        return
    located = locate(folder)
    only(located, *found)


def test_a_high_noise_expert_that_is_missing_is_named_by_its_folder(copy):
    folder = copy("i2v_a14b", "native")
    shutil.rmtree(folder / "high_noise_model")
    assert f"it needs a Wan transformer, and there is none in {folder / 'high_noise_model'}" in said(locate(folder))[0]


def test_a_boundary_needs_two_experts(copy):
    """A conversion script wrote boundary_ratio into the index of models with one transformer."""
    folder = copy("t2v", "diffusers")
    edit(folder / "model_index.json", boundary_ratio=0.875)
    only(locate(folder), "boundary_ratio is 0.875 and there is no transformer_2", "Set boundary_ratio to null")
    edit(folder / "model_index.json", boundary_ratio=None)
    assert locate(folder).check().boundary is None
    folder = copy("t2v_a14b", "diffusers")
    edit(folder / "model_index.json", boundary_ratio=None)
    only(locate(folder), "it has a transformer_2 and no boundary_ratio")
    edit(folder / "model_index.json", boundary_ratio=87.5)
    only(locate(folder), "boundary_ratio is 87.5, not a number between 0 and 1")


def test_experts_of_two_models(copy, models):
    folder = copy("t2v_a14b", "diffusers")
    shutil.rmtree(folder / "transformer_2")
    shutil.copytree(models["i2v_a14b", "diffusers"] / "transformer_2", folder / "transformer_2")
    only(locate(folder), "in_dim is 16 in transformer and 36 in transformer_2")


def test_a_vae_of_the_wrong_kind(copy, models):
    folder = copy("ti2v", "native")
    (folder / "Wan2.2_VAE.pth").unlink()
    shutil.copy(models["t2v", "native"] / "Wan2.1_VAE.pth", folder / "Wan2.2_VAE.pth")
    only(locate(folder), "48 as the latent channels (out_dim) and its vae 16 (z_dim of wan_vae)", "Take Wan2.2_VAE.pth")


def test_expand_timesteps_of_a_model_without_them(copy):
    folder = copy("t2v", "diffusers")
    edit(folder / "model_index.json", expand_timesteps=True)
    only(locate(folder), "expand_timesteps is true and its transformer is t2v")


def test_two_files_of_one_kind_are_not_chosen_between(copy):
    folder = copy("t2v", "native")
    shutil.copy(folder / "Wan2.1_VAE.pth", folder / "other.pt")
    with pytest.raises(LoadError, match=r"both Wan2.1_VAE.pth and other.pt are its vae"):
        locate(folder)


def test_the_safetensors_file_of_two_with_one_name(copy):
    folder = copy("t2v", "native")
    save_file(torch.load(folder / "Wan2.1_VAE.pth", weights_only=True), folder / "Wan2.1_VAE.safetensors")
    assert locate(folder).check().parts["vae"].path.suffix == ".safetensors"


def test_files_that_are_no_part_are_told(copy):
    folder = copy("t2v", "native")
    (folder / "lora.safetensors").write_bytes(b"")
    save_file({"x.lora_A.weight": torch.zeros(1)}, folder / "style.safetensors")
    located = locate(folder).check()
    assert located.unused.keys() == {"lora.safetensors", "style.safetensors"}
    assert located.unused["style.safetensors"] == "it is a lora"
    (folder / "Wan2.1_VAE.pth").write_bytes(b"damaged")
    assert "not used: Wan2.1_VAE.pth: " in said(locate(folder))[0]


def test_a_single_file_tells_what_else_is_needed(models):
    located = locate(models["i2v", "native"] / "diffusion_pytorch_model.safetensors")
    assert (located.layout, located.task, list(located.parts)) == ("file", "i2v", ["transformer"])
    assert [word in text for word, text in zip(("tokenizer", "UMT5", "VAE", "CLIP"), said(located), strict=True)]
    given = {"vae": "Wan2.1_VAE.pth", "tokenizer": "google/umt5-xxl"}
    folder = models["i2v", "native"]
    rest = {"text_encoder": next(folder.glob("models_t5*")), "image_encoder": next(folder.glob("models_clip*"))}
    instead = {**rest, **{name: folder / file for name, file in given.items()}}
    whole = locate(folder / "diffusion_pytorch_model.safetensors", instead=instead).check()
    assert whole.parts.keys() == {*instead, "transformer"}


def test_a_part_that_stands_in(models, copy):
    folder = copy("t2v", "diffusers")
    shutil.rmtree(folder / "vae")
    located = locate(folder, instead={"vae": models["t2v", "native"] / "Wan2.1_VAE.pth"}).check()
    assert located.parts["vae"].layout == "native"
    folder = copy("t2v", "native")
    located = locate(folder, instead={"vae": models["t2v", "diffusers"] / "vae"}).check()
    assert located.parts["vae"].layout == "diffusers"
    assert located.unused == {"Wan2.1_VAE.pth": "another vae stands in for it"}
    two = models["t2v_a14b", "native"]
    located = locate(two / "high_noise_model", instead={"transformer_2": two / "low_noise_model"})
    assert located.boundary == 0.875


def test_what_is_asked_for_must_be_what_is_found(models):
    folder = models["t2v", "native"]
    with pytest.raises(LoadError, match=r"as text_encoder: its tensors are those of wan_vae. Give umt5"):
        open_part(folder / "Wan2.1_VAE.pth", "text_encoder")
    with pytest.raises(LoadError, match=r"no such component \(did you mean 'text_encoder'\?\)"):
        open_part(folder / "Wan2.1_VAE.pth", "text_encode")
    with pytest.raises(LoadError, match="there is no such file or folder"):
        locate(folder / "nowhere")
    with pytest.raises(LoadError, match="variant 'fp16' was given and it has no model_index"):
        locate(folder, "fp16")


def test_a_component_of_an_unknown_name(copy):
    folder = copy("t2v", "diffusers")
    edit(folder / "model_index.json", image_encode=["transformers", "X"])
    (note,) = locate(folder).parts["transformer"].notes
    assert 'model_index.json has image_encode = ["transformers", "X"]' in note
    assert "did you mean 'image_encoder'?" in note


def test_configs_that_contradict_name_their_file(copy):
    folder = copy("t2v", "diffusers")
    edit(folder / "transformer" / CONFIG, num_layers=3)
    with pytest.raises(LoadError, match=r"transformer/config.json\): num_layers is 3 in the config and 2"):
        locate(folder)
    edit(folder / "transformer" / CONFIG, num_layers=2, image_dim=1280, added_kv_proj_dim=64)
    with pytest.raises(LoadError, match="image_dim is 1280 in the config and absent in the weights"):
        locate(folder)
    assert locate(folder, allow=("image_claim",)).check().parts["transformer"].config["image_dim"] is None


def test_a_foreign_config_beside_the_weights(copy):
    """In a folder of its own it is an error; beside a single file it belongs to another one."""
    folder = copy("t2v", "diffusers") / "vae"
    edit(folder / CONFIG, _class_name="AutoencoderKLQwenImage")
    with pytest.raises(LoadError, match=r"it is of 'AutoencoderKLQwenImage'. Use the config.json of these weights"):
        open_part(folder)
    assert open_part(folder / "diffusion_pytorch_model.safetensors").config["dim"] == 4


def test_native_weights_with_the_config_of_diffusers(copy, models):
    """Quantised files with native names are put into folders of diffusers; their config is there."""
    folder = copy("i2v", "diffusers") / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    shutil.copy(models["i2v", "native"] / "diffusion_pytorch_model.safetensors", folder / "x.safetensors")
    part = open_part(folder)
    assert (part.layout, part.config["num_heads"], part.config["image_dim"]) == ("native", 2, 64)
    same(tensors(part), tensors(open_part(models["i2v", "native"] / "diffusion_pytorch_model.safetensors")))
    edit(folder / CONFIG, ffn_dim=7)
    with pytest.raises(LoadError, match=r"ffn_dim is 7 in the config and 112 in blocks.0.ffn.net.0.proj.weight"):
        open_part(folder)


def test_variants_and_shards(copy):
    folder = copy("t2v", "diffusers") / "transformer"
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    save_file({k: v.half() for k, v in weights.items()}, folder / "diffusion_pytorch_model.fp16.safetensors")
    half = open_part(folder, "transformer", "fp16").source
    assert {facts.dtype for facts in half.tensors.values()} == {"F16"}, "what is stored is not widened"
    assert half["head.head.weight"].dtype == torch.float16
    names = sorted(weights)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    places = {}
    for n, share in enumerate((names[::2], names[1::2]), 1):
        file = f"diffusion_pytorch_model-0000{n}-of-00002.safetensors"
        save_file({name: weights[name] for name in share}, folder / file)
        places |= dict.fromkeys(share, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    part = open_part(folder)
    assert len(part.source.files) == 2
    assert torch.equal(part.source["head.head.weight"], weights["proj_out.weight"])


def test_a_broken_tensor_name_fails_the_load(copy):
    folder = copy("t2v", "diffusers") / "transformer"
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["blocks.1.attn1.to_queue.weight"] = weights.pop("blocks.1.attn1.to_q.weight")
    save_file(weights, file)
    part = open_part(folder)
    with torch.device("meta"):
        module = WanTransformer(WanConfig(**part.config))
    with pytest.raises(LoadError, match=r"1 tensors are missing .*1 tensors are unknown"):
        load_into(module, part.source)
