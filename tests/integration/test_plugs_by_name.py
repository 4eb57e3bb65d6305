"""Plugs and stages by name: from the command line, in child processes, at hosts, in replays and kept runs; and that no
clip, run or job starts code because it names it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shell import alone

import ditkit
from ditkit import media, replay
from ditkit.contracts import Seams
from ditkit.errors import PlaceError, SetupError, StateError

FILES = Path(__file__).parents[1] / "plugs"
PROMPT = "a red circle"
pytestmark = pytest.mark.usefixtures("forgotten")
TOKEN = "a-token-of-a-test-0123456789"
OUT = ("--out", "a.npz", "--no-sheet", "--quiet")


@pytest.fixture
def mine(tmp_path) -> Path:
    shutil.copy(FILES / "my_rows.py", tmp_path)
    return Path(shutil.copy(FILES / "my_plugs.py", tmp_path))


@pytest.fixture
def evil(tmp_path) -> Path:
    """Code that leaves a trace where it runs."""
    file = tmp_path / "evil.py"
    file.write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\ndef plug(inner):\n    return inner\nplug.seam = 'predict'\n"
    )
    return file


def edited(file: Path) -> None:
    file.write_text(file.read_text() + "\n# edited\n")


def clip(call, model, *words) -> Path:
    said = call("generate", PROMPT, "--model", model, "--seed", 3, "--steps", 2, *OUT, *words)
    assert said.code == 0, said.err
    return Path("a.npz")


# --- elsewhere

SETS = {
    "wrappers": (["{0}:Skip:block=0", "{0}:Interval:low=0.5", "{0}:softer"], {}, {}),
    "scheduler": (["{0}:Renoise:strength=0.5", "{0}:Sharpness:offset=1"], {}, {"sharpness": {"amount": 3}}),
    "rows": (["{1}", "louder:factor=1.5"], {"attention": "halved"}, {"scheduler": "twice"}),
}


def run(model, plugs, mine, request, listeners=(), **setup):
    texts = [text.format(mine, mine.with_name("my_rows.py")) for text in plugs]
    return ditkit.load(model, plugs=texts, threads=1, listeners=listeners, **setup)(PROMPT, seed=3, **request)


def same(one, two) -> None:
    assert one.state.equal(two.state)
    assert one.state.fingerprints == two.state.fingerprints
    assert one.state["records"] == two.state["records"]


@pytest.mark.parametrize("which", SETS)
def test_a_child_process_has_the_same_plugs(tiny_model, mine, which):
    plugs, setup, request = SETS[which]
    here = run(tiny_model, plugs, mine, request, **setup)
    placement = dict.fromkeys(("denoise", *({"sharpness", "count"} & set(here.state["stages"]))), "process")
    there = run(tiny_model, plugs, mine, request, placement=placement, **setup)
    same(there, here)
    assert there.receipt["places"]["denoise"] == ["process"]
    assert set(placement) == {stage for stage, places in there.receipt["places"].items() if places == ["process"]}


def test_a_swap_is_made_in_the_child_too(tiny_model, mine):
    here = run(tiny_model, ["{0}:Damped:by=0.25"], mine, {})
    there = run(tiny_model, ["{0}:Damped:by=0.25"], mine, {}, placement={"denoise": "process"})
    same(there, here)
    assert not torch.equal(here.state["latents"], run(tiny_model, [], mine, {}).state["latents"])


TEXT_SWAP = """
from dataclasses import dataclass
from torch import nn

class Louder(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
    def forward(self, *args, **more):
        return self.inner(*args, **more) * 1.5

@dataclass(frozen=True)
class Text:
    seam = "swap"
    components = ("text_encoder",)
    def match(self, name, module):
        return name.endswith("layer.1.DenseReluDense")
    def make(self, module):
        return Louder(module)
"""


@pytest.mark.parametrize("stage", ["encode_text", "denoise", "decode_latents"])
def test_a_swap_by_name_forbids_no_child(tiny_model, mine, tmp_path, stage):
    """It is made where its component is, and nowhere else is it missed."""
    (tmp_path / "text_swap.py").write_text(TEXT_SWAP)
    plugs = [f"{tmp_path / 'text_swap.py'}:Text", f"{mine}:Damped:by=0.25"]
    here = ditkit.load(tiny_model, plugs=plugs, threads=1)(PROMPT, seed=3)
    there = ditkit.load(tiny_model, plugs=plugs, threads=1, placement={stage: "process"})
    same(there(PROMPT, seed=3), here)
    bare = ditkit.load(tiny_model, threads=1)(PROMPT, seed=3)
    assert not torch.equal(here.state["prompt_embeds"], bare.state["prompt_embeds"])


def test_a_child_does_not_take_a_file_that_was_edited_meanwhile(tiny_model, mine):
    pipe = ditkit.load(tiny_model, plugs=[f"{mine}:Skip"], threads=1, placement={"denoise": "process"})
    edited(mine)
    with pytest.raises(SetupError, match=r"bringing .*my_plugs.py .*: its sha256 is .*, and .* is asked for"):
        pipe(PROMPT, seed=3)


def test_python_objects_stay_here(tiny_model, mine):
    heard = []
    pipe = ditkit.load(tiny_model, plugs=[f"{mine}:Skip"], seams=Seams(predict=(lambda predict: predict,)),
                       placement={"denoise": "process"}, threads=1, listeners=[heard.append])  # fmt: skip
    with pytest.raises(PlaceError, match="predict, run_blocks is changed here by Python objects, which do not travel"):
        pipe(PROMPT, seed=3)
    assert "step.start" not in [event.name for event in heard]


def started(model, *words):
    command = [sys.executable, "-m", "ditkit", "host", "--model", model, "--port", "0", "--threads", "1", "--lazy"]
    process = subprocess.Popen(
        [*map(str, (*command, *words))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**alone(), "DITKIT_HOST_TOKEN": TOKEN},
    )  # fmt: skip
    line = process.stdout.readline()
    if not line:
        raise AssertionError(process.communicate()[1])
    return process, line.split()[0]


@pytest.fixture(scope="module")
def host(tiny_model, tmp_path_factory):
    """It was started with the same files, which lie elsewhere there."""
    folder = tmp_path_factory.mktemp("host")
    files = [shutil.copy(FILES / name, folder) for name in ("my_plugs.py", "my_rows.py")]
    process, url = started(tiny_model, "--plug", f"{files[0]}:Sharpness", "--plug", files[1])
    yield url
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


@pytest.fixture(scope="module")
def bare_host(tiny_model, tmp_path_factory):
    """It knows another file of that name."""
    file = Path(shutil.copy(FILES / "my_plugs.py", tmp_path_factory.mktemp("bare")))
    edited(file)
    process, url = started(tiny_model, "--plug", f"{file}:Skip")
    yield url
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("DITKIT_HOST_TOKEN", TOKEN)


@pytest.mark.parametrize("which", SETS)
def test_a_host_makes_the_plugs_that_a_job_names(tiny_model, mine, host, token, which):
    plugs, setup, request = SETS[which]
    here = run(tiny_model, plugs, mine, request, **setup)
    stages = ("denoise", *({"sharpness", "count"} & set(here.state["stages"])))
    there = run(tiny_model, plugs, mine, request, placement=dict.fromkeys(stages, host), **setup)
    same(there, here)
    assert all(there.receipt["places"][stage] == [host] for stage in stages)


@pytest.mark.parametrize(
    ("which", "found"),
    [
        ("wrappers", "its my_plugs.py is other code"),
        ("scheduler", "its my_plugs.py is other code"),
        ("rows", "it does not know louder"),
    ],
)
def test_a_host_without_that_code_is_found_before_anything_is_computed(
    tiny_model, mine, bare_host, token, which, found
):
    plugs, setup, request = SETS[which]
    heard = []
    with pytest.raises(
        PlaceError,
        match=f"'denoise' at .*: {found}. Start it with the same file, and what that imports: ditkit host --plug",
    ):
        run(tiny_model, plugs, mine, request, [heard.append], placement={"denoise": bare_host}, **setup)
    assert not [event for event in heard if event.name == "stage.start"]


@pytest.mark.parametrize(
    ("text", "setup", "request_", "found"),
    [
        ("{1}:KERNEL", {"attention": "halved"}, {}, "it does not know halved"),
        ("{1}:TWICE", {}, {"scheduler": "twice"}, "it does not know twice"),
    ],
)
def test_a_host_without_the_kernel_or_the_scheduler(tiny_model, mine, bare_host, token, text, setup, request_, found):
    with pytest.raises(PlaceError, match=found):
        run(tiny_model, [text], mine, request_, placement={"denoise": bare_host}, **setup)


def test_a_stage_that_a_host_does_not_offer(tiny_model, mine, bare_host, token):
    with pytest.raises(PlaceError, match=r"running stage 'sharpness' at .*: it offers encode_text, denoise, decode"):
        run(tiny_model, ["{0}:Sharpness"], mine, {}, placement={"sharpness": bare_host})


def test_a_swap_is_the_hosts_own_matter(tiny_model, mine, host):
    with pytest.raises(SetupError, match=r"plugs with 'Damped': what it concerns is at http.*, where nobody heeds it"):
        ditkit.load(tiny_model, plugs=[f"{mine}:Damped"], placement={"denoise": host})


def test_a_model_of_a_host_and_a_stage_that_is_only_here(mine, host, token):
    pipe = ditkit.load(host, plugs=[f"{mine}:Sharpness", f"{mine}:Skip"])
    result = pipe(PROMPT, seed=3, sharpness={"amount": 2})
    assert result.receipt["places"]["denoise"] == [host]
    assert result.receipt["places"]["sharpness"] == ["here"]


# --- the command line


def test_plugs_by_flag_environment_and_config(call, model, mine, tmp_path, monkeypatch):
    plain = media.read_manifest(clip(call, model))["output_sha256"]
    words = ["--plug", f"{mine}:Skip:block=0", "--plug", f"{mine}:Sharpness", "--set", "sharpness.amount=3"]
    by_flag = media.read_manifest(clip(call, model, *words))
    assert by_flag["output_sha256"] != plain
    assert by_flag["pipeline"][-1] == "sharpness"
    assert [(p["plug"], len(p["sha256"]), p["path"]) for p in by_flag["plugged"]] == [
        ("my_plugs.py:Skip:block=0", 64, str(mine)), ("my_plugs.py:Sharpness", 64, str(mine))
    ]  # fmt: skip
    assert by_flag["request"]["stage_settings"] == {"sharpness": {"amount": 3.0, "mode": "mean"}}
    (tmp_path / "c.toml").write_text(
        f"plugs = ['my_plugs.py:Skip:block=0', '{mine}:Sharpness']\n[stage_settings.sharpness]\namount = 3\n"
    )
    by_file = media.read_manifest(clip(call, model, "--config", "c.toml"))
    monkeypatch.setenv("DITKIT_PLUGS", f"['{mine}:Skip:block=0', '{mine}:Sharpness']")
    by_environment = media.read_manifest(clip(call, model, "--stage-settings", "sharpness.amount=3"))
    for other in (by_file, by_environment):
        assert {k: other[k] for k in ("seams", "plugged", "request", "output_sha256")} == {
            k: by_flag[k] for k in ("seams", "plugged", "request", "output_sha256")
        }


def test_commands_that_only_look(call, model, mine, tmp_path):
    stages = call("stages", "--model", model, "--plug", f"{mine}:Sharpness")
    assert "sharpness\n  reads  video request" in stages.out
    plan = call("plan", PROMPT, "--model", model, "--plug", f"{mine}:Sharpness", "--plug", f"{mine}:Skip")
    assert "sharpness" in plan.out
    known = call("plugs", "--plug", tmp_path / "my_rows.py")
    assert known.code == 0
    for row in ("plug              louder", "stage             count", "attention kernel  halved",
                "scheduler         twice", "task              short"):  # fmt: skip
        assert row in known.out
    for command in (["inspect", model], ["convert", model, "made", "--layout", "native", "--quiet"]):
        assert call(*command, "--plug", "nowhere.py").err.startswith("error: bringing nowhere.py: no such file")
        assert call(*command, "--plug", tmp_path / "my_rows.py").code == 0
    explained = call("config", "explain", "sharpness.amount", "--model", model, "--plug", f"{mine}:Sharpness",
                     "--set", "sharpness.amount=3")  # fmt: skip
    assert explained.out.splitlines()[1:] == [
        "sharpness.amount  1.0    default (stage sharpness)", "sharpness.amount  3      --set sharpness.amount"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--plug", "halve"], "the plug 'halve': there is none of that name. Bring it: FILE.py:NAME"),
        (["--plug", "a b"], "plugs=['a b'] (flag --plug): 'a b' has none of the forms of a plug"),
        (
            ["--plug", "my_plugs.py:Skip:blok=1"],
            "option 'blok' of the plug 'Skip': there is none of that name (did you",
        ),
        (["--plug", "my_plugs.py:Sharpness", "--set", "sharpness.amunt=1"], "option 'amunt' of the settings of stage"),
        (
            ["--set", "sharpness.amount=1"],
            "the setting sharpness.amount: no stage 'sharpness' with settings is in this",
        ),
        (["--set", "devces.vae=cpu"], "no stage 'devces' with settings is in this pipeline (did you mean 'devices'?)"),
        (["--set", "sharpness.amount=1", "--set", "sharpness.amount=2"], "it was given before"),
        (["--attention", "flash"], "the attention kernel 'flash': there is none of that name"),
        (["--plug", "my_plugs.py:Renoise", "--scheduler", "euler"], "the plug 'renoise' is the scheduler of this run"),
    ],
)
def test_a_mistake_is_one_sentence(call, model, mine, words, said):
    found = call("generate", PROMPT, "--model", model, *OUT, *words)
    assert found.code == 2
    assert said in found.err
    assert found.err.count("\n") == 1


def test_a_fault_in_a_plug_of_a_child_process_says_whose_it_is(model):
    plugs = [f"{Path(__file__).parents[1] / 'plugs' / 'broken.py'}:NotRun"]
    pipe = ditkit.load(model, plugs=plugs, placement={"denoise": "process:cpu"})
    said = r"running stage 'denoise' with broken.py:NotRun plugged in \(at process:cpu\): it failed with KeyError"
    with pytest.raises(PlaceError, match=said):
        pipe(PROMPT, steps=2)
    pipe.places.close()


# --- replay


def test_a_clip_starts_no_code_and_replays_once_somebody_names_it(call, model, mine, tmp_path):
    words = ["--plug", f"{mine}:Skip:block=0", "--plug", f"{mine}:Sharpness", "--set", "sharpness.amount=2"]
    made = clip(call, model, *words)
    refused = call("replay", made)
    assert refused.code == 2
    assert refused.err == (
        f"error: replaying a.npz: it was made with {mine}:Skip:block=0, code that a clip may not start. "
        f"If you trust it, name it: --plug {mine}.\n"
    )
    for plug in (mine, f"{mine}:Skip:block=0"):
        said = call("replay", made, "--plug", plug, "--quiet")
        assert (said.code, said.err) == (0, "")
    (tmp_path / "moved").mkdir()
    moved = mine.rename(tmp_path / "moved" / mine.name)
    assert call("replay", made, "--plug", moved).code == 0
    idle = call("replay", made, "--plug", moved, "--plug", "my_rows.py")
    assert "replaying a.npz with --plug my_rows.py: it was made without that" in idle.err
    edited(moved)
    told = call("replay", made, "--plug", moved)
    assert told.code == 0, "the same bits"
    assert told.err == (
        "note: the code of my_plugs.py:Skip:block=0 is not what it was\n"
        "note: the code of my_plugs.py:Sharpness is not what it was\n"
    )
    moved.write_text(moved.read_text().replace("i != self.block", "i == self.block"))
    other = call("replay", made, "--plug", moved)
    assert other.code == 1
    assert "the code of my_plugs.py:Skip:block=0 is not what it was" in other.out


def test_two_files_of_one_name_replay_each_as_its_own(call, model, tmp_path):
    body = "class P:\n    seam = 'predict'\n    def __call__(self, f): return lambda x, step: f(x, step) * {}\n"
    for folder, factor in (("a", 0.9), ("b", 1.2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "p.py").write_text(body.format(factor))
    made = clip(call, model, "--plug", "a/p.py:P", "--plug", "b/p.py:P")
    for words in (("a/p.py", "b/p.py"), ("b/p.py", "a/p.py")):
        said = call("replay", made, "--plug", words[0], "--plug", words[1], "--quiet")
        assert (said.code, said.err) == (0, "")
    said = call("replay", made, "--plug", "b/p.py")
    assert f"{tmp_path}/a/p.py:P is another file than b/p.py. Name it too: --plug {tmp_path}/a/p.py" in said.err
    (tmp_path / "b" / "p.py").write_text(body.format(1.3))
    said = call("replay", made, "--plug", "b/p.py", "--plug", "a/p.py", "--quiet")
    assert said.code == 1
    assert "the code of p.py:P is not what it was" in said.out


def test_registered_names_replay_as_they_are(call, model, mine):
    made = clip(call, model, "--plug", "my_rows.py", "--plug", "louder:factor=1.5", "--attention", "halved",
                "--scheduler", "twice")  # fmt: skip
    assert "code that a clip may not start" in call("replay", made).err
    assert call("replay", made, "--plug", "my_rows.py").code == 0


@pytest.mark.parametrize("named", ["{}:plug", "{}", "evil:plug", "evil.sub"])
def test_a_clip_that_names_code(call, model, evil, tmp_path, monkeypatch, named):
    monkeypatch.syspath_prepend(tmp_path)
    made = clip(call, model)
    card = json.loads(Path("a.json").read_text())
    card["manifest"]["setup"]["plugs"] = [named.format(evil)]
    Path("a.json").write_text(json.dumps(card))
    said = call("replay", "a.json")
    assert said.code == 2
    assert "code that a clip may not start" in said.err
    with pytest.raises(StateError, match="code that a clip may not start"):
        replay.prepare(replay.read("a.json"))
    assert not (tmp_path / "ran").exists()
    assert made.exists()


def test_what_was_given_from_python_is_not_replayed(call, model, mine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = ditkit.load(model, plugs=[f"{mine}:Skip"], seams=Seams(predict=(lambda predict: predict,)))
    pipe(PROMPT, seed=3, steps=2).save("a.npz")
    with pytest.raises(StateError, match=r"its seams held \{'predict': .*, and now they hold \{'run_blocks'"):
        replay.prepare(replay.read("a.npz"), plugs=[str(mine)])


# --- kept runs


def test_a_kept_run_goes_on_once_its_plugs_are_named(call, model, mine, tmp_path):
    words = ["--model", model, "--seed", 3, "--no-sheet", "--quiet"]
    plugs = ["--plug", "my_plugs.py:Skip:block=0", "--plug", "my_plugs.py:Sharpness", "--set", "sharpness.amount=2"]
    whole = media.read_manifest(_whole(call, words, plugs))
    said = call("run", PROMPT, *words, *plugs, "--run", "a", "--stop-at-step", 2)
    assert said.code == 0, said.err
    refused = call("run", "--resume", "a", "--quiet")
    assert refused.code == 2
    command = f"--plug {mine}:Skip:block=0 --plug {mine}:Sharpness"
    assert "it was made with" in refused.err
    assert refused.err.endswith(f"If you trust it, name it yourself: {command}.\n")
    done = call("run", "--resume", "a", "--out", "b.npz", "--no-sheet", "--quiet", *command.split())
    assert (done.code, done.err) == (0, "")
    again = media.read_manifest(tmp_path / "b.npz")
    assert again["output_sha256"] == whole["output_sha256"]
    assert again["seams"] == whole["seams"]
    assert "If you trust it" in call("fork", "a", "--set", "sharpness.amount=3").err
    forked = call("fork", "a", "--set", "sharpness.amount=3", "--run", "c", "--out", "c.npz", "--no-sheet", "--json",
                  *command.split())  # fmt: skip
    assert forked.code == 0, forked.err
    assert list(json.loads(forked.out)["stages"]) == ["sharpness"]


def _whole(call, words, plugs) -> Path:
    assert call("generate", PROMPT, *words, *plugs, "--out", "whole.npz").code == 0
    return Path("whole.npz")


def test_going_on_with_an_edited_plug_is_told(call, model, mine):
    words = ["--plug", "my_plugs.py:Skip:block=0"]
    assert call("run", PROMPT, "--model", model, *words, "--run", "a", "--stop-at-step", 2, "--quiet").code == 0
    edited(mine)
    said = call("run", "--resume", "a", "--quiet", "--no-sheet", *words)
    assert said.code == 0
    assert said.err.startswith("note: denoise goes on with something else plugged in: run_blocks was my_plugs.py@")
    assert said.err.count("\n") == 1


def test_ctrl_c_tells_the_command_that_goes_on(call, model, mine, monkeypatch):
    def stop(event):
        if event.name == "step.end" and event["step"].index == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("ditkit.cli.job.note", stop)
    words = ["--model", model, "--seed", 3, "--plug", "my_plugs.py:Skip:block=0", "--no-sheet", "--quiet"]
    kept = call("run", PROMPT, *words, "--run", "a")
    assert kept.code == 130
    assert "ditkit run --resume a" in kept.err
    assert "--plug my_plugs.py:Skip:block=0" in kept.err
    loose = call("generate", PROMPT, *words, "--out", "b.npz")
    assert "--plug my_plugs.py:Skip:block=0" in loose.err
    monkeypatch.undo()


@pytest.mark.parametrize("named", ["{}:plug", "evil:plug"])
def test_a_run_folder_that_names_code(call, model, evil, tmp_path, monkeypatch, named):
    monkeypatch.syspath_prepend(tmp_path)
    assert call("run", PROMPT, "--model", model, "--run", "a", "--stop-at-step", 2, "--quiet").code == 0
    file = tmp_path / "runs" / "a" / "run.json"
    about = json.loads(file.read_text())
    about["setup"]["plugs"] = [named.format(evil)]
    file.write_text(json.dumps(about))
    for words in (["run", "--resume", "a"], ["fork", "a"], ["run", "--resume", "a", "--plug", "my_rows.py:COUNT"]):
        said = call(*words, "--quiet")
        assert said.code == 2
    with pytest.raises(StateError, match="code that no file may start"):
        ditkit.runs.Run.open(tmp_path / "runs" / "a").go()
    assert not (tmp_path / "ran").exists()
