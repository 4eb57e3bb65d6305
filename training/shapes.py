"""Make the embedded model ``shapes``: draw clips, train the VAE, then the text encoder and the transformer, export.

    make train-shapes                            everything, with the sizes that the packaged weights were made with
    python training/shapes.py --only vae         one part: vae, latents, transformer, export, card
    python training/shapes.py --device cuda      minutes instead of hours

Every part is seeded and resumable: stop it at any time, call it again, and it goes on from its last save (once a
minute). Work files are in training/runs/shapes; the finished model goes to src/ditkit/assets/shapes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import card
import export
import transformer
import vae as vae_training
from ditkit.models.wan_vae import WanVAE
from ditkit.shapes.draw import plain_caption
from wordings import other_caption

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("vae", "latents", "transformer", "export", "card")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--folder", type=Path, default=ROOT / "training" / "runs" / "shapes")
    parser.add_argument("--out", type=Path, default=ROOT / "src" / "ditkit" / "assets" / "shapes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--frame-steps", type=int, default=3500)
    parser.add_argument("--clip-steps", type=int, default=1000)
    parser.add_argument("--clips", type=int, default=6144)
    parser.add_argument("--steps", type=int, default=5500, help="of the transformer")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder, only = args.folder, set(args.only)

    if "vae" in only:
        vae_training.train(folder, args.device, (args.frame_steps, args.clip_steps), args.compiled)
    if only == {"card"}:
        card.write(args.out, folder, args.clips)
    if only <= {"vae", "card"}:
        return
    vae = WanVAE(vae_training.CONFIG).to(args.device)
    vae.load_state_dict(torch.load(folder / "vae-clips.pt", weights_only=True)["parts"]["vae"])

    scenes, latents = transformer.make_latents(vae, folder, args.clips, args.device, args.compiled)
    mean, std = transformer.statistics(latents)
    if "transformer" in only or "export" in only:
        rng = np.random.default_rng(5)
        texts = [c for s in scenes[:4096] for c in (plain_caption(s), other_caption(s, rng), other_caption(s, rng))]
        tokenizer = transformer.train_tokenizer(folder / "tokenizer", texts)
    if "transformer" in only:
        shape = (1, -1, 1, 1, 1)
        normalised = (latents - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
        captions = transformer.Captions(scenes, tokenizer)
        transformer.train(folder, normalised, captions, tokenizer.get_vocab_size(), args.steps, args.batch, args.lr,
                          args.device, args.compiled)  # fmt: skip
    if "export" in only:
        vae.config = replace(vae.config, latents_mean=mean, latents_std=std)
        saved = torch.load(folder / "transformer.pt", weights_only=True)
        model = transformer.Both(tokenizer.get_vocab_size())
        model.load_state_dict(saved["parts"]["average"])
        export.write(args.out, vae.cpu(), model, folder, scenes[:256], latents[:256])
        print(f"written: {args.out} (transformer at step {saved['step']})")
    if "card" in only:
        card.write(args.out, folder, args.clips)


if __name__ == "__main__":
    sys.exit(main())
