"""Pixels, masks and the stages that make conditions: what holds for any model, and what is refused."""

import math

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from ditkit.conditioning.condition import fold_mask, image_condition, known_frames, per_clip
from ditkit.conditioning.images import (
    mask_pixels,
    one_size,
    pad_on_white,
    resize_and_crop,
    resize_exact,
    resize_to_fit,
    signed,
    video_pixels,
)
from ditkit.errors import RequestError
from ditkit.execution.stage_list import StageList
from ditkit.request import Request
from ditkit.stages.encode import EncodeCondition, EncodeControl, EncodeFirstFrame
from ditkit.state import State

GIVEN = ("prompt", "request", "image", "last_image", "control_video", "control_mask", "reference_images")


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    """Smooth enough that filters agree about it, uneven enough that shifts and flips show."""
    g = torch.Generator().manual_seed(seed)
    count, height, width = math.prod(shape[:-3]), *shape[-3:-1]
    coarse = torch.rand(count, 3, 5, 4, generator=g) * 255
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
    return fine.round().to(torch.uint8).movedim(1, -1).reshape(shape)


def state(**fields) -> State:
    more = {k: fields.pop(k) for k in ("frames", "image_processing") if k in fields}
    request = Request(width=48, height=32, **{"frames": 5, **more}).model_dump()
    return State({"prompt": fields.pop("prompt", [""]), "request": request, **fields})


def run(stage, vae, **fields) -> torch.Tensor:
    out = StageList([stage], GIVEN).run(state(**fields), {"vae": vae}, debug=True)
    return out[stage.writes[0]]


@pytest.fixture(scope="module")
def vae():
    return tiny.vae()


# --- pixels


def test_scaling_to_signed_values():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1).expand(1, 1, 256, 3)
    exact = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for processing in ("wan", "diffusers"):
        found = signed(every, processing)
        assert found.dtype == torch.float32
        assert found.shape == (1, 3, 1, 256)
        assert (found[0, 1, 0].double() - exact).abs().max() < 1e-7


def bicubic(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[C, I, J] float64, by the cubic with a = -3/4 and repeated borders, tap by tap."""

    def weights(fraction: float) -> list[float]:
        out = []
        for tap in range(-1, 3):
            d = abs(tap - fraction)
            near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            out.append(near if d <= 1 else far)
        return out

    def along(x: torch.Tensor, size: int) -> torch.Tensor:  # last axis
        lines = []
        for i in range(size):
            place = (i + 0.5) * x.shape[-1] / size - 0.5
            taps = [min(max(math.floor(place) + tap, 0), x.shape[-1] - 1) for tap in range(-1, 3)]
            lines.append(sum(w * x[..., tap] for w, tap in zip(weights(place % 1), taps, strict=True)))
        return torch.stack(lines, -1)

    return along(along(image, width).mT, height).mT


@pytest.mark.parametrize("size", [(32, 48), (20, 12), (70, 90)])
def test_official_stretching_is_the_plain_cubic(size):
    image = pixels(2, 40, 50, 3)
    found = resize_exact(image, *size)
    for one, expected in zip(found, image, strict=True):
        exact = bicubic(expected.movedim(-1, 0).double() / 127.5 - 1, *size)
        assert (one.double() - exact).abs().max() < 1e-5


def test_covering_keeps_proportions_and_the_centre():
    board = torch.zeros(1, 60, 100, 3, dtype=torch.uint8)
    board[:, :, 50:] = 200  # an edge in the middle stays in the middle
    found = resize_and_crop(board, 32, 32)
    assert found.shape == (1, 3, 32, 32)
    assert (found[..., :14] == -1).all()
    assert (found[..., 18:] > 0.5).all()
    scaled = Image.fromarray(board[0].numpy()).resize((53, 32), Image.Resampling.LANCZOS).crop((10, 0, 42, 32))
    assert torch.equal(found[0], signed(torch.from_numpy(np.array(scaled))))


def test_an_equal_size_changes_no_pixel():
    image = pixels(1, 32, 48, 3)
    assert torch.equal(resize_and_crop(image, 32, 48), signed(image))
    assert torch.equal(pad_on_white(image, 32, 48), signed(image))
    assert (resize_exact(image, 32, 48) - signed(image)).abs().max() < 1e-6
    assert torch.equal(resize_exact(image, 32, 48, "diffusers"), signed(image, "diffusers"))
    assert (video_pixels(image, 32, 48) - signed(image)[0][:, None]).abs().max() < 1e-6


@pytest.mark.parametrize(("given", "wanted", "expected"), [
    ((60, 80), (30, 40), (60, 80)), ((60, 80), (50, 50), (60, 60)), ((40, 90), (100, 100), (40, 40)),
    ((90, 40), (2, 4), (20, 40)),
])  # fmt: skip
def test_proportions_of_another_picture(given, wanted, expected):
    image = pixels(1, *given, 3)
    found = resize_to_fit(image, *wanted)
    top, left = (given[0] - expected[0]) // 2, (given[1] - expected[1]) // 2
    assert torch.equal(found, image[:, top : top + expected[0], left : left + expected[1]])


def test_a_reference_lies_whole_in_the_middle_of_white():
    image = torch.zeros(1, 20, 60, 3, dtype=torch.uint8)
    found = pad_on_white(image, 32, 48)  # scale 0.8: 16 x 48
    assert (found[..., :8, :] == 1).all()
    assert (found[..., 24:, :] == 1).all()
    assert (found[..., 8:24, :] == -1).all()
    narrow = pad_on_white(torch.zeros(1, 4000, 2, 3, dtype=torch.uint8), 32, 48)
    assert (narrow == -1).any()
    assert (narrow == 1).any()


def test_references_of_different_sizes_become_one_tensor():
    same = [pixels(20, 30, 3, seed=s) for s in (1, 2)]
    assert torch.equal(one_size(same, 32, 48), torch.stack(same))
    mixed = [*same, pixels(64, 32, 3)]
    found = one_size(mixed, 32, 48)
    assert found.dtype == torch.uint8
    assert found.shape == (3, 32, 48, 3)
    for one, image in zip(found, mixed, strict=True):
        assert (signed(one) - pad_on_white(image[None], 32, 48)[0]).abs().max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize("size", [(32, 48), (48, 48), (24, 80)])
def test_a_control_video_covers_the_size(size):
    video = pixels(3, 70, 90, 3)
    found = video_pixels(video, *size)
    assert found.shape == (3, 3, *size)
    scale = max(size[0] / 70, size[1] / 90)
    height, width = round(scale * 70), round(scale * 90)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    for frame, image in zip(found.unbind(1), video, strict=True):  # PIL's antialiased cubic is the same filter
        by_pil = Image.fromarray(image.numpy()).resize((width, height), Image.Resampling.BICUBIC)
        expected = torch.from_numpy(np.array(by_pil))[top : top + size[0], left : left + size[1]]
        assert ((frame + 1) * 127.5 - expected.movedim(-1, 0)).abs().max() <= 1.01


def test_a_mask_moves_with_its_video():
    video, mask = torch.zeros(2, 70, 90, 3, dtype=torch.uint8), torch.zeros(2, 70, 90)
    video[:, 10:40, 30:60] = 255
    mask[:, 10:40, 30:60] = 1
    for processing in ("wan", "diffusers"):
        seen = video_pixels(video, 32, 48, processing)[:1] / 2 + 0.5
        assert (mask_pixels(mask, 32, 48, processing) - seen).abs().max() < 1e-6
    kept = torch.rand(2, 32, 48)
    assert torch.equal(mask_pixels(kept, 32, 48), kept[None])


def test_an_unknown_processing_is_refused():
    with pytest.raises(RequestError, match=r"image_processing='difusers'.*should be 'wan' or 'diffusers'"):
        Request.of({"image_processing": "difusers"})


# --- masks


@pytest.mark.parametrize("stride", [4, 2])
@pytest.mark.parametrize("frames", [1, 5, 9, 81])
def test_the_mask_marks_known_frames(frames, stride):
    mask = known_frames(frames, False, 3, 2, stride)
    assert mask.shape == (stride, (frames - 1) // stride + 1, 3, 2)
    assert (mask[:, 0] == 1).all()
    assert not mask[:, 1:].any()
    if frames > 1:
        both = known_frames(frames, True, 3, 2, stride)
        assert (both[-1, -1] == 1).all()
        assert not both[:-1, -1].any()
        assert torch.equal(both[:, :-1], mask[:, :-1])


def test_the_frames_that_a_mask_is_picked_from():
    numbers = torch.arange(81.0).view(81, 1, 1).expand(81, 16, 16)
    picked = fold_mask(numbers)[0, :, 0, 0].int().tolist()
    assert picked == [1, 5, 9, 13, 17, 21, 25, 28, 32, 36, 40, 44, 48, 52, 55, 59, 63, 67, 71, 75, 79]
    assert picked == [math.floor((i + 0.5) * 81 / 21) for i in range(21)]


def test_channels_of_a_folded_mask_are_rows_and_columns():
    mask = torch.zeros(1, 16, 24)
    mask[0, 8 + 3, 16 + 5] = 1
    folded = fold_mask(mask)
    assert folded.shape == (64, 1, 2, 3)
    assert folded[3 * 8 + 5, 0, 1, 2] == 1
    assert folded.sum() == 1


# --- stages


@pytest.mark.parametrize("frames", [0, 2, 6, 8])
def test_a_count_of_frames_that_no_vae_makes(vae, frames):
    with pytest.raises(RequestError, match=r"4n \+ 1"):
        image_condition(vae.encode, torch.zeros(1, 3, 32, 48), None, frames)


def test_no_room_for_a_last_picture(vae):
    picture = torch.zeros(1, 3, 32, 48)
    assert image_condition(vae.encode, picture, None, 1).shape == (1, 20, 1, 4, 6)
    with pytest.raises(RequestError, match=r"more than 1. Use 5"):
        image_condition(vae.encode, picture, picture, 1)


IMAGES = {"image": pixels(3, 40, 50, 3), "last_image": pixels(3, 30, 30, 3, seed=1)}
CONTROL = {
    "control_video": pixels(3, 5, 40, 50, 3),
    "control_mask": (pixels(3, 5, 40, 50, 3, seed=2)[..., 0] > 120).float(),
    "reference_images": pixels(3, 2, 25, 20, 3, seed=3),
}


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "fields"), [
    (EncodeCondition(), {"image": IMAGES["image"]}),
    (EncodeCondition(), IMAGES),
    (EncodeFirstFrame(), {"image": IMAGES["image"]}),
    (EncodeControl(), CONTROL),
    (EncodeControl(), {"reference_images": CONTROL["reference_images"]}),
])  # fmt: skip
@pytest.mark.parametrize("processing", ["wan", "diffusers"])
def test_each_clip_equals_its_single_run(vae, stage, fields, processing):
    together = run(stage, vae, prompt=[""] * 3, image_processing=processing, **fields)
    assert together.dtype == torch.float32
    assert together.device.type == "cpu"
    for index in range(3):
        alone = run(stage, vae, image_processing=processing, **{k: v[index : index + 1] for k, v in fields.items()})
        assert torch.equal(together[index : index + 1], alone)
    assert not torch.equal(together[0], together[1])


def test_equal_clips_are_encoded_once(vae, monkeypatch):
    calls, encode = [], vae.encode
    monkeypatch.setattr(vae, "encode", lambda x: calls.append(x.shape) or encode(x))
    image = pixels(1, 40, 50, 3)
    run(EncodeCondition(), vae, prompt=[""] * 3, image=torch.cat([image, image + 1, image]))
    assert len(calls) == 2


def test_clips_differ_if_one_field_does():
    a, b = torch.zeros(2, 1), torch.tensor([[1.0], [2.0]])
    assert torch.equal(per_clip(lambda x, y: x + y, a, b), b)
    assert torch.equal(per_clip(lambda x, y: x + 1 if y is None else y, a, None), a + 1)


def test_without_a_control_video_all_is_made_anew(vae):
    found = run(EncodeControl(), vae)
    grey = vae.encode(torch.zeros(1, 3, 5, 32, 48))
    assert torch.equal(found[:, :16], grey)
    assert torch.equal(found[:, 16:32], grey)
    assert (found[:, 32:] == 1).all()
    assert found.shape == (1, 96, 2, 4, 6)


def test_the_reference_pictures_are_frames_in_front(vae):
    one, two = pixels(1, 2, 32, 48, 3).split(1, 1)
    plain = run(EncodeControl(), vae)
    found = run(EncodeControl(), vae, reference_images=torch.cat([one, two], 1))
    assert torch.equal(found[:, :, 2:], plain)
    assert not found[:, 16:, :2].any()
    first = run(EncodeControl(), vae, reference_images=one)
    assert torch.equal(found[:, :, :1], first[:, :, :1])
    turned = run(EncodeControl(), vae, reference_images=torch.cat([one, two], 1), image_processing="diffusers")
    assert torch.allclose(turned[:, :, :2], found[:, :, :2].flip(2), atol=1e-5)
    assert not torch.allclose(turned[:, :, :2], found[:, :, :2], atol=1e-2)


def test_a_last_picture_matters_and_is_cut_not_squeezed(vae):
    board = torch.full((1, 40, 100, 3), 255, dtype=torch.uint8)
    board[:, :, 20:80] = 0  # all that a picture of 40 x 60 sees of it
    found = run(EncodeCondition(), vae, image=pixels(1, 40, 60, 3), last_image=board)
    black = run(EncodeCondition(), vae, image=pixels(1, 40, 60, 3), last_image=torch.zeros_like(board))
    assert torch.equal(found, black)
    squeezed = run(EncodeCondition(), vae, image=pixels(1, 40, 60, 3), last_image=board, image_processing="diffusers")
    assert not torch.allclose(squeezed, black, atol=1e-2)
    alone = run(EncodeCondition(), vae, image=pixels(1, 40, 60, 3))
    assert not torch.allclose(alone[:, 4:], black[:, 4:], atol=1e-2)


def test_a_last_picture_on_a_model_that_takes_only_a_first(vae):
    """diffusers drops it without a word."""
    with pytest.raises(RequestError, match="takes a first picture only"):
        run(EncodeFirstFrame(), vae, **{k: v[:1] for k, v in IMAGES.items()})


def test_a_mask_needs_its_video(vae):
    with pytest.raises(RequestError, match="mask without a control video"):
        run(EncodeControl(), vae, control_mask=CONTROL["control_mask"][:1])


def test_a_control_video_of_another_length(vae):
    with pytest.raises(RequestError, match="control_video of 5 frames: the run makes 9"):
        run(EncodeControl(), vae, frames=9, control_video=CONTROL["control_video"][:1])


def test_without_a_picture_nothing_runs(vae):
    for stage in (EncodeCondition(), EncodeFirstFrame()):
        out = StageList([stage], GIVEN).run(state(), {"vae": vae})
        assert stage.writes[0] not in out
