"""The CLIP image encoder against the official code's stored outputs and transformers' own classes."""

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from reference import rel
from safetensors.torch import load_file, save_file

from ditkit.checkpoints.files.safetensors import TensorFiles
from ditkit.checkpoints.kinds.clip import clip_keys
from ditkit.checkpoints.views.mapped import Mapped
from ditkit.contracts import ImageEncoder
from ditkit.errors import LoadError, RequestError
from ditkit.models.clip import CLIPConfig, build_clip
from ditkit.models.encoders import MEAN, STD, CLIPImageEncoder, check_processor, preprocess

GOLDEN = Path(__file__).parents[1] / "data/golden/clip"
NATIVE = GOLDEN / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors"
IO = load_file(GOLDEN / "io.safetensors")

TOWERS = {
    "ViT-H": CLIPConfig(64, 160, 4, 4, 56, 14),
    "ViT-L": CLIPConfig(64, 256, 3, 2, 42, 14, "quick_gelu"),
    "ViT-B/32": CLIPConfig(48, 192, 3, 4, 96, 32, "quick_gelu"),
    "ViT-B/16, one block": CLIPConfig(48, 192, 1, 4, 48, 16, "quick_gelu", 1e-4),
}


def picture(height: int, width: int, batch: int = 1) -> torch.Tensor:
    """Smooth colours with some noise: bicubic overshoots at edges, and both kinds of resizing can be told apart."""
    g = torch.Generator().manual_seed(height * width)
    coarse = torch.rand(batch, 3, 5, 5, generator=g)
    x = F.interpolate(coarse, size=(height, width), mode="nearest") + 0.2 * torch.rand(
        batch, 3, height, width, generator=g
    )
    return (x.clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@torch.no_grad()
def theirs(config: CLIPConfig, seed: int = 1):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model = CLIPVisionModel(CLIPVisionConfig(**asdict(config))).eval()
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=g)
        p.copy_(noise / p[0].numel() ** 0.5 if p.dim() > 1 else noise * 0.3 + (p.mean() > 0.5))
    return model


def written(model, folder: Path) -> TensorFiles:
    save_file(tiny.bare(model).state_dict(), folder / "model.safetensors")
    return TensorFiles(folder / "model.safetensors")


@pytest.fixture(scope="module")
def official() -> CLIPImageEncoder:
    raw = json.loads((GOLDEN / "config.json").read_text())
    width, layers = raw["vision_dim"], raw["vision_layers"]
    config = CLIPConfig(
        width, width * raw["vision_mlp_ratio"], layers, raw["vision_heads"], raw["image_size"], raw["patch_size"]
    )
    return CLIPImageEncoder.load(config, Mapped(TensorFiles(NATIVE), clip_keys(layers), "other"))


# --- the official code's own outputs


@pytest.mark.parametrize("i", range(3))
def test_official_preprocessing(i):
    images = IO[f"image.{i}"].unsqueeze(0)
    assert rel(preprocess(images, 56, "wan"), IO[f"pixel_values.{i}"]) <= 1e-5
    assert rel(preprocess(images, 224, "wan")[:, :, ::4, ::4], IO[f"pixel_values_224_every4.{i}"]) <= 1e-5


def test_official_features(official):
    assert isinstance(official, ImageEncoder)
    for i in range(3):
        assert rel(official(IO[f"pixel_values.{i}"]), IO[f"output.{i}"]) <= 1e-5
        assert rel(official.encode(IO[f"image.{i}"].unsqueeze(0), "wan"), IO[f"output.{i}"]) <= 1e-5
    found = official(IO["random.pixel_values"])
    assert rel(found, IO["random.output"]) <= 1e-5
    assert rel(found, IO["random.output_all_blocks"]) > 0.1  # which output it is can be told


def test_official_size():
    """The visual tower of the published file has 632,076,800 parameters, of which the projection is 1280 x 1024."""
    model = build_clip(CLIPConfig())
    assert sum(p.numel() for p in model.parameters()) == 632_076_800 - 1280 * 1024
    assert CLIPConfig().tokens == 257


# --- transformers


@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS)
def test_transformers_features(name, tmp_path):
    config = TOWERS[name]
    other = theirs(config)
    encoder = CLIPImageEncoder.load(config, written(other, tmp_path))
    pixels = torch.randn(3, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(2))
    expected = other(pixels, output_hidden_states=True).hidden_states[-2]
    found = encoder(pixels)
    assert found.shape == (3, config.tokens, config.hidden_size)
    assert torch.equal(found, expected)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = CLIPImageEncoder.load(config, written(other, tmp_path), dtype)(pixels)
        halved = copy.deepcopy(other).to(dtype)(pixels.to(dtype), output_hidden_states=True).hidden_states[-2]
        assert torch.equal(narrow, halved)
    assert len(encoder.model.encoder.layers) == config.num_hidden_layers - 1  # the last block is not even kept
    if config.num_hidden_layers > 1:
        swapped = replace(config, hidden_act="gelu" if config.hidden_act == "quick_gelu" else "quick_gelu")
        assert rel(CLIPImageEncoder.load(swapped, written(other, tmp_path))(pixels), expected) > 1e-4


SHAPES = [(96, 150), (130, 72), (60, 60), (31, 77), (257, 224), (20, 301)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [56, 63])
def test_transformers_preprocessing(shape, size):
    """Bit for bit their processor with PIL, which runs where torchvision is not installed."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    images = picture(*shape, batch=2)
    expected = processor(images=list(images.numpy()), return_tensors="pt")["pixel_values"]
    assert torch.equal(preprocess(images, size, "diffusers"), expected)


@pytest.mark.parametrize("shape", [(96, 150), (130, 72)])
def test_the_processor_with_torchvision(shape):
    """Its resizing is torch's antialiased bicubic on bytes: one level of 255 away from PIL's at most."""
    images, size = picture(*shape), 56
    longer = int(size * max(shape) / min(shape))
    to = (size, longer) if shape[0] < shape[1] else (longer, size)
    x = F.interpolate(images.permute(0, 3, 1, 2), size=to, mode="bicubic", antialias=True)
    top, left = (to[0] - size) // 2, (to[1] - size) // 2
    levels = x[:, :, top : top + size, left : left + size].float()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    found = (preprocess(images, size, "diffusers") * std + mean) * 255
    assert (found - levels).abs().max() <= 1.001


def test_the_two_ways_differ():
    """A wide picture with one bright end: squeezed, the end is seen; with the ends cut off it is not."""
    images = torch.zeros(1, 60, 180, 3, dtype=torch.uint8)
    images[:, :, 150:] = 255
    assert preprocess(images, 56, "wan")[..., -1].min() > 1.5
    assert preprocess(images, 56, "diffusers").max() < -1


def test_a_processor_that_asks_for_something_else():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    check_processor(json.loads(CLIPImageProcessorPil().to_json_string()), 224)
    check_processor({"crop_size": 224, "size": 224, "resample": 3}, 224)  # as old files have it
    for key, value in (
        ("size", {"shortest_edge": 336}),
        ("resample", 2),
        ("do_center_crop", False),
        ("image_mean", [0.5] * 3),
    ):
        with pytest.raises(LoadError, match=key):
            check_processor({key: value}, 224)


# --- loading


def test_no_weight_stays_random(tmp_path):
    """R17: a loader that matches nothing, says nothing, and leaves the encoder as it was initialised."""
    config = TOWERS["ViT-H"]
    tensors = tiny.bare(theirs(config)).state_dict()
    for names in (
        {f"vision_model.{name}": t for name, t in tensors.items()},  # a prefix that nobody took off
        {f"other.{name}": t for name, t in tensors.items()},
        {name: t for name, t in tensors.items() if "layers.3" not in name},  # the last block is not run, but checked
        tensors | {"embeddings.patch_embedding.bias": torch.zeros(64)},
    ):
        save_file(names, tmp_path / "clip.safetensors")
        with pytest.raises(LoadError, match=r"tensors are (missing|unknown)"):
            CLIPImageEncoder.load(config, TensorFiles(tmp_path / "clip.safetensors"))
    with pytest.raises(LoadError, match="another shape"):
        CLIPImageEncoder.load(replace(config, image_size=70), written(theirs(config), tmp_path))


def test_an_activation_that_does_not_exist():
    with pytest.raises(LoadError, match="did you mean 'quick_gelu'"):
        build_clip(replace(TOWERS["ViT-L"], hidden_act="quick_gleu"))


def test_dtype_and_identity(tmp_path):
    config, file = TOWERS["ViT-L"], written(theirs(TOWERS["ViT-L"]), tmp_path)
    exact, narrow = CLIPImageEncoder.load(config, file), CLIPImageEncoder.load(config, file, dtype=torch.bfloat16)
    assert (exact.dtype, narrow.dtype, exact.image_size, exact.dim) == (torch.float32, torch.bfloat16, 42, 64)
    assert exact.fingerprint == CLIPImageEncoder.load(config, file).fingerprint != narrow.fingerprint
    other = CLIPImageEncoder.load(replace(config, hidden_act="gelu"), file)
    assert other.fingerprint != exact.fingerprint
    images = picture(50, 70)
    found = narrow.encode(images, "diffusers")
    assert found.dtype == torch.bfloat16
    assert rel(found, exact.encode(images, "diffusers")) < 0.05


def test_another_picture_gives_other_features(official):
    assert rel(official.encode(picture(50, 70), "wan"), official.encode(picture(51, 70), "wan")) > 0.05


def test_what_it_refuses(official):
    with pytest.raises(RequestError, match="did you mean 'diffusers'"):
        official.encode(picture(8, 8), "difusers")
    for images in (torch.zeros(1, 8, 8, 3), torch.zeros(8, 8, 3, dtype=torch.uint8), picture(8, 8)[:, :0]):
        with pytest.raises(RequestError, match="Give bytes of shape"):
            official.encode(images, "wan")
    with pytest.raises(RequestError, match=r"Give \[B, 3, 56, 56\]"):
        official(torch.zeros(1, 3, 224, 224))


def test_a_picture_that_must_not_be_written_to(official):
    """Frames from a file or a State are often read-only."""
    given = np.zeros((1, 20, 30, 3), np.uint8)
    before = torch.from_numpy(given.copy())
    for processing in ("wan", "diffusers"):
        images = torch.from_numpy(given)
        preprocess(images, 56, processing)
        assert torch.equal(images, before)
