"""Every stage of every task, at every kind of place: the State is that of a run in one process, bit for bit, with the
same records and fingerprints.

Child processes and actors are real ones, one for each task; the hosts of the matrix are real servers in threads.
"""

from __future__ import annotations

import threading
from functools import cache

import pytest
import tiny
import torch
from acting import check_spans
from test_family_runs import asked, begin

import ditkit
from ditkit.execution.place import Here, Segment
from ditkit.placement.http.client import HTTPChannel
from ditkit.placement.remote import Remote
from ditkit.placement.spec import Spec
from ditkit.placement.worker import worker_of
from ditkit.setup import Setup

STAGES = {
    "t2v": ("encode_text", "denoise", "decode_latents"),
    "i2v": ("encode_text", "encode_image", "encode_condition", "denoise", "decode_latents"),
    "flf2v": ("encode_text", "encode_image", "encode_condition", "denoise", "decode_latents"),
    "vace": ("encode_text", "encode_control", "denoise", "decode_latents"),
    "ti2v": ("encode_text", "encode_first_frame", "denoise", "decode_latents"),
    "t2v_a14b": ("encode_text", "denoise", "decode_latents"),
}
KINDS = ("cpu", "process", "http", "ray")
MATRIX = [(task, stage, kind) for task, stages in STAGES.items() for kind in KINDS for stage in stages]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return cache(lambda task: ditkit.load(tiny.write(tmp_path_factory.mktemp("placed") / task, task)))


@pytest.fixture(scope="module")
def states(pipe):
    """The States of a plain run: as it begins, and after each stage."""

    @cache
    def make(task):
        plain, state = pipe(task), begin(pipe(task), **asked(task))
        found = {None: state}
        for name in plain.stages.names:
            found[name] = plain.stages.run(found[list(found)[-1]], plain.components, until=name)
        return found

    return make


@pytest.fixture(scope="module")
def at(pipe, served):
    """The Remote of a kind for a task, shared by all tests; what was started ends with the module."""
    opened = []

    @cache
    def make(task, kind):
        setup = pipe(task).setup
        if kind == "http":
            return Remote(kind, HTTPChannel(served(worker_of(setup)), 60.0))
        placed = ditkit.load(setup.model, placement=dict.fromkeys(STAGES[task], kind))
        opened.append(placed.places)
        return placed.places.remote(Spec.parse(kind))

    yield make
    for places in opened:
        places.close()


def test_the_matrix_misses_no_stage(pipe):
    for task in tiny.TASKS:
        stages = {name for name in pipe(task).stages.names if name != "expand_prompt"}
        assert stages <= set(STAGES.get(task, stages)), task
    assert set(tiny.TASKS) - set(STAGES) == {"i2v_a14b"}, "its stages are those of i2v and t2v_a14b"


@pytest.mark.parametrize(("task", "stage", "kind"), MATRIX)
def test_a_stage_elsewhere_gives_the_identical_state(pipe, states, at, task, stage, kind):
    plain, names = pipe(task), [None, *pipe(task).stages.names]
    before, after = states(task)[names[names.index(stage) - 1]], states(task)[stage]
    if kind == "cpu":
        there = ditkit.load(plain.setup.model, placement={stage: kind}).run(before, until=stage).state
    else:
        places = {stage: [Segment(at(task, kind))]}
        there = plain.stages.run(before, plain.components, until=stage, places=places)
    assert there.equal(after)
    assert there.fingerprints == after.fingerprints
    assert there["records"][stage] == after["records"][stage]
    assert there is not before
    assert stage in there["stages"]


@pytest.mark.parametrize("kind", ["process", "http", "ray"])
def test_it_did_run_there(pipe, states, at, kind):
    heard = []
    plain = pipe("t2v")
    places, events = {"denoise": [Segment(at("t2v", kind))]}, ditkit.Events(heard.append)
    plain.stages.run(states("t2v")["encode_text"], plain.components, until="denoise", places=places, events=events)
    (trip,) = [event for event in heard if event.name == "travel"]
    assert trip["place"] == kind
    assert trip["received"] > states("t2v")["denoise"]["latents"].nbytes
    parent, name = check_spans(heard)
    steps = [event for event in heard if event.name == "step.end"]
    assert [event["step"].index for event in steps] == [0, 1, 2, 3]
    assert {(event.place, name[event.parent], parent[event.parent]) for event in steps} == {(kind, "stage", 0)}
    sent, elapsed = [event.sent for event in steps], [event["elapsed"] for event in steps]
    assert all(after - before >= took for before, after, took in zip(sent[:-1], sent[1:], elapsed[1:], strict=True))


@pytest.mark.parametrize("first", ["process", "ray"])
@pytest.mark.parametrize("task", ["t2v", "t2v_a14b"])
def test_a_loop_that_moves_at_any_step(pipe, states, at, task, first):
    plain, after = pipe(task), states(task)["denoise"]
    here = Here(plain.components)
    for step in range(1, asked(task)["steps"]):
        places = {"denoise": [Segment(at(task, first)), Segment(here, step)]}
        there = plain.stages.run(states(task)["encode_text"], plain.components, until="denoise", places=places)
        assert there.equal(after), step
        assert there.fingerprints == after.fingerprints


def test_two_experts_at_two_places(pipe, states, at):
    """The one for high noise in a child, the one for low noise at a host."""
    plain, after = pipe("t2v_a14b"), states("t2v_a14b")["denoise"]
    step = next(s.index for s in plain.steps(plain.model.request(ditkit.pictures.take(asked("t2v_a14b"))[0]))
                if s.expert == "transformer_2")  # fmt: skip
    assert 0 < step < asked("t2v_a14b")["steps"]
    places = {"denoise": [Segment(at("t2v_a14b", "process")), Segment(at("t2v_a14b", "http"), step)]}
    there = plain.stages.run(states("t2v_a14b")["encode_text"], plain.components, until="denoise", places=places)
    assert there.equal(after)
    assert there.fingerprints == after.fingerprints


def test_each_stage_at_another_place(pipe, states, at):
    plain = pipe("i2v")
    kinds = ("process", "http", "ray", "process", "http")
    places = {stage: [Segment(at("i2v", kind))] for stage, kind in zip(STAGES["i2v"], kinds, strict=True)}
    there = plain.stages.run(states("i2v")[None], {}, places=places)
    assert there.equal(states("i2v")["decode_latents"])
    assert there.fingerprints == states("i2v")["decode_latents"].fingerprints


@pytest.mark.parametrize("kind", ["process", "ray"])
@pytest.mark.parametrize("more", [{"batched": True}, {"batched": False}], ids=["batched", "alone"])
def test_several_clips(pipe, at, kind, more):
    values = asked("t2v", prompt=["a red circle", "a blue square"], **more)
    plain, there = pipe("t2v"), ditkit.load(pipe("t2v").setup.model, placement=dict.fromkeys(STAGES["t2v"], kind))
    there.places._remotes[kind] = at("t2v", kind)  # the child that is there
    one, two = plain(**values), there(**values)
    assert two.state.equal(one.state)
    assert two.state.fingerprints == one.state.fingerprints
    assert two.receipt["places"] == {stage: [kind] for stage in STAGES["t2v"]}
    assert two.receipt["loads"] == {}, "nothing is loaded here"


def test_as_many_threads_as_here(at):
    for kind in ("process", "ray"):
        assert at("t2v", kind).description["machine"]["threads"] == torch.get_num_threads()


@pytest.fixture(scope="module")
def served():
    """The address of a Worker behind a real server in a thread."""
    import uvicorn

    from ditkit.placement.http.host import app_of

    servers = []

    def start(worker) -> str:
        server = uvicorn.Server(uvicorn.Config(app_of(worker), port=0, http="httptools", log_level="warning"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        servers.append((server, thread))
        while not server.started:
            thread.join(0.01)
            assert thread.is_alive()
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join(20)


def test_the_whole_setup_reaches_a_child(pipe):
    assert Setup.of(pipe("t2v").setup.model_dump(mode="json")) == pipe("t2v").setup
