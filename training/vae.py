"""Train the VAE of ``shapes``: first on single frames, then on clips.

Single frames are cheap and teach everything that is spatial. After that each temporal kernel starts as "copy the
newest frame", so the clip phase begins where the frame phase ended.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from checkpoint import Phase, schedule
from ditkit.models.wan_vae import WanVAE, WanVAEConfig
from ditkit.shapes.draw import FRAMES, draw, sample_scene
from optimizer import Optimizer

CONFIG = WanVAEConfig(dim=12)
KL_WEIGHT = 2e-5


def to_pixels(clips: np.ndarray) -> Tensor:
    """uint8 [B, T, H, W, 3] -> float [B, 3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def random_clips(rng: np.random.Generator, count: int, frames: int = FRAMES) -> Tensor:
    return to_pixels(np.stack([draw(sample_scene(rng), frames) for _ in range(count)]))


def is_matrix(name: str, p: Tensor) -> bool:
    return p.ndim >= 4 and "gamma" not in name


def loss_function(vae: WanVAE, device: str):
    def loss(video: Tensor, noise_scale: float) -> tuple[Tensor, Tensor]:
        with torch.autocast(device, torch.bfloat16):
            mean, log_variance = vae.moments(video)
            mean, log_variance = mean.float(), log_variance.float().clamp(-12, 4)
            z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp() * noise_scale
            z = vae.conv2(z).contiguous(memory_format=torch.channels_last_3d)
            out = vae.decoder(z, None).float()
        error = (out - video).square().mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return error + 0.2 * (out - video).abs().mean() + KL_WEIGHT * kl, error.detach()

    return loss


def psnr(error: float) -> float:
    return 10 * np.log10(4 / max(error, 1e-12))


def copy_newest_frame(vae: WanVAE) -> None:
    """Make every temporal kernel look at the newest frame only, and frame doubling repeat its frame."""
    with torch.no_grad():
        for name, module in vae.named_modules():
            if not isinstance(module, torch.nn.Conv3d) or module.kernel_size[0] == 1:
                continue
            if "time_conv" in name:
                identity = torch.eye(module.in_channels).repeat(module.out_channels // module.in_channels, 1)
                module.weight.zero_()
                module.weight[:, :, -1, 0, 0] = identity
                module.bias.zero_()
            else:
                module.weight[:, :, :-1] = 0


@torch.no_grad()
def round_trip(vae: WanVAE, device: str, count: int = 16) -> float:
    """PSNR in dB of decode(encode(clip)) on unseen clips, through the plain float32 code."""
    video = random_clips(np.random.default_rng(10**9), count).to(device)
    mean = vae.moments(video[:, :, :])[0]
    out = vae.decoder(vae.conv2(mean).contiguous(memory_format=torch.channels_last_3d), None).clamp(-1, 1)
    return psnr(float((out - video).square().mean()))


def run_phase(vae: WanVAE, phase: Phase, opt: Optimizer, clips: Tensor, batch: int, device: str, compiled: bool):
    loss_of = loss_function(vae, device)
    if compiled:
        loss_of = torch.compile(loss_of)
    recent: list[float] = []
    for step in phase:
        pick = clips[torch.randint(len(clips), (batch,))].to(device)
        loss, error = loss_of(pick, 1.0)
        loss.backward()
        norm = opt.step(schedule(step, phase.steps))
        recent.append(float(error))
        if step % 100 == 99:
            phase.report(psnr=psnr(float(np.mean(recent))), norm=norm)
            recent.clear()


def train(folder: Path, device: str, steps: tuple[int, int], compiled: bool) -> WanVAE:
    torch.manual_seed(0)
    vae = WanVAE(CONFIG).to(device)
    rng = np.random.default_rng(1)

    opt = Optimizer(vae.named_parameters(), 4e-3, matrices=is_matrix)
    phase = Phase(folder, "vae-frames", steps[0], {"vae": vae, "opt": opt}, seed=1)
    if phase.step < phase.steps:
        frames = random_clips(rng, 3000, 3).transpose(1, 2).flatten(0, 1).unsqueeze(2)
        run_phase(vae, phase, opt, frames, 8, device, compiled)
        phase.report(frame_psnr=psnr(float(loss_function(vae, device)(frames[:64].to(device), 0.0)[1])))

    copy_newest_frame(vae)
    opt = Optimizer(vae.named_parameters(), 2e-3, matrices=is_matrix)
    phase = Phase(folder, "vae-clips", steps[1], {"vae": vae, "opt": opt}, seed=2)
    if phase.step < phase.steps:
        run_phase(vae, phase, opt, random_clips(rng, 1500), 2, device, compiled)
        phase.report(round_trip_psnr=round_trip(vae, device))
    return vae
