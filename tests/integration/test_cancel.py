"""A run that is cancelled by a token ends as on Ctrl-C, wherever its stages are, and goes on bit for bit."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from acting import at_step, same
from hosting import in_thread

import ditkit
from ditkit import samples
from ditkit.events import Event
from ditkit.placement.http.host import Limits
from ditkit.placement.worker import worker_of
from ditkit.runs import Run
from ditkit.setup import Setup

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return ditkit.load(tiny_model, threads=1)


@pytest.fixture(scope="module")
def whole(pipe):
    return pipe(PROMPT, seed=3).state


def elsewhere(act):
    """``act``, carried out by another thread; whoever calls it waits for that."""

    def by_another() -> None:
        thread = threading.Thread(target=act)
        thread.start()
        thread.join()

    return by_another


def when(name: str, act, **values):
    """A listener that acts at the first event of that name with these values."""
    done = []

    def listener(event: Event) -> None:
        if not done and event.name == name and values.items() <= dict(event.values).items():
            done.append(True)
            act()

    return listener


def cancelled(pipe, listener, cancel, **request) -> ditkit.Interrupted:
    with pytest.raises(ditkit.Interrupted) as e:
        pipe(PROMPT, **{"seed": 3, **request}, listeners=[listener], cancel=cancel)
    return e.value


def loads(heard: list[Event]) -> list[str]:
    return [event["component"] for event in heard if event.name == "load.start"]


# --- in this process


@pytest.mark.parametrize("index", [0, 1, 3])
def test_between_steps(pipe, whole, index):
    cancel = ditkit.Cancel()
    stopped = cancelled(pipe, at_step(index, elsewhere(cancel.set)), cancel)
    assert stopped.state["step"] == index + 1
    assert stopped.stage == ("decode_latents" if index == 3 else "denoise")
    assert cancel.is_set()
    assert same(pipe.run(stopped.state).state, whole)
    assert same(pipe.run(stopped.state, cancel=ditkit.Cancel()).state, whole)


@pytest.mark.parametrize(
    ("name", "stage", "there", "absent"),
    [
        ("stage.start", "encode_text", "prompt", "prompt_embeds"),
        ("stage.end", "denoise", "prompt_embeds", "latents"),
        ("frames", "decode_latents", "latents", "video"),
    ],
)
def test_in_and_between_stages(pipe, whole, name, stage, there, absent):
    cancel = ditkit.Cancel()
    stopped = cancelled(pipe, when(name, cancel.set), cancel)
    assert stopped.stage == stage
    assert there in stopped.state
    assert absent not in stopped.state
    assert same(pipe.run(stopped.state).state, whole)


def test_before_it_began_nothing_is_done(tiny_model, whole):
    fresh, cancel, heard = ditkit.load(tiny_model, threads=1), ditkit.Cancel(), []
    cancel.set()
    for part in ({}, {"until": "encode_text"}, {"stop_at_step": 2}):
        state = fresh.begin(fresh.model.request({"prompt": PROMPT, "seed": 3}))
        with pytest.raises(ditkit.Interrupted) as e:
            fresh.run(state, **part, listeners=[heard.append], cancel=cancel)
        assert e.value.state.equal(state)
    assert [event.name for event in heard if event.name.endswith(".start")] == []
    assert same(fresh.run(e.value.state).state, whole)


def test_a_run_with_nothing_left_to_do_ends_well(pipe, whole):
    cancel = ditkit.Cancel()
    cancel.set()
    assert same(pipe.run(whole, cancel=cancel).state, whole)


@pytest.mark.parametrize("component", ["tokenizer", "text_encoder", "transformer"])
def test_while_components_are_loaded(tiny_model, whole, component):
    fresh, cancel, heard = ditkit.load(tiny_model, threads=1), ditkit.Cancel(), []
    act = when("load.start", cancel.set, component=component)
    stopped = cancelled(fresh, lambda event: (heard.append(event), act(event)), cancel)
    assert loads(heard)[-1] == component, "what was being loaded is there, and nothing after it is"
    assert "prompt_embeds" not in stopped.state
    assert same(fresh.run(stopped.state).state, whole)


def test_one_of_two_threads(pipe, whole):
    cancel, other = ditkit.Cancel(), ditkit.Cancel()
    with ThreadPoolExecutor(2) as pool:
        stopping = pool.submit(cancelled, pipe, at_step(1, cancel.set), cancel)
        going = pool.submit(pipe, PROMPT, seed=3, cancel=other)
        assert stopping.result(60).state["step"] == 2
        assert same(going.result(60).state, whole)


# --- several clips


@pytest.fixture(scope="module")
def both(pipe):
    return pipe(PROMPT, seed=[3, 4]).state


@pytest.mark.parametrize(("name", "reached"), [("step.end", 1), ("clip", None)])
def test_of_two_clips_the_finished_one_is_kept(pipe, both, name, reached):
    cancel, clips = ditkit.Cancel(), []

    def listener(event):
        clips.append(event["index"]) if event.name == "clip" else None
        if event.name == name and clips == [0, 1]:
            cancel.set()

    stopped = cancelled(pipe, listener, cancel, seed=[3, 4])
    assert (stopped.clip, len(stopped.finished)) == (1, 1)
    assert stopped.state.get("step") == reached
    expected = samples.split(both)
    assert stopped.finished[0]["video"].equal(expected[0]["video"])
    assert pipe.run(stopped.state).state["video"].equal(expected[1]["video"])


@pytest.mark.parametrize("index", [0, 1])
def test_a_kept_run_goes_on(pipe, both, tmp_path, index):
    run, cancel = Run.create(tmp_path / "run", pipe, PROMPT, seed=[3, 4]), ditkit.Cancel()
    act, clips = at_step(2, cancel.set), []

    def listener(event):
        clips.append(event["index"]) if event.name == "clip" else None
        if clips[-1:] == [index]:
            act(event)

    with pytest.raises(ditkit.Interrupted):
        run.go(listeners=[listener], cancel=cancel)
    assert run.clip_state(index)["step"] == 3
    with pytest.raises(ditkit.Interrupted):
        run.go(cancel=cancel)
    assert same(Run.open(tmp_path / "run", pipe).go().state, both)


def test_while_components_are_loaded_for_clips_that_were_begun(pipe, both, tiny_model, tmp_path):
    """What all clips have in common is not replaced by what one of them has."""
    run, cancel = Run.create(tmp_path / "run", pipe, PROMPT, seed=[3, 4]), ditkit.Cancel()
    run.go(stop_at_step=2)
    fresh = Run.open(tmp_path / "run", ditkit.load(tiny_model, threads=1))
    with pytest.raises(ditkit.Interrupted) as e:
        fresh.go(listeners=[when("load.start", cancel.set, component="transformer")], cancel=cancel)
    assert samples.count(e.value.state) == samples.count(fresh.state()) == 2
    assert same(fresh.go().state, both)


# --- elsewhere


@pytest.fixture(scope="module")
def child(tiny_model):
    pipe = ditkit.load(tiny_model, threads=1, placement={"denoise": "process"})
    yield pipe
    pipe.places.close()


@pytest.mark.parametrize("index", [0, 2])
def test_in_a_child_process(child, whole, index):
    cancel = ditkit.Cancel()
    stopped = cancelled(child, at_step(index, elsewhere(cancel.set)), cancel)
    assert index < stopped.state["step"] <= 4
    assert same(child.run(stopped.state).state, whole)


@pytest.fixture
def held(tiny_model):
    """A host whose first forward pass waits for ``go``."""
    worker, go, begun = worker_of(Setup(model=str(tiny_model))), threading.Event(), threading.Event()
    transformer = worker.components["transformer"]
    inner = transformer.run_blocks

    def run_blocks(blocks, x, ctx):
        begun.set()
        assert go.wait(60)
        return inner(blocks, x, ctx)

    transformer.run_blocks = run_blocks
    with in_thread(worker, limits=Limits(queue=1, alive=0.1)) as host:
        yield host, go, begun
        go.set()


def pipe_at(host, model, **more):
    return ditkit.load(model, threads=1, placement={"denoise": host.url}, **more)


@pytest.mark.parametrize("index", [0, 2])
def test_at_a_host(held, tiny_model, whole, index):
    host, go, _ = held
    go.set()
    pipe, cancel = pipe_at(host, tiny_model), ditkit.Cancel()
    stopped = cancelled(pipe, at_step(index, elsewhere(cancel.set)), cancel)
    assert index < stopped.state["step"] <= 4
    assert same(pipe.run(stopped.state).state, whole)


def test_while_nothing_is_heard_from_a_host(held, tiny_model, whole):
    """The run waits for it in the middle of a step; the job is cancelled there, and its State comes back."""
    host, go, begun = held
    pipe, cancel = pipe_at(host, tiny_model), ditkit.Cancel()
    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(cancelled, pipe, lambda event: None, cancel)
        assert begun.wait(60)
        cancel.set()
        flag = next(iter(host.jobs.flags.values()))
        assert flag.wait(60), "the host was told"
        go.set()
        stopped = stopping.result(60)
    assert stopped.state["step"] == 1
    assert same(pipe.run(stopped.state).state, whole)


def test_a_job_that_waits_for_its_turn_at_a_host(held, tiny_model):
    host, go, begun = held
    pipe, cancel = pipe_at(host, tiny_model), ditkit.Cancel()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(pipe, PROMPT, seed=3)
        assert begun.wait(60)
        second = pool.submit(cancelled, pipe, lambda event: None, cancel, seed=4)
        end = time.monotonic() + 60
        while len(host.jobs.flags) < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
        cancel.set()
        assert "latents" not in second.result(60).state
        go.set()
        assert first.result(60).state["step"] == 4


def test_while_a_lost_host_is_waited_for(tiny_model, monkeypatch):
    from ditkit.errors import Lost

    pipe, cancel = ditkit.load(tiny_model, threads=1, placement={"denoise": "process"}), ditkit.Cancel()
    remote = next(spec for spec in pipe.places.specs.values())
    channel = pipe.places.remote(remote).channel

    def lost(job, inputs):
        error = Lost("running a stage", "it is full", "Come again")
        error.after = 600.0
        raise error
        yield

    monkeypatch.setattr(channel, "submit", lost)
    listener = when("place.retry", lambda: threading.Timer(0.2, cancel.set).start())
    try:
        begun = time.monotonic()
        assert "latents" not in cancelled(pipe, listener, cancel).state
        assert time.monotonic() - begun < 60
    finally:
        pipe.places.close()
