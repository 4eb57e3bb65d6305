"""A kind of network that one module brings: known to all that looks at files, without an edit of any file of ditkit."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from ditkit.assembly import Model
from ditkit.checkpoints.convert.convert import convert
from ditkit.checkpoints.files.opening import open_source
from ditkit.checkpoints.kinds.detect import recognise
from ditkit.checkpoints.kinds.kind import KINDS, kind_of_config
from ditkit.checkpoints.load import load_into
from ditkit.checkpoints.lora.read import inspect_lora, read_lora
from ditkit.checkpoints.model.find import locate
from ditkit.checkpoints.model.open_part import open_part
from ditkit.cli.main import main
from ditkit.cli.weights import examine
from ditkit.errors import LoadError
from ditkit.registry import Registry, bring

MODULE = Path(__file__).parents[1] / "toy_family.py"


@pytest.fixture(scope="module")
def toy():
    """The module, handed over as a file and forgotten afterwards: to all other tests the kind is unknown."""
    yield bring(str(MODULE)).module
    forget()


def forget():
    origin = KINDS.origin("toy_joint")
    for registry in Registry.every:
        registry.remove(origin)


@pytest.fixture
def native(toy, tmp_path):
    """A folder of the transformer in its own layout, with its config."""
    folder = tmp_path / "native"
    folder.mkdir()
    config, tensors = toy.made()
    save_file(tensors, folder / "anything.safetensors")
    (folder / "config.json").write_text(json.dumps(toy.JOINT.write_config("native", vars(config))))
    return folder


@pytest.fixture
def model(toy, tmp_path):
    """A whole model in the style of diffusers: the toy transformer among parts that are known."""
    folder = tiny.write(tmp_path / "model", "t2v", "diffusers")
    index = json.loads((folder / "model_index.json").read_text())
    shutil.rmtree(folder / "transformer")
    config, tensors = toy.made()
    (folder / "transformer").mkdir()
    save_file(in_diffusers(toy, tensors), folder / "transformer" / "diffusion_pytorch_model.safetensors")
    said = toy.JOINT.write_config("diffusers", vars(config))
    (folder / "transformer" / "config.json").write_text(json.dumps(said))
    index |= {"_class_name": "JointPipeline", "transformer": ["diffusers", "JointTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def in_diffusers(toy, tensors):
    """Written from the classes' names, not from the table."""
    names = {"img_in": "x_embedder", "txt_in": "context_embedder", "final": "proj_out"}
    out = {}
    for name, tensor in tensors.items():
        first, *rest = name.split(".")
        if first in names:
            out[".".join((names[first], *rest))] = tensor
            continue
        number, layer, leaf = rest
        block = f"transformer_blocks.{number}.attn."
        if layer.endswith("_out"):
            out[f"{block}{'to_out.0' if layer == 'img_out' else 'to_add_out'}.{leaf}"] = tensor
        else:
            for x, third in zip("qkv", tensor.chunk(3), strict=True):
                out[block + (f"to_{x}" if layer == "img_qkv" else f"add_{x}_proj") + f".{leaf}"] = third.clone()
    return out


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_is_recognised_by_its_tensors_and_by_its_config(toy, native, model):
    found = recognise(open_source(native / "anything.safetensors"))[0]
    assert (found.kind, found.layout, found.family, found.problems) == ("toy_joint", "native", "Toy", ())
    found = recognise(open_source(model / "transformer"))[0]
    assert (found.kind, found.layout) == ("toy_joint", "diffusers")
    config = json.loads((model / "transformer" / "config.json").read_text())
    assert kind_of_config(config) == ("toy_joint", "diffusers")


def test_it_is_unknown_without_its_module(toy, native, tmp_path):
    """What makes it known is the row: nothing else of ditkit speaks of it."""
    forget()
    try:
        with pytest.raises(LoadError, match="nothing fits its 22 tensors"):
            open_part(native)
    finally:
        bring(str(MODULE))
    assert open_part(native).kind == "toy_joint"


def test_its_code_is_in_the_identity_of_the_part(toy, model, tmp_path):
    """The same weights under changed code are another transformer; what the code says nothing of stays what it is."""
    before = Model.open(str(model)).identities
    assert Model.open(str(model)).describe()["parts"]["transformer"]["kind"].startswith("toy_joint@")
    other = tmp_path / "toy_family.py"
    other.write_text(MODULE.read_text().replace("0.1 * scale", "0.2 * scale"))
    forget()
    try:
        bring(str(other))
        after = Model.open(str(model)).identities
        forget()
    finally:
        bring(str(MODULE))
    assert {name for name in before if before[name] != after[name]} == {"transformer"}
    assert Model.open(str(model)).identities == before


def test_it_opens_in_both_layouts_and_loads_strictly(toy, native, model):
    config, tensors = toy.made()
    for folder in (native, model / "transformer"):
        part = open_part(folder, "transformer")
        assert (part.kind, part.row.config(part.config)) == ("toy_joint", config)
        assert equal(dict(part.source), tensors)
        module = part.row.skeleton(part.config)
        load_into(module, part.source)
        told = toy.JointConditioning(module.txt_in(torch.randn(1, 3, 32)))
        assert module(torch.randn(1, 16, 1, 4, 6), torch.ones(1), told).shape == (1, 16, 1, 4, 6)


def test_configs_are_held_against_the_tensors_and_age_well(native):
    file = native / "config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"of_tomorrow": 3}))
    assert "config.json has of_tomorrow = 3" in open_part(native).notes[0]
    for change, message in (
        ({"width": 8}, "width is 8 in the config and 16 in img_in.weight"), ({"patch_size": 4}, "only 2 is supported"),
        ({"heads": "2"}, "heads is '2', not a whole number"), ({"_class_name": "Other"}, "it is of 'Other'"),
    ):  # fmt: skip
        file.write_text(json.dumps(said | change))
        with pytest.raises(LoadError, match=message):
            open_part(native)
    file.unlink()
    with pytest.raises(LoadError, match="shapes do not tell heads, and there is no config"):
        open_part(native)


def test_inspect_knows_it(native, model, capsys):
    one = examine(native)
    assert (one["usable"], one["parts"]["transformer"]["kind"], one["parts"]["transformer"]["family"]) == (
        True, "toy_joint", "Toy",
    )  # fmt: skip
    assert one["needs"][0].startswith("it needs a tokenizer")
    assert main(["inspect", str(native)]) == 0
    assert "toy_joint, native layout; it can be used" in capsys.readouterr().out
    tensors = load_file(native / "anything.safetensors")
    save_file(tensors | {"double_blocks.1.extra": torch.zeros(2)}, native / "anything.safetensors")
    assert any("1 tensors are unknown to the model" in problem for problem in examine(native)["problems"])


def test_it_is_the_transformer_of_a_folder_in_the_style_of_diffusers(model):
    located = locate(model).check()
    assert (located.task, located.parts["transformer"].kind, located.expand_timesteps) == ("t2i", "toy_joint", False)
    assert list(located.parts) == ["transformer", "vae", "text_encoder", "tokenizer"]


@pytest.mark.parametrize(("sizes", "found"), [
    ({"channels": 8}, "its transformer has 8 as the latent channels (channels) and its vae 16 (z_dim of wan_vae)"),
    ({"text_width": 12}, "has 12 as the width of the text (text_width) and its text_encoder 32 (d_model of umt5)"),
])  # fmt: skip
def test_parts_that_do_not_fit_it_are_told(toy, model, sizes, found):
    config, tensors = toy.made(**sizes)
    save_file(in_diffusers(toy, tensors), model / "transformer" / "diffusion_pytorch_model.safetensors")
    said = toy.JOINT.write_config("diffusers", vars(config))
    (model / "transformer" / "config.json").write_text(json.dumps(said))
    (problem,) = locate(model).problems
    assert found in str(problem)


def test_a_part_that_it_needs_and_that_is_not_there(model):
    shutil.rmtree(model / "vae")
    (problem,) = locate(model).problems
    assert f"it needs a Wan VAE, and there is none in {model / 'vae'}" in str(problem)


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_one_part_is_converted_there_and_back_bit_equal(toy, native, model, layout, tmp_path):
    source = native if layout == "native" else model / "transformer"
    other = "diffusers" if layout == "native" else "native"
    convert(source, tmp_path / "there", other)
    convert(tmp_path / "there", tmp_path / "back", layout)
    (before,), (there,), (after,) = (
        [load_file(f) for f in p.glob("*.safetensors")] for p in (source, tmp_path / "there", tmp_path / "back")
    )
    assert equal(before, after)
    assert before.keys().isdisjoint(there.keys() - {"proj_out.weight", "proj_out.bias"})
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_a_whole_model_is_converted_there_and_back(model, tmp_path):
    convert(model, tmp_path / "there", "native")
    assert locate(tmp_path / "there").task == "t2i"
    convert(tmp_path / "there", tmp_path / "back", "diffusers")
    index = json.loads((tmp_path / "back/model_index.json").read_text())
    assert (index["_class_name"], index["transformer"]) == ("JointPipeline", ["diffusers", "JointTransformer2DModel"])
    for part in ("transformer", "vae", "text_encoder"):
        (one,), (two,) = ([load_file(f) for f in (m / part).glob("*.safetensors")] for m in (model, tmp_path / "back"))
        assert equal(one, two), part


@pytest.mark.parametrize("spelled", [
    "diffusion_model.double_blocks.1.txt_out", "transformer.transformer_blocks.1.attn.to_add_out",
    "lora_unet_double_blocks_1_txt_out",
])  # fmt: skip
def test_a_lora_finds_its_targets(toy, native, tmp_path, spelled):
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    file = tmp_path / "lora.safetensors"
    save_file({f"{spelled}.lora_down.weight": down, f"{spelled}.lora_up.weight": up}, file)
    part = open_part(native)
    shapes = {name: tuple(facts.shape) for name, facts in part.source.tensors.items()}
    adapter = read_lora(open_source(file), shapes, kind=part.kind)
    assert list(adapter.deltas) == ["double_blocks.1.txt_out.weight"]
    added = adapter.added("double_blocks.1.txt_out.weight", torch.zeros(16, 16))
    assert torch.allclose(added, up @ down, atol=1e-6)
    told = inspect_lora(open_source(file))
    assert (told["usable"], told["blocks"], told["groups"]) == (True, 2, {"txt_out": 1})
    save_file({f"{spelled}x.lora_down.weight": down, f"{spelled}x.lora_up.weight": up}, file)
    with pytest.raises(LoadError, match="the family has no module"):
        read_lora(open_source(file), shapes, kind=part.kind)


def test_a_lora_for_wan_is_none_for_it(toy, native, tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file({"diffusion_model.blocks.0.self_attn.q.diff": torch.zeros(4, 4)}, file)
    shapes = {name: tuple(facts.shape) for name, facts in open_part(native).source.tensors.items()}
    with pytest.raises(LoadError, match="it does nothing here"):
        read_lora(open_source(file), shapes, kind="toy_joint")
