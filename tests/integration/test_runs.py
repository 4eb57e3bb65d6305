"""Runs in folders: kept, gone on with, forked, listed, from the command line and from Python; always the same bits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

import ditkit
from ditkit import media
from ditkit.cli import show
from ditkit.errors import PlaceError, RequestError, StateError
from ditkit.execution.place import Interrupted
from ditkit.runs import Run, listed
from ditkit.state import State

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return ditkit.load(tiny_model, threads=1)


@pytest.fixture(scope="module")
def whole(pipe):
    return pipe(PROMPT, seed=3)


def same(a, b) -> None:
    assert a.equal(b)
    assert a.fingerprints == b.fingerprints


def press(when):
    """A listener that is Ctrl-C, once."""
    done = []

    def listener(event):
        if not done and when(event):
            done.append(True)
            raise KeyboardInterrupt

    return listener


def after(index: int):
    return lambda event: event.name == "step.end" and event["step"].index == index


def names(run: Run) -> list[str]:
    return sorted(path.name for path in (run.path / "states").iterdir())


# --- keeping and going on


def test_a_run_is_the_run_without_a_folder(pipe, whole, tmp_path):
    run = Run.create(tmp_path / "a", pipe, PROMPT, seed=3)
    assert names(run) == ["run-000001.safetensors"]
    result = run.go()
    same(result.state, whole.state)
    assert result.manifests[0]["output_sha256"] == whole.manifests[0]["output_sha256"]
    assert names(run) == ["run-000007-step-4.safetensors"]  # begun, text, three steps, the loop, the video
    same(State.load(run.path / "states" / names(run)[0]), whole.state)


@pytest.mark.parametrize(
    ("every", "kept"),
    [(1, [None, None, 1, 2, 3, 4, 4]), (2, [None, None, 2, 4, 4]), (9, [None, None, 4, 4])],
)
def test_all_kept_states_stay_where_that_is_asked(pipe, whole, tmp_path, every, kept):
    run = Run.create(tmp_path / "a", pipe, PROMPT, seed=3, every=every, keep_steps="all")
    run.go()
    assert [each.step for each in reversed(run.states.of("run"))] == kept
    for each in run.states.of("run"):
        same(pipe.run(State.load(each.path)).state, whole.state)


@pytest.mark.parametrize("index", [0, 2, 3])
def test_ctrl_c_keeps_the_step_that_was_taken_last(pipe, whole, tmp_path, index):
    run = Run.create(tmp_path / "a", pipe, PROMPT, seed=3, every=50)
    with pytest.raises(ditkit.Interrupted):
        run.go(listeners=[press(after(index))])
    assert run.state()["step"] == index + 1
    same(Run.open(run.path).go().state, whole.state)  # with a model of its own


def test_a_run_stops_where_it_is_told_to(pipe, whole, tmp_path):
    run = Run.create(tmp_path / "a", pipe, PROMPT, seed=3)
    assert run.go(stop_at_step=2).state["step"] == 2
    assert run.go(until="denoise").state["step"] == 4
    same(run.go().state, whole.state)


def test_several_clips_are_kept_each_for_itself(pipe, tmp_path):
    whole = pipe(PROMPT, seed=[1, 2, 3])
    run = Run.create(tmp_path / "a", pipe, PROMPT, seed=[1, 2, 3])
    seen = []
    second = press(lambda e: after(1)(e) and (seen.append(1) or len(seen) == 2))
    with pytest.raises(ditkit.Interrupted):
        run.go(listeners=[second])
    assert names(run) == [
        "clip-0-000005-step-4.safetensors", "clip-1-000002-step-2.safetensors", "run-000002.safetensors",
    ]  # fmt: skip
    steps, clips = [], []

    def count(event):
        steps.extend([1] if event.name == "step.end" else [])
        clips.extend([event["index"]] if event.name == "clip" else [])

    result = run.go(listeners=[count])
    assert (len(steps), clips) == (2 + 4, [0, 1, 2])
    same(result.state, whole.state)
    assert [m["output_sha256"] for m in result.manifests] == [m["output_sha256"] for m in whole.manifests]
    loaded = []
    again = Run.open(run.path).go(listeners=[lambda e: loaded.append(e) if e.name == "load.start" else None])
    same(again.state, whole.state)
    assert loaded == [], "a finished run needs no weights"


def test_a_batch_is_one_state(pipe, tmp_path):
    whole = pipe(PROMPT, seed=[1, 2], batched=True)
    run = Run.create(tmp_path / "a", pipe, PROMPT, seed=[1, 2], batched=True)
    with pytest.raises(ditkit.Interrupted):
        run.go(listeners=[press(after(1))])
    assert all(name.startswith("run-") for name in names(run))
    same(run.go().state, whole.state)


@pytest.mark.skipif(sys.platform == "win32", reason="kills with a signal")
def test_a_place_that_dies_takes_nothing_with_it(pipe, whole, tmp_path):
    there = ditkit.load(pipe.setup.model, threads=1, placement={"denoise": "process"}, retries=0)
    channel = there.places.remote(there.places.specs[next(iter(there.places.specs))]).channel
    done = []

    def kill(event):
        if after(1)(event) and not done:
            done.append(True)
            os.kill(channel.process_id, signal.SIGKILL)

    run = Run.create(tmp_path / "a", there, PROMPT, seed=3)
    with pytest.raises(PlaceError, match="SIGKILL"):
        run.go(listeners=[kill])
    there.places.close()
    assert 1 <= run.state()["step"] < 4
    same(Run.open(run.path, pipe).go().state, whole.state)  # the rest is made here


# --- what may go wrong


def test_a_second_run_in_the_same_folder_is_refused(pipe, tmp_path):
    Run.create(tmp_path / "a", pipe, PROMPT)
    with pytest.raises(StateError, match="there is one already"):
        Run.create(tmp_path / "a", pipe, PROMPT)


def test_one_process_at_a_time(pipe, tmp_path):
    run = Run.create(tmp_path / "a", pipe, PROMPT)
    with run.held(), pytest.raises(StateError, match="another process does so"):
        Run.open(run.path, pipe).go()
    run.go()


def test_a_damaged_state_gives_way_to_an_older_one_and_that_is_said(pipe, whole, tmp_path):
    run = Run.create(tmp_path / "a", pipe, PROMPT, seed=3, keep_steps="all")
    run.go(stop_at_step=3)
    newest = run.states.of("run")[0].path
    newest.write_bytes(newest.read_bytes()[:-1])
    heard = []
    result = run.go(listeners=[lambda e: heard.append(e) if e.name in ("run.note", "step.start") else None])
    same(result.state, whole.state)
    assert f"{run.states.of('run')[-4].path.name}, takes its place" in heard[0]["text"]
    assert newest.name in heard[0]["text"]
    assert [e["step"].index for e in heard[1:]] == [2, 3]


def test_without_an_older_one_a_damaged_state_is_an_error(pipe, tmp_path):
    run = Run.create(tmp_path / "a", pipe, PROMPT, seed=3)
    run.go(stop_at_step=3)
    newest = run.states.of("run")[0].path
    newest.write_bytes(bytes(newest.stat().st_size))
    with pytest.raises(StateError, match=r"not a complete safetensors file.*Begin it anew"):
        run.go()


def test_a_damaged_clip_begins_again_and_that_is_said(pipe, tmp_path):
    whole = pipe(PROMPT, seed=[1, 2])
    run = Run.create(tmp_path / "a", pipe, PROMPT, seed=[1, 2])
    run.go(stop_at_step=3)
    damaged = run.states.of("clip-1")[0].path
    damaged.write_bytes(b"")
    heard = []
    result = run.go(listeners=[lambda e: heard.append(e["text"]) if e.name == "run.note" else None])
    same(result.state, whole.state)
    assert len(heard) == 1
    assert heard[0].startswith("clip 1 begins again: ")


def test_what_a_killed_process_left_is_swept(pipe, tmp_path):
    run = Run.create(tmp_path / "a", pipe, PROMPT)
    left = [run.path / "states" / ".run-000002.safetensors.77.tmp", run.path / ".run.json.77.tmp",
            run.path / ".ditkit-0123456789ab.part"]  # fmt: skip
    for path in left:
        path.write_bytes(b"half")
    run.go()
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize(
    ("text", "found"),
    [("{", "cannot be read"), ('{"run": 2}', "its version is 2"), ('{"run": 1}', "is damaged at id"), (None, "no run")],
)
def test_a_folder_that_is_no_run_is_told_so(tmp_path, text, found):
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(StateError, match=found):
        Run.open(tmp_path)


# --- forks


@pytest.fixture(scope="module")
def parent(pipe, tmp_path_factory):
    run = Run.create(tmp_path_factory.mktemp("parent") / "a", pipe, PROMPT, seed=3, keep_steps="all")
    run.go()
    return run


@pytest.fixture(scope="module")
def newest_only(pipe, tmp_path_factory):
    run = Run.create(tmp_path_factory.mktemp("parent") / "b", pipe, PROMPT, seed=3)
    run.go()
    return run


class Ran:
    """Which stages a run carried out, and which steps it took."""

    def __init__(self):
        self.stages, self.steps = [], []

    def __call__(self, event):
        if event.name == "stage.start":
            self.stages.append(event["stage"])
        if event.name == "step.start":
            self.steps.append(event["step"].index)


@pytest.mark.parametrize("at_step", [None, 0, 1, 3])
def test_a_fork_that_changes_nothing_is_its_parent(pipe, parent, whole, tmp_path, at_step):
    ran = Ran()
    result = parent.fork(tmp_path / "f", at_step=at_step).go(listeners=[ran])
    same(result.state, whole.state)
    assert ran.steps == list(range(4 if at_step is None else at_step, 4))


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"guidance_scale": 3.0}, ["denoise", "decode_latents"]),
        ({"scheduler": "euler"}, ["denoise", "decode_latents"]),
        ({"steps": 6, "shift": 3.0}, ["denoise", "decode_latents"]),
        ({"seed": 4}, ["denoise", "decode_latents"]),
        ({"prompt": "a blue square"}, ["encode_text", "denoise", "decode_latents"]),
        ({"negative_prompt": "green"}, ["encode_text", "denoise", "decode_latents"]),
        ({"guidance_scale": 1.0}, ["encode_text", "denoise", "decode_latents"]),
        ({"rounding": "diffusers"}, ["decode_latents"]),
        ({"fps": 4}, []),
    ],
)
def test_a_fork_makes_anew_what_its_changes_touch_and_no_more(pipe, parent, tmp_path, changes, stages):
    ran = Ran()
    run = parent.fork(tmp_path / "f", **changes)
    result = run.go(listeners=[ran])
    assert ran.stages == stages
    same(result.state, pipe(**{"prompt": PROMPT, "seed": 3, **changes}).state)
    above = run.description.parent
    assert above is not None
    assert (above.id, above.step, above.spliced) == (parent.description.id, None, False)
    assert {k: new for k, (_, new) in above.changed.items()} == changes


def spliced(pipe, changes, step):
    """By hand: the parent's steps up to ``step``, the rest with changed settings and text."""
    first = pipe.run(pipe.begin(pipe.model.request({"prompt": PROMPT, "seed": 3})), stop_at_step=step).state
    other = pipe.begin(pipe.model.request({"prompt": PROMPT, "seed": 3, **changes}))
    text = pipe.run(other, until="encode_text").state
    loop = {n: first[n] for n in ("latents", "sigmas", "step", "history")}
    return pipe.run(State({**{n: text[n] for n in text if n != "records"}, **loop})).state


@pytest.mark.parametrize("keeps", ["all", "last"])
@pytest.mark.parametrize(
    "changes", [{"guidance_scale": 3.0}, {"prompt": "a blue square"}, {"negative_prompt": "green"}]
)
@pytest.mark.parametrize("step", [1, 3])
def test_a_fork_goes_on_from_a_step_with_other_settings(
    pipe, parent, newest_only, whole, tmp_path, changes, step, keeps
):
    source = parent if keeps == "all" else newest_only
    said = []
    run = source.fork(tmp_path / "f", at_step=step, tell=said.append, **changes)
    ran = Ran()
    result = run.go(listeners=[ran])
    assert ran.steps == list(range(step, 4))
    assert result.state["latents"].equal(spliced(pipe, changes, step)["latents"])
    assert not result.state["latents"].equal(whole.state["latents"])
    assert result.state.fingerprints["latents"] != whole.state.fingerprints["latents"]
    alone = pipe(**{"prompt": PROMPT, "seed": 3, **changes}).state
    assert result.state.fingerprints["latents"] != alone.fingerprints["latents"]
    assert bool(said) == (keeps == "last"), "steps that are taken again are told of"
    other = (newest_only if keeps == "all" else parent).fork(tmp_path / "g", at_step=step, **changes).go()
    same(result.state, other.state)
    assert result.manifests[0]["fork"]["spliced"] is True


@pytest.mark.parametrize("keep_steps", ["last", "all"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_fork_of_a_fork_keeps_the_steps_of_both(pipe, newest_only, tmp_path, step, keep_steps):
    """The second fork at or before the step of the first one takes the grandparent's steps, after it those of both."""
    child = newest_only.fork(tmp_path / "child", at_step=2, guidance_scale=3.0, keep_steps=keep_steps)
    child.go()
    grandchild = child.fork(tmp_path / "grandchild", at_step=step, guidance_scale=6.0).go().state
    start = pipe.run(pipe.begin(pipe.model.request({"prompt": PROMPT, "seed": 3})), stop_at_step=min(step, 2)).state
    for end, scale in ([(step, 3.0)] if step > 2 else []) + [(4, 6.0)]:
        asked = pipe.model.request({"prompt": PROMPT, "seed": 3, "guidance_scale": scale}).model_dump()
        start = pipe.run(start.with_fields({"request": asked}), stop_at_step=end).state
    assert grandchild["latents"].equal(start["latents"])


def test_a_fork_of_a_half_finished_run(pipe, tmp_path):
    half = Run.create(tmp_path / "half", pipe, PROMPT, seed=3)
    half.go(stop_at_step=2)
    ran = Ran()
    same(half.fork(tmp_path / "same").go(listeners=[ran]).state, pipe(PROMPT, seed=3).state)
    assert ran.steps == [2, 3]
    same(half.fork(tmp_path / "b", guidance_scale=3.0).go().state, pipe(PROMPT, seed=3, guidance_scale=3.0).state)
    further = half.fork(tmp_path / "c", at_step=3, guidance_scale=3.0).go().state
    assert further["latents"].equal(spliced(pipe, {"guidance_scale": 3.0}, 3)["latents"])


def test_a_fork_of_one_clip_of_a_batch_says_that_its_request_alone_does_not_make_it_again(pipe, tmp_path):
    run = Run.create(tmp_path / "a", pipe, PROMPT, seed=[1, 2], batched=True)
    made = run.go()
    fork = run.fork(tmp_path / "b", clip=1).go()  # another rounding than a clip alone
    assert fork.manifests[0]["fork"]["spliced"]
    assert np.array_equal(fork.video, made.videos[1])


def test_ctrl_c_while_a_state_is_written_loses_nothing(pipe, tmp_path, monkeypatch):
    run, save, done = Run.create(tmp_path / "a", pipe, PROMPT, seed=3, every=100), State.save, []

    def stopped(state, *args, **options):
        if state.get("step") == 4 and not done:
            done.append(True)
            raise KeyboardInterrupt
        return save(state, *args, **options)

    monkeypatch.setattr(State, "save", stopped)
    with pytest.raises(Interrupted):
        run.go()
    assert run.state()["step"] == 4  # all of the denoising


@pytest.mark.parametrize("index", [0, 1])
def test_ctrl_c_between_two_clips_loses_nothing(pipe, tmp_path, index):
    whole = pipe(PROMPT, seed=[1, 2])
    run = Run.create(tmp_path / "a", pipe, PROMPT, seed=[1, 2])
    with pytest.raises(Interrupted) as e:
        run.go(listeners=[press(lambda e: e.name == "clip" and e["index"] == index)])
    assert (len(e.value.finished), e.value.clip) == (index, index)
    ran = Ran()
    same(run.go(listeners=[ran]).state, whole.state)
    assert ran.stages.count("denoise") == 2 - index


@pytest.mark.parametrize("batched", [False, True])
def test_a_fork_of_one_of_several_clips(pipe, tmp_path, batched):
    run = Run.create(tmp_path / "a", pipe, [PROMPT, "a blue square"], seed=[1, 2], batched=batched)
    made = run.go()
    with pytest.raises(RequestError, match=r"Say which: --clip 0 to 1"):
        run.fork(tmp_path / "b")
    with pytest.raises(RequestError, match="clip 2"):
        run.fork(tmp_path / "b", clip=2)
    ran = Ran()
    kept = run.fork(tmp_path / "b", clip=1).go(listeners=[ran])
    assert ran.stages == []
    np.testing.assert_array_equal(kept.video, made.videos[1])
    other = run.fork(tmp_path / "c", clip=1, guidance_scale=3.0).go(listeners=[ran])
    assert ran.stages == ["denoise", "decode_latents"]
    alone = pipe("a blue square", seed=2, guidance_scale=3.0)
    np.testing.assert_array_equal(other.video, alone.video)
    step = run.fork(tmp_path / "d", clip=1, at_step=2).go().state
    assert (step["latents"] - made.state["latents"][1:]).abs().max() <= (1e-4 if batched else 0)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"steps": 6}, "other noise levels"),
        ({"shift": 2.0}, "other noise levels"),
        ({"scheduler": "euler"}, "remembers steps of another one"),
        ({"width": 64}, "another size"),
        ({"seed": 9}, "draws no noise after the beginning"),
    ],
)
def test_what_cannot_change_in_the_middle_is_refused(parent, tmp_path, changes, found):
    with pytest.raises(StateError, match=f"{found}.*Fork at step 0"):
        parent.fork(tmp_path / "f", at_step=2, **changes)
    assert not (tmp_path / "f").exists()
    parent.fork(tmp_path / "f", at_step=0, **changes)


@pytest.mark.parametrize("step", [-1, 4])
def test_a_step_that_is_none_is_refused(parent, tmp_path, step):
    with pytest.raises(RequestError, match=r"it takes 4 steps.*from 0 to 3"):
        parent.fork(tmp_path / "f", at_step=step)


def test_other_weights_are_no_part_of_a_loop_and_make_anew_what_they_are_in(parent, tmp_path):
    other = ditkit.load(parent.pipe.setup.model, threads=1, dtypes={"transformer": "float64"})
    with pytest.raises(StateError, match="taken with another transformer"):
        parent.fork(tmp_path / "f", at_step=2, pipe=other)
    ran = Ran()
    result = parent.fork(tmp_path / "f", pipe=other).go(listeners=[ran])
    assert ran.stages == ["denoise", "decode_latents"]
    same(result.state, other(PROMPT, seed=3).state)


# --- pictures


@pytest.fixture(scope="module")
def image_pipe(tmp_path_factory):
    import tiny

    folder = tiny.write(tmp_path_factory.mktemp("i2v") / "model", "i2v")
    sizes = 'width = 32\nheight = 32\nframes = 5\nsteps = 3\nsize_from = "request"\n'
    (folder / "ditkit.toml").write_text(f"[defaults]\n{sizes}")
    return ditkit.load(folder, threads=1)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 48, 3), np.uint8)


def test_pictures_of_a_fork(image_pipe, tmp_path):
    run = Run.create(tmp_path / "a", image_pipe, PROMPT, seed=3, image=picture(1))
    made = run.go().state
    ran = Ran()
    other = run.fork(tmp_path / "b", prompt="a blue square").go(listeners=[ran]).state
    assert "encode_condition" not in ran.stages, "what comes from the picture alone is kept"
    assert ran.stages[0] == "encode_text"
    expected = image_pipe("a blue square", seed=3, image=picture(1)).state
    assert sorted(other["stages"]) == sorted(expected["stages"])
    same(other.without("stages"), expected.without("stages"))  # the kept ones ran before the text was encoded anew
    anew = run.fork(tmp_path / "c", image=picture(2)).go().state
    same(anew, image_pipe(PROMPT, seed=3, image=picture(2)).state)
    middle = run.fork(tmp_path / "d", at_step=1, image=picture(2)).go().state
    assert not middle["latents"].equal(made["latents"])
    assert not middle["latents"].equal(anew["latents"])
    same(run.fork(tmp_path / "e", at_step=1).go().state, made)


def test_a_picture_file_that_is_gone_is_in_the_state(image_pipe, tmp_path):
    from PIL import Image

    Image.fromarray(picture(1)).save(tmp_path / "p.png")
    run = Run.create(tmp_path / "a", image_pipe, PROMPT, image=tmp_path / "p.png")
    run.go()
    (tmp_path / "p.png").unlink()
    forked = run.fork(tmp_path / "b", guidance_scale=2.0).go().state
    assert forked["image"].equal(run.state()["image"])


# --- the command line


def out(said) -> dict:
    assert said.code == 0, said.err
    return json.loads(said.out)


def test_run_resume_fork_and_list(call, model, tmp_path, monkeypatch):
    words = ["--model", model, "--seed", "3", "--no-sheet"]
    whole = out(call("generate", PROMPT, *words, "--out", "whole.npz", "--json"))
    monkeypatch.setattr(show, "warn_of_truncation", press(after(1)))
    said = call("run", PROMPT, *words, "--run", "first", "--out", "a.npz", "--keep-steps", "all", "--quiet")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert said.code == 130
    assert said.err.endswith("everything until then is kept in first. Resume with:\n  ditkit run --resume first\n")
    listing = call("runs")
    assert "step 2 of 4" in listing.out
    resumed = out(call("run", "--resume", "first", "--json"))
    assert resumed["output_sha256"] == whole["output_sha256"]
    assert resumed["clips"] == [str(tmp_path / "a.npz")]
    assert resumed["sheets"] == []
    assert len(resumed["steps"]) == 2
    again = out(call("run", "--resume", "first", "--out", "b.npz", "--json"))
    assert (again["clips"], again["steps"]) == (["b.npz"], [])
    forked = out(call("fork", "first", "--at-step", "2", "--set", "guidance_scale=3", "--run", "second", "--json"))
    assert forked["clips"] == [str(tmp_path / "runs/second/clip.mp4")]
    assert len(forked["steps"]) == 2
    assert forked["output_sha256"] != whole["output_sha256"]
    said = call("fork", "second", "--prompt", "a blue square")
    assert said.code == 0, said.err
    assert 'prompt "a red circle" -> "a blue square"' in said.out
    lines = call("runs").out.splitlines()
    assert [line.split("  done")[0].rstrip() for line in lines[1:]] == ["first", "└ second", "  └ second-1"]
    assert "@2 guidance_scale=3.0" in lines[2]
    told = json.loads(call("runs", "--json").out)
    assert [(each["depth"], each["progress"]) for each in told] == [(0, "done"), (1, "done"), (2, "done")]
    assert told[1]["parent"]["changed"] == {"guidance_scale": [told[0]["request"]["guidance_scale"], 3.0]}


def test_what_the_request_alone_does_not_make_is_not_replayed(call, model):
    assert call("run", PROMPT, "--model", model, "--run", "a", "--quiet").code == 0
    words = ["--set", "guidance_scale=3", "--quiet", "--no-sheet"]
    assert call("fork", "a", "--at-step", "2", "--run", "middle", *words, "--out", "m.npz").code == 0
    assert call("fork", "a", "--run", "anew", *words, "--out", "n.npz").code == 0
    assert (
        call("fork", "middle", "--run", "colder", "--set", "rounding=diffusers", *words[2:], "--out", "c.npz").code == 0
    )
    for name in ("m.npz", "c.npz"):
        said = call("replay", name)
        assert said.code == 2
        assert "its first steps were taken with other settings" in said.err
    assert call("replay", "n.npz").code == 0


def test_setup_may_be_given_anew_and_is_remembered(call, model, tmp_path):
    assert call("run", PROMPT, "--model", model, "--run", "a", "--stop-at-step", "2", "--no-cache-text-kv",
                "--quiet").code == 0  # fmt: skip
    assert call("run", "--resume", "a", "--vae-frames-per-chunk", "2", "--out", "x.npz", "--quiet").code == 0
    setup = media.read_manifest(Path("x.npz"))["setup"]
    assert (setup["cache_text_kv"], setup["vae_frames_per_chunk"], setup["model"]) == (False, 2, str(model))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--resume", "a", "--steps", "9"], "--steps with --resume a: a run goes on with the request"),
        (["run", PROMPT, "--resume", "a"], "PROMPT with --resume a"),
        (["run", "--resume", "a", "--run", "b"], "--run b with --resume a: each says where"),
        (["run", "--resume", "nothing"], "there is no run.json"),
        (["run", PROMPT, "--every", "2"], "--every 2: it says what a new run keeps"),
        (["run", PROMPT, "--run", "b", "--every", "0"], "every 0 steps: that is never"),
        (["run", PROMPT, "--run", "b", "--keep-steps", "some"], "keep_steps='some'"),
        (["run", PROMPT, "--run", "b", "--start", "denoise"], "--start denoise: there is no State"),
        (["run", PROMPT, "--run", "a"], "there is one already"),
        (["run", PROMPT, "--run", "b", "--out", "x.txt"], "x.txt"),
        (["fork", "a", "--at-step", "9"], "it takes 4 steps"),
        (["fork", "a", "--run", "a"], "there is one already"),
        (["runs", "nowhere"], "there is no such folder"),
    ],
)  # fmt: skip
def test_mistakes(call, model, words, message):
    assert call("run", PROMPT, "--model", model, "--run", "a", "--until", "encode_text", "--quiet").code == 0
    if words[1] == PROMPT:
        words = [*words, "--model", model]
    said = call(*words)
    assert said.code == 2, said
    assert message in said.err
    assert not Path("runs/b").exists()


def test_settings_of_the_environment_may_not_contradict_a_run(call, model, monkeypatch):
    assert call("run", PROMPT, "--model", model, "--run", "a", "--until", "encode_text", "--quiet").code == 0
    monkeypatch.setenv("DITKIT_STEPS", "9")
    said = call("run", "--resume", "a")
    assert said.code == 2
    assert "steps=9 (environment DITKIT_STEPS) with --resume a: the run was begun with 4" in said.err


def test_a_folder_may_move(call, model, tmp_path):
    assert call("run", PROMPT, "--model", model, "--run", "a", "--stop-at-step", "2", "--quiet").code == 0
    (tmp_path / "runs" / "a").rename(tmp_path / "b")
    assert out(call("run", "--resume", "./b", "--json"))["clips"] == [str(tmp_path / "b" / "clip.mp4")]
    assert [each.progress for each in listed(tmp_path)] == ["done"]


def spoil(folder: Path, text: str | None = None, **changes) -> None:
    known = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(known | changes) if text is None else text)


def test_one_odd_run_does_not_hide_the_others(call, model, tmp_path):
    assert call("run", PROMPT, "--model", model, "--run", "a", "--until", "encode_text", "--quiet").code == 0
    runs = tmp_path / "runs"
    for name in ("copy", "deep", "empty", "prompt", "batched", "name", "states"):
        shutil.copytree(runs / "a", runs / name)
    spoil(runs / "deep", "[" * 100_000 + "]" * 100_000)
    spoil(runs / "empty", request={})
    spoil(runs / "prompt", request={"prompt": [3], "batched": False})
    spoil(runs / "batched", request={"prompt": "a"}, clips=2)
    spoil(runs / "name", model={})
    shutil.rmtree(runs / "states" / "states")
    (runs / "states" / "states").write_text("")
    said = call("runs")
    assert said.code == 0, said
    assert {(each.path.name, each.progress) for each in listed(runs)} == {
        ("a", "begun"), ("copy", "begun"), ("states", "begun"), *((n, "damaged") for n in ("deep", "empty")),
        *((n, "damaged") for n in ("prompt", "batched", "name")),
    }  # fmt: skip


def test_runs_that_are_each_others_forks_are_listed_too(call, model, tmp_path):
    assert call("run", PROMPT, "--model", model, "--run", "a", "--until", "encode_text", "--quiet").code == 0
    runs = tmp_path / "runs"
    parent = {"path": "x", "step": None, "clip": None, "changed": {}, "spliced": False}
    shutil.copytree(runs / "a", runs / "b")
    spoil(runs / "a", id="a", parent={**parent, "id": "b"})
    spoil(runs / "b", id="b", parent={**parent, "id": "a"})
    assert [(each.path.name, each.depth) for each in listed(runs)] == [("a", 0), ("b", 1)]
