"""``ditkit bench``: measurements of a whole model, shown. What is measured lives in ``lab``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditkit.cli import show
from ditkit.cli.flags import AsJson, RawSettings, with_settings
from ditkit.cli.job import InterruptedRun
from ditkit.cli.opening import load, settle
from ditkit.errors import RequestError
from ditkit.request import Request

if TYPE_CHECKING:
    from ditkit.lab.quality import ImageQuality, Quality


@with_settings
def quality(
    given: RawSettings,
    clips: Annotated[int, typer.Option(help="How many held-out prompts and seeds, 1 or more.")] = 72,
    as_json: AsJson = False,
) -> int:
    """Generate clips of the drawn world and measure colour, shape and direction from their pixels.

    For the embedded models and others trained like them; an image-to-video model is given pictures of unseen scenes.
    Exit code 0 when the targets are reached, else 1."""
    from rich.progress import Progress

    from ditkit.execution.place import Interrupted
    from ditkit.lab import quality as lab

    if clips < 1:
        raise RequestError(f"--clips {clips}", "there is nothing to measure", "Give 1 or more")
    settled, opened = settle(given)
    for key in ("prompt", "seed", "image", "batched"):
        if said := [origin for origin, _ in settled.given.get(key, ()) if not origin.startswith("model ")]:
            raise RequestError(f"{said[-1]} with bench quality", f"it has a {key} of its own for each clip"
                               if key != "batched" else "it makes one clip at a time", "Leave it out")  # fmt: skip
    by_image = opened.model.task == "i2v"
    fixed = {k: v for k, v in settled.of(Request).items() if k not in ("prompt", "seed", "image")}
    opened.model.request({"prompt": "x", **fixed, **({"image": "x"} if by_image else {})})
    out = show.console(stderr=as_json)
    measured: Callable[..., Any] = lab.image_quality if by_image else lab.quality
    with Progress(console=out, disable=not out.is_terminal, transient=True) as bar:
        task = bar.add_task("clips", total=clips)
        try:
            result = measured(load(opened), clips, progress=lambda done, _: bar.update(task, completed=done), **fixed)
        except Interrupted:
            found, do = f"it was interrupted after {bar.tasks[task].completed} of {clips} clips", "Begin it again"
            raise InterruptedRun("measuring quality", found, f"{do}.") from None
    if as_json:
        targets = {"subject": lab.SUBJECT_TARGET} if by_image else lab.TARGETS
        print(json.dumps({**asdict(result), "reached": result.reached, "targets": targets}))
        return 0 if result.reached else 1
    for line in image_rates(result) if by_image else rates(result):
        out.print(line)
    for failure in result.failures:
        wrong = ", ".join(f"{name} {seen}" for name, seen in failure["seen"].items())
        scene, what = failure.get("scene"), failure.get("prompt")
        if scene is not None:
            what = f"a {scene['color']} {scene['shape']}, {scene['motion']}, on {scene['background']}"
        out.print(f"missed: {what} (seed {failure['seed']}): saw {wrong}")
    return 0 if result.reached else 1


def rates(result: Quality) -> Iterator[str]:
    from ditkit.lab.quality import ROUND_TRIP_TARGET, TARGETS

    for name, rate in result.rates.items():
        target = f"target {TARGETS[name]:.0%}" if name in TARGETS else ""
        values = "  ".join(f"{value} {r:.0%}" for value, r in result.by_value[name].items())
        yield f"{name:11}{rate:7.1%}  {target:12} {values}"
    yield f"{'round trip':11}{result.round_trip:5.1f} dB  target {ROUND_TRIP_TARGET:.0f} dB"


def image_rates(result: ImageQuality) -> Iterator[str]:
    from ditkit.lab.quality import SUBJECT, SUBJECT_TARGET

    kept = f"{' and '.join(SUBJECT)} as in the picture"
    yield f"{'subject':11}{result.subject:7.1%}  target {SUBJECT_TARGET:.0%}  {kept}"
    yield from (f"{name:11}{rate:7.1%}" for name, rate in result.rates.items())
    yield f"{'frame 1':11}{result.first_frame:5.1f} dB  against the picture"
