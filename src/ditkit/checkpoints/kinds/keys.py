"""What a tensor is called, and how it lies, in the native files of Wan and in those of diffusers and transformers.

A table is data: rules with the names on both sides and, where a tensor is not the same on both, what is done to it.
It lists every full name that a network of the given sizes can have, so a lookup is exact: nothing is replaced inside a
name and nothing unknown passes. ``mapped.py`` applies a table to tensors.
Leaves out: prefixes of whole files, LoRA, quantized flavours, GGUF's names.
Sources: Wan2.1 ``wan/modules/{model,vace_model,vae,t5,clip}.py``, Wan2.2 ``wan/modules/vae2_2.py``; diffusers
``transformer_wan.py``, ``transformer_wan_vace.py``, ``autoencoder_kl_wan.py``; transformers ``modeling_umt5.py``,
``modeling_clip.py``. Tests compare each table with the names of the real classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from ditkit.checkpoints.files.text import some
from ditkit.errors import LoadError

WB = ("weight", "bias")
T = TypeVar("T")
Side = Literal["native", "other"]
Pairs = list[tuple[str, str]]
NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Rule:
    """A tensor in both layouts: one name on each side, or one name and several.

    Several tensors lie in the one as equal shares of its first axis, in this order. ``ones``: so many leading axes of
    length 1 has the native tensor more. ``transpose``: its two axes are swapped."""

    native: tuple[str, ...]
    other: tuple[str, ...]
    ones: int = 0
    transpose: bool = False

    def __post_init__(self) -> None:
        changes = (len(self.native) + len(self.other) > 2) + (self.ones > 0) + self.transpose
        if min(len(self.native), len(self.other)) != 1 or changes > 1:
            raise ValueError(f"a rule for {self.native} and {self.other} does one thing, to one tensor of one side")

    @property
    def renames(self) -> bool:
        return len(self.native) == len(self.other) == 1 and not self.ones and not self.transpose

    def names(self, side: Side) -> tuple[str, ...]:
        return self.native if side == "native" else self.other


@dataclass(frozen=True)
class KeyTable:
    """Rules of a whole network. ``aliases``: a second name in the other layout -> the name in the rules.
    ``ignored_native``, ``ignored_other``: what such files hold besides the network, as whole names or, with a dot at
    the end, as beginnings."""

    rules: tuple[Rule, ...]
    aliases: Mapping[str, str] = field(default_factory=lambda: NOTHING)
    ignored_native: tuple[str, ...] = ()
    ignored_other: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for side in ("native", "other"):
            names = [name for rule in self.rules for name in rule.names(side)]
            if len(set(names)) != len(names):
                raise ValueError("a name stands twice in a key table")

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, str]], *rules: Rule, **more: Any) -> KeyTable:
        """Renamed ``pairs`` (native, other), then ``rules`` that do more."""
        return cls((*(Rule((native,), (other,)) for native, other in pairs), *rules), **more)

    def by_name(self, side: Side) -> dict[str, Rule]:
        return {name: rule for rule in self.rules for name in rule.names(side)}

    def ignores(self, name: str, side: Side) -> bool:
        rules = self.ignored_native if side == "native" else self.ignored_other
        return any(name.startswith(rule) if rule.endswith(".") else name == rule for rule in rules)

    @cached_property
    def to_other(self) -> Mapping[str, str]:
        """Native name -> other name, read-only. Only for tables that rename and do no more."""
        return self._renames("native", "other")

    @cached_property
    def to_native(self) -> Mapping[str, str]:
        """The inverse of ``to_other``."""
        return self._renames("other", "native")

    def _renames(self, source: Side, target: Side) -> Mapping[str, str]:
        if changed := [rule.native[0] for rule in self.rules if not rule.renames]:
            raise TypeError(f"the table does more than rename ({some(changed)}); use Mapped")
        return MappingProxyType({rule.names(source)[0]: rule.names(target)[0] for rule in self.rules})


def rename(tensors: Mapping[str, T], names: Mapping[str, str]) -> dict[str, T]:
    """``tensors`` under their new names. Raises LoadError for names that the table does not have."""
    if unknown := tensors.keys() - names.keys():
        raise LoadError(
            f"renaming {len(tensors)} tensors",
            f"{len(unknown)} names are unknown ({some(unknown)})",
            "Use weights of a supported model",
        )
    return {names[name]: tensor for name, tensor in tensors.items()}


def _leaves(native: str, other: str, leaves: Iterable[str] = WB) -> Pairs:
    return [(f"{native}.{leaf}", f"{other}.{leaf}") for leaf in leaves]


TRUNK = (
    ("patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.head", "proj_out"),
)
IMAGE_EMBEDDING = (
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
)
BLOCK = (
    ("norm3", "norm2"),  # native norm1 and norm2, and diffusers' norm1 and norm3, hold nothing
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("self_attn.o", "attn1.to_out.0"),
    ("cross_attn.q", "attn2.to_q"),
    ("cross_attn.o", "attn2.to_out.0"),
)
SELF = (("self_attn.q", "attn1.to_q"), ("self_attn.k", "attn1.to_k"), ("self_attn.v", "attn1.to_v"))
CROSS = (("cross_attn.k", "attn2.to_k"), ("cross_attn.v", "attn2.to_v"))
CROSS_IMAGE = (("cross_attn.k_img", "attn2.add_k_proj"), ("cross_attn.v_img", "attn2.add_v_proj"))


def transformer_keys(
    num_layers: int, *, image: bool = False, image_positions: bool = False, vace: int = 0, fused: bool = False
) -> KeyTable:
    """The transformer: native <-> diffusers ``WanTransformer3DModel``, or ``WanVACETransformer3DModel``.

    ``image``: it has the branch for CLIP features. ``image_positions``: that has learned positions (first and last
    frame). ``vace``: the number of control blocks. ``fused``: the diffusers file holds the fused projections
    (``to_qkv``, ``to_kv``, ``to_added_kv``) in place of the single ones."""
    pairs: Pairs = [pair for names in TRUNK for pair in _leaves(*names)]
    pairs.append(("head.modulation", "scale_shift_table"))
    if image:
        pairs += [pair for names in IMAGE_EMBEDDING for pair in _leaves(*names)]
    if image_positions:
        pairs.append(("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"))
    rules: list[Rule] = []
    for n in range(num_layers):
        _block(f"blocks.{n}", image, fused, pairs, rules)
    if vace:
        pairs += [*_leaves("vace_patch_embedding", "vace_patch_embedding")]
        pairs += _leaves("vace_blocks.0.before_proj", "vace_blocks.0.proj_in")
    for n in range(vace):
        _block(f"vace_blocks.{n}", image, fused, pairs, rules)
        pairs += _leaves(f"vace_blocks.{n}.after_proj", f"vace_blocks.{n}.proj_out")
    return KeyTable.of(pairs, *rules)


def _block(block: str, image: bool, fused: bool, pairs: Pairs, rules: list[Rule]) -> None:
    pairs.append((f"{block}.modulation", f"{block}.scale_shift_table"))
    pairs += [pair for native, other in BLOCK for pair in _leaves(f"{block}.{native}", f"{block}.{other}")]
    for native, other in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        pairs += [(f"{block}.{native}.norm_{x}.weight", f"{block}.{other}.norm_{x}.weight") for x in "qk"]
    groups = [(SELF, "attn1.to_qkv"), (CROSS, "attn2.to_kv")]
    if image:
        pairs.append((f"{block}.cross_attn.norm_k_img.weight", f"{block}.attn2.norm_added_k.weight"))
        groups.append((CROSS_IMAGE, "attn2.to_added_kv"))
    for members, together in groups:
        if fused:
            for leaf in WB:
                names = tuple(f"{block}.{native}.{leaf}" for native, _ in members)
                rules.append(Rule(names, (f"{block}.{together}.{leaf}",)))
        else:
            pairs += [pair for native, other in members for pair in _leaves(f"{block}.{native}", f"{block}.{other}")]


def _residual(native: str, other: str) -> Pairs:
    return [
        (f"{native}.residual.0.gamma", f"{other}.norm1.gamma"),
        (f"{native}.residual.3.gamma", f"{other}.norm2.gamma"),
        *_leaves(f"{native}.residual.2", f"{other}.conv1"),
        *_leaves(f"{native}.residual.6", f"{other}.conv2"),
        *_leaves(f"{native}.shortcut", f"{other}.conv_shortcut"),
    ]


def _resample(native: str, other: str) -> Pairs:
    names = ("resample.1", "time_conv")
    return [pair for name in names for pair in _leaves(f"{native}.{name}", f"{other}.{name}")]


def _vae_trunk() -> Pairs:
    """What both VAEs have: the two convolutions around the latents, and the ends and the middle of both halves."""
    pairs = [*_leaves("conv1", "quant_conv"), *_leaves("conv2", "post_quant_conv")]
    for part in ("encoder", "decoder"):
        pairs += _leaves(f"{part}.conv1", f"{part}.conv_in")
        pairs.append((f"{part}.head.0.gamma", f"{part}.norm_out.gamma"))
        pairs += _leaves(f"{part}.head.2", f"{part}.conv_out")
        pairs += _residual(f"{part}.middle.0", f"{part}.mid_block.resnets.0")
        pairs += _residual(f"{part}.middle.2", f"{part}.mid_block.resnets.1")
        native, other = f"{part}.middle.1", f"{part}.mid_block.attentions.0"
        pairs += [
            (f"{native}.norm.gamma", f"{other}.norm.gamma"),
            *_leaves(f"{native}.to_qkv", f"{other}.to_qkv"),
            *_leaves(f"{native}.proj", f"{other}.proj"),
        ]
    return pairs


def vae_keys(levels: int, num_res_blocks: int) -> KeyTable:
    """The Wan 2.1 VAE: native <-> diffusers ``AutoencoderKLWan``. ``levels`` is the length of ``dim_mult``.

    The native encoder and decoder number all layers of all levels through; diffusers does so in the encoder only,
    and groups the decoder's in levels of ``num_res_blocks + 1`` residual blocks and a doubling."""
    pairs = _vae_trunk()
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
    pairs = _vae_trunk()
    for level in range(levels):
        native, other = f"encoder.downsamples.{level}.downsamples", f"encoder.down_blocks.{level}"
        for i in range(num_res_blocks):
            pairs += _residual(f"{native}.{i}", f"{other}.resnets.{i}")
        if level < levels - 1:
            pairs += _resample(f"{native}.{num_res_blocks}", f"{other}.downsampler")
        native, other = f"decoder.upsamples.{level}.upsamples", f"decoder.up_blocks.{level}"
        for i in range(num_res_blocks + 1):
            pairs += _residual(f"{native}.{i}", f"{other}.resnets.{i}")
        if level < levels - 1:
            pairs += _resample(f"{native}.{num_res_blocks + 1}", f"{other}.upsampler")
    return KeyTable.of(pairs)


UMT5_ALIASES: Mapping[str, str] = MappingProxyType({"encoder.embed_tokens.weight": "shared.weight"})
"""transformers' second name for the token embedding; a file may have either name or both."""


def umt5_keys(num_layers: int) -> KeyTable:
    """The UMT5 encoder: native <-> transformers ``UMT5EncoderModel``."""
    pairs = [("token_embedding.weight", "shared.weight"), ("norm.weight", "encoder.final_layer_norm.weight")]
    for n in range(num_layers):
        native, attention, feed = f"blocks.{n}", f"encoder.block.{n}.layer.0", f"encoder.block.{n}.layer.1"
        pairs += [
            (f"{native}.norm1.weight", f"{attention}.layer_norm.weight"),
            *((f"{native}.attn.{x}.weight", f"{attention}.SelfAttention.{x}.weight") for x in "qkvo"),
            (
                f"{native}.pos_embedding.embedding.weight",
                f"{attention}.SelfAttention.relative_attention_bias.weight",
            ),
            (f"{native}.norm2.weight", f"{feed}.layer_norm.weight"),
            (f"{native}.ffn.gate.0.weight", f"{feed}.DenseReluDense.wi_0.weight"),
            (f"{native}.ffn.fc1.weight", f"{feed}.DenseReluDense.wi_1.weight"),
            (f"{native}.ffn.fc2.weight", f"{feed}.DenseReluDense.wo.weight"),
        ]
    return KeyTable.of(pairs, aliases=UMT5_ALIASES)


CLIP_FILE_PREFIX = "vision_model."  # of nearly all files; the class itself has lost it with transformers 5
CLIP_PROJECTION = ("visual.head", "visual_projection.weight")
CLIP_BESIDE_NATIVE: tuple[str, ...] = ("textual.", "log_scale")
CLIP_BESIDE_OTHER: tuple[str, ...] = (
    "text_model.", "text_projection.weight", "logit_scale",
    "embeddings.position_ids", f"{CLIP_FILE_PREFIX}embeddings.position_ids",
)  # fmt: skip


def clip_keys(num_layers: int, *, projection: bool = False, prefixed: bool = False) -> KeyTable:
    """The image half of CLIP: native <-> transformers ``CLIPVisionModel``.

    The text half, which Wan does not use, and the buffer of position numbers are ignored by name; so is the projection
    behind the last layer, unless ``projection`` asks for it (``CLIPVisionModelWithProjection``). Names of transformers
    may begin with ``vision_model.``; ``prefixed`` makes that the first name, and the one without it the second."""
    pairs = [*_leaves("visual.pre_norm", "pre_layrnorm"), *_leaves("visual.post_norm", "post_layernorm")]
    pairs.append(("visual.patch_embedding.weight", "embeddings.patch_embedding.weight"))
    rules = [
        Rule(("visual.cls_embedding",), ("embeddings.class_embedding",), ones=2),
        Rule(("visual.pos_embedding",), ("embeddings.position_embedding.weight",), ones=1),
    ]
    for n in range(num_layers):
        native, other = f"visual.transformer.{n}", f"encoder.layers.{n}"
        for ours, theirs in (
            ("norm1", "layer_norm1"),
            ("norm2", "layer_norm2"),
            ("attn.proj", "self_attn.out_proj"),
            ("mlp.0", "mlp.fc1"),
            ("mlp.2", "mlp.fc2"),
        ):
            pairs += _leaves(f"{native}.{ours}", f"{other}.{theirs}")
        for leaf in WB:
            thirds = tuple(f"{other}.self_attn.{x}_proj.{leaf}" for x in "qkv")
            rules.append(Rule((f"{native}.attn.to_qkv.{leaf}",), thirds))
    rules = [Rule((native,), (other,)) for native, other in pairs] + rules
    plain = [name for rule in rules for name in rule.other]
    aliases = {CLIP_FILE_PREFIX + name: name for name in plain}
    if prefixed:
        aliases = {first: second for second, first in aliases.items()}
        rules = [
            Rule(rule.native, tuple(CLIP_FILE_PREFIX + name for name in rule.other), rule.ones, rule.transpose)
            for rule in rules
        ]
    beside_native, beside_other = CLIP_BESIDE_NATIVE, CLIP_BESIDE_OTHER
    if projection:
        rules.append(Rule((CLIP_PROJECTION[0],), (CLIP_PROJECTION[1],), transpose=True))
    else:
        beside_native, beside_other = (*beside_native, CLIP_PROJECTION[0]), (*beside_other, CLIP_PROJECTION[1])
    return KeyTable(tuple(rules), MappingProxyType(aliases), beside_native, beside_other)


def table_of(kind: str, config: Mapping[str, Any]) -> KeyTable:
    """The table of a component: ``kind`` as in ``Part.kind``, ``config`` with the keywords of its config class."""
    if kind == "wan":
        return transformer_keys(
            config["num_layers"],
            image=config.get("image_dim") is not None,
            image_positions=config.get("image_tokens") is not None,
            vace=len(config.get("vace_layers", ())),
        )
    if kind in ("wan_vae", "wan_vae22"):
        make = vae_keys if kind == "wan_vae" else vae22_keys
        return make(len(config["dim_mult"]), config["num_res_blocks"])
    if kind == "umt5":
        return umt5_keys(config["num_layers"])
    if kind == "clip":
        return clip_keys(config["num_hidden_layers"])
    raise ValueError(f"there is no key table for {kind!r}")
