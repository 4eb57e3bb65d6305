"""The VAEs of Wan 2.1 and 2.2, in Wan's own layout and in that of diffusers, where both are ``AutoencoderKLWan``; and
TAEHV, the tiny ones for previews (taew2_1, taew2_2 and its larger decoder).

Sources: Wan2.1 ``wan/modules/vae.py``, Wan2.2 ``wan/modules/vae2_2.py``; diffusers ``autoencoder_kl_wan.py``;
https://github.com/madebyollin/taehv ``taehv.py``."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

from ditkit.checkpoints.kinds.configs import BOOLS, COUNTS, FLOATS, UNSET, ConfigFormat, ConfigKeys, Key, of_class, same
from ditkit.checkpoints.kinds.kind import Kind, Layout, Port
from ditkit.checkpoints.kinds.sizes import Fields, SizeReader, Sizes, Tensors
from ditkit.checkpoints.views.key_table import KeyTable, Pairs, leaves

WAN21_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN21_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
WAN22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
WAN22_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


def _residual(native: str, other: str) -> Pairs:
    return [
        (f"{native}.residual.0.gamma", f"{other}.norm1.gamma"),
        (f"{native}.residual.3.gamma", f"{other}.norm2.gamma"),
        *leaves(f"{native}.residual.2", f"{other}.conv1"),
        *leaves(f"{native}.residual.6", f"{other}.conv2"),
        *leaves(f"{native}.shortcut", f"{other}.conv_shortcut"),
    ]


def _trunk() -> Pairs:
    """What both VAEs have: the two convolutions around the latents, and the ends and the middle of both halves."""
    pairs = [*leaves("conv1", "quant_conv"), *leaves("conv2", "post_quant_conv")]
    for part in ("encoder", "decoder"):
        pairs += leaves(f"{part}.conv1", f"{part}.conv_in")
        pairs.append((f"{part}.head.0.gamma", f"{part}.norm_out.gamma"))
        pairs += leaves(f"{part}.head.2", f"{part}.conv_out")
        pairs += _residual(f"{part}.middle.0", f"{part}.mid_block.resnets.0")
        pairs += _residual(f"{part}.middle.2", f"{part}.mid_block.resnets.1")
        native, other = f"{part}.middle.1", f"{part}.mid_block.attentions.0"
        pairs.append((f"{native}.norm.gamma", f"{other}.norm.gamma"))
        pairs += [pair for x in ("to_qkv", "proj") for pair in leaves(f"{native}.{x}", f"{other}.{x}")]
    return pairs


def _levels(levels: int, num_res_blocks: int, names: Callable[[str, int, int, int], tuple[str, str]]) -> KeyTable:
    """``levels`` is the length of ``dim_mult``. Each has its residual blocks and, but for the last one, a halving or
    doubling. ``names``: half, level, number in it, how many of its blocks are residual -> a block in both layouts."""
    pairs = _trunk()
    for level, (half, blocks) in product(range(levels), (("encoder", num_res_blocks), ("decoder", num_res_blocks + 1))):
        for i in range(blocks):
            pairs += _residual(*names(half, level, i, blocks))
        if level < levels - 1:
            native, other = names(half, level, blocks, blocks)
            pairs += [pair for x in ("resample.1", "time_conv") for pair in leaves(f"{native}.{x}", f"{other}.{x}")]
    return KeyTable.of(pairs)


def _names(half: str, level: int, i: int, blocks: int) -> tuple[str, str]:
    """The native encoder and decoder of 2.1 number all blocks of all levels through; diffusers does so in the encoder
    only."""
    number = level * (blocks + 1) + i
    if half == "encoder":
        return f"encoder.downsamples.{number}", f"encoder.down_blocks.{number}"
    inner = f"resnets.{i}" if i < blocks else "upsamplers.0"
    return f"decoder.upsamples.{number}", f"decoder.up_blocks.{level}.{inner}"


def _names22(half: str, level: int, i: int, blocks: int) -> tuple[str, str]:
    """In 2.2 both number by level; the shortcuts around whole levels have no parameters."""
    way = "down" if half == "encoder" else "up"
    inner = f"resnets.{i}" if i < blocks else f"{way}sampler"
    return f"{half}.{way}samples.{level}.{way}samples.{i}", f"{half}.{way}_blocks.{level}.{inner}"


vae_keys, vae22_keys = partial(_levels, names=_names), partial(_levels, names=_names22)
"""Of the VAEs of Wan 2.1 and 2.2: native <-> diffusers ``AutoencoderKLWan``, which ``is_residual`` for 2.2."""


def vae_sizes(tensors: Tensors, layout: str = "native", kind: str = "wan_vae") -> Sizes:
    """Fields of ``WanVAEConfig`` (2.1) or, with kind ``wan_vae22``, of ``WanVAE22Config``."""
    read, other = SizeReader(tensors, layout, KeyTable.of(_trunk())), layout != "native"
    first, names = "encoder.conv1.weight", _names if kind == "wan_vae" else _names22
    dim, z = read.axis("dim", first, 0, 5), read.axis("z_dim", "conv2.weight", 0, 5)
    inner = [name for name in tensors if name.startswith("encoder.down")]  # without its ends and its middle
    residual = ".conv1.weight" if other else ".residual.2.weight"
    levels = 1 + sum(name.endswith(".resample.1.weight") for name in inner)
    blocks, rest = divmod(sum(name.endswith(residual) for name in inner), levels)
    if rest or not blocks:
        raise read.error(f"the {levels} levels of its encoder have {blocks * levels + rest} residual blocks")
    read.tell("num_res_blocks", blocks, "the names of the encoder's blocks")
    lasts = [names("encoder", level, blocks - 1, blocks)[other] for level in range(levels)]
    widths = [read.shape(last + residual, 5)[0] for last in lasts]
    if any(width % dim for width in widths):
        raise read.error(f"the levels of the encoder are {widths} wide, no multiples of {dim}")
    mult = read.tell("dim_mult", tuple(width // dim for width in widths), "the shapes of the encoder's blocks")
    halvings = [names("encoder", level, blocks, blocks)[other] for level in range(levels - 1)]
    temporal = tuple(f"{halving}.time_conv.weight" in tensors for halving in halvings)
    read.tell("temporal_downsample", temporal, "the names of the encoder's blocks (time_conv)")
    if kind == "wan_vae22":
        read.axis("dec_dim", "decoder.conv1.weight", 0, 5, mult[-1])
        read.side("patch_size", first, 5)
    known = z == len(WAN21_MEAN if kind == "wan_vae" else WAN22_MEAN)
    return read.sizes(() if known else ("latents_mean", "latents_std"))


def taehv_sizes(tensors: Tensors, layout: str = "native") -> Sizes:
    """Fields of ``TAEHVConfig``. Which levels of the decoder double the frames is not told: a file may have more rows
    there than are used, so the official choice stands."""
    read = SizeReader(tensors, layout)
    big = "decoder.0.weight" in tensors
    read.tell("variant", "super" if big else "base", "decoder.0" if big else "decoder.1")
    read.axis("encoder_width", "encoder.0.weight", 0, 4)
    read.side("patch_size", "encoder.0.weight", 4)
    read.axis("z_dim", "encoder.17.weight", 0, 4)
    joins = [read.shape(f"encoder.{n}.conv.weight", 4) for n in (2, 7, 12)]
    read.tell("temporal_downsample", tuple(frames > dim for dim, frames, *_ in joins), "encoder.2, 7 and 12")
    levels = ((0, 1), (4, 4), (11, 4), (18, 4)) if big else ((1, 1), (8, 1), (14, 1), (20, 1))
    widths = tuple(read.shape(f"decoder.{n}.weight", 4)[0] // shuffle for n, shuffle in levels)
    read.tell("decoder_widths", widths, "the decoder's convolutions")
    return read.sizes()


VAE_CLASS = "AutoencoderKLWan"


def _read(keys: ConfigKeys, fields: dict[str, Any], residual: bool) -> None:
    mult, temporal, z_dim = fields["dim_mult"], fields["temporal_downsample"], fields["z_dim"]
    found = f"temperal_downsample has {len(temporal)} values where dim_mult has {len(mult)}"
    keys.require(bool(mult) and min(mult) > 0 and len(temporal) == len(mult) - 1, found)
    if residual:
        fields["dec_dim"] = keys.take("decoder_base_dim", fields["dim"])
        keys.names["dec_dim"] = "decoder_base_dim"
    else:
        keys.only("decoder_base_dim", None, fields["dim"])
    usual = len(WAN22_MEAN if residual else WAN21_MEAN)
    for key in ("latents_mean", "latents_std"):
        if key in fields:
            keys.require(len(fields[key]) == z_dim, f"{key} has {len(fields[key])} values where z_dim is {z_dim}")
        elif z_dim != usual:
            raise keys.error(f"it has no {key}, and the usual one is for {usual} channels", "Add it to the config")
    least = min(fields.get("latents_std", (1.0,)), default=1.0)
    keys.require(least > 0, f"latents_std has the value {least}")


def _write(fields: Fields) -> dict[str, Any]:
    return of_class(VAE_CLASS) | {"decoder_base_dim": fields.get("dec_dim")}


def _pixels(fields: Fields) -> int:
    return 3 * int(fields.get("patch_size", 1)) ** 2


def _diffusers(residual: bool) -> ConfigFormat:
    return ConfigFormat(
        {
            "base_dim": Key("dim", 96), "z_dim": Key("z_dim", 16), "num_res_blocks": Key("num_res_blocks", 2),
            "dim_mult": Key("dim_mult", (1, 2, 4, 4), COUNTS),
            "temperal_downsample": Key("temporal_downsample", (False, True, True), BOOLS),
            **same(FLOATS, latents_mean=UNSET, latents_std=UNSET), **(same(patch_size=2) if residual else {}),
        },
        {"attn_scales": ((),), "is_residual": (residual,)} | ({} if residual else {"patch_size": (None, 1)}),
        partial(_read, residual=residual), _write, {"dropout": 0.0},
        derived={
            "in_channels": _pixels, "out_channels": _pixels,
            "scale_factor_spatial": lambda fields: fields.get("patch_size", 1) * 2 ** (len(fields["dim_mult"]) - 1),
            "scale_factor_temporal": lambda fields: 2 ** sum(fields["temporal_downsample"]),
        },
    )  # fmt: skip


def _native(**more: Key) -> ConfigFormat:
    return ConfigFormat(
        {
            "dim": Key("dim"), "z_dim": Key("z_dim"), "num_res_blocks": Key("num_res_blocks"),
            "dim_mult": Key("dim_mult", check=COUNTS),
            "temperal_downsample": Key("temporal_downsample", check=BOOLS), **more,
        },
        {"attn_scales": ((),)}, ignored=("dropout",),
    )  # fmt: skip


def ports(config: Any) -> dict[str, Port]:
    """What it gives: latents, and to a control input two halves of latents and a mask of each pixel."""
    control = 2 * config.z_dim + config.spatial_stride**2
    return {"latent channels": Port(config.z_dim, "z_dim"), "control channels": Port(control, "from z_dim, stride")}


def strides(config: Any) -> tuple[int, int, int]:
    return config.temporal_stride, config.spatial_stride, config.spatial_stride


DECODER = "decoder.middle.0.residual.0.gamma"
DECODER_DIFFUSERS = "decoder.mid_block.resnets.0.norm1.gamma"
PREVIEW = "ditkit.models.latent_rgb:factors_for"
WAN_VAE = Kind(
    "wan_vae", "Wan 2.1", "a Wan VAE", ("vae",),
    {
        "native": Layout(((DECODER, "encoder.downsamples.0.residual.0.gamma"),), _native(), ("WanVAE",),
                         file="Wan2.1_VAE", pickle=True),
        "diffusers": Layout(((DECODER_DIFFUSERS, "encoder.down_blocks.0.norm1.gamma"),), _diffusers(False),
                            (VAE_CLASS,), mine=lambda config: config.get("is_residual") is not True),
    },
    vae_sizes, lambda fields: vae_keys(len(fields["dim_mult"]), fields["num_res_blocks"]),
    optional_keys=True, config_class="ditkit.models.wan_vae:WanVAEConfig", module="ditkit.models.wan_vae:WanVAE",
    load="ditkit.assembly.loaders:load_module",
    get="Take Wan2.1_VAE.pth of a native Wan repository or vae/ of a -Diffusers one",
    unsaid={"latents_mean": WAN21_MEAN, "latents_std": WAN21_STD},
    ports=ports, strides=strides, preview=PREVIEW,
)  # fmt: skip
WAN_VAE22 = Kind(
    "wan_vae22", "Wan 2.2", "a Wan VAE", ("vae",),
    {
        "native": Layout(((DECODER, "encoder.downsamples.0.downsamples.0.residual.0.gamma"),),
                         _native(dec_dim=Key("dec_dim")), ("Wan2_2_VAE",), file="Wan2.2_VAE", pickle=True),
        "diffusers": Layout(((DECODER_DIFFUSERS, "encoder.down_blocks.0.resnets.0.norm1.gamma"),), _diffusers(True),
                            (VAE_CLASS,), mine=lambda config: config.get("is_residual") is True),
    },
    partial(vae_sizes, kind="wan_vae22"), lambda fields: vae22_keys(len(fields["dim_mult"]), fields["num_res_blocks"]),
    config_class="ditkit.models.wan_vae:WanVAE22Config", module="ditkit.models.wan_vae:WanVAE22",
    load="ditkit.assembly.loaders:load_module", optional_keys=True,
    get="Take Wan2.2_VAE.pth of Wan-AI/Wan2.2-TI2V-5B or vae/ of Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    unsaid={"latents_mean": WAN22_MEAN, "latents_std": WAN22_STD},
    ports=ports, strides=strides, preview=PREVIEW,
)  # fmt: skip
TAEHV = Kind(
    "taehv", "TAEHV", "a TAEHV", ("preview_decoder", "vae"),
    {
        "native": Layout((("encoder.17.weight", "decoder.1.weight", "decoder.3.conv.0.weight"),
                          ("encoder.17.weight", "decoder.0.weight", "decoder.1.conv.3.weight"))),
    },
    taehv_sizes,
    config_class="ditkit.models.taehv:TAEHVConfig", module="ditkit.models.taehv:TAEHV",
    load="ditkit.assembly.loaders:load_taehv", get="Take taew2_1 or taew2_2 of madebyollin/taehv",
    ports=ports, strides=strides, preview=PREVIEW,
)  # fmt: skip
