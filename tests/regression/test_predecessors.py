"""Known faults of the projects before this one (R) and of diffusers (F), each shown to be absent here.

Kept elsewhere: R3 one shard of several (``test_files.py``, ``test_load.py``), R4 the first prompt only (``test_text``,
``test_umt5``), F8 and F32 one model in two threads (``test_threads.py``), F9 other sigmas than the official ones
(``test_schedulers_official.py``), F17 identity without the dtype and F18 loading twice (``test_pipeline.py``,
``test_threads.py``), F27 declarations that are not enforced (``test_pipeline.py``), F35 frames that are rounded
(``test_cli_errors.py``)."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from reference import l2, wan

import ditkit
from ditkit.cli.main import main
from ditkit.contracts import Seams
from ditkit.errors import LoadError, RequestError, SetupError
from ditkit.models.wan import WanConfig
from ditkit.request import Request
from ditkit.schedulers import SCHEDULERS, make
from ditkit.schedulers.table import step_table
from ditkit.state import State

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return ditkit.load(tiny_model)


# --- of the predecessors


def test_r1_parts_can_be_made_any_number_of_times(tiny_model, pipe):
    """A factory that fails, or hands out the same object, when it is asked for the second time."""
    expected = pipe(PROMPT).video
    others = [ditkit.load(tiny_model) for _ in range(3)]
    for other in others:
        assert (other(PROMPT).video == expected).all()
    for name in ("tokenizer", "text_encoder", "transformer", "vae"):
        assert len({id(p.components[name]) for p in (pipe, *others)}) == 4
    for name in SCHEDULERS:
        assert make(name) == make(name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("dtype_policy", ["wan", "diffusers", "float32"])
def test_r2_the_transformer_runs_in_every_dtype(tiny_model, dtype, dtype_policy):
    """A forward pass that fails on a missing dtype attribute, or outside autocast."""
    pipe = ditkit.load(tiny_model, dtypes={"transformer": dtype}, dtype_policy=dtype_policy)
    run = pipe.run(pipe.begin(pipe.model.request({"prompt": PROMPT, "steps": 2})), until="denoise")
    assert run.state["latents"].isfinite().all()
    assert run.receipt["components"]["transformer"]["dtype"] == dtype
    dtypes = {p.dtype for p in pipe.components["transformer"].parameters()}
    narrow, wide = getattr(torch, dtype), torch.float64 if dtype == "float64" else torch.float32
    assert dtypes == {narrow, wide}


def test_r14_the_defaults_can_be_run_as_they_are(pipe):
    """Defaults such as no steps, no seed, or a scheduler that does not exist."""
    request = Request()
    scheduler = make(request.scheduler, **request.scheduler_options)
    steps = step_table(scheduler, request.steps, request.shift, request.convention, request.guidance_scale, 1000.0)
    assert len(steps) == request.steps == 50
    assert isinstance(request.seed, int)
    request.check_size(16, 4)
    defaults = {name: field.default for name, field in Request.model_fields.items()}
    pictures = {"image", "last_image", "control_video", "control_mask"}
    of_two_experts = {"guidance_scale_2", "boundary"}  # a model with two brings them
    assert {name for name, value in defaults.items() if value is None} == {"sigmas"} | pictures | of_two_experts
    assert pipe(PROMPT).video.shape == (5, 32, 32, 3)
    assert all(field.json_schema_extra["source"] and field.description for field in Request.model_fields.values())


def test_r19_one_set_of_defaults_for_every_way_in(pipe, tiny_model, tmp_path, capsys):
    """A demo with shift 8 beside a command line with shift 5."""
    by_call = pipe(PROMPT).manifests[0]
    out = tmp_path / "clip.npz"
    assert main(["generate", PROMPT, "--model", str(tiny_model), "--out", str(out), "--quiet", "--no-sheet"]) == 0
    capsys.readouterr()
    by_command = json.loads(out.with_suffix(".json").read_text())["manifest"]
    assert by_command["request"] == by_call["request"]
    assert by_command["sigmas"] == by_call["sigmas"]
    assert by_command["output_sha256"] == by_call["output_sha256"]


@pytest.mark.parametrize(
    ("sizes", "width", "height", "frames"),
    [
        ({"dim": 72, "num_heads": 6, "num_layers": 1, "ffn_dim": 40}, 16, 16, 1),
        ({"dim": 48, "num_heads": 2, "num_layers": 3, "ffn_dim": 200}, 80, 32, 9),
        ({"dim": 40, "num_heads": 1, "num_layers": 1, "text_dim": 32, "freq_dim": 64}, 32, 112, 5),
    ],
)
def test_r22_no_geometry_is_built_in(tmp_path, monkeypatch, sizes, width, height, frames):
    """480x832, 30 layers and 12 heads of 128 written into the code."""
    monkeypatch.setattr(tiny, "TRANSFORMER", replace(tiny.TRANSFORMER, **sizes))
    monkeypatch.setattr(tiny, "transformer", lambda: tiny.randomise(tiny.WanTransformer(tiny.TRANSFORMER), 1))
    pipe = ditkit.load(tiny.write(tmp_path / "model"), debug=True)
    video = pipe(PROMPT, width=width, height=height, frames=frames, steps=2).video
    assert video.shape == (frames, height, width, 3)


def test_r22_sizes_stand_in_defaults_only():
    source = Path(ditkit.__file__).parent
    found = set()
    for file in source.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.Constant)
                and type(node.value) is int
                and node.value in (480, 832, 1536, 8960, 5120)
            ):
                found.add(str(file.relative_to(source)))
    tables = {"models/published.py", "models/clip.py", "checkpoints/kinds/wan.py"}  # of published sizes, data alone
    assert found - tables == {"request.py", "assembly/tasks.py", "models/wan_block.py"}
    assert WanConfig().dim == 1536


# --- of diffusers


def told(pipe, **request) -> list[float]:
    """What the transformer is told at each call, as it arrives."""
    seen = []
    hook = pipe.components["transformer"].register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(args[1]), with_kwargs=True
    )
    try:
        pipe.run(
            pipe.begin(pipe.model.request({"prompt": PROMPT, "width": 16, "height": 16, "frames": 1, **request})),
            until="denoise",
        )
    finally:
        hook.remove()
    return [t.item() for t in seen]


@pytest.mark.parametrize("dtype_policy", ["wan", "diffusers", "float32"])
def test_f7_a_timestep_is_not_rounded_to_bfloat16(tiny_model, dtype_policy):
    pipe = ditkit.load(tiny_model, dtype="bfloat16", dtype_policy=dtype_policy)
    steps = pipe.steps(pipe.model.request({"steps": 50, "shift": 3.0}))
    exact = [s.timestep for s in steps]
    rounded = torch.tensor(exact).bfloat16().tolist()
    assert sum(a != b for a, b in zip(exact, rounded, strict=True)) >= 30  # the rounding would show
    assert told(pipe, steps=50, shift=3.0, guidance_scale=1.0) == exact
    transformer = pipe.components["transformer"]
    given = (torch.tensor([t], dtype=torch.float64) for t in (936.0, 937.0))
    times = [
        modulation.values for t in given for modulation in transformer._time(t, (1, 1, 1), torch.device("cpu"))[:1]
    ]
    assert not torch.equal(*times)  # bfloat16 knows 936 and 940 only


def test_f10_guidance_does_not_multiply_the_rounding_of_bfloat16(tiny_model):
    """The velocity that leaves guidance, at scale 5: under the official policy less than half of diffusers' error."""
    errors = {}
    for dtype_policy in ("wan", "diffusers"):
        pipe = ditkit.load(tiny_model, dtypes={"transformer": "bfloat16"}, dtype_policy=dtype_policy)
        got = {}

        def watch(inner, got=got):
            def call(x, step):
                got.update(x=x, step=step, velocity=inner(x, step))
                return got["velocity"]

            return call

        watched = ditkit.Pipeline(pipe.model, pipe.setup, pipe.components, pipe.stages, Seams(predict=(watch,)))
        state = watched.run(watched.begin(pipe.model.request({"prompt": PROMPT, "steps": 1})), until="denoise").state
        assert got["velocity"].dtype == torch.float32
        weights = tiny.transformer().state_dict()
        texts = [state["prompt_embeds"], state["negative_prompt_embeds"]]
        cond, uncond = (wan(weights, 2, got["x"], [got["step"].timestep], [text]) for text in texts)
        errors[dtype_policy] = l2(got["velocity"], uncond + 5.0 * (cond - uncond))
    assert errors["wan"] <= 0.6 * errors["diffusers"]


def test_f11_what_shall_stay_float32_does(tiny_model):
    """Which tensors are narrow is decided by full path when they are loaded; rotary tables are no weights at all."""
    pipe = ditkit.load(tiny_model, dtype="bfloat16")
    transformer = pipe.components["transformer"]
    wide = {name for name, p in transformer.named_parameters() if p.dtype == torch.float32}
    parts = ("time_embedding.0", "time_embedding.2", "time_projection.1", "head.head")
    expected = {f"{part}.{leaf}" for part in parts for leaf in ("weight", "bias")} | {"head.modulation"}
    for n in range(2):
        expected |= {f"blocks.{n}.modulation", f"blocks.{n}.norm3.weight", f"blocks.{n}.norm3.bias"}
        expected |= {f"blocks.{n}.{a}_attn.norm_{i}.weight" for a in ("self", "cross") for i in "qk"}
    assert wide == expected
    assert not list(transformer.buffers())

    seen = []

    def watch(inner):
        def call(blocks, x, ctx):
            seen.extend([x.dtype, ctx.modulation.values.dtype, *(t.dtype for t in ctx.rope)])
            return inner(blocks, x, ctx)

        return call

    plugged = ditkit.Pipeline(pipe.model, pipe.setup, pipe.components, pipe.stages, Seams(run_blocks=(watch,)))
    plugged(PROMPT, steps=1)
    tokens, modulation, *rope = seen[:4]
    assert tokens == torch.bfloat16
    assert modulation == torch.float32
    assert not {torch.bfloat16, torch.float16} & set(rope)


def test_f15_an_unknown_input_is_refused(pipe, tiny_model):
    for wrong in ({"guidance": 7.0}, {"num_inference_steps": 4}, {"Seed": 1}):
        with pytest.raises(RequestError, match="there is no setting"):
            pipe(PROMPT, **wrong)
    with pytest.raises(RequestError, match="did you mean 'guidance_scale'"):
        pipe(PROMPT, guidance_scal=7.0)
    with pytest.raises(SetupError, match="did you mean 'dtype'"):
        ditkit.load(tiny_model, dytpe="bfloat16")
    with pytest.raises(SetupError, match="there is no component 'vea'"):
        ditkit.load(tiny_model, dtypes={"vea": "float32"})
    with pytest.raises(RequestError, match="option 'ordr' of scheduler 'unipc'"):
        pipe(PROMPT, scheduler_options={"ordr": 3})


def test_f16_a_part_that_cannot_be_loaded_is_an_error_each_time(tmp_path):
    folder = tiny.write(tmp_path / "model")
    (file,) = (folder / "vae").glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    for _ in range(2):
        with pytest.raises(LoadError, match="vae"):  # its length is known when it is opened
            ditkit.load(folder)
    file.write_bytes(whole[:-4] + b"\x00\x00\xc0\x7f")  # not a number: known when it is read
    pipe = ditkit.load(folder)
    for _ in range(2):
        with pytest.raises(LoadError, match="vae"):
            pipe(PROMPT, width=16, height=16, frames=1, steps=1)
        with pytest.raises(LoadError):
            pipe.components["vae"]
    assert "vae" not in pipe.components.describe()
    file.write_bytes(whole)  # repaired; a file that changed under an open model is another one
    with pytest.raises(LoadError, match="has changed since the model was opened"):
        pipe(PROMPT, width=16, height=16, frames=1, steps=1)
    pipe = ditkit.load(folder)
    assert pipe(PROMPT, width=16, height=16, frames=1, steps=1).video.shape == (1, 16, 16, 3)


def test_f26_nothing_is_not_the_same_as_absent():
    state = State({"x": None})
    assert "x" in state
    assert state["x"] is None
    assert "y" not in state
    again = State.from_bytes(state.to_bytes())
    assert "x" in again
    assert again["x"] is None


@pytest.mark.parametrize("negative", ["", "gray"])
def test_f28_a_run_without_guidance(pipe, negative):
    """It needs no negative prompt, encodes none, and calls the transformer once a step."""
    request = pipe.model.request({"prompt": PROMPT, "negative_prompt": negative, "guidance_scale": 1.0})
    state = pipe.run(pipe.begin(request)).state
    assert "negative_prompt_embeds" not in state
    assert len(told(pipe, guidance_scale=1.0)) == 4
    assert len(told(pipe, guidance_scale=2.0)) == 8
    other = pipe.run(pipe.begin(pipe.model.request({"prompt": PROMPT, "guidance_scale": 1.0}))).state
    assert torch.equal(state["video"], other["video"])


@pytest.mark.parametrize(
    "wrong", [{"frames": "9"}, {"steps": 4.5}, {"seed": "7"}, {"width": True}, {"guidance_scale": "5"}]
)
def test_f33_a_wrong_type_is_refused_at_the_door(pipe, wrong):
    loaded = set(pipe.components.describe())
    with pytest.raises(RequestError, match=f"{next(iter(wrong))}="):
        pipe(PROMPT, **wrong)
    assert set(pipe.components.describe()) == loaded


def test_f37_going_on_copies_no_tensor(pipe):
    state = pipe.run(pipe.begin(pipe.model.request({"prompt": PROMPT, "steps": 1})), until="denoise").state
    after = pipe.run(state).state
    for name in ("prompt_embeds", "latents"):
        assert after[name].data_ptr() == state[name].data_ptr()
