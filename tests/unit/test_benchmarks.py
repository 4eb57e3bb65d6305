"""The measuring code: turns, ratios, verdicts, and a report that says what was disturbed."""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import compute, loading, models, report
from benchmarks.measure import Row, compared, in_turns

from ditkit.checkpoints.model.open_part import open_part

FACTS = {
    "date": "2026-11-21", "processor": "a processor", "cores": 2, "memory_gb": 8, "system": "Linux",
    "cpu_capability": "AVX2", "threads": 1, "clock": "wall", "load_before": 0.1,
    "versions": dict.fromkeys(("python", "ditkit", "torch", "diffusers", "transformers"), "1.0"),
}  # fmt: skip


def test_turns_alternate_and_only_the_calls_are_timed():
    order, ticks = [], itertools.count()
    ours, theirs = in_turns(lambda: order.append("a"), lambda: order.append("b"), 3, lambda: float(next(ticks)))
    assert "".join(order) == "ab" + "abbaab"
    assert ours == theirs == [1.0, 1.0, 1.0]
    assert in_turns(lambda: 5.0, lambda: None, 2, lambda: 0.0) == ([5.0, 5.0], [0.0, 0.0])  # measured by itself


def test_the_ratio_is_that_of_neighbours():
    """A machine that gets ten times slower half-way changes no ratio."""
    row = compared("g", "n", "s", [1.0, 1.0, 10.0, 10.0], [2.0, 2.0, 20.0, 20.0])
    assert (row.ratio, row.spread, row.met) == (0.5, (0.5, 0.5), True)
    assert compared("g", "n", "s", [3.0], [2.0]).met is False


@pytest.mark.parametrize(("ours", "limit", "met"), [(0.2, 0.3, True), (0.4, 0.3, False), (0.4, None, None)])
def test_a_figure_without_a_rival_has_its_own_limit(ours, limit, met):
    assert Row("g", "n", "s", ours, limit=limit).met is met


def test_markdown():
    rows = [compared("start", "x", "s", [0.001], [2.0]), Row("start", "y", "%", 3.0, limit=2.0, note="why")]
    text = report.markdown(rows, FACTS)
    assert "| x | 1.0 ms | 2.00 s | 0.00 (0.00 to 0.00) | ≤ 1 | yes |" in text
    assert "| y (why) | 3.00 % |  |  | ≤ 2 % | NO |" in text
    assert "Targets met: 1 of 2" in text
    assert "something else" not in text
    assert "something else was running" in report.markdown(rows, FACTS | {"load_before": 3.0})


def test_a_run_of_some_groups_renews_their_sections_only():
    page = report.markdown([compared("start", "x", "s", [1.0], [2.0]), compared("vae", "y", "s", [3.0], [2.0])], FACTS)
    rows = [compared("vae", "y", "s", [1.0], [2.0]), compared("loading, beside reading the files", "z", "s", [1], [2])]
    text = report.renewed(page, rows, FACTS | {"date": "2027-01-01"})
    assert text.split("## ")[1] == page.split("## ")[1]
    assert "## Vae\n\nTaken on 2027-01-01" in text
    assert "| y | 1.00 s | 2.00 s | 0.50 (0.50 to 0.50) | ≤ 1 | yes |" in text
    assert "3.00 s" not in text
    assert "|  | ditkit | reading | ratio (range) |" in text
    assert "Targets met: 1 of 2" in page
    assert "Targets met: 3 of 3" in text


def test_the_loading_benchmark_has_the_published_size():
    source = loading.Random(loading.SIZES["1.3B"])
    assert sum(math.prod(facts.shape) for facts in source.tensors.values()) == 1_418_996_800


@pytest.mark.slow
@pytest.mark.parametrize("layout", loading.LAYOUTS, ids=lambda layout: layout.name)
def test_each_layout_of_the_loading_benchmark_holds_the_same_model(tmp_path, layout):
    config = loading.SIZES["tiny"]
    part = open_part(layout.write(tmp_path, loading.Random(config), config))
    assert part.kind == "wan"
    assert part.config["dim"] == config.dim
    assert {name: facts.shape for name, facts in part.source.tensors.items()} == {
        name: facts.shape for name, facts in loading.Random(config).tensors.items()
    }
    name = "blocks.1.self_attn.q.weight"
    exact = {"native safetensors", "diffusers folder, 2 shards", "native .pth", "native float32, to bfloat16"}
    if layout.name in exact:
        assert torch.equal(part.source[name].bfloat16(), loading.Random(config)[name])


def test_different_results_do_not_race():
    a = torch.ones(4)
    compute.check_same(a, a * (1 + 1e-6), 1e-4, "x")
    for b in (a * 1.1, a * float("nan")):
        with pytest.raises(RuntimeError, match="the two sides differ"):
            compute.check_same(b, a, 1e-4, "x")


def test_random_weights_keep_activations_near_one():
    layer = models.randomise(torch.nn.Linear(400, 300), 0)
    assert 0.8 < layer(torch.randn(50, 400, generator=torch.Generator().manual_seed(1))).std() < 1.2
