"""What all tests share: one thread each, because they run side by side; a tiny model on disk; tests without oracles."""

import ast
import re
import tomllib
import traceback
from pathlib import Path

import pytest
import torch

import ditkit

torch.set_num_threads(1)

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


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


# --- ``--without EXTRA``: the packages of that extra are not installed; a test that imports one is skipped, by name.
# A package that ditkit itself fails to import is a fault, as ever.


def pytest_addoption(parser):
    parser.addoption("--without", metavar="EXTRA", help="skip what needs the packages of this extra of pyproject.toml")


def pytest_configure(config):
    extra = config.getoption("--without")
    lines = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"][extra] if extra else []
    config.absent = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in lines}


def pytest_ignore_collect(collection_path, config):
    """Whether the file imports one of them at its top."""
    if not config.absent or collection_path.suffix != ".py":
        return None
    names = [getattr(n, "module", None) or n.names[0].name for n in _imports(collection_path)]
    return True if {name.split(".")[0] for name in names} & config.absent - {"transformers"} else None


def _imports(file: Path) -> list[ast.Import | ast.ImportFrom]:
    return [n for n in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(n, ast.Import | ast.ImportFrom)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    return (yield from _skipped_without(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    return (yield from _skipped_without(item))


def _skipped_without(item):
    try:
        return (yield)
    except ModuleNotFoundError as error:
        files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
        ours = any(file.is_relative_to(Path(ditkit.__file__).parent) for file in files)
        if ours or error.name.split(".")[0].replace("-", "_") not in item.config.absent:
            raise
        pytest.skip(f"{error.name} is not here")
