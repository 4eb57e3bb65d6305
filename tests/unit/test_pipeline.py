"""Stages and pipelines: composed, checked before anything runs, run in slices, stopped and gone on with bit for bit."""

import subprocess
import sys
from dataclasses import dataclass, field, replace

import pytest
import torch

import ditkit
from ditkit.contracts import Seams
from ditkit.errors import PipelineError, StateError
from ditkit.events import Events
from ditkit.execution.place import Interrupted
from ditkit.execution.stage import BaseStage
from ditkit.execution.stage_list import StageList
from ditkit.schedulers import make
from ditkit.stages.decode_latents import DecodeLatents
from ditkit.stages.denoise import Denoise
from ditkit.stages.encode import EncodeText
from ditkit.state import Field, State

PROMPT = "a red circle"


# --- small stages of our own


def number(name: str) -> Field:
    return Field(name, "plain", "float", "", "", "a test", "a number")


def grid(name: str, dtype: str = "float32", shape: str = "a b") -> Field:
    return Field(name, "tensor", dtype, shape, "", "a test", "numbers")


@dataclass(frozen=True)
class Make(BaseStage):
    """Writes ``a`` (and sometimes ``extra``)."""

    value: float = 1.0
    note: str = field(default="", compare=False)
    writes_extra: bool = field(default=False, compare=False)

    name = "make"
    reads = ("request",)
    writes = ("a",)
    may_write = ("extra",)
    fields = (number("a"), number("extra"))

    def run(self, inputs, ctx):
        return {"a": self.value * ctx.settings.shift} | ({"extra": 1.0} if self.writes_extra else {})


@dataclass(frozen=True)
class Double(BaseStage):
    source: str = "a"
    target: str = "b"

    @property
    def name(self):
        return f"{self.source}_to_{self.target}"

    @property
    def reads(self):
        return (self.source,)

    @property
    def writes(self):
        return (self.target,)

    @property
    def fields(self):
        return (number(self.source), number(self.target))

    def run(self, inputs, ctx):
        return {self.target: 2 * inputs[self.source]}


class WhenExtra(BaseStage):
    name = "when_extra"
    triggers = ("extra",)
    reads = ("extra",)
    writes = ("late",)
    fields = (number("extra"), number("late"))

    def run(self, inputs, ctx):
        return {"late": inputs["extra"] + 1}


def stage(name: str, run=lambda inputs, ctx: {}, **declared) -> BaseStage:
    """A stage with these declarations and this function."""
    return type(name, (BaseStage,), {"name": name, **declared, "run": lambda self, inputs, ctx: run(inputs, ctx)})()


def begin(**request) -> State:
    return State(
        {"prompt": ["x"], "negative_prompt": [""], "seed": [0], "request": {"shift": 3.0, "steps": 4, **request}}
    )


def listening() -> tuple[list[str], Events]:
    told: list[str] = []

    def listen(event):
        if event.name == "stage.end":
            told.append(event["stage"])
        if event.name == "stage.skipped":
            told.append(f"({event['stage']}: {event['reason']})")

    return told, Events(listen)


# --- composing


def test_insert_replace_remove():
    base = StageList([Make(), Double("b", "c")], given=("prompt", "negative_prompt", "seed", "request", "b"))
    longer = base.insert(Double(), after="make")
    assert longer.names == base.insert(Double(), before="b_to_c").names == ["make", "a_to_b", "b_to_c"]
    assert base.names == ["make", "b_to_c"]
    assert longer.run(begin(), {})["c"] == 12
    other = longer.replace("make", Make(5.0))
    assert other.run(begin(), {})["c"] == 60
    assert longer.run(begin(), {})["c"] == 12
    assert longer.remove("b_to_c").names == ["make", "a_to_b"]
    assert longer["a_to_b"] is longer.stages[1]
    assert (longer.given, other.given) == (base.given, base.given)
    with pytest.raises(AttributeError):
        base.stages = ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.insert(Double("b", "c"), before="mkae"), "did you mean 'make'"),
        (lambda p: p.insert(Double("b", "c")), "exactly one of before= and after="),
        (lambda p: p.insert(Double("b", "c"), before="make", after="make"), "exactly one of before= and after="),
        (lambda p: p.insert(Make(), after="make"), "another stage has that name"),
        (lambda p: p.insert(Double("c", "d"), after="make"), "reads 'c', which no stage before it writes"),
        (lambda p: p.insert(Double("b", "c"), before="a_to_b"), "reads 'b', which no stage before it writes"),
        (lambda p: p.replace("nothing", Make()), "there is none of that name"),
        (lambda p: p.remove("make"), "reads 'a', which no stage before it writes"),
        (lambda p: p.remove("make").remove("a_to_b"), "reads 'a'"),
        (lambda p: p["nothing"], "The stages are make, a_to_b"),
        (lambda p: p.run(begin(), {}, until="nothing"), "there is none of that name"),
        (lambda p: StageList([]), "it has no stages"),
        (lambda p: StageList([stage("s", reads=("latent",))]), r"describes .* 'latent' \(did you mean 'latents'"),
        (lambda p: StageList([stage("s", writes=("nwe",))]), "nobody describes its field 'nwe'"),
        (lambda p: StageList([stage("s", optional=("nwe",))]), "nobody describes its field 'nwe'"),
        (lambda p: StageList([stage("s", may_write=("nwe",))]), "nobody describes its field 'nwe'"),
        (lambda p: StageList([stage("s", fields=(grid("latents"),))]), "declares 'latents' as tensor float32"),
        (lambda p: p.insert(stage("s", fields=(grid("a"),)), after="make"), "but it is plain float"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_runs(change, message):
    with pytest.raises(PipelineError, match=message):
        change(StageList([Make(), Double()]))


def test_stages_that_can_never_run():
    with pytest.raises(PipelineError, match="it can never run: nothing before it writes its trigger 'extra'"):
        StageList([WhenExtra()])
    with pytest.raises(PipelineError, match="it can never run"):
        StageList([WhenExtra(), Make()])
    StageList([Make(), WhenExtra()])
    StageList([WhenExtra()], given=("extra",))
    needs_late = stage("needs_late", reads=("late",), fields=(number("late"),))
    with pytest.raises(PipelineError, match="reads 'late'"):  # it is written sometimes only
        StageList([Make(), WhenExtra(), needs_late])
    needs_extra = stage("needs_extra", reads=("extra",))
    with pytest.raises(PipelineError, match="reads 'extra'"):
        StageList([Make(), needs_extra])


# --- declarations are kept


@pytest.mark.parametrize(
    ("declared", "run", "message"),
    [
        ({}, lambda i, c: {"x": i["prompt"]}, "reads the field 'prompt': it did not declare that"),
        ({}, lambda i, c: {"x": i["a"]}, "reads the field 'a'"),
        ({}, lambda i, c: {"x": c.components["vae"]}, "reads the component 'vae': it did not declare that"),
        ({}, lambda i, c: {"x": 1.0, "video": 1}, "it wrote video undeclared"),
        ({}, lambda i, c: {}, "it did not write x"),
        ({}, lambda i, c: {"x": c.settings.shfit}, r"the request has no such setting \(did you mean 'shift'"),
        ({"components": ("vae",)}, lambda i, c: {"x": 1.0}, "there is no component vae"),
        ({"reads": ("a",)}, lambda i, c: {"x": i["seed"]}, "reads the field 'seed'"),
    ],
)
def test_declarations_are_enforced(declared, run, message):
    odd = stage("odd", run, writes=("x",), fields=(number("x"),), **declared)
    with pytest.raises(PipelineError, match=message):
        StageList([Make(), odd]).run(begin(), {})


def test_a_stage_sees_what_it_declared_and_no_more():
    def look(inputs, ctx):
        assert set(inputs) == {"seed", "a"}
        assert "prompt" not in inputs
        assert inputs.get("latents") is None
        assert set(ctx.components) == {"two"}
        with pytest.raises(AttributeError):
            ctx.settings.shift = 1
        with pytest.raises(TypeError):
            inputs["seed"] = [1]
        inputs["seed"].append(5)  # a copy
        return {"x": 1.0}

    looking = stage(
        "s", look, reads=("seed", "a"), optional=("latents",), writes=("x",), fields=(number("x"),), components=("two",)
    )
    after = StageList([Make(), looking]).run(begin(), {"one": object(), "two": object()})
    assert after["seed"] == [0]


def test_the_given_state_is_left_as_it_is():
    state = begin()
    StageList([Make(), Double()]).run(state, {})
    assert set(state) == {"prompt", "negative_prompt", "seed", "request"}


# --- running


def test_slices_skips_and_triggers():
    pipeline = StageList([Make(), WhenExtra(), Double()])
    told, events = listening()
    half = pipeline.run(begin(), {}, until="when_extra", events=events)
    assert told == ["make", "(when_extra: no extra)"]
    assert "b" not in half
    told.clear()
    whole = pipeline.run(half, {}, events=events)
    assert told == ["(make: already in the State)", "(when_extra: no extra)", "a_to_b"]
    assert whole["b"] == 6
    told.clear()
    pipeline.run(whole, {}, start="make", events=events)  # asked for, so it runs again
    assert told == ["make", "(when_extra: no extra)", "a_to_b"]
    with pytest.raises(PipelineError, match="the first comes after the last"):
        pipeline.run(whole, {}, start="a_to_b", until="make")
    told.clear()
    late = pipeline.replace("make", Make(writes_extra=True)).run(begin(), {}, events=events)
    assert (late["late"], told) == (2.0, ["make", "when_extra", "a_to_b"])
    with pytest.raises(PipelineError, match="the State has no a"):
        pipeline.run(begin(), {}, start="a_to_b")


def test_a_stage_that_writes_nothing_runs_once_all_the_same():
    """One that shows or sends something: nothing in the State tells that it is done, but its name does."""
    ran = []
    show = stage("show", lambda i, c: ran.append(i["a"]) or {}, reads=("a",))
    sometimes = stage("sometimes", lambda i, c: ran.append("s") or {}, may_write=("extra",))
    pipeline = StageList([Make(), show, sometimes])
    after = pipeline.run(begin(), {})
    assert ran == [3.0, "s"]
    pipeline.run(State.from_bytes(after.to_bytes()), {})
    assert ran == [3.0, "s"]
    pipeline.run(after, {}, start="show")
    assert ran == [3.0, "s", 3.0, "s"]


def test_a_stage_that_rewrites_a_field_runs_once():
    more = stage("more", lambda i, c: {"a": i["a"] + 1}, reads=("a",), writes=("a",))
    pipeline = StageList([Make(), more])
    assert pipeline.run(begin(), {})["a"] == 4
    stopped = pipeline.run(begin(), {}, until="make")
    finished = pipeline.run(State.from_bytes(stopped.to_bytes()), {})
    assert finished["a"] == 4
    assert pipeline.run(finished, {})["a"] == 4


def test_running_again_takes_back_what_came_after():
    pipeline = StageList([Make(), Double(), Double("b", "c")])
    whole = pipeline.run(begin(), {})
    other = pipeline.replace("make", Make(2.0)).run(whole, {}, start="make", until="make")
    assert set(whole) - set(other) == {"b", "c"}
    assert pipeline.run(other, {})["c"] == 24


def test_a_stage_by_itself(tiny_model):
    """The VAE's stage alone, on latents from anywhere; no other component is loaded."""
    pipe = ditkit.load(tiny_model)
    alone = StageList([DecodeLatents()], given=("latents", "request"))
    state = State({"latents": torch.zeros(1, 16, 2, 2, 3), "request": pipe.model.request({}).model_dump()})
    video = alone.run(state, pipe.components, debug=True)["video"]
    assert video.shape == (1, 5, 16, 24, 3)
    assert set(pipe.components.describe()) == {"vae"}


def test_an_extra_stage_in_the_real_pipeline(tiny_model):
    pipe = ditkit.load(tiny_model, debug=True)
    plain = pipe(PROMPT).state

    def gray(inputs, ctx):
        return {"video": inputs["video"].float().mean(-1, keepdim=True).expand(-1, -1, -1, -1, 3).to(torch.uint8)}

    pipe.stages = pipe.stages.insert(stage("gray", gray, reads=("video",), writes=("video",)), after="decode_latents")
    video = pipe(PROMPT).state["video"]
    assert torch.equal(video[..., 0], video[..., 1])
    assert torch.equal(video[..., 0], plain["video"].float().mean(-1).to(torch.uint8))
    pipe.stages = pipe.stages.remove("gray")
    assert torch.equal(pipe(PROMPT).state["video"], plain["video"])


# --- debug runs


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (torch.ones(2, 3, dtype=torch.float64), "it is float64"),
        (torch.ones(2, 3, dtype=torch.bfloat16), "it is bfloat16"),
        (torch.ones(2, 3, 1), r"it is float32 \[2, 3, 1\]"),
        (torch.ones(6), r"it is float32 \[6\]"),
        (torch.ones(2, 4), r"it must be float32 \[a 3\]"),
        ([1.0, 2.0], "it is a list"),
        ({"x": torch.ones(2, 3)}, "it is a dict"),
        (1.0, "it is a float"),
    ],
)
def test_a_wrong_value_is_caught_in_a_debug_run(written, message):
    odd = stage("odd", lambda i, c: {"x": written}, writes=("x",), fields=(grid("x", shape="a 3"),))
    with pytest.raises(PipelineError, match=f"stage 'odd' with field 'x': .*{message}"):
        StageList([odd]).run(begin(), {}, debug=True)
    StageList([odd]).run(begin(), {})  # unchecked


def test_debug_runs_compare_letters_and_look_at_inputs_too():
    def two(a, b):
        return stage("two", lambda i, c: {"x": torch.ones(*a), "y": torch.ones(*b)}, writes=("x", "y"),
                     fields=(grid("x"), grid("y", shape="b a")))  # fmt: skip

    assert StageList([two((2, 3), (3, 2))]).run(begin(), {}, debug=True)["y"].shape == (3, 2)
    with pytest.raises(PipelineError, match="field 'y'"):
        StageList([two((2, 3), (2, 3))]).run(begin(), {}, debug=True)
    reader = stage("reader", reads=("latents",))
    bad = State({"latents": torch.ones(1, 2, 3)})
    with pytest.raises(PipelineError, match="stage 'reader' with field 'latents'"):
        StageList([reader], given=("latents",)).run(bad, {}, debug=True)
    listed = stage("listed", lambda i, c: {"seed": torch.ones(1)}, writes=("seed",))
    with pytest.raises(PipelineError, match="stage 'listed' with field 'seed'"):
        StageList([listed]).run(begin(), {}, start="listed", debug=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_debug_run_of_the_real_pipeline_has_nothing_to_say(tiny_model, dtype):
    pipe = ditkit.load(tiny_model, dtype=dtype, debug=True)
    assert pipe(["red", "a blue circle"], steps=2, batched=True).state["video"].shape == (2, 5, 32, 32, 3)


# --- stopping and going on

SOLVERS = {
    "unipc": {}, "unipc 3": {"scheduler_options": {"order": 3}},
    "unipc bh1": {"scheduler_options": {"solver_type": "bh1"}},
    "dpm++": {}, "dpm++ 3": {"scheduler_options": {"order": 3}}, "dpm++_sde": {}, "euler": {},
}  # fmt: skip
STEPS = 5


def request_of(pipe, key: str, **more):
    return pipe.model.request(
        {"prompt": PROMPT, "seed": 7, "steps": STEPS, "scheduler": key.split()[0], **SOLVERS[key], **more}
    )


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return ditkit.load(tiny_model)


@pytest.mark.slow
@pytest.mark.parametrize("key", SOLVERS)
def test_going_on_after_every_step(pipe, tmp_path, key):
    whole = pipe.run(pipe.begin(request_of(pipe, key))).state
    for k in range(STEPS + 1):
        half = pipe.run(pipe.begin(request_of(pipe, key)), stop_at_step=k, until="denoise").state
        assert half["step"] == k
        assert "video" not in half
        loaded = State.load(half.save(tmp_path / f"{k}.safetensors"))
        again = pipe.run(loaded).state
        assert set(again) == set(whole)
        assert torch.equal(again["latents"], whole["latents"]), k
        assert torch.equal(again["video"], whole["video"]), k
        assert again["sigmas"] == whole["sigmas"]
        assert again["history"] == whole["history"] == {}
        assert again.fingerprints == whole.fingerprints, k


def test_going_on_step_by_step(pipe):
    whole = pipe.run(pipe.begin(request_of(pipe, "unipc 3"))).state
    state = pipe.begin(request_of(pipe, "unipc 3"))
    for k in range(1, STEPS + 1):
        state = State.from_bytes(pipe.run(state, stop_at_step=k).state.to_bytes())
        assert state["step"] == k
    assert torch.equal(state["video"], whole["video"])
    assert state.fingerprints == whole.fingerprints


@pytest.mark.slow
def test_going_on_in_a_new_process(pipe, tiny_model, tmp_path):
    whole = pipe.run(pipe.begin(request_of(pipe, "unipc"))).state
    half = pipe.run(pipe.begin(request_of(pipe, "unipc")), stop_at_step=2).state
    half.save(tmp_path / "half.safetensors")
    code = (
        "import sys, torch, ditkit; torch.set_num_threads(1); folder, model = sys.argv[1:];"
        "state = ditkit.State.load(f'{folder}/half.safetensors');"
        "ditkit.load(model).run(state).state.save(f'{folder}/whole.safetensors')"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path, tiny_model], check=True)
    assert (tmp_path / "whole.safetensors").read_bytes() == whole.to_bytes()


def test_where_a_stop_may_be(pipe):
    state = pipe.begin(request_of(pipe, "euler"))
    done = pipe.run(state, stop_at_step=STEPS + 3).state
    assert done["step"] == STEPS
    assert "video" in done
    half = pipe.run(state, stop_at_step=3).state
    assert pipe.run(half, stop_at_step=3).state["step"] == 3
    assert pipe.run(half, stop_at_step=1).state["step"] == 3  # what is done stays done
    with pytest.raises(PipelineError, match="stop_at_step=-1"):
        pipe.run(state, stop_at_step=-1)


@pytest.mark.slow
def test_a_ctrl_c_at_any_line_of_the_loop_loses_nothing(pipe):
    """KeyboardInterrupt before each line that the loop executes, wherever that is; the run then goes on."""
    request = request_of(pipe, "unipc", steps=3)
    whole = pipe.run(pipe.begin(request), until="denoise").state
    encoded = pipe.run(pipe.begin(request), until="encode_text").state
    reached = []
    for stop in range(1, 200):
        lines = 0

        def trace(frame, event, argument, stop=stop):
            nonlocal lines
            if frame.f_code is not Denoise.run.__code__:
                return None
            if event == "line":
                lines += 1
                if lines == stop:
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            pipe.run(encoded, until="denoise")
            break
        except Interrupted as e:
            kept = e.state
        finally:
            sys.settrace(before)
        reached.append(kept.get("step", -1))
        again = pipe.run(State.from_bytes(kept.to_bytes()), until="denoise").state
        assert torch.equal(again["latents"], whole["latents"]), f"line {stop}"
        assert again.fingerprints == whole.fingerprints, f"line {stop}"
    assert stop == lines + 1 > 15
    assert {-1, 0, 1, 2, 3} == set(reached)


@pytest.mark.parametrize(
    "changed", [{"steps": 3}, {"steps": 9}, {"shift": 3.0}, {"scheduler": "dpm++"}, {"convention": "diffusers"}]
)
def test_a_run_does_not_go_on_along_other_sigmas(pipe, changed):
    half = pipe.run(pipe.begin(request_of(pipe, "unipc")), stop_at_step=4).state
    other = half.with_fields({"request": {**half["request"], **changed}})
    with pytest.raises(StateError, match="going on"):
        pipe.run(other)


def test_a_run_does_not_go_on_with_other_weights_or_sizes(pipe, tiny_model):
    half = pipe.run(pipe.begin(request_of(pipe, "unipc")), stop_at_step=2).state
    with pytest.raises(StateError, match="begun with another transformer"):
        ditkit.load(tiny_model, dtype_policy="float32", dtype="bfloat16", dtypes={"text_encoder": "float32"}).run(half)
    with pytest.raises(StateError, match="its latents are"):
        pipe.run(half.with_fields({"request": {**half["request"], "width": 64}}))
    with pytest.raises(StateError, match="another model"):
        pipe.run(half.with_fields({"model": {"name": "other", "identity": "x"}}))


def test_noise_can_be_brought_along(pipe):
    """Latents without a step are where the run starts: the seed's own noise gives the same clip, other noise not."""
    from ditkit.schedulers.noise import initial_noise

    state = pipe.begin(request_of(pipe, "unipc"))
    expected = pipe.run(state, until="denoise").state["latents"]
    own = initial_noise(7, expected.shape[1:])[None]
    assert torch.equal(pipe.run(state.with_fields({"latents": own}), until="denoise").state["latents"], expected)
    assert not torch.equal(pipe.run(state.with_fields({"latents": -own}), until="denoise").state["latents"], expected)


# --- fingerprints


def prints(pipe, **request) -> dict[str, str]:
    return pipe(**{"prompt": PROMPT, "steps": 2, **request}).state.fingerprints


def differing(a: dict[str, str], b: dict[str, str]) -> set[str]:
    assert a.keys() == b.keys()
    return {name for name in a if a[name] != b[name]}


TEXT = {"prompt_embeds", "prompt_lengths", "negative_prompt_embeds", "negative_prompt_lengths"}
LOOP = {"latents", "sigmas", "step", "history"}


def test_equal_computations_have_equal_fingerprints(pipe, tiny_model):
    first = prints(pipe)
    assert first.keys() == TEXT | LOOP | {"video"}
    assert len(set(first.values())) == len(first)
    assert prints(pipe) == first
    assert prints(ditkit.load(tiny_model)) == first
    assert (
        prints(ditkit.load(tiny_model, threads=1, cache_text_kv=False, debug=True)) == first
    )  # settings of equal results


@pytest.mark.slow
@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"prompt": "blue"}, TEXT | LOOP | {"video"}),
        ({"negative_prompt": "blue"}, TEXT | LOOP | {"video"}),
        ({"max_sequence_length": 3}, TEXT | LOOP | {"video"}),
        ({"seed": 5}, LOOP | {"video"}),
        ({"width": 48}, LOOP | {"video"}),
        ({"steps": 3}, LOOP | {"video"}),
        ({"shift": 3.0}, LOOP | {"video"}),
        ({"scheduler": "euler"}, LOOP | {"video"}),
        ({"scheduler_options": {"order": 1}}, LOOP | {"video"}),
        ({"convention": "diffusers"}, LOOP | {"video"}),
        ({"guidance_scale": 4.0}, LOOP | {"video"}),
        ({"rounding": "diffusers"}, {"video"}),
        ({"fps": 30}, set()),
    ],
)
def test_what_a_setting_touches(pipe, request_, expected):
    """Exactly the fields whose stage read it, and those made from them. Whether there is guidance is read by the text
    stage too, how strong it is changes no embedding; the price is that a new strength encodes the text again."""
    found = differing(prints(pipe), prints(pipe, **request_))
    if "guidance_scale" in request_:
        found -= TEXT
    assert found == expected


@pytest.mark.slow
def test_options_and_weights_are_part_of_a_fingerprint(pipe, tiny_model):
    first = prints(pipe)
    assert differing(first, prints(ditkit.load(tiny_model, attention="dense"))) == LOOP | {"video"}
    assert differing(first, prints(ditkit.load(tiny_model, vae_frames_per_chunk=2))) == {"video"}
    assert differing(first, prints(ditkit.load(tiny_model, dtypes={"vae": "float64"}))) == {"video"}
    assert differing(first, prints(ditkit.load(tiny_model, dtypes={"transformer": "float64"}))) == LOOP | {"video"}
    assert differing(first, prints(ditkit.load(tiny_model, dtype_policy="diffusers"))) == LOOP | {"video"}
    assert differing(first, prints(ditkit.load(tiny_model, dtypes={"text_encoder": "float64"}))) == TEXT | LOOP | {
        "video"
    }


@pytest.mark.slow
def test_changed_weights_change_fingerprints(pipe, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    first = prints(pipe)
    for part, expected in (
        ("transformer", LOOP | {"video"}),
        ("vae", {"video"}),
        ("text_encoder", TEXT | LOOP | {"video"}),
    ):
        folder = tmp_path / part
        shutil.copytree(pipe.model.path, folder)
        assert prints(ditkit.load(folder)) == first  # where it lies does not matter
        (file,) = (folder / part).glob("*.safetensors")
        tensors = load_file(file)
        name = sorted(tensors)[0]
        tensors[name].view(-1)[0] += 1e-3
        save_file(tensors, file, {"format": "pt"})
        assert differing(first, prints(ditkit.load(folder))) == expected


def test_what_is_plugged_in_is_part_of_a_fingerprint(pipe):
    def plugged(seams):
        return prints(ditkit.Pipeline(pipe.model, pipe.setup, pipe.components, pipe.stages, seams))

    def louder(by):
        return lambda inner: lambda x, step: inner(x, step) * by

    first = prints(pipe)
    one, two = plugged(Seams(predict=(louder(1.1),))), plugged(Seams(predict=(louder(1.2),)))
    assert differing(first, one) == differing(first, two) == differing(one, two) == LOOP | {"video"}
    assert differing(first, plugged(Seams(scheduler=make("euler")))) == LOOP | {"video"}
    assert plugged(Seams()) == first


def test_a_stopped_run_has_fingerprints_of_its_own(pipe):
    request = request_of(pipe, "unipc")
    at = {k: pipe.run(pipe.begin(request), until="denoise", stop_at_step=k).state for k in (2, 3, STEPS)}
    assert len({s.fingerprints["latents"] for s in at.values()}) == 3
    further = pipe.run(at[2], stop_at_step=3, until="denoise").state
    assert further.fingerprints == at[3].fingerprints
    # Latents that somebody changed on the way are another computation.
    meddled = at[2].with_fields({"latents": at[2]["latents"] * 2})
    assert pipe.run(meddled, until="denoise").state.fingerprints["latents"] != at[STEPS].fingerprints["latents"]


def test_stage_names_versions_and_options_count():
    def result(*stages):
        return StageList([*stages]).run(begin(), {}).fingerprints

    class Newer(Make):
        version = 2

    base = result(Make(), Double())
    assert result(Make(note="only a note"), Double()) == base  # compare=False promises equal results
    for other in (Make(2.0), Newer()):
        assert differing(base, result(other, Double())) == {"a", "b"}
    again = StageList([Make(), Double()]).run(begin(steps=9), {}).fingerprints
    assert again == base  # a setting that nobody read
    assert StageList([Make(), Double()]).run(begin(shift=4.0), {}).fingerprints != base


def test_fields_from_outside_count_by_their_content(pipe):
    stop = pipe.run(pipe.begin(request_of(pipe, "unipc")), until="encode_text").state
    rows = stop["prompt_embeds"]
    final = pipe.run(stop, until="denoise").state.fingerprints["latents"]
    copied = stop.with_fields({"prompt_embeds": rows.clone()})
    other = stop.with_fields({"prompt_embeds": rows + 1e-6})
    assert "prompt_embeds" not in copied.fingerprints
    by_content = pipe.run(copied, until="denoise").state.fingerprints["latents"]
    assert by_content != final  # not known to be the same computation
    assert by_content == pipe.run(copied, until="denoise").state.fingerprints["latents"]
    assert by_content != pipe.run(other, until="denoise").state.fingerprints["latents"]


def test_the_real_stages_declare_what_they_use():
    """One place where a change of these declarations is noticed, because saved States and caches rest on them."""
    encode, denoise, decode = EncodeText(), Denoise(), DecodeLatents()
    assert encode.components == ("tokenizer", "text_encoder")
    assert denoise.components == ("transformer",)
    assert decode.components == ("vae",)
    assert set(denoise.loop) <= {*denoise.writes, *denoise.may_write}
    assert replace(denoise, cache_text_kv=False) == denoise  # promises equal results
    assert replace(denoise, attention="dense") != denoise
