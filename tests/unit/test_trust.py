"""A place that sends what nobody asked for: refused by name before anything of it is used, kept or recorded."""

from __future__ import annotations

import json
import struct
import threading
from dataclasses import dataclass, replace

import pytest
import torch

import ditkit
from ditkit.errors import PlaceError
from ditkit.events import Events
from ditkit.execution.place import Segment
from ditkit.execution.stage import BaseStage
from ditkit.execution.stage_list import StageList
from ditkit.placement.job import Message, error_of
from ditkit.placement.remote import Remote
from ditkit.placement.worker import Worker
from ditkit.receipt import Recorder
from ditkit.stages.decode_latents import DecodeLatents
from ditkit.state import Field, State


class Liar:
    """A Worker whose frames and words are changed on their way."""

    def __init__(self, worker, change=None, said=None):
        self.worker, self.change, self.said = worker, change or (lambda frame: [frame]), said or {}

    def ask(self, question, name=""):
        return {**self.worker.describe(), **self.said} if question == "describe" else {}

    def submit(self, job, inputs):
        frames = []
        self.worker.run(job, inputs, frames.append, threading.Event())
        for frame in frames:
            yield from self.change(frame)


class Kept:
    every = 1

    def __init__(self):
        self.states = []

    def __call__(self, state):
        self.states.append(state)


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return ditkit.load(tiny_model, threads=1)


def begin(pipe):
    return pipe.begin(pipe.model.request({"prompt": "a red circle", "seed": 3, "steps": 3}))


def run_at(pipe, change=None, said=None, stage="denoise", keep=None, pipeline=None):
    worker = Worker({s.name: s for s in pipe.stages.stages}, pipe.components, {})
    place, pipeline = Remote("liar", Liar(worker, change, said)), pipeline or pipe.stages
    return pipeline.run(begin(pipe), pipe.components, places={stage: [Segment(place)]}, keep=keep, until=stage,
                        events=Events(Recorder()), seams=pipe.seams)  # fmt: skip


def with_fields(kind, **fields):
    def change(frame):
        if frame.kind != kind:
            return [frame]
        state = frame.state("liar")
        about = {**state["outcome"], **fields.pop("outcome", {})}
        return [Message(kind, State({**state, **fields, "outcome": about}))]

    return change


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"prompt": ["another"]}, "prompt undeclared"),
        ({"request": {}}, "request undeclared"),
        ({"records": {}, "model": {}}, "model, records undeclared"),
        ({"seed": [4], "outcome": {"stopped": True}}, "seed undeclared"),
        ({"latents": torch.zeros(2, 4, 2, 4, 4)}, "'latents' is damaged"),
        ({"step": 9}, "its step 9 is not one of its run"),
        ({"step": 1}, "it ended after step 1 of 3"),
        ({"outcome": {"settings": {"nonsense": 1}}}, "the setting 'nonsense' as 1"),
        ({"outcome": {"settings": {"steps": 50}}}, "the setting 'steps' as 50"),
        ({"outcome": {"plugs": {"attend": ["faster"]}}}, "plugged into its seams"),
    ],
)
def test_outcomes_that_reach_too_far(pipe, fields, found):
    with pytest.raises(PlaceError, match=f"{found}.*liar sent that"):
        run_at(pipe, with_fields("outcome", **fields))


def test_what_is_kept_on_the_way_is_looked_at_too(pipe):
    kept = Kept()
    with pytest.raises(PlaceError, match="prompt undeclared"):
        run_at(pipe, with_fields("kept", prompt=["another"]), keep=kept)
    assert all(state["prompt"] == ["a red circle"] for state in kept.states)
    kept_twice = run_at(pipe, lambda f: [replace(f, kind="kept"), f] if f.kind == "outcome" else [f])
    assert kept_twice.equal(run_at(pipe)), "nobody keeps, and nobody minds"


DEEP = "[" * 100_000 + "]" * 100_000


def event(**about):
    return json.dumps({"seconds": 1.0, "span": 0, "parent": 0, **about}).encode()


@pytest.mark.parametrize(
    ("payload", "found"),
    [
        (event(name="step.end", values={}), "its step is not what belongs there"),
        (event(name="step.end", values={"step": {"@step": {"index": "1"}}}), "it is damaged"),
        (event(name="load.end", values={"component": "vae"}), "its elapsed"),
        (event(name="stage.start", values={"stage": "denoise", "place": "here"}), "no stage emits that"),
        (event(name="travel", values={"sent": 0}), "no stage emits that"),
        (event(name="a", values=[1]), "it is damaged"),
        (b'{"name": "a", "values": ' + DEEP.encode() + b"}", "it is damaged"),
        (event(name="load.start", values={"component": "vae"}), "it does not fit its span"),
        (event(name="load.end", values={"component": "vae", "elapsed": 1.0}, span=999), "it does not fit its span"),
        (event(name="a", values={}, parent=999), "it does not fit its span"),
        (event(name="a", values={}, span=1.5), "it is damaged"),
        (event(name="a", values={}, seconds="now"), "it is damaged"),
        (event(name="step.middle", values={}), "there is no such event"),
        (event(name="load.start", values={"component": "vae", "more": 1}, span=999), "its more is not in the table"),
    ],
)
def test_events_that_no_stage_emits(pipe, payload, found):
    with pytest.raises(PlaceError, match=f"{found}.*liar sent that"):
        run_at(pipe, lambda frame: [Message("event", payload), frame])


def test_an_event_may_carry_any_name_of_a_value(pipe):
    run_at(pipe, lambda frame: [Message("event", event(name="a", values={"name": 1, "self": 2})), frame])


def test_words_of_another_machine_do_not_steer_the_terminal():
    words = {"kind": "PlaceError", "asked": "a\x1b[2J", "found": "b\r" + "x" * 10_000, "do": "c"}
    told = str(error_of(json.dumps(words).encode(), "liar"))
    assert told.isprintable()
    assert len(told) < 3000
    assert "damaged" in str(error_of(DEEP.encode(), "liar"))


def test_a_state_whose_description_is_too_deep():
    text = '{"schema": 1, "fingerprints": {}, "plain": {"a": ' + DEEP + "}}"
    header = json.dumps({"__metadata__": {"ditkit.state": text}}).encode()
    with pytest.raises(ditkit.DitkitError, match="its description is damaged"):
        State.from_bytes(struct.pack("<Q", len(header)) + header)


@pytest.mark.parametrize("said", [{"versions": 3}, {"machine": [1]}, {"parts": {"vae": 3}}, {"model": "x"}])
def test_a_description_of_another_shape(pipe, said):
    with pytest.raises(PlaceError, match="its answer is damaged"):
        run_at(pipe, said=said)


def test_a_host_that_is_told_to_end_was_lost_and_is_no_ctrl_c_of_ours(pipe):
    """What it had until then is not computed again."""
    jobs = []

    class Ending(Liar):
        def submit(self, job, inputs):
            jobs.append(inputs.get("step", 0))
            frames, ended = [], threading.Event()

            def send(frame):
                frames.append(frame)
                if len(jobs) == 1 and b"step.end" in bytes(frame.payload):
                    ended.set()

            self.worker.run(job, inputs, send, ended)
            yield from frames

    worker = Worker({s.name: s for s in pipe.stages.stages}, pipe.components, {})
    places = {"denoise": [Segment(Remote("ending", Ending(worker)))]}
    assert pipe.stages.run(begin(pipe), pipe.components, places=places, until="denoise").equal(run_at(pipe))
    assert jobs == [0, 1]


# --- stages that are not the same at both ends


class Grey(DecodeLatents):
    def run(self, inputs, ctx):
        video = super().run(inputs, ctx)["video"]
        return {"video": video // 2}


def test_a_stage_of_the_user_does_not_run_as_the_standard_one(pipe):
    own = pipe.stages.replace("decode_latents", Grey())
    assert Grey().version == DecodeLatents().version
    with pytest.raises(PlaceError, match=r"the stage there is ditkit\.stages\.decode_latents\.DecodeLatents, the one"):
        run_at(pipe, stage="decode_latents", pipeline=own)


def test_a_host_that_was_started_anew_with_another_stage(pipe):
    """The handshake is long over: the job says which stage is meant."""
    worker = Worker({s.name: s for s in pipe.stages.stages}, pipe.components, {})
    place = Remote("calls", Liar(worker))
    places = {"decode_latents": [Segment(place)]}
    done = pipe.stages.run(begin(pipe), pipe.components, places=places)
    worker.stages["decode_latents"] = Grey()
    with pytest.raises(PlaceError, match=r"it is made by .*Grey .* here, and asked for is ditkit"):
        pipe.stages.run(done, pipe.components, places=places, start="decode_latents")


@dataclass(frozen=True)
class Looks(BaseStage):
    name = "looks"
    reads = ("request",)
    writes = ("expansion",)

    def run(self, inputs, ctx):
        return {"expansion": [{"plugs": len(ctx.seams.attend)}]}


def test_a_stage_that_asks_for_the_seams_is_not_given_none(pipe):
    from ditkit.contracts import Seams

    pipeline = StageList((Looks(),))
    places = {"looks": [Segment(Remote("calls", Liar(Worker({"looks": Looks()}, {}, {}))))]}
    assert pipeline.run(begin(pipe), {}, places=places)["expansion"] == [{"plugs": 0}]
    with pytest.raises(PlaceError, match="attend is changed here by Python objects, which do not travel"):
        pipeline.run(begin(pipe), {}, places=places, seams=Seams(attend=(lambda attend: attend,)))


# --- fields that another stage describes


class Marks(BaseStage):
    name, reads, writes = "marks", ("prompt",), ("mark",)
    fields = (Field("mark", "tensor", "float32", "B N", "", "marks", "a mark"),)

    def run(self, inputs, ctx):
        return {"mark": torch.ones(len(inputs["prompt"]), 3)}


class Doubles(BaseStage):
    name, reads, writes = "doubles", ("mark",), ("mark",)

    def run(self, inputs, ctx):
        return {"mark": 2 * inputs["mark"]}


@pytest.mark.parametrize("offered", [(Marks(), Doubles()), (Doubles(),)])
def test_a_stage_may_use_a_field_that_another_stage_describes(pipe, offered):
    pipeline, worker = StageList((Marks(), Doubles())), Worker({s.name: s for s in offered}, {}, {})
    places = {s.name: [Segment(Remote("calls", Liar(worker)))] for s in offered}
    whole, there = (pipeline.run(begin(pipe), {}, places=where) for where in ({}, places))
    assert there.equal(whole)
    assert there.fingerprints == whole.fingerprints
    known = worker.describe()["stages"]["doubles"]["reads"]["mark"]
    assert known == ({"kind": "tensor", "dtype": "float32", "shape": "B N"} if len(offered) == 2 else {})
    forger = Remote("liar", Liar(worker, with_fields("outcome", mark=torch.ones(3))))
    with pytest.raises(PlaceError, match=r"'mark' is damaged: it is float32 \[3\]"):
        pipeline.run(begin(pipe), {}, places={"doubles": [Segment(forger)]})
