"""``python -m tests.fuzz [TARGET ...] --count N --seed S``: odd inputs, and what ditkit made of them.

All targets, if none is named. Inputs that ended in a fault are kept in ``outputs/fuzz``, each with the line that reads
it again. Exit code 1 if there was any."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]


def main() -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from .campaign import Campaign, known

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(known())}")
    parser.add_argument("--count", type=int, default=1000, help="inputs of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at", type=int, help="this one input alone")
    parser.add_argument("--keep", type=Path, default=Path("outputs/fuzz"), help="where faults are kept")
    given = parser.parse_args()
    if unknown := {*given.targets} - {*known()}:
        parser.error(f"there is no target {', '.join(unknown)}; there are {', '.join(known())}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was made is removed
    columns = (
        TextColumn("{task.description:12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[told]}"),
    )
    console, reports = Console(), []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for name in given.targets or known():
            count, begin = (given.count, 0) if given.at is None else (1, given.at)
            bar = progress.add_task(name, total=count, told="")

            def tell(report, bar=bar):
                faults = f"{len(report.faults)} faults" if report.faults else ""
                progress.update(bar, completed=report.inputs, told=faults)

            reports.append(Campaign(name, given.seed, given.keep.absolute()).run(count, begin, tell))
    table = Table("target", "inputs", "ok", "refused", "faulty", "a second", "slowest", title=f"seed {given.seed}")
    for r in reports:
        faulty = r.inputs - r.kinds["ok"] - r.kinds["refused"]
        table.add_row(r.target, f"{r.inputs:,}", f"{r.kinds['ok']:,}", f"{r.kinds['refused']:,}", str(faulty),
                      f"{r.inputs / max(r.seconds, 1e-9):.0f}", f"{r.slowest:.1f} s")  # fmt: skip
    console.print(table)
    for report in reports:
        for fault in sorted(report.faults.values(), key=lambda fault: -fault.count):
            console.print(f"{report.target}: {fault.count} x {fault.kind}: {fault.place}", markup=False, soft_wrap=True)
            console.print(f"    {fault.text[:300]!r}", markup=False, soft_wrap=True)
            console.print(f"    {fault.kept[0] if fault.kept else f'--at {fault.first}'}", markup=False, soft_wrap=True)
    return 1 if any(report.faults for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
