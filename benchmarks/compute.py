"""Seconds for one pass of each network: the transformer, and the VAE in both directions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

import ditkit
from benchmarks.measure import Clock, Row, compared, in_turns
from benchmarks.models import SIZES, write_vae
from ditkit.models.wan_vae import WanVAEConfig
from ditkit.nn.attention import sdpa

TEXT_ROWS = 20
SAME = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative error up to which both sides computed the same thing


def check_same(a: torch.Tensor, b: torch.Tensor, tolerance: float, what: str) -> None:
    """A race between different results would prove nothing."""
    error = float((a.float() - b.float()).norm() / b.float().norm())
    if not error <= tolerance:
        raise RuntimeError(f"{what}: the two sides differ by {error:.1e}, more than {tolerance:.0e}")


@torch.inference_mode()
def transformer(folder: Path, name: str, dtype: torch.dtype, repeats: int, clock: Clock) -> Iterator[Row]:
    from diffusers import WanTransformer3DModel

    kind = str(dtype).removeprefix("torch.")
    config, _, (f, h, w) = SIZES[name]
    ours = ditkit.load(folder, device="cpu", dtype=kind).components["transformer"]
    theirs = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=dtype).eval()

    g = torch.Generator().manual_seed(0)
    latents = torch.randn(1, config.in_dim, f, h, w, generator=g)
    rows, time = torch.randn(TEXT_ROWS, config.text_dim, generator=g), torch.tensor([500.0])
    padded = torch.nn.functional.pad(rows, (0, 0, 0, config.text_len - TEXT_ROWS)).unsqueeze(0).to(dtype)
    text = ours.prepare_text([rows])

    def one() -> torch.Tensor:
        return ours(latents, time, text, run_blocks=ours.run_blocks, attend=sdpa)

    def anew() -> torch.Tensor:
        again = ours.prepare_text([rows], remember=False)
        return ours(latents, time, again, run_blocks=ours.run_blocks, attend=sdpa)

    def other() -> torch.Tensor:
        return theirs(latents.to(dtype), time, padded, return_dict=False)[0]

    check_same(one(), other(), SAME[dtype], f"transformer {name} {kind}")
    tokens = f * (h // 2) * (w // 2)
    size = f"{name}: width {config.dim}, {config.num_layers} layers, {tokens} tokens, {kind}"
    times = in_turns(lambda: void(one()), lambda: void(other()), repeats, clock)
    yield compared("transformer forward", size, "s", *times)
    if dtype == torch.float32 and name == "shapes":
        times = in_turns(lambda: void(anew()), lambda: void(other()), repeats, clock)
        row = compared("transformer forward", f"{name}, text keys made anew, float32", "s", *times)
        yield replace(row, limit=None, note="a run does this once")


def void(result: object) -> None:
    """Drop a result, so that the call around it is what gets timed."""


@torch.inference_mode()
def vae(folder: Path, dim: int, clip: tuple[int, int, int], repeats: int, clock: Clock) -> Iterator[Row]:
    """``clip``: frames, height, width."""
    from diffusers import AutoencoderKLWan

    from ditkit.checkpoints.files.safetensors import TensorFiles
    from ditkit.checkpoints.kinds.wan_vae import vae_keys
    from ditkit.checkpoints.load import load_into
    from ditkit.checkpoints.views.mapped import Mapped
    from ditkit.models.wan_vae import WanVAE

    config = WanVAEConfig(dim=dim)
    write_vae(folder, config)
    ours = WanVAE(config).eval().requires_grad_(False)
    load_into(ours, Mapped(TensorFiles(folder), vae_keys(len(config.dim_mult), config.num_res_blocks), "native"))
    theirs = AutoencoderKLWan.from_pretrained(folder).eval()

    video = torch.rand(1, 3, *clip, generator=torch.Generator().manual_seed(0)) * 2 - 1
    shape = (1, -1, 1, 1, 1)
    mean, std = torch.tensor(config.latents_mean).view(shape), torch.tensor(config.latents_std).view(shape)
    latents = ours.encode(video)
    raw = latents * std + mean
    check_same(raw, theirs.encode(video).latent_dist.mode(), 1e-4, f"VAE encode, base {dim}")
    check_same(torch.cat(list(ours.decode(latents)), 2), theirs.decode(raw).sample, 1e-4, f"VAE decode, base {dim}")
    size = f"base {dim}, {clip[0]} frames of {clip[2]}x{clip[1]}"
    times = in_turns(lambda: void(list(ours.decode(latents))), lambda: void(theirs.decode(raw)), repeats, clock, 0)
    yield compared("VAE", f"decode, {size}", "s", *times)
    times = in_turns(lambda: void(ours.encode(video)), lambda: void(theirs.encode(video)), repeats, clock, 0)
    yield compared("VAE", f"encode, {size}", "s", *times)
