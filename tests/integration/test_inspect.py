"""``ditkit inspect``: what it says of files, parts, models and LoRAs, and when it exits with 0."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parents[1] / "data/golden"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    at = tmp_path_factory.mktemp("models")
    wanted = [("i2v", "diffusers"), ("t2v_a14b", "native"), ("ti2v", "native")]
    return {(task, layout): tiny.write(at / f"{layout}_{task}", task, layout) for task, layout in wanted}


@pytest.fixture
def report(call):
    def run(*words):
        said = call("inspect", *words, "--json")
        return said.code, json.loads(said.out)

    return run


def test_a_whole_model(models, call, report):
    code, found = report(models["i2v", "diffusers"])
    assert (code, found["usable"], found["task"], found["layout"]) == (0, True, "i2v", "diffusers")
    assert list(found["parts"]) == ["transformer", "vae", "text_encoder", "image_encoder", "tokenizer"]
    one = found["parts"]["transformer"]
    assert (one["kind"], one["family"], one["variant"], one["layout"]) == ("wan", "Wan 2.1", "i2v", "diffusers")
    assert one["parameters"] == sum(one["types"].values()) == 173_536
    assert (found["needs"], found["problems"]) == ([], [])
    said = call("inspect", models["i2v", "diffusers"])
    assert said.code == 0
    assert "a model for i2v, diffusers layout; it can be used" in said.out
    assert "parameters  173,536" in said.out


def test_two_experts(models, report):
    code, found = report(models["t2v_a14b", "native"])
    assert (code, found["boundary"]) == (0, 0.875)
    assert {"transformer", "transformer_2"} <= found["parts"].keys()


def test_a_model_with_a_missing_part_cannot_be_used(models, call, report, tmp_path):
    folder = Path(shutil.copytree(models["i2v", "diffusers"], tmp_path / "m"))
    shutil.rmtree(folder / "image_encoder")
    code, found = report(folder)
    assert (code, found["usable"]) == (2, False)
    assert "it needs a CLIP image encoder, and there is none in" in found["problems"][0]
    said = call("inspect", folder)
    assert said.code == 2
    assert "it cannot be used" in said.out
    assert "it needs a CLIP image encoder" in said.out
    said = call("plan", "x", "--model", folder)
    assert said.code == 2
    assert f"it needs a CLIP image encoder, and there is none in {folder}/image_encoder" in said.err


def test_one_part_is_judged_as_a_part(models, report):
    for path in (
        models["i2v", "diffusers"] / "vae",
        models["ti2v", "native"] / "Wan2.2_VAE.pth",
        models["ti2v", "native"] / "diffusion_pytorch_model.safetensors",
        models["t2v_a14b", "native"] / "high_noise_model",
    ):
        code, found = report(path)
        assert (code, len(found["parts"])) == (0, 1), path
        assert found["needs"], path


def test_the_title_of_a_part_has_its_own_layout(models, call):
    said = call("inspect", models["i2v", "diffusers"] / "transformer")
    assert "wan, diffusers layout; it can be used" in said.out
    said = call("inspect", models["ti2v", "native"] / "Wan2.2_VAE.pth")
    assert "wan_vae22, native layout; it can be used" in said.out


def test_weights_that_would_not_load_cannot_be_used(models, report, tmp_path):
    """A renamed tensor, and one of another shape: a loader that is not strict leaves both random."""
    weights = load_file(models["ti2v", "native"] / "diffusion_pytorch_model.safetensors")
    shutil.copy(models["ti2v", "native"] / "config.json", tmp_path)
    weights["blocks.1.ffn.0.wait"] = weights.pop("blocks.1.ffn.0.weight")
    weights["blocks.1.norm3.bias"] = torch.zeros(3)
    save_file(weights, tmp_path / "x.safetensors")
    code, found = report(tmp_path / "x.safetensors")
    assert code == 2
    assert [text.split(" (")[0] for text in found["problems"]] == [
        "transformer: 1 tensors are missing",
        "transformer: 1 tensors are unknown to the model",
        "transformer: 1 tensors have another shape",
    ]


@pytest.mark.parametrize("name", [
    *(str(p.relative_to(GOLDEN)) for p in sorted(GOLDEN.glob("transformer/**/diffusion_pytorch_model.safetensors"))),
    "causal/model_prefix.safetensors", "causal/self_forcing_dmd.pt", "vae/wan21/Wan2.1_VAE.safetensors",
    "vae/wan22/Wan2.2_VAE.safetensors", "umt5/models_t5_umt5-xxl-enc.safetensors", "taehv/taew2_1_tiny.safetensors",
    "taehv/taew2_2_tiny.safetensors", "clip/models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors",
])  # fmt: skip
def test_every_golden_file_can_be_used(name, report):
    code, found = report(GOLDEN / name)
    assert (code, found["problems"]) == (0, [])


def test_what_was_chosen_by_a_rule_is_told(report):
    _, found = report(GOLDEN / "causal/self_forcing_dmd.pt")
    assert any("generator_ema" in note for note in found["parts"]["transformer"]["notes"])


def test_a_lora_against_the_model_it_is_for(models, report, tmp_path):
    pair = {"lora_down.weight": torch.ones(4, 64), "lora_up.weight": torch.ones(64, 4)}
    good = {f"diffusion_model.blocks.{n}.self_attn.q.{k}": v.clone() for n in range(2) for k, v in pair.items()}
    save_file(good, tmp_path / "good.safetensors")
    code, found = report(tmp_path / "good.safetensors")
    assert (code, found["kind"], found["pairs"], found["ranks"]) == (0, "lora", 2, {"4": 2})
    code, found = report(tmp_path / "good.safetensors", "--model", models["i2v", "diffusers"])
    assert (code, found["coverage"]) == (0, 1.0)
    bad = {k.replace("blocks.1", "blocks.7"): v for k, v in good.items()}
    save_file(bad, tmp_path / "bad.safetensors")
    code, found = report(tmp_path / "bad.safetensors", "--model", models["i2v", "diffusers"])
    assert (code, found["usable"]) == (2, False)
    assert found["coverage"] < 1


def test_what_cannot_be_recognised_is_one_sentence(call, report, tmp_path):
    save_file({"unet.conv.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    code, found = report(tmp_path / "x.safetensors")
    assert (code, found["usable"]) == (2, False)
    said = call("inspect", tmp_path / "x.safetensors")
    assert said.code == 2
    assert said.err.startswith("error: recognising")
    assert "nothing fits its 1 tensors" in said.err
    assert call("inspect", tmp_path / "nowhere").code == 2
    assert "--model was given" in call("inspect", GOLDEN / "vae/wan21/Wan2.1_VAE.safetensors", "--model", "shapes").err


def test_a_relative_is_named(models, report, tmp_path):
    weights = load_file(models["ti2v", "native"] / "diffusion_pytorch_model.safetensors")
    save_file(weights | {"casual_audio_encoder.weights": torch.zeros(2)}, tmp_path / "x.safetensors")
    code, found = report(tmp_path / "x.safetensors")
    assert (code, found["variant"]) == (2, "S2V")
    assert found["problems"] == ["it is S2V, a relative of Wan that ditkit does not run"]


def test_the_packaged_models_by_name_and_by_folder(report):
    from ditkit.checkpoints.model.find import MODELS

    for name, task in (("shapes", "t2v"), ("shapes-i2v", "i2v")):
        for path in (name, MODELS[name]):
            code, found = report(path)
            assert (code, found["usable"], found["task"]) == (0, True, task)


def test_a_folder_goes_before_a_packaged_model_of_its_name(models, report, tmp_path, monkeypatch):
    shutil.copytree(models["ti2v", "native"], tmp_path / "shapes")
    monkeypatch.chdir(tmp_path)
    assert report("shapes")[1]["task"] == "ti2v"


def test_a_repository_is_not_downloaded_to_be_looked_at(call, tmp_path):
    for command in (["inspect"], ["convert", tmp_path / "x", "--layout", "native"]):
        said = call(command[0], "hf:Wan-AI/Wan2.1-T2V-1.3B@main", *command[1:])
        assert said.code == 2
        assert "this command looks at files on this machine only" in said.err
