"""Configs that a later version wrote: what nobody knows yet is noted and stops nothing, unless it must not.

What contradicts the tensors, and what is known to change numbers, is refused as ever.
"""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import tiny_names
import torch

import ditkit
from ditkit.checkpoints.model.open_part import open_part
from ditkit.cli.weights import examine
from ditkit.errors import LoadError, SetupError

VALUE = {"mode": "soft", "heads": [1, 2]}
TEXT = 'of_tomorrow = {"mode": "soft", "heads": [1, 2]}'
CONFIGS = {  # (task, layout, file): the part whose notes tell of the file
    ("t2v", "diffusers", "transformer/config.json"): "transformer",
    ("vace", "diffusers", "transformer/config.json"): "transformer",
    ("i2v_a14b", "diffusers", "transformer_2/config.json"): "transformer_2",
    ("t2v", "diffusers", "vae/config.json"): "vae",
    ("ti2v", "diffusers", "vae/config.json"): "vae",
    ("t2v", "diffusers", "text_encoder/config.json"): "text_encoder",
    ("t2v", "diffusers", "tokenizer/tokenizer_config.json"): "tokenizer",
    ("t2v", "diffusers", "scheduler/scheduler_config.json"): "transformer",
    ("t2v", "diffusers", "model_index.json"): "transformer",
    ("i2v", "diffusers", "image_encoder/config.json"): "image_encoder",
    ("i2v", "diffusers", "image_processor/preprocessor_config.json"): "transformer",
    ("t2v", "native", "config.json"): "transformer",
    ("vace", "native", "config.json"): "transformer",
    ("t2v", "native", "google/umt5-xxl/tokenizer_config.json"): "tokenizer",
}  # fmt: skip
cases = pytest.mark.parametrize(("task", "layout", "file"), CONFIGS)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    at, made = tmp_path_factory.mktemp("models"), {}

    def model(task, layout):
        if (task, layout) not in made:
            made[task, layout] = tiny.write(at / f"{task}-{layout}", task, layout)
        return made[task, layout]

    return model


@pytest.fixture
def copy(models, tmp_path):
    return lambda task, layout: Path(shutil.copytree(models(task, layout), tmp_path / "model"))


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def notes(folder, part, **setup):
    return ditkit.load(str(folder), **setup).model.parts[part].notes


@pytest.mark.slow
@cases
def test_an_unknown_key_is_noted_and_stops_nothing(models, copy, task, layout, file):
    part, folder = CONFIGS[task, layout, file], copy(task, layout)
    edit(folder / file, of_tomorrow=VALUE, nothing=None, _private=1)
    before = notes(models(task, layout), part)
    (note,) = [note for note in notes(folder, part) if note not in before]
    assert f"{Path(file).name} has {TEXT}, which is not known here" in note
    report = examine(folder)
    assert report["usable"]
    assert note in report["parts"][part]["notes"]


@pytest.mark.slow
@cases
def test_strict_config_refuses_it(models, copy, task, layout, file):
    folder = copy(task, layout)
    notes(folder, "transformer", strict_config=True)
    edit(folder / file, of_tomorrow=VALUE)
    with pytest.raises(LoadError, match=f"the key 'of_tomorrow' of {Path(file).name} is unknown"):
        ditkit.load(str(folder), strict_config=True)


def test_native_parts_with_configs_of_their_own(models, tmp_path):
    """The official files have none but the transformer's; a manifest may give each a folder with one."""
    known = {
        "vae": {"_class_name": "WanVAE", "dim": 4, "z_dim": 16, "num_res_blocks": 2, "dim_mult": [1, 2, 4, 4],
                "temperal_downsample": [False, True, True]},
        "text_encoder": {"_class_name": "umt5_encoder", "vocab_size": 128, "dim": 32, "dim_attn": 32, "dim_ffn": 48,
                         "num_heads": 4, "num_layers": 2, "num_buckets": 32, "max_distance": 128},
        "image_encoder": {"_class_name": "XLMRobertaCLIP", "vision_dim": 64, "vision_layers": 3, "vision_heads": 1,
                          "image_size": 56, "patch_size": 14},
    }  # fmt: skip
    files = {"vae": "Wan2.1_VAE.pth", "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth"}
    for part, config in known.items():
        folder = tmp_path / part
        folder.mkdir()
        if part == "image_encoder":  # the config says a whole ratio, and the tiny one has 1.5
            from transformers import CLIPVisionConfig, CLIPVisionModel

            clip = CLIPVisionModel(CLIPVisionConfig(**tiny.CLIP | {"intermediate_size": 256}))
            torch.save(tiny_names.official_clip(tiny.bare(clip).state_dict()), folder / "clip.pth")
        else:
            shutil.copy(models("t2v", "native") / files[part], folder)
        (folder / "config.json").write_text(json.dumps(config | {"of_tomorrow": VALUE}))
        assert any(TEXT in note for note in open_part(folder, part).notes), part
        with pytest.raises(LoadError, match=r"'of_tomorrow' of config\.json is unknown"):
            open_part(folder, part, allow=("strict_config",))


@pytest.mark.parametrize(("file", "change", "said"), [
    ("transformer/config.json", {"num_layers": 3}, "num_layers is 3 in the config and 2"),
    ("transformer/config.json", {"quantization_config": {"bits": 4}}, "it has a quantization_config"),
    ("transformer/config.json", {"qk_norm": "layer_norm"}, "only 'rms_norm_across_heads' is supported"),
    ("transformer/config.json", {"vace_layers": [0]}, "vace_layers is (0,)"),
    ("vae/config.json", {"attn_scales": [0.5]}, "attn_scales is (0.5,)"),
    ("text_encoder/config.json", {"dense_act_fn": "relu"}, "dense_act_fn is 'relu'"),
    ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "prediction_type is 'epsilon'"),
    ("tokenizer/tokenizer_config.json", {"eos_token": "<end>"}, "its eos_token is '<end>'"),
    ("tokenizer/tokenizer_config.json", {"do_lower_case": True}, "do_lower_case is True"),
    ("model_index.json", {"auto_map": {"a": "b.C"}}, "it names code in the repository"),
    ("model_index.json", {"expand_timesteps": True}, "expand_timesteps is true and its transformer is t2v"),
])  # fmt: skip
def test_what_contradicts_or_changes_numbers_is_still_refused(copy, file, change, said):
    folder = copy("t2v", "diffusers")
    edit(folder / file, **change, of_tomorrow=1)
    with pytest.raises(LoadError) as error:
        ditkit.load(str(folder))
    assert said in str(error.value)


def test_a_processor_that_prepares_pictures_in_another_way(copy):
    folder = copy("i2v", "diffusers")
    edit(folder / "image_processor/preprocessor_config.json", do_center_crop=False, of_tomorrow=1)
    pipe = ditkit.load(str(folder))
    with pytest.raises(LoadError, match="its do_center_crop is False, not True"):
        pipe.model.request({"prompt": "a", "image": "x.png", "image_processing": "diffusers"})


def test_components_and_keys_of_newer_pipelines(copy):
    folder = copy("t2v", "diffusers")
    edit(folder / "model_index.json", upsampler=["tomorrow", "Upsampler"], is_distilled=False)
    loud = notes(folder, "transformer")
    assert len(loud) == 2
    assert 'model_index.json has upsampler = ["tomorrow", "Upsampler"]' in loud[0]
    assert "model_index.json has is_distilled = false" in loud[1]
    with pytest.raises(LoadError, match=r"'upsampler' of model_index\.json is unknown"):
        ditkit.load(str(folder), strict_config=True)


def test_a_modular_index_of_a_newer_version(copy):
    folder = copy("t2v", "diffusers")
    index = json.loads((folder / "model_index.json").read_text())
    modular = {
        name: [*value, {"pretrained_model_name_or_path": str(folder), "subfolder": name, "compute": "lazy"}]
        for name, value in index.items() if isinstance(value, list)
    }  # fmt: skip
    modular |= {"_class_name": "WanModularPipeline", "memory_planner": ["tomorrow", "Planner", {}]}
    (folder / "model_index.json").unlink()
    (folder / "modular_model_index.json").write_text(json.dumps(modular))
    found = notes(folder, "transformer")
    assert any('modular_model_index.json has memory_planner = ["tomorrow", "Planner", {}]' in note for note in found)
    assert any('modular_model_index.json has vae.compute = "lazy"' in note for note in found)
    with pytest.raises(LoadError, match="is unknown"):
        ditkit.load(str(folder), strict_config=True)


def test_the_event_and_the_receipt_have_name_and_value(copy):
    folder = copy("t2v", "diffusers")
    for file in ("transformer/config.json", "tokenizer/tokenizer_config.json", "model_index.json"):
        edit(folder / file, of_tomorrow=VALUE)
    heard = []
    pipe = ditkit.load(str(folder))
    result = pipe(
        "a red circle", width=32, height=32, frames=5, steps=1, seed=1,
        listeners=[lambda event: heard.append(event) if event.name == "load.note" else None],
    )  # fmt: skip
    assert {event["component"] for event in heard} == {"transformer", "tokenizer"}
    assert all(TEXT in event["note"] for event in heard)
    receipt = result.receipt["components"]
    assert [sum(TEXT in note for note in receipt[part]["notes"]) for part in ("transformer", "tokenizer")] == [2, 1]


def test_strict_config_is_a_setting_and_no_exception(copy):
    with pytest.raises(SetupError, match="strict_config"):
        ditkit.load(str(copy("t2v", "diffusers")), allow=["strict_config"])
