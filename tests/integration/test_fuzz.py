"""The short form of ``make fuzz``: some inputs for each format, the same ones each time."""

from __future__ import annotations

import pytest
from fuzz.campaign import Campaign, known

INPUTS = 30


@pytest.mark.slow
@pytest.mark.parametrize("target", known())
def test_odd_inputs_end_in_a_sentence(target):
    report = Campaign(target, seed=7).run(INPUTS)
    assert report.inputs == INPUTS
    assert [f"{f.kind} (input {f.first}): {f.place}: {f.text[:300]}" for f in report.faults.values()] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "kind"),
    [("raise KeyError('x')", "foreign"), ("while True: pass", "hang"), ("bytearray(3 << 29)", "memory"),
     ("bytearray(1 << 40)", "memory"), ("open('../outside/victim', 'w')", "outside"),
     ("__import__('os').abort()", "crash"), ("__import__('os').system('true')", "outside"),
     ("exec(compile('1', __import__('os').getcwd() + '/x.py', 'exec'))", "outside"),
     ("raise Refused('x' * 9999)", "long"), ("raise Refused('\x1b[2J')", "steering"),
     ("raise LoadError('x', 'y', 'z')", "nameless"), ("pass", "ok")],
)  # fmt: skip
def test_the_harness_sees(tmp_path, monkeypatch, what, kind):
    from fuzz import watch

    if kind == "hang":
        monkeypatch.setattr(watch, "SECONDS", 0.5)
    campaign = Campaign("settings", keep=tmp_path)

    class Target:
        NAMED = ("x",)

        @staticmethod
        def prepare(folder):
            pass

        @staticmethod
        def make(rng, folder):
            return "x"

        @staticmethod
        def run(folder, how):
            from ditkit.errors import LoadError

            exec(what, {"LoadError": LoadError, "Refused": watch.Refused})

    campaign.target = Target
    report = campaign.run(2)
    assert report.inputs == 2
    assert dict(report.kinds) == {kind: 2}
    assert len(report.faults) == (kind != "ok")
    assert len(list(tmp_path.glob("settings/*/why.json"))) == (0 if kind == "ok" else 2)
