"""The official size rules: every stored case, and what must hold for any picture."""

import json
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ditkit.conditioning.sizes import size_i2v, size_ti2v, size_vace
from ditkit.errors import RequestError

CASES = json.loads((Path(__file__).parents[1] / "data/golden/conditioning/sizes.json").read_text())["cases"]
RULES = {"i2v": size_i2v, "ti2v": size_ti2v}


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c['task']}-{c['image_width']}x{c['image_height']}-{c['max_area']}"
)
def test_stored_case(case):
    found = RULES[case["task"]](case["image_width"], case["image_height"], case["max_area"])
    assert found == (case["output_width"], case["output_height"])


sides = st.integers(64, 4096)
areas = st.sampled_from([480 * 832, 704 * 1280, 720 * 1280, 256 * 256])


@settings(max_examples=200, deadline=None)
@given(sides, sides, areas)
def test_any_picture(width, height, area):
    assume(1 / 8 < width / height < 8)
    w, h = size_i2v(width, height, area)
    assert w % 16 == h % 16 == 0
    assert area * 0.8 < w * h <= area
    w, h = size_ti2v(width, height, area)
    assert w % 32 == h % 32 == 0
    assert area * 0.6 < w * h <= area


@pytest.mark.parametrize(("source", "area", "expected"), [
    ((1280, 720, 81), 480 * 832, (832, 480, 81)),
    ((1280, 720, 81), 720 * 1280, (1280, 720, 81)),
    ((720, 1280, 81), 480 * 832, (464, 848, 81)),  # 53 rows, the root of 1560 * 16 / 9, and 1560 / 53 columns
    ((1920, 1080, 200), 720 * 1280, (1280, 720, 81)),  # no more than 21 latent frames at full area
    ((320, 240, 9), 480 * 832, (320, 240, 9)),  # never larger than the source
    ((320, 240, 400), 480 * 832, (320, 240, 397)),  # a small picture leaves tokens for a longer video
    ((330, 250, 12), 480 * 832, (320, 240, 9)),
])  # fmt: skip
def test_source_video_of_vace(source, area, expected):
    assert size_vace(*source, area) == expected


@settings(max_examples=200, deadline=None)
@given(sides, sides, st.integers(1, 300), areas)
def test_any_source_video(width, height, frames, area):
    assume(1 / 8 < width / height < 8)
    w, h, t = size_vace(width, height, frames, area)
    assert w % 16 == h % 16 == 0
    assert (t - 1) % 4 == 0
    assert t <= frames
    assert w * h <= area
    assert w * h // 256 * ((t - 1) // 4 + 1) <= 21 * area // 256


@pytest.mark.parametrize("rule", [size_i2v, size_ti2v, lambda w, h, a: size_vace(w, h, 5, a)])
@pytest.mark.parametrize("size", [(4000, 2), (2, 4000), (0, 10), (10, -1)])
def test_no_size(rule, size):
    with pytest.raises(RequestError, match=f"picture of {size[0]}x{size[1]}"):
        rule(*size, 64 * 64)
