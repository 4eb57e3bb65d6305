"""A tiny model on disk for tests that start from the command line, and a way to call it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny

from ditkit.cli.main import main

NOTES = f"""
[defaults]
width = 32
height = 32
frames = 5
fps = 8
steps = 4

[preview]
factors = {[[0.1 * ((i + j) % 3 - 1) for j in range(3)] for i in range(16)]}
bias = [0.0, 0.1, -0.1]
"""


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    folder = tiny.write(tmp_path_factory.mktemp("model") / "tiny")
    (folder / "ditkit.toml").write_text(NOTES)
    return folder


@dataclass
class Said:
    code: int
    out: str
    err: str


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """``call("generate", "a prompt", ...)`` in an empty folder, as the shell would; what it printed and returned."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("DITKIT_")]:
        monkeypatch.delenv(name)

    def call(*words: object) -> Said:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Said(code, *capsys.readouterr())

    return call
