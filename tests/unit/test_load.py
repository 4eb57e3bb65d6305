"""Strict loading: what goes wrong is said, what goes right is exact, and memory holds one copy."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ditkit.checkpoints.files.safetensors import TensorFiles
from ditkit.checkpoints.load import load_into
from ditkit.errors import LoadError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.layers = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


def meta() -> Net:
    with torch.device("meta"):
        return Net()


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return {
        name: torch.tensor(9) if name == "steps" else torch.randn(tensor.shape)
        for name, tensor in meta().state_dict().items()
    }


def source(folder: Path, tensors: dict[str, torch.Tensor]) -> TensorFiles:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "x.safetensors")
    return TensorFiles(folder)


def refused(module: nn.Module, files: TensorFiles, *parts: str, **options) -> None:
    with pytest.raises(LoadError) as error:
        load_into(module, files, **options)
    for part in (f"loading {type(module).__name__} from", *parts):
        assert part in str(error.value), f"{part!r} is not in {str(error.value)!r}"


def test_a_load_is_exact(tmp_path):
    tensors, module = weights(), meta()
    load_into(module, source(tmp_path, tensors))
    loaded = module.state_dict()
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert all(isinstance(p, nn.Parameter) for p in (module.first.weight, module.layers[1].bias))


def test_requires_grad_stays(tmp_path):
    tensors, module = weights(), meta()
    module.first.requires_grad_(False)
    load_into(module, source(tmp_path, tensors))
    assert torch.equal(module.first.weight, tensors["first.weight"])
    assert not module.first.weight.requires_grad
    assert module.layers[0].weight.requires_grad


def test_the_dtype_of_each_name_is_asked_for(tmp_path):
    tensors, module = weights(), meta()
    wide = {"first.weight"}
    load_into(
        module,
        source(tmp_path, tensors),
        dtype_of=lambda name: None if name == "steps" else torch.float64 if name in wide else torch.bfloat16,
    )
    assert module.first.weight.dtype == torch.float64
    assert module.first.bias.dtype == torch.bfloat16
    assert module.steps.dtype == torch.int64
    assert torch.equal(module.first.bias, tensors["first.bias"].bfloat16())


def test_parameters_loaded_in_inference_mode_can_be_trained(tmp_path):
    module = meta()
    with torch.inference_mode():
        load_into(module, source(tmp_path, weights()))
    module.first(torch.ones(1, 3)).sum().backward()
    assert module.first.weight.grad is not None


def test_r3_missing_tensors_fail_the_load(tmp_path):
    """A predecessor loaded with strict=False and ran with half a model."""
    tensors = weights()
    for name in ("first.weight", "layers.1.bias", "steps"):
        tensors.pop(name)
    refused(meta(), source(tmp_path, tensors), "3 tensors are missing (first.weight, layers.1.bias, steps)")


def test_unknown_tensors_fail_the_load(tmp_path):
    extra = {f"extra.{i}": torch.zeros(1) for i in range(6)}
    refused(
        meta(),
        source(tmp_path, weights() | extra),
        "6 tensors are unknown to the model (extra.0, extra.1, extra.2, extra.3 and 2 more)",
    )


def test_other_shapes_fail_the_load_before_anything_is_read(tmp_path):
    tensors, module = weights() | {"first.weight": torch.zeros(4, 5), "first.bias": torch.zeros(4, 1)}, meta()
    refused(
        module,
        source(tmp_path, tensors),
        "2 tensors have another shape",
        "first.weight has [4, 5] where the model has [4, 3]",
        "first.bias has [4, 1] where the model has [4]",
    )
    assert all(p.is_meta for p in module.parameters())


def test_all_kinds_of_faults_are_told_at_once(tmp_path):
    tensors = weights() | {"odd": torch.zeros(1), "first.bias": torch.zeros(1)}
    tensors.pop("steps")
    refused(meta(), source(tmp_path, tensors), "1 tensors are missing", "1 tensors are unknown", "another shape")


def test_whole_numbers_are_no_weights(tmp_path):
    tensors = weights() | {"first.bias": torch.zeros(4, dtype=torch.int8)}
    refused(meta(), source(tmp_path, tensors), "first.bias is I8")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_numbers_that_are_not_finite(tmp_path, value):
    """1e6 is finite in the file and infinite in float16."""
    tensors = weights()
    tensors["layers.0.weight"][1, 2] = value
    options = {"dtype_of": lambda name: None if name == "steps" else torch.float16}
    refused(meta(), source(tmp_path, tensors), "layers.0.weight holds infinite", check_finite=True, **options)
    load_into(meta(), source(tmp_path, tensors), **options)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Embedding(5, 2)
        self.inner = nn.Module()
        self.inner.embed = nn.Embedding(5, 2)


ALIASES = {"inner.embed.weight": "shared.weight"}


@pytest.mark.parametrize(
    "present", [("shared.weight",), ("inner.embed.weight",), ("inner.embed.weight", "shared.weight")]
)
def test_an_alias_may_be_present_or_absent(tmp_path, present):
    value = torch.randn(5, 2)
    with torch.device("meta"):
        module = Tied()
    load_into(module, source(tmp_path, dict.fromkeys(present, value)), aliases=ALIASES)
    assert torch.equal(module.shared.weight, value)
    assert module.inner.embed.weight is module.shared.weight


def test_an_alias_with_other_values_is_refused(tmp_path):
    with torch.device("meta"):
        module = Tied()
    tensors = {"shared.weight": torch.zeros(5, 2), "inner.embed.weight": torch.ones(5, 2)}
    refused(module, source(tmp_path, tensors), "differs from its other name", aliases=ALIASES)
    refused(module, source(tmp_path, {} | {"inner.embed.weight": torch.zeros(1)}), "another shape", aliases=ALIASES)


def test_sharing_that_is_not_declared_is_refused(tmp_path):
    with torch.device("meta"):
        module = Tied()
    module.inner.embed = module.shared
    with pytest.raises(ValueError, match="list the second in aliases"):
        load_into(module, source(tmp_path, {"shared.weight": torch.zeros(5, 2)}))


def test_a_buffer_that_no_file_has_must_not_stay_on_meta(tmp_path):
    with torch.device("meta"):
        module = Net()
        module.register_buffer("table", torch.zeros(3), persistent=False)
    refused(module, source(tmp_path, weights()), "1 tensors stayed without data (table)")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
@pytest.mark.parametrize(("dtype", "copies"), [("float32", 1.0), ("bfloat16", 0.5)])
def test_peak_memory_is_one_copy(tmp_path, dtype, copies):
    """200 MB of weights in 10 tensors of 20 MB; one tensor more than the copy is allowed for, and 5 MB for the rest."""
    size = 20 * 2**20
    save_file({f"{i}.weight": torch.ones(size // 4096, 1024) for i in range(10)}, tmp_path / "x.safetensors")
    script = f"""
        import re, torch
        from torch import nn
        from ditkit.checkpoints.files.safetensors import TensorFiles
        from ditkit.checkpoints.load import load_into
        def memory(key):
            return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
        with torch.device("meta"):
            model = nn.Sequential(*(nn.Linear(1024, {size // 4096}, bias=False) for _ in range(10)))
        torch.ones(1000).to(torch.bfloat16)
        before = memory("VmRSS")
        load_into(model, TensorFiles({str(tmp_path)!r}), dtype_of=lambda name: torch.{dtype})
        print(memory("VmHWM") - before, sum(p.nbytes for p in model.parameters()))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True, env=environment()
    )
    peak, kept = map(int, done.stdout.split())
    assert kept == copies * 10 * size
    assert peak < kept + size + 5 * 2**20, f"peak {peak / 2**20:.0f} MB for {kept / 2**20:.0f} MB of weights"


def environment() -> dict[str, str]:
    import os

    import ditkit

    return os.environ | {"PYTHONPATH": str(Path(ditkit.__path__[0]).parent), "OMP_NUM_THREADS": "1"}
