"""Make the embedded model ``shapes-i2v`` out of a finished ``shapes``: encode, train, export.

    make train-shapes                             both models, one after the other
    python training/shapes_i2v.py --only clip     one part: conditions, clip, transformer, export, card

Seeded and resumable, part by part. The clips are those that ``shapes`` was trained on; their latents in
training/runs/shapes are made again when they are not there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

import image
import transformer
from ditkit.assembly import ASSETS, Components, Model
from ditkit.setup import Setup
from ditkit.shapes.draw import draw

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("conditions", "clip", "transformer", "export", "card")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--folder", type=Path, default=ROOT / "training" / "runs" / "shapes")
    parser.add_argument("--out", type=Path, default=ROOT / "src" / "ditkit" / "assets" / "shapes-i2v")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clips", type=int, default=6144)
    parser.add_argument("--clip-steps", type=int, default=1500, help="of the image encoder")
    parser.add_argument("--steps", type=int, default=2400, help="of the transformer")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder, only, device = args.folder, set(args.only), args.device

    base = Components(Model.open("shapes"), Setup(device=device, dtype="float32"))
    vae = base["vae"]
    if "conditions" in only or "transformer" in only:
        scenes, latents = transformer.make_latents(vae, folder, args.clips, device, args.compiled)
        conditions = image.make_conditions(vae, folder, scenes, device, args.compiled)
    if only & {"clip", "transformer", "export"}:
        reader = image.train_encoder(folder, args.clip_steps, device, args.compiled)
    if "transformer" in only:
        shape = (1, -1, 1, 1, 1)
        mean, std = (torch.tensor(v).view(shape) for v in (vae.config.latents_mean, vae.config.latents_std))
        frames = image.np.stack([draw(s, 1)[0] if s.motion != "growing" else draw(s)[0] for s in scenes])
        images = image.features(reader, frames, device)
        tokenizer = Tokenizer.from_file(str(ASSETS / "shapes" / "tokenizer" / "tokenizer.json"))
        rows, empty = image.caption_rows(base["text_encoder"].model.cpu(), tokenizer, scenes)
        weights = base["transformer"].cpu().state_dict()
        image.train(folder, weights, (latents - mean) / std, (conditions - mean) / std, images, rows, empty,
                    args.steps, args.batch, args.lr, device, args.compiled)  # fmt: skip
    if "export" in only:
        import export_i2v

        saved = torch.load(folder / "i2v.pt", weights_only=True)
        model = image.WanTransformer(image.IMAGE_CONFIG)
        model.load_state_dict(saved["parts"]["average"])
        export_i2v.write(args.out, model, reader.cpu())
        print(f"written: {args.out} (transformer at step {saved['step']})")
    if "card" in only:
        import card_i2v

        card_i2v.write(args.out, folder)


if __name__ == "__main__":
    sys.exit(main())
