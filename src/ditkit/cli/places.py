"""What ``ditkit doctor --placement`` shows: every place that stages run at, asked who it is.

Leaves out: this machine (``doctor.py``).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

from ditkit.errors import DitkitError, nearest
from ditkit.placement import Places
from ditkit.placement.job import Channel
from ditkit.placement.probe import has_probe
from ditkit.placement.remote import Remote
from ditkit.receipt import versions
from ditkit.setup import Setup

HEADINGS = ("", "stage", "place", "latency", "versions", "device", "probe")
QUESTIONS = 5

Row = tuple[bool, list[str]]


def check(setup: Setup) -> list[Row]:
    """For each entry of ``placement`` whether it is in order, and what was found."""
    places = Places(setup)
    try:
        return [*_rows(places)]
    finally:
        places.close()


def _rows(places: Places) -> Iterator[Row]:
    for target, spec in places.specs.items():
        if spec.kind == "here":
            yield True, [target.text, spec.text, "", "", "", ""]
            continue
        try:
            remote = places.remote(spec)
            said = remote.said
            latency = f"{1000 * median(remote.channel):.1f} ms"
            facts = [latency, compared(said.get("versions", {})), device_of(said, target.stage)]
            good, probe = probed(remote, target.stage, places.expected.get(target))
            yield good, [target.text, spec.text, *facts, probe]
        except DitkitError as e:
            yield False, [target.text, spec.text, "", "", "", str(e)]


def median(channel: Channel) -> float:
    """Seconds of a question and its answer."""
    found = []
    for _ in range(QUESTIONS):
        begun = time.perf_counter()
        channel.ask("health")
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


def compared(theirs: dict[str, str]) -> str:
    """ditkit and torch, with ours where that is another one."""
    ours = versions()
    return ", ".join(
        f"{name} {theirs.get(name)}{'' if theirs.get(name) == ours[name] else f' (here {ours[name]})'}"
        for name in ("ditkit", "torch")
    )


def device_of(said: dict[str, Any], stage: str) -> str:
    """Device and dtype of the parts that the stage calls, and the threads of a CPU."""
    parts, called = said.get("parts", {}), said["stages"].get(stage, {}).get("components", {})
    told = [parts[n] for n in called if parts.get(n, {}).get("dtype", "none") != "none"]
    found = [f"{part.get('device')} {part['dtype']}" for part in told]
    threads = said.get("machine", {}).get("threads")
    return ", ".join([*dict.fromkeys(found), *([f"{threads} thread{'' if threads == 1 else 's'}"] if threads else [])])


def probed(remote: Remote, stage: str, expected: str | None) -> tuple[bool, str]:
    """Whether it is as expected, and the probe's hash, to be pinned with ``expect``."""
    stages = remote.said["stages"]
    if stage not in stages:
        return False, f"not offered; it has {', '.join(stages) or 'nothing'}{nearest(stage, stages)}"
    if not has_probe(stages[stage]["components"]):
        return True, "none"
    found = remote.probe(stage)
    if expected is not None and not found.startswith(expected):
        return False, f"{found[:16]}, expected is {expected[:16]}"
    return True, found[:16]
