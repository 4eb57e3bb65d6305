"""Folders of models: configs, indexes, ``ditkit.toml`` and its lock, vocabularies, shards, links."""

from __future__ import annotations

import json

from ditkit.assembly import Components, Model
from ditkit.checkpoints.model.lock import lock_text, make_lock
from ditkit.checkpoints.model.manifest import Manifest
from ditkit.setup import Setup

from .. import bases
from ..mutate import as_json, as_toml, bytes_mutated, copied, entry_mutated, lines_mutated, put, tree_mutated
from ..watch import command
from .safetensors import parts

NAMED = ()  # a component that is elsewhere is named by its place
SHA = "0123456789abcdef0123456789abcdef01234567"
MANIFEST = {
    "components": {
        "vae": "vae", "text_encoder": {"path": ".", "subfolder": "text_encoder"}, "tokenizer": "tokenizer",
        "transformer": {"path": "transformer", "file": "diffusion_pytorch_model.safetensors"},
        "transformer_2": {"repo": "OWNER/OTHER", "file": "wan-Q4_K.gguf", "revision": SHA},
        "image_encoder": f"hf:OWNER/OTHER@{SHA}",
    },
    "model": {"boundary": 0.875, "expand_timesteps": False},
    "defaults": {"steps": 4, "width": 32, "height": 32, "frames": 5, "guidance_scale": 4.0, "shift": 3.0},
    "preview": {"factors": [[0.1, 0.2, 0.3]], "bias": [0.0, 0.0, 0.0]},
}  # fmt: skip
PLACE = {"pretrained_model_name_or_path": ".", "subfolder": "vae", "revision": None, "variant": None,
         "type_hint": ["diffusers", "AutoencoderKLWan"]}  # fmt: skip
MODULAR = {
    "_class_name": "WanModularPipeline", "_diffusers_version": "0.36.0",
    "vae": ["diffusers", "AutoencoderKLWan", PLACE],
    "transformer": ["diffusers", "WanTransformer3DModel", {"repo": "a/b", "revision": "main"}],
    "text_encoder": ["transformers", "UMT5EncoderModel", {"pretrained_model_name_or_path": "text_encoder"}],
    "boundary_ratio": 0.9,
}  # fmt: skip


def prepare(folder):
    global MODELS, LOCK
    MODELS = [bases.model(folder, task, layout) for task, layout in (
        ("t2v", "diffusers"), ("t2v", "native"), ("i2v", "diffusers"), ("t2v_a14b", "diffusers"))]  # fmt: skip
    LOCK = lock_text(make_lock(Manifest.open(MODELS[0], lock=False)))


def make(rng, folder) -> str:
    model = copied(MODELS[0] if rng.random() < 0.6 else rng.choice(MODELS), folder / "model")
    jsons = sorted(model.rglob("*.json"))
    what = rng.choice(
        (
            "toml",
            "toml",
            "lock",
            "lock",
            "json",
            "json",
            "json",
            "json",
            "index",
            "modular",
            "words",
            "link",
            "link",
            "shards",
        )
    )
    if what == "toml":
        data = (
            as_toml(tree_mutated(rng, MANIFEST)[0])
            if rng.random() < 0.7
            else lines_mutated(rng, as_toml(MANIFEST).decode())[0]
        )
        put(model / "ditkit.toml", data)
    elif what == "lock":
        put(model / "ditkit.lock", _lock(rng))
    elif what in ("json", "index"):
        file = rng.choice([each for each in jsons if (each.name == "model_index.json") == (what == "index")] or jsons)
        data = file.read_bytes()
        put(
            file,
            as_json(tree_mutated(rng, json.loads(data))[0]) if rng.random() < 0.85 else bytes_mutated(rng, data)[0],
        )
    elif what == "modular":
        put(model / "modular_model_index.json", as_json(tree_mutated(rng, MODULAR)[0]))
    elif what == "words":
        file = next(model.rglob("tokenizer.json"))
        data = file.read_bytes()
        put(
            file, as_json(tree_mutated(rng, json.loads(data))[0]) if rng.random() < 0.7 else bytes_mutated(rng, data)[0]
        )
    elif what == "link":
        more = (
            model / "ditkit.lock",
            model / "model_index.json",
            model / "transformer" / "config.json",
            model / "config.json",
        )
        entry_mutated(rng, rng.choice((*sorted(model.rglob("*")), *more)))
    else:
        weights = next((each for each in (model / "vae").glob("*.safetensors")), next(model.rglob("*.safetensors")))
        shard = f"{weights.stem}-00001-of-00001.safetensors"
        names = [name for name in parts(weights.read_bytes())[0] if name != "__metadata__"]
        weights.rename(weights.with_name(shard))
        tree = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
        put(weights.with_name(f"{weights.name}.index.json"), as_json(tree_mutated(rng, tree)[0]))
    load = what in ("words", "json", "link", "shards") and rng.random() < 0.3
    return "load" if load else rng.choice((*["open"] * 20, "inspect", "lock", "check", "check"))


def _lock(rng) -> bytes:
    if rng.random() < 0.5:
        return lines_mutated(rng, LOCK, ["size = inf", "version = 2", "[components.vae]", "place = 5"])[0]
    entry = {"place": "./vae", "files": {"config.json": {"size": 3, "sha256": "a" * 64}}}
    return as_toml(tree_mutated(rng, {"version": 1, "components": {"vae": entry, "transformer": entry}})[0])


def run(folder, how):
    at = folder / "model"
    if how in ("inspect", "lock", "check"):
        command(
            *(["inspect"] if how == "inspect" else ["lock", "--offline", *(["--check"] if how == "check" else [])]), at
        )
        return
    setup = Setup(model=str(at), offline=True)
    model = Model.open(str(at), setup)
    model.identity, model.describe()
    model.request({"prompt": "a", **({"image": "x.png"} if model.task == "i2v" else {})})
    if how == "load":
        components = Components(model, setup)
        for name in model.parts:
            part = components[name]
            components.fingerprint_of(name)
            if name == "tokenizer":
                part(["a red circle", "", "é漢 " * 50])
