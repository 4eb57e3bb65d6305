"""The commands about a model's files: ``ditkit inspect`` (what they are, and whether they can be used; only headers are
read), ``convert`` (to the other layout, type or shards) and ``lock`` (to a commit and to the bytes).

A file, or a folder with one part, is inspected as that part: it can be used if it would load. Anything else is
inspected as a model: it can be used if it is whole and its parts fit together. A LoRA is held against ``--model``."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditkit.cli import show
from ditkit.cli.flags import AsJson, FolderArgument, PathArgument, Plugs, bring_plugs
from ditkit.cli.opening import packaged
from ditkit.errors import DitkitError, LoadError, SetupError
from ditkit.hiding import printable

if TYPE_CHECKING:
    from rich.text import Text

    from ditkit.checkpoints.convert.convert import Progress
    from ditkit.checkpoints.model.part import Part

UNUSABLE = 2
LONG = 8  # longer lists, such as the statistics of latents, are for --json
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def inspect(
    path: Annotated[
        Path, PathArgument(help="A file of weights, the folder of a model or a part, or a packaged model.")
    ],
    as_json: AsJson = False,
    variant: Annotated[str | None, typer.Option(help="Which weights of a Diffusers folder, such as fp16.")] = None,
    model: Annotated[str | None, typer.Option(help="For a LoRA: the model that it is for.")] = None,
    plugs: Plugs = None,
) -> int:
    """Tell what weights are and what they lack; exit with 0 only if they can be used."""
    bring_plugs(plugs)
    try:
        report = examine(path, variant, model)
    except DitkitError as error:
        if not as_json:
            raise
        report = {"path": str(path), "usable": False, "problems": [str(error)]}
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 0 if report["usable"] else UNUSABLE


def examine(path: Path, variant: str | None = None, model: str | None = None) -> dict[str, Any]:
    """The report, as plain values. Raises LoadError for what cannot be opened or recognised."""
    from ditkit.checkpoints.files.opening import open_source
    from ditkit.checkpoints.files.text import readable
    from ditkit.checkpoints.kinds.detect import networks, recognise
    from ditkit.checkpoints.model.find import parts_of

    with readable(f"inspecting {path}"):
        path = packaged(path)
        if os.path.isfile(path) and path.suffix != ".toml":
            source = open_source(path)
            first, *more = networks(source)
            found = None if more else recognise(first)[0]
            if found and found.kind == "lora":
                return _lora(path, source, model)
            if found and found.problems:
                return {"path": str(path), **_detected(found), "usable": False, "problems": list(found.problems)}
        if model is not None:
            raise LoadError(f"inspecting {path}", "--model was given and it is no LoRA", "Leave --model out")
        located = parts_of(path, variant)
        parts = {name: _part(part) for name, part in located.parts.items()}
        problems = [f"{name}: {fault}" for name, part in located.parts.items() for fault in _part_problems(part)]
        whole = located.unused or any(os.path.exists(path / name) for name in ("model_index.json", "ditkit.toml"))
        one = len(parts) == 1 and not whole  # a damaged file beside one good part is no folder of that part
        needs = [f"{problem.found}. {problem.do}." for problem in located.problems]
        if not one:
            problems, needs = [*problems, *needs] or _whole_problems(path, variant), []
        return {
            "path": str(path), "layout": located.layout, "task": located.task, "boundary": located.boundary,
            "expand_timesteps": located.expand_timesteps, "parts": parts, "unused": dict(located.unused),
            "needs": needs, "problems": problems, "usable": not problems,
        }  # fmt: skip


def _whole_problems(path: Path, variant: str | None) -> list[str]:
    """What opening the whole model would refuse beyond its parts: its index, its settings, its defaults."""
    from ditkit.assembly.model import Model
    from ditkit.setup import Setup

    try:
        model = Model.open(str(path), Setup(model=str(path), variant=variant, offline=True))
        for check in model.verify.values():  # of a locked manifest: every byte is read
            check()
    except DitkitError as error:
        return [str(error)]
    return []


def _detected(found: Any) -> dict[str, Any]:
    keys = ("kind", "family", "variant", "size_name", "layout", "prefix", "quantization", "possible", "decides")
    return {key: getattr(found, key) for key in keys}


def _part(part: Part) -> dict[str, Any]:
    if part.source is None or part.detected is None:
        return {"kind": part.kind, "path": str(part.path), "notes": list(part.notes)}
    stored = part.source
    while hasattr(stored, "source"):
        stored = stored.source
    types = Counter[str]()
    for facts in stored.tensors.values():
        types[facts.dtype] += math.prod(facts.shape)
    return {
        **_detected(part.detected), "path": str(part.path),
        "files": [file.name for file in part.source.files],
        "bytes": sum(file.stat().st_size for file in part.source.files),
        "parameters": sum(math.prod(facts.shape) for facts in part.source.tensors.values()),
        "tensors": len(part.source.tensors), "types": dict(types.most_common()),
        "config": {key: list(value) if isinstance(value, tuple) else value for key, value in part.config.items()},
        "notes": list(part.notes),
    }  # fmt: skip


def _part_problems(part: Part) -> list[str]:
    """What strict loading would refuse, found on a module without memory."""
    from ditkit.checkpoints.load import mismatches
    from ditkit.models.text import WanTokenizer

    if part.source is None or part.detected is None:
        try:
            WanTokenizer(part.path)
        except DitkitError as error:
            return [str(error)]
        return []
    try:
        module = part.row.skeleton(part.config)
    except (TypeError, ValueError) as error:
        return [str(error)]
    return mismatches(module, part.source, part.row.aliases)


def _lora(path: Path, source: Any, model: str | None) -> dict[str, Any]:
    from ditkit.checkpoints.lora.read import inspect_lora

    if model is None:
        return {"path": str(path), "kind": "lora", **inspect_lora(source)}
    from ditkit.checkpoints.model.find import find

    part = find(model).parts.get("transformer")
    if part is None or part.source is None:
        raise LoadError(f"holding {path} against {model}", "that has no transformer", "Name a whole model")
    targets = {name: facts.shape for name, facts in part.source.tensors.items()}
    return {"path": str(path), "kind": "lora", "model": model, **inspect_lora(source, targets, kind=part.kind)}


def _print(report: Mapping[str, Any]) -> None:
    out = show.console()
    out.print(f"{report['path']}: {_title(report)}")
    for name, about in report.get("parts", {}).items():
        out.print(show.section(name, _facts(about)))
    if "parts" not in report:
        out.print(_facts({key: value for key, value in report.items() if key not in ("path", "problems", "usable")}))
    for title, key in (("Left aside", "unused"), ("To make a clip", "needs"), ("Problems", "problems")):
        if found := report.get(key):
            items = map(": ".join, found.items()) if isinstance(found, Mapping) else found
            out.print(show.section(title, "\n".join(f"  {printable(item)}" for item in items)))


def _title(report: Mapping[str, Any]) -> str:
    usable = "it can be used" if report["usable"] else "it cannot be used"
    if report.get("kind"):
        return f"{'a LoRA' if report['kind'] == 'lora' else report['kind']}; {usable}"
    parts, task = report["parts"], report["task"]
    if len(parts) == 1:  # a whole model's layout says nothing of a part's
        (about,) = parts.values()
        return f"{about['kind']}, {about.get('layout', 'tokenizers')} layout; {usable}"
    what = f"a model for {task}" if task else f"{len(parts)} parts"
    return f"{what}, {report['layout']} layout; {usable}"


def _facts(about: Mapping[str, Any]) -> Text:
    told = {key: value for key, value in about.items() if value not in (None, "", [], (), {})}
    return show.table(("what", "value"), [(key.replace("_", " "), _text(key, value)) for key, value in told.items()])


def _text(key: str, value: Any) -> str:
    if key == "config":
        short = {k: v for k, v in value.items() if v not in (None, [])}
        return ", ".join(f"{k}={v}" for k, v in short.items() if not (isinstance(v, list) and len(v) > LONG))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text('', inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(map(str, value))
    if key == "bytes":
        return f"{value / 1e6:,.1f} MB"
    if key == "coverage":
        return f"{value:.1%}"
    return f"{value:,}" if type(value) is int else str(value)


def convert(
    src: Annotated[
        Path, PathArgument(help="A model's folder or manifest, one component or file of it, or a packaged model.")
    ],
    dst: Annotated[Path, FolderArgument(help="The folder to write.")],
    layout: Annotated[str, typer.Option(help="native (the official code's) or diffusers.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16 for every tensor. Default: as stored.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Which weights of a diffusers folder, such as fp16.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Most bytes of tensors in one safetensors file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model that is in DST.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the path.")] = False,
    plugs: Plugs = None,
) -> int:
    """Write a model, whole or not at all, in another layout or type; tensor by tensor, so memory stays small."""
    from ditkit.checkpoints.convert.convert import convert as run
    from ditkit.checkpoints.model.find import parts_of

    bring_plugs(plugs)
    src = packaged(src)
    with _progress(quiet) as progress:
        located, shard_bytes = parts_of(src, variant, verify=True), to_bytes(max_shard_size)
        done = run(src, dst, layout, dtype, located=located, shard_bytes=shard_bytes, overwrite=overwrite,
                   progress=progress)  # fmt: skip
    out = show.console()
    if not quiet:
        out.print(show.table(("file", "size"), [(name, megabytes(size)) for name, size in done.files.items()]))
        out.print(show.table(("component", "type"), list(done.types.items())))
        for remark in done.remarks:
            out.print(f"note: {remark}")
    out.print(f"{'' if quiet else 'wrote '}{done.path}")
    return 0


def to_bytes(text: str) -> int:
    """``5GB`` or ``500MB`` or a number of bytes. Raises SetupError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)?", text.strip().upper())
    if not match:
        raise SetupError("--max-shard-size", f"{text!r} is no size", "Write a size such as 5GB or 500MB")
    return int(float(match[1]) * UNITS[match[2] or ""])


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    """A bar on a terminal's stderr; nothing elsewhere."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    silent = quiet or not sys.stderr.isatty()
    with Progress(*columns, console=show.console(stderr=True), transient=True, disable=silent) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def lock(
    manifest: Annotated[Path, PathArgument(help="A manifest (ditkit.toml, model_index.json) or its folder.")],
    check: Annotated[bool, typer.Option("--check", help="Only compare; exit with 2 if a byte is different.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Use what was fetched before; no network.")] = False,
) -> int:
    """Write ditkit.lock beside a manifest: the commit of each repository, the size and sha256 of each file."""
    from ditkit.checkpoints.model import lock as locks
    from ditkit.checkpoints.model.hub import Hub
    from ditkit.checkpoints.model.manifest import Manifest
    from ditkit.media.files import write_together

    out, hub, opened = show.console(), Hub(offline=offline), Manifest.open(manifest, lock=check)
    if check:
        if not opened.locked:
            raise LoadError(f"checking {manifest}", "it has no lock", "Write one with `ditkit lock`")
        size = sum(locks.verify(place, place.resolve(hub)) for place in opened.components.values())
        out.print(f"{len(opened.components)} components, {megabytes(size)}: every byte is what it was")
        return 0
    file = locks.lock_file(opened)
    before, after = locks.read_lock(file), locks.make_lock(opened, hub)
    rows = []
    for name, entry in after.items():
        size = sum(size for size, _ in entry.files.values())
        rows.append((name, entry.written, (entry.revision or "")[:12], str(len(entry.files)), megabytes(size)))
    out.print(show.table(("component", "place", "commit", "files", "size"), rows))
    for place in opened.components.values():
        if Path(place.written).is_absolute():
            out.print(f"note: {place.component} has an absolute path, so the manifest works on this machine only")
    differences = locks.changes(before, after)
    if before and differences:
        out.print(show.table(("component", "since the last lock"), differences))
    write_together({file: locks.lock_text(after).encode()})
    out.print(f"wrote {file}" if differences else f"{file} is as it was")
    return 0
