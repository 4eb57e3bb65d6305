"""What a person sees of a run: its step table, its progress, a small preview and where the time went.

On a terminal a bar and a picture that are redrawn in place; anywhere else plain lines. Everything comes from events, so
nothing here changes a result. Leaves out: running."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from ditkit.events import Event, Listener
from ditkit.hiding import hidden, printable

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console
    from rich.text import Text

    from ditkit.contracts import Step

Inspect = Callable[[Any], "np.ndarray"]

COLUMNS = 32  # width of the preview
FRAME = 0.1  # seconds between two previews, at least
LINE = 2.0  # seconds between two plain lines about steps, at least
LONG, HEAD, TAIL = 20, 8, 4  # a step table of more lines is shown by its first and last ones


def console(stderr: bool = False) -> Console:
    """A console that falls silent when its reader has gone (``| head``): the run and its files matter more. Whatever is
    printed steers no terminal; a text is one line, lines are a Text."""
    from rich.console import Console
    from rich.segment import Segment

    class Enduring(Console):
        def on_broken_pipe(self) -> None:
            self.quiet = True
            silence(sys.stderr if stderr else sys.stdout)

        def print(self, *objects: Any, **how: Any) -> None:
            super().print(*(printable(each) if isinstance(each, str) else each for each in objects), **how)

        def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
            for piece in super().render(renderable, options):
                yield piece if piece.control else Segment(printable(piece.text, keep="\n"), piece.style)

    return Enduring(stderr=stderr, highlight=False, markup=False, soft_wrap=True)


def silence(stream: TextIO) -> None:
    """What is still to come, and what lies in the buffer, goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class Output:
    """Stdout, whose errors know that they are its own: a library's say nothing of the file that they are about."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with _marked():
            return self.stream.write(text)

    def flush(self) -> None:
        with _marked():
            self.stream.flush()


class Errors(Output):
    """Stderr. That nobody hears what a run says is no reason to end it."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            return self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()


@contextmanager
def _marked() -> Iterator[None]:
    try:
        yield
    except OSError as e:
        vars(e)["of_output"] = True
        raise


def lost_output(error: BaseException) -> bool:
    """Whether ``error`` is that nothing can be printed any more."""
    return vars(error).get("of_output", False)


def step_table(steps: Sequence[Step], whole: bool = False) -> Text:
    """``format_table`` with a heading that stands out; a long one without its middle, unless ``whole``."""
    from rich.text import Text

    from ditkit.schedulers.table import format_table

    head, *lines = format_table(steps).splitlines()
    if len(lines) > LONG and not whole:
        left_out = f"... {len(lines) - HEAD - TAIL} more steps; `ditkit plan` shows all"
        lines = [*lines[:HEAD], left_out, *lines[-TAIL:]]
    return Text("\n").join([Text(head, "bold"), *(Text(line, "dim" if line[0] == "." else "") for line in lines)])


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Text:
    """Aligned columns, the heading in bold; the last column is not cut."""
    from rich.text import Text

    cells = [tuple(map(printable, row)) for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return Text("\n").join([Text(lines[0], "bold"), *map(Text, lines[1:])])


def estimate(x: Any, velocity: Any, sigma: float, look: Inspect) -> np.ndarray:
    """What the clip looks like so far: latents [B, C, F, h, w] -> the first clip's middle frame, uint8 [h, w, 3].

    The clean latents are x - sigma * velocity (flow matching); ``look`` makes frames of latents (``Pipeline.look``)."""
    import torch

    middle = slice(x.shape[2] // 2, x.shape[2] // 2 + 1)
    with torch.inference_mode():
        clean = (x[:1, :, middle] - sigma * velocity[:1, :, middle]).float()
        return look(clean)


def seconds(value: float) -> str:
    if value < 0.1:
        return f"{1000 * value:.1f} ms"
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def times(receipt: Mapping[str, Any]) -> str:
    """``encode_text 0.1 s, denoise 5.0 s (50 steps, 0.10 s each), ...``"""
    parts = []
    for stage, elapsed in receipt["stages"].items():
        steps = receipt["steps"] if stage == "denoise" else []
        count = f"{len(steps)} step{'' if len(steps) == 1 else 's'}"
        each = f" ({count}, {seconds(sum(s['seconds'] for s in steps) / len(steps))} each)" if steps else ""
        parts.append(f"{stage} {seconds(elapsed)}{each}")
    if receipt["loads"]:
        parts.append(f"loading {seconds(sum(receipt['loads'].values()))}")
    return ", ".join(parts) or "nothing was left to do"


def whereabouts(receipt: Mapping[str, Any]) -> list[str]:
    """A line for each stage at each other place: its time there, what travelled and for how long; for each result that
    came from the cache, or did not, the reason; for each time that a place was lost, why."""
    lines = []
    for stage, places in receipt["places"].items():
        for place in places:
            trips = [t for t in receipt["travelled"] if (t["stage"], t["place"]) == (stage, place)]
            if trips:
                keys = ("worked", "seconds", "sent", "received")
                worked, waited, there, back = (sum(trip[key] for trip in trips) for key in keys)
                way = f"{size(there)} there, {size(back)} back, {seconds(waited)} on the way"
                lines.append(f"place  {stage} at {place}: {seconds(worked)}; {way}")
            elif places != ["here"]:
                lines.append(f"place  {stage} here")
    lines += [f"cache  {stage}: {why}" for stage, why in receipt["cached"].items()]
    lines += [f"retry  {retry['stage']}: {retry['why']}" for retry in receipt["retries"]]
    return lines


def size(count: int) -> str:
    """Bytes in decimal units."""
    units = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
    return next((f"{count / unit:.1f} {name}" for unit, name in units if count >= unit), f"{count} bytes")


def say(*lines: str) -> None:
    """A note on stderr; what follows its first line is indented."""
    print("\n  ".join(["note: " + printable(hidden(lines[0])), *map(printable, lines[1:])]), file=sys.stderr)


def warn_of_truncation(event: Event) -> None:
    if event.name == "prompt.truncated":
        what = event["field"].replace("_", " ")
        say(f"the {what} is {event['tokens']} tokens too long; they were cut off its end")


class Plain:
    """Lines for logs and pipes."""

    def __init__(self, out: Console, ran: Iterable[str]):
        self.out, self.last, self.ran = out, float("-inf"), {*ran}

    def __call__(self, event: Event) -> None:
        match event.name:
            case "clip" if event["count"] > 1:
                self.out.print(f"clip {event['index'] + 1} of {event['count']}")
            case "load.end":
                self.out.print(f"loaded {event['component']} in {seconds(event['elapsed'])}")
            case "cache.hit":
                self.ran.add(event["stage"])
            case "stage.skipped" if event["stage"] not in self.ran:
                self.out.print(f"{event['stage']}: skipped, {event['reason']}")
            case "stage.end":
                self.ran.add(event["stage"])
                self.out.print(f"{event['stage']}: {seconds(event['elapsed'])}")
            case "step.end":
                step = event["step"]
                if event.seconds - self.last >= LINE or step.index + 1 == step.count:
                    self.last, took = event.seconds, seconds(event["elapsed"])
                    self.out.print(f"step {step.index + 1} of {step.count}, sigma {step.sigma:.4f}, {took}")


class Live:
    """A bar and, where the model says how its latents look, a picture; both vanish at the end of ``self.live``."""

    def __init__(self, out: Console, look: Inspect | None, frames: int):
        from rich import live, progress

        self.look, self.frames, self.clip, self.last = look, frames, "", float("-inf")
        self.picture: Text | None = None
        columns = progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn()
        self.progress = progress.Progress(*columns, progress.TimeElapsedColumn(), progress.TimeRemainingColumn())
        self.task = self.progress.add_task("starting", total=None)
        self.live = live.Live(get_renderable=self.render, console=out, transient=True, refresh_per_second=8)

    def render(self) -> Any:
        from rich.console import Group

        picture = self.picture
        return Group(*([] if picture is None else [picture]), self.progress)

    def __call__(self, event: Event) -> None:
        match event.name:
            case "clip" if event["count"] > 1:
                self.clip = f"clip {event['index'] + 1} of {event['count']}: "
            case "load.start":
                self.begin(f"loading {event['component']}")
            case "stage.start":
                self.begin(event["stage"])
            case "step.start":
                self.begin("denoise", event["step"].count, event["step"].index)
            case "step.end":
                self.progress.update(self.task, completed=event["step"].index + 1)
            case "prediction" if self.look and self.due():
                self.show(estimate(event["x"], event["velocity"], event["step"].sigma, self.look))
            case "frames":
                self.begin("decode_latents", self.frames)
                self.progress.advance(self.task, len(event["frames"]))
                if self.due():
                    self.show(event["frames"][-1].numpy())

    def begin(self, what: str, total: int | None = None, done: int = 0) -> None:
        description = self.clip + what
        if self.progress.tasks[0].description != description or self.progress.tasks[0].total != total:
            self.progress.reset(self.task, description=description, total=total, completed=done)

    def due(self) -> bool:
        now = time.perf_counter()
        late = now - self.last >= FRAME
        self.last = now if late else self.last
        return late

    def show(self, frame: np.ndarray) -> None:
        from ditkit.media import preview_blocks

        factor = max(1, COLUMNS // frame.shape[1])
        self.picture = preview_blocks(frame.repeat(factor, 0).repeat(factor, 1), COLUMNS)
        self.picture.end = "\n"  # the bar comes below


@contextmanager
def view(
    out: Console, quiet: bool, look: Inspect | None, frames: int, ran: Iterable[str] = ()
) -> Iterator[list[Listener]]:
    """Listeners that show a run while it is within ``with``. ``ran``: the stages that the part of the run before this
    one has done (``Recorder.done``)."""
    if quiet:
        yield [warn_of_truncation]
    elif out.is_terminal and not out.is_dumb_terminal:
        live = Live(out, look, frames)
        with live.live:
            yield [warn_of_truncation, live]
    else:
        yield [warn_of_truncation, Plain(out, ran)]


def section(title: str, body: Text | str) -> Text:
    from rich.text import Text

    return Text.assemble((f"\n{title}\n", "bold"), body)


def value(setting: Any) -> str:
    """A setting's value as one writes it in a config file; ``none`` for what is not set."""
    return "none" if setting is None else json.dumps(setting, ensure_ascii=False)
