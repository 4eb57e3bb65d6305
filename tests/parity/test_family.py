"""The whole Wan family against the official code's stored outputs, diffusers' classes, and plain float64 arithmetic.

``test_transformer.py`` does so for text-to-video; here are the image branch, the condition channels, VACE's hints, a
timestep for each token and the networks of 2.2. What belongs to no oracle (seams, remembered text, batches) is last.
"""

import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import tiny
import tiny_names as names
import torch
from reference import l2, rel, wan
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import built
from training import folders

from ditkit.models.wan import WanConfig, WanTransformer, run_in_order
from ditkit.nn.attention import sdpa

GOLDEN = Path(__file__).parents[1] / "data/golden/transformer"
CASES = [
    *(("wan21_i2v", "", case) for case in range(2)),
    *(("wan21_flf2v", "", case) for case in range(2)),
    *(("wan21_vace", "", case) for case in range(3)),
    *(("wan22_ti2v_5b", "", case) for case in range(3)),
    *((folder, noise, 0) for folder in ("wan22_t2v_a14b", "wan22_i2v_a14b") for noise in ("high", "low")),
    *((folder, noise, 1) for folder in ("wan22_t2v_a14b", "wan22_i2v_a14b") for noise in ("high", "low")),
]
IDS = [f"{folder}-{noise}{case}" for folder, noise, case in CASES]


@dataclass(frozen=True)
class Given:
    """One call: ``latents`` with the condition behind them; ``image`` [B, n, D] and ``control`` where there are any."""

    latents: torch.Tensor
    timestep: torch.Tensor
    text: list[torch.Tensor]
    image: torch.Tensor | None = None
    control: torch.Tensor | None = None
    scale: float | tuple[float, ...] = 1.0

    def to(self, dtype: torch.dtype) -> "Given":
        image, control = (None if x is None else x.to(dtype) for x in (self.image, self.control))
        return replace(
            self, latents=self.latents.to(dtype), text=[t.to(dtype) for t in self.text], image=image, control=control
        )

    def sample(self, i: int) -> "Given":
        image, control = (None if x is None else x[i : i + 1] for x in (self.image, self.control))
        latents, timestep, text = self.latents[i : i + 1], self.timestep[i : i + 1], self.text[i : i + 1]
        return replace(self, latents=latents, timestep=timestep, text=text, image=image, control=control)


@torch.inference_mode()
def forward(model: WanTransformer, given: Given, text=None, **seams) -> torch.Tensor:
    text = text or model.prepare_text(given.text, image=given.image)
    conditioning = replace(text, control=given.control, control_scale=given.scale)
    return model(given.latents, given.timestep, conditioning, **seams)


def exact(config: WanConfig, tensors, given: Given) -> torch.Tensor:
    scales = given.scale if isinstance(given.scale, tuple) else [given.scale] * len(config.vace_layers)
    hints = dict(zip(config.vace_layers, scales, strict=True))
    return wan(tensors, config.num_heads, given.latents, given.timestep, given.text, given.image, given.control, hints)


# --- the official code's own outputs


def golden(folder: str, noise: str, case: int):
    place = GOLDEN / folder / (f"{noise}_noise_model" if noise else "")
    raw = json.loads((place / "config.json").read_text())
    tensors = load_file(place / "diffusion_pytorch_model.safetensors")
    sizes = {f.name: raw[f.name] for f in fields(WanConfig) if f.name in raw}
    sizes["vace_layers"] = tuple(raw.get("vace_layers", ()))
    if "img_emb.proj.0.weight" in tensors:
        sizes["image_dim"] = len(tensors["img_emb.proj.0.weight"])
    if "img_emb.emb_pos" in tensors:
        sizes["image_tokens"] = tensors["img_emb.emb_pos"].shape[1]
    with safe_open(GOLDEN / folder / "io.safetensors", "pt") as f:
        io = {k.removeprefix(f"case{case}."): f.get_tensor(k) for k in f.keys() if k.startswith(f"case{case}.")}  # noqa: SIM118
        scale = json.loads(f.metadata().get("scalars", "{}")).get(f"case{case}", {}).get("vace_scale", 1.0)
    image = io.get("clip_fea")
    given = Given(
        torch.cat([io["latents"], io["y"]], 1) if "y" in io else io["latents"],
        io["timestep"],
        [io[f"context.{i}"] for i in range(len(io["latents"]))],
        None if image is None else image.reshape(len(io["latents"]), -1, image.shape[-1]),  # two pictures: 2n rows
        io.get("vace_context"),
        scale,
    )
    prefix = f"{noise}." if noise else ""
    return WanConfig(**sizes), tensors, given, io[f"{prefix}output"], io[f"{prefix}output_bf16"]


@pytest.mark.parametrize(("folder", "noise", "case"), CASES, ids=IDS)
def test_official_output(folder, noise, case):
    config, tensors, given, output, _ = golden(folder, noise, case)
    model = built(config, tensors, "wan", torch.float32)
    assert {k: p.shape for k, p in model.named_parameters()} == {k: t.shape for k, t in tensors.items()}
    assert rel(forward(model, given), output) <= 1e-5  # up to 2.6e-6 on another kind of processor
    assert rel(forward(built(config, tensors, "diffusers", torch.float32), given), output) <= 1e-5
    assert rel(exact(config, tensors, given), output) <= 1e-5  # the yardstick itself


@pytest.mark.parametrize(("folder", "noise", "case"), CASES, ids=IDS)
def test_official_output_in_bfloat16(folder, noise, case):
    config, tensors, given, output, narrow = golden(folder, noise, case)
    ours = forward(built(config, tensors, "wan", torch.bfloat16), given)
    assert ours.dtype == torch.float32
    assert l2(ours, output) <= 1.2 * l2(narrow, output)


# --- random networks of other sizes


CHANGES = {"dim": 32, "ffn_dim": 72, "text_dim": 24}
SIZES = {
    # name: task, config, (B, F, h, w), text lengths, timesteps
    "i2v": (tiny.config("i2v", **CHANGES), (1, 3, 4, 6), (9,), [731]),
    "i2v of two": (tiny.config("i2v", **CHANGES, image_dim=20), (2, 2, 6, 4), (5, 30), [999, 40]),
    "flf2v": (tiny.config("flf2v", **CHANGES, image_dim=40), (2, 2, 4, 4), (7, 512), [500, 1000]),
    "vace": (tiny.config("vace", **CHANGES), (1, 2, 4, 6), (12,), [613]),
    "vace of two": (
        tiny.config("vace", **CHANGES, num_layers=4, vace_layers=(0, 1, 3)),
        (2, 2, 4, 4),
        (3, 8),
        [9, 812],
    ),
    "ti2v": (tiny.config("ti2v", **CHANGES), (1, 3, 4, 4), (6,), [[0.0] * 4 + [875.0] * 8]),
    "ti2v of two": (tiny.config("ti2v", **CHANGES), (2, 2, 2, 6), (6, 2), [[0.0] * 3 + [12.5] * 3, [937.0] * 6]),
    "2.2 i2v": (tiny.config("i2v_a14b", **CHANGES), (2, 3, 4, 4), (11, 4), [900, 899]),
}
NAMES = list(SIZES)
FIRST = {"vace": 1.0, "vace of two": (0.5, 1.0, -2.0)}


def inputs(name: str) -> Given:
    config, (b, f, h, w), lengths, timesteps = SIZES[name]
    g = torch.Generator().manual_seed(200 + NAMES.index(name))
    rows = config.image_tokens or tiny.CLIP_ROWS
    return Given(
        torch.randn(b, config.in_dim, f, h, w, generator=g),
        torch.tensor(timesteps, dtype=torch.float64),
        [torch.randn(n, config.text_dim, generator=g) for n in lengths],
        None if config.image_dim is None else torch.randn(b, rows, config.image_dim, generator=g),
        torch.randn(b, config.vace_in_dim, f, h, w, generator=g) if config.vace_layers else None,
        FIRST.get(name, 1.0),
    )


def drawn(name: str):
    config = SIZES[name][0]
    return config, tiny.transformer(60 + NAMES.index(name), config).state_dict(), inputs(name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("policy", ["wan", "float32"])
def test_float64(name, policy):
    config, tensors, given = drawn(name)
    given = given.to(torch.float64)
    output = forward(built(config, tensors, policy, torch.float64), given)
    assert output.dtype == torch.float64
    assert rel(output, exact(config, tensors, given)) <= 1e-12


def theirs(config: WanConfig, tensors, folder: Path, dtype: torch.dtype):
    """diffusers' class with the same weights, loaded as its users do, and nothing missing or left over."""
    import diffusers

    kind = "WanVACETransformer3DModel" if config.vace_layers else "WanTransformer3DModel"
    table = names.renamed(tensors, names.TRANSFORMER)
    folders.write_component(folder, tiny.transformer_json(config, kind), table)
    model, told = getattr(diffusers, kind).from_pretrained(folder, torch_dtype=dtype, output_loading_info=True)
    assert not any(told.values())
    return model.eval()


@torch.inference_mode()
def forward_theirs(model, config: WanConfig, given: Given) -> torch.Tensor:
    padded = torch.stack([torch.nn.functional.pad(t, (0, 0, 0, 512 - len(t))) for t in given.text])
    extra, dtype = {}, model.dtype
    if given.image is not None:  # the two pictures of a sample are two rows of the batch there
        image = given.image if config.image_tokens is None else given.image.unflatten(1, (2, -1)).flatten(0, 1)
        extra["encoder_hidden_states_image"] = image.to(dtype)
    if given.control is not None:
        scales = given.scale if isinstance(given.scale, tuple) else [given.scale] * len(config.vace_layers)
        extra["control_hidden_states"] = given.control.to(dtype)
        extra["control_hidden_states_scale"] = torch.tensor(scales).to(dtype)
    return model(given.latents.to(dtype), given.timestep, padded.to(dtype), return_dict=False, **extra)[0]


@pytest.mark.parametrize("name", NAMES)
def test_diffusers_in_float32(name, tmp_path):
    config, tensors, given = drawn(name)
    expected = forward_theirs(theirs(config, tensors, tmp_path / "transformer", torch.float32), config, given)
    assert rel(forward(built(config, tensors, "diffusers", torch.float32), given), expected) <= 1e-5
    assert rel(forward(built(config, tensors, "wan", torch.float32), given), expected) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_errors_against_float64(name, tmp_path):
    """The diffusers policy errs as much as diffusers does, the official one clearly less, and neither much."""
    config, tensors, given = drawn(name)
    reference = exact(config, tensors, given)
    model = theirs(config, tensors, tmp_path / "transformer", torch.bfloat16)
    diffusers = l2(forward_theirs(model, config, given), reference)
    same = l2(forward(built(config, tensors, "diffusers", torch.bfloat16), given), reference)
    official = l2(forward(built(config, tensors, "wan", torch.bfloat16), given), reference)
    assert 0.9 * diffusers <= same <= 1.1 * diffusers
    assert official <= 0.85 * diffusers
    assert official <= 0.015


@pytest.mark.parametrize("name", NAMES)
def test_the_same_weights_stay_wide_as_in_diffusers(name, tmp_path):
    config, tensors, _ = drawn(name)
    model = theirs(config, tensors, tmp_path / "transformer", torch.bfloat16)
    ours = names.renamed(built(config, tensors, "diffusers", torch.bfloat16).state_dict(), names.TRANSFORMER)
    assert {k: t.dtype for k, t in ours.items()} == {k: t.dtype for k, t in model.state_dict().items()}


WIDE = {  # what the official code uses in float32 under bfloat16, block numbers left out
    "time_embedding.0.weight", "time_embedding.0.bias", "time_embedding.2.weight", "time_embedding.2.bias",
    "time_projection.1.weight", "time_projection.1.bias", "head.head.weight", "head.head.bias", "head.modulation",
    "blocks.modulation", "blocks.norm3.weight", "blocks.norm3.bias", "blocks.self_attn.norm_q.weight",
    "blocks.self_attn.norm_k.weight", "blocks.cross_attn.norm_q.weight", "blocks.cross_attn.norm_k.weight",
}  # fmt: skip
WIDE_IMAGE = {
    "blocks.cross_attn.norm_k_img.weight", "img_emb.emb_pos", "img_emb.proj.0.weight", "img_emb.proj.0.bias",
    "img_emb.proj.4.weight", "img_emb.proj.4.bias",
}  # fmt: skip


def test_the_weights_that_stay_wide_in_the_official_policy():
    for name, extra in (
        ("flf2v", WIDE_IMAGE),
        ("vace", {f"vace_{k}" for k in WIDE if k.startswith("blocks.")}),
        ("ti2v", set()),
    ):
        config, tensors, _ = drawn(name)
        model = built(config, tensors, "wan", torch.bfloat16)
        wide = {re.sub(r"blocks\.\d+", "blocks", k) for k, p in model.named_parameters() if p.dtype == torch.float32}
        assert wide == WIDE | extra


@pytest.mark.parametrize("name", ["flf2v", "vace", "ti2v of two"])
def test_float32_arithmetic_on_narrow_weights(name):
    """dtype_policy=float32 with bfloat16 storage is the float32 network with rounded weights, to the bit."""
    config, tensors, given = drawn(name)
    narrow = built(config, tensors, "float32", torch.bfloat16)
    rounded = {k: tensors[k].to(p.dtype).float() for k, p in narrow.named_parameters()}
    assert torch.equal(forward(narrow, given), forward(built(config, rounded, "wan", torch.float32), given))
    assert not torch.equal(forward(narrow, given), forward(built(config, tensors, "wan", torch.float32), given))


@pytest.mark.parametrize("task", tiny.TASKS)
def test_the_tiny_models_are_ones_that_diffusers_loads(task, tmp_path):
    """The written folder is the model that it says it is: the pipeline's transformers compute what ours do."""
    import diffusers

    folder = tiny.write(tmp_path / task, task)
    pipe = getattr(diffusers, tiny.PIPELINES.get(task, "WanPipeline")).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    models = [m for m in (pipe.transformer, getattr(pipe, "transformer_2", None)) if m is not None]
    ours = tiny.experts(task)
    assert len(models) == len(ours) == (2 if task in tiny.BOUNDARY else 1)
    assert pipe.config.get("boundary_ratio") == tiny.BOUNDARY.get(task)
    assert pipe.config.get("expand_timesteps", False) == (task == "ti2v")
    assert (getattr(pipe, "image_encoder", None) is not None) == (task in ("i2v", "flf2v"))
    for own, other in zip(ours, models, strict=True):
        table = names.renamed(own.state_dict(), names.TRANSFORMER)
        assert table.keys() == other.state_dict().keys()
        assert all(torch.equal(table[k], t) for k, t in other.state_dict().items())
    if len(ours) == 2:
        assert not torch.equal(ours[0].patch_embedding.weight, ours[1].patch_embedding.weight)


# --- what belongs to no oracle


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("two")] + ["flf2v"])
def test_samples_of_a_batch_are_independent(name):
    config, tensors, given = drawn(name)
    model = built(config, tensors, "wan", torch.float32)
    together = forward(model, given)
    for i in range(2):
        assert rel(together[i : i + 1], forward(model, given.sample(i))) <= 1e-5


@pytest.mark.parametrize("policy", ["wan", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_timesteps_of_all_tokens_are_one_timestep(policy, dtype):
    config, tensors, given = drawn("ti2v of two")
    model = built(config, tensors, policy, dtype)
    for sample, time in ((given.sample(0), [[875.0]]), (given, [[12.0], [937.0]])):
        time = torch.tensor(time, dtype=torch.float64)  # rising, as the different values are sorted inside
        expected = forward(model, replace(sample, timestep=time[:, 0]))
        assert torch.equal(forward(model, replace(sample, timestep=time.expand(-1, 6))), expected)
        assert not torch.equal(forward(model, replace(sample, timestep=time.expand(-1, 6) + 1)), expected)


def test_a_timestep_for_each_frame_is_that_of_its_tokens():
    config, tensors, given = drawn("ti2v of two")
    model = built(config, tensors, "wan", torch.float32)
    frames = torch.tensor([[0.0, 12.5], [937.0, 3.0]], dtype=torch.float64)
    tokens = replace(given, timestep=torch.tensor([[0.0] * 3 + [12.5] * 3, [937.0] * 3 + [3.0] * 3]).double())
    output = forward(model, replace(given, timestep=frames))
    assert torch.equal(output, forward(model, tokens))
    assert rel(output, exact(config, tensors, tokens)) <= 1e-5


def test_each_token_has_its_own_timestep():
    config, tensors, given = drawn("ti2v")
    model = built(config, tensors, "wan", torch.float32)
    g = torch.Generator().manual_seed(1)
    given = replace(given, timestep=torch.randint(0, 1000, (1, 12), generator=g).double())
    assert rel(forward(model, given), exact(config, tensors, given)) <= 1e-5
    with pytest.raises(ValueError, match="11 timesteps were given"):
        forward(model, replace(given, timestep=torch.zeros(1, 11)))


def test_every_block_of_vace_is_seen_by_the_seam():
    config, tensors, given = drawn("vace of two")
    model, seen = built(config, tensors, "wan", torch.float32), []

    def look(blocks, x, ctx):
        seen.extend(blocks := list(blocks))
        return run_in_order(blocks, x, ctx)

    expected = forward(model, given)
    assert torch.equal(forward(model, given, run_blocks=look), expected)
    assert [getattr(b, "block", b) for b in seen] == list(model.blocks)
    paired = {i: (b.control, b.number) for i, b in enumerate(seen) if hasattr(b, "control")}
    assert paired == {0: (model.vace_blocks[0], 0), 1: (model.vace_blocks[1], 1), 3: (model.vace_blocks[2], 2)}
    parts = sum(len(list(b.parameters())) for b in seen)
    assert parts == len([k for k in tensors if k.startswith(("blocks.", "vace_blocks."))])  # nothing runs outside it


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        ("i2v", "0 self, 0 cross, 0 image, 1 self, 1 cross, 1 image"),
        ("flf2v", "0 self, 0 cross, 0 image, 1 self, 1 cross, 1 image"),
        ("vace", "0 self, 0 cross, 0 self, 0 cross, 1 self, 1 cross, 2 self, 2 cross, 2 self, 2 cross"),
        ("ti2v", "0 self, 0 cross, 1 self, 1 cross"),
    ],
)
def test_every_attention_is_seen_by_its_seam(name, sites):
    config, tensors, given = drawn(name)
    model, seen = built(config, tensors, "wan", torch.float32), []

    def look(q, k, v, site):
        seen.append((site, k.shape[1]))
        return sdpa(q, k, v, site)

    expected = forward(model, given)
    assert torch.equal(forward(model, given, attend=look), expected)
    assert ", ".join(f"{site.block} {site.kind}" for site, _ in seen) == sites
    tokens = given.latents[0, 0].numel() // 4
    rows = {"self": tokens, "cross": 512, "image": 0 if given.image is None else given.image.shape[1]}
    assert all(count == rows[site.kind] for site, count in seen)
    f, h, w = given.latents.shape[2:]
    assert {site.grid for site, _ in seen} == {(f, h // 2, w // 2)}


@pytest.mark.parametrize("name", ["i2v of two", "flf2v", "vace of two"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_remembered_keys_and_values_change_no_bit(name, dtype):
    config, tensors, given = drawn(name)
    model = built(config, tensors, "wan", dtype)
    kept, anew = (model.prepare_text(given.text, keep, given.image) for keep in (True, False))
    expected = forward(model, given, anew)
    for _ in range(3):
        assert torch.equal(forward(model, given, kept), expected)
    kinds = ["cross"] if given.image is None else ["cross", "image"]
    numbers = [(i, False) for i in range(config.num_layers)] + [(i, True) for i in config.vace_layers]
    assert set(kept.text.keys_values) == {(*number, kind) for number in numbers for kind in kinds}


def test_hints_of_scale_zero_change_no_bit():
    """The trunk of VACE is a text-to-video model; another scale for each layer counts that layer alone."""
    config, tensors, given = drawn("vace of two")
    model = built(config, tensors, "wan", torch.float32)
    plain = built(replace(config, vace_layers=()), tensors, "wan", torch.float32)
    without = forward(plain, replace(given, control=None))
    for nothing in (0, 0.0, (0.0, 0.0, 0.0)):
        assert torch.equal(forward(model, replace(given, scale=nothing)), without)
    assert torch.equal(forward(model, replace(given, scale=0.6)), forward(model, replace(given, scale=(0.6,) * 3)))
    for scale in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
        one = replace(given, scale=scale)
        assert rel(forward(model, one), without) > 0.01
        assert rel(forward(model, one), exact(config, tensors, one)) <= 1e-5


def test_without_image_rows_the_text_alone_is_attended():
    config, tensors, given = drawn("i2v")
    model = built(config, tensors, "wan", torch.float32)
    plain = built(replace(config, image_dim=None), tensors, "wan", torch.float32)
    alone = replace(given, image=None)
    assert torch.equal(forward(model, alone), forward(plain, alone))
    assert rel(forward(model, alone), forward(model, given)) > 0.01


def test_what_the_family_refuses():
    config, tensors, given = drawn("vace of two")
    vace = built(config, tensors, "wan", torch.float32)
    for wrong in (None, given.control[:, :-1], given.control[:1], given.control[:, :, :1]):
        with pytest.raises(ValueError, match="a control input"):
            vace(given.latents, given.timestep, replace(vace.prepare_text(given.text), control=wrong))
    with pytest.raises(ValueError, match="2 control scales were given for 3 layers"):
        forward(vace, replace(given, scale=(1.0, 1.0)))
    config, tensors, given = drawn("flf2v")
    flf = built(config, tensors, "wan", torch.float32)
    for wrong in (given.image[:, :-1], given.image[:1], given.image[..., :-1]):
        with pytest.raises(ValueError, match="image features of shape"):
            flf.prepare_text(given.text, image=wrong)
    with pytest.raises(ValueError, match=r"a control input: one of shape .* was given; this transformer takes none"):
        flf(given.latents, given.timestep, replace(flf.prepare_text(given.text), control=torch.zeros(2, 96, 2, 4, 4)))
    config, tensors, given = drawn("ti2v")
    with pytest.raises(ValueError, match="no image branch"):
        built(config, tensors, "wan", torch.float32).prepare_text(given.text, image=torch.zeros(1, 17, 64))
    for layers in ((1, 2), (0, 0), (0, 2, 1), (0, 3)):
        with pytest.raises(ValueError, match="vace_layers"):
            tiny.config("vace", vace_layers=layers)
