"""What needs a fresh process: import time, time to the first step, and peak memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import Clock, Row, compared, in_turns
from benchmarks.models import PROMPT

IMPORT = """
import sys, time
begun = time.{clock}()
{statement}
print(time.{clock}() - begun, "torch" in sys.modules)
"""

# The command line itself, stopped at the first step. Only the ending is ours: nothing is skipped before it.
FIRST_STEP = """
import os, sys
from ditkit.cli.main import main
from ditkit.events import Events
plain = Events.emit
def emit(self, name, **values):
    plain(self, name, **values)
    if name == "step.end":
        os._exit(0)
Events.emit = emit
sys.exit(main(["generate", {prompt!r}, "--model", {folder!r}, "--device", "cpu", "--threads", "{threads}",
    "--frames", "5", "--height", "64", "--width", "64", "--steps", "2", "--out", {out!r}]) or 3)
"""
FIRST_STEP_DIFFUSERS = """
import os, torch
torch.set_num_threads({threads})
from diffusers import WanPipeline
pipe = WanPipeline.from_pretrained({folder!r})
pipe({prompt!r}, num_frames=5, height=64, width=64, num_inference_steps=2, guidance_scale=5.0,
     generator=torch.Generator().manual_seed(0), callback_on_step_end=lambda *_: os._exit(0))
raise SystemExit(3)
"""

# A whole run. VmHWM is the peak of this program alone; ru_maxrss would begin with the parent's.
PEAK = """
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
"""
MEMORY = (
    PEAK
    + """
import ditkit
pipe = ditkit.load({folder!r}, device="cpu", threads={threads})
pipe({prompt!r}, frames=5, height=64, width=64, steps=2, guidance_scale=5.0).video
print(peak())
"""
)
MEMORY_DIFFUSERS = (
    PEAK
    + """
import torch
torch.set_num_threads({threads})
from diffusers import WanPipeline
pipe = WanPipeline.from_pretrained({folder!r})
pipe.set_progress_bar_config(disable=True)
pipe({prompt!r}, num_frames=5, height=64, width=64, num_inference_steps=2, guidance_scale=5.0).frames
print(peak())
"""
)


def run(code: str, threads: int) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"a measured program failed:\n{code}\n{done.stderr[-2000:]}")
    return done.stdout


# The processor time of finished children, for a busy machine.
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": lambda: sum(os.times()[2:4])}


def imports(repeats: int, threads: int, clock: str) -> Iterator[Row]:
    inside = {"wall": "perf_counter", "cpu": "process_time"}[clock]

    def report(statement: str) -> list[str]:
        return run(IMPORT.format(statement=statement, clock=inside), threads).split()

    def seconds(statement: str) -> float:
        return float(report(statement)[0])

    if report("import ditkit")[1] != "False":
        raise RuntimeError("import ditkit imports torch")
    alone = sorted(seconds("import ditkit") for _ in range(repeats))
    yield Row("start", "import ditkit (without torch)", "s", alone[repeats // 2], limit=0.3, samples={"ours": alone})
    times = in_turns(
        lambda: seconds("import ditkit; ditkit.load"),
        lambda: seconds("from diffusers import WanPipeline"),
        repeats,
        time.perf_counter,
    )
    note = "ditkit imports the rest when it is needed: the next row has all of it"
    yield compared("start", "import ditkit.load, import WanPipeline", "s", *times, note=note)


def first_step(folder: Path, work: Path, repeats: int, threads: int, clock: str) -> Iterator[Row]:
    values = {"folder": str(folder), "prompt": PROMPT, "out": str(work / "clip.mp4"), "threads": threads}

    def one() -> None:
        run(FIRST_STEP.format(**values), threads)

    def other() -> None:
        run(FIRST_STEP_DIFFUSERS.format(**values), threads)

    times = in_turns(one, other, repeats, CLOCKS[clock])
    yield compared("start", "command to the end of the first step, model of the size of shapes", "s", *times)


def memory(folder: Path, repeats: int, threads: int) -> Iterator[Row]:
    if not Path("/proc/self/status").exists():
        return
    values = {"folder": str(folder), "prompt": PROMPT, "threads": threads}
    size = sum(f.stat().st_size for f in folder.rglob("*.safetensors")) / 1e6
    peaks = in_turns(
        lambda: int(run(MEMORY.format(**values), threads)) / 1e6,
        lambda: int(run(MEMORY_DIFFUSERS.format(**values), threads)) / 1e6,
        repeats,
        time.perf_counter,
        0,
    )
    yield compared("memory", f"peak of a process that loads {size:.0f} MB and makes a clip", "MB", *peaks)
