"""What a run's folder, a cache and an index name outside of themselves is neither written, read nor removed; pictures
and templates are read because a person names them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

import ditkit
from ditkit import media
from ditkit.checkpoints.model.place import files_at, place_of
from ditkit.errors import LoadError, OutputError, SetupError, StateError
from ditkit.runs import Run
from ditkit.state import State
from ditkit.store.cache import LAYOUT, Cache
from ditkit.trust import is_away

PROMPT = "a red circle"
BEGUN = ("--stop-at-step", 1, "--quiet")


def edited(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def sent(folder: Path) -> Path:
    """``folder`` as somebody else would have it: a copy."""
    shutil.copytree(folder, copy := folder.with_name("sent"))
    return copy


@pytest.fixture
def mine(tmp_path) -> Path:
    """Files of this user; nothing of them changes."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("holiday.mp4", "photo.png", "weights.safetensors", "run-000001.safetensors", ".x.tmp"):
        (folder / name).write_bytes(b"mine")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    yield folder
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


# --- where results go


@pytest.mark.parametrize(
    ("key", "name"), [("out", "holiday.mp4"), ("sheet", "photo.png"), ("out", "../mine/holiday.mp4")]
)
def test_a_run_that_was_sent_writes_into_its_folder_alone(call, model, mine, tmp_path, key, name):
    assert call("run", PROMPT, "--model", model, "--run", "a", *BEGUN, "--no-sheet").code == 0
    run = sent(tmp_path / "runs/a")
    edited(run / "run.json", **{key: str(mine / name)})
    said = call("run", "--resume", "sent", "--quiet")
    assert (said.code, said.err.count("\n")) == (2, 1)
    found = f"it names {mine / name} for --{key}, and a file does not decide where anything goes. Name it yourself"
    assert f"{found} if it is meant: --{key} {mine / name}; or --allow-from-file out if the file is yours" in said.err
    assert call("run", "--resume", "sent", "--quiet", f"--{key}", tmp_path / f"b{Path(name).suffix}").code == 0


def test_a_link_leads_no_result_out(call, model, mine, tmp_path):
    assert call("run", PROMPT, "--model", model, "--run", "a", *BEGUN).code == 0
    run = sent(tmp_path / "runs/a")
    (run / "inner").symlink_to(mine)
    edited(run / "run.json", out=str(run / "inner" / "holiday.mp4"))
    assert "a file does not decide where anything goes" in call("run", "--resume", "sent").err
    (run / "clip.mp4").symlink_to(mine / "holiday.mp4")
    edited(run / "run.json", out=None)
    assert call("run", "--resume", "sent", "--quiet").code == 0
    assert not (run / "clip.mp4").is_symlink()


def test_a_run_of_ones_own_goes_where_it_was_told(call, model, tmp_path):
    words = ["--model", model, "--run", "a", "--out", "far/a.npz", "--sheet", "far/s.png", *BEGUN]
    assert call("run", PROMPT, *words).code == 0
    (tmp_path / "runs/a").rename(tmp_path / "runs/b")
    assert call("run", "--resume", "b", "--quiet").out.split() == [
        str(tmp_path / "far/a.npz"),
        str(tmp_path / "far/s.png"),
    ]
    sent(tmp_path / "runs/b")
    assert call("run", "--resume", "sent", "--quiet").code == 2
    assert call("run", "--resume", "sent", "--quiet", "--allow-from-file", "out").code == 0


# --- links in a run's folder


@pytest.mark.parametrize("name", ["states", "run.json", "lock", ".here"])
def test_a_part_of_a_run_that_is_a_link(call, model, mine, tmp_path, name):
    assert call("run", PROMPT, "--model", model, "--run", "a", *BEGUN).code == 0
    part, elsewhere = tmp_path / "runs/a" / name, tmp_path / "elsewhere"
    shutil.move(part, elsewhere) if part.exists() else elsewhere.write_bytes(b"")
    before = sorted(elsewhere.iterdir()) if elsewhere.is_dir() else elsewhere.read_bytes()
    part.symlink_to(elsewhere)
    for said in (call("run", "--resume", "a"), call("fork", "a"), call("run", PROMPT, "--model", model, "--run", "a")):
        assert said.code == 2
        assert said.err.count("\n") == 1
    assert f"its {name} is a link, which may lead anywhere" in call("run", "--resume", "a").err
    assert (sorted(elsewhere.iterdir()) if elsewhere.is_dir() else elsewhere.read_bytes()) == before


def test_links_among_the_states_are_passed_over(call, model, mine, tmp_path):
    assert call("run", PROMPT, "--model", model, "--run", "a", *BEGUN).code == 0
    states = tmp_path / "runs/a/states"
    (states / "run-999999.safetensors").symlink_to(mine / "weights.safetensors")
    (states / ".run-1.tmp").symlink_to(mine)
    (states.parent / ".ditkit-1.part").symlink_to(mine)
    assert call("run", "--resume", "a", "--quiet").code == 0
    assert [len(list(mine.iterdir())), (states.parent / ".ditkit-1.part").is_symlink()] == [5, False]


def test_a_link_with_the_name_of_a_temporary_file(mine, tmp_path):
    for name in (f".a.safetensors.{os.getpid()}.tmp", ".a.safetensors.tmp"):
        (tmp_path / name).symlink_to(mine / "weights.safetensors")
    State({"x": 1}).save(tmp_path / "a.safetensors", durable=True)
    assert State.load(tmp_path / "a.safetensors")["x"] == 1


# --- caches, frames, indexes


def test_a_cache_with_a_link_removes_nothing(mine, tmp_path):
    file = mine / "weights.safetensors"
    links = {"": mine, "results": mine, "index.sqlite": file, "hashes.sqlite": file}
    for number, (name, place) in enumerate(links.items()):
        folder = tmp_path / f"cache{number}"
        (folder / LAYOUT / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / LAYOUT / name).symlink_to(place)
        with pytest.raises(SetupError, match="is a link, which may lead anywhere"):
            Cache(folder, 10**9)


def test_a_folder_of_frames_that_is_a_link(tmp_path):
    frames = tmp_path / "frames"
    media.write_video(tmp_path / "old.png", np.zeros((2, 16, 16, 3), np.uint8), 8)
    (tmp_path / "old").rename(frames)
    (tmp_path / "old").symlink_to(frames)
    media.write_video(tmp_path / "old.png", np.ones((3, 16, 16, 3), np.uint8), 8)
    assert [len(list(folder.iterdir())) for folder in (frames, tmp_path / "old")] == [2, 3]
    assert not (tmp_path / "old").is_symlink()
    assert not list(tmp_path.glob(".ditkit*"))
    (frames / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="it holds other files"):
        media.write_video(tmp_path / "frames.png", np.ones((3, 16, 16, 3), np.uint8), 8)


@pytest.mark.parametrize("name", ["../mine/weights.safetensors", "/etc/passwd"])
def test_an_index_names_no_file_elsewhere(mine, tmp_path, name):
    folder = tmp_path / "part"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(LoadError, match="Use an index whose shards"):
        files_at(place_of("vae", str(index)), index)
    with pytest.raises(LoadError, match=r"shards are \.safetensors files beside it"):
        ditkit.load(str(folder))


# --- pictures, templates and places with an odd spelling


@pytest.mark.slow
def test_a_fork_reads_no_picture_because_its_parent_names_it(call, tmp_path):
    folder = tiny.write(tmp_path / "i2v", "i2v")
    (folder / "ditkit.toml").write_text("[defaults]\nwidth = 32\nheight = 32\nframes = 5\nsteps = 2\n")
    Image.new("RGB", (64, 64), (10, 30, 30)).save("mine.png")
    words = ["--model", folder, "--image", "mine.png", "--no-sheet"]
    assert call("run", PROMPT, *words, "--run", "a", *BEGUN).code == 0
    Path("mine.png").rename("moved.png")
    assert call("fork", "a", "--run", "b", "--set", "guidance_scale=2", "--quiet").code == 0  # its pixels are kept
    run, state = tmp_path / "runs/a", Run.open("a").state()
    about = json.loads((run / "run.json").read_text())
    edited(run / "run.json", request={**about["request"], "image": str(tmp_path / "moved.png")})
    for file in (run / "states").iterdir():
        state.without("image").save(file)
    said = call("fork", "a", "--run", "c", "--quiet")
    assert (said.code, f"it names {tmp_path / 'moved.png'} for --image" in said.err) == (2, True)
    assert not Path("runs/c").exists()
    assert "for --image" not in call("fork", "a", "--run", "c", "--quiet", "--allow-from-file", "pictures").err
    assert "for --image" not in call("fork", "a", "--run", "d", "--quiet", "--image", "moved.png").err


def test_references_in_another_size_are_named_again(tmp_path):
    folder, picture = tiny.write(tmp_path / "vace", "vace"), tmp_path / "r.png"
    Image.new("RGB", (40, 24), (10, 30, 30)).save(picture)
    pipe = ditkit.load(folder, threads=1)
    small = {"width": 32, "height": 32, "frames": 5, "steps": 2}
    run = Run.create(tmp_path / "a", pipe, PROMPT, reference_images=[str(picture)], **small)
    picture.rename(tmp_path / "s.png")
    run.fork(tmp_path / "b", seed=4)
    with pytest.raises(StateError, match=r"for --reference-images, and a file does not decide where anything goes"):
        run.fork(tmp_path / "c", width=64)
    run.fork(tmp_path / "c", width=64, reference_images=[str(tmp_path / "s.png")])


def test_no_template_is_read_because_a_file_names_it(call, model, tmp_path):
    Path("private.toml").write_text("secret = 1\n")
    words = ["--model", model, "--run", "a", "--out", "a.npz", "--no-sheet", "--steps", 1, "--quiet"]
    assert call("run", PROMPT, *words).code == 0
    about = json.loads(Path("runs/a/run.json").read_text())
    edited(tmp_path / "runs/a/run.json", request={**about["request"], "expand_template": "private.toml"})
    assert "expand_template private.toml is a file, and a file does not decide" in call("fork", "a").err
    card = json.loads(Path("a.json").read_text())
    card["manifest"]["request"]["expand_template"] = str(tmp_path / "private.toml")
    Path("a.json").write_text(json.dumps(card))
    said = call("replay", "a.json")
    assert (said.code, "is a file, and a file does not decide what is read" in said.err) == (2, True)


def test_places_of_odd_spelling():
    for away in (
        "hf:a/b",
        "transformer=hf:a/b",
        "both=hf:a/b:0.5",
        "HTTP://x",
        "\\\\server\\share",
        "transformer=//s/x",
    ):
        assert is_away(away), away
    for here in ("a.safetensors", "transformer=a.safetensors:0.5", "/abs/hf", "process:cuda:1", "chf:a"):
        assert not is_away(here), here


@pytest.mark.slow
def test_a_model_that_a_file_names_downloads_nothing(call, model, tmp_path, monkeypatch):
    """The model lies beside what was sent, and its parts are said to lie in a repository."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    shutil.copytree(model, "m")
    words = ["--model", "m", "--quiet", "--no-sheet", "--steps", 1]
    begun = ["--save-state", "s.safetensors", "--out", "a.npz"]
    assert call("run", PROMPT, *words, *begun, "--run", "a").code == 0
    (tmp_path / "m" / "ditkit.toml").write_text('[components]\nvae = "hf:stranger/model/vae@main"\n')
    found = f"its model {tmp_path / 'm'} names hf:stranger/model/vae@main, and a file does not decide what is"
    for command in (["run", "--resume", "a"], ["fork", "a"], ["run", "--from", "s.safetensors"], ["replay", "a.npz"]):
        said = call(*command)
        assert (said.code, f"{found} downloaded. Name it yourself if it is meant: --model " in said.err) == (2, True)
        assert found not in call(*command, "--model", "m").err
        assert found not in call(*command, "--allow-from-file", "model").err
    with pytest.raises(StateError, match="does not decide what is downloaded"):
        Run.open("a").go()
