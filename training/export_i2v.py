"""Write ``shapes-i2v``: its own transformer and image encoder, and a manifest that names the parts it shares with
``shapes``. Weights are float16: half the bytes, and the numbers of a small model lose nothing that can be seen."""

from __future__ import annotations

import json
import shutil
import tomllib
from dataclasses import asdict
from pathlib import Path

import folders
from ditkit.checkpoints.kinds.kind import KINDS
from ditkit.checkpoints.kinds.wan import transformer_keys
from ditkit.checkpoints.views.key_table import rename
from ditkit.models.wan import WanTransformer
from export import DEFAULTS
from image import CLIP, CLIP_MEAN, CLIP_STD

SHARED = ("vae", "text_encoder", "tokenizer", "scheduler")


def write(out: Path, model: WanTransformer, reader) -> None:
    new = out.with_name(out.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    config = model.config
    names = transformer_keys(config.num_layers, image=True).to_other
    fields = KINDS["wan"].write_config("diffusers", asdict(config))
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    folders.write_component(new / "transformer", fields, rename(tensors, names))

    about = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "num_channels": 3, **CLIP}
    tensors = {f"vision_model.{k}".replace("vision_model.vision_model.", "vision_model."): v.half()
               for k, v in reader.encoder.state_dict().items()}  # fmt: skip
    folders.write_component(new / "image_encoder", about, tensors, weights_name="model.safetensors")
    side = CLIP["image_size"]
    (new / "image_processor").mkdir()
    processor = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": side},
        "resample": 3, "do_center_crop": True, "crop_size": {"height": side, "width": side}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD),
        "do_convert_rgb": True,
    }  # fmt: skip
    (new / "image_processor" / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")

    preview = tomllib.loads((out.parent / "shapes" / "ditkit.toml").read_text())["preview"]
    defaults = {**DEFAULTS, "size_from": "request"}
    lines = [
        "[components]",
        'transformer = "transformer"',
        'image_encoder = "image_encoder"',
        *(f'{name} = "../shapes/{name}"' for name in SHARED if name != "scheduler"),
        "",
        "[defaults]",
        *(f"{k} = {json.dumps(v)}" for k, v in defaults.items()),
        "",
        "[preview]",
        f"factors = {preview['factors']}",
        f"bias = {preview['bias']}",
    ]
    (new / "ditkit.toml").write_text("\n".join(lines) + "\n")
    if (out / "README.md").exists():
        shutil.copy(out / "README.md", new)
    shutil.rmtree(out, ignore_errors=True)
    new.rename(out)
