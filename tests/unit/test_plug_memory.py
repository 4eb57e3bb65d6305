"""What plugs remember belongs to the run and to the State: cut anywhere, a run goes on to the same bits."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.remembering import FirstBlockCache, ForgetfulCache, Momentum, StaleAttention

import ditkit
from ditkit import Seams, State
from ditkit.errors import PipelineError, RequestError
from ditkit.seams import Memory, RunPlugs, plug_names

pytestmark = pytest.mark.slow  # together; each of them is not

JOB = {"prompt": "a red circle moving left on a black background", "seed": 7, "steps": 8, "guidance_scale": 4.0}
PLUGS = {
    "B": Seams(run_blocks=(FirstBlockCache(0.35),)),
    "A": Seams(predict=(Momentum(),)),
    "D": Seams(attend=(StaleAttention(),)),
    "A, B and D": Seams(predict=(Momentum(),), run_blocks=(FirstBlockCache(0.35),), attend=(StaleAttention(),)),
    "B twice": Seams(run_blocks=(FirstBlockCache(0.2), FirstBlockCache(0.35))),
}


@pytest.fixture(scope="module")
def plain():
    return ditkit.load("shapes")


def plugged(plain, seams: Seams):
    return ditkit.Pipeline(plain.model, plain.setup, plain.components, plain.stages, seams)


def begin(pipe, **more) -> State:
    return pipe.begin(pipe.model.request({**JOB, **more}))


def run(pipe, state=None, **how):
    return pipe.run(begin(pipe) if state is None else state, until="denoise", **how)


@pytest.fixture(scope="module")
def whole(plain):
    return {name: run(plugged(plain, seams)) for name, seams in PLUGS.items()}


def told(result, plug="FirstBlockCache"):
    return result.receipt["plugs"].get(plug, {})


@pytest.mark.parametrize("name", PLUGS)
def test_a_memory_changes_the_result(plain, whole, name):
    assert not torch.equal(whole[name].state["latents"], run(plain).state["latents"])


@pytest.mark.parametrize("name", PLUGS)
@pytest.mark.parametrize("cut", range(1, 8))
def test_cut_anywhere_it_goes_on_to_the_same_bits(plain, whole, tmp_path, name, cut):
    pipe = plugged(plain, PLUGS[name])
    half = run(pipe, stop_at_step=cut).state.save(tmp_path / "half.safetensors")
    again = run(pipe, State.load(half)).state
    assert again.equal(whole[name].state)
    assert again.fingerprints == whole[name].state.fingerprints


def test_cut_after_every_step(plain, whole):
    pipe, state = plugged(plain, PLUGS["A, B and D"]), None
    for step in range(1, 9):
        state = run(pipe, state, stop_at_step=step).state
        assert ("memory" in state) == (step < 8)
    assert state.equal(whole["A, B and D"].state)
    assert state.fingerprints == whole["A, B and D"].state.fingerprints


def test_in_another_process(plain, whole, tmp_path):
    run(plugged(plain, PLUGS["B"]), stop_at_step=3).state.save(tmp_path / "half.safetensors")
    code = (
        "import sys, ditkit; from tests.remembering import FirstBlockCache\n"
        "pipe = ditkit.load('shapes', seams=ditkit.Seams(run_blocks=(FirstBlockCache(0.35),)))\n"
        "pipe.run(ditkit.State.load(sys.argv[1]), until='denoise').state.save(sys.argv[2])"
    )
    root = Path(__file__).parents[2]
    path = os.pathsep.join((str(root), os.environ.get("PYTHONPATH", "")))
    files = [tmp_path / "half.safetensors", tmp_path / "whole.safetensors"]
    subprocess.run(
        [sys.executable, "-c", code, *map(str, files)], check=True, cwd=root, env={**os.environ, "PYTHONPATH": path}
    )
    there = State.load(files[1])
    assert there.equal(whole["B"].state)
    assert there.fingerprints == whole["B"].state.fingerprints


def test_a_memory_is_in_the_state_by_plug_expert_and_branch(plain):
    state = run(plugged(plain, PLUGS["B twice"]), stop_at_step=2).state
    owners = {name.partition("/")[0] for name in state["memory"]}
    assert owners == {f"run_blocks.{name}.transformer.{branch}" for name in ("FirstBlockCache", "FirstBlockCache-2")
                      for branch in ("cond", "uncond")}  # fmt: skip
    assert len(state.to_bytes()) > len(begin(plain).to_bytes())


def test_without_a_memory_nothing_is_added(plain):
    neutral = Seams(run_blocks=(lambda inner, run: inner,), predict=(lambda inner, run: inner,))
    state, bare = run(plugged(plain, neutral), stop_at_step=2).state, run(plain, stop_at_step=2).state
    assert "memory" not in state
    assert torch.equal(state["latents"], bare["latents"])


def test_decisions_stand_in_the_receipt(plain, whole):
    counts = told(whole["B"])
    assert counts["hit"] + counts["miss"] == 16
    assert counts["hit"] > 0
    never = run(plugged(plain, Seams(run_blocks=(FirstBlockCache(0.0),))))
    assert told(never) == {"miss": 16}
    assert torch.equal(never.state["latents"], run(plain).state["latents"])


def test_a_cut_run_decides_as_a_whole_one(plain, whole):
    pipe = plugged(plain, PLUGS["B"])
    half = run(pipe, stop_at_step=5)
    rest = run(pipe, half.state)
    assert {k: told(half)[k] + told(rest)[k] for k in ("hit", "miss")} == told(whole["B"])


def test_ctrl_c_within_a_step_keeps_what_was_remembered_before_it(plain, whole):
    pipe = plugged(plain, PLUGS["B"])

    def stop(event):
        if event.name == "plug" and event["step"].index == 4 and event["branch"] == "uncond":
            raise KeyboardInterrupt  # the conditional pass of this step has remembered already

    with pytest.raises(ditkit.Interrupted) as e:
        run(pipe, listeners=[stop])
    assert e.value.state["step"] == 4
    assert run(pipe, e.value.state).state.equal(whole["B"].state)


def test_a_state_is_not_written_to_by_a_run_that_goes_on(plain):
    pipe = plugged(plain, PLUGS["B"])
    half = run(pipe, stop_at_step=3).state
    before = {name: tensor.clone() for name, tensor in half["memory"].items()}
    run(pipe, half)
    assert all(torch.equal(tensor, before[name]) for name, tensor in half["memory"].items())


# --- nobody shares a memory


def test_two_threads(plain, whole):
    pipe, found = plugged(plain, PLUGS["A, B and D"]), {}

    def work(seed):
        found[seed] = run(pipe, begin(pipe, seed=seed)).state["latents"]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (7, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found[7], whole["A, B and D"].state["latents"])
    assert torch.equal(found[8], run(pipe, begin(pipe, seed=8)).state["latents"])


def test_two_clips_and_cuts_of_them(plain, whole):
    pipe = plugged(plain, PLUGS["B"])
    both = run(pipe, begin(pipe, seed=[7, 9])).state
    assert torch.equal(both["latents"][:1], whole["B"].state["latents"])
    half = State.from_bytes(run(pipe, begin(pipe, seed=[7, 9]), stop_at_step=3).state.to_bytes())
    assert {name.partition("/")[0] for name in half["memory"]} == {"clip0", "clip1"}
    assert torch.equal(run(pipe, half).state["latents"], both["latents"])


def test_a_batch_is_refused(plain):
    pipe = plugged(plain, PLUGS["B"])
    with pytest.raises(
        RequestError, match=r"a batch of 2 clips with run_blocks.FirstBlockCache.* Set batched to false"
    ):
        run(pipe, begin(pipe, seed=[7, 9], batched=True))


def test_two_experts(tmp_path):
    folder = tiny.write(tmp_path / "a14b", "t2v_a14b")
    seams = Seams(predict=(Momentum(),), run_blocks=(FirstBlockCache(0.5),))
    pipe = ditkit.load(folder, seams=seams)
    state = pipe.begin(pipe.model.request({"prompt": "a", "steps": 6, "width": 32, "height": 32, "frames": 5}))
    whole = run(pipe, state).state
    experts = [step.expert for step in pipe.steps(pipe.model.request({"prompt": "a", "steps": 6}))]
    assert set(experts) == {"transformer", "transformer_2"}
    for cut in range(1, 6):
        half = run(pipe, state, stop_at_step=cut).state
        assert {key.split(".")[2].partition("/")[0] for key in half["memory"]} == {*experts[:cut]}
        assert run(ditkit.load(folder, seams=seams), half).state.equal(whole)


# --- plugs that cannot save, and memories of plugs that are gone


def test_where_a_forgetful_plug_was_cut_is_in_the_fingerprint(plain):
    pipe = plugged(plain, Seams(run_blocks=(ForgetfulCache(0.35),)))
    whole, prints = run(pipe).state, set()
    for cut in (2, 4, 6):
        again = run(pipe, run(pipe, stop_at_step=cut).state).state
        prints.add(again.fingerprints["latents"])
    assert len({*prints, whole.fingerprints["latents"]}) == 4
    assert run(pipe).state.fingerprints == whole.fingerprints


def test_a_memory_of_nobody_is_dropped_and_told(plain):
    half = run(plugged(plain, PLUGS["B"]), stop_at_step=3).state
    heard = []
    rest = run(plain, half, listeners=[heard.append])
    assert [e["plug"] for e in heard if e.name == "memory.dropped"] == [
        f"run_blocks.FirstBlockCache.transformer.{branch}" for branch in ("cond", "uncond")
    ]
    assert "memory" not in rest.state


def test_what_a_memory_takes():
    memory = Memory("run_blocks.X.transformer.cond")
    with pytest.raises(PipelineError, match=r"remembering 'n' of run_blocks.X.transformer.cond: it is a int"):
        memory["n"] = 3
    memory["n"] = torch.tensor(3)
    assert ({**memory}, len(memory), "n" in memory) == ({"n": torch.tensor(3)}, 1, True)
    del memory["n"]
    assert [*memory] == []


@pytest.mark.parametrize(("name", "value", "said"), [
    (0, torch.zeros(1), "its name is a int"), ((1, "a"), torch.zeros(1), "its name is a tuple"),
    ("a", torch.zeros(2, dtype=torch.complex128), "a State holds no torch.complex128"),
    ("a", torch.eye(2).to_sparse(), "of layout torch.sparse_coo"), ("a", torch.zeros(2, device="meta"), "on meta"),
])  # fmt: skip
def test_what_a_state_cannot_hold_is_no_memory(name, value, said):
    with pytest.raises(PipelineError, match=said):
        Memory("A")[name] = value


def test_what_is_remembered_comes_back_as_it_was():
    """A view in its layout, as what is summed in another order is another sum; and by any name of a branch."""

    def plug(inner, run):
        seen.append({**run.memory})
        run.memory["m"] = torch.rand(3, 4).T
        return inner

    seen, plugs = [], RunPlugs()
    plugs.wrap(print, "run_blocks", [plug], "t", "cond:a/b%")
    remembered = plugs.remembered()
    assert [t.stride() for t in remembered.values()] == [(3, 1)]
    again = RunPlugs(remembered=remembered)
    for branch in ("cond:a", "cond:a_b%", "cond:a/b%"):
        again.wrap(print, "run_blocks", [plug], "t", branch)
    assert [[*memory] for memory in seen] == [[], [], [], ["m"]]


def test_settings_that_only_the_first_part_read_count(plain):
    """A stage is made again when one of them changes, wherever its loop was cut."""

    def early(predict, run):
        def around(model_input, step):
            return predict(model_input, step) * (run.settings.fps / 16 if step.index == 0 else 1)

        return around

    pipe = plugged(plain, Seams(predict=(early,)))
    whole, cut = run(pipe).state, run(pipe, run(pipe, stop_at_step=3).state).state
    assert cut["records"]["denoise"]["settings"] == whole["records"]["denoise"]["settings"]
    assert "fps" in cut["records"]["denoise"]["settings"]
    assert cut.equal(whole)


def test_wrappers_may_be_a_list(plain):
    neutral = Seams(predict=[lambda predict: predict], swaps=[])
    assert torch.equal(run(ditkit.load("shapes", seams=neutral), stop_at_step=1).state["latents"],
                       run(plain, stop_at_step=1).state["latents"])  # fmt: skip


def test_names_of_plugs():
    def one(inner): ...

    assert plug_names([FirstBlockCache(), FirstBlockCache(), one, Momentum]) == [
        "FirstBlockCache", "FirstBlockCache-2", "one", "Momentum",
    ]  # fmt: skip


def test_who_is_given_the_run():
    def two(inner, run):
        assert (run.seam, run.expert, run.branch) == ("attend", "transformer", "cond")
        return lambda: ("two", inner())

    def one(inner):
        return lambda: ("one", inner())

    def with_default(inner, scale=3):
        return lambda: (scale, inner())

    wrapped = RunPlugs().wrap(lambda: "x", "attend", (one, two, with_default), "transformer", "cond")
    assert wrapped() == ("one", ("two", (3, "x")))
