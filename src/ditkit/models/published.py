"""The published Wan transformers: their sizes, and how many numbers they hold. Data only; nothing is built here.

Leaves out: other parts of those models, sampling defaults, and models of others that have the same network.
Sources: ``wan/configs/*.py`` of Wan2.1 and Wan2.2, the repositories of Wan-AI named below; parameters and tensors were
counted on modules without memory (``tests/unit/test_official.py``)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from ditkit.models.wan_block import WanConfig


@dataclass(frozen=True)
class Official:
    """One published transformer: ``parameters`` numbers in ``tensors`` tensors, ``experts`` times (2: one for high and
    one for low noise, of equal sizes). ``repositories``: where Wan-AI publishes it in the official layout."""

    config: WanConfig
    parameters: int
    tensors: int
    repositories: tuple[str, ...]
    experts: int = 1


_SMALL = WanConfig()
_LARGE = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
_IMAGE = replace(_LARGE, in_dim=36, image_dim=1280)  # 16 latent channels, 4 of the mask, 16 of the image; CLIP ViT-H

OFFICIAL: Mapping[str, Official] = MappingProxyType({
    "wan2.1-t2v-1.3b": Official(_SMALL, 1_418_996_800, 825, ("Wan2.1-T2V-1.3B",)),
    "wan2.1-t2v-14b": Official(_LARGE, 14_288_491_584, 1095, ("Wan2.1-T2V-14B",)),
    "wan2.1-i2v-14b": Official(_IMAGE, 16_394_878_784, 1303, ("Wan2.1-I2V-14B-480P", "Wan2.1-I2V-14B-720P")),
    "wan2.1-flf2v-14b": Official(replace(_IMAGE, image_tokens=514), 16_395_536_704, 1304, ("Wan2.1-FLF2V-14B-720P",)),
    "wan2.1-vace-1.3b": Official(
        replace(_SMALL, vace_layers=tuple(range(0, 30, 2))), 2_153_972_032, 1264, ("Wan2.1-VACE-1.3B",)),
    "wan2.1-vace-14b": Official(
        replace(_LARGE, vace_layers=tuple(range(0, 40, 5))), 17_337_592_896, 1331, ("Wan2.1-VACE-14B",)),
    "wan2.2-t2v-a14b": Official(_LARGE, 14_288_491_584, 1095, ("Wan2.2-T2V-A14B",), experts=2),
    "wan2.2-i2v-a14b": Official(replace(_LARGE, in_dim=36), 14_288_901_184, 1095, ("Wan2.2-I2V-A14B",), experts=2),
    "wan2.2-ti2v-5b": Official(
        WanConfig(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48),
        4_999_787_712, 825, ("Wan2.2-TI2V-5B",)),
})  # fmt: skip
"""By name. Two names may have equal sizes: their weights tell apart what they are for, no shape does."""
