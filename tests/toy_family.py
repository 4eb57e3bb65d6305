"""A family that ditkit does not know: two joint streams, of an image and of a text, in one row.

Handed over by name (``ditkit.registry.bring``), it is all that there is to a new kind of network: the network itself,
its names of tensors in two layouts, its sizes, its config. Sizes are tiny; what it computes means nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditkit.assembly.tasks import TaskRow
from ditkit.checkpoints.kinds.configs import ConfigFormat, Key, same
from ditkit.checkpoints.kinds.kind import Kind, Layout, LoraTargets, Port, Published
from ditkit.checkpoints.kinds.sizes import SizeReader, Sizes, Tensors
from ditkit.checkpoints.views.key_table import KeyTable, Rule, leaves
from ditkit.contracts import Site
from ditkit.nn.attention import sdpa
from ditkit.nn.layers import Loaded


@dataclass(frozen=True)
class JointConfig:
    width: int = 16
    layers: int = 2
    heads: int = 2
    channels: int = 16
    text_width: int = 32
    patch: int = 2


class JointBlock(nn.Module):
    """Each stream has projections of its own; attention is over both."""

    def __init__(self, width: int, heads: int, number: int):
        super().__init__()
        self.heads, self.number = heads, number
        self.img_qkv, self.txt_qkv = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.img_out, self.txt_out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, ctx: JointContext) -> Tensor:
        txt, img = x[:, ctx.tokens["text"]], x[:, ctx.tokens["video"]]
        qkv = torch.cat((self.txt_qkv(txt), self.img_qkv(img)), 1).unflatten(2, (3, self.heads, -1))
        out = ctx.attend(*qkv.unbind(2), Site(self.number, "joint", ctx.grid, ctx.step)).flatten(2)
        return x + torch.cat((self.txt_out(out[:, ctx.tokens["text"]]), self.img_out(out[:, ctx.tokens["video"]])), 1)


@dataclass(frozen=True)
class JointContext:
    attend: Any
    grid: tuple[int, int, int]
    tokens: Mapping[str, slice]
    step: Any = None


@dataclass(frozen=True)
class JointConditioning:
    text: Tensor

    def frames(self, start: int, stop: int) -> JointConditioning:
        return self


def in_order(blocks, x, ctx):
    for block in blocks:
        x = block(x, ctx)
    return x


class JointTransformer(Loaded):
    """[B, C, 1, h, w] and text [B, n, d] -> velocity of the latents' shape. The guidance scale is an input of it."""

    timestep_scale, reads, cfg = 1.0, (), False
    run_blocks = staticmethod(in_order)

    def __init__(self, config: JointConfig):
        super().__init__()
        self.config, pixels = config, config.channels * config.patch**2
        self.img_in, self.txt_in = nn.Linear(pixels, config.width), nn.Linear(config.text_width, config.width)
        self.double_blocks = nn.ModuleList(JointBlock(config.width, config.heads, i) for i in range(config.layers))
        self.final = nn.Linear(config.width, pixels)

    @property
    def latent_channels(self) -> int:
        return self.config.channels

    @property
    def patch(self) -> tuple[int, int, int]:
        return 1, self.config.patch, self.config.patch

    def prepare(self, fields, settings, branch="cond", cache_text_kv=True):
        rows = fields["prompt_embeds"].split(fields["prompt_lengths"])
        return JointConditioning(self.txt_in(torch.stack([row[:1].to(self.device) for row in rows])))

    def probe_fields(self, noise, rows):
        return {"prompt_embeds": noise(1, 1, rows, self.config.text_width)[0, 0, 0], "prompt_lengths": [rows]}

    def forward(self, x, timestep, conditioning, *, run_blocks=in_order, attend=sdpa, step=None):
        p, (height, width), text = self.config.patch, x.shape[3:], conditioning.text
        img = self.img_in(nn.functional.pixel_unshuffle(x[:, :, 0], p).flatten(2).transpose(1, 2))
        scale = 1.0 if step is None else step.guidance_scale
        img = img + timestep.to(img)[:, None, None] + 0.1 * scale
        tokens = {"text": slice(0, text.shape[1]), "video": slice(text.shape[1], None)}
        ctx = JointContext(attend, (1, height // p, width // p), tokens, step)
        img = run_blocks(self.double_blocks, torch.cat((text, img), 1), ctx)[:, tokens["video"]]
        out = self.final(img).transpose(1, 2).unflatten(2, (height // p, width // p))
        return nn.functional.pixel_shuffle(out, p)[:, :, None]


def joint_keys(layers: int) -> KeyTable:
    """Native <-> the style of diffusers, which has the projections one by one."""
    pairs = [*leaves("img_in", "x_embedder"), *leaves("txt_in", "context_embedder"), *leaves("final", "proj_out")]
    rules = []
    for n in range(layers):
        native, other = f"double_blocks.{n}", f"transformer_blocks.{n}.attn"
        pairs += [
            *leaves(f"{native}.img_out", f"{other}.to_out.0"),
            *leaves(f"{native}.txt_out", f"{other}.to_add_out"),
        ]
        for leaf in ("weight", "bias"):
            for stream, names in (("img", "to_{}"), ("txt", "add_{}_proj")):
                thirds = tuple(f"{other}.{names.format(x)}.{leaf}" for x in "qkv")
                rules.append(Rule((f"{native}.{stream}_qkv.{leaf}",), thirds))
    return KeyTable.of(pairs, *rules)


def joint_sizes(tensors: Tensors, layout: str = "native") -> Sizes:
    read, native = SizeReader(tensors, layout), layout == "native"
    image, text = ("img_in", "txt_in") if native else ("x_embedder", "context_embedder")
    read.axis("width", f"{image}.weight", 0, 2)
    read.axis("channels", f"{image}.weight", 1, 2, 4)
    read.axis("text_width", f"{text}.weight", 1, 2)
    blocks = r"double_blocks\.(\d+)\." if native else r"transformer_blocks\.(\d+)\."
    read.count("layers", blocks, "the names of the blocks")
    return read.sizes(undecided=("heads",))


def _config(cls: str, width: str, heads: str) -> ConfigFormat:
    return ConfigFormat(
        same(layers=2, channels=16, text_width=32) | {width: Key("width", 16), heads: Key("heads", 2)},
        {"patch_size": (2,)}, write=lambda fields: {"_class_name": cls},
    )  # fmt: skip


JOINT = Kind(
    "toy_joint", "Toy", "a joint transformer", ("transformer",),
    {
        "native": Layout(
            (("img_in.weight", "double_blocks.0.txt_qkv.weight"),),
            _config("JointModel", "width", "heads"), ("JointModel",),
        ),
        "diffusers": Layout(
            (("x_embedder.weight", "transformer_blocks.0.attn.add_q_proj.weight"),),
            _config("JointTransformer2DModel", "inner_dim", "num_attention_heads"), ("JointTransformer2DModel",),
        ),
    },
    joint_sizes, lambda fields: joint_keys(fields["layers"]),
    config_class=f"{__name__}:JointConfig", module=f"{__name__}:JointTransformer", load=f"{__name__}:load_joint",
    task=lambda fields: "t2i", tasks={"t2i": Published("JointPipeline", optional=())},
    needs=lambda fields: {"tokenizer": "tokenizer", "text_encoder": "umt5", "vae": "wan_vae"},
    ports=lambda config: {"latent channels": Port(config.channels, "channels"),
                          "width of the text": Port(config.text_width, "text_width")},
    patch=lambda config: (1, config.patch, config.patch), get="Write one with tests/toy_family.py",
    lora=LoraTargets(joint_keys, "(?:double|transformer)_blocks", lambda name: name.split(".")[-2]),
)  # fmt: skip


TASK = TaskRow(
    "t2i", ("encode_text", "denoise", "decode_latents"), help="text to image",
    defaults={"frames": 1, "steps": 2, "guidance_scale": 3.5, "shift": 1.0, "width": 32, "height": 32},
)  # fmt: skip


def load_joint(part: Any, how: Any) -> Any:
    from ditkit.assembly.loaders import filled

    return filled(lambda: JointTransformer(JointConfig(**part.config)), part, how)


def made(seed: int = 1, **sizes: Any) -> tuple[JointConfig, Mapping[str, Tensor]]:
    """Random weights under the native names."""
    torch.manual_seed(seed)
    config = JointConfig(**sizes)
    return config, dict(JointTransformer(config).state_dict())
