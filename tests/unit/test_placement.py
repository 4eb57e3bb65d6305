"""Places without a network: the words of the setting, and a Worker in this process behind function calls."""

from __future__ import annotations

import contextlib
import queue
import threading

import pytest
from acting import check_spans

import ditkit
from ditkit.errors import Lost, PlaceError, SetupError
from ditkit.events import Event
from ditkit.execution.execution import Execution
from ditkit.execution.place import Here, Segment
from ditkit.placement.job import Job
from ditkit.placement.remote import Remote
from ditkit.placement.spec import Spec, Target
from ditkit.placement.worker import Worker


class Calls:
    """A channel to a Worker in a thread of this process; ``lose`` makes the next jobs end after so many frames."""

    def __init__(self, worker: Worker):
        self.worker, self.lose, self.jobs = worker, [], 0
        self.cancelled: dict[str, threading.Event] = {}

    def ask(self, question, name=""):
        if question == "cancel":
            self.cancelled[name].set()
        return {"describe": self.worker.describe, "probe": lambda: {"hash": "0" * 64}}.get(question, dict)()

    def submit(self, job, inputs):
        self.jobs += 1
        frames, limit = queue.Queue(), self.lose.pop(0) if self.lose else None
        job, flag = Job.from_json(job.to_json()), self.cancelled.setdefault(job.id, threading.Event())
        inputs = type(inputs).from_bytes(inputs.to_bytes())

        def work():
            self.worker.run(job, inputs, frames.put, flag)
            frames.put(None)

        thread = threading.Thread(target=work)
        thread.start()
        count = 0
        while (frame := frames.get()) is not None:
            if count == limit:
                flag.set()
                thread.join()
                raise Lost(f"running {job.stage} at calls", "it went away", "Look")
            count += 1
            yield frame
        thread.join()

    def close(self):
        pass


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return ditkit.load(tiny_model, threads=1)


@pytest.fixture
def remote(pipe):
    other = ditkit.load(pipe.setup.model)
    worker = Worker({s.name: s for s in other.stages.stages}, other.components, {})
    return Remote("calls", Calls(worker))


def begin(pipe, **more):
    return pipe.begin(pipe.model.request({"prompt": "a red circle", "seed": 3, **more}))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["encode_text", "denoise", "decode_latents"])
def test_a_stage_elsewhere_gives_the_same_state_and_fingerprints(pipe, remote, stage):
    whole = pipe.run(begin(pipe)).state
    there = pipe.stages.run(begin(pipe), pipe.components, places={stage: [Segment(remote)]})
    assert there.equal(whole)
    assert there.fingerprints == whole.fingerprints


def test_a_loop_in_two_places_is_one_loop(pipe, remote):
    whole = pipe.run(begin(pipe)).state
    for k in range(1, 5):
        places = {"denoise": [Segment(remote), Segment(Here(pipe.components), k)]}
        there = pipe.stages.run(begin(pipe), pipe.components, places=places)
        assert there.equal(whole), k
        assert there.fingerprints == whole.fingerprints


def test_a_lost_host_is_asked_again_and_goes_on_from_what_was_kept(pipe, remote):
    whole = pipe.run(begin(pipe)).state
    kept = []

    class Keep:
        every = 1

        def __call__(self, state):
            kept.append(state)

    remote.channel.lose = [8]
    there = pipe.stages.run(begin(pipe), pipe.components, places={"denoise": [Segment(remote)]}, keep=Keep())
    assert there.equal(whole)
    assert there.fingerprints == whole.fingerprints
    steps = [s["step"] for s in kept if "step" in s and "video" not in s]
    assert steps == sorted(steps), "no step was taken twice and kept twice"
    assert remote.channel.jobs == 2


def steps_kept(pipe, places, every=1):
    kept = []

    class Keep:
        def __call__(self, state):
            kept.append(state)

    Keep.every = every
    pipe.stages.run(begin(pipe), pipe.components, places=places, keep=Keep(), until="denoise")
    return [state for state in kept if "step" in state]


def test_the_state_at_a_hand_over_is_kept_as_any_other(pipe, remote):
    places = {"denoise": [Segment(Here(pipe.components)), Segment(remote, 2)]}
    there, here = steps_kept(pipe, places), steps_kept(pipe, {})
    assert [state["step"] for state in there] == [1, 2, 3, 4]
    assert all(a.equal(b) and a.fingerprints == b.fingerprints for a, b in zip(there, here, strict=True))
    assert [state["step"] for state in steps_kept(pipe, places, every=3)] == [2, 3, 4], "also between two of them"


def test_ctrl_c_at_the_second_place_keeps_the_steps_of_the_first(pipe):
    class Second(Here):
        """Stopped before its first step, while a part is loaded or a host is asked."""

        def call(self, task):
            raise KeyboardInterrupt

    places = {"denoise": [Segment(Here(pipe.components)), Segment(Second(pipe.components), 2)]}
    with pytest.raises(ditkit.Interrupted) as e:
        pipe.stages.run(begin(pipe), pipe.components, places=places)
    assert e.value.state["step"] == 2
    assert pipe.run(e.value.state).state.equal(pipe.run(begin(pipe)).state)


def test_retries_end_and_the_last_error_names_the_place(pipe, remote):
    remote.channel.lose = [0, 0, 0]
    with pytest.raises(PlaceError, match=r"calls: it went away \(3 times\)"):
        pipe.stages.run(begin(pipe), pipe.components, places={"encode_text": [Segment(remote)]})


def test_errors_keep_their_kind(pipe, remote):
    state = begin(pipe)
    weights = {"tokenizer": "0" * 64, "text_encoder": "1" * 64}
    remote.fingerprints = lambda stage, names: weights
    with pytest.raises(
        ditkit.DitkitError, match=r"at calls\): its tokenizer is .* and the caller knows 0000000000000000"
    ):
        pipe.stages.run(state, pipe.components, places={"encode_text": [Segment(remote)]})


def test_ctrl_c_keeps_what_was_done_elsewhere(pipe, remote):
    whole = pipe.run(begin(pipe)).state

    def listener(event: Event):
        if event.name == "step.end" and event["step"].index == 1:
            raise KeyboardInterrupt

    with pytest.raises(ditkit.Interrupted) as e:
        pipe.stages.run(
            begin(pipe), pipe.components, places={"denoise": [Segment(remote)]}, events=ditkit.Events(listener)
        )
    half = e.value.state
    assert 2 <= half["step"] <= 4
    assert pipe.run(half).state.equal(whole)


def test_a_ctrl_c_that_comes_too_late_still_ends_the_run(pipe, remote):
    def listener(event: Event):
        if event.name == "step.end" and event["step"].index == 3:
            raise KeyboardInterrupt

    ask = remote.channel.ask
    remote.channel.ask = lambda question, name="": {} if question == "cancel" else ask(question, name)
    with pytest.raises(ditkit.Interrupted) as e:
        pipe.stages.run(
            begin(pipe), pipe.components, places={"denoise": [Segment(remote)]}, events=ditkit.Events(listener)
        )
    assert e.value.state["step"] == 4
    assert pipe.run(e.value.state).state.equal(pipe.run(begin(pipe)).state)


def test_a_real_ctrl_c_while_waiting(pipe, remote):
    """It comes in the middle of waiting for a frame, and not in a listener."""
    import signal

    def listener(event: Event):
        if event.name == "step.start" and event["step"].index == 1:
            threading.Timer(0.0, signal.raise_signal, [signal.SIGINT]).start()

    with pytest.raises(ditkit.Interrupted) as e:
        pipe.stages.run(
            begin(pipe, steps=40), pipe.components, places={"denoise": [Segment(remote)]},
            events=ditkit.Events(listener),
        )  # fmt: skip
    assert pipe.run(e.value.state).state.equal(pipe.run(begin(pipe, steps=40)).state)


def spans_of(pipe, remote, act=lambda event: None, **more):
    """All events of a run with the loop at ``remote``, and of each span its parent and its name."""
    heard, places = [], {"denoise": [Segment(remote)]}
    with contextlib.suppress(ditkit.Interrupted):
        pipe.stages.run(begin(pipe), pipe.components, places=places, events=ditkit.Events(heard.append, act), **more)
    return heard, *check_spans(heard)


def test_spans_of_another_place_lie_in_those_of_this_one(pipe, remote):
    heard, parent, name = spans_of(pipe, remote)
    steps = [e for e in heard if e.name.startswith("step.")]
    assert len(steps) == 8
    for event in steps:
        assert (event.place, name[event.parent], parent[event.parent]) == ("calls", "stage", 0)
        assert event.sent <= event.seconds, "the Worker of this test has the same clock"
    assert {e.place for e in heard if e.name.startswith("stage.")} == {"here"}
    assert [e.sent for e in steps] == sorted(e.sent for e in steps)


def test_a_span_that_went_down_with_its_host_ends_once(pipe, remote):
    remote.channel.lose = [3]  # load.start, load.end, step.start
    heard, _, _ = spans_of(pipe, remote)
    failed = [e for e in heard if e.name.endswith(".fail")]
    assert [(e.name, e["error"], e["outcome"], e.place) for e in failed] == [("step.fail", "Lost", "failed", "calls")]
    assert [e.name for e in heard[heard.index(failed[0]) :]][:3] == ["step.fail", "place.retry", "step.start"]


def test_a_ctrl_c_elsewhere_ends_the_spans_there_and_here(pipe, remote):
    def press(event):
        if event.name == "step.start" and event["step"].index == 1:
            raise KeyboardInterrupt

    heard, _, _ = spans_of(pipe, remote, press)
    fails = [(e.name, e.place, e["outcome"]) for e in heard if e.name.endswith(".fail")]
    assert fails[-1] == ("stage.fail", "here", "interrupted")
    assert fails[:-1] in ([("step.fail", "calls", "interrupted")], [])


def test_events_are_heard_as_if_it_were_here(pipe, remote):
    def heard(places):
        names = []
        pipe.stages.run(begin(pipe), pipe.components, places=places,
                          events=ditkit.Events(lambda e: names.append(e.name)))  # fmt: skip
        return [n for n in names if not n.startswith(("load.", "place.", "travel"))]

    assert heard({"denoise": [Segment(remote)], "decode_latents": [Segment(remote)]}) == heard({})


@pytest.mark.parametrize(
    ("text", "kind", "address", "device"),
    [
        ("here", "here", None, None),
        ("cuda:1", "here", None, "cuda:1"),
        ("process", "process", None, None),
        ("process:cuda:1", "process", None, "cuda:1"),
        ("http://mac.local:8700/", "http", "http://mac.local:8700", None),
        ("https://box", "http", "https://box", None),
        ("ray", "ray", None, None),
        ("ray:cuda:0", "ray", None, "cuda:0"),
        ("ray://head:10001", "ray", "ray://head:10001", None),
    ],
)
def test_specs(text, kind, address, device):
    spec = Spec.parse(text)
    assert (spec.kind, spec.address, spec.device) == (kind, address, device)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "process:gpu",
        "mac.local:8700",
        "http://",
        "http://u:p@h:1",
        "http://h:x",
        "ray://h",
        "ftp://h",
        "http://h?x=1",
    ],
)
def test_bad_specs(text):
    with pytest.raises(SetupError):
        Spec.parse(text)


@pytest.mark.parametrize("text", ["http://user:verysecret@h:1", "ftp://verysecret@h", "https://verysecret@h/x?y"])
def test_a_password_is_not_shown(text):
    with pytest.raises(SetupError) as e:
        Spec.parse(text)
    assert "verysecret" not in str(e.value)


def test_targets():
    assert Target.parse("denoise") == Target("denoise")
    assert Target.parse("denoise@7") == Target("denoise", 7)
    assert Target.parse("denoise.transformer_2") == Target("denoise", None, "transformer_2")
    for bad in ("denoise@x", "@3", "denoise.vae"):
        with pytest.raises(SetupError):
            Target.parse(bad)


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ({"denoize": "here"}, "did you mean 'denoise'"),
        ({"encode_text@2": "here"}, "takes no steps"),
        ({"denoise.transformer_2": "here"}, "its model has transformer"),
        ({"denoise": "here", "denoise@0": "here"}, "two places begin at step 0"),
        ({"denoise@2": "here", "denoise@02": "here"}, "the same steps twice"),
    ],
)
def test_bad_placements(pipe, placement, message):
    with pytest.raises(SetupError, match=message):
        ditkit.load(pipe.setup.model, placement=placement)("x")


def test_devices_of_a_stage(pipe):
    assert ditkit.load(pipe.setup.model, placement={"decode_latents": "cpu"}).setup.devices == {"vae": "cpu"}
    with pytest.raises(SetupError, match="its vae is on cuda:1"):
        ditkit.load(pipe.setup.model, placement={"decode_latents": "cpu"}, devices={"vae": "cuda:1"})


def test_a_cache_tells_results_of_another_torch_from_those_of_this_one(pipe, remote, tmp_path):
    from ditkit.store.cache import Cache

    cache = Cache(tmp_path / "cache", 10**9)
    heard = []

    def run(places):
        events = ditkit.Events(lambda e: heard.append(e.name) if e.name.startswith("cache.") else None)
        pipe.stages.run(begin(pipe), pipe.components, places=places, results=cache, until="encode_text", events=events)

    run({"encode_text": [Segment(remote)]})
    run({})  # the same software: one result for both
    said = remote.description
    remote.described = {**said, "versions": {**said["versions"], "torch": "2.0.0"}}
    run({"encode_text": [Segment(remote)]})
    run({"encode_text": [Segment(remote)]})
    run({})
    assert heard == ["cache.miss", "cache.hit", "cache.miss", "cache.hit", "cache.hit"]


def test_a_host_that_is_not_there_at_first_is_asked_again(pipe, remote):
    ask, asked, heard = remote.channel.ask, [], []

    def late(question, name=""):
        asked.append(True)
        if len(asked) < 3:
            raise Lost("asking calls who it is", "it is not there", "Start it")
        return ask(question, name)

    remote.channel.ask = late
    events = ditkit.Events(lambda e: heard.append(e["attempt"]) if e.name == "place.retry" else None)
    places = {"encode_text": [Segment(remote)]}
    due = pipe.stages.stages
    Execution(due, begin(pipe), pipe.components, due, places=places, events=events).prepare()
    assert heard == [1, 2]
    asked.clear()
    remote.described, remote.retries = {}, 1
    with pytest.raises(PlaceError, match=r"it is not there \(2 times\)"):
        pipe.stages.run(begin(pipe), pipe.components, places=places)
