"""The golden probe: the same weights give the same hash, and nothing else does."""

from __future__ import annotations

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from ditkit.errors import PlaceError
from ditkit.placement.probe import cases, has_probe, probe_of
from ditkit.placement.worker import worker_of
from ditkit.setup import Setup

TASKS = ("t2v", "i2v", "flf2v", "vace", "ti2v", "t2v_a14b", "i2v_a14b")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probes")
    made = {}

    def model(task):
        if task not in made:
            made[task] = tiny.write(folder / task, task)
        return made[task]

    return model


def hashes(folder, **setup):
    worker = worker_of(Setup(model=str(folder), **setup))
    return {n: probe_of(worker, n)["hash"] for n, s in worker.stages.items() if has_probe(s.components)}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_stage_of_every_task_has_one_and_it_stays(models, task):
    once = hashes(models(task))
    assert hashes(models(task)) == once
    assert len(set(once.values())) == len(once) >= 3


@pytest.mark.slow
def test_it_sees_weights_dtypes_and_cleaning(models, monkeypatch):
    folder = models("t2v")
    once = hashes(folder)

    other = hashes(folder, dtypes={"text_encoder": "bfloat16"})
    assert {n for n in once if other[n] != once[n]} == {"encode_text"}
    other = hashes(folder, dtypes={"vae": "float16", "transformer": "bfloat16"})
    assert {n for n in once if other[n] != once[n]} == {"denoise", "decode_latents"}
    other = hashes(folder, dtype_policy="float32", dtypes={"transformer": "bfloat16"})
    assert other["denoise"] != hashes(folder, dtypes={"transformer": "bfloat16"})["denoise"]

    from ditkit.models import text

    monkeypatch.setattr(text, "clean", lambda prompt: prompt)
    assert {n for n, h in hashes(folder).items() if h != once[n]} == {"encode_text"}


def test_it_sees_one_weight(models, tmp_path):
    folder = tiny.write(tmp_path / "t2v")
    once = hashes(folder)
    [file] = sorted((folder / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    name = next(n for n in sorted(tensors) if "patch_embedding" in n and tensors[n].dim() > 1)
    tensors[name].view(-1)[0] += 0.01
    save_file(tensors, file, {"format": "pt"})
    assert {n for n, h in hashes(folder).items() if h != once[n]} == {"denoise"}


def test_both_experts_count_and_each_alone_has_its_own(models):
    worker = worker_of(Setup(model=str(models("t2v_a14b"))))
    stage = worker.stages["denoise"]
    first, second = cases(stage, worker.components)
    assert [stage.needs(c) for c in (first, second)] == [("transformer",), ("transformer_2",)]
    whole = probe_of(worker, "denoise")
    assert [n["latents"]["shape"] for n in whole["numbers"]] == [[1, 16, 2, 4, 4]] * 2
    alone = dict(worker.components)
    del alone["transformer"]
    worker.components = alone
    [numbers] = probe_of(worker, "denoise")["numbers"]
    assert numbers == whole["numbers"][1]


def test_the_numbers_tell_how_far_apart_two_hosts_are(models):
    folder = str(models("t2v"))
    one, two = (
        probe_of(worker_of(Setup(model=folder, dtypes={"text_encoder": d})), "encode_text")["numbers"][0]
        for d in ("float32", "bfloat16")
    )
    assert one["prompt_lengths"] == two["prompt_lengths"]
    a, b = one["prompt_embeds"], two["prompt_embeds"]
    assert (a["dtype"], b["dtype"]) == ("float32", "bfloat16")
    assert a["shape"] == b["shape"]
    assert a["rms"] == pytest.approx(b["rms"], rel=0.02)
    assert torch.tensor(a["first"]).allclose(torch.tensor(b["first"]), atol=0.1)


def test_a_stage_of_somebody_else_has_none(models):
    from ditkit.execution.stage import BaseStage

    class Mine(BaseStage):
        name, reads, writes = "mine", ("weights",), ("video",)

    worker = worker_of(Setup(model=str(models("t2v"))))
    worker.stages["mine"] = Mine()
    with pytest.raises(PlaceError, match="no fixed input for weights"):
        probe_of(worker, "mine")
