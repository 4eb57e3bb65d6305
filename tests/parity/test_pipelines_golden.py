"""The official image runs from the picture itself to the clip: golden files in a native folder, opened by
``ditkit.load``, through all stages. Text features and start noise are the official ones.

Single networks and stages are held against the same files elsewhere (test_pipelines_family.py, test_conditioning.py).
"""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from reference import rel
from safetensors import safe_open

import ditkit
from ditkit.media import to_uint8

GOLDEN = Path(__file__).parents[1] / "data/golden"
NETWORKS = {
    "wan21_i2v_unipc": ("wan21_i2v", "vae/wan21/Wan2.1_VAE.safetensors"),
    "wan22_i2v_a14b_unipc": ("wan22_i2v_a14b", "vae/wan21/Wan2.1_VAE.safetensors"),
    "wan22_ti2v_image_unipc": ("wan22_ti2v_5b", "vae/wan22/Wan2.2_VAE.safetensors"),
}
with safe_open(GOLDEN / "pipelines/io.safetensors", "pt") as f:
    RUNS = json.loads(f.metadata()["runs"])
    IO = {name: f.get_tensor(name) for name in f.keys() if name.startswith((*NETWORKS, "image"))}  # noqa: SIM118
OFFICIAL = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
TOLERANCE = 1e-5


def official_folder(folder: Path, run: str) -> Path:
    """As the official repositories are laid out. The text encoder and its tokenizer are there to be found only."""
    network, vae = NETWORKS[run]
    shutil.copytree(GOLDEN / "transformer" / network, folder, ignore=shutil.ignore_patterns("io.safetensors"))
    shutil.copy(GOLDEN / vae, folder)
    shutil.copy(GOLDEN / "umt5/models_t5_umt5-xxl-enc.safetensors", folder)
    tiny.write_tokenizer(folder / "google/umt5-xxl")
    return folder


def image_encoder(folder: Path) -> Path:
    """Its number of heads does not follow from its weights: they are not of the official width. So it has a config."""
    folder.mkdir()
    shutil.copy(GOLDEN / "clip/models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors", folder)
    raw = json.loads((GOLDEN / "clip/config.json").read_text())
    width = raw["vision_dim"]
    told = {
        "model_type": "clip_vision_model", "hidden_size": width, "intermediate_size": width * raw["vision_mlp_ratio"],
        "num_hidden_layers": raw["vision_layers"], "num_attention_heads": raw["vision_heads"],
        "image_size": raw["image_size"], "patch_size": raw["patch_size"], "hidden_act": raw["activation"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    @cache
    def make(run: str):
        place = tmp_path_factory.mktemp("golden")
        parts = {"image_encoder": str(image_encoder(place / "clip"))} if run == "wan21_i2v_unipc" else {}
        return ditkit.load(official_folder(place / "model", run), components=parts)

    return make


def begin(pipe, run: str):
    """The picture and a wanted area; the size of the video follows from both."""
    asked, area = RUNS[run], {2500: (50, 50), 8000: (80, 100)}[RUNS[run]["max_area"]]
    scale = asked["guide_scale"]
    low, high = scale if isinstance(scale, list) else (None, scale)
    values, pixels = ditkit.pictures.take({"image": IO["image"].numpy()})
    request = pipe.model.request({
        **values, "prompt": "a prompt", "width": area[0], "height": area[1], "frames": asked["frame_num"],
        "steps": asked["sampling_steps"], "shift": asked["shift"], "guidance_scale": high, "guidance_scale_2": low,
        "scheduler": asked["sample_solver"],
    })  # fmt: skip
    assert request.size_from == "image"
    rows = {name: IO[f"{run}.{name}"] for name in ("context", "context_null")}
    return pipe.begin(request, pixels).with_fields({
        "prompt_embeds": rows["context"], "prompt_lengths": [len(rows["context"])],
        "negative_prompt_embeds": rows["context_null"], "negative_prompt_lengths": [len(rows["context_null"])],
        "latents": IO[f"{run}.noise"][None],
    })  # fmt: skip


@pytest.mark.parametrize("run", NETWORKS)
def test_from_the_picture_to_the_clip(opened, run):
    pipe, entered, experts = opened(run), [], []

    def listen(event):
        if event.name == "prediction":
            entered.append(event["x"].clone())
            experts.append(OFFICIAL[event["step"].expert])

    state = begin(pipe, run)
    result = pipe.run(state, listeners=[listen])
    expected = IO[f"{run}.states"]
    states = [*entered, result.state["latents"]]
    assert len(states) == len(expected)
    errors = [rel(ours[0], theirs) for ours, theirs in zip(states, expected, strict=True)]
    assert max(errors) <= TOLERANCE, errors
    official = RUNS[run]["expert_per_step"]
    assert experts == official or set(official) == {"model"}
    if f"{run}.y" in IO:
        assert rel(result.state["condition"][0], IO[f"{run}.y"]) <= TOLERANCE
    if f"{run}.clip_fea" in IO:
        assert rel(result.state["image_embeds"], IO[f"{run}.clip_fea"]) <= TOLERANCE
    assert result.receipt["pipeline"] == pipe.stages.names


def test_the_official_clip(opened):
    run = "wan22_ti2v_image_unipc"
    pipe = opened(run)
    result, official = pipe.run(begin(pipe, run)), IO[f"{run}.video"]
    vae = pipe.components["vae"]
    video = torch.cat(list(vae.decode(result.state["latents"])), 2)[0]
    assert rel(video.clamp(-1, 1), official) <= 1e-4
    assert result.video.shape == (official.shape[1], *official.shape[2:], 3)
    levels = (result.video.astype(int) - to_uint8(official, "wan").astype(int)).ravel()
    assert abs(levels).max() <= 1
    assert (levels != 0).mean() < 1e-3
