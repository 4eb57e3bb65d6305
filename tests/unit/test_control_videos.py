"""Which frames of a control video and its mask a run takes, what it says of that, and how far it reads."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from test_clips import RATE, animate, encode, greys, turned

import ditkit
from ditkit import media, pictures
from ditkit.cli.main import main
from ditkit.errors import DitkitError, RequestError, StateError
from ditkit.media import read_manifest
from ditkit.request import Request
from ditkit.state import State


def at(path: Path, count: int, fps: float) -> Path:
    """An mp4 of ``greys``, and nothing but greys: each frame tells its number."""
    return media.write_video(path, greys(count), fps)


def asked(frames: int, **given: object) -> Request:
    given = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    return Request(frames=frames, **given)


def numbers(video: np.ndarray) -> list[int]:
    return [round((float(frame.mean()) - 20) / 10) for frame in video]


def taken(frames: int, told: dict[str, str] | None = None, **given: object) -> list[int]:
    return numbers(pictures.read(asked(frames, **given), {}, told)["control_video"])


@pytest.mark.parametrize(
    ("fps", "run", "expected"),
    [
        (30, 16, [0, 2, 3, 5, 7, 9, 11, 13, 15]),
        (24, 16, [0, 1, 3, 4, 6, 7, 9, 10, 12]),
        (32, 16, [0, 2, 4, 6, 8, 10, 12, 14, 16]),
        (8, 16, [0, 0, 1, 1, 2, 2, 3, 3, 4]),
        (16, 24, [0, 0, 1, 2, 2, 3, 4, 4, 5]),
        (16, 16, [*range(9)]),
        (24000 / 1001, 24, [*range(9)]),
    ],
)
def test_the_frames_that_are_on_screen(tmp_path, fps, run, expected):
    path = at(tmp_path / "a.mp4", expected[-1] + 1, fps)
    told: dict[str, str] = {}
    assert taken(9, told, control_video=path, fps=run, control_timing="time") == expected
    assert bool(told) == (expected != [*range(9)])
    if told:
        assert "a.mp4 has" in told["control_video"]
        assert f"those on screen at {run} a second (0, {expected[1]}, {expected[2]}" in told["control_video"]


def test_equal_rates_change_no_bit_in_any_container(tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (21, 32, 48, 3), np.uint8)
    for name, codec in {"a.mkv": "ffv1", "a.webm": "libvpx-vp9", "a.mov": "libx264", "a.avi": "ffv1"}.items():
        path = encode(tmp_path / name, video, codec)
        whole, _ = media.read_video(path)
        for timing in ("auto", "time", "frames"):
            found = pictures.read(asked(21, control_video=path, control_timing=timing), {}, told := {})
            np.testing.assert_array_equal(found["control_video"], whole)
            assert told == {}


def test_frames_of_no_even_rate(tmp_path):
    times = [0, 40, 500, 530, 560, 600]
    path = encode(tmp_path / "a.mkv", greys(6), "libvpx-vp9", times)
    assert taken(9, control_video=path) == [0, 1, 1, 1, 1, 1, 1, 1, 2]
    first, *rest = map(Image.fromarray, greys(3))
    first.save(tmp_path / "b.gif", save_all=True, append_images=rest, duration=[250, 60, 190])
    assert taken(5, control_video=tmp_path / "b.gif") == [0, 0, 0, 0, 1]


def test_as_many_frames_as_the_run_makes_are_those_that_are_meant(tmp_path):
    path, told = at(tmp_path / "a.mp4", 9, 30), {}
    assert taken(9, told, control_video=path) == [*range(9)]
    assert "has 30 frames a second, and all are taken one by one: they play slower, at 16" in told["control_video"]
    with pytest.raises(RequestError, match=r"At 16 a second a\.mp4 gives 5: ask for 5 frames"):
        taken(9, control_video=path, control_timing="time")
    assert taken(9, control_video=at(tmp_path / "b.mp4", 9, 8)) == [*range(9)]
    with pytest.raises(
        RequestError, match=r"9 frames: the run makes 5\. Cut a.mp4 to what the run makes, or ask for 9"
    ):
        taken(5, control_video=path, control_timing="frames")


def test_a_mask_of_another_rate_than_its_control(tmp_path):
    control, mask = at(tmp_path / "a.mp4", 17, 30), at(tmp_path / "m.mp4", 5, 8)
    found = pictures.read(asked(9, control_video=control, control_mask=mask), {}, told := {})
    assert numbers(found["control_video"]) == [0, 2, 3, 5, 7, 9, 11, 13, 15]
    assert numbers(found["control_mask"] * 255) == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert found["control_mask"].dtype == np.float32
    assert {*told} == {"control_video", "control_mask"}
    for kind in ("gif", "webp", "png"):
        Image.fromarray(greys(1)[0]).save(tmp_path / "still", kind)
        still = pictures.read(asked(9, control_video=control, control_mask=tmp_path / "still"), {})["control_mask"]
        assert still.shape == (1, 32, 48)
        path = animate(tmp_path / "moving", greys(9), kind, 1000 / RATE)
        moving = pictures.read(asked(9, control_video=control, control_mask=path), {})["control_mask"]
        assert numbers(moving * 255) == [*range(9)]


@pytest.mark.parametrize(
    ("count", "frames", "do"),
    [
        (5, 9, "Ask for 5 frames"), (7, 9, "Ask for 5 frames"), (3, 9, "Ask for 1 frames"),
        (21, 9, "Cut a.mp4 to what the run makes, or ask for 21 frames"),
        (23, 9, "Cut a.mp4 to what the run makes, or ask for 21 frames"),
    ],
)  # fmt: skip
def test_the_advice_names_a_number_that_works(tmp_path, count, frames, do):
    path = at(tmp_path / "a.mp4", count, RATE)
    with pytest.raises(RequestError, match=f"control_video of {count} frames: the run makes {frames}. {do}"):
        taken(frames, control_video=path)
    usable = count - (count - 1) % 4
    assert taken(usable, told := {}, control_video=path) == [*range(usable)]
    assert bool(told) == (usable < count)
    with pytest.raises(RequestError, match=f"the run makes {frames}"):
        pictures.check_control({"control_video": count}, frames)


def test_no_more_is_decoded_than_is_needed(tmp_path):
    """What comes later in the file is damaged."""
    import av

    path = encode(tmp_path / "a.mkv", np.random.default_rng(0).integers(0, 256, (40, 32, 48, 3), np.uint8), "ffv1")
    with av.open(path) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    data = path.read_bytes()
    for first, told in ((10, nullcontext()), (5, pytest.raises(StateError, match="damaged"))):
        broken = data
        for packet in packets[first:]:
            broken = broken.replace(packet, bytes(x ^ 0xFF for x in packet))
        path.write_bytes(broken)
        with pytest.raises(RequestError, match="40 frames: the run makes 9"):
            pictures.read(asked(9, control_video=path), {})
        with told, media.open_clip(path) as clip:
            assert clip.count == 40
            assert clip.take(9, RATE)[1] == [*range(9)]


def test_a_phone_video_as_control_and_mask(tmp_path):
    """Held upright: stored lying, and shown turned to the right."""
    lying = np.zeros((5, 32, 48, 3), np.uint8)
    lying[:, :, :24] = 255
    path = turned(media.write_video(tmp_path / "a.mp4", lying, RATE), 0, 1 << 16, -1 << 16, 0)
    found = pictures.read(asked(5, control_video=path, control_mask=path), {})
    assert found["control_video"].shape == (5, 48, 32, 3)
    assert found["control_video"][:, :20].min() > 250 > 5 > found["control_video"][:, 28:].max()
    assert found["control_mask"][:, :20].min() > 0.98 > 0.02 > found["control_mask"][:, 28:].max()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("m") / "vace", "vace")


SMALL = {"frames": 5, "width": 32, "height": 32, "steps": 1}


@pytest.mark.slow
def test_what_was_taken_is_said_and_stands_in_clip_and_receipt(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    at(tmp_path / "c.mp4", 9, 30)
    words = [f"--{name}={value}" for name, value in SMALL.items()]
    words = ["a", "--model", str(model), *words, "--control-video", "c.mp4"]
    assert main(["generate", *words, "--no-sheet", "--quiet", "--out", "a.npz"]) == 0
    said = capsys.readouterr().err
    assert "note: c.mp4 has 9 frames, 30 a second: taken are those on screen at 16 a second (0, 2, 3, 5, 7)" in said
    assert read_manifest("a.npz")["pictures"] == {"control_video": said.strip().removeprefix("note: ")}
    assert main(["plan", *words]) == 0
    assert "those on screen" in capsys.readouterr().out
    told = []
    pipe = ditkit.load(model)
    state = pipe.begin(pipe.request({"prompt": "a", "control_video": str(tmp_path / "c.mp4"), **SMALL}))
    state.save(tmp_path / "s.safetensors")
    half = pipe.run(State.load(tmp_path / "s.safetensors"), until="encode_control", listeners=[told.append])
    assert [event["field"] for event in told if event.name == "picture.note"] == ["control_video"]
    assert half.receipt["pictures"] == read_manifest("a.npz")["pictures"]
    assert main(["replay", "a.npz", "--picture", "control_video=c.mp4"]) == 0


def test_timing_is_nothing_to_ask_of_a_model_without_control():
    with pytest.raises(DitkitError, match="control_timing: its model takes no control"):
        ditkit.load("shapes")("a red circle", control_timing="time")
