"""Several clips in one run: each is what it would be alone."""

import pytest
import torch
from reference import rel

import ditkit
from ditkit import samples
from ditkit.errors import RequestError
from ditkit.execution.place import Interrupted
from ditkit.execution.stage import BaseStage
from ditkit.schedulers.noise import initial_noise
from ditkit.state import Field, State

PROMPTS = ["a red circle", "a blue square moving left on gray", "a red circle"]
NEGATIVES = ["gray", "", "gray"]
SEEDS = [5, 0, 2**40 + 1]
SOLVERS = ["unipc", "dpm++", "dpm++_sde", "euler"]


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return ditkit.load(tiny_model)


def begin(pipe, **request) -> State:
    return pipe.begin(pipe.model.request(request))


def alone(pipe, i: int, **request) -> State:
    return pipe.run(begin(pipe, prompt=PROMPTS[i], negative_prompt=NEGATIVES[i], seed=SEEDS[i], **request)).state


def all_of_them(pipe, **request) -> State:
    return pipe.run(begin(pipe, prompt=PROMPTS, negative_prompt=NEGATIVES, seed=SEEDS, **request)).state


@pytest.mark.parametrize("scheduler", SOLVERS)
def test_one_after_the_other_is_bit_equal_to_alone(pipe, scheduler):
    together = all_of_them(pipe, scheduler=scheduler)
    assert together["prompt"] == PROMPTS
    assert together["seed"] == SEEDS
    for i, part in enumerate(samples.split(together)):
        expected = alone(pipe, i, scheduler=scheduler)
        for name in ("prompt_embeds", "negative_prompt_embeds", "latents", "video"):
            assert torch.equal(part[name], expected[name]), (i, name)
        for name in ("sigmas", "step", "prompt_lengths", "history"):
            assert part[name] == expected[name]


@pytest.mark.parametrize("scheduler", SOLVERS)
def test_a_batch_is_equal_up_to_rounding(pipe, scheduler):
    together = all_of_them(pipe, scheduler=scheduler, batched=True)
    assert together["video"].shape == (3, 5, 32, 32, 3)
    for i in range(3):
        expected = alone(pipe, i, scheduler=scheduler)
        assert rel(together["latents"][i : i + 1], expected["latents"]) <= 1e-5
        off = (together["video"][i].int() - expected["video"][0].int()).abs()
        assert off.max() <= 1
        assert off.float().mean() <= 1e-3


@pytest.mark.parametrize("batched", [False, True])
def test_each_draws_the_noise_that_it_draws_alone(pipe, batched):
    """The initial noise, and what an SDE scheduler adds, at any place in the batch."""
    for scheduler in ("unipc", "dpm++_sde"):
        for order in ([0, 1, 2], [2, 0, 1]):
            entered: list[torch.Tensor] = []
            state = begin(
                pipe, prompt="blue", seed=[SEEDS[i] for i in order], scheduler=scheduler, batched=batched, steps=2
            )
            listener = lambda e, entered=entered: entered.append(e["x"].clone()) if e.name == "prediction" else None  # noqa: E731
            pipe.run(state, until="denoise", listeners=[listener])
            first = entered[0] if batched else torch.cat(entered[::2])
            assert torch.equal(first, torch.stack([initial_noise(SEEDS[i], (16, 2, 4, 4)) for i in order]))


def test_equal_seeds_give_equal_clips_and_others_do_not(pipe):
    videos = pipe("blue", seed=[1, 2, 1]).videos
    assert (videos[0] == videos[2]).all()
    assert (videos[0] != videos[1]).any()


def test_a_neighbour_changes_nothing(pipe):
    """The longest prompt of a batch does not pad, mask or scale the others."""
    short, long = "red", "a red green blue circle square triangle moving left right up down on black gray background"
    one = all_latents(pipe, [short, "blue"], [1, 2])
    other = all_latents(pipe, [short, long], [1, 99])
    assert rel(one[:1], other[:1]) <= 1e-5


def all_latents(pipe, prompts, seeds) -> torch.Tensor:
    return pipe.run(begin(pipe, prompt=prompts, seed=seeds, batched=True), until="denoise").state["latents"]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("scheduler", SOLVERS)
def test_going_on_with_several_clips(pipe, scheduler, batched):
    whole = all_of_them(pipe, scheduler=scheduler, batched=batched)
    for k in (0, 1, 3):
        state = begin(pipe, prompt=PROMPTS, negative_prompt=NEGATIVES, seed=SEEDS, scheduler=scheduler, batched=batched)
        half = pipe.run(state, stop_at_step=k).state
        assert half["step"] == k
        assert half["latents"].shape[0] == 3
        again = pipe.run(State.from_bytes(half.to_bytes())).state
        assert torch.equal(again["latents"], whole["latents"]), k
        assert torch.equal(again["video"], whole["video"]), k
        assert again.fingerprints == whole.fingerprints, k
        assert again["records"] == whole["records"], k
    through = pipe.run(State.from_bytes(whole.to_bytes())).state
    assert through.equal(whole)
    assert through.fingerprints == whole.fingerprints
    for k in (1, 2, 3):
        state = pipe.run(State.from_bytes(state.to_bytes()), stop_at_step=k).state
    assert pipe.run(state).state.fingerprints == whole.fingerprints, "in four parts"


@pytest.mark.parametrize("until", ["encode_text", "denoise"])
def test_slices_of_several_clips_have_the_fingerprints_of_the_whole(pipe, until):
    whole = all_of_them(pipe)
    half = pipe.run(begin(pipe, prompt=PROMPTS, negative_prompt=NEGATIVES, seed=SEEDS), until=until).state
    again = pipe.run(half).state
    assert again.equal(whole)
    assert again.fingerprints == whole.fingerprints


class Some:
    """Remembers something in clips of an even seed only."""

    def __call__(self, predict, run):
        def around(x, step):
            if step.index == 1 and x.flatten()[0] > 0:
                run.memory["seen"] = x[:, :1]
            return predict(x, step) * (0.9 if "seen" in run.memory else 1.0)

        return around

    fingerprint = "some"


def test_a_memory_that_only_some_clips_have(tiny_model):
    pipe = ditkit.load(tiny_model, seams=ditkit.Seams(predict=(Some(),)))
    state = begin(pipe, prompt="a red circle", seed=[*range(6)])
    whole, halves = pipe.run(state).state, set()
    for k in (1, 2, 3):
        half = pipe.run(state, stop_at_step=k).state
        halves.add(len(half.get("memory", {})))
        again = pipe.run(State.from_bytes(half.to_bytes())).state
        assert again.equal(whole), k
        assert again.fingerprints == whole.fingerprints, k
    assert halves - {0, 6}, "some of them remember and others do not"


def test_an_interrupted_series_keeps_what_is_finished(pipe):
    def stop(event):
        clips.append(event.name) if event.name == "clip" else None
        if event.name == "prediction" and len(clips) == 2 and event["step"].index == 2:
            raise KeyboardInterrupt

    clips: list[str] = []
    with pytest.raises(Interrupted) as error:
        pipe.run(begin(pipe, prompt=PROMPTS, negative_prompt=NEGATIVES, seed=SEEDS), listeners=[stop])
    (finished,) = error.value.finished
    assert torch.equal(finished["video"], alone(pipe, 0)["video"])
    half = error.value.state
    assert (half["seed"], half["step"]) == ([SEEDS[1]], 2)
    assert torch.equal(pipe.run(half).state["video"], alone(pipe, 1)["video"])


def test_split_and_join_are_inverse(pipe):
    for state in (
        all_of_them(pipe, steps=2),
        pipe.run(begin(pipe, prompt=PROMPTS, seed=SEEDS, batched=True), stop_at_step=2).state,
        pipe.run(begin(pipe, prompt=PROMPTS, seed=SEEDS), until="encode_text").state,
        begin(pipe, prompt=PROMPTS),
    ):
        back = samples.join(samples.split(state))
        assert State(dict(back.without("records"))).to_bytes() == State(dict(state.without("records"))).to_bytes()
        assert [s.name for s in pipe.stages.stages if pipe.stages.outdated(s, back)] == []
        assert set(back.fingerprints) == set(state.fingerprints), "what has a fingerprint keeps one"
        once_more = samples.join(samples.split(back))
        assert once_more.fingerprints == back.fingerprints
        assert once_more.equal(back)
        assert samples.count(state) == len(samples.split(state)) == 3


def test_one_value_serves_for_all_and_lengths_must_agree(pipe):
    state = begin(pipe, prompt="blue", seed=[1, 2, 3])
    assert (state["prompt"], state["negative_prompt"], state["seed"]) == (["blue"] * 3, [""] * 3, [1, 2, 3])
    assert begin(pipe, prompt=["blue"], seed=[1, 2])["prompt"] == ["blue"] * 2
    for wrong in (
        {"prompt": ["a", "b"], "seed": [1, 2, 3]},
        {"prompt": ["a", "b"], "negative_prompt": ["a", "b", "c"]},
    ):
        with pytest.raises(RequestError, match="the lengths differ"):
            begin(pipe, **wrong)
    for empty in ({"prompt": []}, {"prompt": "a", "seed": []}):
        with pytest.raises(RequestError, match="the list is empty"):
            begin(pipe, **empty)
    with pytest.raises(RequestError, match="negative_prompt"):
        begin(pipe, prompt="a", negative_prompt=[])


def test_equal_prompts_are_encoded_once(pipe):
    calls = []
    hook = pipe.components["text_encoder"].model.register_forward_hook(lambda *_: calls.append(1))
    try:
        pipe.run(begin(pipe, prompt=PROMPTS, negative_prompt=NEGATIVES, seed=SEEDS), until="encode_text")
    finally:
        hook.remove()
    assert len(calls) == 4  # two prompts and two negative ones


class Counts(BaseStage):
    """Counts the letters of each prompt."""

    name = "counts"
    reads = ("prompt",)
    writes = ("letters",)
    fields = (Field("letters", "plain", "list[int]", "B", "", "a test", "how many"),)

    def run(self, inputs, ctx):
        return {"letters": [len(prompt) for prompt in inputs["prompt"]]}


class Shouts(BaseStage):
    """Rewrites what the text stage reads."""

    name = "shouts"
    reads = ("prompt",)
    writes = ("prompt",)

    def run(self, inputs, ctx):
        return {"prompt": [prompt.upper() for prompt in inputs["prompt"]]}


@pytest.mark.parametrize(
    ("stage", "ran"),
    [
        (Counts(), ["encode_text", *3 * ["counts", "denoise", "decode_latents"]]),
        (Shouts(), 3 * ["shouts", "encode_text", "denoise", "decode_latents"]),
    ],
)
def test_a_stage_in_front_does_not_change_what_clips_share(tiny_model, stage, ran):
    """Text is encoded once for all clips, unless the stage makes another text for each."""
    started = []
    pipe = ditkit.load(tiny_model, listeners=[lambda e: started.append(e["stage"]) if e.name == "stage.start" else 0])
    pipe.stages = pipe.stages.insert(stage, before="encode_text")
    together = all_of_them(pipe)
    assert started == ran
    assert together.get("letters", [12, 33, 12]) == [12, 33, 12]
    for i, part in enumerate(samples.split(together, pipe.stages.table)):
        assert torch.equal(part["video"], alone(pipe, i)["video"])


def test_parts_of_a_run_whose_clips_share_a_later_stage(tiny_model):
    pipe = ditkit.load(tiny_model)
    pipe.stages = pipe.stages.insert(Counts(), before="encode_text")
    whole, state = all_of_them(pipe), begin(pipe, prompt=PROMPTS, negative_prompt=NEGATIVES, seed=SEEDS)
    text = pipe.run(state, until="encode_text").state
    assert text["letters"] == [12, 33, 12]
    assert pipe.run(text).state["video"].equal(whole["video"])
    assert pipe.run(text, start="encode_text").state["video"].equal(whole["video"])
    assert pipe.run(whole, start="counts").state["video"].equal(whole["video"])
