"""The figures as JSON, as a table on the terminal, and as BENCHMARKS.md."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.measure import Row

PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "numpy")


def machine(threads: int, clock: str) -> dict[str, Any]:
    import torch

    import ditkit

    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "clock": clock,
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            "ditkit": ditkit.__version__,
            **{p: version(p) for p in PACKAGES},
        },
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def disturbed(facts: dict[str, Any]) -> bool:
    """Whether something else was running: then wall times are long and ratios wide."""
    return facts["load_before"] > 0.5


def number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "s":
        return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"
    return f"{value:.0f} {unit}" if unit == "MB" else f"{value:.2f} {unit}"


def cells(row: Row) -> tuple[str, ...]:
    ratio = (
        ""
        if row.ratio is None or row.spread is None
        else f"{row.ratio:.2f} ({row.spread[0]:.2f} to {row.spread[1]:.2f})"
    )
    target = "" if row.limit is None else f"≤ {row.limit:g}" + (f" {row.unit}" if row.ratio is None else "")
    met = {None: "", True: "yes", False: "NO"}[row.met]
    return row.name, number(row.ours, row.unit), number(row.theirs, row.unit), ratio, target, met


HEAD = ("", "ditkit", "diffusers", "ratio (range)", "target", "met")
OTHERS = {"loading, beside reading the files": "reading", "wire, beside a bare socket": "socket"}
"""Groups that are not compared with diffusers -> what they are compared with."""


def show(rows: Sequence[Row], facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        *HEAD, title=f"{facts['processor']}, {facts['threads']} thread(s), torch {facts['versions']['torch']}"
    )
    group = None
    for row in rows:
        if row.group != group:
            group = row.group
            table.add_section()
            table.add_row(f"[bold]{group}[/bold]")
        table.add_row(*cells(row))
    console = Console()
    console.print(table)
    if disturbed(facts):
        console.print(f"The load average was {facts['load_before']} at the start: something else was running.")


def write_json(path: Path, rows: Sequence[Row], facts: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": facts, "rows": [{**asdict(r), "met": r.met} for r in rows]}, indent=1))
    return path


def markdown(rows: Sequence[Row], facts: dict[str, Any]) -> str:
    v = facts["versions"]
    met = [r.met for r in rows if r.met is not None]
    lines = [
        "# Benchmarks",
        "",
        "ditkit beside diffusers: the same random weights, loaded from the same folders, measured in turns in one run",
        "on one machine; a ratio below 1 means that ditkit needs less. Ratios are medians over neighbouring",
        "measurements. Made by `python -m benchmarks --write`; how it is measured and what was chosen",
        "because of it stands in [guides/performance.md](guides/performance.md).",
        "",
        f"- Date: {facts['date']}",
        f"- Machine: {facts['processor']}, {facts['cores']} cores ({facts['cpu_capability']}), "
        f"{facts['memory_gb']} GB, {facts['system']}",
        f"- Threads: {facts['threads']}; clock: {facts['clock']}; load average at the start: {facts['load_before']}"
        + (" (something else was running: times are long, ratios hold)" if disturbed(facts) else ""),
        f"- Versions: ditkit {v['ditkit']}, diffusers {v['diffusers']}, torch {v['torch']}, transformers "
        f"{v['transformers']}, Python {v['python']}",
        f"- Targets met: {sum(met)} of {len(met)}",
        "",
    ]
    for group in dict.fromkeys(row.group for row in rows):
        lines += ["", *section(group, rows)]
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def section(group: str, rows: Sequence[Row], taken: str = "") -> list[str]:
    """The heading and the table of a group; ``taken`` says when, where that is not said for the whole page."""
    head = [OTHERS.get(group, text) if text == "diffusers" else text for text in HEAD]
    lines = [f"## {group[0].upper()}{group[1:]}", "", *([taken, ""] if taken else [])]
    lines += ["| " + " | ".join(head) + " |", "|---" + "|---:" * 4 + "|:---:|"]
    for row in rows:
        if row.group == group:
            name, *rest = cells(row)
            lines.append("| " + " | ".join([f"{name} ({row.note})" if row.note else name, *rest]) + " |")
    return lines


def renewed(page: str, rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """A page whose sections of these groups are of this run; the others stay as they are."""
    taken = (
        f"Taken on {facts['date']} with ditkit {facts['versions']['ditkit']}; threads: {facts['threads']}, "
        f"clock: {facts['clock']}, load average at the start: {facts['load_before']}."
    )
    top, *old = re.split(r"(?m)^(?=## )", page)
    sections = {text.splitlines()[0]: text.rstrip() + "\n" for text in old}
    for group in dict.fromkeys(row.group for row in rows):
        lines = section(group, rows, taken)
        sections[lines[0]] = "\n".join(lines) + "\n"
    whole = "\n".join([top.rstrip() + "\n", *sections.values()])
    met, missed = (len(re.findall(rf"(?m)^\|.*\| {word} \|$", whole)) for word in ("yes", "NO"))
    return re.sub(r"Targets met: \d+ of \d+", f"Targets met: {met} of {met + missed}", whole)
