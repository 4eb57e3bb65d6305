"""What is installed is what the files say: the lock, pyproject.toml, the Makefile, README and CI agree."""

import re
import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.lock import EXTRAS, read, write
from tools.oldest import FOR_DEVELOPERS, oldest

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
LOCK = read((ROOT / "requirements.lock").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
REQUIRED = [Requirement(line) for line in PYPROJECT["build-system"]["requires"] + PROJECT["dependencies"]]
REQUIRED += [Requirement(line) for lines in PROJECT["optional-dependencies"].values() for line in lines]
TARGETS = set(re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.M)[1].split())


# --- the lock


def test_the_lock_holds_what_pyproject_asks_for():
    for requirement in REQUIRED:
        if requirement.name != "ditkit":
            version = LOCK[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version, prereleases=True), f"{requirement} is locked at {version}"


def test_the_lock_is_plain():
    """It works on any platform: releases, without the builds of one machine, addresses or options of pip."""
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines)
    assert lines == sorted(lines, key=lambda line: line.split("==")[0])
    assert not LOCK.keys() & {"ditkit", "pip"}


@pytest.mark.locked
def test_this_environment_is_the_locked_one():
    places = sorted({sysconfig.get_paths()[key] for key in ("purelib", "platlib")})  # not what ray brings along
    there = metadata.distributions(path=places)
    here = {canonicalize_name(d.metadata["Name"]): d.version.partition("+")[0] for d in there}
    assert {name: here[name] for name in LOCK.keys() & here.keys()} == {
        name: LOCK[name] for name in LOCK if name in here
    }
    unlocked = here.keys() - LOCK.keys() - {"ditkit", "pip"}
    assert not {
        n for n in unlocked if not n.startswith(("nvidia-", "cuda-", "triton", "mlx-"))
    }  # builds for a platform


def test_a_lock_is_made_of_what_pip_froze():
    frozen = "-e git+https://x/y@z#egg=ditkit\nPyYAML==6.0\ntorch==2.13.0+cpu\ntyping_extensions==4.16.0\npip==23.2\n"
    text = write(frozen)
    assert read(text) == {"pyyaml": "6.0", "torch": "2.13.0", "typing-extensions": "4.16.0"}
    assert text == write(text)
    with pytest.raises(ValueError, match="unpack"):
        write("ditkit @ file:///somewhere\n")  # what stands at a path has no release


def test_every_extra_is_locked():
    assert set(EXTRAS.split(",")) == FOR_DEVELOPERS <= PROJECT["optional-dependencies"].keys()
    users = {extra for r in REQUIRED if r.name == "ditkit" for extra in r.extras}
    assert users == PROJECT["optional-dependencies"].keys() - FOR_DEVELOPERS


# --- the lower bounds


def test_lower_bounds_are_those_of_the_metadata():
    bounds = oldest(PROJECT)
    for requirement in REQUIRED:
        if requirement.name in bounds and requirement.name != "transformers":
            assert str(requirement.specifier) == f">={bounds[requirement.name]}"
    named = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert named <= bounds.keys()
    assert {"ray", "gguf", "mlx", "openai", "fastapi"} <= bounds.keys()
    assert not {"diffusers", "peft", "pytest", "mypy"} & bounds.keys()


@pytest.mark.parametrize("line", ["torch", "torch==2.6", "torch>=2.6,<3", "torch~=2.6"])
def test_a_dependency_without_a_plain_lower_bound_is_refused(line):
    with pytest.raises(SystemExit, match=re.escape(repr(line))):
        oldest({"dependencies": [line], "optional-dependencies": {}})
    assert oldest({"dependencies": ["a[b,c]>=1.2; sys_platform == 'linux'"], "optional-dependencies": {}}) == {
        "a": "1.2"
    }


# --- pages, Makefile, CI


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_that_pages_name_exist(page):
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)\b(?=[`\s]*(?:#|$|`))", page.read_text(), re.M))
    assert named
    assert named <= TARGETS, f"{page.name} names {sorted(named - TARGETS)}"


def test_every_target_is_told_somewhere():
    text = "".join(page.read_text() for page in PAGES)
    assert {target for target in TARGETS if f"make {target}" not in text} == set()


def test_targets_are_rules():
    assert {target for target in TARGETS if not re.search(rf"^{target}:", MAKEFILE, re.M)} == set()
    dry = subprocess.run(["make", "-n", "-B", *sorted(TARGETS)], cwd=ROOT, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr


def test_nothing_but_the_lock_and_pyproject_names_a_release():
    """A pin in a third file would be forgotten."""
    for file in (ROOT / "Makefile", ROOT / ".ci" / "run"):
        assert not re.search(r"[a-z]==\d", file.read_text()), file


def test_ci_runs_what_readme_says():
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make ")]
    assert commands == ["make lint", "make test"]
    readme = (ROOT / "README.md").read_text()
    assert all(command in readme for command in commands)
