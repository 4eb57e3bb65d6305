"""TAEHV against its author's stored outputs and, for the variant that has none, arithmetic written out once more."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from reference import rel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ditkit.checkpoints.files.safetensors import TensorFiles
from ditkit.contracts import VAE
from ditkit.errors import LoadError
from ditkit.models.taehv import TAEHV, TAEHVConfig

GOLDEN = Path(__file__).parents[1] / "data/golden/taehv"
TINY = {"encoder_width": 8, "decoder_widths": (16, 12, 10, 8)}
CONFIGS = {"taew2_1": TAEHVConfig(**TINY), "taew2_2": TAEHVConfig(z_dim=48, patch_size=2, **TINY)}
IO = {name: load_file(GOLDEN / f"{name}_tiny_io.safetensors") for name in CONFIGS}
SUPER = TAEHVConfig(z_dim=6, patch_size=2, variant="super", encoder_width=4, decoder_widths=(12, 10, 8, 6))


def ours(given: torch.Tensor) -> torch.Tensor:
    """[B, T, 3, H, W] in [0, 1] -> [B, 3, T, H, W] in [-1, 1]."""
    return given.transpose(1, 2) * 2 - 1


@torch.inference_mode()
def decode(taehv: TAEHV, latents: torch.Tensor, chunk: int = 1, cache=None) -> torch.Tensor:
    return torch.cat(list(taehv.decode(latents, chunk, cache)), 2)


@pytest.fixture(scope="module", params=CONFIGS)
def official(request):
    name = request.param
    return TAEHV.load(CONFIGS[name], TensorFiles(GOLDEN / f"{name}_tiny.safetensors")), IO[name]


@pytest.fixture(scope="module")
def wide() -> TAEHV:
    return tiny.randomise(TAEHV(SUPER), 6).double()


# --- the author's own outputs


@pytest.mark.parametrize("chunk", [1, 2, 100])
@pytest.mark.parametrize("f", [1, 3])
def test_official_decoder(official, f, chunk):
    taehv, io = official
    found = decode(taehv, io[f"decode_F{f}.latents"].transpose(1, 2), chunk)
    assert found.shape[2] == 4 * f - 3
    assert rel(found * 0.5 + 0.5, io[f"decode_F{f}.video"].transpose(1, 2)) <= 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [4, 8, 400])
@pytest.mark.parametrize("t", [1, 6, 9])
def test_official_encoder(official, t, chunk):
    taehv, io = official
    found = taehv.encode(ours(io[f"encode_T{t}.video"]), chunk)
    assert rel(found, io[f"encode_T{t}.latents"].transpose(1, 2)) <= 1e-5


def computed(shapes: dict[str, torch.Size], scale: dict) -> dict[str, torch.Tensor]:
    """Weights of the official widths that a formula gives: section 9 of the golden files' README."""
    tensors = {}
    for k, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        with np.errstate(over="ignore"):
            z = (np.arange(shape.numel(), dtype=np.uint64) + np.uint64((k << 32) + 1)) * np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
        u = (z >> np.uint64(40)).astype(np.float64) / 2**24 * 2 - 1
        a = (3 / shape[1:].numel()) ** 0.5 if len(shape) > 1 else 0.1
        tensors[name] = torch.from_numpy((u * a * scale.get(name, 1)).astype(np.float32)).view(shape)
    for name, shift in scale["_bias_shift"].items():
        tensors[name] += shift
    return tensors


@torch.inference_mode()
def test_official_widths():
    """11 million computed weights in the sizes and under the names of the published ``taew2_1``."""
    file = GOLDEN / "taew2_1_official_width_io.safetensors"
    io = load_file(file)
    with safe_open(file, "pt") as opened:
        scale = json.loads(opened.metadata()["scale"])
    taehv = TAEHV().eval()
    weights = computed({name: t.shape for name, t in taehv.state_dict().items()}, scale)
    for name, t in io.items():
        if name.startswith("weight_check."):
            assert torch.equal(weights[name.removeprefix("weight_check.")].flatten()[: len(t)], t)
    taehv.load_state_dict(weights)
    for f in (1, 2):
        found = decode(taehv, io[f"decode_F{f}.latents"].transpose(1, 2))
        assert rel(found * 0.5 + 0.5, io[f"decode_F{f}.video"].transpose(1, 2)) <= 1e-5
    assert rel(taehv.encode(ours(io["encode_T5.video"])), io["encode_T5.latents"].transpose(1, 2)) <= 1e-5


@pytest.mark.parametrize(
    ("config", "encoder", "decoder", "tensors"),
    [
        (TAEHVConfig(), 1_470_928, 9_844_611, 128),
        (TAEHVConfig(z_dim=48, patch_size=2), 1_494_576, 9_923_532, 128),
        (
            TAEHVConfig(z_dim=48, patch_size=2, variant="super", decoder_widths=(512, 256, 128, 64)),
            1_494_576, 18_993_420, 112,
        ),
    ],
)  # fmt: skip
def test_official_sizes(config, encoder, decoder, tensors):
    with torch.device("meta"):
        taehv = TAEHV(config)
    assert sum(p.numel() for p in taehv.encoder.parameters()) == encoder
    assert sum(p.numel() for p in taehv.decoder.parameters()) == decoder
    assert len(taehv.state_dict()) == tensors
    assert config.temporal_stride == config.frames_of_a_latent == 4
    assert config.spatial_stride == 8 * config.patch_size


# --- the arithmetic once more, frame by frame


def super_frames(w: dict[str, torch.Tensor], latents: torch.Tensor, grow: tuple[int, ...], patch: int) -> torch.Tensor:
    """The "super" decoder of one clip, from its definition: latents [F, z, h, w] -> all frames [4F, 3, H, W]."""

    def block(n: int, frames: list) -> list:
        made, before = [], torch.zeros_like(frames[0])
        for x in frames:
            y = F.conv2d(torch.cat((x, before)), w[f"{n}.conv.0.weight"], padding=3, groups=2 * len(x))
            y = torch.einsum("oc,chw->ohw", w[f"{n}.conv.1.weight"][..., 0, 0], y) + w[f"{n}.conv.1.bias"].view(
                -1, 1, 1
            )
            made.append(x + torch.einsum("oc,chw->ohw", w[f"{n}.conv.3.weight"][..., 0, 0], y.clamp_min(0)))
            before = x
        return made

    def conv(n: int, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, w[f"{n}.weight"], w[f"{n}.bias"], padding=1)

    frames = [torch.einsum("oc,chw->ohw", w["0.weight"][..., 0, 0], x) for x in latents]
    for start, count in zip((1, 8, 15), grow, strict=True):
        for n in range(start, start + 3):
            frames = block(n, frames)
        frames = [F.pixel_shuffle(conv(start + 3, x).clamp_min(0), 2) for x in frames]
        kernel = w[f"{start + 6}.conv.weight"][..., 0, 0]
        frames = [torch.einsum("oc,chw->ohw", share, x) for x in frames for share in kernel.chunk(count)]
    return torch.stack([F.pixel_shuffle(conv(22, x), patch) for x in frames])


@pytest.mark.parametrize("chunk", [1, 3])
def test_super_decoder(wide, chunk):
    latents = torch.randn(2, 6, 3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = dict(wide.decoder.state_dict())
    expected = torch.stack([super_frames(weights, x.transpose(0, 1), (1, 2, 2), 2) for x in latents])
    found = decode(wide, latents, chunk)
    assert found.shape == (2, 3, 9, 32, 48)
    assert 0.1 < (found.abs() < 1).double().mean() < 1  # the clamp does something, but not everything
    assert rel(found, expected[:, 3:].clamp(0, 1).transpose(1, 2) * 2 - 1) <= 1e-12


def test_fewer_frames_keep_the_last_of_each_group(tmp_path):
    """With the last doubling in time left out, each pair gives its second frame: no later layer looks along time."""
    full = tiny.randomise(TAEHV(CONFIGS["taew2_1"]), 3)
    save_file(full.state_dict(), tmp_path / "full.safetensors")
    config = TAEHVConfig(temporal_upsample=(False, True, False), **TINY)
    halved = TAEHV.load(config, TensorFiles(tmp_path / "full.safetensors"))
    assert torch.equal(halved.decoder[19].conv.weight, full.decoder[19].conv.weight[10:])
    latents = torch.randn(1, 16, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    assert decode(halved, latents).shape[2] == 5
    assert rel(decode(halved, latents), decode(full, latents)[:, :, ::2]) <= 1e-6


# --- streams, threads, what is refused


def test_a_stream_of_single_latents_is_the_clip(wide):
    latents, cache = torch.randn(1, 6, 5, 2, 2, dtype=torch.float64), {}
    streamed = [decode(wide, latents[:, :, i : i + 1], 1, cache) for i in range(5)]
    assert [x.shape[2] for x in streamed] == [1, 4, 4, 4, 4]
    assert torch.equal(torch.cat(streamed, 2), decode(wide, latents, 1))
    assert rel(torch.cat(streamed, 2), decode(wide, latents, 5)) <= 1e-12
    for past in cache.values():
        assert past.shape[1] == 1
        assert past.untyped_storage().nbytes() == past.numel() * past.element_size()  # no view of a piece


def test_threads_may_share_it(wide):
    jobs = [torch.randn(1, 6, f, 2, 2, dtype=torch.float64) for f in (2, 4, 2, 4)]
    alone = [decode(wide, x) for x in jobs]
    with ThreadPoolExecutor(4) as pool:
        for found, expected in zip(pool.map(lambda x: decode(wide, x), jobs), alone, strict=True):
            assert torch.equal(found, expected)


def test_dtype_and_identity(tmp_path):
    file = TensorFiles(GOLDEN / "taew2_1_tiny.safetensors")
    narrow, exact = (TAEHV.load(CONFIGS["taew2_1"], file, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert isinstance(narrow, VAE)
    assert narrow.dtype == torch.bfloat16
    assert narrow.fingerprint != exact.fingerprint == TAEHV.load(CONFIGS["taew2_1"], file).fingerprint
    latents = torch.randn(1, 16, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    found = decode(narrow, latents.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found - decode(exact, latents)).abs().mean() < 0.05


def test_other_weights_are_refused(tmp_path):
    taehv = tiny.randomise(TAEHV(CONFIGS["taew2_1"]), 3)
    for change, message in (
        ({"decoder.1.weight": torch.zeros(16, 15, 3, 3)}, "another shape"),
        ({"decoder.13.conv.weight": torch.zeros(13, 12, 1, 1)}, "another shape"),  # not whole frames
        ({"decoder.7.conv.weight": torch.zeros(8, 16, 1, 1)}, "another shape"),  # fewer than needed
        ({"extra": torch.zeros(1)}, "unknown"),
    ):
        save_file(taehv.state_dict() | change, tmp_path / "other.safetensors")
        with pytest.raises(LoadError, match=message):
            TAEHV.load(CONFIGS["taew2_1"], TensorFiles(tmp_path / "other.safetensors"))


def test_what_does_not_fit_is_refused(wide):
    for shape, message in (((1, 3, 5, 24, 16), "multiples of 16"), ((1, 4, 5, 16, 16), "channels 3")):
        with pytest.raises(ValueError, match=message):
            wide.encode(torch.zeros(shape, dtype=torch.float64))
    for chunk in (0, 2):
        with pytest.raises(ValueError, match="frames_per_chunk"):
            wide.encode(torch.zeros(1, 3, 4, 16, 16, dtype=torch.float64), chunk)
    with pytest.raises(ValueError, match="they have 6 channels"):
        list(wide.decode(torch.zeros(1, 16, 1, 2, 2)))
    with pytest.raises(ValueError, match="at least 1"):
        list(wide.decode(torch.zeros(1, 6, 1, 2, 2), 0))
    for sizes in ({"variant": "huge"}, {"decoder_widths": (4, 4)}, {"temporal_upsample": (True,)}):
        with pytest.raises(ValueError, match="no TAEHV has this shape"):
            TAEHVConfig(**sizes)
