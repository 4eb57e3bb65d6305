"""LoRA files of every family: the same change in each spelling has one result, that of a dense float64 merge."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
import tiny_names
import torch
from safetensors.torch import save_file

from ditkit.checkpoints.files.safetensors import TensorFiles
from ditkit.checkpoints.kinds.detect import recognise
from ditkit.checkpoints.lora.merge import Merged
from ditkit.checkpoints.lora.read import ALLOWANCES, experts_of, inspect_lora, read_lora
from ditkit.errors import LoadError, SetupError
from ditkit.nn.lora import AdaptedLinear, lora_swaps, twin

CONFIG = replace(tiny.TRANSFORMER, image_dim=48, image_tokens=None)
RANK, ALPHA = 4, 6.0
LINEARS = [
    *(f"blocks.{n}.{part}" for n in range(2) for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o")),
    *(f"blocks.{n}.{part}" for n in range(2) for part in ("cross_attn.q", "cross_attn.k", "cross_attn.v")),
    *(f"blocks.{n}.{part}" for n in range(2) for part in ("cross_attn.o", "ffn.0", "ffn.2", "cross_attn.k_img")),
    "text_embedding.0", "time_embedding.2", "time_projection.1", "head.head", "img_emb.proj.1",
]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny.transformer(11, CONFIG)


@pytest.fixture(scope="module")
def base(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return TensorFiles(path)


@pytest.fixture
def lora(tmp_path):
    """Writes tensors to a file and opens it."""

    def write(tensors, metadata=None, name="lora"):
        path = tmp_path / f"{name}.safetensors"
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)
        return TensorFiles(path)

    return write


def shapes(model):
    return {name: tuple(p.shape) for name, p in model.state_dict().items()}


def factors(model, names, seed=0):
    """module -> (down, up)"""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for name in names:
        o, i = (n := shapes(model)[f"{name}.weight"])[0], torch.Size(n[1:]).numel()
        found[name] = torch.randn(RANK, i, generator=g) / i**0.5, 0.3 * torch.randn(o, RANK, generator=g)
    return found


def dense(model, pairs, scale, strength=1.0):
    """All parameters in float64 with the changes added."""
    found = {name: p.detach().double() for name, p in model.state_dict().items()}
    for name, (down, up) in pairs.items():
        weight = found[f"{name}.weight"]
        found[f"{name}.weight"] = weight + strength * scale * (up.double() @ down.double()).view(weight.shape)
    return found


def forward(model, dtype=torch.float32):
    g = torch.Generator().manual_seed(5)
    latents = torch.randn(1, CONFIG.in_dim, 2, 4, 4, generator=g).to(dtype)
    rows, image = torch.randn(5, CONFIG.text_dim, generator=g), torch.randn(1, 3, 48, generator=g)
    text = model.prepare_text([rows.to(dtype)], image=image.to(dtype))
    return model(latents, torch.tensor([700.0], dtype=dtype), text)


def reference(model, tensors):
    """The forward pass with these parameters, in float64."""
    return forward(tiny.built(CONFIG, tensors, "wan", torch.float64), torch.float64)


def swapped(model, swaps):
    """Seam C as its contract says, on a twin, so that the base can be looked at."""
    new = twin(model)
    for swap in swaps:
        found = [(name, child) for name, child in new.named_modules() if name and swap.match(name, child)]
        assert found
        for name, child in found:
            parent, _, leaf = name.rpartition(".")
            setattr(new.get_submodule(parent), leaf, swap.make(child))
    return new


def error(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def check(model, base, adapters, tensors, tolerance=1e-6):
    """Fused and as side weights, against all parameters in float64."""
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.state_dict().items()}
    plain = forward(model)
    merged = dict(Merged(base, adapters))
    for name, wanted in tensors.items():
        assert error(merged[name], wanted) <= tolerance, name
    wanted = reference(model, tensors)
    assert error(forward(model), wanted) > 1e-3  # it matters
    side = swapped(model, lora_swaps(adapters))
    assert error(forward(side), wanted) <= 1e-5
    assert error(forward(tiny.built(CONFIG, merged, "wan", torch.float32)), wanted) <= 1e-5
    for name, p in model.state_dict().items():
        assert p.data_ptr() == before[name][0]
        assert torch.equal(p, before[name][1])
    assert torch.equal(forward(model), plain)


def other(name):
    """diffusers' name of a native module, from the classes' own names."""
    full = f"{name}.weight"
    return next(iter(tiny_names.renamed({full: torch.zeros(1)}, tiny_names.TRANSFORMER))).removesuffix(".weight")


def flat(name):
    return name.replace(".", "_")


def written(pairs, name_of, down="lora_A.weight", up="lora_B.weight", alpha=None):
    tensors = {}
    for name, (a, b) in pairs.items():
        tensors |= {f"{name_of(name)}.{down}": a, f"{name_of(name)}.{up}": b}
        if alpha is not None:
            tensors[f"{name_of(name)}.alpha"] = torch.tensor(alpha)
    return tensors


KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight"}
DEFAULT = {"down": "lora_A.default.weight", "up": "lora_B.default.weight"}
FAMILIES = {
    "comfy": (lambda n: f"diffusion_model.{n}", {}, "comfy"),
    "comfy with down and up": (lambda n: f"diffusion_model.{n}", KOHYA, "comfy"),
    "comfy, whole": (lambda n: f"model.diffusion_model.{n}", {}, "comfy"),
    "bare": (lambda n: n, {}, "bare"),
    "bare default": (lambda n: n, DEFAULT, "bare"),
    "diffusers": (lambda n: f"transformer.{other(n)}", {}, "diffusers"),
    "diffusers with native names": (lambda n: f"transformer.{n}", {}, "diffusers"),
    "bare diffusers": (lambda n: other(n), {}, "bare"),
    "peft": (lambda n: f"base_model.model.{n}", DEFAULT, "peft"),
    "peft of diffusers": (lambda n: f"base_model.model.{other(n)}", {}, "peft"),
    "kohya": (lambda n: f"lora_unet_{flat(n)}", KOHYA, "kohya"),
    "partly converted": (lambda n: f"lora_unet_{n.replace('.', '_', 1)}", KOHYA, "kohya"),
    "videox": (lambda n: f"lora_unet__{flat(n)}", KOHYA, "videox"),
    "onetrainer": (lambda n: f"lora_transformer_{flat(other(n))}", KOHYA, "onetrainer"),
    "diffsynth": (lambda n: f"pipe.dit.{n}", DEFAULT, "diffsynth"),
    "lycoris": (lambda n: f"lycoris_{flat(n)}", KOHYA, "lycoris"),
    "compiled": (lambda n: f"_orig_mod.{n}", {}, "wrapped"),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alpha", [None, ALPHA], ids=["no alpha", "alpha"])
def test_families(family, alpha, model, base, lora):
    name_of, spelling, label = FAMILIES[family]
    pairs = factors(model, LINEARS)
    adapter = read_lora(lora(written(pairs, name_of, **spelling, alpha=alpha)), shapes(model))
    tensors = dense(model, pairs, 1 if alpha is None else alpha / RANK, 0.7)
    check(model, base, [(adapter, 0.7)], tensors)
    assert adapter.report["family"] == label
    assert adapter.report["pairs"] == len(LINEARS)
    assert adapter.report["ranks"] == {str(RANK): len(LINEARS)}
    assert adapter.report["width"] == CONFIG.dim
    assert adapter.report["groups"]["self_attn"] == 8
    assert adapter.report["groups"]["image_branch"] == 3


def test_self_and_cross_attention_of_diffusers_do_not_collide(model, lora):
    pairs = factors(model, ["blocks.0.self_attn.q", "blocks.0.cross_attn.q"])
    adapter = read_lora(lora(written(pairs, lambda n: f"transformer.{other(n)}")), shapes(model))
    for name, (down, up) in pairs.items():
        weight = torch.zeros(CONFIG.dim, CONFIG.dim)
        assert torch.allclose(adapter.added(f"{name}.weight", weight), up @ down, atol=1e-6)


def test_differences_of_everything(model, base, lora):
    """What a distilled extract holds: factors, and differences of weights, norms, biases, modulation. None is lost."""
    pairs, g = factors(model, LINEARS), torch.Generator().manual_seed(3)
    tensors = written(pairs, lambda n: f"diffusion_model.{n}", **KOHYA, alpha=ALPHA)
    wanted = dense(model, pairs, ALPHA / RANK, 0.9)
    named = {
        name: f"{name.removesuffix('.weight')}.diff" for name in wanted if "norm" in name and name.endswith("weight")
    }
    named |= {name: f"{name.removesuffix('.bias')}.diff_b" for name in wanted if name.endswith(".bias")}
    named |= {name: name.replace("modulation", "diff_m") for name in wanted if name.endswith("modulation")}
    named |= {name: f"{name.removesuffix('.weight')}.diff" for name in ("patch_embedding.weight", "head.head.weight")}
    for name, key in named.items():
        change = 0.1 * torch.randn(wanted[name].shape, generator=g)
        tensors[f"diffusion_model.{key}"] = change
        wanted[name] = wanted[name] + 0.9 * change.double()
    source = lora(tensors)
    adapter = read_lora(source, shapes(model))
    check(model, base, [(adapter, 0.9)], wanted)
    assert adapter.report["kinds"]["modulation"] == 3
    assert adapter.report["kinds"]["lora"] == len(LINEARS)
    assert inspect_lora(source, shapes(model))["coverage"] == 1


@pytest.mark.parametrize("suffix", ["", ".default"])
def test_bias_of_the_second_factor_is_scaled_with_it(suffix, model, base, lora):
    pairs = factors(model, ["blocks.1.ffn.0"])
    tensors = written(pairs, lambda n: n, f"lora_A{suffix}.weight", f"lora_B{suffix}.weight", ALPHA)
    bias = torch.randn(CONFIG.ffn_dim)
    tensors[f"blocks.1.ffn.0.lora_B{suffix}.bias"] = bias
    wanted = dense(model, pairs, ALPHA / RANK)
    wanted["blocks.1.ffn.0.bias"] += ALPHA / RANK * bias.double()
    check(model, base, [(read_lora(lora(tensors), shapes(model)), 1.0)], wanted)


@pytest.mark.parametrize("axes", [5, 2])
def test_patch_embedding(axes, model, base, lora):
    pairs = factors(model, ["patch_embedding"])
    (down, up), size = pairs["patch_embedding"], (CONFIG.in_dim, 1, 2, 2)
    tensors = {"patch_embedding.lora_A.weight": down, "patch_embedding.lora_B.weight": up}
    if axes == 5:
        tensors = {
            "patch_embedding.lora_A.weight": down.view(RANK, *size),
            "patch_embedding.lora_B.weight": up.view(-1, RANK, 1, 1, 1),
        }
    adapter = read_lora(lora(tensors), shapes(model))
    check(model, base, [(adapter, 1.0)], dense(model, pairs, 1.0))


def random_factors(seed, **sizes):
    g = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(size, generator=g) for name, size in sizes.items()}


NAME, D = "blocks.0.self_attn.v", CONFIG.dim
LYCORIS = {
    "loha": ({"hada_w1_a": (D, 3), "hada_w1_b": (3, D), "hada_w2_a": (D, 3), "hada_w2_b": (3, D)}, 3),
    "lokr": ({"lokr_w1": (4, 4), "lokr_w2": (D // 4, D // 4)}, None),
    "lokr, second factored": ({"lokr_w1": (4, 8), "lokr_w2_a": (D // 4, 3), "lokr_w2_b": (3, D // 8)}, 3),
    "lokr, both factored": (
        {"lokr_w1_a": (8, 2), "lokr_w1_b": (2, 8), "lokr_w2_a": (D // 8, 2), "lokr_w2_b": (2, D // 8)},
        2,
    ),
}


def lycoris_delta(f):
    """The same formulas, written with einsum in float64."""
    f = {name: x.double() for name, x in f.items()}
    if "hada_w1_a" in f:
        return torch.einsum("or,ri,os,si->oi", *(f[f"hada_{n}"] for n in ("w1_a", "w1_b", "w2_a", "w2_b")))
    first = f["lokr_w1"] if "lokr_w1" in f else torch.einsum("or,ri->oi", f["lokr_w1_a"], f["lokr_w1_b"])
    second = f["lokr_w2"] if "lokr_w2" in f else torch.einsum("or,ri->oi", f["lokr_w2_a"], f["lokr_w2_b"])
    return torch.einsum("ab,cd->acbd", first, second).reshape(D, D)


@pytest.mark.parametrize("kind", LYCORIS)
def test_lycoris(kind, model, base, lora):
    sizes, rank = LYCORIS[kind]
    found = random_factors(1, **sizes)
    tensors = {f"lycoris_{flat(NAME)}.{name}": x for name, x in found.items()}
    tensors[f"lycoris_{flat(NAME)}.alpha"] = torch.tensor(1.5)
    wanted = dense(model, {}, 1)
    wanted[f"{NAME}.weight"] += 0.8 * lycoris_delta(found) * (1.5 / rank if rank else 1)  # whole factors have no alpha
    adapter = read_lora(lora(tensors), shapes(model))
    check(model, base, [(adapter, 0.8)], wanted)
    assert adapter.report["kinds"] == {kind[:4]: 1}


def test_tucker_cores(model, lora):
    """On the one convolution: a is [r, o], b [r, i], the core [r, r, kernel]."""
    o, i, kernel = CONFIG.dim, CONFIG.in_dim, (1, 2, 2)
    weight, name = model.patch_embedding.weight, "patch_embedding"

    def rebuilt(core, a, b):
        return torch.einsum("xyfhw,xo,yi->oifhw", core.double(), a.double(), b.double())

    f = random_factors(2, hada_w1_a=(3, o), hada_w1_b=(3, i), hada_t1=(3, 3, *kernel), hada_w2_a=(3, o),
                       hada_w2_b=(3, i), hada_t2=(3, 3, *kernel))  # fmt: skip
    adapter = read_lora(lora({f"{name}.{k}": v for k, v in f.items()}), shapes(model))
    wanted = rebuilt(f["hada_t1"], f["hada_w1_a"], f["hada_w1_b"]) * rebuilt(
        f["hada_t2"], f["hada_w2_a"], f["hada_w2_b"]
    )
    assert error(adapter.added(f"{name}.weight", weight), wanted) < 1e-6
    f = random_factors(2, lokr_w1=(4, 4), lokr_w2_a=(3, o // 4), lokr_w2_b=(3, i // 4), lokr_t2=(3, 3, *kernel))
    adapter = read_lora(lora({f"{name}.{k}": v for k, v in f.items()}, name="second"), shapes(model))
    second = rebuilt(f["lokr_t2"], f["lokr_w2_a"], f["lokr_w2_b"])
    wanted = torch.einsum("ab,cdfhw->acbdfhw", f["lokr_w1"].double(), second).reshape(weight.shape)
    assert error(adapter.added(f"{name}.weight", weight), wanted) < 1e-6


@pytest.mark.parametrize("leaf", ["lora_magnitude_vector", "dora_scale", "dora_scale by input"])
def test_dora(leaf, model, base, lora):
    """The change is measured on the plain weight, also beside another LoRA, and strength is linear."""
    pairs, plain = factors(model, [NAME]), factors(model, LINEARS, seed=8)
    down, up = (x.double() for x in pairs[NAME])
    weight = model.state_dict()[f"{NAME}.weight"].double()
    merged, axis = weight + ALPHA / RANK * up @ down, 0 if "input" in leaf else 1
    magnitude = 1 + torch.rand(D)
    shape = {"lora_magnitude_vector": (D,), "dora_scale": (D, 1), "dora_scale by input": (1, D)}[leaf]
    tensors = written(pairs, lambda n: n, alpha=ALPHA) | {f"{NAME}.{leaf.split()[0]}": magnitude.view(shape)}
    adapters = [
        (read_lora(lora(tensors), shapes(model)), 0.6),
        (read_lora(lora(written(plain, lambda n: n), name="second"), shapes(model)), 0.5),
    ]
    wanted = dense(model, plain, 0.5)
    norm = merged.norm(dim=axis, keepdim=True)
    wanted[f"{NAME}.weight"] += 0.6 * (magnitude.double().view(norm.shape) * merged / norm - weight)
    check(model, base, adapters, wanted)
    check(model, base, adapters[::-1], wanted)
    assert adapters[0][0].report["kinds"] == {"dora lora": 1}


def test_several_in_any_order(model, base, lora):
    pairs = [factors(model, LINEARS[::2], 1), factors(model, LINEARS, 2), factors(model, ["patch_embedding"], 3)]
    adapters = [read_lora(lora(written(p, lambda n: n), name=f"l{i}"), shapes(model)) for i, p in enumerate(pairs)]
    strengths = [0.7, -0.4, 1.2]
    wanted = dense(model, {}, 1)
    for p, strength in zip(pairs, strengths, strict=True):
        for name, (down, up) in p.items():
            weight = wanted[f"{name}.weight"]
            weight += strength * (up.double() @ down.double()).view(weight.shape)
    order = list(zip(adapters, strengths, strict=True))
    check(model, base, order, wanted)
    check(model, base, order[::-1], wanted)
    both = [forward(swapped(model, lora_swaps(o))) for o in (order, order[::-1])]
    assert error(*both) < 1e-6


def test_strength_zero_is_nothing(model, base, lora):
    adapter = read_lora(lora(written(factors(model, LINEARS), lambda n: n)), shapes(model))
    assert lora_swaps([(adapter, 0.0)]) == ()
    merged = Merged(base, [(adapter, 0)])
    assert all(torch.equal(tensor, base[name]) for name, tensor in merged)
    assert merged.fingerprint == base.fingerprint
    assert merged.sketch == base.sketch
    assert {n: f.dtype for n, f in merged.tensors.items()} == {n: f.dtype for n, f in base.tensors.items()}


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_strength_is_finite(strength, model, lora):
    adapter = read_lora(lora(written(factors(model, [NAME]), lambda n: n)), shapes(model))
    with pytest.raises(SetupError, match="finite"):
        lora_swaps([(adapter, strength)])


def test_fingerprints(model, base, lora):
    """Content, strength, mode and the way of reading count; the file's name does not."""
    tensors = written(factors(model, LINEARS), lambda n: n)
    a, same = (read_lora(lora(tensors, name=n), shapes(model)) for n in ("a", "b"))
    allowed = read_lora(a.source, shapes(model), allow=["lone_alpha"])
    other_ = read_lora(lora(written(factors(model, LINEARS, 9), lambda n: n), name="c"), shapes(model))

    def side(adapter, strength):
        return [swap.fingerprint for swap in lora_swaps([(adapter, strength)])]

    assert side(a, 1.0) == side(same, 1.0)
    assert Merged(base, [(a, 1.0)]).fingerprint == Merged(base, [(same, 1.0)]).fingerprint
    for changed in ((a, 0.5), (allowed, 1.0), (other_, 1.0)):
        assert not set(side(*changed)) & set(side(a, 1.0))
        assert Merged(base, [changed]).fingerprint != Merged(base, [(a, 1.0)]).fingerprint
        assert Merged(base, [changed]).sketch != Merged(base, [(a, 1.0)]).sketch


def test_bfloat16(model, lora, tmp_path):
    """Weights are rounded once after the merge; side weights lose nothing to that rounding at all."""
    pairs = factors(model, LINEARS)
    tensors = written({n: (a.bfloat16(), b.bfloat16()) for n, (a, b) in pairs.items()}, lambda n: n)
    save_file({k: v.bfloat16() for k, v in model.state_dict().items()}, tmp_path / "base.safetensors")
    base = TensorFiles(tmp_path / "base.safetensors")
    adapters = [(read_lora(lora(tensors), shapes(model)), 1.0)]
    merged = dict(Merged(base, adapters))
    assert merged[f"{NAME}.weight"].dtype == torch.float32
    down, up = (x.bfloat16().double() for x in pairs[NAME])
    assert error(merged[f"{NAME}.weight"], base[f"{NAME}.weight"].double() + up @ down) < 1e-6
    small = tiny.built(CONFIG, dict(base), "wan", torch.bfloat16)
    exact = forward(tiny.built(CONFIG, merged, "wan", torch.float64), torch.float64)
    side = forward(swapped(small, lora_swaps(adapters)), torch.bfloat16)
    fused = forward(tiny.built(CONFIG, merged, "wan", torch.bfloat16), torch.bfloat16)
    assert error(side, exact) < 0.02
    assert error(fused, exact) < 0.02


def test_twin_is_independent(model):
    new = twin(model)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(model.parameters(), new.parameters(), strict=True))
    new.blocks[0].self_attn.q.register_forward_hook(lambda *_: pytest.fail("the hook of a twin ran"))
    new.blocks[0].ffn = torch.nn.Identity()
    forward(model)


def test_a_swap_leaves_its_module_alone(model, lora):
    """What it was made of can be used on, as before, by another pipeline."""
    tensors = written(factors(model, [*LINEARS, "patch_embedding"]), lambda n: n)
    tensors |= {
        "blocks.0.diff_m": torch.ones(1, 6, D),
        "blocks.1.norm3.diff": torch.ones(D),
        "head.diff_m": torch.ones(1, 2, D),
    }
    before, names = forward(model), [name for name, _ in model.named_modules()]
    for swap in lora_swaps([(read_lora(lora(tensors), shapes(model)), 1.0)]):
        assert swap.make(model.get_submodule(swap.match.name)) is not model.get_submodule(swap.match.name)
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(forward(model), before)


def test_low_rank_stays_low_rank(model, lora):
    adapter = read_lora(lora(written(factors(model, LINEARS), lambda n: n)), shapes(model))
    side = swapped(model, lora_swaps([(adapter, 1.0), (adapter, 0.5)]))
    layers = [m for m in side.modules() if isinstance(m, AdaptedLinear)]
    assert len(layers) == len(LINEARS)
    assert {layer.down.shape[0] for layer in layers} == {2 * RANK}
    assert layers[0].base.weight.data_ptr() in {p.data_ptr() for p in model.parameters()}
    assert len(lora_swaps([(adapter, 1.0)])) == 6  # one for each top module


# Scales


def test_the_root_of_the_rank_needs_an_alpha(model, lora, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "use_rslora": True}))
    with pytest.raises(LoadError, match="no alpha"):
        read_lora(lora(written(factors(model, [NAME]), lambda n: n)), shapes(model))


@pytest.mark.parametrize("inside", [True, False], ids=["in the file", "beside it"])
@pytest.mark.parametrize("rs", [True, False])
def test_settings_of_peft(inside, rs, model, base, lora, tmp_path):
    names = [NAME, "blocks.1.self_attn.v", "blocks.1.ffn.0"]
    pairs = factors(model, names)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "use_rslora": rs, "rank_pattern": {}}
    settings["alpha_pattern"] = {"1.attn1.to_v": 3}
    below = RANK**0.5 if rs else RANK
    scales = {NAME: 16 / below, names[1]: 3 / below, names[2]: 16 / below}
    metadata = None
    if inside:
        metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in settings.items()})}
    else:
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    adapter = read_lora(lora(written(pairs, lambda n: f"transformer.{other(n)}"), metadata), shapes(model))
    wanted = dense(model, {}, 1)
    for name, (down, up) in pairs.items():
        wanted[f"{name}.weight"] += scales[name] * up.double() @ down.double()
    check(model, base, [(adapter, 1.0)], wanted)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 8}, "rank 8, and its factors have 4"),
        ({"peft_type": "VERA"}, "VERA"),
        ({"init_lora_weights": "pissa_niter_16"}, "changed the base weights"),
        ({"use_dora": True}, "no magnitudes"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ],
)
def test_settings_that_contradict(settings, said, model, lora, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(LoadError, match=said):
        read_lora(lora(written(factors(model, [NAME]), lambda n: n)), shapes(model))


def test_settings_beside_a_kohya_file_are_not_its_own(model, lora, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 99}')
    tensors = written(factors(model, [NAME]), lambda n: f"lora_unet_{flat(n)}", **KOHYA, alpha=ALPHA)
    adapter = read_lora(lora(tensors), shapes(model))
    assert adapter.deltas[f"{NAME}.weight"][0].scale == ALPHA / RANK


# What does not fit


def test_image_branch_on_a_model_without_one(model, lora):
    """The known flood of messages: counted, refused, and let through by name alone."""
    source = lora(written(factors(model, LINEARS), lambda n: f"lora_unet_{flat(n)}", **KOHYA))
    plain = tiny.transformer()
    with pytest.raises(LoadError, match="allow=image_branch"):
        read_lora(source, shapes(plain))
    adapter = read_lora(source, shapes(plain), allow=["image_branch"])
    assert adapter.report["left_out"] == {"image_branch": 6}
    assert "image_branch" not in adapter.report["groups"]
    assert inspect_lora(source, shapes(plain), allow=["image_branch"])["usable"]
    told = inspect_lora(source, shapes(plain))
    assert not told["usable"]
    assert told["coverage"] == (len(LINEARS) - 3) / len(LINEARS)


def test_patch_embedding_of_text_to_video_on_image_to_video(model, lora):
    source = lora(written(factors(model, [NAME, "patch_embedding"]), lambda n: n))
    image_to_video = tiny.transformer(1, replace(CONFIG, in_dim=36))
    with pytest.raises(LoadError, match=r"36, 1, 2, 2\] where .* lora_allow=patch_embedding"):
        read_lora(source, shapes(image_to_video))
    adapter = read_lora(source, shapes(image_to_video), allow=["patch_embedding"])
    assert set(adapter.deltas) == {f"{NAME}.weight"}


def test_control_lora_is_not_cut_down(model, lora):
    """Its patch embedding has more channels; leaving it out would leave nonsense, so no rule allows that."""
    wide = tiny.transformer(1, replace(CONFIG, in_dim=32))
    source = lora(written(factors(wide, [NAME, "patch_embedding"]), lambda n: n))
    for allow in ((), ("patch_embedding",)):
        with pytest.raises(LoadError, match="Control-LoRA"):
            read_lora(source, shapes(model), allow=allow)


def test_lora_of_another_width(lora, model):
    wide = tiny.transformer(1, replace(tiny.TRANSFORMER, dim=96, num_heads=4, ffn_dim=200))
    names = [n for n in LINEARS if n.startswith("blocks") and "img" not in n]
    source = lora(written(factors(wide, names), lambda n: n))
    with pytest.raises(LoadError, match=r"width 64, 2 blocks: it does nothing here; 40 of 40 keys"):
        read_lora(source, shapes(model))
    assert inspect_lora(source)["width"] == 96


def test_more_blocks_than_the_model_has(lora, model):
    deep = tiny.transformer(1, replace(tiny.TRANSFORMER, num_layers=3))
    source = lora(written(factors(deep, [NAME, "blocks.2.self_attn.q"]), lambda n: n))
    with pytest.raises(LoadError, match=r"no blocks\.2\.self_attn\.q\.weight"):
        read_lora(source, shapes(model))


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("lycoris_blocks_0_self_attn_q.oft_blocks", "OFT"),
        ("blocks.0.self_attn.q_loras.down.weight", "Stand-In"),
        ("dwpose_embedding.0.weight", "UniAnimate"),
        ("diffusion_model.patch_embedding.reshape_weight", "Control-LoRA"),
        ("lora_unet_patch_embedding.lora_mid.weight", "Tucker"),
        ("blocks.0.self_attn.q.weight", "no part of a LoRA"),
        ("diffusion_model.blocks.0.self_attn.qq.lora_A.weight", "no module 'blocks.0.self_attn.qq'"),
        ("lora_te_text_model_encoder.lora_down.weight", "allow=text_encoder"),
        ("blocks.1.self_attn.q.alpha", "allow=lone_alpha"),
        ("blocks.1.self_attn.q.lora_A.weight", "incomplete"),
        ("blocks.1.self_attn.q.lora_B.bias", "without factors"),
        ("blocks.1.self_attn.q.dora_scale", "without factors"),
        ("blocks.1.self_attn.q.hada_w1_a", "incomplete"),
        (f"{NAME}.hada_w1_a", "incomplete"),
        ("transformer.blocks.0.attn1.to_v.lora_A.weight", "same thing twice"),
        (f"{NAME}.lora_A.second.weight", "twice"),
    ],
)
def test_keys_without_use(key, said, model, lora):
    """Nothing is dropped in silence."""
    source = lora(written(factors(model, [NAME]), lambda n: n) | {key: torch.ones(1, 1)})
    with pytest.raises(LoadError, match=said):
        read_lora(source, shapes(model))
    assert not inspect_lora(source, shapes(model))["usable"]


def test_shapes_that_do_not_fit(model, lora):
    down, up = factors(model, [NAME])[NAME]
    cases = {
        "ranks": {f"{NAME}.lora_A.weight": down[:2], f"{NAME}.lora_B.weight": up},
        "width": {f"{NAME}.lora_A.weight": down[:, :9], f"{NAME}.lora_B.weight": up},
        "bias": {f"{NAME}.diff_b": torch.ones(D + 1)},
        "difference": {f"{NAME}.diff": torch.ones(D, D + 1)},
        "transposed": {"blocks.0.ffn.0.diff": torch.ones(CONFIG.dim, CONFIG.ffn_dim)},
        "magnitude": {f"{NAME}.lora_A.weight": down, f"{NAME}.lora_B.weight": up,
                      f"{NAME}.dora_scale": torch.ones(D - 1)},
        "alpha": {f"{NAME}.lora_A.weight": down, f"{NAME}.lora_B.weight": up, f"{NAME}.alpha": torch.ones(2)},
    }  # fmt: skip
    for name, tensors in cases.items():
        with pytest.raises(LoadError):
            read_lora(lora(tensors, name=name), shapes(model))


def test_unknown_allowance(model, lora):
    with pytest.raises(LoadError, match="did you mean 'image_branch'"):
        read_lora(lora(written(factors(model, [NAME]), lambda n: n)), shapes(model), allow=["image_branches"])
    assert len(ALLOWANCES) == 5


def test_no_lora_at_all(base, model):
    with pytest.raises(LoadError, match="no part of a LoRA"):
        read_lora(base, shapes(model))
    assert recognise(base)[0].kind != "lora"


def test_two_experts_in_one_file(model, lora):
    pairs = {e: factors(model, [NAME], seed) for seed, e in enumerate(("transformer", "transformer_2"))}
    tensors = {k: v for e, p in pairs.items() for k, v in written(p, lambda n, e=e: f"{e}.{other(n)}").items()}
    source = lora(tensors)
    assert experts_of(source) == ("transformer", "transformer_2")
    for expert, p in pairs.items():
        adapter = read_lora(source, shapes(model), expert=expert)
        down, up = p[NAME]
        assert torch.allclose(adapter.added(f"{NAME}.weight", torch.zeros(D, D)), up @ down, atol=1e-6)
    with pytest.raises(LoadError, match="no expert was named"):
        read_lora(source, shapes(model))
    only = lora({k: v for k, v in tensors.items() if k.startswith("transformer_2.")}, name="only")
    assert experts_of(only) == ("transformer_2",)
    with pytest.raises(LoadError, match="nothing for the expert transformer"):
        read_lora(only, shapes(model), expert="transformer")


def test_a_file_without_a_word_of_experts_is_for_either(model, lora):
    source = lora(written(factors(model, [NAME]), lambda n: n))
    assert experts_of(source) == ()
    a, b = (read_lora(source, shapes(model), expert=e) for e in ("transformer", "transformer_2"))
    assert set(a.deltas) == set(b.deltas)


def test_control_blocks(lora):
    config = replace(tiny.TRANSFORMER, num_layers=3, vace_layers=(0, 2))
    model = tiny.transformer(4, config)
    names = ["vace_blocks.1.after_proj", "vace_blocks.0.before_proj", "vace_blocks.1.self_attn.q", "head.head"]
    pairs = factors(model, names)
    for name_of in (lambda n: n, lambda n: f"transformer.{other(n)}", lambda n: f"lora_unet_{flat(n)}"):
        adapter = read_lora(lora(written(pairs, name_of)), shapes(model))
        for name, (down, up) in pairs.items():
            got = adapter.added(f"{name}.weight", torch.zeros(shapes(model)[f"{name}.weight"]))
            assert torch.allclose(got, up @ down, atol=1e-6), name
    with pytest.raises(LoadError, match="allow=vace"):
        read_lora(adapter.source, shapes(tiny.transformer(1, replace(tiny.TRANSFORMER, num_layers=3))))


def test_inspect_without_a_model(model, lora):
    source = lora(written(factors(model, LINEARS), lambda n: f"lora_unet_{flat(n)}", **KOHYA, alpha=ALPHA))
    assert recognise(source)[0].kind == "lora"
    told = json.loads(json.dumps(inspect_lora(source)))
    assert told["family"] == "kohya"
    assert (told["width"], told["blocks"], told["pairs"]) == (CONFIG.dim, 2, len(LINEARS))
    assert told["ranks"] == {"4": len(LINEARS)}
    assert told["groups"]["ffn"] == 4
    assert told["usable"]


def test_on_a_layer_without_plain_weight(model, lora):
    """Low rank works beside any layer; the rest needs a weight that can be copied."""

    class Packed(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x)

    packed = twin(model)
    packed.blocks[0].self_attn.v = Packed(packed.blocks[0].self_attn.v)
    pairs = factors(model, [NAME])
    adapter = read_lora(lora(written(pairs, lambda n: n)), shapes(model))
    assert (
        error(forward(swapped(packed, lora_swaps([(adapter, 1.0)]))), reference(model, dense(model, pairs, 1))) < 1e-5
    )
    full = read_lora(lora({f"{NAME}.diff": torch.ones(D, D)}, name="full"), shapes(model))
    with pytest.raises(SetupError, match="Packed has no plain"):
        swapped(packed, lora_swaps([(full, 1.0)]))
