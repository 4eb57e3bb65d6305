"""A family that one module brings runs like Wan's own: from the command line, in pieces, at a host, with LoRAs, cached.

Two joint streams, pictures of one frame, one text encoder, guidance as an input of the network. No file of ditkit knows
of it; ``tests/toy_family.py`` is handed over by name."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file
from shell import alone

import ditkit
from ditkit import State
from ditkit.registry import bring

MODULE = Path(__file__).parents[1] / "toy_family.py"
PLUG = ("--plug", str(MODULE))
PROMPT = "a red circle"
TOKEN = "a-token-of-a-test-0123456789"
OUT = ("--no-sheet", "--quiet")
SPELLED = {"img_in": "x_embedder", "txt_in": "context_embedder", "final": "proj_out",
           "double_blocks": "transformer_blocks", "img_out": "attn.to_out.0", "txt_out": "attn.to_add_out"}  # fmt: skip
pytestmark = pytest.mark.usefixtures("forgotten")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder in the style of diffusers: the toy transformer among parts that are known."""
    toy = bring(str(MODULE)).module
    folder = tiny.write(tmp_path_factory.mktemp("toy") / "model", "t2v", "diffusers")
    shutil.rmtree(folder / "transformer")
    (folder / "transformer").mkdir()
    config, tensors = toy.made()
    names = toy.joint_keys(config.layers)
    save_file({k: v.contiguous() for k, v in renamed(names, tensors).items()},
              folder / "transformer" / "diffusion_pytorch_model.safetensors")  # fmt: skip
    said = toy.JOINT.write_config("diffusers", vars(config))
    (folder / "transformer" / "config.json").write_text(json.dumps(said))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "JointPipeline", "transformer": ["diffusers", "JointTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    for row in (toy.JOINT, toy.TASK):
        row.registry.remove(row.registry.origin(row.name))
    return folder


def renamed(table, tensors):
    """Native tensors under the other layout's names, three projections for one."""
    found = {}
    for name, tensor in tensors.items():
        if ".img_qkv." in name or ".txt_qkv." in name:
            block, leaf = name.split(".")[1], name.rsplit(".", 1)[1]
            style = "to_{}" if "img" in name else "add_{}_proj"
            for x, part in zip("qkv", tensor.chunk(3), strict=True):
                found[f"transformer_blocks.{block}.attn.{style.format(x)}.{leaf}"] = part.clone()
        else:
            for a, b in SPELLED.items():
                name = name.replace(a, b)
            found[name] = tensor
    return found


def pipe(model, **more):
    return ditkit.load(model, threads=1, **{"plugs": [str(MODULE)], **more})


def begun(loaded, **request) -> State:
    return loaded.begin(loaded.model.request({"prompt": PROMPT, "seed": 3, **request}))


def test_generate_run_from_and_replay(call, model, tmp_path):
    said = call("generate", PROMPT, "--model", model, "--seed", 3, *PLUG, *OUT, "--out", "whole.npz")
    assert said.code == 0, said.err
    cut = ("--stop-at-step", 1, "--save-state", "half.safetensors", "--quiet")
    assert call("run", PROMPT, "--model", model, "--seed", 3, *PLUG, *cut).code == 0
    assert call("run", "--from", "half.safetensors", *PLUG, *OUT, "--out", "rest.npz").code == 0
    whole, rest = (np.load(name)["video"] for name in ("whole.npz", "rest.npz"))
    assert whole.shape == (1, 32, 32, 3)
    assert (whole == rest).all()
    assert call("replay", "whole.npz", *PLUG, "--quiet").code == 0


def test_without_the_module_it_is_one_sentence(call, model):
    said = call("generate", PROMPT, "--model", model, *OUT, "--out", "a.npz")
    assert said.code == 2
    assert "Traceback" not in said.err


def test_inspect_and_convert(call, model, tmp_path):
    said = call("inspect", model, *PLUG)
    assert said.code == 0, said.err
    assert "toy_joint" in said.out or "joint transformer" in said.out
    assert call("convert", model, tmp_path / "copy", "--layout", "diffusers", *PLUG).code == 0
    one, other = (pipe(folder).run(begun(pipe(folder))).state["latents"] for folder in (model, tmp_path / "copy"))
    assert torch.equal(one, other)


def test_guidance_is_an_input_of_the_network(model):
    loaded = pipe(model)
    calls = []
    result = loaded.run(begun(loaded), until="denoise", listeners=[lambda e: calls.append(e.name)])
    assert "negative_prompt_embeds" not in result.state
    other = loaded.run(begun(loaded, guidance_scale=1.0), until="denoise").state
    assert not torch.equal(result.state["latents"], other["latents"])
    assert loaded.steps(loaded.model.request({"prompt": PROMPT}))[0].timestep <= 1.0


def test_cut_anywhere(model):
    loaded = pipe(model)
    whole = loaded.run(begun(loaded, steps=4)).state
    for cut in range(1, 4):
        half = State.from_bytes(loaded.run(begun(loaded, steps=4), stop_at_step=cut).state.to_bytes())
        assert loaded.run(half).state.equal(whole)


@dataclass(frozen=True)
class Watch:
    """Neutral plugs at B and D; they find the kinds of rows and the joint attention."""

    seen: tuple = ()
    fingerprint = "watch"

    def __call__(self, run_blocks):
        def run(blocks, x, ctx):
            assert {*ctx.tokens} == {"text", "video"}
            return run_blocks(blocks, x, ctx)

        return run


def test_plugs_that_work_on_wan_work_on_it(model):
    from tests.remembering import FirstBlockCache

    plain = pipe(model)
    bare = plain.run(begun(plain, steps=4)).state["latents"]
    kinds = []

    def attend(inner):
        return lambda q, k, v, site: (kinds.append(site.kind), inner(q, k, v, site))[1]

    seams = ditkit.Seams(run_blocks=(Watch(), FirstBlockCache(0.0)), attend=(attend,))
    watched = pipe(model, seams=seams)
    assert torch.equal(watched.run(begun(watched, steps=4)).state["latents"], bare)
    assert {*kinds} == {"joint"}
    cached = pipe(model, seams=ditkit.Seams(run_blocks=(FirstBlockCache(9.0),)))
    result = cached.run(begun(cached, steps=4))
    assert result.receipt["plugs"]["FirstBlockCache"] == {"miss": 1, "hit": 3}
    half = cached.run(begun(cached, steps=4), stop_at_step=2).state
    assert cached.run(half).state.equal(result.state)


def test_a_lora(model, tmp_path):
    down, up = torch.randn(2, 16), torch.randn(48, 2)
    name = "lora_unet_double_blocks_0_img_qkv"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "lora.safetensors")
    plain = pipe(model)
    bare = plain.run(begun(plain)).state["latents"]
    found = {
        mode: pipe(model, loras=[f"{tmp_path / 'lora.safetensors'}:0.5"], lora_mode=mode) for mode in ("side", "fused")
    }
    latents = {mode: loaded.run(begun(loaded)).state["latents"] for mode, loaded in found.items()}
    assert not torch.equal(latents["side"], bare)
    torch.testing.assert_close(latents["side"], latents["fused"], rtol=1e-4, atol=1e-4)


def test_the_result_cache(model, tmp_path):
    first, again = (pipe(model, cache=str(tmp_path / "cache"))(PROMPT, seed=3) for _ in range(2))
    assert first.receipt["cached"]["denoise"].startswith("miss")
    assert again.receipt["cached"]["denoise"].startswith("hit")
    assert torch.equal(first.state["latents"], again.state["latents"])


def test_a_child_process_and_a_host(model, monkeypatch):
    monkeypatch.setenv("DITKIT_HOST_TOKEN", TOKEN)
    here = pipe(model)
    whole = here.run(begun(here)).state
    child = pipe(model, placement={"denoise": "process"})
    assert child.run(begun(child)).state.equal(whole)
    command = [sys.executable, "-m", "ditkit", "host", "--model", model, "--port", "0", "--threads", "1", *PLUG]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**alone(), "DITKIT_HOST_TOKEN": TOKEN})  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        there = pipe(model, placement={"denoise": line.split()[0], "encode_text": line.split()[0]})
        assert there.run(begun(there)).state.equal(whole)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
