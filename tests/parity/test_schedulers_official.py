"""Sigmas, timesteps and whole trajectories against those of the official solvers (golden files), case by case."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ditkit.schedulers import make
from ditkit.schedulers.table import step_table

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "schedulers"


def load(name: str) -> tuple[dict, dict]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["cases"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


FILES = {name: load(name) for name in ("unipc", "dpmpp", "euler")}
CASES = [(file, case) for file, (cases, _) in FILES.items() for case in cases]


def solver_of(file: str, case: dict):
    if file == "euler":
        return make("euler")
    options = {"order": case["solver_order"], "solver_type": case["solver_type"]}
    if file == "unipc":
        return make("unipc", **options, corrector="disable_corrector" not in case)
    return make("dpm++_sde" if case["algorithm_type"].startswith("sde") else "dpm++", **options)


def test_every_key_of_the_golden_files_is_used():
    for file, (cases, tensors) in FILES.items():
        parts = ("sigmas", "timesteps", "trajectory") + (("noise",) if file == "dpmpp" else ())
        expected = {"x_T"} | {f"{key}.{part}" for key in cases for part in parts if part != "noise" or "sde" in key}
        assert set(tensors) == expected
    assert len(CASES) == 33


@pytest.mark.parametrize(("file", "key"), CASES)
def test_official_run(file, key):
    cases, golden = FILES[file]
    case, scheduler = cases[key], solver_of(file, cases[key])
    plan = step_table(scheduler, case["steps"], case["shift"], "wan", 5.0, scale=1000.0)

    assert [step.timestep for step in plan] == golden[f"{key}.timesteps"].tolist()
    sigmas = [step.sigma for step in plan] + [plan[-1].sigma_next]
    expected = golden[f"{key}.sigmas"].tolist()  # Euler's has no final 0
    assert sigmas[: len(expected)] == expected
    assert plan[-1].sigma_next == 0

    x, history, trajectory = golden["x_T"], {}, golden[f"{key}.trajectory"]
    noise = golden.get(f"{key}.noise")
    for step in plan:
        velocity = torch.sin(3 * x) + 0.1 * step.timestep / 1000
        x, history = scheduler.solve(x, velocity, step, history, None if noise is None else noise[step.index])
        assert x.dtype == torch.float32
        assert x.isfinite().all()
        if step.index + 1 < len(trajectory):  # bh1 has no official last state
            expected = trajectory[step.index + 1]
            assert (x - expected).abs().max() <= 1e-5 * expected.abs().max(), step
