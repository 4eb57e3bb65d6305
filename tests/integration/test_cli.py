"""The commands, from the words that are typed to the files that appear."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from shell import alone

import ditkit
from ditkit import assembly, media
from ditkit.cli import naming, show
from ditkit.cli.flags import kebab
from ditkit.cli.main import main
from ditkit.events import Event
from ditkit.state import State

PROMPT = "a red circle moving left"


def files(folder) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_generate_shows_its_steps_and_names_its_files(call, model, tmp_path):
    said = call("generate", PROMPT, "--model", model, "--seed", 3, "--guidance-scale", "2")
    assert said.code == 0, said.err
    assert files(tmp_path) == [f"outputs/a-red-circle-moving-left-3{end}" for end in ("-sheet.png", ".json", ".mp4")]
    lines = said.out.splitlines()
    assert lines[0].split() == ["i", "timestep", "sigma", "guidance", "expert"]
    assert [line.split()[0] for line in lines[1:5]] == ["0", "1", "2", "3"]
    assert any(line.startswith("denoise: ") for line in lines)
    assert any(line.startswith("step 4 of 4") for line in lines)
    assert lines[-3].startswith("time   encode_text")
    assert lines[-2:] == [
        "clip   outputs/a-red-circle-moving-left-3.mp4",
        "sheet  outputs/a-red-circle-moving-left-3-sheet.png",
    ]
    assert said.err == ""
    expected = ditkit.load(model)(PROMPT, seed=3, guidance_scale=2.0)
    found = media.read_manifest(tmp_path / "outputs/a-red-circle-moving-left-3.mp4")
    assert found["output_sha256"] == expected.manifests[0]["output_sha256"]
    assert found["request"]["width"] == 32, "the model's own default"


def test_quiet_prints_paths_and_json_an_object(call, model, tmp_path):
    said = call("generate", PROMPT, "--model", model, "--out", "a.npz", "--no-sheet", "--quiet")
    assert (said.code, said.out, said.err) == (0, "a.npz\n", "")
    said = call("generate", PROMPT, "--model", model, "--out", "b.npz", "--sheet", "c.png", "--json")
    told = json.loads(said.out)
    assert told["clips"] == ["b.npz"]
    assert told["sheets"] == ["c.png"]
    assert told["output_sha256"] == [media.read_manifest(tmp_path / "a.npz")["output_sha256"]]
    assert len(told["steps"]) == 4
    assert "denoise: " in said.err
    assert files(tmp_path) == ["a.json", "a.npz", "b.json", "b.npz", "c.png"]


def test_every_source_of_settings_reaches_the_run(call, model, tmp_path, monkeypatch):
    (tmp_path / "c.toml").write_text(
        f"model = {json.dumps(str(model))}\nsteps = 2\nseed = 4\n[scheduler_options]\norder = 1\n"
    )
    monkeypatch.setenv("DITKIT_SEED", "5")
    words = [
        "--config",
        "c.toml",
        "--set",
        "guidance_scale=3",
        "--scheduler",
        "unipc",
        "--no-cache-text-kv",
        "--shift",
        "3",
    ]
    said = call("generate", PROMPT, *words, "--out", "a.npz", "--quiet")
    assert said.code == 0, said.err
    found = media.read_manifest(tmp_path / "a.npz")
    wanted = {
        "steps": 2,
        "seed": 5,
        "guidance_scale": 3.0,
        "shift": 3.0,
        "scheduler_options": {"order": 1},
        "width": 32,
    }
    assert {key: found["request"][key] for key in wanted} == wanted
    assert found["setup"]["cache_text_kv"] is False
    explained = call("config", "explain", "seed", *words)
    assert [line.split()[:2] for line in explained.out.splitlines()[1:]] == [
        ["seed", "0"],
        ["seed", "4"],
        ["seed", "5"],
    ]
    assert "environment DITKIT_SEED" in explained.out.splitlines()[-1]
    assert call("config", "explain", *words).out.count("\n") == 1 + len(
        ditkit.Request.model_fields | ditkit.Setup.model_fields
    )
    assert "model default" not in call("config", "explain", "width", *words).out
    assert f"model {model}" in call("config", "explain", "width", *words).out


def test_several_clips(call, model, tmp_path):
    said = call("generate", PROMPT, "--model", model, "--seed", 1, "--seed", 2, "--out", "x.npz", "--json")
    assert said.code == 0, said.err
    told = json.loads(said.out)
    assert told["clips"] == ["x-0.npz", "x-1.npz"]
    assert told["sheets"] == ["x-sheet-0.png", "x-sheet-1.png"]
    alone = ditkit.load(model)(PROMPT, seed=2).manifests[0]["output_sha256"]
    assert told["output_sha256"][1] == alone


@pytest.mark.parametrize("scheduler", ["unipc", "dpm++", "dpm++_sde", "euler"])
def test_a_run_in_pieces_gives_the_same_bits(call, model, tmp_path, scheduler):
    whole = call(
        "generate", PROMPT, "--model", model, "--scheduler", scheduler, "--json", "--no-sheet", "--out", "a.npz"
    )
    first = call(
        "run",
        PROMPT,
        "--model",
        model,
        "--scheduler",
        scheduler,
        "--until",
        "encode_text",
        "--save-state",
        "s1.st",
        "--quiet",
    )
    second = call("run", "--from", "s1.st", "--stop-at-step", 2, "--save-state", "s2.st", "--quiet")
    third = call("run", "--from", "s2.st", "--until", "denoise", "--save-state", "s3.st", "--quiet")
    assert [s.out for s in (first, second, third)] == ["s1.st\n", "s2.st\n", "s3.st\n"]
    assert State.load(tmp_path / "s2.st")["step"] == 2
    last = call("run", "--from", "s3.st", "--json", "--no-sheet")
    assert last.code == 0, last.err
    told = json.loads(last.out)
    assert told["output_sha256"] == json.loads(whole.out)["output_sha256"]
    assert told["skipped"] == dict.fromkeys(["encode_text", "denoise"], "already in the State")
    assert told["clips"] == ["outputs/a-red-circle-moving-left-0.mp4"]
    again = call("run", "--from", "s3.st", "--start", "decode_latents", "--out", "b.npz", "--json", "--no-sheet")
    assert json.loads(again.out)["output_sha256"] == told["output_sha256"]


@pytest.mark.slow
def test_another_process_goes_on_to_the_same_bits(call, model, tmp_path):
    whole = call("generate", PROMPT, "--model", model, "--json", "--no-sheet", "--out", "a.npz")
    call("run", PROMPT, "--model", model, "--stop-at-step", 3, "--save-state", "s.st")
    words = [sys.executable, "-m", "ditkit", "run", "--from", "s.st", "--out", "b.npz", "--json", "--no-sheet"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=alone())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output_sha256"] == json.loads(whole.out)["output_sha256"]


def test_plan_and_stages_load_no_weights(call, model, tmp_path, monkeypatch):
    monkeypatch.setattr("ditkit.assembly.components.resolve", None)  # what finds a loader
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    plan = call("plan", PROMPT, "--model", bare, "--steps", 30, "--set", "dtypes.vae=float64")
    assert plan.code == 0, plan.err
    assert "flag --steps" in plan.out
    assert "model family (official, t2v)" in plan.out
    assert "default (Wan2.1 text_len)" in plan.out
    assert "reads  prompt negative_prompt request" in plan.out
    assert "float64" in plan.out
    assert "\n29  " in plan.out
    assert "more steps" not in plan.out
    stages = call("stages", "--model", bare)
    assert [line for line in stages.out.splitlines() if line[0] != " "] == ["encode_text", "denoise", "decode_latents"]
    assert "calls  transformer" in stages.out


def test_demo(call, model, tmp_path, monkeypatch):
    monkeypatch.setitem(assembly.MODELS, "shapes", model)
    said = call("demo")
    assert said.code == 0, said.err
    assert "a red circle moving left on a black background" in said.out
    assert said.out.splitlines()[-2:] == ["clip   outputs/demo.mp4", "sheet  outputs/demo-sheet.png"]
    assert files(tmp_path) == ["outputs/demo-sheet.png", "outputs/demo.json", "outputs/demo.mp4"]


def test_doctor(call, model, tmp_path, monkeypatch):
    monkeypatch.setitem(assembly.MODELS, "shapes", model)
    said = call("doctor")
    assert said.code == 0, said.out
    for word in (
        "torch",
        "device cpu",
        "threads",
        "libx264",
        "model shapes",
        "vae/diffusion_pytorch_model.safetensors",
        "sha256",
    ):
        assert word in said.out
    monkeypatch.setitem(assembly.MODELS, "shapes", tmp_path / "nowhere")
    said = call("doctor")
    assert said.code == 1
    assert "!!  model shapes" in said.out


def test_bench_quality_measures_and_says_whether_the_targets_are_reached(call, model):
    """A random network reaches no target: exit code 1, and every miss is told."""
    sizes = ["--width", "64", "--height", "64", "--frames", "5", "--steps", "1"]
    done = call("bench", "quality", "--model", model, "--clips", "2", "--json", *sizes)
    told = json.loads(done.out)
    assert (done.code, told["clips"], told["reached"], len(told["failures"])) == (1, 2, False, 2)
    shown = call("bench", "quality", "--model", model, "--clips", "1", *sizes)
    assert shown.code == 1
    assert "target 95%" in shown.out
    assert "missed: a red circle" in shown.out
    assert call("bench", "quality", "--model", model, "--clips", "0").code == 2


def test_version_and_help_start_without_torch():
    code = (
        "import sys\nfrom ditkit.cli.main import main\n"
        "assert main(['--version']) == 0 and main(['--help']) == 0 and main(['generate', '--help']) == 0\n"
        "heavy = {'torch', 'numpy', 'av', 'PIL', 'transformers', "
        "'ditkit.pipeline', 'ditkit.stages'} & set(sys.modules)\n"
        "sys.exit(str(sorted(heavy)) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"ditkit {ditkit.__version__}" in done.stdout
    for word in ("generate", "demo", "run", "plan", "replay", "stages", "doctor", "config", "bench"):
        assert f" {word} " in done.stdout
    flags = [f"--{kebab(name)}" for name in ditkit.Request.model_fields | ditkit.Setup.model_fields if name != "prompt"]
    assert "--plug" in flags
    assert [flag for flag in flags if flag not in done.stdout] == []
    assert "Wan2.1 generate.py" in done.stdout
    assert "--sample_steps" in done.stdout


def test_a_prompt_that_is_too_long_is_reported_and_runs(call, model):
    said = call("generate", "red circle " * 300, "--model", model, "--out", "a.npz", "--json", "--no-sheet")
    assert said.code == 0
    assert "note: the prompt is 89 tokens too long; they were cut off its end" in said.err
    (cut,) = json.loads(said.out)["truncated"]
    assert (cut["field"], cut["tokens_cut"]) == ("prompt", 89)


# ---- what is shown ------------------------------------------------------------------------------------------------


def terminal():
    from rich.console import Console

    return Console(file=io.StringIO(), force_terminal=True, width=80, height=30, color_system="truecolor")


def test_the_live_view_changes_nothing_and_shows_pictures(model):
    pipe = ditkit.load(model)
    out = terminal()
    pictures = []
    with show.view(out, False, pipe.look(), 5) as listeners:
        view = listeners[-1]
        assert isinstance(view, show.Live)
        watched = pipe(PROMPT, seed=1, listeners=[*listeners, lambda e: pictures.append(view.picture)])
    assert watched.state.equal(pipe(PROMPT, seed=1).state)
    assert any(p is not None and p.plain.count("\n") == 15 and len(p.plain.splitlines()[0]) == 32 for p in pictures)
    assert view.progress.tasks[0].completed == 5, "frames decoded"
    text = out.file.getvalue()
    assert "decode_latents" in text
    assert "\u2580" in text, "half blocks"
    bars = [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).splitlines() if "decode_latents" in line]
    assert bars
    assert all("\u2580" not in line for line in bars), "the bar has a line of its own"


def test_previews_come_at_most_ten_times_a_second(model, monkeypatch):
    drawn = []
    monkeypatch.setattr(show, "estimate", lambda *_: drawn.append(1) or np.zeros((4, 4, 3), np.uint8))
    view = show.Live(terminal(), lambda latents: None, 5)
    now = [0.0]
    monkeypatch.setattr(show.time, "perf_counter", lambda: now[0])
    step = ditkit.Step(0, 1, 1.0, 0.0, 999.0)
    for i in range(100):
        now[0] = i * 0.01
        view(Event("prediction", {"step": step, "x": None, "velocity": None}))
    assert 9 <= len(drawn) <= 10


def test_the_estimate_is_the_clean_middle_frame():
    import torch

    from ditkit.models.latent_rgb import rgb_frames

    clean, noise = torch.randn(1, 16, 3, 4, 6), torch.randn(1, 16, 3, 4, 6)
    sigma = 0.7
    factors = (torch.randn(16, 3) * 0.1).tolist(), [0.1, -0.2, 0.3]
    x = (1 - sigma) * clean + sigma * noise
    found = show.estimate(x, noise - clean, sigma, lambda latents: rgb_frames(latents, factors)[0, 0])
    colour = np.einsum("chw,cr->hwr", clean[0, :, 1].numpy(), np.array(factors[0])) + factors[1]
    expected = (np.clip(colour, -1, 1) + 1) * 127.5
    assert found.shape == (4, 6, 3)
    assert np.abs(found - expected).max() <= 0.51


def test_a_long_step_table_is_shortened_but_not_in_a_plan():
    steps = [ditkit.Step(i, 50, 1 - i / 50, 1 - (i + 1) / 50, 999.0 - i) for i in range(50)]
    short = show.step_table(steps).plain.splitlines()
    assert len(short) == 14
    assert "38 more steps" in short[9]
    assert len(show.step_table(steps, whole=True).plain.splitlines()) == 51


def test_default_names():
    assert str(naming.default_out("A red/blue  Circle!", 7)) == "outputs/a-red-blue-circle-7.mp4"
    assert str(naming.default_out("红色的圆", 0)) == "outputs/红色的圆-0.mp4"
    assert str(naming.default_out("赤い丸。左へ", 0)) == "outputs/赤い丸-左へ-0.mp4"
    assert str(naming.default_out("\u1112\u1161\u11ab \U0001f600", 0)) == "outputs/한-0.mp4"
    assert str(naming.default_out("!?", 0)) == "outputs/clip-0.mp4"
    assert len(naming.default_out("\U00020000" * 500, 2**63 - 1).with_suffix(".state.safetensors").name.encode()) < 256
    assert len(naming.default_out("x" * 500, 0).name) < 80


def test_debug_shows_the_traceback(call, monkeypatch):
    assert "Traceback" in call("generate", "x", "--model", "nowhere", "--debug").err
    assert "Traceback" not in call("generate", "x", "--model", "nowhere").err
    monkeypatch.setenv("DITKIT_DEBUG", "1")
    said = call("generate", "x", "--model", "nowhere")
    assert "Traceback" in said.err
    assert said.err.splitlines()[-1].startswith("error: model 'nowhere'")


def test_nothing_on_the_command_line_is_help_not_a_traceback(capsys):
    assert main([]) in (0, 2)
    assert "generate" in "".join(capsys.readouterr())


@pytest.mark.parametrize("kind", ["pipe", "full", "ascii"])
def test_an_output_that_takes_nothing(model, tmp_path, kind):
    """A reader that has gone loses no run; a full disk is told; a letter that cannot be shown is a question mark."""
    command = [sys.executable, "-m", "ditkit"]
    make = [*command, "generate", "红", "--model", str(model), "--out", "红.npz", "--no-sheet"]
    if kind == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(make, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, env=alone())
        os.close(writer)
        assert (done.returncode, done.stderr) == (0, "")
        assert (tmp_path / "红.npz").exists()
    elif kind == "full":
        with open("/dev/full", "w") as full:
            done = subprocess.run([*command, "stages"], stdout=full, stderr=subprocess.PIPE, text=True, env=alone())
        assert (done.returncode, done.stderr) == (
            1,
            "error: the output: no space left on device. Print to a place that has room.\n",
        )
    else:
        environment = {**alone(), "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
        done = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert "clip   ?.npz" in done.stdout
