"""The folder layout of diffusers: ``model_index.json`` and one folder a component, read and written.

Reading turns a component's ``config.json`` into the fields of our own config classes, as a plain dict, because this
room knows no model. The rule for keys: those that shape the arithmetic are read or, where we have no such arithmetic,
refused; those known to have no effect on inference, and all that begin with ``_``, are ignored; any other key is
refused unless its value is null. Absent keys have diffusers' own defaults.
Leaves out: tensors' names (keys.py), schedulers' settings, image-to-video and VACE transformers, the 2.2 VAE.
Sources of names and defaults: diffusers ``transformer_wan.py``, ``autoencoder_kl_wan.py``; transformers ``UMT5Config``.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditkit.checkpoints.files import TensorInfo, read_json
from ditkit.errors import LoadError, OutputError, nearest

if TYPE_CHECKING:
    from torch import Tensor

DIFFUSERS_VERSION = "0.42.1"  # the release whose layout is written
TRANSFORMER_CLASS, VAE_CLASS, TEXT_ENCODER_CLASS = "WanTransformer3DModel", "AutoencoderKLWan", "UMT5EncoderModel"
Tensors = Mapping[str, TensorInfo]
_REQUIRED = object()


@dataclass(frozen=True)
class ModelIndex:
    """``model_index.json``: the pipeline's class, each component's (library, class), and the pipeline's own values
    (``boundary_ratio``, ``expand_timesteps``). Components that are null there are left out."""

    folder: Path
    pipeline: str
    components: Mapping[str, tuple[str, str]]
    values: Mapping[str, Any]


def read_index(folder: str | Path) -> ModelIndex:
    """Raises LoadError for a missing or malformed index, and for a component whose folder is not there."""
    folder = Path(folder)
    asked = f"opening the model in {folder}"
    if not folder.is_dir():
        raise LoadError(asked, "there is no such folder", "Check the path, or download the model")
    if not (folder / "model_index.json").is_file():
        raise LoadError(asked, "it has no model_index.json", "Give a folder in the diffusers layout")
    raw = read_json(folder / "model_index.json")
    components, values = {}, {}
    for key, value in raw.items():
        if key.startswith("_"):
            continue
        if isinstance(value, list):
            if len(value) != 2 or not (value == [None, None] or all(isinstance(x, str) for x in value)):
                raise LoadError(
                    asked, f"model_index.json gives {key} as {value}", "Write a library and a class, or two nulls"
                )
            if value != [None, None]:
                components[key] = (value[0], value[1])
        else:
            values[key] = value
    if absent := sorted(name for name in components if not (folder / name).is_dir()):
        raise LoadError(asked, f"these components have no folder: {', '.join(absent)}", "Download the model again")
    return ModelIndex(folder, str(raw.get("_class_name", "")), components, values)


def read_config(folder: str | Path, name: str = "config.json") -> dict[str, Any]:
    """A component's config as it stands. Raises LoadError when there is none."""
    return read_json(Path(folder) / name)


class _Keys:
    """The keys of one config, taken one by one; ``done`` refuses what nobody took."""

    def __init__(self, config: Mapping[str, Any], asked: str):
        self.asked, self.rest = asked, {key: value for key, value in config.items() if not key.startswith("_")}
        self.known: list[str] = []

    def error(self, found: str, do: str = "Use a model of a supported kind") -> LoadError:
        return LoadError(self.asked, found, do)

    def any(self, key: str, default: Any) -> Any:
        self.known.append(key)
        value = self.rest.pop(key, default)
        if value is _REQUIRED:
            raise self.error(f"the config has no {key}", "Use the config.json that belongs to the weights")
        return value

    def integer(self, key: str, default: Any, least: int = 1) -> int:
        value = self.any(key, default)
        if type(value) is not int or value < least:
            raise self.error(f"{key} is {value!r}, not a whole number of at least {least}", "Correct the config")
        return value

    def number(self, key: str, default: Any) -> float:
        value = self.any(key, default)
        if not _is_number(value):
            raise self.error(f"{key} is {value!r}, not a finite number", "Correct the config")
        return float(value)

    def list_of(self, key: str, default: Sequence[Any], fits: Callable[[Any], bool], what: str) -> tuple[Any, ...]:
        value = self.any(key, default)
        if not isinstance(value, list | tuple) or not all(map(fits, value)):
            raise self.error(f"{key} is {value!r}, not a list of {what}", "Correct the config")
        return tuple(value)

    def only(self, key: str, *supported: Any, default: Any = None) -> None:
        """The key may only have one of these values; the first is the default."""
        value = self.any(key, supported[0])
        value = tuple(value) if isinstance(value, list) else value
        if not any(value == option and type(value) is type(option) for option in supported):
            listed = " or ".join(repr(option) for option in supported)
            raise self.error(f"{key} is {value!r}, and only {listed} is supported")

    def ignore(self, keys: Collection[str]) -> None:
        for key in keys:
            self.any(key, None)

    def done(self) -> None:
        for key, value in self.rest.items():
            if value is not None:
                raise self.error(
                    f"the key {key!r} is unknown{nearest(key, self.known)}", "Remove it if it has no effect"
                )

    def agree(self, said: str, value: int, tensor: str, has: int) -> None:
        """The config's ``value``, described by ``said``, against what the shape of ``tensor`` says."""
        if value != has:
            raise self.error(
                f"{said} is {value} in the config and {has} in {tensor}", "Use the config of these weights"
            )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _axis(keys: _Keys, tensors: Tensors, name: str, axis: int, axes: int) -> int:
    if name not in tensors:
        raise keys.error(f"the weights have no {name}", "Use weights in the diffusers layout")
    shape = tensors[name].shape
    if len(shape) != axes:
        raise keys.error(f"{name} has the shape {list(shape)}, not {axes} axes", "Use the config of these weights")
    return shape[axis]


def _count(tensors: Tensors, pattern: str) -> int:
    """1 + the largest number that ``pattern`` captures in the names; 0 when it fits none."""
    return 1 + max((int(match[1]) for name in tensors if (match := re.match(pattern, name))), default=-1)


IMAGE_PARTS = ("condition_embedder.image_embedder.", "attn2.add_k_proj.", "attn2.add_v_proj.", "attn2.norm_added_k.")


def transformer_config(config: Mapping[str, Any], tensors: Tensors | None = None) -> dict[str, Any]:
    """The config of a ``WanTransformer3DModel`` -> the fields of our transformer config.

    With ``tensors`` (facts under diffusers names) their shapes are compared. The image branch is judged by the tensors
    when they are given, because configs are in circulation that claim one that the weights do not have.
    Raises LoadError for unsupported, unknown and contradicting values."""
    keys = _Keys(config, "reading the transformer's config")
    if config.get("_class_name", TRANSFORMER_CLASS) != TRANSFORMER_CLASS:
        raise keys.error(f"its class is {config['_class_name']}, and only {TRANSFORMER_CLASS} is supported")
    keys.only("patch_size", (1, 2, 2))
    keys.only("qk_norm", "rms_norm_across_heads")
    keys.only("cross_attn_norm", True)
    heads = keys.integer("num_attention_heads", 40)
    width = keys.integer("attention_head_dim", 128)
    in_dim = keys.integer("in_channels", 16)
    out = keys.any("out_channels", 16)
    fields: dict[str, Any] = {
        "dim": heads * width,
        "ffn_dim": keys.integer("ffn_dim", 13824),
        "num_heads": heads,
        "num_layers": keys.integer("num_layers", 40),
        "in_dim": in_dim,
        "out_dim": in_dim if out is None else out,
        "text_dim": keys.integer("text_dim", 4096),
        "freq_dim": keys.integer("freq_dim", 256),
        "eps": keys.number("eps", 1e-6),
        "patch_size": (1, 2, 2),
        "text_len": 512,
    }
    if type(fields["out_dim"]) is not int:
        raise keys.error(f"out_channels is {out!r}, not a whole number", "Correct the config")
    keys.ignore(["rope_max_seq_len"])  # the length of a table, not its values
    claims = {key: keys.any(key, None) for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")}
    keys.done()
    if tensors is None:
        if claimed := [f"{key} {value}" for key, value in claims.items() if value is not None]:
            raise keys.error(f"it has an image branch ({', '.join(claimed)}), which is not supported yet")
        return fields
    if any(part in name for name in tensors for part in IMAGE_PARTS):
        raise keys.error("the weights have an image branch, which is not supported yet")
    patches = math.prod(fields["patch_size"])
    for said, value, name, axis, axes in (
        (f"num_attention_heads {heads} x attention_head_dim {width}", fields["dim"], "patch_embedding.weight", 0, 5),
        ("in_channels", fields["in_dim"], "patch_embedding.weight", 1, 5),
        ("text_dim", fields["text_dim"], "condition_embedder.text_embedder.linear_1.weight", 1, 2),
        ("freq_dim", fields["freq_dim"], "condition_embedder.time_embedder.linear_1.weight", 1, 2),
        ("ffn_dim", fields["ffn_dim"], "blocks.0.ffn.net.0.proj.weight", 0, 2),
        (f"out_channels x {patches}", fields["out_dim"] * patches, "proj_out.weight", 0, 2),
    ):
        keys.agree(said, value, name, _axis(keys, tensors, name, axis, axes))
    keys.agree("num_layers", fields["num_layers"], "the names of the blocks", _count(tensors, r"blocks\.(\d+)\."))
    return fields


def vae_config(config: Mapping[str, Any], tensors: Tensors | None = None) -> dict[str, Any]:
    """The config of an ``AutoencoderKLWan`` (2.1) -> the fields of our VAE config; ``tensors`` as above."""
    keys = _Keys(config, "reading the VAE's config")
    if config.get("_class_name", VAE_CLASS) != VAE_CLASS:
        raise keys.error(f"its class is {config['_class_name']}, and only {VAE_CLASS} is supported")
    keys.only("is_residual", False)
    keys.only("patch_size", None, 1)
    keys.only("attn_scales", ())
    keys.only("in_channels", 3)
    keys.only("out_channels", 3)
    keys.ignore(["dropout"])  # inactive outside training
    dim = keys.integer("base_dim", 96)
    keys.only("decoder_base_dim", None, dim)
    z_dim = keys.integer("z_dim", 16)
    mult = keys.list_of("dim_mult", (1, 2, 4, 4), lambda x: type(x) is int and x > 0, "whole numbers")
    temporal = keys.list_of("temperal_downsample", (False, True, True), lambda x: type(x) is bool, "true and false")
    blocks = keys.integer("num_res_blocks", 2)
    fields = {
        "dim": dim, "z_dim": z_dim, "dim_mult": mult, "num_res_blocks": blocks, "temporal_downsample": temporal,
    }  # fmt: skip
    if not mult or len(temporal) != len(mult) - 1:
        raise keys.error(
            f"temperal_downsample has {len(temporal)} values where dim_mult has {len(mult)}", "There must be one less"
        )
    for key in ("latents_mean", "latents_std"):
        if key not in config:
            if z_dim != 16:
                raise keys.error(f"it has no {key}, and the usual one is for 16 channels", "Add it to the config")
            continue  # our defaults are diffusers' defaults
        values = keys.list_of(key, (), _is_number, "finite numbers")
        if len(values) != z_dim:
            raise keys.error(f"{key} has {len(values)} values where z_dim is {z_dim}", "Correct the config")
        if key == "latents_std" and min(values) <= 0:
            raise keys.error(f"latents_std has the value {min(values)}", "Correct the config, all must be above 0")
        fields[key] = tuple(map(float, values))
    keys.only("scale_factor_temporal", 2 ** sum(temporal))
    keys.only("scale_factor_spatial", 2 ** (len(mult) - 1))
    keys.done()
    if tensors is None:
        return fields
    for said, value, name, axis in (
        ("base_dim", dim, "encoder.conv_in.weight", 0),
        ("z_dim", z_dim, "post_quant_conv.weight", 0),
        (f"base_dim x {mult[-1]}", dim * mult[-1], "encoder.mid_block.resnets.0.conv1.weight", 0),
    ):
        keys.agree(said, value, name, _axis(keys, tensors, name, axis, 5))
    for said, value, pattern in (
        ("num_res_blocks + 1", blocks + 1, r"decoder\.up_blocks\.0\.resnets\.(\d+)\."),
        ("the length of dim_mult", len(mult), r"decoder\.up_blocks\.(\d+)\."),
    ):
        keys.agree(said, value, "the names of the decoder's blocks", _count(tensors, pattern))
    for level, halves in enumerate(temporal):
        name = f"encoder.down_blocks.{level * (blocks + 1) + blocks}.time_conv.weight"
        if halves != (name in tensors):
            raise keys.error(
                f"temperal_downsample[{level}] is {halves} and {name} is {'absent' if halves else 'present'}",
                "Use the config of these weights",
            )
    return fields


UMT5_WITHOUT_EFFECT = (
    "architectures", "classifier_dropout", "decoder_start_token_id", "dropout_rate", "dtype", "eos_token_id",
    "initializer_factor", "is_decoder", "is_encoder_decoder", "num_decoder_layers", "output_past", "pad_token_id",
    "scalable_attention", "tie_word_embeddings", "tokenizer_class", "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip
UMT5_SIZES = {
    "vocab_size": 250112, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
}  # fmt: skip


def text_encoder_config(config: Mapping[str, Any], tensors: Tensors | None = None) -> dict[str, Any]:
    """The config of a transformers UMT5 model -> the fields of our UMT5 config; ``tensors`` as above."""
    keys = _Keys(config, "reading the text encoder's config")
    keys.only("model_type", "umt5")
    keys.only("feed_forward_proj", "gated-gelu")
    keys.only("dense_act_fn", "gelu_new")
    keys.only("is_gated_act", True)
    fields: dict[str, Any] = {key: keys.integer(key, default) for key, default in UMT5_SIZES.items()}
    fields["layer_norm_epsilon"] = keys.number("layer_norm_epsilon", 1e-6)
    keys.ignore(UMT5_WITHOUT_EFFECT)
    keys.done()
    if tensors is None:
        return fields
    embedding = "shared.weight" if "shared.weight" in tensors else "encoder.embed_tokens.weight"
    first = "encoder.block.0.layer"
    heads, width = fields["num_heads"], fields["d_kv"]
    table = f"{first}.0.SelfAttention.relative_attention_bias.weight"
    for said, value, name, axis in (
        ("vocab_size", fields["vocab_size"], embedding, 0),
        ("d_model", fields["d_model"], embedding, 1),
        (f"num_heads {heads} x d_kv {width}", heads * width, f"{first}.0.SelfAttention.q.weight", 0),
        ("d_ff", fields["d_ff"], f"{first}.1.DenseReluDense.wi_0.weight", 0),
        ("relative_attention_num_buckets", fields["relative_attention_num_buckets"], table, 0),
        ("num_heads", heads, table, 1),
    ):
        keys.agree(said, value, name, _axis(keys, tensors, name, axis, 2))
    layers = _count(tensors, r"encoder\.block\.(\d+)\.")
    keys.agree("num_layers", fields["num_layers"], "the names of the blocks", layers)
    return fields


def transformer_config_out(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``transformer_config``, with diffusers' class name and version."""
    return {
        "_class_name": TRANSFORMER_CLASS,
        "_diffusers_version": DIFFUSERS_VERSION,
        "added_kv_proj_dim": None,
        "attention_head_dim": fields["dim"] // fields["num_heads"],
        "cross_attn_norm": True,
        "eps": fields["eps"],
        "ffn_dim": fields["ffn_dim"],
        "freq_dim": fields["freq_dim"],
        "image_dim": None,
        "in_channels": fields["in_dim"],
        "num_attention_heads": fields["num_heads"],
        "num_layers": fields["num_layers"],
        "out_channels": fields["out_dim"],
        "patch_size": list(fields["patch_size"]),
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": fields["text_dim"],
    }


def vae_config_out(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``vae_config``."""
    return {
        "_class_name": VAE_CLASS,
        "_diffusers_version": DIFFUSERS_VERSION,
        "attn_scales": [],
        "base_dim": fields["dim"],
        "decoder_base_dim": None,
        "dim_mult": list(fields["dim_mult"]),
        "dropout": 0.0,
        "in_channels": 3,
        "is_residual": False,
        "latents_mean": list(fields["latents_mean"]),
        "latents_std": list(fields["latents_std"]),
        "num_res_blocks": fields["num_res_blocks"],
        "out_channels": 3,
        "patch_size": None,
        "scale_factor_spatial": 2 ** (len(fields["dim_mult"]) - 1),
        "scale_factor_temporal": 2 ** sum(fields["temporal_downsample"]),
        "temperal_downsample": list(fields["temporal_downsample"]),
        "z_dim": fields["z_dim"],
    }


def text_encoder_config_out(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``text_encoder_config``."""
    return {
        "architectures": [TEXT_ENCODER_CLASS],
        "model_type": "umt5",
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "dropout_rate": 0.0,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        **fields,
    }


def write_component(
    folder: str | Path,
    config: Mapping[str, Any] | None,
    tensors: Mapping[str, Tensor] | None = None,
    config_name: str = "config.json",
    weights_name: str = "diffusion_pytorch_model.safetensors",
    files: Sequence[str | Path] = (),
) -> None:
    """Write one component: its config, its ``tensors`` (already under the names of the layout) and copies of ``files``.

    For a text encoder ``weights_name`` is ``model.safetensors``. The folder appears complete or not at all; one that is
    there already is never touched. Raises OutputError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with _new_folder(Path(folder)) as temporary:
        for file in files:
            shutil.copy(file, temporary)
        if tensors is not None:
            plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
            try:
                save_file(plain, temporary / weights_name, {"format": "pt"})
            except SafetensorError as error:  # a full disk, told in the library's own way
                raise OutputError(f"writing {folder}", str(error), "Check the disk and its free space") from None
        if config is not None:
            _write_json(temporary / config_name, config)


def write_index(
    folder: str | Path,
    components: Mapping[str, tuple[str, str]],
    pipeline: str = "WanPipeline",
    values: Mapping[str, Any] | None = None,
) -> None:
    """Write ``model_index.json`` for components that are there: name -> (library, class). Write it last.

    Raises OutputError when a component's folder is not there."""
    folder = Path(folder)
    if absent := sorted(name for name in components if not (folder / name).is_dir()):
        raise OutputError(f"writing {folder}/model_index.json", f"there is no {', '.join(absent)}", "Write these first")
    index = {"_class_name": pipeline, "_diffusers_version": DIFFUSERS_VERSION, **(values or {})}
    temporary = folder / "model_index.json.tmp"
    _write_json(temporary, index | {name: list(kind) for name, kind in components.items()})
    os.replace(temporary, folder / "model_index.json")


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its name when the block ends well, and vanishes otherwise."""
    asked = f"writing {folder}"
    if folder.exists():
        raise OutputError(asked, "it exists already", "Choose another folder, or remove it first")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise OutputError(asked, f"it cannot be made ({error.strerror})", "Choose a folder you can write to") from None
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes it private
        os.replace(temporary, folder)
    except OSError as error:
        raise OutputError(asked, f"it could not be written ({error})", "Check the disk and its free space") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
