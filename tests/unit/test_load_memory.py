"""Each tensor is made in its final type, piece by piece: bit-equal to the plain way, and with no second copy of it."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ditkit.checkpoints.files import stored as files
from ditkit.checkpoints.files.opening import open_source
from ditkit.checkpoints.files.safetensors import TensorFiles
from ditkit.checkpoints.load import load_into
from ditkit.checkpoints.views.key_table import KeyTable, Rule
from ditkit.checkpoints.views.mapped import Mapped
from ditkit.checkpoints.views.prefixes import Unprefixed
from ditkit.checkpoints.views.source import TensorSource
from ditkit.errors import LoadError

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak memory from /proc")
WANTED = (None, torch.float64, torch.float32, torch.bfloat16, torch.float16)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> TensorFiles:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "x.safetensors")
    return TensorFiles(folder)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(files, "PIECE", 64)


def same(found: torch.Tensor, right: torch.Tensor) -> None:
    assert (found.dtype, found.shape, found.is_contiguous()) == (right.dtype, right.shape, True)
    assert torch.equal(found, right)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (7, 11)])
def test_a_cast_while_reading_is_the_plain_one(tmp_path, small_pieces, stored, wanted, shape):
    weight = numbers(*shape).to(stored)
    source = Unprefixed(saved(tmp_path, {"model.a": weight, "model.b": numbers(2)}))
    seen: list[torch.Tensor] = []
    same(source.cast("a", wanted, lambda part: seen.append(part.clone())), weight.to(wanted))
    looked = torch.cat([torch.empty(0, dtype=wanted or stored), *seen])
    assert torch.equal(looked, weight.to(wanted).reshape(-1)), "each number is looked at once, as it will be held"


@pytest.mark.parametrize("wanted", WANTED)
def test_a_cast_through_a_key_table_is_the_plain_one(tmp_path, small_pieces, wanted):
    table = KeyTable.of(
        [("plain", "other")],
        Rule(("joined",), ("q", "k", "v")),
        Rule(("bare",), ("boxed",), ones=1),
    )
    stored = {"other": numbers(3, 4), "boxed": numbers(5), "q": numbers(3, 2)}
    stored |= {"k": numbers(3, 2) + 1, "v": numbers(3, 2) - 1}
    source = Mapped(saved(tmp_path, stored), table, "native")
    assert set(source.tensors) == {"plain", "joined", "bare"}
    for name in source.tensors:
        same(source.cast(name, wanted), source[name].to(wanted))
    back = Mapped(
        saved(tmp_path, {"joined": numbers(6, 2)}), KeyTable.of([], Rule(("joined",), ("q", "k", "v"))), "other"
    )
    for share, name in enumerate("qkv"):
        same(back.cast(name, wanted), numbers(6, 2)[2 * share : 2 * share + 2].to(wanted))


@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_a_strided_tensor_of_a_pickle(tmp_path, small_pieces, wanted):
    weight = numbers(6, 40)
    torch.save({"a": weight[:, 3:20], "b": weight.T}, tmp_path / "x.pth")
    source = open_source(tmp_path / "x.pth")
    same(source.cast("a", wanted), weight[:, 3:20].contiguous().to(wanted))
    same(source.cast("b", wanted), weight.T.contiguous().to(wanted))
    raw = torch.cat([part.clone() for part in source.pieces("a", 4, 64)])
    assert torch.equal(raw.view(torch.float32), weight[:, 3:20].reshape(-1))


class Plain(TensorSource):
    """A source of somebody else's, with nothing but what every source has."""

    def __init__(self, tensors):
        self.tensors_ = tensors

    def __getitem__(self, name):
        return self.tensors_[name]


def test_a_source_that_can_do_no_better_is_cast_as_a_whole():
    seen: list[int] = []
    weight = numbers(4, 3)
    found = Plain({"a": weight.T}).cast("a", torch.bfloat16, lambda part: seen.append(part.numel()))
    assert torch.equal(found, weight.T.bfloat16())
    assert seen == [12]
    assert torch.equal(next(Plain({"a": weight}).pieces("a", 4, 8)), weight.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_that_became_shorter_is_an_error_in_both_ways(tmp_path, dtype):
    source = saved(tmp_path, {"a": numbers(1000)})
    os.truncate(tmp_path / "x.safetensors", 2000)
    with pytest.raises(LoadError, match="became shorter"):
        source.cast("a", dtype)


def one(rows: int, columns: int = 512) -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(columns, rows, bias=False)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 1025 * 512 - 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_in_any_piece(tmp_path, stored, place, bad):
    weight = torch.ones(1025, 512, dtype=stored)
    weight.view(-1)[place] = bad
    with pytest.raises(LoadError, match="weight holds infinite"):
        load_into(one(1025), saved(tmp_path, {"weight": weight}), dtype_of=lambda n: torch.bfloat16, check_finite=True)


def test_infinities_that_cancel_are_seen(tmp_path):
    weight = torch.ones(4, 512)
    weight[0, 0], weight[3, 9] = float("inf"), -float("inf")
    with pytest.raises(LoadError, match="weight holds infinite"):
        load_into(one(4), saved(tmp_path, {"weight": weight}), check_finite=True)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 60000.0), (torch.float32, 3e38), (torch.bfloat16, 3e38)])
def test_large_numbers_whose_sum_is_infinite_are_finite(tmp_path, dtype, value):
    weight = torch.full((4, 512), value, dtype=dtype)
    module = one(4)
    load_into(module, saved(tmp_path, {"weight": weight}), check_finite=True)
    assert torch.equal(module.weight, weight)


def quantised(folder: Path, kind: str, rows: int, columns: int) -> Path:
    """``rows`` x ``columns`` numbers as one tensor, ``a.weight``."""
    path = folder / "x.safetensors"
    if kind in ("BF16", "F32"):
        save_file({"a.weight": torch.ones(rows, columns, dtype=torch.bfloat16 if kind == "BF16" else None)}, path)
    elif kind in ("F8_E4M3", "rows of I8"):
        codes = torch.full((rows, columns), 3, dtype=torch.int8)
        scale = torch.tensor(0.5) if kind == "F8_E4M3" else torch.full((rows,), 0.5)
        codes = codes.view(torch.float8_e4m3fn) if kind == "F8_E4M3" else codes
        save_file({"a.weight": codes, "a.weight_scale": scale}, path)
    elif kind == "pth":
        path = folder / "x.pth"
        torch.save({"a.weight": torch.ones(rows, columns)}, path)
    else:
        gguf = pytest.importorskip("gguf")
        path, code = folder / "x.gguf", gguf.GGMLQuantizationType[kind]
        raw = torch.zeros(rows, columns // 32 * 34, dtype=torch.uint8).numpy()
        writer = gguf.GGUFWriter(path, "wan")
        writer.add_tensor("a.weight", raw, raw_dtype=code)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


SCRIPT = """
    import json, sys, torch
    from pathlib import Path
    from torch import nn
    from ditkit.checkpoints.files import gguf
    from ditkit.checkpoints.files import pickles
    from ditkit.checkpoints.files.opening import open_source
    from ditkit.checkpoints.load import load_into
    from ditkit.checkpoints.views.quantized import Dequantized
    def memory(key):
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
    def load(path, rows, columns):
        with torch.device("meta"):
            model = nn.ModuleDict({"a": nn.Linear(columns, rows, bias=False)})
        source = Dequantized(open_source(path))
        load_into(model, source, dtype_of=lambda name: torch.bfloat16, check_finite=True)
        return model
    small, large, rows, columns = sys.argv[1:]
    load(small, 256, int(columns))  # imports what is imported when it is first needed
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    model = load(large, int(rows), int(columns))
    print(json.dumps([memory("VmHWM") - before, model["a"].weight.nbytes]))
"""


@pytest.mark.slow
@linux
@pytest.mark.parametrize("kind", ["BF16", "F32", "F8_E4M3", "rows of I8", "Q8_0", "pth"])
def test_the_peak_of_one_large_tensor_is_the_tensor(tmp_path, kind):
    """64 MB in one tensor, as the embedding of UMT5 is 2 GB in one: neither the file's form of it, nor float32, is ever
    whole in memory. 5 MB for the pieces."""
    rows, columns = 2**14, 2**11
    for name, count in (("small", 256), ("large", rows)):
        (tmp_path / name).mkdir()
        quantised(tmp_path / name, kind, count, columns)
    paths = [str(next((tmp_path / name).iterdir())) for name in ("small", "large")]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), *paths, str(rows), str(columns)],
        capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak, held = json.loads(done.stdout)
    assert held == rows * columns * 2
    assert peak < 1.05 * held + 5 * 2**20, f"peak {peak / 2**20:.0f} MB for {held / 2**20:.0f} MB"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_process_has_weights_of_its_own(tmp_path):
    source = saved(tmp_path, {"weight": torch.ones(1025, 512)})
    module = one(1025)
    load_into(module, source)
    child = os.fork()
    if not child:
        module.weight.data.view(-1).numpy()[:] = 0
        os._exit(0)
    os.waitpid(child, 0)
    assert bool((module.weight == 1).all())


@pytest.mark.slow
def test_building_without_data_does_not_import_the_compiler():
    """torch would import it to draw random numbers that have no place: 1 to 2 seconds, and 80 MB."""
    script = """
        import sys, torch
        torch.ones(2, device="meta")  # for which torch before 2.11 needs sympy
        before = set(sys.modules)
        from ditkit.models.wan import WanConfig, WanTransformer
        from ditkit.models.wan_vae import WanVAE, WanVAEConfig
        with torch.device("meta"):
            WanTransformer(WanConfig(num_layers=1, image_dim=1280)), WanVAE(WanVAEConfig())
        print(sorted({"torch._dynamo", "sympy"} & set(sys.modules) - before))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True, env=environment()
    )
    assert done.stdout.strip() == "[]"


def environment() -> dict[str, str]:
    import ditkit

    return os.environ | {"PYTHONPATH": str(Path(ditkit.__path__[0]).parent), "OMP_NUM_THREADS": "1"}
