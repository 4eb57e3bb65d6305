"""``python -m benchmarks``: all figures, or some groups of them."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import report
from benchmarks.measure import CLOCKS, Row

GROUPS = ("transformer", "vae", "loop", "start", "memory", "loading", "wire")
ROOT = Path(__file__).parents[1]


def quiet() -> None:
    """The libraries beside us print a progress bar for each thing that they load."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def rows(groups: list[str], work: Path, threads: int, clock: str, quick: bool) -> Iterator[Row]:
    """Each figure as it is ready. ``quick`` takes the fewest repeats, to see that everything runs."""
    import torch

    from benchmarks import compute, loading, loop, models, process, wire

    torch.set_num_threads(threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    quiet()
    tick = CLOCKS[clock]

    def few(repeats: int) -> int:
        return 2 if quick else repeats

    needed = {"transformer": models.SIZES, "loop": ("shapes", "wide"), "start": ("shapes",), "memory": ("wide",)}
    folders = {n: models.write(work / n, n) for n in models.SIZES if any(n in needed.get(g, ()) for g in groups)}
    if "start" in groups:
        yield from process.imports(few(5), threads, clock)
        yield from process.first_step(folders["shapes"], work, few(5), threads, clock)
    if "memory" in groups:
        yield from process.memory(folders["wide"], few(3), threads)
    if "transformer" in groups:
        for name, repeats in (("shapes", 40), ("middle", 7), ("wide", 5)):
            for dtype in (torch.float32, torch.bfloat16):
                yield from compute.transformer(folders[name], name, dtype, few(repeats), tick)
    if "vae" in groups:
        yield from compute.vae(work / "vae12", 12, (13, 64, 64), few(9), tick)
        yield from compute.vae(work / "vae96", 96, (5, 96, 128), few(3), tick)
    if "loop" in groups:
        yield from loop.beside_the_model(folders["shapes"], 13, 64, 64, 20, few(7))
        yield from loop.beside_the_model(folders["shapes"], 81, 480, 832, 8, few(3))
        yield from loop.share_of_a_run(folders["wide"])
    if "loading" in groups:
        yield from loading.rows(work, "tiny" if quick else "1.3B", few(3), threads, clock)
    if "wire" in groups:
        yield from wire.rows(few(25))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=GROUPS, nargs="+", default=list(GROUPS), help="these groups alone")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of both sides (default 1)")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: processor time instead, for a busy machine"
    )
    parser.add_argument("--quick", action="store_true", help="two repeats of everything, to see that it runs")
    parser.add_argument(
        "--write", action="store_true", help="write BENCHMARKS.md as well, the groups of this run in it"
    )
    args = parser.parse_args()
    if args.write and args.quick:
        parser.error("--write wants all repeats")

    facts, begun, found = report.machine(args.threads, args.clock), time.perf_counter(), []
    with tempfile.TemporaryDirectory(prefix="ditkit-bench-") as work:
        for row in rows(args.only, Path(work), args.threads, args.clock, args.quick):
            found.append(row)
            print(f"[{time.perf_counter() - begun:4.0f} s]", " | ".join(report.cells(row)), file=sys.stderr, flush=True)
    facts["seconds"] = round(time.perf_counter() - begun)
    report.show(found, facts)
    print(report.write_json(ROOT / "outputs" / "benchmarks" / f"{time.strftime('%Y%m%d-%H%M%S')}.json", found, facts))
    if args.write:
        page = ROOT / "BENCHMARKS.md"
        whole = args.only == list(GROUPS)
        page.write_text(report.markdown(found, facts) if whole else report.renewed(page.read_text(), found, facts))
        print(page)
    return 0 if all(row.met is not False for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
