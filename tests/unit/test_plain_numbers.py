"""Numbers of other libraries and spellings are taken where nothing of them is lost, wherever a number may stand; the
others are refused by the name of their setting. A seed that is left to chance is drawn once, and kept."""

import datetime
import json
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import ditkit
from ditkit import config, options, replay
from ditkit.cli.main import main
from ditkit.errors import DitkitError, LoadError, PipelineError, RequestError, SetupError, StateError
from ditkit.plain import plain, whole
from ditkit.request import MAX_SEED, Request, drawn
from ditkit.runs import Run
from ditkit.schedulers import make
from ditkit.schedulers.noise import initial_noise, step_noise
from ditkit.setup import Setup

SIZE = {"width": 32, "height": 32, "frames": 5, "steps": 1, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return ditkit.load(tiny.write(tmp_path_factory.mktemp("numbers") / "model"))


WHOLE = [7, 7.0, np.int64(7), np.uint8(7), np.float32(7), np.array(7), torch.tensor(7), torch.tensor(7.0), Decimal(7),
         Decimal("7.0"), Fraction(14, 2), np.longdouble(7)]  # fmt: skip
BROKEN = [7.5, "7", True, np.True_, np.float32(7.5), Decimal("7.5"), Fraction(1, 3), float("nan"), float("inf"),
          1e30, np.float64("nan"), Decimal("NaN"), Decimal("1e999999"), Decimal("sNaN"), 2.0**60, torch.tensor([1.5]),
          7j, b"7", datetime.time(7, 32), np.datetime64("2026-01-01"), type, {"a": 7}, "٧", 10**5000]  # fmt: skip


@pytest.mark.parametrize("value", WHOLE, ids=repr)
def test_a_whole_number_may_be_spelled_otherwise(value):
    for name in ("seed", "steps", "fps"):
        found = getattr(Request.of({name: value}), name)
        assert (found, type(found)) == (7, int)
    assert Request.of({"seed": [value, 8]}).seed == [7, 8]
    assert Setup.of({"threads": value, "retries": value}).threads == 7
    made = Request.of({"guidance_scale": value, "sigmas": [1, Fraction(1, 2)]})
    assert (made.guidance_scale, type(made.guidance_scale), made.sigmas) == (7.0, float, [1.0, 0.5])
    assert Request.of({"steps": value}) == Request.of({"steps": 7}), "one request, so one fingerprint"


@pytest.mark.parametrize("value", BROKEN, ids=lambda x: ascii(x)[:30] if not isinstance(x, int) else "int")
@pytest.mark.parametrize("name", ["seed", "width", "threads"])
def test_what_is_no_whole_number_is_refused_by_its_name(name, value):
    cls, error = (Setup, SetupError) if name == "threads" else (Request, RequestError)
    with pytest.raises(error, match=rf"^'?{name}\b") as caught:
        cls.of({name: value})
    assert len(str(caught.value)) < 500


def test_numbers_without_end_are_refused_for_floats_too():
    for value in (float("nan"), np.float32("inf"), Decimal("NaN"), Decimal("-Infinity"), 10**500, Decimal("1e999999")):
        for name in ("guidance_scale", "shift", "control_scale"):
            with pytest.raises(RequestError, match=rf"^'?{name}\b"):
                Request.of({name: value})
        with pytest.raises(SetupError, match="timeout"):
            Setup.of({"timeout": value})
        with pytest.raises(RequestError, match="sigmas"):
            Request.of({"sigmas": [value]})
    with pytest.raises(RequestError, match="scheduler_options"):
        Request.of({"scheduler_options": {"order": float("nan")}})


def test_a_negative_zero_is_zero():
    assert str(Request.of({"guidance_scale": -0.0}).guidance_scale) == "0.0"
    assert str(Request.of({"seed": -0.0}).seed) == "0"
    assert Request.of({"sigmas": [1, -0.0]}).model_dump_json().count("-") == 0


def test_arrays_ranges_paths_dtypes_and_devices_are_plain_too():
    assert Request.of({"seed": np.arange(3)}).seed == Request.of({"seed": range(3)}).seed == [0, 1, 2]
    assert Request.of({"sigmas": np.array([0.5, 0.25], np.float32), "seed": (1, np.int8(2))}).sigmas == [0.5, 0.25]
    found = Setup.of({"dtype": torch.bfloat16, "device": torch.device("cuda", 1), "cache": Path("a"),
                      "loras": [Path("b")], "components": {"vae": Path("c")},
                      "devices": {"vae": torch.device("cpu")}})  # fmt: skip
    assert (found.dtype, found.device, found.cache, found.loras) == ("bfloat16", "cuda:1", "a", ["b"])
    assert (found.components, found.devices) == ({"vae": "c"}, {"vae": "cpu"})
    assert plain(range(10**12)) == range(10**12)
    assert json.dumps(plain({"a": [np.str_("x"), np.bool_(1), np.float16(0.5)]})) == '{"a": ["x", true, 0.5]}'


def test_whole_numbers_within_other_types():
    assert whole([2.0, 2.5], list[int]) == [2, 2.5]
    assert whole({"a": 2.0}, dict[str, int]) == {"a": 2}
    assert type(whole(2.0, int | float)) is float
    assert whole(2.0, int | None) == 2
    assert whole([[2.0]], list[tuple[int, ...]]) == [[2]]


def test_settings_that_nobody_could_show_are_one_sentence():
    deep = 1
    for _ in range(5000):
        deep = [deep]
    for values in ({"\ud800": 1}, {"x" * 10**6: 1}, {1: 2}, {"seed": deep}, {"stage_settings": {"a": {"b": deep}}},
                   {"prompt": "\ud800"}, {"scheduler_options": {"\ud800": 1}}, {"seed": "y" * 10**6},
                   {"stage_settings": {"a": {"b": 10**5000}}}, {"width": 10**300}):  # fmt: skip
        with pytest.raises(RequestError) as caught:
            Request.parse(values, "x.toml", RequestError)
        str(caught.value).encode()
        assert "x.toml" in str(caught.value)
        assert len(str(caught.value)) < 2500


# --- where else a number may stand


@dataclass(frozen=True)
class Options:
    every: int = 1
    sizes: tuple[int, ...] = ()
    amount: float = 0.0


def test_options_of_plugs_stages_and_schedulers():
    for given in ({"every": np.int64(2), "sizes": [3.0], "amount": 1}, "every=2.0,sizes=[3.0],amount=1"):
        found = options.made(Options, given, "plug x")
        assert found == Options(2, (3,), 1.0)
        assert type(found.every) is int
    for given in ({"every": True}, {"every": 2.5}, {"every": 10**5000}, {"amount": object()}, "every=07:32:00"):
        with pytest.raises(SetupError, match=r"(every|amount)=.* of plug x"):
            options.made(Options, given, "plug x")
    assert type(make("unipc", order=np.float64(3)).order) is int
    with pytest.raises(RequestError, match="order"):
        make("unipc", order=2.5)


def test_texts_of_the_environment_and_of_flags():
    layer = config.environment_layer({
        "DITKIT_STEPS": "4\r", "DITKIT_SEED": " 18446744073709551615 ", "DITKIT_FPS": "24.0", "DITKIT_SHIFT": "5",
        "DITKIT_FRAMES": "1e1", "DITKIT_THREADS": "2.0", "DITKIT_BATCHED": "true\r",
    })  # fmt: skip
    assert config.settle(layer).request() == Request(steps=4, seed=MAX_SEED, fps=24, shift=5.0, frames=10, batched=True)
    assert config.settle(layer).setup().threads == 2
    with pytest.raises(RequestError, match=r"^steps='٤' \(environment DITKIT_STEPS\)"):
        config.settle(config.environment_layer({"DITKIT_STEPS": "٤"})).request()


@pytest.mark.parametrize(
    "flags",
    [["--width", "07:32:00"], ["--height", "1979-05-27"], ["--width", "{a = 1}"], ["--guidance-scale", "[1]"],
     ["--steps", "nan"], ["--set", "stage_settings.x.y=1979-05-27"], ["--seed", "nan"], ["--seed", "true"]],
)  # fmt: skip
def test_odd_values_on_the_command_line_are_one_sentence(flags, capsys):
    assert main(["plan", "cat", *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_odd_values_in_python_and_in_a_models_own_defaults(pipe, tmp_path):
    for name, value in (("width", datetime.time(7, 32)), ("height", {}), ("width", None), ("guidance_scale", "x")):
        with pytest.raises(RequestError, match=f"^{name}="):
            pipe.request({"prompt": "a", name: value})
    folder = tiny.write(tmp_path / "model")
    (folder / "ditkit.toml").write_text("[defaults]\nwidth = 64.0\nsteps = 2.0\nseed = -1\n")
    request = ditkit.load(folder).request({"prompt": "a"})
    assert (request.width, request.steps) == (64, 2)
    assert 0 <= request.seed < 2**32
    (folder / "ditkit.toml").write_text("[defaults]\nwidth = 07:32:00\n")
    with pytest.raises(LoadError, match=r"^width=datetime.time\(7, 32\) \(.*ditkit.toml\)"):
        ditkit.load(folder)


@pytest.mark.slow
def test_steps_and_counts_of_runs_and_forks(pipe, tmp_path):
    state = pipe.begin(pipe.request({"prompt": "a", **SIZE, "steps": np.int16(3)}))
    assert pipe.run(state, stop_at_step=np.int64(1)).state["step"] == 1
    for wrong in (1.0, "1", True, object()):
        with pytest.raises(PipelineError, match=r"stop_at_step=.*no whole number"):
            pipe.run(state, stop_at_step=wrong)
    run = Run.create(tmp_path / "run", pipe, "a", every=np.int64(1), keep_steps="all", **{**SIZE, "steps": 2.0})
    run.go()
    assert run.fork(tmp_path / "fork", at_step=np.uint8(1), clip=np.int8(0), steps=2).description.parent.step == 1
    with pytest.raises(RequestError, match=r"at_step=1\.5"):
        run.fork(tmp_path / "x", at_step=1.5)
    with pytest.raises(SetupError, match="every='2'"):
        Run.create(tmp_path / "y", pipe, "a", every="2", **SIZE)


# --- seeds


def test_all_seeds_of_torch_and_comfyui_are_seeds():
    for seed in (2**63, MAX_SEED):
        expected = torch.randn(4, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(initial_noise(seed, (4,)), expected)
        assert step_noise(seed, 3, (4,)).shape == (4,)
        assert Request.of({"seed": seed}).seed == seed
    with pytest.raises(RequestError, match=rf"0 to {MAX_SEED}, -1 or random to draw one"):
        Request.of({"seed": MAX_SEED + 1})
    with pytest.raises(RequestError, match="seed 18446744073709551616"):
        initial_noise(MAX_SEED + 1, (4,))


@pytest.mark.parametrize("chance", [-1, "random", "Random ", -1.0, np.int64(-1), Decimal(-1), "-1"], ids=repr)
def test_a_seed_may_be_left_to_chance(chance):
    found = {Request.of({"seed": chance}).seed for _ in range(20)}
    assert len(found) > 15
    assert all(type(seed) is int and 0 <= seed < 2**32 for seed in found)
    first, second, third = Request.of({"seed": [chance, 5, chance]}).seed
    assert second == 5
    assert first != third
    same = {"seed": [1, np.int64(2)]}
    assert drawn(same)["seed"] is same["seed"]


def test_reading_draws_nothing():
    """What is in a State, a clip or a run must be the same whenever it is read."""
    for chance in (-1, "random"):
        with pytest.raises(StateError, match="seed="):
            Request.parse({"seed": chance}, "the State's request", StateError)


@pytest.mark.slow
def test_a_run_keeps_the_seed_that_was_drawn(pipe, tmp_path):
    result = pipe(["a", "b"], seed=["random", -1], **SIZE)
    seeds = result.state["seed"]
    assert result.state["request"]["seed"] == seeds
    assert [manifest["request"]["seed"] for manifest in result.manifests] == seeds
    for clip, (file, seed) in enumerate(zip(result.save(tmp_path / "x.npz"), seeds, strict=True)):
        assert replay.replay(replay.read(file)).identical
        assert np.array_equal(pipe("ab"[clip], seed=seed, **SIZE).video, result.videos[clip])
    run = Run.create(tmp_path / "run", pipe, "a", seed=-1, **SIZE)
    assert run.go().state["seed"] == [run.description.request["seed"]]
    fork = run.fork(tmp_path / "fork", seed="random")
    assert fork.go().state["seed"] == [fork.description.request["seed"]] != [run.description.request["seed"]]


@pytest.mark.slow
def test_the_command_line_says_which_seed_was_drawn(pipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SIZE.items()]
    words = ["a", "--model", str(pipe.setup.model), *flags]
    seen = set()
    for way in (["--seed", "-1"], ["--seed", "random"], ["--set", "seed=random"]):
        assert main(["generate", *words, *way, "--no-sheet", "--quiet"]) == 0
        out, err = capsys.readouterr()
        seed = int(Path(out.strip()).stem.removeprefix("a-"))
        assert f"note: seed {seed} was drawn\n" in err
        assert replay.read(Path(out.strip())).request.seed == seed
        seen.add(seed)
    assert len(seen) == 3
    monkeypatch.setenv("DITKIT_SEED", "random")
    assert main(["run", *words, "--run", "kept", "--no-sheet", "--quiet", "--stop-at-step", "1"]) == 0
    kept = Run.open("kept").description.request["seed"]
    assert f"note: seed {kept} was drawn\n" in capsys.readouterr().err
    assert main(["run", "--resume", "kept", "--no-sheet", "--quiet"]) == 0, "chance asks for no other seed"
    assert "drawn" not in capsys.readouterr().err
    assert main(["fork", "kept", "--run", "other", "--quiet", "--no-sheet"]) == 0
    other = Run.open("other").description.request["seed"]
    assert other != kept
    assert f"note: seed {other} was drawn\n" in capsys.readouterr().err
    assert main(["config", "explain", "seed"]) == 0
    assert "environment DITKIT_SEED, drawn" in " ".join(capsys.readouterr().out.split())


def test_errors_are_ditkits_own():
    for cls in (Request, Setup):
        for value in BROKEN:
            for name in cls.model_fields:
                with suppress(DitkitError):
                    cls.of({name: value})
