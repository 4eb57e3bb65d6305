"""What a tinkerer hands over by mistake, and what a wrapper has to be able to tell apart: found on tiny models."""

from __future__ import annotations

import tracemalloc
from functools import cache
from shutil import copyfile

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file

import ditkit
from ditkit import Seams
from ditkit.conditioning.images import pad_on_white, resize_and_crop, resize_to_fit, video_pixels
from ditkit.errors import RequestError
from ditkit.media import as_image
from ditkit.replay import read, replay

SMALL = {"steps": 2, "frames": 5, "width": 32, "height": 32}
TAEHV = "data/golden/taehv/taew2_1_tiny.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cache(lambda task: tiny.write(tmp_path_factory.mktemp("odd") / task, task))


@pytest.fixture(scope="module")
def pipe(folder):
    return cache(lambda task: ditkit.load(folder(task)))


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


# --- pictures


@pytest.mark.parametrize(("first", "last"), [((1, 1000), (1000, 1)), ((1000, 1), (1, 1000))])
def test_a_last_picture_that_is_all_length(first, last):
    cut = resize_to_fit(torch.zeros(1, *last, 3, dtype=torch.uint8), *first)
    assert min(cut.shape[1:3]) == 1


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1)])
def test_a_picture_that_is_all_length_is_not_blown_up(shape):
    picture = torch.zeros(1, *shape, 3, dtype=torch.uint8)
    for resize in (resize_and_crop, lambda *size: video_pixels(size[0], *size[1:])):
        with pytest.raises(RequestError, match="Cut it to the proportions"):
            resize(picture, 480, 832)


def test_a_reference_that_diffusers_has_no_size_for():
    with pytest.raises(RequestError, match="multiples of 8"):
        pad_on_white(torch.zeros(1, 5, 40, 3, dtype=torch.uint8), 32, 32, "diffusers")


def test_a_pil_image_whose_file_is_damaged_or_closed(tmp_path):
    Image.fromarray(noise(64, 64, 3)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1500])
    closed = Image.open(tmp_path / "whole.png")
    closed.close()
    with Image.open(tmp_path / "cut.png") as cut:
        for picture in (closed, cut):
            with pytest.raises(RequestError, match="cannot be read"):
                as_image(picture)


@pytest.mark.parametrize("form", [torch.Tensor.bfloat16, lambda x: x.requires_grad_(), torch.Tensor.numpy])
def test_a_mask_is_a_tensor_of_any_kind(pipe, form):
    video = noise(5, 32, 32, 3)
    masks = form(torch.ones(5, 32, 32)), np.ones((5, 32, 32))
    first, other = (pipe("vace")("a", control_video=video, control_mask=mask, **SMALL) for mask in masks)
    assert np.array_equal(first.video, other.video)


@pytest.mark.parametrize("shape", [(5, 0, 32, 3), (0, 32, 32, 3)])
def test_a_control_video_without_pixels(pipe, shape):
    with pytest.raises(RequestError, match="no pixels"):
        pipe("vace")("a", control_video=noise(*shape), **SMALL)


def test_a_replay_with_fewer_references(pipe, tmp_path):
    references = [noise(20, 30, 3), noise(40, 30, 3)]
    (file,) = pipe("vace")("a", reference_images=references, **SMALL).save(tmp_path / "a.npz")
    with pytest.raises(RequestError, match="the request has 2"):
        replay(read(file), images={"reference_images": references[:1]})


# --- two experts


def test_one_guidance_scale_is_for_both_experts(pipe):
    def told(**given):
        request = pipe("t2v_a14b").model.request({"prompt": "a", "shift": 5.0, **SMALL, "steps": 6, **given})
        return [(step.expert, step.guidance_scale) for step in pipe("t2v_a14b").steps(request)]

    assert set(told()) == {("transformer", 4.0), ("transformer_2", 3.0)}
    assert set(told(guidance_scale=1)) == {("transformer", 1.0), ("transformer_2", 1.0)}
    assert set(told(guidance_scale=1, guidance_scale_2=2)) == {("transformer", 1.0), ("transformer_2", 2.0)}
    assert set(told(guidance_scale_2=1)) == {("transformer", 4.0), ("transformer_2", 1.0)}


# --- States and sites


def test_a_preview_decoder_makes_no_other_model(folder, pipe, request):
    decoder = str(request.config.rootpath / "tests" / TAEHV)
    watched = ditkit.load(folder("t2v"), components={"preview_decoder": decoder})
    begun = pipe("t2v").begin(pipe("t2v").model.request({"prompt": "a", **SMALL}))
    half = pipe("t2v").run(begun, stop_at_step=1).state
    assert np.array_equal(watched.run(half).video, pipe("t2v").run(begun).video)


def test_every_attention_call_of_a_step_has_a_site_of_its_own(folder):
    seen = []

    def watch(attend):
        def watching(q, k, v, site):
            seen.append((site.block, site.kind, site.control, site.step.index, site.step.branch))
            return attend(q, k, v, site)

        return watching

    ditkit.load(folder("vace"), seams=Seams(attend=(watch,)))("a", **SMALL)
    assert len(seen) == len(set(seen)) == 2 * 2 * 2 * (3 + 2)  # steps, branches, self and cross, blocks and controls
    assert {block for block, _, control, *_ in seen if control} == {0, 2}


# --- a clip made from relative paths


def test_a_clip_finds_its_parts_and_loras_from_every_folder(folder, request, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    copyfile(request.config.rootpath / "tests" / TAEHV, "taehv.safetensors")
    width, low_rank = tiny.TRANSFORMER.dim, "diffusion_model.blocks.0.self_attn.q.lora"
    save_file({f"{low_rank}_down.weight": torch.ones(2, width), f"{low_rank}_up.weight": torch.ones(width, 2)}, "l.st")
    for name, loras in {"plain": ["l.st"], "named": ["transformer=l.st:0.5"]}.items():
        pipe = ditkit.load(folder("t2v"), components={"vae": "taehv.safetensors"}, loras=loras)
        pipe("a", **SMALL).save(f"{name}.npz")
    monkeypatch.chdir(tmp_path / "there")
    assert all(replay(read(f"../here/{name}.npz")).identical for name in ("plain", "named"))


def test_each_clip_of_a_state_names_its_own_picture(pipe):
    plain, pixels = ditkit.pictures.take({"prompt": ["a", "b"], "image": noise(40, 56, 3), **SMALL})
    state = pipe("i2v").begin(pipe("i2v").model.request(plain), pixels)
    other = 255 - state["image"][1:]
    result = pipe("i2v").run(state.with_fields({"image": torch.cat([state["image"][:1], other])}))
    alone = pipe("i2v")("b", image=other[0], **SMALL)
    assert np.array_equal(result.videos[1], alone.video)
    assert result.manifests[1]["inputs"] == alone.manifests[0]["inputs"] != result.manifests[0]["inputs"]


@pytest.mark.parametrize("task", ["t2v", "vace"])
def test_no_size_follows_from_an_image_that_a_model_does_not_take(pipe, task):
    with pytest.raises(RequestError, match="size_from"):
        pipe(task)("a", size_from="image", **SMALL)


def test_naming_a_long_control_video_takes_no_memory_to_speak_of():
    video = np.zeros((40, 120, 160, 3), np.uint8)
    tracemalloc.start()
    _, pixels = ditkit.pictures.take({"control_video": video})
    assert tracemalloc.get_traced_memory()[1] < 1.2 * video.nbytes
    tracemalloc.stop()
    names = [
        ditkit.pictures.take({"control_video": x})[0]["control_video"] for x in (video, video[:, ::-1], video[:20])
    ]
    assert names[0] == names[1] != names[2]
    assert pixels["control_video"] is video
