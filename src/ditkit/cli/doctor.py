"""``ditkit doctor``: what this installation has and what it lacks; with a placement every place that stages run at."""

from __future__ import annotations

import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

from ditkit import config, devices
from ditkit.cli import show
from ditkit.cli.flags import RawSettings, kebab, with_settings
from ditkit.cli.opening import model_name
from ditkit.errors import DitkitError, SetupError, nearest
from ditkit.setup import Setup

if TYPE_CHECKING:
    from ditkit.placement.job import Channel
    from ditkit.placement.remote import Remote

OPTIONAL = {
    "huggingface_hub": 'models from the hub: pip install "ditkit[hub]"',
    "fastapi": 'hosts over HTTP and child processes: pip install "ditkit[remote]"',
    "ray": 'many machines: pip install "ditkit[ray]"',
    "gguf": 'GGUF files: pip install "ditkit[gguf]"',
    "mlx": 'the text encoder on Apple silicon: pip install "ditkit[mlx]"',
    "diffusers": "tests only",
    "accelerate": "tests only",
}  # packages that ditkit runs without, and what they are for
QUESTIONS = 5  # how often a place is asked for its latency
Row = tuple[bool, tuple[str, ...]]  # whether something is in order, and what was found


@with_settings
def doctor(given: RawSettings) -> int:
    """Show versions, devices, encoders and the embedded models; with --placement instead the places that stages run at:
    latency, versions, device and probe. Exit code 1 when something is missing or wrong."""
    setup, named = config.settle(*given.layers()).setup(), given.named()
    if setup.placement:
        for key in named:
            if key not in Setup.model_fields:
                raise SetupError(f"doctor with --{kebab(key)}", "places are not asked for clips", "Leave it out")
        columns: tuple[str, ...] = ("", "stage", "place", "latency", "versions", "device", "probe")
        rows = places(setup.model_copy(update={"model": model_name(setup.model)}))
    elif named:
        asked, found = f"doctor with --{kebab(named[0])}", "without a placement there is nothing that it is for"
        raise SetupError(asked, found, "Leave it out, or give --placement STAGE=PLACE")
    else:
        columns, rows = ("", "what", "found"), [*software(), *hardware(), *embedded_models()]
    show.console().print(show.table(columns, [("ok" if good else "!!", *row) for good, row in rows]))
    return 0 if all(good for good, _ in rows) else 1


def software() -> Iterator[Row]:
    from ditkit.receipt import versions

    for package, found in versions().items():
        yield found != "not installed", (package, found)
    for package, purpose in OPTIONAL.items():
        there = importlib.util.find_spec(package) is not None
        yield True, (package, f"{'installed' if there else 'not installed'} ({purpose})")


def hardware() -> Iterator[Row]:
    import torch

    yield True, ("platform", platform.platform())
    for name, fault in devices.devices().items():
        if name != "cuda":
            about = fault or (f"{torch.cuda.get_device_name(name)}" if name.startswith("cuda") else "")
            yield not fault, (f"device {name}", about)
    yield True, ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors")
    base, others = devices.seconds("float32"), ("bfloat16", "float16", "float64")
    said = ", ".join(f"{name} {devices.seconds(name) / base:.2g}" for name in others)
    yield True, ("dtypes on the CPU", f"time of a product: float32 1, {said}")
    try:
        import av
    except ImportError:
        yield False, ("mp4 encoder", "av is not installed; pip install av")
        return
    found = "libx264" in av.codecs_available
    ffmpeg = ".".join(map(str, av.library_versions["libavcodec"]))
    yield found, ("mp4 encoder", f"{'libx264' if found else 'no libx264'} in PyAV, libavcodec {ffmpeg}")


def embedded_models() -> Iterator[Row]:
    """Every model that comes with the package: its parts are all there and what their files hash to."""
    from ditkit.assembly import MODELS, Model
    from ditkit.store.hashes import HASHES

    for name, folder in MODELS.items():
        try:
            Model.open(name)
        except DitkitError as e:
            yield False, (f"model {name}", str(e))
            continue
        files = sorted(folder.rglob("*.safetensors"))
        size = sum(file.stat().st_size for file in files) / 1e6
        yield True, (f"model {name}", f"{folder}, {size:.1f} MB of weights")
        for file in files:
            yield True, (f"  {file.relative_to(folder)}", f"sha256 {HASHES.of(file)[:16]}")


def places(setup: Setup) -> list[Row]:
    """A row for each entry of ``placement``."""
    from ditkit.placement import Places

    rows: list[Row] = []
    with closing(Places(setup)) as all_places:
        for target, spec in all_places.specs.items():
            good, facts = True, ("", "", "", "")
            if spec.kind != "here":
                try:
                    remote = all_places.remote(spec)
                    said = remote.description
                    latency = f"{1000 * median(remote.channel):.1f} ms"
                    about = latency, compared(said.get("versions", {})), device_of(said, target.stage)
                    good, probe = probed(remote, target.stage, all_places.expected.get(target))
                    facts = *about, probe
                except DitkitError as e:
                    good, facts = False, ("", "", "", str(e))
            rows.append((good, (target.text, spec.text, *facts)))
    return rows


def median(channel: Channel) -> float:
    """Seconds of a question and its answer."""
    found = []
    for _ in range(QUESTIONS):
        begun = time.perf_counter()
        channel.ask("health")
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


def compared(theirs: Mapping[str, str]) -> str:
    """ditkit and torch, with ours where that is another one."""
    from ditkit.receipt import versions

    ours, found = versions(), []
    for name in ("ditkit", "torch"):
        here = "" if theirs.get(name) == ours[name] else f" (here {ours[name]})"
        found.append(f"{name} {theirs.get(name)}{here}")
    return ", ".join(found)


def device_of(said: Mapping[str, Any], stage: str) -> str:
    """Device and dtype of the parts that the stage calls, and the threads of a CPU."""
    parts, called = said.get("parts", {}), said["stages"].get(stage, {}).get("components", {})
    told = [parts[n] for n in called if parts.get(n, {}).get("dtype", "none") != "none"]
    found = [f"{part.get('device')} {part['dtype']}" for part in told]
    threads = said.get("machine", {}).get("threads")
    return ", ".join([*dict.fromkeys(found), *([f"{threads} thread{'' if threads == 1 else 's'}"] if threads else [])])


def probed(remote: Remote, stage: str, expected: str | None) -> tuple[bool, str]:
    """Whether it is as expected, and the probe's hash, to be pinned with ``expected_probes``."""
    from ditkit.placement.probe import has_probe

    stages = remote.description["stages"]
    if stage not in stages:
        return False, f"not offered; it has {', '.join(stages) or 'nothing'}{nearest(stage, stages)}"
    if not has_probe(stages[stage]["components"]):
        return True, "none"
    found = remote.probe(stage)
    if expected is not None and not found.startswith(expected):
        return False, f"{found[:16]}, expected is {expected[:16]}"
    return True, found[:16]
