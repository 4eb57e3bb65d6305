"""All tasks of the family through ``ditkit.load`` and the call, on tiny models: layouts, pieces of runs, neutral ones.

What the pipelines compute is held against diffusers and the official code in tests/parity.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from reference import rel
from safetensors.torch import load_file, save_file

import ditkit
from ditkit.errors import RequestError, StateError
from ditkit.state import State

PROMPT = "a red circle moving left"
SIZE = {"width": 32, "height": 32, "frames": 5, "size_from": "request"}
TWO = {"steps": 6, "shift": 5.0, "guidance_scale": 4.0, "guidance_scale_2": 3.0}
EXPERTS = ("t2v_a14b", "i2v_a14b")


def picture(number: int, width: int = 40, height: int = 56) -> Image.Image:
    noise = np.random.default_rng(number).integers(0, 256, (height, width, 3))
    return Image.fromarray((0.5 * noise + 60 * (number % 3)).astype(np.uint8))


def clip(number: int, frames: int = 5) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (frames, 32, 32, 3)).astype(np.uint8)


def half(frames: int = 5) -> np.ndarray:
    mask = np.zeros((frames, 32, 32), np.float32)
    mask[:, :, 16:] = 1
    return mask


PICTURES = {
    "t2v": {},
    "i2v": {"image": picture(1)},
    "flf2v": {"image": picture(1), "last_image": picture(2)},
    "vace": {"control_video": clip(3), "control_mask": half(), "reference_images": [picture(4), picture(5)]},
    "t2v_a14b": {},
    "i2v_a14b": {"image": picture(1)},
    "ti2v": {"image": picture(1)},
}


def asked(task: str, **more):
    """Keywords of a call: every task at its smallest."""
    run = TWO if task in EXPERTS else {"steps": 4, "guidance_scale": 3.0, "shift": 5.0}
    return {"prompt": PROMPT, "negative_prompt": "gray", "seed": 3, **SIZE, **run, **PICTURES[task], **more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    @cache
    def make(task: str, layout: str = "native") -> Path:
        return tiny.write(tmp_path_factory.mktemp("family") / f"{task}-{layout}", task, layout)

    return make


@pytest.fixture(scope="module")
def pipe(folder):
    return cache(lambda task, layout="native": ditkit.load(folder(task, layout)))


@pytest.fixture(scope="module")
def whole(pipe):
    """The run of a task in one go."""
    return cache(lambda task: pipe(task)(**asked(task)))


def begin(pipe, **values) -> State:
    plain, pixels = ditkit.pictures.take(values)
    return pipe.begin(pipe.model.request(plain), pixels)


def prints(state: State, *names: str) -> list[str]:
    return [state.fingerprint_of(name) for name in names]


# --- one model, however it lies on disk


@pytest.mark.parametrize("task", tiny.TASKS)
def test_both_layouts_give_the_same_bits(pipe, whole, task):
    other = pipe(task, "diffusers")(**asked(task))
    assert torch.equal(other.state["latents"], whole(task).state["latents"])
    assert np.array_equal(other.video, whole(task).video)
    assert whole(task).video.std() > 5


def prefixed(weights: Path, folder: Path) -> Path:
    """As ComfyUI's repackaged files are; the config says how many heads there are, which are not of official width."""
    folder.mkdir()
    shutil.copy(weights.parent / "config.json", folder)
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, folder / "repackaged.safetensors")
    return folder / "repackaged.safetensors"


@pytest.mark.parametrize("task", tiny.TASKS)
def test_one_file_with_parts_from_elsewhere(folder, whole, task, tmp_path):
    native, other = folder(task), folder(task, "diffusers")
    weights = sorted(native.rglob("diffusion_pytorch_model.safetensors"))  # high noise before low noise
    files = [prefixed(file, tmp_path / str(n)) for n, file in enumerate(weights)]
    parts = {"vae": next(native.glob("Wan2*_VAE.pth")), "tokenizer": other / "tokenizer"}
    parts |= {"text_encoder": next(native.glob("models_t5*.pth"))}
    if (other / "image_encoder").is_dir():
        parts["image_encoder"] = other / "image_encoder"
    if len(files) == 2:
        parts["transformer_2"] = files[1]
    one = ditkit.load(files[0], components={name: str(path) for name, path in parts.items()})
    assert np.array_equal(one(**asked(task)).video, whole(task).video)


# --- in pieces


@pytest.mark.parametrize("task", tiny.TASKS)
def test_stopped_after_any_step_and_resumed_from_disk(pipe, whole, task, tmp_path):
    expected = whole(task).state
    state = begin(pipe(task), **asked(task))
    for step in range(asked(task)["steps"] + 1):
        stopped = pipe(task).run(state, stop_at_step=step).state
        kept = State.load(stopped.save(tmp_path / f"{step}.safetensors"))
        assert kept.equal(stopped)
        assert kept["step"] == step
        final = pipe(task).run(kept).state
        assert final.equal(expected)
        assert final.fingerprints == expected.fingerprints


@pytest.mark.parametrize("task", tiny.TASKS)
def test_stage_after_stage_from_disk(pipe, whole, task, tmp_path):
    state = begin(pipe(task), **asked(task))
    for name in pipe(task).stages.names:
        state = pipe(task).run(state, until=name).state
        state = State.load(state.save(tmp_path / f"{name}.safetensors"))
    assert state.equal(whole(task).state)
    assert state.fingerprints == whole(task).state.fingerprints


@pytest.mark.parametrize("task", EXPERTS)
def test_after_the_switch_the_first_expert_is_not_loaded(folder, pipe, whole, task, tmp_path):
    state = begin(pipe(task), **asked(task))
    experts = [step.expert for step in pipe(task).steps(pipe(task).model.request(ditkit.pictures.take(asked(task))[0]))]
    switch = experts.index("transformer_2")
    assert 0 < switch < len(experts)
    for step in (switch, switch + 1):
        file = pipe(task).run(state, stop_at_step=step).state.save(tmp_path / f"{step}.safetensors")
        later = ditkit.load(folder(task))
        final = later.run(State.load(file)).state
        assert final.equal(whole(task).state)
        assert final.fingerprints == whole(task).state.fingerprints
        assert sorted(later.components.holder.loaded) == ["transformer_2", "vae"]
        parts = {name: pipe(task).components[name] for name in ("transformer_2", "vae", "tokenizer", "text_encoder")}
        assert later.stages.run(State.load(file), parts).equal(whole(task).state)


@pytest.mark.parametrize("task", EXPERTS)
def test_before_the_switch_both_experts_have_to_be_the_same(folder, pipe, task, tmp_path):
    """Also the one that is not at work yet: the rest of the run is part of what the State promises."""
    kept = pipe(task).run(begin(pipe(task), **asked(task)), stop_at_step=1).state
    other = shutil.copytree(folder(task), tmp_path / "other")
    file = other / "low_noise_model/diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(StateError, match=r"begun with another model, .* which has another transformer_2"):
        ditkit.load(other).run(kept)


@pytest.mark.parametrize("task", tiny.TASKS)
def test_clips_one_after_the_other_and_in_one_batch(pipe, whole, task):
    both = pipe(task)(**asked(task, seed=[3, 4]))
    assert torch.equal(both.state["latents"][:1], whole(task).state["latents"])
    assert np.array_equal(both.videos[0], whole(task).video)
    assert not np.array_equal(both.videos[0], both.videos[1])
    batched = pipe(task)(**asked(task, seed=[3, 4], batched=True))
    assert rel(batched.state["latents"], both.state["latents"]) <= 1e-5


# --- pictures


@pytest.mark.parametrize(
    ("task", "field"),
    [(task, field) for task, given in PICTURES.items() for field in given] + [("i2v_a14b", "last_image")],
)
def test_r18_another_picture_makes_another_video(pipe, whole, task, field):
    """There a demo gave the same video whatever the image was. Each input counts, by itself."""
    others = {
        "image": picture(7), "last_image": picture(8), "control_video": clip(9), "control_mask": 1 - half(),
        "reference_images": [picture(4), picture(6)],
    }  # fmt: skip
    again, other = pipe(task)(**asked(task)), pipe(task)(**asked(task, **{field: others[field]}))
    assert np.array_equal(again.video, whole(task).video)
    assert rel(other.state["latents"], whole(task).state["latents"]) > 1e-3
    assert not np.array_equal(other.video, whole(task).video)


def test_the_clip_features_and_the_condition_count_each_by_itself(pipe, whole):
    state = whole("i2v").state
    other = pipe("i2v")(**asked("i2v", image=picture(7))).state
    for name in ("image_embeds", "condition"):
        mixed = begin(pipe("i2v"), **asked("i2v")).with_fields({
            **{n: state[n] for n in ("prompt_embeds", "prompt_lengths", "negative_prompt_embeds",
                                     "negative_prompt_lengths", "image_embeds", "condition")},
            name: other[name],
        })  # fmt: skip
        assert rel(pipe("i2v").run(mixed).state["latents"], state["latents"]) > 1e-3


def test_a_picture_is_a_path_an_image_an_array_or_a_tensor(pipe, whole, tmp_path):
    image = picture(1)
    image.save(tmp_path / "a.png")
    array = np.array(image)
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), image, array, torch.from_numpy(array)):
        result = pipe("i2v")(**asked("i2v", image=given))
        assert np.array_equal(result.video, whole("i2v").video)
        assert torch.equal(result.state["image"], whole("i2v").state["image"])
        assert prints(result.state, "condition", "video") == prints(whole("i2v").state, "condition", "video")
    assert pipe("i2v")(**asked("i2v", image=array)).state["request"]["image"].startswith("sha256:")


@pytest.mark.parametrize("task", [task for task in tiny.TASKS if PICTURES[task]])
def test_the_pictures_of_a_state_survive_a_file(pipe, task, tmp_path):
    state = begin(pipe(task), **asked(task))
    kept = State.load(state.save(tmp_path / "a.safetensors"))
    assert kept.equal(state)
    for name, given in PICTURES[task].items():
        dtype = torch.float32 if name == "control_mask" else torch.uint8
        assert kept[name].dtype == dtype
        arrays = [np.array(one) for one in given] if isinstance(given, list) else np.array(given)
        assert np.array_equal(kept[name][0].numpy(), np.array(arrays))


def test_the_size_follows_from_the_image(pipe):
    result = pipe("i2v")(**asked("i2v", size_from="image", width=48, height=48, image=picture(1, 90, 40)))
    assert result.state["request"] | {"width": 64, "height": 32, "size_from": "request"} == result.state["request"]
    assert result.video.shape == (5, 32, 64, 3)
    again = pipe("i2v")(**asked("i2v", width=64, height=32, image=picture(1, 90, 40)))
    assert np.array_equal(again.video, result.video)


def test_fingerprints_tell_what_changed(pipe, whole):
    def changed(task, **more):
        fields = list(whole(task).state.fingerprints)
        other = pipe(task)(**asked(task, **more)).state
        return {n for n in fields if prints(other, n) != prints(whole(task).state, n)}

    loop = {"latents", "sigmas", "step", "history", "video"}
    text = {"prompt_embeds", "prompt_lengths", "negative_prompt_embeds", "negative_prompt_lengths"}
    assert changed("i2v", image=picture(7)) == loop | {"image_embeds", "condition"}
    assert changed("i2v", prompt="blue") == loop | text
    assert changed("i2v", steps=3) == loop
    assert changed("i2v", frames=1) == loop | {"condition"}
    assert changed("i2v", image_processing="diffusers") == loop | {"image_embeds", "condition"}
    assert changed("flf2v", last_image=picture(7)) == loop | {"image_embeds", "condition"}
    assert changed("ti2v", image=picture(7)) == loop | {"clean_latents"}
    assert changed("ti2v", frames=9) == loop
    assert changed("vace", control_scale=0.5) == loop
    assert changed("vace", control_mask=1 - half()) == loop | {"control"}
    assert changed("t2v_a14b", boundary=0.5) == loop
    assert changed("t2v_a14b", guidance_scale_2=2.0) == loop  # a negative prompt is encoded as before
    assert changed("t2v", guidance_scale=2.0) == loop


# --- neutral settings


class Passes:
    """Seam B: which branch and which expert each pass through the blocks is for."""

    def __init__(self):
        self.seen = []

    def __call__(self, run_blocks):
        def watched(blocks, x, ctx):
            self.seen.append((ctx.step.index, ctx.step.branch, ctx.step.expert))
            return run_blocks(blocks, x, ctx)

        return watched


@pytest.mark.parametrize("task", tiny.TASKS)
def test_without_guidance_there_is_one_pass_and_no_negative_prompt(folder, task):
    passes = Passes()
    off = {"guidance_scale": 1.0} | ({"guidance_scale_2": 1.0} if task in EXPERTS else {})
    pipe = ditkit.load(folder(task), seams=ditkit.Seams(run_blocks=(passes,)))
    result = pipe(**asked(task, **off))
    assert [(index, branch) for index, branch, _ in passes.seen] == [(i, "cond") for i in range(asked(task)["steps"])]
    assert "negative_prompt_embeds" not in result.state
    assert np.array_equal(pipe(**asked(task, **off, negative_prompt="blue")).video, result.video)


def test_each_expert_has_its_own_guidance(folder):
    passes = Passes()
    pipe = ditkit.load(folder("t2v_a14b"), seams=ditkit.Seams(run_blocks=(passes,)))
    pipe(**asked("t2v_a14b", guidance_scale_2=1.0))
    branches = {expert: {branch for _, branch, e in passes.seen if e == expert} for _, _, expert in passes.seen}
    assert branches == {"transformer": {"cond", "uncond"}, "transformer_2": {"cond"}}


def twins(folder: Path, weights: Path, single: Path) -> Path:
    """The model of ``single`` with ``weights`` as both of its experts."""
    shutil.copytree(single, folder, ignore=shutil.ignore_patterns("diffusion_pytorch_model*", "config.json"))
    for name in ("high_noise_model", "low_noise_model"):
        shutil.copytree(
            weights,
            folder / name,
            ignore=lambda place, names: [n for n in names if "model.safe" not in n and n != "config.json"],
        )
    return folder


def test_two_equal_experts_are_one_model(folder, whole, tmp_path):
    pipe = ditkit.load(twins(tmp_path / "twins", folder("t2v"), folder("t2v")))
    asking = asked("t2v", boundary=0.875, guidance_scale_2=3.0)
    experts = {step.expert for step in pipe.steps(pipe.model.request(asking))}
    assert experts == {"transformer", "transformer_2"}
    assert np.array_equal(pipe(**asking).video, whole("t2v").video)


@pytest.mark.parametrize(("boundary", "name"), [(0.0, "high_noise_model"), (1.0, "low_noise_model")])
def test_a_boundary_at_the_end_leaves_one_expert(folder, pipe, boundary, name, tmp_path):
    """At 1 it is the second from the first step on, which is told 999; a step that is told 1000 is the first's."""
    scales = {"guidance_scale": 3.0, "guidance_scale_2": 3.0}
    found = pipe("t2v_a14b")(**asked("t2v_a14b", boundary=boundary, **scales))
    alone = shutil.copytree(
        folder("t2v"), tmp_path / "alone", ignore=shutil.ignore_patterns("diffusion*", "config.json")
    )
    for file in (folder("t2v_a14b") / name).iterdir():
        shutil.copy(file, alone)
    expected = ditkit.load(alone)(**asked("t2v", steps=6))
    assert np.array_equal(found.video, expected.video)


def test_control_at_scale_0_counts_for_nothing(folder, pipe, tmp_path):
    """Then a VACE model is the text-to-video model that it was made from, to the bit; references still take frames."""
    plain = shutil.copytree(
        folder("vace"), tmp_path / "plain", ignore=shutil.ignore_patterns("diffusion*", "config.json")
    )
    tensors = load_file(folder("vace") / "diffusion_pytorch_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("vace_")}
    save_file(kept, plain / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    config = json.loads((folder("vace") / "config.json").read_text())
    config = {k: v for k, v in config.items() if not k.startswith("vace_")} | {
        "model_type": "t2v",
        "_class_name": "WanModel",
    }
    (plain / "config.json").write_text(json.dumps(config))
    asking = {name: value for name, value in asked("vace").items() if name not in PICTURES["vace"]}
    expected = ditkit.load(plain)(**asking)
    for given in ({}, {"control_video": clip(3)}, {"control_video": clip(9), "control_mask": half()}):
        found = pipe("vace")(**asking, **given, control_scale=0.0)
        assert torch.equal(found.state["latents"], expected.state["latents"])
    assert pipe("vace")(**asking).state["latents"].shape == expected.state["latents"].shape
    ahead = pipe("vace")(**asking, control_scale=0.0, reference_images=[picture(4)])
    assert ahead.state["latents"].shape[2] == expected.state["latents"].shape[2] + 1
    assert ahead.video.shape == expected.video.shape


# --- what does not fit is said before anything is loaded


@pytest.mark.parametrize(
    ("task", "more", "said"),
    [
        ("t2v", {"image": picture(1)}, "its model takes text alone"),
        ("ti2v", {"last_image": picture(1)}, "its model takes image"),
        ("i2v", {"control_video": clip(1)}, "its model takes image, last_image"),
        ("i2v", {"control_scale": 0.5}, "its model takes no control"),
        ("i2v", {"boundary": 0.5}, "one transformer"),
        ("i2v", {"guidance_scale_2": 2.0}, "no boundary"),
        ("vace", {"control_mask": half(), "control_video": None}, "there is nothing to be kept"),
        ("vace", {"control_video": clip(1, 9), "control_mask": None}, "control_video of 9 frames"),
        ("vace", {"control_mask": half(3)}, "control_mask of 3 frames"),
        ("vace", {"control_mask": 255 * half()}, "outside 0 to 1"),
        ("vace", {"control_mask": np.full((5, 32, 32), np.nan)}, "outside 0 to 1"),
    ],
)
def test_inputs_that_a_model_has_no_use_for(pipe, task, more, said):
    values = {name: value for name, value in asked(task, **more).items() if value is not None}
    with pytest.raises(RequestError, match=said):
        pipe(task)(**values)


@pytest.mark.parametrize(("task", "missing"), [("i2v", "image"), ("i2v_a14b", "image"), ("flf2v", "last_image")])
def test_inputs_that_a_model_needs(pipe, task, missing):
    values = {name: value for name, value in asked(task).items() if name != missing}
    with pytest.raises(RequestError, match=f"without {missing}"):
        pipe(task)(**values)
