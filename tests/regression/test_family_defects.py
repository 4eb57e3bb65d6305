"""Known faults of other programs about the Wan family itself, each shown to be absent here; and the constants that we
have from elsewhere, each held against its source or against a second witness.

Kept elsewhere: R12's official switch tables (``test_experts.py``), F7, F11, F15 and others of diffusers
(``test_predecessors.py``), RGB factors (``test_latent_rgb.py``), sizes and parameter counts of all published models
(``test_official.py``), noise levels (``test_schedulers_official.py``)."""

import inspect
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file

import ditkit
from ditkit.assembly import TASKS
from ditkit.checkpoints.kinds.kind import KINDS
from ditkit.checkpoints.kinds.wan import VACE_LAYERS
from ditkit.checkpoints.model.find import locate
from ditkit.errors import LoadError, RequestError
from ditkit.models import clip, encoders, taehv, umt5
from ditkit.models.published import OFFICIAL
from ditkit.models.wan_vae import WanVAE22Config, WanVAEConfig
from ditkit.request import Request

GOLDEN = Path(__file__).parents[1] / "data/golden"
SIZE = {"width": 32, "height": 32, "frames": 5, "steps": 2}
PROMPT = "a red circle"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    made = {}

    def load(task: str, layout: str = "native"):
        if (task, layout) not in made:
            made[task, layout] = ditkit.load(tiny.write(tmp_path_factory.mktemp("m") / task, task, layout))
        return made[task, layout]

    return load


def picture(seed: int = 0, height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


# --- two experts


@pytest.mark.parametrize("task", tiny.BOUNDARY)
@pytest.mark.parametrize("scheduler", ["unipc", "dpm++", "euler"])
def test_r12_experts_change_by_timestep_at_any_number_of_steps(pipe, task, scheduler):
    """A boundary taken as a fraction of the steps, with the guidance of the two experts swapped, and an IndexError from
    16 steps on."""
    model = pipe(task).model
    for count in (1, 2, 3, 4, 8, 15, 16, 17, 40, 50):
        values = {"steps": count, "scheduler": scheduler, "guidance_scale": 4.0, "guidance_scale_2": 2.0}
        values |= {"image": "first.png"} if task.startswith("i2v") else {}
        steps = pipe(task).steps(model.request(values))
        assert len(steps) == count
        for step in steps:
            high = step.timestep >= 1000 * tiny.BOUNDARY[task]
            assert step.expert == ("transformer" if high else "transformer_2")
            assert step.guidance_scale == (4.0 if high else 2.0)


def test_r12_each_expert_is_called_at_its_own_steps(pipe):
    """With the weights of one expert set to zero, its steps and no others have no velocity."""
    from ditkit.contracts import Seams

    whole = pipe("t2v_a14b")
    seen = []

    def watch(inner):
        def call(x, step):
            velocity = inner(x, step)
            seen.append((step.index, step.expert, float(velocity.abs().sum())))
            return velocity

        return call

    parts = dict(whole.components)
    low = parts["transformer_2"]
    kept = {name: value.clone() for name, value in low.named_parameters()}
    watched = ditkit.Pipeline(whole.model, whole.setup, whole.components, whole.stages, Seams(predict=(watch,)))
    try:
        for value in low.parameters():
            value.data.zero_()
        request = whole.model.request({"prompt": PROMPT, **SIZE, "steps": 16, "shift": 5.0})
        watched.run(watched.begin(request), until="denoise")
    finally:
        for name, value in low.named_parameters():
            value.data.copy_(kept[name])
    wanted = {step.index: step.expert for step in whole.steps(request)}
    assert {index for index, _, _ in seen} == set(range(16))
    assert set(wanted.values()) == {"transformer", "transformer_2"}
    for index, expert, size in seen:
        assert expert == wanted[index]
        assert (size == 0) == (expert == "transformer_2")


def test_the_order_of_the_two_guidances_is_that_of_the_experts(pipe):
    """Official tuples are (low noise, high noise), those of LightX2V the other way round."""
    golden = json.loads((GOLDEN / "expert_switch.json").read_text())["models"]
    for name, task in (("T2V-A14B", "t2v_a14b"), ("I2V-A14B", "i2v_a14b")):
        ours = pipe(task).model.defaults_for({})
        assert ours["guidance_scale"] == golden[name]["guidance"]["high_noise"]
        assert ours["guidance_scale_2"] == golden[name]["guidance"]["low_noise"]
        assert ours["boundary"] == golden[name]["boundary"] == KINDS["wan"].tasks[name[:3].lower()].boundary
        assert (ours["steps"], ours["shift"]) == (golden[name]["default_steps"], golden[name]["default_shift"])


# --- image to video


@pytest.mark.parametrize("frames", [1, 5, 9, 13, 17, 21])
@pytest.mark.parametrize("task", ["i2v", "i2v_a14b", "ti2v"])
def test_r20_every_length_that_a_vae_makes_can_start_from_a_picture(pipe, task, frames):
    """``--i2v`` fails assertions about blocks of three frames."""
    side = 32 if task != "ti2v" else 64
    size = {"width": side, "height": side, "frames": frames, "size_from": "request"}
    video = pipe(task)(PROMPT, image=picture(), steps=1, **size).video
    assert video.shape == (frames, side, side, 3)


@pytest.mark.parametrize("frames", [0, 2, 4, 6, 80, -3])
def test_r20_other_lengths_are_refused_at_the_door(pipe, frames):
    with pytest.raises(RequestError, match="frames"):
        pipe("i2v")(PROMPT, image=picture(), **{**SIZE, "frames": frames})


@pytest.mark.parametrize("task", ["i2v", "i2v_a14b", "flf2v", "ti2v"])
def test_r18_the_picture_decides(pipe, task):
    """A demo that loads a picture, shows it, and makes the same video without it."""
    size = {"width": 64, "height": 64, "frames": 5, "steps": 1, "size_from": "request", "seed": 5}
    last = {"last_image": picture(9)} if task == "flf2v" else {}
    one, same, other = (pipe(task)(PROMPT, image=picture(n), **last, **size).video for n in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any()


def test_r17_clip_features_reach_the_blocks(pipe, tmp_path):
    """An encoder that stays random, or whose features nobody reads, changes nothing."""
    from PIL import Image

    Image.fromarray(picture()).save(tmp_path / "first.png")
    run = pipe("i2v")
    request = run.model.request({"prompt": PROMPT, **SIZE, "image": str(tmp_path / "first.png")})
    state = run.run(run.begin(request), until="encode_condition").state
    other = state.with_fields({"image_embeds": state["image_embeds"].flip(-1)})
    latents = [run.run(one, until="denoise").state["latents"] for one in (state, other)]
    assert float((latents[0] - latents[1]).norm() / latents[0].norm()) > 1e-3


def test_f6_the_5b_model_makes_the_size_that_was_asked_for(pipe):
    """Its VAE has strides of 16; a pipeline that reckons with 8 gives twice the size."""
    run = pipe("ti2v")
    assert run.model.strides == (4, 16, 16)
    for width, height in ((64, 32), (32, 96), (160, 64)):
        video = run(PROMPT, width=width, height=height, frames=5, steps=1).video
        assert video.shape == (5, height, width, 3)
        with_picture = run(PROMPT, image=picture(), width=width, height=height, frames=5, steps=1, size_from="request")
        assert with_picture.video.shape == (5, height, width, 3)
    with pytest.raises(RequestError):
        run(PROMPT, width=48, height=32, frames=5, steps=1)  # 48 is a multiple of 16, and no multiple of 32


@pytest.mark.parametrize(
    ("task", "more"),
    [
        ("ti2v", {"image": picture(), "last_image": picture(1)}),
        ("t2v", {"image": picture()}),
        ("vace", {"image": picture()}),
        ("i2v", {"image": picture(), "control_video": [picture()] * 5}),
        ("t2v", {"control_scale": 0.5}),
        ("t2v", {"guidance_scale_2": 3.0}),
        ("t2v", {"boundary": 0.5}),
    ],
)
def test_f24_an_input_that_would_be_ignored_is_refused(pipe, task, more):
    """``last_image`` given to the 5B model is passed over in silence."""
    size = {"width": 64, "height": 64} if task == "ti2v" else {}
    with pytest.raises(RequestError):
        pipe(task)(PROMPT, **{**SIZE, **size, **more})


def test_l17_a_second_run_is_the_first_one_again(pipe):
    """A scheduler that is used again shifts its noise levels twice."""
    run = pipe("t2v")
    for scheduler in ("unipc", "dpm++", "euler"):
        asked = {"prompt": PROMPT, **SIZE, "steps": 4, "shift": 7.0, "scheduler": scheduler}
        first, second = run(**asked), run(**asked)
        assert first.state["sigmas"] == second.state["sigmas"]
        assert torch.equal(first.state["latents"], second.state["latents"])
        run(**{**asked, "shift": 3.0, "steps": 2})
        assert run(**asked).state["sigmas"] == first.state["sigmas"]


# --- constants (users cannot see that they are wrong)

SAMPLING = {  # (shift, steps, guidance, frames, fps) of the official generate.py and wan/configs, once more
    ("t2v", 1): (5.0, 50, 5.0, 81, 16),
    ("i2v", 1): (3.0, 40, 5.0, 81, 16),  # at 832x480
    ("flf2v", 1): (16.0, 50, 5.0, 81, 16),
    ("vace", 1): (16.0, 50, 5.0, 81, 16),
    ("t2v", 2): (12.0, 40, 4.0, 81, 16),
    ("i2v", 2): (5.0, 40, 3.5, 81, 16),
    ("ti2v", 1): (5.0, 50, 5.0, 121, 24),
}


@pytest.mark.parametrize(("task", "experts"), SAMPLING)
def test_f25_defaults_are_those_of_the_model(task, experts):
    """One set of defaults for all of them: 50 steps, guidance 5 and shift 3 for a model that was tuned for others."""
    request = Request(**TASKS[task].sampling(experts, {}))
    told = (request.shift, request.steps, request.guidance_scale, request.frames, request.fps)
    assert told == SAMPLING[task, experts]
    assert (request.width, request.height) == ((1280, 704) if task == "ti2v" else (832, 480))
    large = TASKS[task].sampling(experts, {"width": 1280, "height": 720})
    assert large["shift"] == (5.0 if (task, experts) == ("i2v", 1) else SAMPLING[task, experts][0])
    assert {*SAMPLING} == {(task, 1) for task in TASKS} | {(task, 2) for task in TASKS if TASKS[task].experts}


def test_f25_a_loaded_model_uses_them(pipe):
    for task in tiny.TASKS:
        experts = 2 if task in tiny.BOUNDARY else 1
        shift, steps, guidance, frames, fps = SAMPLING[task.removesuffix("_a14b"), experts]
        ours = pipe(task).model.defaults_for({})
        assert (ours["shift"], ours["steps"], ours["guidance_scale"]) == (shift, steps, guidance)
        assert (ours.get("frames", 81), ours.get("fps", 16)) == (frames, fps)


def test_latent_statistics_are_the_official_ones():
    """Against diffusers' defaults (Wan 2.1) and against stored outputs of the official code (Wan 2.2)."""
    from diffusers import AutoencoderKLWan

    defaults = {k: p.default for k, p in inspect.signature(AutoencoderKLWan.__init__).parameters.items()}
    assert tuple(defaults["latents_mean"]) == WanVAEConfig().latents_mean
    assert tuple(defaults["latents_std"]) == WanVAEConfig().latents_std
    mean, std = tiny.latent_statistics22()
    assert tuple(mean) == WanVAE22Config().latents_mean
    assert tuple(std) == WanVAE22Config().latents_std
    for kind, config_class in (("wan_vae", WanVAEConfig), ("wan_vae22", WanVAE22Config)):
        for name, values in KINDS[kind].unsaid.items():
            assert values == getattr(config_class(), name)
            assert len(values) == config_class().z_dim


def test_a_vae_without_statistics_gets_the_official_ones_and_another_none(pipe, tmp_path):
    """Native files hold no statistics: with those of another VAE the colours are wrong and nothing fails."""
    vae = pipe("t2v").components["vae"]
    assert vae.config.latents_mean == WanVAEConfig().latents_mean
    assert pipe("ti2v").components["vae"].config.latents_mean == WanVAE22Config().latents_mean
    folder = tiny.write(tmp_path / "m", "t2v", "native")
    sizes = {"dim": 4, "z_dim": 12}
    other = tiny.randomise(tiny.WanVAE(WanVAEConfig(**sizes, latents_mean=(0.0,) * 12, latents_std=(1.0,) * 12)), 3)
    (folder / "Wan2.1_VAE.pth").unlink()
    save_file(other.state_dict(), folder / "vae.safetensors")
    with pytest.raises(LoadError, match="shapes do not tell latents_mean"):
        locate(folder).check()


def test_vace_layers_are_those_of_the_published_models():
    """The class of diffusers has those of the 14B model as its default; 1.3B has every second block."""
    from diffusers import WanVACETransformer3DModel

    theirs = inspect.signature(WanVACETransformer3DModel.__init__).parameters["vace_layers"].default
    assert tuple(theirs) == VACE_LAYERS == OFFICIAL["wan2.1-vace-14b"].config.vace_layers
    assert OFFICIAL["wan2.1-vace-1.3b"].config.vace_layers == tuple(range(0, 30, 2))


def test_sizes_that_are_defaults_are_those_of_the_libraries():
    """A default of ours that is not the library's would be read into a config that leaves the key out."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
    from transformers import CLIPVisionConfig
    from transformers import UMT5Config as TheirUMT5

    wan, vae = (partial(KINDS[kind].read_config, "diffusers") for kind in ("wan", "wan_vae"))
    umt5, clip = (partial(KINDS[kind].read_config, "transformers") for kind in ("umt5", "clip"))
    with torch.device("meta"):
        for kind in (WanTransformer3DModel, WanVACETransformer3DModel):
            config = dict(kind().config)
            named = wan({"_class_name": kind.__name__})
            assert named == wan({"_class_name": kind.__name__, **config})
        whole = dict(AutoencoderKLWan().config)
    assert vae({}) | asdict(WanVAEConfig()) == vae(whole) | asdict(WanVAEConfig())
    theirs = TheirUMT5().to_dict()
    assert all(theirs[key] == value for key, value in umt5({"model_type": "umt5"}).items())
    eps = umt5({"model_type": "umt5", "feed_forward_proj": "gated-gelu"})["layer_norm_epsilon"]
    assert eps == theirs["layer_norm_epsilon"]
    clip_defaults = CLIPVisionConfig().to_dict()
    found = clip({"model_type": "clip_vision_model"})
    assert {key: clip_defaults[key] for key in found} == found


def test_constants_of_pictures_and_text():
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor()
    assert tuple(processor.image_mean) == encoders.MEAN
    assert tuple(processor.image_std) == encoders.STD
    assert asdict(umt5.UMT5Config())["vocab_size"] == 256384
    assert clip.CLIPConfig().tokens == 257
    assert OFFICIAL["wan2.1-flf2v-14b"].config.image_tokens == 2 * clip.CLIPConfig().tokens
    assert OFFICIAL["wan2.1-i2v-14b"].config.image_dim == clip.CLIPConfig().hidden_size
    assert {config.z_dim for config in (taehv.TAEHVConfig(), WanVAEConfig())} == {16}


def test_an_5b_config_that_claims_an_image_branch_is_told(tmp_path):
    """At least one republished 5B config does; whoever goes by it alone builds layers that stay random."""
    folder = tiny.write(tmp_path / "m", "ti2v")
    file = folder / "transformer" / "config.json"
    claim = {"image_dim": 1280, "added_kv_proj_dim": tiny.TRANSFORMER.dim}
    file.write_text(json.dumps(json.loads(file.read_text()) | claim))
    with pytest.raises(LoadError, match="image_dim is 1280 in the config and absent in the weights"):
        ditkit.load(folder)
    assert ditkit.load(folder, allow=["image_claim"]).model.task == "ti2v"


# --- LoRAs (more in test_lora.py)


@pytest.mark.parametrize("name", ["lora_unet_blocks_0.self_attn.q", "lora_unet_blocks_0_self_attn_q"])
def test_partly_converted_names_of_a_lora_are_understood(pipe, tmp_path, name):
    """``lora_unet_blocks_6.self_attn...``: half of one convention and half of another, and the key is dropped."""
    g = torch.Generator().manual_seed(1)
    down, up = torch.randn(4, 64, generator=g), torch.randn(64, 4, generator=g)
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "lora.safetensors")
    run = pipe("t2v")
    loaded = ditkit.load(run.model.path, loras=[str(tmp_path / "lora.safetensors")], lora_mode="fused")
    plain, changed = (one.components["transformer"].blocks[0].self_attn.q.weight for one in (run, loaded))
    assert torch.allclose(changed, plain + up @ down, atol=1e-5)


def test_names_of_a_lora_that_are_of_no_convention_are_refused(pipe, tmp_path):
    pair = {"lora_down.weight": torch.zeros(4, 64), "lora_up.weight": torch.zeros(64, 4)}
    save_file({f"diffusion_model.blocks_0_self_attn_q.{k}": v for k, v in pair.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(LoadError, match="blocks_0_self_attn_q"):
        ditkit.load(pipe("t2v").model.path, loras=[str(tmp_path / "lora.safetensors")])
