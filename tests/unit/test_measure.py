"""The measuring of drawn clips: right on what is drawn, right when it is damaged, silent where nothing is clear."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest

from ditkit.errors import RequestError
from ditkit.shapes import draw
from ditkit.shapes.draw import BACKGROUNDS, COLORS, DIRECTIONS, MOTIONS, SHAPES, Scene
from ditkit.shapes.measure import Reading, measure, psnr, score

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up", "still": "still", "growing": None}


def noise(video, rng):
    return np.clip(video + rng.normal(0, 8, video.shape), 0, 255).round().astype(np.uint8)


def images(change):
    from PIL import Image

    return lambda video, rng: np.stack([np.array(change(Image.fromarray(frame))) for frame in video])


def blur(image):
    from PIL import ImageFilter

    return image.filter(ImageFilter.GaussianBlur(1.5))


def jpeg(image):
    from PIL import Image

    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=30)
    return Image.open(buffer).convert("RGB")


def ghosts(video, rng):
    """A quarter of the frame before and an eighth of the one before that shine through."""
    mixed = video.astype(float)
    for age, weight in ((1, 0.25), (2, 0.125)):
        mixed[age:] += weight * (video[:-age].astype(float) - video[age:])
    return np.clip(mixed, 0, 255).astype(np.uint8)


def tint(video, rng):
    return np.clip(video * rng.uniform(0.85, 1.1, 3) + rng.uniform(-12, 12, 3), 0, 255).astype(np.uint8)


DAMAGE = {
    "none": lambda video, rng: video,
    "noise": noise,
    "blur": images(blur),
    "jpeg": images(jpeg),
    "ghosts": ghosts,
    "tint": tint,
    "blur, jpeg and noise": lambda video, rng: noise(images(lambda i: jpeg(blur(i)))(video, rng), rng),
    "three times the size": lambda video, rng: video.repeat(3, 1).repeat(3, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_99_of_100_clips_are_right_in_everything(damage):
    rng, count = np.random.default_rng(7), 200 if damage in ("none", "noise", "blur", "jpeg") else 50
    right = {"color": 0, "shape": 0, "motion": 0, "background": 0, "all": 0}
    for _ in range(count):
        scene = draw.sample_scene(rng)
        marks = score(measure(DAMAGE[damage](draw.draw(scene), rng)), scene)
        for key, value in {**marks, "all": all(marks.values())}.items():
            right[key] += value
    wrong = 0 if damage == "none" else count // 100 or 1
    assert min(right.values()) >= count - wrong, right


@pytest.mark.slow
@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_colour_on_every_ground(color, background):
    for shape in SHAPES:
        scene = draw.sample_scene(np.random.default_rng(1), color=color, background=background, shape=shape)
        reading = measure(draw.draw(scene))
        assert all(score(reading, scene).values())


@pytest.mark.parametrize("motion", MOTIONS)
def test_numbers_are_those_that_were_drawn(motion):
    rng = np.random.default_rng(3)
    for shape in SHAPES:
        scene = draw.sample_scene(rng, motion=motion, shape=shape)
        reading = measure(draw.draw(scene))
        way = np.array(DIRECTIONS.get(motion, (0, 0))) * scene.travel / 64
        np.testing.assert_allclose(reading.travel, way, atol=0.005)
        assert reading.growth == pytest.approx(3 if motion == "growing" else 1, rel=0.02)
        assert (reading.seen, reading.objects) == (1, 1)
        assert max(reading.fit, key=reading.fit.get) == shape
        assert reading.fit[shape] > 0.97


@pytest.mark.parametrize("motion", MOTIONS)
def test_mirrored_and_reversed_clips_move_the_other_way(motion):
    scene = draw.sample_scene(np.random.default_rng(5), motion=motion, shape="circle")
    video = draw.draw(scene)
    assert measure(video[::-1]).motion == OPPOSITE[motion]
    sideways = OPPOSITE[motion] if motion in ("left", "right") else motion
    upside_down = OPPOSITE[motion] if motion in ("up", "down") else motion
    assert measure(video[:, :, ::-1]).motion == sideways
    assert measure(video[:, ::-1]).motion == upside_down
    assert measure(video[[6] * 13]).motion == "still"
    assert measure(video[6:7]).motion is None, "one frame says nothing of motion"


def test_swapped_channels_are_another_colour():
    video = draw.draw(Scene("circle", "red", "left", "black", 48, 30, 10, 25))
    assert measure(video[..., ::-1]).color == "blue"
    assert measure(255 - video).color != "red"


def test_an_upturned_triangle_is_no_triangle():
    video = draw.draw(Scene("triangle", "red", "still", "black", 30, 30, 10, 0))
    assert measure(video).shape == "triangle"
    assert measure(video[:, ::-1]).shape is None
    assert measure(np.rot90(video, 1, (1, 2))).shape is None


def test_a_cross_is_an_object_without_a_known_shape():
    video = plain(BACKGROUNDS["black"])
    video[:, 20:44, 28:36] = video[:, 28:36, 20:44] = COLORS["red"]
    reading = measure(video)
    assert (reading.color, reading.shape, reading.motion) == ("red", None, "still")


def test_what_is_wrong_counts_as_wrong():
    scene = Scene("circle", "red", "left", "black", 48, 30, 10, 25)
    reading = measure(draw.draw(scene))
    assert score(reading, scene) == dict.fromkeys(("color", "shape", "motion", "background"), True)
    for key, word in {"color": "purple", "shape": "square", "motion": "right", "background": "navy"}.items():
        result = score(reading, replace(scene, **{key: word}))
        assert [k for k, right in result.items() if not right] == [key]
    assert not any(score(Reading(), scene).values())


def plain(color, frames=13):
    video = np.empty((frames, 64, 64, 3), np.uint8)
    video[:] = color
    return video


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_empty_clip_has_a_background_and_nothing_else(background):
    rng = np.random.default_rng(0)
    for video in (plain(BACKGROUNDS[background]), noise(plain(BACKGROUNDS[background]), rng)):
        reading = measure(video)
        assert reading.background == background
        assert (reading.color, reading.shape, reading.motion, reading.objects) == (None, None, None, 0)


@pytest.mark.parametrize("kind", ["uniform", "normal", "gradient", "stripes"])
def test_noise_and_patterns_show_nothing(kind):
    rng = np.random.default_rng(0)
    ramp = np.indices((13, 64, 64, 3))[2]
    video = {
        "uniform": rng.integers(0, 256, (13, 64, 64, 3)),
        "normal": np.clip(rng.normal(128, 50, (13, 64, 64, 3)), 0, 255),
        "gradient": ramp * 4,
        "stripes": (ramp % 16 < 8) * 200,
    }[kind].astype(np.uint8)
    reading = measure(video)
    assert (reading.color, reading.shape, reading.motion, reading.background) == (None,) * 4


def test_two_objects_are_not_one():
    one = draw.draw(Scene("circle", "red", "left", "black", 48, 15, 9, 25))
    two = draw.draw(Scene("square", "blue", "right", "black", 14, 48, 9, 25))
    reading = measure(np.maximum(one, two))
    assert reading.objects == 2
    assert (reading.color, reading.shape, reading.motion, reading.background) == (None, None, None, "black")
    speck = one.copy()
    speck[:, 50:53, 50:53] = 200
    assert measure(speck).motion == "left", "a speck is no second object"


def test_unclear_motions_are_none():
    frame = draw.draw(Scene("circle", "red", "still", "black", 16, 16, 9, 0), 1)[0]

    def moved(*steps):
        return np.stack([np.roll(frame, step, (0, 1)) for step in steps])

    assert measure(moved(*((2 * k, 2 * k) for k in range(13)))).motion is None, "diagonal"
    assert measure(moved(*((0, k * 5 // 12) for k in range(13)))).motion is None, "neither still nor moving"
    assert measure(moved(*((0, 30 * (k % 2)) for k in range(13)))).motion is None, "to and fro"
    assert measure(moved(*((0, 2 * k) for k in range(13)))).motion == "right"


def test_an_object_must_be_there_most_of_the_time():
    video = draw.draw(Scene("circle", "red", "left", "black", 48, 15, 9, 25))
    empty = plain(BACKGROUNDS["black"])
    gone = np.where(np.arange(13)[:, None, None, None] < 6, video, empty)
    assert measure(gone).color is None
    assert measure(gone).seen == pytest.approx(6 / 13)
    blink = np.where(np.arange(13)[:, None, None, None] % 4 == 1, empty, video)
    reading = measure(blink)
    assert (reading.color, reading.shape, reading.motion) == ("red", "circle", "left")


def test_colours_far_from_all_names_have_none():
    video = draw.draw(Scene("circle", "red", "left", "black", 48, 15, 9, 25)).astype(float)
    brown = (video * (0.45, 1.6, 0.5)).astype(np.uint8)
    reading = measure(brown)
    assert (reading.color, reading.shape, reading.motion) == (None, "circle", "left")
    assert measure(plain((200, 90, 150))).background is None


def test_other_sizes():
    scene = Scene("square", "green", "up", "gray", 30, 50, 9, 25)
    video = draw.draw(scene)
    wide = np.concatenate([video, plain(BACKGROUNDS["gray"])], axis=2)
    assert all(score(measure(wide), scene).values())
    assert all(score(measure(wide.repeat(5, 1).repeat(5, 2)), scene).values())
    for bad in (video.astype(np.float32), video[0], video[..., :1], video[:0]):
        with pytest.raises(RequestError):
            measure(bad)


def test_psnr():
    a = np.zeros((2, 4, 4, 3), np.uint8)
    b = a.copy()
    assert psnr(a, b) == float("inf")
    b[:] = 255
    assert psnr(a, b) == 0
    b[:] = 1
    assert psnr(a, b) == pytest.approx(48.1308, abs=1e-4)
    with pytest.raises(RequestError):
        psnr(a, b[:1])
