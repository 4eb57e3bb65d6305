"""The vision half of CLIP in plain torch: normalised pictures -> one row of features a patch, and one for the whole.

Names of modules and tensors and the order of operations are those of transformers' ``CLIPVisionModel`` with torch's
attention, so files fit and the bits are equal. Leaves out: the text half, the projection, other picture sizes.

Legend: B pictures, S side of a picture, N rows of one (patches and the class row), D width, H heads.
Sources: Wan2.1 ``wan/modules/clip.py`` (ViT-H/14 of XLM-RoBERTa CLIP); transformers ``modeling_clip.py``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkit.errors import LoadError, nearest
from ditkit.nn.attention import attention

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({
    "gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
})  # fmt: skip


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes under transformers' names; the defaults are Wan's ViT-H/14 (630,766,080 parameters without projection).

    ``hidden_act``: "gelu" is the exact one, "quick_gelu" that of OpenAI's own ViT-B and ViT-L."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5

    @property
    def tokens(self) -> int:
        """Rows of features for one picture."""
        return (self.image_size // self.patch_size) ** 2 + 1


class Embeddings(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        # from_pretrained: to draw first values on the meta device imports torch's compiler, which takes seconds
        self.position_embedding = nn.Embedding.from_pretrained(torch.empty(config.tokens, width), freeze=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, N, D], the class row first."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        rows = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], dim=1)
        return rows + self.position_embedding.weight.unsqueeze(0)


class SelfAttention(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        width = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.heads = config.num_attention_heads, width // config.num_attention_heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, self.heads).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) for _ in range(2)
        )
        self.self_attn, self.mlp = SelfAttention(config), MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Stack(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))


class CLIPVision(nn.Module):
    """Normalised pictures [B, 3, S, S] in the dtype of the weights -> [B, N, D] after the blocks that it has. The final
    norm is loaded and not run: Wan takes the rows before it."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # spelt so in every file
        self.encoder = Stack(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.pre_layrnorm(self.embeddings(pixels))
        for block in self.encoder.layers:
            x = block(x)
        return x


def build_clip(config: CLIPConfig) -> CLIPVision:
    """The network on the meta device, in eval mode, without gradients. Raises LoadError for an unknown activation."""
    if config.hidden_act not in ACTIVATIONS:
        found = f"hidden_act is {config.hidden_act!r}{nearest(config.hidden_act, ACTIVATIONS)}"
        raise LoadError("building a CLIP image encoder", found, f"Use {' or '.join(ACTIVATIONS)}")
    with torch.device("meta"):
        return CLIPVision(config).eval().requires_grad_(False)
