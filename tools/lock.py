"""Write requirements.lock: the newest releases that fit together, as pip finds them for a fresh environment.

    make lock                    # everything anew, torch as it is in the lock
    make lock TORCH=2.14.1       # another torch

The lock is a file of pip constraints: it says which version is installed if a package is, on any platform, and never
that one is. A release of torch has many builds (CPU, CUDA, Mac), so the lock says the release only; CUDA's libraries
come with the build, which pins them itself.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements.lock"
EXTRAS = "test,oracles,lint"
HEAD = "# Made by `make lock`: what `make demo`, `make test` and CI install. Not edited by hand.\n"
OURS = {"ditkit", "pip"}


def read(text: str) -> dict[str, str]:
    """The version of each package in a lock, or in what ``pip freeze`` says."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    pairs = [line.split("==") for line in lines if line and not line.startswith("-e ")]
    return {name.lower().replace("_", "-").replace(".", "-"): version for name, version in pairs}


def write(frozen: str) -> str:
    """The lock that stands for an environment. The build of a release (``+cpu``) is not part of it."""
    versions = {name: version.partition("+")[0] for name, version in read(frozen).items() if name not in OURS}
    return HEAD + "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write requirements.lock.")
    parser.add_argument("--torch", help="the release of torch; without it the one that the lock names")
    torch = parser.parse_args().torch or read(LOCK.read_text())["torch"]
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        pip = [str(Path(folder, "Scripts" if sys.platform == "win32" else "bin", "python")), "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", f"torch=={torch}", "-e", f"{ROOT}[{EXTRAS}]"], check=True)
        frozen = subprocess.run(
            [*pip, "freeze", "--all", "--exclude-editable"], check=True, capture_output=True, text=True
        )
    LOCK.write_text(write(frozen.stdout))


if __name__ == "__main__":
    main()
