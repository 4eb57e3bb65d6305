"""The VAEs of Wan 2.1 and 2.2, in Wan's own layout and in that of diffusers, where both are ``AutoencoderKLWan``.

Sources: Wan2.1 ``wan/modules/vae.py``, Wan2.2 ``wan/modules/vae2_2.py``; diffusers ``autoencoder_kl_wan.py``.
"""

from __future__ import annotations

import re
from functools import partial
from types import MappingProxyType
from typing import Any

from ditkit.checkpoints.kinds.configs import (
    COUNTS,
    DIFFUSERS_VERSION,
    NUMBERS,
    TRUTHS,
    ConfigFormat,
    ConfigKeys,
    Key,
    same,
)
from ditkit.checkpoints.kinds.kind import Fields, Kind, Layout, Port
from ditkit.checkpoints.kinds.sizes import SizeReader, Sizes, Tensors
from ditkit.checkpoints.views.key_table import KeyTable, Pairs, leaves

# --- the latents' official mean and standard deviation for each channel: native files do not hold them

WAN21_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN21_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
WAN22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
WAN22_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip

# --- names of tensors: native, diffusers


def _residual(native: str, other: str) -> Pairs:
    return [
        (f"{native}.residual.0.gamma", f"{other}.norm1.gamma"),
        (f"{native}.residual.3.gamma", f"{other}.norm2.gamma"),
        *leaves(f"{native}.residual.2", f"{other}.conv1"),
        *leaves(f"{native}.residual.6", f"{other}.conv2"),
        *leaves(f"{native}.shortcut", f"{other}.conv_shortcut"),
    ]


def _resample(native: str, other: str) -> Pairs:
    return [pair for x in ("resample.1", "time_conv") for pair in leaves(f"{native}.{x}", f"{other}.{x}")]


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


def vae_keys(levels: int, num_res_blocks: int) -> KeyTable:
    """The Wan 2.1 VAE: native <-> diffusers ``AutoencoderKLWan``. ``levels`` is the length of ``dim_mult``.

    The native encoder and decoder number all layers of all levels through; diffusers does so in the encoder only,
    and groups the decoder's in levels of ``num_res_blocks + 1`` residual blocks and a doubling."""
    pairs = _trunk()
    for level in range(levels):
        start = level * (num_res_blocks + 1)
        for i in range(start, start + num_res_blocks):
            pairs += _residual(f"encoder.downsamples.{i}", f"encoder.down_blocks.{i}")
        start = level * (num_res_blocks + 2)
        for i in range(num_res_blocks + 1):
            pairs += _residual(f"decoder.upsamples.{start + i}", f"decoder.up_blocks.{level}.resnets.{i}")
        if level < levels - 1:
            i = level * (num_res_blocks + 1) + num_res_blocks
            pairs += _resample(f"encoder.downsamples.{i}", f"encoder.down_blocks.{i}")
            i = start + num_res_blocks + 1
            pairs += _resample(f"decoder.upsamples.{i}", f"decoder.up_blocks.{level}.upsamplers.0")
    return KeyTable.of(pairs)


def vae22_keys(levels: int, num_res_blocks: int) -> KeyTable:
    """The Wan 2.2 VAE: native <-> diffusers ``AutoencoderKLWan`` with ``is_residual``.

    Here both number by level. A level's last native layer is its halving or doubling; the shortcuts around whole
    levels have no parameters."""
    pairs = _trunk()
    for level in range(levels):
        for natives, others, blocks, resampler in (
            ("encoder.downsamples.{}.downsamples", "encoder.down_blocks.{}", num_res_blocks, "downsampler"),
            ("decoder.upsamples.{}.upsamples", "decoder.up_blocks.{}", num_res_blocks + 1, "upsampler"),
        ):
            native, other = natives.format(level), others.format(level)
            for i in range(blocks):
                pairs += _residual(f"{native}.{i}", f"{other}.resnets.{i}")
            if level < levels - 1:
                pairs += _resample(f"{native}.{blocks}", f"{other}.{resampler}")
    return KeyTable.of(pairs)


# --- sizes

RESIDUALS = MappingProxyType({
    ("wan_vae", "native"): r"encoder\.downsamples\.(\d{1,3})\.residual\.2\.weight",
    ("wan_vae", "diffusers"): r"encoder\.down_blocks\.(\d{1,3})\.conv1\.weight",
    ("wan_vae22", "native"): r"encoder\.downsamples\.(\d{1,3})\.downsamples\.(\d{1,3})\.residual\.2\.weight",
    ("wan_vae22", "diffusers"): r"encoder\.down_blocks\.(\d{1,3})\.resnets\.(\d{1,3})\.conv1\.weight",
})  # fmt: skip
"""The name of a residual block of the encoder: its number, or those of its level and in it. Numbers have three digits
at most, because lists are made up to them."""
HALVINGS = MappingProxyType({
    ("wan_vae", "native"): "encoder.downsamples.{}", ("wan_vae", "diffusers"): "encoder.down_blocks.{}",
    ("wan_vae22", "native"): "encoder.downsamples.{}.downsamples.{}",
    ("wan_vae22", "diffusers"): "encoder.down_blocks.{}.downsampler",
})  # fmt: skip


def vae_sizes(tensors: Tensors, layout: str = "native", kind: str = "wan_vae") -> Sizes:
    """Fields of ``WanVAEConfig`` (2.1) or, with kind ``wan_vae22``, of ``WanVAE22Config``."""
    read = SizeReader(tensors, layout)
    first, last, start = (
        ("encoder.conv1.weight", "conv2.weight", "decoder.conv1.weight") if layout == "native" else
        ("encoder.conv_in.weight", "post_quant_conv.weight", "decoder.conv_in.weight")
    )  # fmt: skip
    dim, z = read.axis("dim", first, 0, 5), read.axis("z_dim", last, 0, 5)
    levels, halvings = (_flat_levels if kind == "wan_vae" else _named_levels)(tensors, RESIDUALS[kind, layout])
    blocks = "the names of the encoder's blocks"
    if not levels or len({len(level) for level in levels}) > 1:
        raise read.error(f"the levels of the encoder have {[len(level) for level in levels]} residual blocks")
    read.tell("num_res_blocks", len(levels[0]), blocks)
    widths = [read.shape(level[-1], 5)[0] for level in levels]
    if any(width % dim for width in widths):
        raise read.error(f"the levels of the encoder are {widths} wide, no multiples of {dim}")
    mult = read.tell("dim_mult", tuple(width // dim for width in widths), "the shapes of the encoder's blocks")
    times = (f"{HALVINGS[kind, layout].format(*numbers)}.time_conv.weight" for numbers in halvings)
    read.tell("temporal_downsample", tuple(name in tensors for name in times), f"{blocks} (time_conv)")
    if kind == "wan_vae22":
        read.axis("dec_dim", start, 0, 5, mult[-1])
        read.side("patch_size", first, 5)
    known = z == len(WAN21_MEAN if kind == "wan_vae" else WAN22_MEAN)
    return read.sizes(undecided=() if known else ("latents_mean", "latents_std"))


def _flat_levels(tensors: Tensors, pattern: str) -> tuple[list[list[str]], list[tuple[int, ...]]]:
    """(the residual blocks of each level, the numbers of the halving after each level but the last).

    The blocks of 2.1 are numbered through; a number without a residual block is a halving."""
    residual = {int(match[1]): name for name in tensors if (match := re.fullmatch(pattern, name))}
    levels: list[list[str]] = [[]]
    halvings: list[tuple[int, ...]] = []
    for number in range(1 + max(residual, default=-1)):
        if number in residual:
            levels[-1].append(residual[number])
        else:
            levels.append([])
            halvings.append((number,))
    return levels, halvings


def _named_levels(tensors: Tensors, pattern: str) -> tuple[list[list[str]], list[tuple[int, ...]]]:
    found = sorted((int(m[1]), int(m[2]), name) for name in tensors if (m := re.fullmatch(pattern, name)))
    numbers = sorted({level for level, _, _ in found})
    levels = [[name for level, _, name in found if level == number] for number in numbers]
    return levels, [(number, len(levels[number])) for number in numbers[:-1]]


# --- configs

VAE_CLASS = "AutoencoderKLWan"


def _read(keys: ConfigKeys, fields: dict[str, Any], residual: bool) -> None:
    mult, temporal, z_dim = fields["dim_mult"], fields["temporal_downsample"], fields["z_dim"]
    found = f"temperal_downsample has {len(temporal)} values where dim_mult has {len(mult)}"
    keys.require(bool(mult) and min(mult) > 0 and len(temporal) == len(mult) - 1, found)
    patch = fields.get("patch_size", 1)
    for key in ("in_channels", "out_channels"):
        keys.only(key, 3 * patch**2)
    if residual:
        fields["dec_dim"] = keys.take("decoder_base_dim", fields["dim"])
        keys.said["dec_dim"] = "decoder_base_dim"
    else:
        keys.only("patch_size", None, 1)
        keys.only("decoder_base_dim", None, fields["dim"])
    usual = len(WAN22_MEAN if residual else WAN21_MEAN)
    for key in ("latents_mean", "latents_std"):
        if key not in keys.rest:
            keys.known.append(key)
            if z_dim != usual:
                raise keys.error(f"it has no {key}, and the usual one is for {usual} channels", "Add it to the config")
            continue  # our defaults are the official ones
        fields[key] = keys.take(key, check=NUMBERS)
        keys.require(len(fields[key]) == z_dim, f"{key} has {len(fields[key])} values where z_dim is {z_dim}")
        least = min(fields[key], default=1.0)
        keys.require(key == "latents_mean" or least > 0, f"latents_std has the value {least}")
    keys.only("scale_factor_spatial", patch * 2 ** (len(mult) - 1))
    keys.only("scale_factor_temporal", 2 ** sum(temporal))


def _write(fields: Fields, residual: bool) -> dict[str, Any]:
    patch = fields["patch_size"] if residual else 1
    return {
        "_class_name": VAE_CLASS, "_diffusers_version": DIFFUSERS_VERSION, "in_channels": 3 * patch**2,
        "out_channels": 3 * patch**2, "decoder_base_dim": fields["dec_dim"] if residual else None,
        "patch_size": patch if residual else None, "scale_factor_spatial": patch * 2 ** (len(fields["dim_mult"]) - 1),
        "scale_factor_temporal": 2 ** sum(fields["temporal_downsample"]), "latents_mean": fields["latents_mean"],
        "latents_std": fields["latents_std"],
    }  # fmt: skip


def _diffusers(residual: bool) -> ConfigFormat:
    return ConfigFormat(
        {
            "base_dim": Key("dim", 96), "z_dim": Key("z_dim", 16), "num_res_blocks": Key("num_res_blocks", 2),
            "dim_mult": Key("dim_mult", (1, 2, 4, 4), COUNTS),
            "temperal_downsample": Key("temporal_downsample", (False, True, True), TRUTHS),
        } | (same(patch_size=2) if residual else {}),
        {"attn_scales": ((),), "is_residual": (residual,)},
        partial(_read, residual=residual), partial(_write, residual=residual), written={"dropout": 0.0},
    )  # fmt: skip


def _native(**more: Key) -> ConfigFormat:
    return ConfigFormat(
        {
            "dim": Key("dim"), "z_dim": Key("z_dim"), "num_res_blocks": Key("num_res_blocks"),
            "dim_mult": Key("dim_mult", check=COUNTS),
            "temperal_downsample": Key("temporal_downsample", check=TRUTHS), **more,
        },
        {"attn_scales": ((),)}, ignored=("dropout",),
    )  # fmt: skip


# --- the rows


def ports(config: Any) -> dict[str, Port]:
    """What it gives: latents, and to a control input two halves of latents and a mask of each pixel."""
    control = 2 * config.z_dim + config.spatial_stride**2
    return {"latent channels": Port(config.z_dim, "z_dim"), "control channels": Port(control, "from z_dim, stride")}


def strides(config: Any) -> tuple[int, int, int]:
    return config.temporal_stride, config.spatial_stride, config.spatial_stride


def _is_residual(config: Fields) -> bool:
    return config.get("is_residual", False) is True


DECODER = "decoder.middle.0.residual.0.gamma"
DECODER_DIFFUSERS = "decoder.mid_block.resnets.0.norm1.gamma"
PREVIEW = "ditkit.models.latent_rgb:factors_for"
WAN_VAE = Kind(
    "wan_vae", "Wan 2.1", "a Wan VAE", ("vae",),
    {
        "native": Layout(
            ((DECODER, "encoder.downsamples.0.residual.0.gamma"),), _native(), ("WanVAE",),
            file="Wan2.1_VAE", pickle=True,
        ),
        "diffusers": Layout(
            ((DECODER_DIFFUSERS, "encoder.down_blocks.0.norm1.gamma"),), _diffusers(False), (VAE_CLASS,),
            mine=lambda config: not _is_residual(config),
        ),
    },
    vae_sizes, lambda fields: vae_keys(len(fields["dim_mult"]), fields["num_res_blocks"]),
    optional_keys=True,
    config_class="ditkit.models.wan_vae:WanVAEConfig", module="ditkit.models.wan_vae:WanVAE",
    load="ditkit.assembly.loaders:load_wan_vae",
    get="Take Wan2.1_VAE.pth of a native Wan repository or vae/ of a -Diffusers one",
    unsaid=MappingProxyType({"latents_mean": WAN21_MEAN, "latents_std": WAN21_STD}),
    ports=ports, strides=strides, preview=PREVIEW,
)  # fmt: skip
WAN_VAE22 = Kind(
    "wan_vae22", "Wan 2.2", "a Wan VAE", ("vae",),
    {
        "native": Layout(
            ((DECODER, "encoder.downsamples.0.downsamples.0.residual.0.gamma"),), _native(dec_dim=Key("dec_dim")),
            ("Wan2_2_VAE",), file="Wan2.2_VAE", pickle=True,
        ),
        "diffusers": Layout(
            ((DECODER_DIFFUSERS, "encoder.down_blocks.0.resnets.0.norm1.gamma"),), _diffusers(True), (VAE_CLASS,),
            mine=_is_residual,
        ),
    },
    partial(vae_sizes, kind="wan_vae22"), lambda fields: vae22_keys(len(fields["dim_mult"]), fields["num_res_blocks"]),
    optional_keys=True,
    config_class="ditkit.models.wan_vae:WanVAE22Config", module="ditkit.models.wan_vae:WanVAE22",
    load="ditkit.assembly.loaders:load_wan_vae22",
    get="Take Wan2.2_VAE.pth of Wan-AI/Wan2.2-TI2V-5B or vae/ of Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    unsaid=MappingProxyType({"latents_mean": WAN22_MEAN, "latents_std": WAN22_STD}),
    ports=ports, strides=strides, preview=PREVIEW,
)  # fmt: skip
