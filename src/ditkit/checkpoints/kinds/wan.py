"""The transformer of Wan, of any size and task, in its own layout and in that of diffusers.

Sources: Wan2.1 and Wan2.2 ``wan/modules/{model,vace_model}.py``, ``wan/configs``, README.md; diffusers
``transformer_wan.py``, ``transformer_wan_vace.py``, ``scripts/convert_wan_to_diffusers.py`` (flow shifts); ComfyUI
``comfy/model_detection.py`` (names of relatives)."""

import math
import re
from typing import Any

from ditkit.checkpoints.kinds.configs import COUNTS, EPSILON, MAYBE_COUNT, ConfigFormat, ConfigKeys, Key, of_class, same
from ditkit.checkpoints.kinds.kind import Claim, Kind, Layout, LoraTargets, Port, Published
from ditkit.checkpoints.kinds.sizes import Fields, SizeReader, Sizes, Tensors, count
from ditkit.checkpoints.views.key_table import KeyTable, Pairs, leaves
from ditkit.errors import LoadError
from ditkit.plain import shown

TEXT, TIME, IMAGE = (f"condition_embedder.{what}_embedder" for what in ("text", "time", "image"))
TRUNK = {
    "patch_embedding": "patch_embedding", "head.head": "proj_out", "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": f"{TEXT}.linear_1", "text_embedding.2": f"{TEXT}.linear_2",
    "time_embedding.0": f"{TIME}.linear_1", "time_embedding.2": f"{TIME}.linear_2",
}  # fmt: skip
IMAGE_EMBEDDING = {
    "img_emb.proj.0": f"{IMAGE}.norm1", "img_emb.proj.1": f"{IMAGE}.ff.net.0.proj",
    "img_emb.proj.3": f"{IMAGE}.ff.net.2", "img_emb.proj.4": f"{IMAGE}.norm2",
}  # fmt: skip
POSITIONS = ("img_emb.emb_pos", f"{IMAGE}.pos_embed")
BLOCK = {  # native norm1 and norm2, and diffusers' norm1 and norm3, hold nothing
    "norm3": "norm2", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
    "self_attn.o": "attn1.to_out.0", **{f"self_attn.{x}": f"attn1.to_{x}" for x in "qkv"},
    "cross_attn.o": "attn2.to_out.0", **{f"cross_attn.{x}": f"attn2.to_{x}" for x in "qkv"},
}  # fmt: skip
BLOCK_IMAGE = {f"cross_attn.{x}_img": f"attn2.add_{x}_proj" for x in "kv"}
NORMS = {f"{native}.norm_{x}": f"{other}.norm_{x}"
         for native, other in (("self_attn", "attn1"), ("cross_attn", "attn2")) for x in "qk"}  # fmt: skip
NORMS_IMAGE = {"cross_attn.norm_k_img": "attn2.norm_added_k"}


def transformer_keys(num_layers: int, *, image: bool = False, image_positions: bool = False, vace: int = 0) -> KeyTable:
    """The transformer: native <-> diffusers ``WanTransformer3DModel``, or ``WanVACETransformer3DModel``.

    ``image``: it has the branch for CLIP features. ``image_positions``: that has learned positions (first and last
    frame). ``vace``: the number of control blocks."""
    trunk, block, norms = TRUNK, BLOCK, NORMS
    if image:
        trunk, block, norms = TRUNK | IMAGE_EMBEDDING, BLOCK | BLOCK_IMAGE, NORMS | NORMS_IMAGE
    pairs: Pairs = [pair for names in trunk.items() for pair in leaves(*names)]
    pairs += [("head.modulation", "scale_shift_table"), *([POSITIONS] if image_positions else [])]
    for at in (*(f"blocks.{n}" for n in range(num_layers)), *(f"vace_blocks.{n}" for n in range(vace))):
        pairs.append((f"{at}.modulation", f"{at}.scale_shift_table"))
        pairs += [pair for ours, theirs in block.items() for pair in leaves(f"{at}.{ours}", f"{at}.{theirs}")]
        pairs += [(f"{at}.{ours}.weight", f"{at}.{theirs}.weight") for ours, theirs in norms.items()]
    for n in range(vace):
        pairs += leaves(f"vace_blocks.{n}.after_proj", f"vace_blocks.{n}.proj_out")
    if vace:
        pairs += leaves("vace_patch_embedding", "vace_patch_embedding")
        pairs += leaves("vace_blocks.0.before_proj", "vace_blocks.0.proj_in")
    return KeyTable.of(pairs)


def _keys(fields: Fields) -> KeyTable:
    return transformer_keys(
        fields["num_layers"], image=fields.get("image_dim") is not None,
        image_positions=fields.get("image_tokens") is not None, vace=len(fields.get("vace_layers", ())),
    )  # fmt: skip


def lora_group(name: str) -> str:
    """The part of the network that a native name belongs to: ``self_attn``, ``image_branch``, ``vace`` ..."""
    parts = name.split(".")
    if parts[0] in ("vace_blocks", "vace_patch_embedding"):
        return "vace"
    if parts[0] == "img_emb" or (len(parts) > 3 and parts[3] in ("k_img", "v_img", "norm_k_img")):
        return "image_branch"
    if parts[0] != "blocks":
        return parts[0]
    return "norms" if "norm" in parts[-1] or parts[2] == "norm3" or parts[-2].startswith("norm_") else parts[2]


HEAD_WIDTH = 128  # of every official transformer
SIZE_NAMES = {(1536, 8960, 30): "1.3B", (3072, 14336, 30): "5B", (5120, 13824, 40): "14B"}
"""(dim, ffn_dim, num_layers) -> what the model is called."""


def transformer_sizes(tensors: Tensors, layout: str = "native") -> Sizes:
    """Fields of ``WanConfig``. Optional branches are there when their tensors are. ``layout``: native or diffusers."""
    read = SizeReader(tensors, layout, transformer_keys(1, image=True, image_positions=True))
    first, image, positions = "patch_embedding.weight", "img_emb.proj.0.weight", POSITIONS[0]
    patch = read.tell("patch_size", tuple(read.shape(first, 5)[2:]), first)
    dim = read.axis("dim", first, 0, 5)
    read.axis("in_dim", first, 1, 5)
    read.axis("text_dim", "text_embedding.0.weight", 1, 2)
    read.axis("freq_dim", "time_embedding.0.weight", 1, 2)
    read.axis("ffn_dim", "blocks.0.ffn.0.weight", 0, 2)
    read.axis("out_dim", "head.head.weight", 0, 2, math.prod(patch))
    layers = read.count("num_layers", r"blocks\.(\d+)\.", "the names of the blocks")
    branch = read.name("blocks.0.cross_attn.k_img.weight").removeprefix("blocks.0")
    has_image = read.name(image) in tensors or any(name.endswith(branch) for name in tensors)
    read.optional_axis(has_image, "image_dim", image, 0, 1)
    read.optional_axis(read.name(positions) in tensors, "image_tokens", positions, 1, 3)
    official: dict[str, Any] = {"num_heads": None if dim % HEAD_WIDTH else dim // HEAD_WIDTH}
    hints = count(tensors, r"vace_blocks\.(\d+)\.")
    if hints:
        read.axis("vace_in_dim", "vace_patch_embedding.weight", 1, 5)
        with_hints = tuple(range(0, layers, max(1, layers // hints)))
        official["vace_layers"] = with_hints if len(with_hints) == hints else None
    return read.sizes(lengths={"vace_layers": hints}, **official)


OPTIONAL = ("transformer_2", "image_encoder", "image_processor")
TASKS = {
    "t2v": Published("WanPipeline", boundary=0.875),
    "i2v": Published("WanImageToVideoPipeline", boundary=0.9, optional=OPTIONAL),
    "flf2v": Published("WanImageToVideoPipeline", 16.0, optional=OPTIONAL),
    "vace": Published("WanVACEPipeline"),
    "ti2v": Published("WanPipeline", 5.0, expand_timesteps=True),
}


def task_of(fields: Fields) -> str | None:
    """What a transformer of these sizes makes a video from: one of ``TASKS``, or None for a condition of another kind.

    An image is told by its condition channels (4 of mask and as many as the latents have) or by the 48 latent channels
    of the 5B model; the control branch and the learned positions of two frames have tensors of their own."""
    channels, out = fields["in_dim"], fields["out_dim"]
    if channels == out:
        if fields.get("image_dim") is not None:
            return None
        return "vace" if fields.get("vace_layers") else ("ti2v" if out == 48 else "t2v")
    if channels == 2 * out + 4 and not fields.get("vace_layers"):
        return "flf2v" if fields.get("image_tokens") is not None else "i2v"
    return None


def _needs(fields: Fields) -> dict[str, str]:
    image = {} if fields.get("image_dim") is None else {"image_encoder": "clip"}
    vae = "wan_vae22" if fields["out_dim"] == 48 else "wan_vae"
    return {"tokenizer": "tokenizer", "text_encoder": "umt5", "vae": vae} | image


def _ports(config: Any) -> dict[str, Port]:
    return {
        "latent channels": Port(config.out_dim, "out_dim"),
        "width of the text": Port(config.text_dim, "text_dim"),
        "width of the image features": Port(config.image_dim, "image_dim"),
        "control channels": Port(config.vace_in_dim if config.vace_layers else None, "vace_in_dim"),
    }


def _scheduler(fields: Fields, task: str) -> dict[str, tuple[str, str, str, Fields]]:
    config = {
        **of_class("UniPCMultistepScheduler"), "num_train_timesteps": 1000, "prediction_type": "flow_prediction",
        "use_flow_sigmas": True, "flow_shift": TASKS[task].flow_shift,
    }  # fmt: skip
    return {"scheduler": ("diffusers", "UniPCMultistepScheduler", "scheduler_config.json", config)}


RELATIVES = {
    "face_adapter": "Animate", "motion_encoder": "Animate", r"\w*pose_patch_embedding": "Animate",
    "casual_audio_encoder": "S2V", "audio_proj": "HuMo", "control_adapter": "Fun-Camera", "ref_conv": "Fun-Reference",
    "dwpose_embedding": "UniAnimate",
}  # fmt: skip
"""First segments of names -> the relative of Wan that has such tensors. None of them runs here."""

CHANNEL_RELATIVES = {(48, 16): "Fun-Control", (32, 16): "control by extra channels"}
"""(in_dim, out_dim) of transformers whose condition is not the official one."""

EXPERTS = """the role that its folder or a manifest gives it (high_noise_model is `transformer`, low_noise_model \
`transformer_2`)"""


def _tell(layout: str, tensors: Tensors, sizes: Sizes) -> dict[str, Any]:
    config = sizes.guess
    variant, size = task_of(config), SIZE_NAMES.get((config["dim"], config["ffn_dim"], config["num_layers"]))
    firsts = dict.fromkeys(name.partition(".")[0] for name in tensors)
    relatives = list(dict.fromkeys(r for name in firsts for what, r in RELATIVES.items() if re.fullmatch(what, name)))
    channels = config["in_dim"], config["out_dim"]
    if variant is None and not relatives and channels in CHANNEL_RELATIVES:
        relatives = [CHANNEL_RELATIVES[channels]]
    problems = [f"it is {name}, a relative of Wan that ditkit does not run" for name in relatives]
    if variant is None and not problems:
        problems = ["its {} input and {} output channels are those of no task that ditkit runs".format(*channels)]
    possible, decides, two = _possible(variant, size, config["image_dim"] is not None)
    versions = {version for name in possible for version in re.findall(r"Wan 2\.\d", name)}
    return {
        "family": " or ".join(sorted(versions)) or "Wan", "variant": relatives[0] if relatives else variant,
        "size_name": size, "possible": () if problems else possible, "decides": None if problems else decides,
        "problems": tuple(problems), "two_experts": two and not problems,
    }  # fmt: skip


def _possible(variant: str | None, size: str | None, image: bool) -> tuple[tuple[str, ...], str | None, bool]:
    """(the published models that these tensors could be, what tells them apart, whether all of them have two)."""
    if variant is None:
        return (), None, False
    task, large, name = variant.upper(), size == "14B", size or "of another size"
    two = tuple(f"Wan 2.2 {task}-A14B, {noise}-noise expert" for noise in ("high", "low"))
    if variant == "t2v" and large:
        return ("Wan 2.1 T2V-14B", *two), EXPERTS, False
    if variant == "i2v" and not image:
        return two if large else (f"Wan 2.2 I2V {name}, one of two experts or alone",), EXPERTS, large
    if variant == "i2v" and large:
        known = ("Wan 2.1 I2V-14B-480P", "Wan 2.1 I2V-14B-720P")
        return known, "only the size of video that it was trained for", False
    version = "" if variant == "t2v" and not size else "2.2 " if variant == "ti2v" else "2.1 "
    return (f"Wan {version}{task} {name}",), None, False


def _patches(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Patch embeddings that are matrices, as in rCM and TurboDiffusion: columns are channel, frame, row, column of a
    patch, in the order in which a convolution has them."""
    found: dict[str, tuple[int, ...]] = {}
    for name in ("patch_embedding.weight", "vace_patch_embedding.weight"):
        shape = tensors[name].shape if name in tensors else ()
        if len(shape) == 2 and shape[1] and shape[1] % math.prod(PATCH) == 0:
            found[name] = (shape[0], shape[1] // math.prod(PATCH), *PATCH)
    return found


LONGEST_TEXT = 2**16  # rows of memory for each prompt
IMAGE_CLAIM = "image_claim"
TRANSFORMER_CLASS, VACE_CLASS = "WanTransformer3DModel", "WanVACETransformer3DModel"
VACE_LAYERS = (0, 5, 10, 15, 20, 25, 30, 35)  # diffusers' default
PATCH = (1, 2, 2)


def _check(keys: ConfigKeys, fields: Fields) -> None:
    """What no shape tells, and a network of ours needs: heads that can be rotated in three parts, hints in order."""
    dim, heads, layers = fields["dim"], fields["num_heads"], fields["vace_layers"]
    width = dim // heads
    found = f"{heads} heads for a width of {dim}, where each needs an even width of at least 6"
    keys.require(dim % (2 * heads) == 0 and width >= 6, found)
    rising = not layers or (layers[0] == 0 and sorted(set(layers)) == [*layers] and layers[-1] < fields["num_layers"])
    found = f"vace_layers is {layers!r:.200}, which does not rise from 0 within {fields['num_layers']} blocks"
    keys.require(rising, found)
    found = f"text_len is {fields['text_len']!r:.20}, and the official one is 512"
    keys.require(fields["text_len"] <= LONGEST_TEXT, found)
    task = keys.config.get("model_type", "t2v")
    if "model_type" in keys.known and task != task_of(fields):
        found = f"its model_type is {task} and the tensors are those of {task_of(fields) or 'no known task'}"
        raise keys.error(found, "Use the config of these weights")


def _read_native(keys: ConfigKeys, fields: dict[str, Any]) -> None:
    fields |= {"patch_size": PATCH, "vace_layers": ()}
    if (task := keys.any("model_type", "t2v")) not in tuple(TASKS):  # it may be a list, which no dictionary looks for
        raise keys.error(f"its model_type is {shown(task)}, and only {', '.join(TASKS)} are supported")
    if keys.config.get("_class_name") == "VaceWanModel":
        if keys.rest.get("vace_layers") is None:
            keys.rest["vace_layers"] = tuple(range(0, fields["num_layers"], 2))  # what the class itself takes
        fields |= {"vace_layers": keys.take("vace_layers", check=COUNTS), "vace_in_dim": keys.take("vace_in_dim", 96)}
    else:
        keys.only("vace_layers", None, ())


def _write_native(fields: Fields) -> dict[str, Any]:
    if (task := task_of(fields)) is None:
        raise LoadError("writing it", "the native layout has no name for its task", "Use the layout of diffusers")
    vace = {name: fields[name] for name in ("vace_layers", "vace_in_dim")} if task == "vace" else {}
    name = "VaceWanModel" if vace else "WanModel"
    return {"_class_name": name, "_diffusers_version": "0.33.0", "model_type": task, **vace}  # as in the official files


def _read_diffusers(keys: ConfigKeys, fields: dict[str, Any]) -> None:
    width = keys.take("attention_head_dim", 128)
    dim = fields["num_heads"] * width
    keys.names["dim"] = f"num_attention_heads {fields['num_heads']} x attention_head_dim {width}"
    out, added = keys.take("out_channels", 16, MAYBE_COUNT), keys.take("added_kv_proj_dim", None, MAYBE_COUNT)
    image, tokens = fields["image_dim"], fields["image_tokens"]
    if added not in (None, dim):
        raise keys.error(f"added_kv_proj_dim is {added}, and only the width {dim} is supported")
    if (image is None) != (added is None):
        raise keys.error(f"image_dim is {image} and added_kv_proj_dim is {added}", "Give both, or null for both")
    keys.require(image is not None or tokens is None, f"pos_embed_seq_len is {tokens} and image_dim is null")
    fields |= {"dim": dim, "out_dim": fields["in_dim"] if out is None else out, "patch_size": PATCH, "text_len": 512,
               "vace_layers": ()}  # fmt: skip
    keys.names |= {"out_dim": "out_channels", "vace_in_dim": "vace_in_channels"}
    if keys.config.get("_class_name") == VACE_CLASS:
        fields["vace_layers"] = keys.take("vace_layers", VACE_LAYERS, COUNTS)
        fields["vace_in_dim"] = keys.take("vace_in_channels", 96)
    else:
        keys.only("vace_layers", None, ())


def _write_diffusers(fields: Fields) -> dict[str, Any]:
    layers = fields.get("vace_layers", ())
    return {
        **of_class(VACE_CLASS if layers else TRANSFORMER_CLASS),
        "attention_head_dim": fields["dim"] // fields["num_heads"], "out_channels": fields["out_dim"],
        "added_kv_proj_dim": None if fields.get("image_dim") is None else fields["dim"],
    } | ({"vace_layers": layers, "vace_in_channels": fields.get("vace_in_dim", 96)} if layers else {})  # fmt: skip


NATIVE = ConfigFormat(
    same(dim=2048, ffn_dim=8192, num_heads=16, num_layers=32, in_dim=16, out_dim=16, text_dim=4096, freq_dim=256,
         text_len=512) | same(EPSILON, eps=1e-6),
    {"patch_size": (PATCH,), "qk_norm": (True,), "cross_attn_norm": (True,), "window_size": ((-1, -1),)},
    _read_native, _write_native,
    silent={"text_dim": 4096, "patch_size": PATCH, "qk_norm": True, "cross_attn_norm": True, "window_size": (-1, -1)},
)  # fmt: skip
DIFFUSERS = ConfigFormat(
    same(ffn_dim=13824, num_layers=40, text_dim=4096, freq_dim=256) | same(EPSILON, eps=1e-6) | {
        "num_attention_heads": Key("num_heads", 40), "in_channels": Key("in_dim", 16),
        "image_dim": Key("image_dim", None, MAYBE_COUNT),
        "pos_embed_seq_len": Key("image_tokens", None, MAYBE_COUNT),
    },
    {"patch_size": (PATCH,), "qk_norm": ("rms_norm_across_heads",), "cross_attn_norm": (True,)},
    _read_diffusers, _write_diffusers, written={"rope_max_seq_len": 1024},  # the length of a table, not its values
)  # fmt: skip


WAN = Kind(
    "wan", "Wan", "a Wan transformer", ("transformer", "transformer_2"),
    {
        "native": Layout((("patch_embedding.weight", "head.modulation", "blocks.0.self_attn.q.weight"),), NATIVE,
                         ("WanModel", "VaceWanModel")),
        "diffusers": Layout((("patch_embedding.weight", f"{TEXT}.linear_1.weight", "blocks.0.attn1.to_q.weight"),),
                            DIFFUSERS, (TRANSFORMER_CLASS, VACE_CLASS)),
    },
    transformer_sizes, _keys, config_class="ditkit.models.wan:WanConfig", module="ditkit.models.wan:WanTransformer",
    load="ditkit.assembly.loaders:load_wan",
    get="Give the transformer, or download a whole model such as Wan-AI/Wan2.1-T2V-1.3B",
    tell=_tell, check=_check, reshaped=_patches,
    claims={IMAGE_CLAIM: Claim(("image_dim", "image_tokens"), "set image_dim and added_kv_proj_dim to null in it")},
    task=task_of, tasks=TASKS, needs=_needs, ports=_ports, patch=lambda config: config.patch_size, beside=_scheduler,
    lora=LoraTargets(lambda n: transformer_keys(n, image=True, image_positions=True, vace=n), group=lora_group),
)  # fmt: skip
VACE_MODULE = Kind(
    "vace_module", "Wan 2.1", "VACE's control branch", (),
    {
        "native": Layout((("vace_blocks.0.after_proj.weight",),), lacks=("patch_embedding.weight",)),
        "diffusers": Layout((("vace_blocks.0.proj_out.weight",),), lacks=("patch_embedding.weight",)),
    },
    tell=lambda layout, tensors, sizes: {
        "variant": "vace",
        "problems": ("it holds only VACE's control branch, without the transformer that it belongs to",),
    },
)  # fmt: skip
