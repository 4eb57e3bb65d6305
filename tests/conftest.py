"""What all tests share: one thread each, because they run side by side; and a tiny model on disk."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def forgotten():
    """What a test brings by name (plugs, stages, rows) is not known to the next one."""
    from ditkit.registry import BROUGHT, Registry

    kept = [(each, dict(each._rows), dict(each._origins)) for each in Registry.every]
    yield
    BROUGHT.clear()
    for each, rows, origins in kept:
        each._rows, each._origins = rows, origins


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """The folder of a complete random model; by default it makes clips of 5 frames of 32x32 in 4 steps."""
    import tiny

    folder = tiny.write(tmp_path_factory.mktemp("tiny") / "model")
    (folder / "ditkit.toml").write_text("[defaults]\nwidth = 32\nheight = 32\nframes = 5\nsteps = 4\n")
    return folder
