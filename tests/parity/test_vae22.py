"""The VAE of Wan 2.2 against the official code's stored outputs and diffusers' class; and pieces against the whole."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny
import torch
from reference import l2, rel
from safetensors.torch import load_file

from ditkit.checkpoints.kinds.wan_vae import WAN22_MEAN, WAN22_STD
from ditkit.contracts import VAE
from ditkit.models.wan_vae import (
    WanVAE22,
    WanVAE22Config,
    average_down,
    patchify,
    repeat_up,
    unpatchify,
)

GOLDEN = Path(__file__).parents[1] / "data/golden/vae/wan22"
IO = load_file(GOLDEN / "io.safetensors")
THREE = {"z_dim": 3, "latents_mean": (0.3, -1.0, 0.0), "latents_std": (2.0, 0.4, 1.0)}

VARIANTS = {
    "as wan": WanVAE22Config(dim=4, dec_dim=4),
    "one block a level": WanVAE22Config(dim=4, dec_dim=6, num_res_blocks=1),
    "other widths": WanVAE22Config(dim=6, dec_dim=4, dim_mult=(1, 1, 2, 2)),
    "time is halved elsewhere": WanVAE22Config(dim=4, dec_dim=4, temporal_downsample=(True, False, True)),
    "no patches, other latents": WanVAE22Config(dim=4, dec_dim=4, patch_size=1, **THREE),
}
CLIPS = [(1, 48, 32), (5, 16, 48), (13, 32, 16)]  # frames, height, width


def video(t: int, h: int, w: int, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, t, h, w, generator=torch.Generator().manual_seed(t * h + w)) * 2 - 1


def latents(f: int, h: int, w: int, batch: int = 1, z: int = 48) -> torch.Tensor:
    return torch.randn(batch, z, f, h, w, generator=torch.Generator().manual_seed(f * h + w))


@torch.inference_mode()
def encode(vae: WanVAE22, x: torch.Tensor, chunk: int = 4) -> torch.Tensor:
    return vae.encode(x, chunk)


@torch.inference_mode()
def decode(vae: WanVAE22, x: torch.Tensor, chunk: int = 1, cache=None) -> torch.Tensor:
    return torch.cat(list(vae.decode(x, chunk, cache)), 2)


def made(seed: int, config: WanVAE22Config) -> WanVAE22:
    return tiny.randomise(WanVAE22(config), seed)


@pytest.fixture(scope="module")
def official() -> WanVAE22:
    raw = json.loads((GOLDEN / "config.json").read_text())
    sizes = {k: raw[k] for k in ("dim", "dec_dim", "z_dim", "num_res_blocks")} | {"dim_mult": tuple(raw["dim_mult"])}
    vae = WanVAE22(WanVAE22Config(**sizes, temporal_downsample=tuple(raw["temperal_downsample"])))
    vae.load_state_dict(load_file(GOLDEN / "Wan2.2_VAE.safetensors"), strict=True)
    return vae.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vae() -> WanVAE22:
    return made(4, VARIANTS["as wan"])


# --- the official code's own outputs


def test_official_statistics():
    torch.testing.assert_close(torch.tensor(WAN22_MEAN), IO["norm.mean"], rtol=0, atol=0)
    torch.testing.assert_close(1 / torch.tensor(WAN22_STD), IO["norm.inv_std"], rtol=0, atol=0)


def test_official_size():
    """Parameters and tensors of the published file (shared by its encoder and its decoder)."""
    with torch.device("meta"):
        vae = WanVAE22()
    assert sum(p.numel() for p in vae.parameters()) == 704_688_668
    assert sum(p.numel() for p in vae.encoder.parameters()) == 149_627_776
    assert sum(p.numel() for p in vae.decoder.parameters()) == 555_049_228
    assert len(vae.state_dict()) == 196
    assert (vae.config.spatial_stride, vae.config.temporal_stride) == (16, 4)


@pytest.mark.parametrize("chunk", [4, 400])
@pytest.mark.parametrize("t", [1, 5, 13])
def test_official_encoder(official, t, chunk):
    given = IO[f"encode_T{t}.video"]
    assert rel(encode(official, given, chunk), IO[f"encode_T{t}.latents"]) <= 5e-6
    if chunk > t:
        mean, log_variance = official.moments(given)
        assert rel(mean, IO[f"encode_T{t}.mean_raw"]) <= 5e-6
        assert log_variance.shape == mean.shape


@pytest.mark.parametrize("chunk", [1, 100])
@pytest.mark.parametrize("f", [1, 2, 4])
def test_official_decoder(official, f, chunk):
    expected = IO[f"decode_F{f}.video"]
    assert rel(decode(official, IO[f"decode_F{f}.latents"], chunk), expected.clamp(-1, 1)) <= 1e-5


# --- diffusers


def shape(config: WanVAE22Config) -> dict:
    return {
        "base_dim": config.dim, "decoder_base_dim": config.dec_dim, "z_dim": config.z_dim,
        "dim_mult": list(config.dim_mult), "num_res_blocks": config.num_res_blocks,
        "temperal_downsample": list(config.temporal_downsample), "is_residual": True,
        "patch_size": None if config.patch_size == 1 else config.patch_size,
        "in_channels": 3 * config.patch_size**2, "out_channels": 3 * config.patch_size**2,
        "scale_factor_spatial": config.spatial_stride, "latents_mean": list(config.latents_mean),
        "latents_std": list(config.latents_std),
    }  # fmt: skip


def diffusers_name(name: str, config: WanVAE22Config) -> str:
    """Told from what each part is, so that this test needs no table of ours."""
    first, *rest = name.split(".")
    if first in ("conv1", "conv2"):
        return ".".join([{"conv1": "quant_conv", "conv2": "post_quant_conv"}[first], *rest])
    part, inner = first, rest
    match inner:
        case ["conv1", leaf]:
            return f"{part}.conv_in.{leaf}"
        case ["head", "0", leaf]:
            return f"{part}.norm_out.{leaf}"
        case ["head", "2", leaf]:
            return f"{part}.conv_out.{leaf}"
        case ["middle", "1", *leaf]:
            return ".".join([part, "mid_block.attentions.0", *leaf])
        case ["middle", block, *leaf]:
            return f"{part}.mid_block.resnets.{int(block) // 2}.{block_name(leaf)}"
        case ["downsamples" | "upsamples" as side, level, _, block, *leaf]:
            stage = f"{part}.{'down' if side == 'downsamples' else 'up'}_blocks.{level}"
            if leaf[0] in ("resample", "time_conv"):
                return ".".join([stage, "downsampler" if side == "downsamples" else "upsampler", *leaf])
            return f"{stage}.resnets.{block}.{block_name(leaf)}"
    raise AssertionError(name)


def block_name(leaf: list[str]) -> str:
    if leaf[0] == "shortcut":
        return f"conv_shortcut.{leaf[1]}"
    return {"0": "norm1", "2": "conv1", "3": "norm2", "6": "conv2"}[leaf[1]] + f".{leaf[2]}"


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request):
    from diffusers import AutoencoderKLWan

    config = VARIANTS[request.param]
    ours = made(40 + list(VARIANTS).index(request.param), config)
    other = AutoencoderKLWan(**shape(config)).eval()
    tensors = {diffusers_name(k, config): v for k, v in ours.state_dict().items()}
    assert tensors.keys() == other.state_dict().keys()
    other.load_state_dict(tensors, strict=True)
    return config, ours, other


def normalised(raw: torch.Tensor, config: WanVAE22Config) -> torch.Tensor:
    to = (1, -1, 1, 1, 1)
    return (raw - torch.tensor(config.latents_mean).view(to)) / torch.tensor(config.latents_std).view(to)


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
    (t, h, w), to, s = clip, (1, -1, 1, 1, 1), config.spatial_stride
    given = latents(1 + (t - 1) // 4, h // s, w // s, 2, config.z_dim)
    raw = given * torch.tensor(config.latents_std).view(to) + torch.tensor(config.latents_mean).view(to)
    expected = other.decode(raw, return_dict=False)[0]
    assert expected.shape == (2, 3, *clip)
    assert expected.std() > 0.1
    for chunk in (1, 2, 100):
        assert rel(decode(ours, given, chunk), expected) <= 1e-5


# --- the new pieces, by their definition


def test_patches_are_the_channels_of_a_pixel():
    """Channel c * 4 + column * 2 + row, which is not the order of pixel_unshuffle."""
    x = torch.arange(3 * 2 * 4 * 6.0).view(1, 3, 2, 4, 6)
    y = patchify(x, 2)
    for c in range(3):
        for row in range(2):
            for column in range(2):
                assert torch.equal(y[:, c * 4 + column * 2 + row], x[:, c, :, row::2, column::2])
    assert torch.equal(unpatchify(y, 2), x)


def test_the_averaged_shortcut():
    x = torch.randn(1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    y = average_down(x, 4, 2, 2)  # 2 * 8 values a block, so 4 neighbours are averaged: one frame of one channel
    assert y.shape == (1, 4, 2, 2, 2)
    assert torch.equal(y[:, 0, 0], torch.zeros(1, 2, 2))  # before the first frame of a stream there is nothing
    for c in range(2):
        torch.testing.assert_close(y[0, 2 * c + 1, 0, 0, 1], x[0, c, 0, :2, 2:].mean())
        torch.testing.assert_close(y[0, 2 * c, 1, 1, 0], x[0, c, 1, 2:, :2].mean())


def test_the_repeated_shortcut():
    x = torch.randn(1, 4, 3, 2, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(repeat_up(x, 4, 2, 2), x.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4))
    narrow = repeat_up(x, 2, 1, 2)  # 2 * 4 places for 4 channels: each stands for one row
    for o in range(2):
        for row in range(2):
            assert torch.equal(narrow[:, o, :, row::2, ::2], x[:, 2 * o + row])
            assert torch.equal(narrow[:, o, :, row::2, 1::2], x[:, 2 * o + row])


@pytest.mark.parametrize("sizes", [{"dim": 4, "dec_dim": 4, "dim_mult": (1, 16, 1, 1)}, {"dim_mult": (3, 2, 2, 2)}])
def test_widths_that_no_shortcut_can_bridge(sizes):
    with pytest.raises(ValueError, match="channels cannot be"), torch.device("meta"):
        WanVAE22(WanVAE22Config(**sizes))


# --- pieces and the whole


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_decoding_in_pieces(vae, chunk):
    given = latents(5, 2, 1)
    whole = decode(vae, given, 5)
    pieces = list(vae.decode(given, chunk))
    assert [p.shape[2] for p in pieces] == [
        4 * len(given[0, 0, a : a + chunk]) - 3 * (a == 0) for a in range(0, 5, chunk)
    ]
    assert rel(torch.cat(pieces, 2), whole) <= 1e-5
    assert whole.shape == (1, 3, 17, 32, 16)


@pytest.mark.parametrize("chunk", [4, 8, 12, 400])
def test_encoding_in_pieces(vae, chunk):
    given = video(17, 16, 32)
    assert rel(encode(vae, given, chunk), normalised(vae.moments(given)[0], vae.config)) <= 1e-5  # no chunks at all


def test_a_stream_goes_on_with_its_cache(vae):
    given, cache = latents(6, 2, 1), {}
    streamed = [decode(vae, given[:, :, i : i + 1], 1, cache) for i in range(6)]
    assert torch.equal(torch.cat(streamed, 2), decode(vae, given, 1))
    cache = {}
    uneven = [decode(vae, given[:, :, a:b], 100, cache) for a, b in ((0, 2), (2, 3), (3, 6))]
    assert rel(torch.cat(uneven, 2), decode(vae, given, 1)) <= 1e-5
    for past in cache.values():
        assert past.shape[2] <= 2
        assert past.untyped_storage().nbytes() == past.numel() * past.element_size()  # no view of a chunk


def test_no_frame_looks_ahead(vae):
    given, other = latents(4, 1, 2), latents(4, 1, 2)
    other[:, :, 2:] = 7.0
    assert torch.equal(decode(vae, given)[:, :, :5], decode(vae, other)[:, :, :5])
    assert not torch.equal(decode(vae, given)[:, :, 5:], decode(vae, other)[:, :, 5:])
    clip, changed = video(13, 16, 16), video(13, 16, 16)
    changed[:, :, 9:] = 0.5
    assert torch.equal(encode(vae, clip)[:, :, :3], encode(vae, changed)[:, :, :3])
    assert not torch.equal(encode(vae, clip)[:, :, 3:], encode(vae, changed)[:, :, 3:])


def test_float64_and_bfloat16(vae):
    """In float64 pieces equal the whole to 1e-13, so what remains in float32 is rounding; bfloat16 works."""
    wide, given = made(4, VARIANTS["as wan"]).double(), latents(4, 2, 1)
    exact = decode(wide, given.double(), 4)
    assert exact.dtype == torch.float64
    assert rel(decode(wide, given.double(), 1), exact) <= 1e-13
    clip = video(13, 16, 32).double()
    assert rel(encode(wide, clip, 4), encode(wide, clip, 12)) <= 1e-13
    assert rel(decode(vae, given), exact) <= 5e-6
    assert rel(encode(vae, clip.float()), encode(wide, clip)) <= 5e-6
    narrow = decode(made(4, VARIANTS["as wan"]).bfloat16(), given.bfloat16())
    assert narrow.dtype == torch.bfloat16
    assert l2(narrow, exact) <= 0.05


def test_threads_may_share_it(vae):
    """F8 of diffusers: one AutoencoderKLWan in two threads gives wrong frames and no exception."""
    jobs = [latents(3, 2, 1), latents(4, 1, 2)] * 4
    alone = [decode(vae, x) for x in jobs]
    with ThreadPoolExecutor(4) as pool:
        for found, expected in zip(pool.map(lambda x: decode(vae, x), jobs), alone, strict=True):
            assert torch.equal(found, expected)


def test_it_is_a_vae_and_refuses_what_does_not_fit(vae):
    assert isinstance(vae, VAE)
    assert asdict(vae.config)["patch_size"] == 2
    for t, h, w in ((4, 16, 16), (0, 16, 16), (5, 24, 16), (5, 16, 40)):
        with pytest.raises(ValueError, match="the sides multiples of 16"):
            vae.encode(torch.zeros(1, 3, t, h, w))
    with pytest.raises(ValueError, match="they have 48 channels"):
        list(vae.decode(torch.zeros(1, 16, 2, 2, 2)))
