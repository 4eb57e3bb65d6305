"""What a model consists of when it is written: files, configs and names, in diffusers' layout and in the native one.

The native layout is what the official code opens: ``.pth`` state dicts for all but the transformers, under fixed names
that say nothing about their types, and no config for them. Leaves out: writing (convert.py, writing.py) and reading.
Sources: Wan2.1 and Wan2.2 ``wan/configs``, the file lists of the published repositories, and diffusers'
``scripts/convert_wan_to_diffusers.py`` for the flow shifts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from ditkit.checkpoints.files.text import some
from ditkit.checkpoints.kinds import diffusers_folder as theirs
from ditkit.checkpoints.kinds.keys import KeyTable, Side, clip_keys, table_of
from ditkit.checkpoints.kinds.latents import STATISTICS
from ditkit.checkpoints.kinds.table import task_of
from ditkit.checkpoints.model.locate import EXPERTS, NATIVE_TOKENIZER, THEIR_SIDE, ModelParts, Part
from ditkit.checkpoints.model.used import NOTES
from ditkit.checkpoints.views.mapped import Mapped
from ditkit.checkpoints.views.source import TensorSource
from ditkit.errors import LoadError

Layout = Literal["native", "diffusers"]
LAYOUTS: tuple[Layout, ...] = ("native", "diffusers")
UNSAID: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    **STATISTICS,
    "umt5": MappingProxyType({"layer_norm_epsilon": 1e-6, "relative_attention_max_distance": 128}),  # wan/modules/t5.py
    "clip": MappingProxyType({"layer_norm_eps": 1e-5}),  # wan/modules/clip.py
})  # fmt: skip
"""Kind -> what its native files do not say, because it is the same in all of them."""
WITH_SHORTCUTS = ("wan_vae", "wan_vae22")  # kinds whose tables list more names than any one network has


@dataclass(frozen=True)
class Weights:
    """``source`` goes to ``folder`` as ``base`` with its ending: one file or shards, or with ``pickle`` a ``.pth``."""

    component: str
    folder: Path
    base: str
    source: TensorSource
    pickle: bool = False


@dataclass
class Plan:
    """``json``: file -> its content. ``copies``: folder -> the files that go into it. ``remarks``: what is not carried
    over, as sentences. All paths are relative to the model's folder."""

    weights: list[Weights] = field(default_factory=list)
    json: dict[Path, dict[str, Any]] = field(default_factory=dict)
    copies: dict[Path, list[Path]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def plan(located: ModelParts, layout: Layout) -> Plan:
    """How the model is written. Raises LoadError for tensors that are unknown or missing."""
    made = Plan()
    one = len(located.parts) == 1
    for part in located.parts.values():
        PARTS[layout](part, located, Path() if one else None, made)
    if layout == "diffusers" and not one:
        _pipeline(located, made)
    if not one:
        made.remarks += [f"incomplete: {problem.found}" for problem in located.problems]
    made.remarks += [f"{name} is no part and was left behind ({why})" for name, why in located.unused.items()]
    if Path(located.path).is_dir() and (Path(located.path) / "ditkit.toml").is_file():
        made.remarks.append("ditkit.toml was left behind: write its defaults anew for the new folder")
    return made


def named(part: Part, layout: Layout) -> TensorSource:
    """The part's tensors under the names of ``layout``, all of them known and none of them missing."""
    assert part.source is not None
    table, side = table_of(part.kind, part.config), _side(layout)
    ours: Side = "other" if part.kind in THEIR_SIDE else "native"
    if part.kind == "clip":
        projection = "visual_projection.weight" in part.source.tensors
        table = clip_keys(part.config["num_hidden_layers"], projection=projection, prefixed=layout == "diffusers")
    mapped = Mapped(part.source, table, side, of=ours).require_known()
    if absent := _absent(part, table, side, mapped):
        raise LoadError(
            f"converting {part.path}", f"{len(absent)} tensors are missing ({some(absent)})", "Use whole weights"
        )
    return mapped


def config_of(part: Part) -> dict[str, Any]:
    """The keywords of the part's config class, with the official values of what its file does not say."""
    return {**UNSAID.get(part.kind, {}), **part.config}


def _side(layout: Layout) -> Side:
    return "native" if layout == "native" else "other"


def _absent(part: Part, table: KeyTable, side: Side, mapped: TensorSource) -> set[str]:
    return set() if part.kind in WITH_SHORTCUTS else table.by_name(side).keys() - mapped.tensors.keys()


def tokenizer_files(folder: Path) -> list[Path]:
    """The vocabulary and its settings; programs and pictures are never among them."""
    return sorted(file for file in folder.iterdir() if file.is_file() and NOTES.fullmatch(file.name))


# --- the layout of diffusers

CONFIGS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = MappingProxyType({
    "wan": theirs.transformer_config_out,
    "wan_vae": theirs.vae_config_out,
    "wan_vae22": theirs.vae_config_out,
    "umt5": theirs.text_encoder_config_out,
    "clip": theirs.clip_config_out,
})  # fmt: skip
TRANSFORMERS_CLASSES: Mapping[str, str] = MappingProxyType({
    "tokenizer": "T5TokenizerFast", "text_encoder": "UMT5EncoderModel", "image_encoder": "CLIPVisionModel",
    "image_processor": "CLIPImageProcessor",
})  # fmt: skip
PIPELINES: Mapping[str, str] = MappingProxyType({
    "t2v": "WanPipeline", "ti2v": "WanPipeline", "i2v": "WanImageToVideoPipeline", "flf2v": "WanImageToVideoPipeline",
    "vace": "WanVACEPipeline",
})  # fmt: skip
FLOW_SHIFT: Mapping[str, float] = MappingProxyType({"flf2v": 16.0, "ti2v": 5.0})
USUAL_FLOW_SHIFT = 3.0
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _diffusers_part(part: Part, located: ModelParts, folder: Path | None, made: Plan) -> None:
    folder = Path(part.component) if folder is None else folder
    if part.kind == "tokenizer":
        made.copies[folder] = tokenizer_files(part.path)
    elif part.kind not in CONFIGS:
        made.remarks.append(f"{part.component} has no place in the layout of diffusers and was left behind")
    else:
        base = "model" if part.kind in THEIR_SIDE else "diffusion_pytorch_model"
        made.weights.append(Weights(part.component, folder, base, named(part, "diffusers")))
        made.json[folder / "config.json"] = CONFIGS[part.kind](config_of(part))


def _pipeline(located: ModelParts, made: Plan) -> None:
    """The index, and the components without weights: taken from a folder of diffusers, else written anew."""
    task = located.task
    if task is None:
        made.remarks.append("there is no transformer of a known task, so there is no model_index.json")
        return
    classes = {name: list(_class_of(part)) for name, part in located.parts.items() if part.kind != "taehv"}
    for name, file, content in _without_weights(located, task):
        folder = Path(located.path) / name
        if located.layout == "diffusers" and folder.is_dir():
            made.copies[Path(name)] = tokenizer_files(folder)
        elif content is not None:
            made.json[Path(name, file)] = content
        else:
            continue
        classes[name] = ["diffusers", _scheduler_class(folder)] if name == "scheduler" else [
            "transformers", TRANSFORMERS_CLASSES[name]
        ]  # fmt: skip
    index: dict[str, Any] = {"_class_name": PIPELINES[task], "_diffusers_version": theirs.DIFFUSERS_VERSION, **classes}
    if located.boundary is not None:
        index["boundary_ratio"] = located.boundary
    if located.expand_timesteps:
        index["expand_timesteps"] = True
    for name in OPTIONAL[PIPELINES[task]]:
        index.setdefault(name, [None, None])
    made.json[Path("model_index.json")] = index


OPTIONAL: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "WanPipeline": ("transformer_2",),
    "WanVACEPipeline": ("transformer_2",),
    "WanImageToVideoPipeline": ("transformer_2", "image_encoder", "image_processor"),
})  # fmt: skip
"""Components that a pipeline names as null when it has none."""


def _class_of(part: Part) -> tuple[str, str]:
    if part.component in TRANSFORMERS_CLASSES:
        return "transformers", TRANSFORMERS_CLASSES[part.component]
    return "diffusers", CONFIGS[part.kind](config_of(part))["_class_name"]


def _scheduler_class(folder: Path) -> str:
    file = folder / "scheduler_config.json"
    return str(theirs.read_config(folder, file.name)["_class_name"]) if file.is_file() else "UniPCMultistepScheduler"


def _without_weights(located: ModelParts, task: str) -> list[tuple[str, str, dict[str, Any] | None]]:
    scheduler = {
        "_class_name": "UniPCMultistepScheduler", "_diffusers_version": theirs.DIFFUSERS_VERSION,
        "num_train_timesteps": 1000, "prediction_type": "flow_prediction", "use_flow_sigmas": True,
        "flow_shift": FLOW_SHIFT.get(task, USUAL_FLOW_SHIFT),
    }  # fmt: skip
    clip = located.parts.get("image_encoder")
    processor = None
    if clip is not None:
        size = clip.config["image_size"]
        processor = {
            "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": size},
            "resample": 3, "do_center_crop": True, "crop_size": {"height": size, "width": size}, "do_rescale": True,
            "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD),
            "do_convert_rgb": True,
        }  # fmt: skip
    return [
        ("scheduler", "scheduler_config.json", scheduler), ("image_processor", "preprocessor_config.json", processor),
    ]  # fmt: skip


# --- the native layout

NATIVE_FILES: Mapping[str, str] = MappingProxyType({
    "wan_vae": "Wan2.1_VAE",
    "wan_vae22": "Wan2.2_VAE",
    "umt5": "models_t5_umt5-xxl-enc-bf16",
    "clip": "models_clip_open-clip-xlm-roberta-large-vit-huge-14",
})  # fmt: skip
"""What the official configs call these files, whatever type their tensors have."""
USUAL_TEXT_DIM = 4096  # the official files leave it out


def _native_part(part: Part, located: ModelParts, folder: Path | None, made: Plan) -> None:
    if part.kind == "tokenizer":
        made.copies[NATIVE_TOKENIZER if folder is None else folder] = tokenizer_files(part.path)
    elif part.kind == "wan":
        two = "transformer_2" in located.parts
        roles = {component: Path(name) for name, component in EXPERTS.items()} if two else {}
        place = roles.get(part.component, Path())
        made.weights.append(Weights(part.component, place, "diffusion_pytorch_model", named(part, "native")))
        made.json[place / "config.json"] = native_config(part)
    elif part.kind in NATIVE_FILES:
        made.weights.append(
            Weights(part.component, Path(), NATIVE_FILES[part.kind], named(part, "native"), pickle=True)
        )
        if part.kind == "clip":
            made.remarks.append(
                "the image encoder has no text half; the official code loads one, though it never uses it"
            )
    else:
        made.remarks.append(f"{part.component} has no place in the native layout and was left behind")


def native_config(part: Part) -> dict[str, Any]:
    """The config.json of a native transformer. Raises LoadError for a task that the layout has no name for."""
    fields = part.config
    task = task_of(fields)
    if task is None:
        raise LoadError(
            f"converting {part.path}", "the native layout has no name for its task", "Use diffusers' layout"
        )
    vace = {"vace_layers": list(fields["vace_layers"]), "vace_in_dim": fields["vace_in_dim"]} if task == "vace" else {}
    text = {} if fields["text_dim"] == USUAL_TEXT_DIM else {"text_dim": fields["text_dim"]}
    sizes = ("dim", "eps", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim", "text_len")
    return {
        "_class_name": "VaceWanModel" if vace else "WanModel",
        "_diffusers_version": "0.33.0",  # as in the official files
        "model_type": task,
        **{name: fields[name] for name in sizes},
        **text,
        **vace,
    }


PARTS: Mapping[Layout, Callable[[Part, ModelParts, Path | None, Plan], None]] = MappingProxyType({
    "native": _native_part, "diffusers": _diffusers_part,
})  # fmt: skip
