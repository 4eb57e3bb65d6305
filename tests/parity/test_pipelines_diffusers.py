"""Every pipeline of the family end to end against diffusers' own, which load the same folder: the same noise and the
same pictures must give the same latents after every step and the same clip.

Of text-to-video with one transformer there is more in test_wanpipeline.py.
"""

import math
from functools import cache

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from reference import rel

import ditkit
from ditkit.schedulers.noise import initial_noise

SEED = 11
CONVENTION = {
    "convention": "diffusers",
    "rounding": "diffusers",
    "image_processing": "diffusers",
    "size_from": "request",
}
PROMPT = {"prompt": "a red circle moving left", "negative_prompt": "gray"}
SMALL = {"width": 48, "height": 32, "frames": 5, "steps": 6}
LARGE = {"width": 96, "height": 64, "frames": 5, "steps": 5}  # strides of 16
TOLERANCE, DECIBELS = 1e-5, 60


@cache
def picture(number: int, width: int, height: int) -> Image.Image:
    """Fine and coarse structure, so that filters and crops show."""
    noise = np.random.default_rng(number).integers(0, 256, (height, width, 3))
    ramp = np.linspace(0, 255, width)[None, :, None] * np.linspace(1, 0.2, height)[:, None, None]
    return Image.fromarray((0.4 * noise + 0.6 * ramp).astype(np.uint8))


def clip(count: int, width: int, height: int) -> list[Image.Image]:
    return [picture(20 + n, width, height) for n in range(count)]


def masks(frames: list[Image.Image]) -> list[Image.Image]:
    return [Image.fromarray(((np.array(f)[..., 0] > 100) * 255).astype(np.uint8)) for f in frames]


class Pair:
    """Our pipe and diffusers' pipeline over one folder."""

    def __init__(self, folder, task: str):
        import diffusers

        tiny.write(folder, task)
        name = "WanPipeline" if task in ("t2v", "t2v_a14b", "ti2v") else tiny.PIPELINES[task]
        self.ours = ditkit.load(folder, dtype_policy="diffusers")
        self.theirs = getattr(diffusers, name).from_pretrained(folder, torch_dtype=torch.float32)
        self.theirs.set_progress_bar_config(disable=True)

    def as_image_to_video(self):
        """The 5B model with a picture: one folder, and diffusers has another class for it."""
        from diffusers import WanImageToVideoPipeline

        parts = {n: self.theirs.components[n] for n in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")}
        self.theirs = WanImageToVideoPipeline(**parts, expand_timesteps=True)
        self.theirs.set_progress_bar_config(disable=True)
        return self


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    @cache
    def make(task: str) -> Pair:
        return Pair(tmp_path_factory.mktemp("diffusers") / task, task)

    return make


def numbers(given):
    """Pictures as our call takes control videos and masks: arrays."""
    found = dict(given)
    if "control_video" in found:
        found["control_video"] = np.stack([np.array(f) for f in found["control_video"]])
    if "control_mask" in found:
        found["control_mask"] = np.stack([np.array(f) for f in found["control_mask"]]).astype(np.float32) / 255
    return found


THEIRS = {
    "frames": "num_frames", "steps": "num_inference_steps", "control_video": "video", "control_mask": "mask",
    "control_scale": "conditioning_scale",
}  # fmt: skip


@torch.inference_mode()
def run_theirs(pipeline, asked, noise):
    """The latents after every step, and uint8 frames."""
    states = []

    def keep(pipeline, index, timestep, values):
        states.append(values["latents"].clone())
        return {}

    given = {THEIRS.get(k, k): v for k, v in asked.items() if k != "boundary"}
    own = pipeline.config.get("boundary_ratio")
    if "boundary" in asked:
        pipeline.register_to_config(boundary_ratio=asked["boundary"])
    try:
        frames = pipeline(**given, latents=noise.clone(), output_type="np", callback_on_step_end=keep).frames[0]
    finally:
        if "boundary" in asked:
            pipeline.register_to_config(boundary_ratio=own)
    return states, np.round(frames * 255).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def compare(pair: Pair, skip: int = 0, **asked):
    """``skip``: latent frames that diffusers puts in their place only at the end."""
    asked = {**PROMPT, **asked}
    states, experts = [], []

    def listen(event):
        if event.name == "prediction":
            states.append(event["x"].clone())
            experts.append(event["step"].expert)

    result = pair.ours(seed=SEED, listeners=[listen], **CONVENTION, **numbers(asked))
    final = result.state["latents"]
    noise = initial_noise(SEED, final.shape[1:])[None]
    assert torch.equal(states[0][:, :, skip:], noise[:, :, skip:])
    expected, frames = run_theirs(pair.theirs, asked, noise)
    assert len(expected) == len(states) == asked["steps"]
    errors = [rel(a[:, :, skip:], b[:, :, skip:]) for a, b in zip([*states[1:], final], expected, strict=True)]
    assert max(errors) <= TOLERANCE, errors
    assert result.video.shape == frames.shape
    assert psnr(result.video, frames) >= DECIBELS
    assert frames.std() > 5  # there is something to compare
    return result, experts


# --- Wan 2.1: a picture, or two


def test_image_to_video(pair):
    compare(pair("i2v"), image=picture(1, 100, 66), guidance_scale=5.0, **SMALL)


def test_image_to_video_of_one_frame_without_guidance(pair):
    compare(pair("i2v"), image=picture(1, 40, 66), guidance_scale=1.0, **{**SMALL, "frames": 1, "steps": 3})


def test_first_and_last_frame(pair):
    first, last = picture(1, 100, 66), picture(2, 70, 90)
    compare(pair("flf2v"), image=first, last_image=last, guidance_scale=4.0, **{**SMALL, "frames": 9})


# --- Wan 2.2: two experts, each with its own guidance


@pytest.mark.parametrize("boundary", [None, 0.6])
def test_two_experts(pair, boundary):
    more = {} if boundary is None else {"boundary": boundary}
    _, experts = compare(pair("t2v_a14b"), guidance_scale=4.0, guidance_scale_2=3.0, **SMALL, **more)
    assert 0 < experts.count("transformer_2") < len(experts)


@pytest.mark.parametrize("last", [False, True])
def test_two_experts_from_pictures(pair, last):
    more = {"last_image": picture(2, 70, 90)} if last else {}
    asked = {**SMALL, **more, "image": picture(1, 100, 66)}
    _, experts = compare(pair("i2v_a14b"), guidance_scale=3.5, guidance_scale_2=2.5, **asked)
    assert 0 < experts.count("transformer_2") < len(experts)


# --- Wan 2.2 5B: another VAE, and a time for each token


def test_5b_from_text(pair):
    compare(pair("ti2v"), guidance_scale=5.0, **LARGE)


def test_5b_from_a_picture(tmp_path):
    one = Pair(tmp_path / "ti2v", "ti2v").as_image_to_video()
    result, _ = compare(one, skip=1, image=picture(1, 100, 66), guidance_scale=5.0, **LARGE)
    assert torch.equal(result.state["latents"][:, :, :1], result.state["clean_latents"])


# --- VACE


@pytest.mark.parametrize("references", [0, 1, 2])
@pytest.mark.parametrize("video", [False, True])
def test_control(pair, video, references):
    given = {}
    if video:
        given["control_video"] = clip(5, 48, 32)  # of the wanted size: diffusers would change the clip's to it
        given["control_mask"] = masks(given["control_video"])
    if references:
        given["reference_images"] = [picture(1, 41, 53), picture(2, 41, 53)][:references]
    compare(pair("vace"), guidance_scale=5.0, **given, **SMALL)


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.7])
def test_control_scale(pair, scale):
    given = {"control_video": clip(5, 48, 32)}
    compare(pair("vace"), control_scale=scale, guidance_scale=3.0, **given, **SMALL)
