"""How long a transformer takes to load and how much memory at most, in every layout that it is found in.

A random transformer of the shapes of Wan 2.1 1.3B is written in one layout after the other. Each measurement is a
process of its own: it imports what it needs, then loads the transformer as its users do, then touches every page of
the weights. So a side that only maps the file has read it as well when its clock stops. Beside both sides stands
``Path.read_bytes``: all bytes of the files once, into new memory. Files are in the page cache: what the disk does is
not measured. Leaves out: other components, the GPU.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Row, compared
from benchmarks.process import run
from ditkit.checkpoints.files.writing import write_file, write_pickle, write_set
from ditkit.checkpoints.kinds.kind import KINDS
from ditkit.checkpoints.kinds.wan import transformer_keys
from ditkit.checkpoints.views.mapped import Mapped
from ditkit.checkpoints.views.source import Facts, View
from ditkit.models.wan import WanConfig, WanTransformer

SIZES: Mapping[str, WanConfig] = {
    "1.3B": WanConfig(),
    "tiny": WanConfig(dim=256, num_heads=2, num_layers=2, ffn_dim=1024, text_dim=128),  # to see that it runs
}
PREFIX = "model.diffusion_model."
SCALE = 0.02  # of the random weights
READING, BESIDE, PEAK = "loading, beside reading the files", "loading, beside diffusers", "loading, peak memory"

# What the children share. Memory that was never used comes from the host of a virtual machine, slowly, when it is
# first touched: so each child touches as much as it will need, gives it back, and begins to count afterwards.
START = """
import json, mmap, os, sys, time
from pathlib import Path
import torch
torch.set_num_threads({threads})
path = Path({path!r})
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
def begin():
    global base, wall, cpu
    ballast = mmap.mmap(-1, {ballast}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for place in range(0, {ballast}, mmap.PAGESIZE):
        ballast[place] = 1
    ballast.close()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    base = status("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
def end(tensors):
    for tensor in tensors:
        tensor.detach().reshape(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()
    seconds = {{"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}}
    weights = sum(tensor.nbytes for tensor in tensors)
    print(json.dumps({{**seconds, "peak": status("VmHWM") - base, "weights": weights}}))
    sys.stdout.flush()
    os._exit(0)
"""
OURS = (
    START
    + """
from ditkit.assembly.components import Components
from ditkit.assembly.model import Model
from ditkit.checkpoints import load
from ditkit.checkpoints.kinds import detect
from ditkit.checkpoints.files import gguf
from ditkit.checkpoints.files import pickles
from ditkit.checkpoints.model.open_part import open_part
from ditkit.models import wan
from ditkit.setup import Setup
if {library!r}:
    __import__({library!r})
begin()
parts = {{"transformer": open_part(path)}}
model = Model("x", path, parts, "t2v", None, {{}}, None, (4, 8, 8), (1, 2, 2))
module = Components(model, Setup(dtype="bfloat16", device="cpu", dtype_policy="diffusers"))["transformer"]
end(list(module.parameters()))
"""
)
THEIRS = (
    START
    + """
from diffusers import WanTransformer3DModel
if {library!r}:
    __import__({library!r})
begin()
how = {{"torch_dtype": torch.bfloat16, "disable_mmap": {own_memory!r}}}
if path.is_dir():
    module = WanTransformer3DModel.from_pretrained(path, **how)
else:
    module = WanTransformer3DModel.from_single_file(str(path), config={config!r}, **how)
end(list(module.parameters()))
"""
)
READ = (
    START
    + """
begin()
files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
held = [file.read_bytes() for file in files]
end([torch.frombuffer(data, dtype=torch.uint8) for data in held])
"""
)


class Random(View):
    """Random weights of the shapes of a transformer under its native names, in bfloat16; made when asked for."""

    def __init__(self, config: WanConfig):
        with torch.device("meta"):
            module = WanTransformer(config)
        self.tensors = {name: Facts("BF16", tuple(t.shape)) for name, t in module.state_dict().items()}
        self.notes = ()
        self.pool = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).mul_(SCALE).bfloat16()

    @property
    def path(self) -> Path:
        return Path("random")

    def same(self, name: str) -> None:
        return None

    def made(self, name: str, dtype: torch.dtype | None, look: Callable[[torch.Tensor], None]) -> torch.Tensor:
        shape = self.tensors[name].shape
        count = math.prod(shape)
        return self.pool.repeat(-(-count // len(self.pool)))[:count].reshape(shape).to(dtype, copy=True)


class Changed(View):
    """``source`` with other names and data: ``make`` gives name -> (facts, tensor)."""

    def __init__(self, source: View, name_of: Callable[[str], str], dtype_of: Callable[[str], str], extra: dict):
        super().__init__(source)
        self._from = {name_of(name): name for name in source.tensors}
        self._extra = extra
        spelled = {torch.float32: "F32", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"}
        own = {name: Facts(spelled[t.dtype], tuple(t.shape)) for name, t in extra.items()}
        self.tensors = {name: Facts(dtype_of(old), source.tensors[old].shape) for name, old in self._from.items()} | own

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._extra:
            return self._extra[name]
        kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
        return self.source[self._from[name]].to(kinds[self.tensors[name].dtype])


def is_matrix(source: View, name: str) -> bool:
    return name.startswith("blocks.") and len(source.tensors[name].shape) == 2


def native(folder: Path, source: View, config: WanConfig) -> Path:
    write_file(folder / "native.safetensors", source)
    return folder / "native.safetensors"


def float32(folder: Path, source: View, config: WanConfig) -> Path:
    write_file(folder / "wide.safetensors", Changed(source, str, lambda name: "F32", {}))
    return folder / "wide.safetensors"


def prefixed(folder: Path, source: View, config: WanConfig) -> Path:
    write_file(folder / "x.safetensors", Changed(source, PREFIX.__add__, lambda name: "BF16", {}))
    return folder / "x.safetensors"


def shards(folder: Path, source: View, config: WanConfig) -> Path:
    place = folder / "transformer"
    place.mkdir()
    size = sum(2 * math.prod(facts.shape) for facts in source.tensors.values())
    other = Mapped(source, transformer_keys(config.num_layers), "other")
    write_set(place, "diffusion_pytorch_model", other, limit=size * 51 // 100)
    (place / "config.json").write_text(json.dumps(KINDS["wan"].write_config("diffusers", asdict(config))))
    return place


def pth(folder: Path, source: View, config: WanConfig) -> Path:
    write_pickle(folder / "x.pth", source)
    return folder / "x.pth"


def fp8(folder: Path, source: View, config: WanConfig) -> Path:
    spelled = {name: "F8_E4M3" if is_matrix(source, name) else "BF16" for name in source.tensors}
    write_file(folder / "fp8.safetensors", Changed(source, str, spelled.__getitem__, {}))
    return folder / "fp8.safetensors"


def fp8_scaled(folder: Path, source: View, config: WanConfig) -> Path:
    spelled = {name: "F8_E4M3" if is_matrix(source, name) else "BF16" for name in source.tensors}
    extra = {
        name.removesuffix("weight") + "scale_weight": torch.tensor(0.37)
        for name in source.tensors
        if is_matrix(source, name)
    }
    marker = torch.empty(0, dtype=torch.float8_e4m3fn)
    write_file(folder / "x.safetensors", Changed(source, str, spelled.__getitem__, {**extra, "scaled_fp8": marker}))
    return folder / "x.safetensors"


def gguf(kind: str) -> Callable[[Path, View, WanConfig], Path]:
    def write(folder: Path, source: View, config: WanConfig) -> Path:
        return write_gguf(folder / f"{kind}.gguf", source, kind)

    return write


def write_gguf(path: Path, source: View, kind: str) -> Path:
    """Matrices as random codes of the type whose scales are small, the rest in float16 or float32."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    code = GGMLQuantizationType[kind]
    per_block, width = GGML_QUANT_SIZES[code]
    scales = {"Q8_0": (0,), "Q4_K": (0, 2)}[kind]  # places of the float16 scales in a block
    random = np.random.default_rng(0)
    writer = GGUFWriter(path, "wan", use_temp_file=False)
    for name, facts in source.tensors.items():
        if not is_matrix(source, name):
            writer.add_tensor(name, source[name].float().numpy())
            continue
        rows, columns = facts.shape
        data = random.integers(0, 256, (rows, columns // per_block * width), np.uint8)
        for place in scales:
            data.reshape(-1, width)[:, place : place + 2] = np.array([SCALE / 64], np.float16).view(np.uint8)
        writer.add_tensor(name, data, raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@dataclass(frozen=True)
class Layout:
    """``rival``: whether diffusers loads the file to the same weights. ``wide``: the file has 16 bits or more for each
    number, so that reading it is the least that a load can do."""

    name: str
    write: Callable[[Path, View, WanConfig], Path]
    rival: bool = True
    wide: bool = True
    library: str = ""


LAYOUTS = (
    Layout("native safetensors", native),
    Layout("diffusers folder, 2 shards", shards),
    Layout(f"single file, {PREFIX}*", prefixed),
    Layout("native .pth", pth),
    Layout("native float32, to bfloat16", float32),
    Layout("plain fp8", fp8, wide=False),
    Layout("scaled fp8", fp8_scaled, rival=False, wide=False),
    Layout("GGUF Q8_0", gguf("Q8_0"), rival=False, wide=False, library="gguf"),
    Layout("GGUF Q4_K", gguf("Q4_K"), rival=False, wide=False, library="gguf"),
)


def rows(work: Path, size: str, repeats: int, threads: int, clock: str) -> Iterator[Row]:
    """All figures of each layout, in turns: reading, ours, theirs, and the next time the other way round."""
    config = SIZES[size]
    source = Random(config)
    for layout in LAYOUTS:
        folder = work / "loading"
        folder.mkdir(parents=True)
        try:
            found = measured(layout, folder, source, config, repeats, threads)
        finally:
            shutil.rmtree(folder)
        yield from as_rows(layout, found, clock)


Found = dict[str, list[dict[str, Any]]]


def measured(layout: Layout, folder: Path, source: View, config: WanConfig, repeats: int, threads: int) -> Found:
    """What the children of each side have printed."""
    path = layout.write(folder, source, config)
    beside = folder / "config"
    beside.mkdir()
    (beside / "config.json").write_text(json.dumps(KINDS["wan"].write_config("diffusers", asdict(config))))
    held = sum(2 * math.prod(facts.shape) for facts in source.tensors.values())
    values = {"path": str(path), "config": str(beside), "threads": threads, "library": layout.library}
    values["ballast"] = held * 9 // 4 // 4096 * 4096
    sides = {"read": READ.format(**values), "ours": OURS.format(**values)}
    if layout.rival:
        sides |= {side: THEIRS.format(**values, own_memory=side == "own") for side in ("mapped", "own")}
    found: Found = {side: [] for side in sides}
    for turn in range(repeats + 1):  # the first one fills the caches and is left out
        for side in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            taken = json.loads(run(sides[side], threads).splitlines()[-1])
            if turn:
                found[side].append(taken)
    return found


def as_rows(layout: Layout, found: Found, clock: str) -> Iterator[Row]:
    seconds = {side: [one[clock] for one in taken] for side, taken in found.items()}
    peaks = {side: [one["peak"] / 1e6 for one in taken] for side, taken in found.items()}
    weights = found["ours"][0]["weights"] / 1e6
    files = found["read"][0]["weights"] / 1e6
    sizes = f"{files:.0f} MB of files, {weights:.0f} MB of weights"
    row = compared(READING, layout.name, "s", seconds["ours"], seconds["read"], sizes)
    yield replace(row, limit=1.2 if layout.wide else None)
    if layout.rival:
        yield compared(BESIDE, f"{layout.name}: time", "s", seconds["ours"], seconds["mapped"])
        yield compared(BESIDE, f"{layout.name}: time, disable_mmap", "s", seconds["ours"], seconds["own"])
        yield compared(BESIDE, f"{layout.name}: peak", "MB", peaks["ours"], peaks["mapped"])
        yield compared(BESIDE, f"{layout.name}: peak, disable_mmap", "MB", peaks["ours"], peaks["own"])
    shares = [peak / weights for peak in peaks["ours"]]
    note = f"{statistics.median(peaks['ours']):.0f} MB, weights {weights:.0f} MB"
    yield Row(PEAK, layout.name, "x", statistics.median(shares), limit=1.15, samples={"ours": shares}, note=note)
