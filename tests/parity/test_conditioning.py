"""Conditions against the official code's stored ones, and against diffusers' pipelines with the same VAE weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from reference import rel
from safetensors import safe_open
from safetensors.torch import load_file

from ditkit.checkpoints.files.safetensors import TensorFiles
from ditkit.checkpoints.kinds.clip import clip_keys
from ditkit.checkpoints.kinds.wan_vae import vae_keys
from ditkit.checkpoints.views.key_table import rename
from ditkit.checkpoints.views.mapped import Mapped
from ditkit.conditioning.condition import control_context, image_condition
from ditkit.conditioning.images import pad_on_white, resize_exact, signed, video_pixels
from ditkit.conditioning.sizes import size_i2v, size_ti2v
from ditkit.execution.stage_list import StageList
from ditkit.models.clip import CLIPConfig
from ditkit.models.encoders import CLIPImageEncoder
from ditkit.models.wan_vae import WanVAE, WanVAE22, WanVAE22Config, WanVAEConfig
from ditkit.request import Request
from ditkit.stages.encode import EncodeCondition, EncodeControl, EncodeFirstFrame, EncodeImage
from ditkit.state import State

GOLDEN = Path(__file__).parents[1] / "data/golden"
CONDITIONING = load_file(GOLDEN / "conditioning/io.safetensors")
with safe_open(GOLDEN / "pipelines/io.safetensors", "pt") as f:
    RUNS = json.loads(f.metadata()["runs"])
    IO = {n: f.get_tensor(n) for n in f.keys() if n == "image" or n.endswith((".y", ".clip_fea", "image_unipc.states"))}  # noqa: SIM118
GIVEN = ("prompt", "request", "image", "last_image", "control_video", "control_mask", "reference_images")
AREA = 1536  # of the FLF2V case
TOLERANCE = 1e-5


def run(stage, component, size, frames=5, processing="wan", **fields) -> torch.Tensor:
    """What ``stage`` makes of the caller's fields, through a pipeline."""
    request = Request(width=size[0], height=size[1], frames=frames, image_processing=processing)
    state = State({"prompt": fields.pop("prompt", [""]), "request": request.model_dump(), **fields})
    out = StageList([stage], GIVEN).run(state, {stage.components[0]: component}, debug=True)
    return out[stage.writes[0]]


# --- the official code


@pytest.fixture(scope="module")
def official() -> WanVAE:
    vae = WanVAE(WanVAEConfig(dim=json.loads((GOLDEN / "vae/wan21/config.json").read_text())["dim"]))
    vae.load_state_dict(load_file(GOLDEN / "vae/wan21/Wan2.1_VAE.safetensors"))
    return vae.eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["wan21_i2v_unipc", "wan22_i2v_a14b_unipc"])
def test_image_to_video(official, name):
    image, asked = IO["image"], RUNS[name]
    size = size_i2v(image.shape[1], image.shape[0], asked["max_area"])
    found = run(EncodeCondition(), official, size, asked["frame_num"], image=image[None])
    expected = IO[f"{name}.y"]
    assert torch.equal(found[0, :4], expected[:4])
    assert rel(found[0], expected) <= TOLERANCE


def test_first_and_last_frame(official):
    first, last = (CONDITIONING[f"flf2v.{which}_image"] for which in ("first", "last"))
    size = size_i2v(first.shape[1], first.shape[0], AREA)
    found = run(EncodeCondition(), official, size, 81, image=first[None], last_image=last[None])
    expected = CONDITIONING["flf2v.y"]
    assert torch.equal(found[0, :4], expected[:4])
    assert rel(found[0], expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["vace_plain", "vace_refs"])
def test_control_context(official, name):
    refs = [CONDITIONING[n][:, 0] for n in sorted(CONDITIONING) if n.startswith(f"{name}.reference")]
    found = control_context(
        official.encode,
        CONDITIONING[f"{name}.frames"],
        CONDITIONING[f"{name}.mask"],
        torch.stack(refs) if refs else None,
    )
    expected = CONDITIONING[f"{name}.vace_context"]
    assert torch.equal(found[32:], expected[32:])
    assert rel(found, expected) <= TOLERANCE


def test_first_frame_of_ti2v():
    raw = json.loads((GOLDEN / "vae/wan22/config.json").read_text())
    vae = WanVAE22(WanVAE22Config(dim=raw["dim"], dec_dim=raw["dec_dim"]))
    vae.load_state_dict(load_file(GOLDEN / "vae/wan22/Wan2.2_VAE.safetensors"))
    image, asked = IO["image"], RUNS["wan22_ti2v_image_unipc"]
    size = size_ti2v(image.shape[1], image.shape[0], asked["max_area"])
    found = run(EncodeFirstFrame(), vae.eval().requires_grad_(False), size, asked["frame_num"], image=image[None])
    assert found.shape == (1, 48, 1, size[1] // 16, size[0] // 16)
    assert rel(found[0, :, 0], IO["wan22_ti2v_image_unipc.states"][0, :, 0]) <= TOLERANCE


# --- diffusers


@pytest.fixture(scope="module")
def pair():
    """Our VAE and diffusers' with the same weights."""
    from diffusers import AutoencoderKLWan

    ours = tiny.vae(seed=31)
    c = ours.config
    theirs = AutoencoderKLWan(
        base_dim=c.dim, z_dim=c.z_dim, dim_mult=[*c.dim_mult], num_res_blocks=c.num_res_blocks, attn_scales=[],
        temperal_downsample=[*c.temporal_downsample],
    )  # fmt: skip
    theirs.load_state_dict(rename(ours.state_dict(), vae_keys(len(c.dim_mult), c.num_res_blocks).to_other))
    return ours, theirs.eval().requires_grad_(False)


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    """(width, height): a picture with fine and coarse structure, so that filters and crops show."""
    out = []
    for n, (width, height) in enumerate(sizes):
        noise = np.random.default_rng(n).integers(0, 256, (height, width, 3))
        ramp = np.linspace(0, 255, width)[None, :, None] * np.linspace(1, 0.2, height)[:, None, None]
        out.append(Image.fromarray((0.4 * noise + 0.6 * ramp).astype(np.uint8)))
    return out


def bytes_of(*images: Image.Image) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(image)) for image in images])


def image_to_video(vae, expand_timesteps=False):
    from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline

    scheduler = FlowMatchEulerDiscreteScheduler()
    return WanImageToVideoPipeline(None, None, vae, scheduler, expand_timesteps=expand_timesteps)


@pytest.mark.parametrize("size", [(48, 32), (32, 64)])
@pytest.mark.parametrize("given", [(100, 66), (30, 50), (48, 32)])
def test_pixels_of_diffusers(pair, size, given):
    (image,) = pictures(given)
    expected = image_to_video(pair[1]).video_processor.preprocess(image, height=size[1], width=size[0])
    assert torch.equal(resize_exact(bytes_of(image), size[1], size[0], "diffusers"), expected)


@pytest.mark.parametrize(("frames", "last"), [(1, False), (5, False), (13, False), (5, True), (13, True)])
def test_condition_of_diffusers(pair, frames, last):
    ours, theirs = pair
    pipeline, images = image_to_video(theirs), pictures((100, 66), (70, 90))
    prepared = [pipeline.video_processor.preprocess(x, height=32, width=48).float() for x in images]
    with torch.no_grad():
        expected = pipeline.prepare_latents(
            prepared[0], 1, 16, 32, 48, frames, torch.float32, "cpu", torch.Generator().manual_seed(0),
            last_image=prepared[1] if last else None,
        )[1]  # fmt: skip
    fields = {"image": bytes_of(images[0])} | ({"last_image": bytes_of(images[1])} if last else {})
    found = run(EncodeCondition(), ours, (48, 32), frames, "diffusers", **fields)
    assert torch.equal(found[:, :4], expected[:, :4])
    assert rel(found, expected) <= TOLERANCE
    other = run(EncodeCondition(), ours, (48, 32), frames, "wan", **fields)
    assert rel(other, expected) > 1e-3  # the two ways are not the same


def test_first_frame_of_diffusers(pair):
    ours, theirs = pair
    pipeline, (image,) = image_to_video(theirs, expand_timesteps=True), pictures((100, 66))
    prepared = pipeline.video_processor.preprocess(image, height=32, width=48).float()
    with torch.no_grad():
        _, expected, mask = pipeline.prepare_latents(prepared, 1, 16, 32, 48, 9, torch.float32, "cpu")
    found = run(EncodeFirstFrame(), ours, (48, 32), 9, "diffusers", image=bytes_of(image))
    assert rel(found, expected) <= TOLERANCE
    assert int((mask == 0).any(-1).any(-1).sum()) == found.shape[2] == 1


def vace(vae):
    """Only what makes the control input is called; a transformer is there for its patch size."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanVACEPipeline, WanVACETransformer3DModel

    transformer = WanVACETransformer3DModel(
        num_attention_heads=1, attention_head_dim=12, text_dim=8, ffn_dim=8, freq_dim=8, num_layers=1, vace_layers=[0]
    )
    return WanVACEPipeline(None, None, vae, FlowMatchEulerDiscreteScheduler(), transformer=transformer)


@pytest.mark.parametrize("with_video", [False, True])
@pytest.mark.parametrize("references", [0, 2])
def test_control_input_of_diffusers(pair, with_video, references):
    ours, theirs = pair
    pipeline, size, frames = vace(theirs), (48, 32), 5
    video = pictures(*[(96, 64)] * frames)  # of the wanted proportions: diffusers changes the size otherwise
    masks = [Image.fromarray(((np.array(p)[..., 0] > 100) * 255).astype(np.uint8)).convert("RGB") for p in video]
    shown = pictures(*[(41, 53)] * 2)[:references]
    with torch.no_grad():
        prepared = pipeline.preprocess_conditions(
            video if with_video else None, masks if with_video else None, shown or None, 1, size[1], size[0], frames,
            torch.float32, torch.device("cpu"),
        )  # fmt: skip
        latents = pipeline.prepare_video_latents(*prepared, device=torch.device("cpu"))
        expected = torch.cat([latents, pipeline.prepare_masks(prepared[1], prepared[2])], 1)
    fields = {"reference_images": bytes_of(*shown)[None]} if shown else {}
    if with_video:
        fields["control_video"] = bytes_of(*video)[None]
        fields["control_mask"] = bytes_of(*masks)[None, ..., 0].float() / 255
    found = run(EncodeControl(), ours, size, frames, "diffusers", **fields)
    assert rel(found[:, 32:], expected[:, 32:]) <= 1e-6
    assert rel(found, expected) <= TOLERANCE


def test_control_video_of_diffusers(pair):
    video = pictures(*[(100, 66)] * 3)
    expected = vace(pair[1]).video_processor.preprocess_video(video, 32, 48)
    assert torch.equal(video_pixels(bytes_of(*video), 32, 48, "diffusers"), expected[0])


def test_reference_of_diffusers_and_official_differ_only_by_multiples_of_8():
    image = bytes_of(*pictures((40, 56)))
    assert torch.allclose(pad_on_white(image, 32, 48, "diffusers"), pad_on_white(image, 32, 48), atol=1e-6)
    image = bytes_of(*pictures((41, 53)))
    assert not torch.allclose(pad_on_white(image, 32, 48, "diffusers"), pad_on_white(image, 32, 48), atol=1e-2)


def test_a_long_video_is_encoded_piece_by_piece(pair):
    """The same condition whatever the size of the pieces."""
    ours, first = pair[0], signed(bytes_of(*pictures((48, 32))))
    whole = image_condition(lambda x: ours.encode(x, 400), first, first, 33)
    assert rel(image_condition(ours.encode, first, first, 33), whole) <= TOLERANCE


# --- CLIP


@pytest.fixture(scope="module")
def clip():
    raw = json.loads((GOLDEN / "clip/config.json").read_text())
    width, layers = raw["vision_dim"], raw["vision_layers"]
    config = CLIPConfig(
        width, width * raw["vision_mlp_ratio"], layers, raw["vision_heads"], raw["image_size"], raw["patch_size"]
    )
    (file,) = (GOLDEN / "clip").glob("models_clip*.safetensors")
    return CLIPImageEncoder.load(config, Mapped(TensorFiles(file), clip_keys(layers), "other"))


def test_features_of_the_original_picture(clip):
    found = run(EncodeImage(), clip, (48, 32), image=IO["image"][None])
    assert rel(found, IO["wan21_i2v_unipc.clip_fea"]) <= TOLERANCE


def test_features_of_both_pictures(clip):
    first, last = (CONDITIONING[f"flf2v.{which}_image"][None] for which in ("first", "last"))
    found = run(EncodeImage(), clip, (48, 32), image=first, last_image=last)
    expected = CONDITIONING["flf2v.clip_fea"]
    assert rel(found, expected.flatten(0, 1)[None]) <= TOLERANCE


def test_features_as_diffusers_prepares_the_picture(clip):
    """Its pipeline hands the original picture to CLIPImageProcessor and takes the last hidden state but one."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    (image,) = pictures((100, 66))
    side = clip.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    with torch.no_grad():
        expected = clip(processor(images=image, return_tensors="pt")["pixel_values"])
    found = run(EncodeImage(), clip, (48, 32), processing="diffusers", image=bytes_of(image))
    assert rel(found, expected) <= TOLERANCE
    assert rel(run(EncodeImage(), clip, (48, 32), image=bytes_of(image)), expected) > 1e-3


def test_features_of_each_clip_alone(clip):
    one, two = pictures((100, 66), (100, 66))
    together = run(EncodeImage(), clip, (48, 32), prompt=[""] * 3, image=bytes_of(one, two, one))
    assert torch.equal(together[1:2], run(EncodeImage(), clip, (48, 32), image=bytes_of(two)))
    assert torch.equal(together[0], together[2])
    assert not torch.allclose(together[0], together[1], atol=1e-2)
