"""Events: spans that always end, ids and parents, events of another place in the terms of this run."""

from __future__ import annotations

import ast
import asyncio
import contextvars
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from acting import check_spans

import ditkit
from ditkit.contracts import Step
from ditkit.errors import Lost, PipelineError, StateError
from ditkit.event_table import EVENTS, ROWS
from ditkit.events import Event, Events, Relay
from ditkit.receipt import Recorder
from ditkit.state import State

STEP = Step(0, 4, 1.0, 0.5, 1000.0)
PLUG = {"plug": "cache", "seam": "run_blocks", "expert": "transformer", "branch": "cond", "step": STEP}


def listening(*listeners):
    heard = []
    return Events(*listeners, heard.append), heard


def names(heard):
    return [event.name for event in heard]


def numbered(heard):
    """Span and parent of each event, as numbers in the order in which the spans began."""
    number = {0: 0}
    for event in heard:
        number.setdefault(event.span, len(number))
    return [(number[event.span], number[event.parent]) for event in heard]


# --- spans


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ValueError("half a number"), "failed"),
        (Lost("asking", "gone", "Look"), "failed"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(3), "interrupted"),
        (ditkit.Interrupted("denoise", State({})), "interrupted"),
    ],
)
def test_a_span_that_fails_ends_with_the_failure_named(error, outcome):
    events, heard = listening()
    with pytest.raises(type(error)), events.span("load", component="vae"):
        raise error
    assert names(heard) == ["load.start", "load.fail"]
    values = dict(heard[1].values)
    assert values.pop("elapsed") >= 0
    why = str(error) or "KeyboardInterrupt"
    assert values == {"component": "vae", "error": type(error).__name__, "why": why, "outcome": outcome}


def test_an_inner_failure_ends_the_outer_span_too():
    events, heard = listening()
    with pytest.raises(ValueError), events.span("mine"), events.span("yours"):
        raise ValueError("x")
    assert names(heard) == ["mine.start", "yours.start", "yours.fail", "mine.fail"]
    assert numbered(heard) == [(1, 0), (2, 1), (2, 1), (1, 0)]
    assert events.inside == 0


@pytest.mark.parametrize(("where", "ends"), [("mine.start", ["mine.fail"]), ("mine.end", ["mine.end"])])
def test_a_listener_that_raises_leaves_one_end(where, ends):
    def stop(event):
        if event.name == where:
            raise KeyboardInterrupt

    heard = []
    events = Events(heard.append, stop)
    with pytest.raises(KeyboardInterrupt), events.span("mine"):
        pass
    assert names(heard) == ["mine.start", *ends]


def test_events_know_the_span_that_they_happen_in():
    events, heard = listening()
    with events.span("outer"):
        events.emit("a.word")
        with events.span("inner"):
            events.emit("a.word")
        events.emit("a.word")
    events.emit("a.word")
    assert numbered(heard) == [(1, 0), (0, 1), (2, 1), (0, 2), (2, 1), (0, 1), (1, 0), (0, 0)]
    assert {e.place for e in heard} == {"here"}
    assert [e.seconds for e in heard] == sorted(e.seconds for e in heard)


def test_spans_of_another_run_in_the_same_thread_are_no_parents():
    (one, heard), (other, theirs) = listening(), listening()
    with one.span("mine"), other.span("theirs"):
        one.emit("a.word")
        other.emit("a.word")
    assert (heard[1].parent, theirs[1].parent) == (heard[0].span, theirs[0].span)
    assert theirs[0].parent == 0


def check_trees(heard, count):
    """``count`` trees of three nested spans, each of one thread or task."""
    parent = {e.span: e.parent for e in heard if e.name.endswith(".start")}
    owner = {e.span: e.values["of"] for e in heard if e.name.endswith(".start")}
    assert len(parent) == 3 * count, "ids are unique"
    assert all(owner[span] == owner[up] for span, up in parent.items() if up)
    assert sum(not up for up in parent.values()) == count
    assert sorted(e.span for e in heard if e.name.endswith(".end")) == sorted(parent)


def test_threads_that_share_events_never_mix_their_spans():
    events, heard = listening()
    barrier = threading.Barrier(4)

    def work(index):
        with events.span("a", of=index):
            barrier.wait()
            with events.span("b", of=index):
                barrier.wait()
                with events.span("c", of=index):
                    barrier.wait()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_trees(heard, 4)


def test_tasks_that_share_events_never_mix_their_spans():
    events, heard = listening()

    async def work(index):
        with events.span("a", of=index):
            await asyncio.sleep(0)
            with events.span("b", of=index):
                await asyncio.sleep(0)
                with events.span("c", of=index):
                    await asyncio.sleep(0)

    async def all_of_them():
        await asyncio.gather(*map(work, range(4)))

    asyncio.run(all_of_them())
    check_trees(heard, 4)


def test_a_thread_in_a_copied_context_works_inside_of_the_span():
    events, heard = listening()
    with events.span("mine"):
        run = contextvars.copy_context().run
        for target in (lambda: events.emit("a.word"), lambda: run(events.emit, "a.word")):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
    assert numbered(heard) == [(1, 0), (0, 0), (0, 1), (1, 0)]


# --- the table


def test_an_event_is_as_the_table_says():
    events, heard = listening()
    events.emit("cache.hit", stage="denoise", why="it was there")
    events.emit("plug", **PLUG, what="hit", distance=0.03, note=None)
    events.emit("sharpness.measured", name="x", self=object())
    assert len(heard) == 3
    for name, values, found in [
        ("cache.hit", {"stage": "denoise"}, "its why is not what belongs there"),
        ("cache.hit", {"stage": "denoise", "why": "x", "when": 3}, "its when is not in the table"),
        ("clip", {"index": True, "count": 1}, "its index is not what belongs there"),
        ("prediction", {"step": STEP, "x": 1, "velocity": 2}, "its x"),
        ("plug", {**PLUG, "what": "hit", "tensor": object()}, "its tensor is not in the table"),
        ("plug.hit", {}, "there is no such event"),
        ("stage.done", {}, "there is no such event"),
    ]:
        with pytest.raises(PipelineError, match=found):
            events.emit(name, **values)
    with pytest.raises(PipelineError, match="its step is not what belongs there"), events.span("step", step=3):
        raise AssertionError
    assert len(heard) == 3
    Events().emit("cache.hit")  # nobody listens


def test_the_table_names_every_span_three_times():
    assert {name for name in EVENTS if name.startswith("step.")} == {"step.start", "step.end", "step.fail"}
    assert len(EVENTS) == len(ROWS) + 2 * sum(row.span for row in ROWS)
    assert {by for row in ROWS for by in row.by} == {"here", "elsewhere", "plugs"}


def test_the_table_has_what_is_emitted_and_nothing_else():
    """By the text of the package; a name made of parts (``cache.{...}``) stands for all that begin so."""
    found = set()
    for file in Path(ditkit.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                first = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
                if node.func.attr in ("emit", "span") and isinstance(first, ast.Constant):
                    starts = first.value if first is not node.args[0] else None
                    found |= {row.name for row in ROWS if starts and row.name.startswith(starts)} or {first.value}
    assert found == {row.name for row in ROWS}


def test_what_no_listener_wants_does_not_travel():
    def listener(event):
        pass

    def other(event):
        pass

    listener.ignores = {"prediction", "frames", "step.start", "my.words"}
    other.ignores = {"prediction", "my.words"}
    assert Events(listener).ignored() == ["frames", "my.words", "prediction"], "spans are always sent"
    assert Events(listener, other).ignored() == ["my.words", "prediction"]
    assert Events(listener, print).ignored() == []
    nobody = Events().ignored()
    assert {"prediction", "frames", "plug"} <= {*nobody}
    assert not {"step.start", "stage.skipped"} & {*nobody}


def test_the_receipt_counts_what_plugs_decide():
    recorder = Recorder()
    events = Events(recorder)
    for what in ("hit", "hit", "miss"):
        events.emit("plug", **PLUG, what=what)
    events.emit("plug", **{**PLUG, "plug": "swap"}, what="moved", bytes=3)
    events.emit("memory.dropped", plug="old", names=["residual"])
    events.emit("load.note", component="vae", note="its config has a key that nobody knows")
    receipt = recorder.receipt({}, {}, {}, {}, [])
    assert receipt["plugs"] == {"cache": {"hit": 2, "miss": 1}, "swap": {"moved": 1}, "old": {"memory dropped": 1}}
    assert receipt["noted"] == [{"component": "vae", "note": "its config has a key that nobody knows"}]


# --- events of another place


def elsewhere(name, span=0, parent=0, seconds=7.0, **values):
    return Event(name, values, seconds, span, parent)


def test_events_of_a_place_keep_its_clock_and_get_ids_of_this_run():
    events, heard = listening()
    with events.span("stage", stage="denoise", place="far"):
        for _ in range(2):  # two attempts, whose ids are the same
            with Relay(events, "far") as relay:
                for event in (
                    elsewhere("step.start", 1, step=STEP),
                    elsewhere("my.word", 0, 1, 8.0),
                    elsewhere("step.end", 1, step=STEP, elapsed=2.0),
                ):
                    relay.check(event)
                    relay.send(event)
    assert names(heard[1:4]) == names(heard[4:7]) == ["step.start", "my.word", "step.end"]
    assert numbered(heard)[1:7] == [(2, 1), (0, 2), (2, 1), (3, 1), (0, 3), (3, 1)]
    assert [(e.place, e.sent) for e in heard[1:4]] == [("far", 7.0), ("far", 8.0), ("far", 7.0)]
    assert [e.seconds for e in heard] == sorted(e.seconds for e in heard), "when they were heard here"
    assert (heard[0].place, heard[0].sent) == ("here", None)


@pytest.mark.parametrize(
    ("error", "outcome"), [(Lost("a", "gone", "b"), "failed"), (KeyboardInterrupt(), "interrupted"), (None, "failed")]
)
def test_what_a_place_leaves_open_ends_here(error, outcome):
    events, heard = listening()
    try:
        with Relay(events, "far") as relay:
            relay.send(elsewhere("mine.start", 1, of=1))
            relay.send(elsewhere("step.start", 2, 1, step=STEP))
            if error is not None:
                raise error
    except (Lost, KeyboardInterrupt):
        pass
    assert names(heard) == ["mine.start", "step.start", "step.fail", "mine.fail"]
    assert numbered(heard)[2:] == [(2, 1), (1, 0)]
    assert {e.place for e in heard} == {"far"}
    assert {e["outcome"] for e in heard[2:]} == {outcome}
    assert heard[2]["error"] == (type(error).__name__ if error else "PipelineError")
    assert heard[3]["of"] == 1


@pytest.mark.parametrize(
    "event",
    [
        elsewhere("step.end", 1, step=STEP, elapsed=1.0),
        elsewhere("step.start", 0, step=STEP),
        elsewhere("step.start", 9, step=STEP),
        elsewhere("mine.end", 9),
        elsewhere("mine.word", 9),
        elsewhere("mine.end", 0, 4),
        elsewhere("prediction", 9, step=STEP, x=1, velocity=2),
        elsewhere("stage.start", 2, stage="denoise", place="far"),
        elsewhere("stage.skipped", stage="denoise", reason="no"),
    ],
)
def test_events_that_fit_no_span_are_refused(event):
    events, heard = listening()
    relay = Relay(events, "far")
    relay.send(elsewhere("load.start", 9, component="vae"))
    with pytest.raises(StateError, match="from far"):
        relay.check(event)
    relay.check(replace(event, name="other.word", span=0, parent=9))
    assert names(heard) == ["load.start"]


# --- a whole run


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return ditkit.load(tiny_model, threads=1)


def test_the_spans_of_a_run(pipe):
    heard = []
    pipe("a red circle", steps=2, listeners=[heard.append])
    parent, name = check_spans(heard)
    assert {name[parent[span]] for span in parent if name[span] == "step"} == {"stage"}
    assert {name[e.parent] for e in heard if e.name == "prediction"} == {"step"}
    assert {name[e.parent] for e in heard if e.name == "frames"} == {"stage"}


def test_a_run_that_is_interrupted_ends_its_spans(pipe):
    heard = []

    def stop(event):
        if event.name == "prediction" and event["step"].index == 1:
            raise KeyboardInterrupt

    with pytest.raises(ditkit.Interrupted):
        pipe("a red circle", steps=3, listeners=[heard.append, stop])
    check_spans(heard)
    fails = [e for e in heard if e.name.endswith(".fail")]
    assert [(e.name, e["error"], e["outcome"]) for e in fails] == [
        ("step.fail", "KeyboardInterrupt", "interrupted"),
        ("stage.fail", "KeyboardInterrupt", "interrupted"),
    ]
    assert fails[1]["stage"] == "denoise"
