"""Every example runs, and so does every block of code in the README and the guides.

Blocks of one document share their names and run from top to bottom in an empty folder. A ```python block is executed;
an ```output block right after it is what it must have printed; in an ```sh block every line that begins with ``ditkit``
is run. The name ``shapes`` stands for a tiny random model with the sizes of the embedded one, so this takes seconds.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import tiny

from ditkit import build
from ditkit.cli.main import main

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "guides").glob("*.md"))]
DEFAULTS = {"width": 64, "height": 64, "frames": 13, "fps": 8, "steps": 4, "guidance_scale": 4.0, "shift": 3.0}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.write(tmp_path_factory.mktemp("model"))
    (folder / "ditkit.toml").write_text("[defaults]\n" + "".join(f"{k} = {v}\n" for k, v in DEFAULTS.items()))
    return folder


@pytest.fixture(autouse=True)
def stage(model, tmp_path, monkeypatch):
    monkeypatch.setitem(build.MODELS, "shapes", model)
    monkeypatch.chdir(tmp_path)


def test_there_is_something_to_run():
    assert len(EXAMPLES) == 6
    assert len(DOCUMENTS) >= 6


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.stem)
def test_example(file, model, monkeypatch, capsys):
    assert len(file.read_text().splitlines()) <= 40
    monkeypatch.setattr(sys, "argv", [file.name, "--model", str(model)])
    runpy.run_path(str(file), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda f: f.stem)
def test_document(file):
    text = file.read_text()
    names: dict[str, object] = {"__name__": "__main__"}
    printed = ""
    for block in FENCE.finditer(text):
        language, body = block.groups()
        line = text[: block.start(2)].count("\n")
        if language == "python":
            printed = python(body, names, file, line)
        elif language == "output":
            assert trimmed(printed) == trimmed(body), f"{file.name}:{line + 1} does not show what is printed"
        elif language == "sh":
            for command in commands(body):
                assert main(command) == 0, f"{file.name}:{line + 1}: ditkit {shlex.join(command)}"


def python(body: str, names: dict[str, object], file: Path, line: int) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile("\n" * line + body, str(file), "exec"), names)
    return out.getvalue()


def commands(body: str) -> list[list[str]]:
    lines = body.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("ditkit ")]


def trimmed(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip("\n").splitlines()]


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda f: f.stem)
def test_links_lead_somewhere(file):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", FENCE.sub("", file.read_text())):
        if "://" not in target and target != "guides/images/shapes.png":  # drawn by the embedded model
            assert (file.parent / target).exists(), f"{file.name} points to {target}"


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda f: f.stem)
def test_files_named_in_the_text_exist(file):
    """`models/wan.py` is looked up in the package, `tests/...` from the root; bare names may be anything."""
    text = FENCE.sub("", file.read_text())
    for name in re.findall(r"`((?:[\w.]+/)+(?:[\w.]+\.\w+)?)`", text):
        if not name.startswith(("wan/", "outputs/", "scheduler/")):  # of other projects, or made by a run
            assert any((base / name).exists() for base in (ROOT, ROOT / "src/ditkit")), f"{file.name} names {name}"
