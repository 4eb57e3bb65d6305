"""``ditkit doctor``: what this installation has and what it lacks."""

from __future__ import annotations

import importlib.util
import os
import platform

import typer

from ditkit import config
from ditkit.cli import show
from ditkit.cli.flags import RawSettings, kebab, with_settings
from ditkit.cli.opening import model_name
from ditkit.errors import SetupError
from ditkit.setup import Setup

OPTIONAL = {
    "huggingface_hub": 'models from the hub: pip install "ditkit[hub]"',
    "fastapi": 'hosts over HTTP and child processes: pip install "ditkit[remote]"',
    "ray": 'many machines: pip install "ditkit[ray]"',
    "gguf": 'GGUF files: pip install "ditkit[gguf]"',
    "mlx": 'the text encoder on Apple silicon: pip install "ditkit[mlx]"',
    "diffusers": "tests only",
    "accelerate": "tests only",
}
"""Packages that ditkit runs without, and what they are for."""


def add_to(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


@with_settings
def doctor(given: RawSettings) -> int:
    """Show versions, devices, encoders and the embedded models; with --placement instead the places that stages run at:
    latency, versions, device and probe. Exit code 1 when something is missing or wrong."""
    setup = config.settle(*given.layers()).setup()
    if setup.placement:
        return check_places(given, setup)
    if given.named():
        raise SetupError(
            f"doctor with --{kebab(given.named()[0])}", "without a placement there is nothing that it is for",
            "Leave it out, or give --placement STAGE=PLACE",
        )  # fmt: skip
    checks = [*software(), *hardware(), encoder(), *embedded_model()]
    out = show.console()
    out.print(show.table(("", "what", "found"), [("ok" if ok else "!!", what, found) for ok, what, found in checks]))
    return 0 if all(ok for ok, _, _ in checks) else 1


def check_places(given: RawSettings, setup: Setup) -> int:
    from ditkit.cli import places

    for key in given.named():
        if key not in Setup.model_fields:
            raise SetupError(f"doctor with --{kebab(key)}", "places are not asked for clips", "Leave it out")
    rows = places.check(setup.model_copy(update={"model": model_name(setup.model)}))
    cells = [("ok" if good else "!!", *row) for good, row in rows]
    show.console().print(show.table(places.HEADINGS, cells))
    return 0 if all(good for good, _ in rows) else 1


def software() -> list[tuple[bool, str, str]]:
    from ditkit.receipt import versions

    rows = [(found != "not installed", package, found) for package, found in versions().items()]
    for package, purpose in OPTIONAL.items():
        there = importlib.util.find_spec(package) is not None
        rows.append((True, package, f"{'installed' if there else 'not installed'} ({purpose})"))
    return rows


def hardware() -> list[tuple[bool, str, str]]:
    import torch

    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    devices = ["cpu", *(f"cuda:{i} ({name})" for i, name in enumerate(gpus))]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    return [
        (True, "platform", platform.platform()),
        (True, "devices", ", ".join(devices)),
        (True, "threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"),
    ]


def encoder() -> tuple[bool, str, str]:
    try:
        import av
    except ImportError:
        return False, "mp4 encoder", "av is not installed; pip install av"
    found = "libx264" in av.codecs_available
    ffmpeg = ".".join(map(str, av.library_versions["libavcodec"]))
    return found, "mp4 encoder", f"{'libx264' if found else 'no libx264'} in PyAV, libavcodec {ffmpeg}"


def embedded_model() -> list[tuple[bool, str, str]]:
    """Every model that comes with the package: its parts are all there and what their files hash to."""
    from ditkit.assembly import MODELS, Model
    from ditkit.errors import DitkitError
    from ditkit.store.hashes import HASHES

    rows = []
    for name, folder in MODELS.items():
        try:
            Model.open(name)
        except DitkitError as e:
            rows.append((False, f"model {name}", str(e)))
            continue
        files = sorted(folder.rglob("*.safetensors"))
        size = sum(file.stat().st_size for file in files) / 1e6
        rows.append((True, f"model {name}", f"{folder}, {size:.1f} MB of weights"))
        rows += [(True, f"  {file.relative_to(folder)}", f"sha256 {HASHES.of(file)[:16]}") for file in files]
    return rows
