"""Every example runs, and so does every block of code in the README and the guides.

Blocks of one document share their names and run from top to bottom in an empty folder. A ```python block is executed,
but one that begins with the name of a file (``# my_plug.py``) is written there;
an ```output block right after it is what it must have printed, where a line ``...`` stands for any lines; in an ```sh
block every line that begins with ``ditkit`` or ``curl`` is run, one that ends with ``&`` as a process of its own until
the document's end (a host; its port is another one here, in the python blocks too). The names ``shapes`` and
``shapes-i2v`` stand for tiny random models, so this takes seconds; a document in ``EMBEDDED`` shows what the real ones
print.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from shell import alone

from ditkit import assembly
from ditkit.cli.main import main

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "guides").glob("*.md"))]
EMBEDDED = {"models.md"}
IMAGES = {"image_to_video"}
DEFAULTS = {"width": 64, "height": 64, "frames": 13, "fps": 8, "steps": 4, "guidance_scale": 4.0, "shift": 3.0}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Of the same make as the packaged models: the second one borrows all that it can from the first."""
    root = tmp_path_factory.mktemp("models")
    defaults = "[defaults]\n" + "".join(f"{k} = {v}\n" for k, v in DEFAULTS.items())
    plain, image = tiny.write(root / "shapes"), tiny.write(root / "shapes-i2v", "i2v")
    (plain / "ditkit.toml").write_text(defaults)
    for name in ("vae", "text_encoder", "tokenizer", "scheduler"):
        shutil.rmtree(image / name)
    (image / "model_index.json").unlink()
    places = {name: f"../shapes/{name}" for name in ("vae", "text_encoder", "tokenizer")}
    places |= {name: name for name in ("transformer", "image_encoder")}
    manifest = "[components]\n" + "".join(f'{name} = "{place}"\n' for name, place in places.items())
    (image / "ditkit.toml").write_text(f'{manifest}{defaults}size_from = "request"\n')
    return {"shapes": plain, "shapes-i2v": image}


@pytest.fixture(autouse=True)
def stage(models, tmp_path, monkeypatch, request, forgotten):
    monkeypatch.chdir(tmp_path)
    file = request.node.callspec.params.get("file") if hasattr(request.node, "callspec") else None
    if file is None or file.name not in EMBEDDED:
        for name, folder in models.items():
            monkeypatch.setitem(assembly.MODELS, name, folder)


def test_there_is_something_to_run():
    assert len(EXAMPLES) == 10
    assert len(DOCUMENTS) >= 9


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.stem)
def test_example(file, models, monkeypatch, capsys):
    assert len(file.read_text().splitlines()) <= 40
    name = "shapes-i2v" if file.stem in IMAGES else "shapes"
    monkeypatch.setattr(sys, "argv", [file.name, "--model", str(models[name])])
    runpy.run_path(str(file), run_name="__main__")
    assert capsys.readouterr().out


@pytest.fixture
def hosts(models):
    """``hosts(words)`` starts ``ditkit host`` and waits until it listens."""
    started = []

    def start(words: list[str], where: str) -> None:
        words = [str(models.get(word, word)) for word in words]
        if "--model" not in words:
            words += ["--model", str(models["shapes"])]
        command = [sys.executable, "-m", "ditkit", *words, "--threads", "1"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=alone())
        started.append(process)
        line = process.stdout.readline() if process.stdout else ""
        assert "http" in line, f"{where}: ditkit {shlex.join(words)} did not start: {line}"

    yield start
    for process in started:
        process.terminate()
    for process in started:
        process.communicate(timeout=60)


def with_free_ports(text: str) -> str:
    """The document with ports that are free now: 8700, 8701, ... may be taken where tests run."""
    for port in sorted(set(re.findall(r"--port (\d+)", text))):
        with socket.create_server(("127.0.0.1", 0)) as server:
            text = re.sub(rf"\b{port}\b", str(server.getsockname()[1]), text)
    return text


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda f: f.stem)
def test_document(file, hosts):
    text = with_free_ports(file.read_text())
    names: dict[str, object] = {"__name__": "__main__"}
    printed = ""
    for block in FENCE.finditer(text):
        language, body = block.groups()
        line = text[: block.start(2)].count("\n")
        if language == "python" and (name := re.match(r"# ([\w.-]+\.py)\n", body)):
            Path(name[1]).write_text(body)
        elif language == "python":
            printed = python(body, names, file, line)
        elif language == "output":
            assert shown(trimmed(body), trimmed(printed)), f"{file.name}:{line + 1} does not show: {printed}"
        elif language == "sh":
            printed = ""
            for command in commands(body):
                if command[0] == "curl":
                    if shutil.which("curl") is None:
                        pytest.skip(f"{file.name}:{line + 1} needs curl")
                    subprocess.run([*command, "--noproxy", "*"], check=True, timeout=60)
                elif command[-1:] == ["&"]:
                    hosts(command[1:-1], f"{file.name}:{line + 1}")
                else:
                    printed += run(command[1:], f"{file.name}:{line + 1}")


def python(body: str, names: dict[str, object], file: Path, line: int) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile("\n" * line + body, str(file), "exec"), names)
    return out.getvalue()


def run(command: list[str], where: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(command)
    assert code == 0, f"{where}: ditkit {shlex.join(command)}"
    return out.getvalue()


def commands(body: str) -> list[list[str]]:
    lines = body.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("ditkit ", "curl "))]


def trimmed(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip("\n").splitlines()]


def shown(expected: list[str], printed: list[str]) -> bool:
    """Whether ``printed`` is as ``expected``, in which a line of three dots stands for any lines, or none."""
    if "..." not in expected:
        return expected == printed
    at = expected.index("...")
    if expected[:at] != printed[:at]:
        return False
    rest = expected[at + 1 :]
    return any(shown(rest, printed[i:]) for i in range(at, len(printed) + 1))


def test_three_dots_stand_for_any_lines():
    assert shown(["a", "...", "d"], ["a", "b", "c", "d"])
    assert shown(["...", "d"], ["d"])
    assert not shown(["a", "...", "c"], ["a", "b", "c", "d"])
    assert not shown(["..", "b"], ["a", "b"])


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda f: f.stem)
def test_links_lead_somewhere(file):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", FENCE.sub("", file.read_text())):
        if "://" not in target and "guides/images/" not in target:  # drawn by the embedded models
            assert (file.parent / target).exists(), f"{file.name} points to {target}"


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda f: f.stem)
def test_files_named_in_the_text_exist(file):
    """`models/wan.py` is looked up in the package, `tests/...` from the root; bare names may be anything."""
    text = FENCE.sub("", file.read_text())
    for name in re.findall(r"`((?:[\w.]+/)+(?:[\w.]+\.\w+)?)`", text):
        if not name.startswith(("wan/", "outputs/", "scheduler/", "states/")):  # of other projects, or made by a run
            assert any((base / name).exists() for base in (ROOT, ROOT / "src/ditkit")), f"{file.name} names {name}"
