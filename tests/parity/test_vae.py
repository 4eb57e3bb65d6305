"""The VAE against the official code's stored outputs and diffusers' class; and pieces against the whole."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny
import torch
from reference import l2, rel
from safetensors.torch import load_file
from training import folders

from ditkit.checkpoints.kinds.kind import KINDS
from ditkit.checkpoints.kinds.wan_vae import WAN21_MEAN, WAN21_STD, vae_keys
from ditkit.checkpoints.views.key_table import rename
from ditkit.models.wan_vae import WanVAE, WanVAEConfig

GOLDEN = Path(__file__).parents[1] / "data/golden/vae/wan21"
IO = load_file(GOLDEN / "io.safetensors")

VARIANTS = {
    "as wan": tiny.VAE,
    "one block a level": WanVAEConfig(dim=6, num_res_blocks=1),
    "other widths": WanVAEConfig(dim=4, dim_mult=(1, 3, 2, 5)),
    "other latents": WanVAEConfig(dim=4, z_dim=3, latents_mean=(0.3, -1.0, 0.0), latents_std=(2.0, 0.4, 1.0)),
}
CLIPS = [(1, 40, 24), (5, 16, 56), (17, 24, 8)]  # frames, height, width


def video(t: int, h: int, w: int, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, t, h, w, generator=torch.Generator().manual_seed(t * h + w)) * 2 - 1


def latents(f: int, h: int, w: int, batch: int = 1, z: int = 16) -> torch.Tensor:
    return torch.randn(batch, z, f, h, w, generator=torch.Generator().manual_seed(f * h + w))


@torch.inference_mode()
def encode(vae: WanVAE, x: torch.Tensor, chunk: int = 4) -> torch.Tensor:
    return vae.encode(x, chunk)


@torch.inference_mode()
def decode(vae: WanVAE, x: torch.Tensor, chunk: int = 1, cache=None) -> torch.Tensor:
    return torch.cat(list(vae.decode(x, chunk, cache)), 2)


@pytest.fixture(scope="module")
def official() -> WanVAE:
    raw = json.loads((GOLDEN / "config.json").read_text())
    sizes = {k: raw[k] for k in ("dim", "z_dim", "num_res_blocks")} | {"dim_mult": tuple(raw["dim_mult"])}
    vae = WanVAE(WanVAEConfig(**sizes, temporal_downsample=tuple(raw["temperal_downsample"])))
    vae.load_state_dict(load_file(GOLDEN / "Wan2.1_VAE.safetensors"), strict=True)
    return vae.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return tiny.vae()


# --- the official code's own outputs


def test_official_statistics():
    torch.testing.assert_close(torch.tensor(WAN21_MEAN), IO["norm.mean"], rtol=0, atol=0)
    torch.testing.assert_close(1 / torch.tensor(WAN21_STD), IO["norm.inv_std"], rtol=0, atol=0)


def test_official_size():
    """Parameters and tensors of the published file."""
    with torch.device("meta"):
        vae = WanVAE()
    assert sum(p.numel() for p in vae.parameters()) == 126_892_531
    assert sum(p.numel() for p in vae.encoder.parameters()) == 53_595_872
    assert sum(p.numel() for p in vae.decoder.parameters()) == 73_295_331
    assert len(vae.state_dict()) == 194


@pytest.mark.parametrize("chunk", [4, 400])
@pytest.mark.parametrize("t", [1, 5, 13])
def test_official_encoder(official, t, chunk):
    given = IO[f"encode_T{t}.video"]
    assert rel(encode(official, given, chunk), IO[f"encode_T{t}.latents"]) <= 1e-5
    if chunk > t:
        mean, log_variance = official.moments(given)
        assert rel(mean, IO[f"encode_T{t}.mean_raw"]) <= 1e-5
        assert log_variance.shape == mean.shape


@pytest.mark.parametrize("chunk", [1, 100])
@pytest.mark.parametrize("f", [1, 2, 4])
def test_official_decoder(official, f, chunk):
    expected = IO[f"decode_F{f}.video"]
    assert (expected.abs() > 1).any() or f == 1  # the clamp is at work in these cases
    assert rel(decode(official, IO[f"decode_F{f}.latents"], chunk), expected.clamp(-1, 1)) <= 1e-5


# --- diffusers


def theirs(config: WanVAEConfig, ours: WanVAE, folder: Path):
    from diffusers import AutoencoderKLWan

    table = vae_keys(len(config.dim_mult), config.num_res_blocks).to_other
    folders.write_component(
        folder, KINDS["wan_vae"].write_config("diffusers", asdict(config)), rename(ours.state_dict(), table)
    )
    return AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32).eval()


def normalised(raw: torch.Tensor, config: WanVAEConfig) -> torch.Tensor:
    """As diffusers' pipelines do it around their VAE."""
    shape = (1, -1, 1, 1, 1)
    return (raw - torch.tensor(config.latents_mean).view(shape)) / torch.tensor(config.latents_std).view(shape)


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    config = VARIANTS[request.param]
    ours = tiny.vae(seed=20 + list(VARIANTS).index(request.param), config=config)
    return config, ours, theirs(config, ours, tmp_path_factory.mktemp("vae") / "vae")


@torch.inference_mode()
@pytest.mark.parametrize("clip", CLIPS)
def test_diffusers_encoder(pair, clip):
    config, ours, other = pair
    given = video(*clip, batch=2)
    expected = normalised(other.encode(given).latent_dist.mode(), config)
    for chunk in (4, 8, 400):
        assert rel(encode(ours, given, chunk), expected) <= 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("clip", CLIPS)
def test_diffusers_decoder(pair, clip):
    config, ours, other = pair
    (t, h, w), shape = clip, (1, -1, 1, 1, 1)
    given = latents(1 + (t - 1) // 4, h // 8, w // 8, 2, config.z_dim)
    raw = given * torch.tensor(config.latents_std).view(shape) + torch.tensor(config.latents_mean).view(shape)
    expected = other.decode(raw, return_dict=False)[0]
    assert expected.shape == (2, 3, *clip)
    assert expected.std() > 0.1
    for chunk in (1, 2, 100):
        assert rel(decode(ours, given, chunk), expected) <= 3e-5


# --- pieces and the whole


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 100])
def test_decoding_in_pieces(vae, chunk):
    given = latents(5, 2, 3)
    whole = decode(vae, given, 5)
    pieces = list(vae.decode(given, chunk))
    frames = [4 * len(given[0, 0, a : a + chunk]) - 3 * (a == 0) for a in range(0, 5, chunk)]
    assert [p.shape[2] for p in pieces] == frames
    assert rel(torch.cat(pieces, 2), whole) <= 1e-5
    assert whole.shape == (1, 3, 17, 16, 24)


@pytest.mark.parametrize("chunk", [4, 8, 12, 400])
def test_encoding_in_pieces(vae, chunk):
    given = video(17, 16, 24)
    assert rel(encode(vae, given, chunk), encode(vae, given, 16)) <= 1e-5
    assert rel(encode(vae, given, chunk), normalised(vae.moments(given)[0], vae.config)) <= 1e-5  # no chunks at all


def test_a_stream_goes_on_with_its_cache(vae):
    """Latents that arrive bit by bit, as from a causal generator: equal pieces give equal bits."""
    given, cache = latents(6, 3, 2), {}
    streamed = [decode(vae, given[:, :, i : i + 1], 1, cache) for i in range(6)]
    assert torch.equal(torch.cat(streamed, 2), decode(vae, given, 1))
    cache = {}
    uneven = [decode(vae, given[:, :, a:b], 100, cache) for a, b in ((0, 2), (2, 3), (3, 6))]
    assert rel(torch.cat(uneven, 2), decode(vae, given, 1)) <= 1e-5


def test_the_cache_holds_a_few_frames_and_no_more(vae):
    short, long = {}, {}
    decode(vae, latents(3, 2, 2), 1, short)
    decode(vae, latents(9, 2, 2), 9, long)
    for cache in (short, long):
        for module, past in cache.items():
            assert past.shape[2] <= 2
            assert past.untyped_storage().nbytes() == past.numel() * past.element_size(), module  # no view of a chunk
    assert {m: p.shape for m, p in short.items()} == {m: p.shape for m, p in long.items()}


def test_no_frame_looks_ahead(vae):
    """Causality, exactly: what comes later changes no bit of what came before."""
    given, other = latents(5, 2, 2), latents(5, 2, 2)
    other[:, :, 3:] = 7.0
    assert torch.equal(decode(vae, given)[:, :, :9], decode(vae, other)[:, :, :9])
    assert torch.equal(decode(vae, given[:, :, :3]), decode(vae, given)[:, :, :9])
    assert not torch.equal(decode(vae, given)[:, :, 9:], decode(vae, other)[:, :, 9:])
    clip, changed = video(13, 16, 16), video(13, 16, 16)
    changed[:, :, 9:] = 0.5
    assert torch.equal(encode(vae, clip)[:, :, :3], encode(vae, changed)[:, :, :3])
    assert torch.equal(encode(vae, clip[:, :, :9]), encode(vae, clip)[:, :, :3])
    assert not torch.equal(encode(vae, clip)[:, :, 3:], encode(vae, changed)[:, :, 3:])


def test_samples_of_a_batch_are_independent(vae):
    given = latents(2, 3, 2, batch=3)
    together = decode(vae, given)
    for i in range(3):
        assert rel(together[i : i + 1], decode(vae, given[i : i + 1])) <= 1e-5


def test_pixels_are_clamped(vae):
    pixels = decode(vae, latents(2, 2, 2) * 30)
    assert pixels.abs().max() == 1
    assert pixels.isfinite().all()


def test_float64_and_bfloat16(vae):
    """In float64 pieces equal the whole to 1e-13, so what remains in float32 is rounding; bfloat16 works."""
    wide, given = tiny.vae().double(), latents(4, 2, 3)
    exact = decode(wide, given.double(), 4)
    assert exact.dtype == torch.float64
    assert rel(decode(wide, given.double(), 1), exact) <= 1e-13
    clip = video(13, 16, 24).double()
    assert rel(encode(wide, clip, 4), encode(wide, clip, 12)) <= 1e-13
    assert rel(decode(vae, given), exact) <= 5e-6
    assert rel(encode(vae, clip.float()), encode(wide, clip)) <= 5e-6
    narrow = decode(tiny.vae().bfloat16(), given.bfloat16())
    assert narrow.dtype == torch.bfloat16
    assert l2(narrow, exact) <= 0.05


def test_what_the_vae_refuses(vae):
    for t, h, w in ((4, 16, 16), (6, 16, 16), (0, 16, 16), (5, 12, 16), (5, 16, 20)):
        with pytest.raises(ValueError, match="cannot encode a video"):
            vae.encode(torch.zeros(1, 3, t, h, w))
    for chunk in (0, 2, 6, -4):
        with pytest.raises(ValueError, match="frames_per_chunk"):
            vae.encode(torch.zeros(1, 3, 5, 16, 16), chunk)
    for chunk in (0, -1):
        with pytest.raises(ValueError, match="frames_per_chunk"):
            list(vae.decode(torch.zeros(1, 16, 2, 2, 2), chunk))
    with pytest.raises(ValueError, match="they have 16 channels"):
        list(vae.decode(torch.zeros(1, 15, 2, 2, 2)))
    with pytest.raises(ValueError, match="cannot decode latents of"):
        list(vae.decode(torch.zeros(1, 16, 0, 2, 2)))
