"""The encoders of Wan: UMT5 for token ids, CLIP for the pictures of Wan 2.1 image-to-video.

The networks (``umt5.py``, ``clip.py``) are built empty and filled by our own strict loader. Leaves out: tokenizing
(text.py), padding (the transformer's own business), and all about files."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ditkit.checkpoints.kinds.umt5 import UMT5_ALIASES
from ditkit.checkpoints.load import Device, identify_weights, load_into
from ditkit.checkpoints.views.source import TensorSource
from ditkit.contracts import Swap
from ditkit.errors import LoadError, RequestError, nearest
from ditkit.models.clip import build_clip
from ditkit.models.umt5 import build_umt5

PROCESSINGS = ("wan", "diffusers")

# Of the pictures that CLIP was trained on, R G B in [0, 1] (openai/CLIP ``clip/clip.py``).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Encoder:
    """``model`` is a filled network, ``identify`` tells what stands for its weights, its sizes and its
    dtype. Threads may share an encoder."""

    build: ClassVar[Any]
    aliases: ClassVar[Mapping[str, str]] = {}
    wide: ClassVar[tuple[str, ...]] = ()  # endings of names whose tensors are float32 where all others are float16

    def __init__(self, model: Any, identify: Callable[[], str], dtype: torch.dtype, device: Device):
        self.model, self.identify, self.dtype, self.device = model.eval(), identify, dtype, torch.device(device)

    @classmethod
    def load(
        cls,
        config: Any,
        source: TensorSource,
        dtype: torch.dtype = torch.float32,
        device: Device = "cpu",
        device_of: Callable[[str], Device] | None = None,
        swaps: Sequence[Swap] = (),
    ) -> Self:
        """``source`` has transformers' names; ``config``: an ``UMT5Config`` or a ``CLIPConfig``. Raises LoadError, also
        when not one name fits: no weight is ever left random."""
        model, wide = cls.build(config), cls.wide if dtype == torch.float16 else ()
        load_into(
            model, source, dtype_of=lambda name: torch.float32 if name.endswith(wide) else dtype,
            device_of=device_of or device, swaps=swaps, aliases=cls.aliases, check_finite=True,
        )  # fmt: skip
        return cls(model, identify_weights(source, dtype, config, swaps), dtype, device)

    @property
    def fingerprint(self) -> str:
        """Made when first asked for: it reads all files."""
        return self.identify()


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raises RequestError for no ids at all, LoadError for ids that the embedding does not have."""
    if not len(ids):
        raise RequestError("encoding a prompt", "it has no tokens", "Give at least the end token")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        found = f"the ids reach from {min(ids)} to {max(ids)} and it knows 0 to {vocab_size - 1}"
        raise LoadError("encoding a prompt with this text encoder", found, "Use the tokenizer of the same model")


class UMT5TextEncoder(Encoder):
    """Satisfies ``contracts.TextEncoder``. A prompt runs at its real length: padded keys are masked in the official
    code, so they change no row that is kept.

    With float16 the last linear layer of each feed-forward, ``DenseReluDense.wo``, stays float32, as in transformers
    itself, because its sums leave the range of float16."""

    build, aliases, wide = staticmethod(build_umt5), UMT5_ALIASES, (".DenseReluDense.wo.weight",)

    def __call__(self, ids: Sequence[int]) -> Tensor:
        """Ids of one prompt, unpadded -> [len(ids), D] in the encoder's dtype and on its device.

        Raises RequestError for no ids at all, LoadError for ids that the embedding does not have."""
        check_ids(ids, self.model.config.vocab_size)
        with torch.no_grad():
            batch = torch.tensor([list(ids)], dtype=torch.long, device=self.device)
            return self.model(batch)[0]


class CLIPImageEncoder(Encoder):
    """Satisfies ``contracts.ImageEncoder``: pictures -> one row of features a patch, and one for the whole.

    Wan takes what comes out of the last block but one, so the last block and the final norm are checked like all others
    when they are loaded, but never run."""

    build = staticmethod(build_clip)

    def __init__(self, model: Any, identify: Callable[[], str], dtype: torch.dtype, device: Device):
        super().__init__(model, identify, dtype, device)
        model.encoder.layers = model.encoder.layers[:-1]
        self.dim, self.image_size = model.config.hidden_size, model.config.image_size

    def encode(self, images: Tensor, processing: str) -> Tensor:
        """Pictures uint8 [B, H, W, 3] of any size -> features [B, tokens, width] in the encoder's dtype.

        ``processing`` is ``wan`` or ``diffusers``, see ``preprocess``. Raises RequestError."""
        return self(preprocess(images, self.image_size, processing))

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor) -> Tensor:
        """``pixel_values`` [B, 3, S, S], S = ``image_size``, normalised -> [B, tokens, width], the class token first.

        What transformers calls ``hidden_states[-2]``: after all blocks but the last, no final norm.
        Raises RequestError for another shape."""
        side = self.image_size
        if pixel_values.shape[1:] != (3, side, side):
            do = f"Give [B, 3, {side}, {side}], normalised"
            raise RequestError("encoding a picture", f"it is {list(pixel_values.shape)}", do)
        return self.model(pixel_values.to(self.device, self.dtype))


def preprocess(images: Tensor, size: int, processing: str) -> Tensor:
    """Pictures uint8 [B, H, W, 3] -> float32 [B, 3, size, size], normalised for CLIP, on the CPU.

    ``wan``: squeezed to a square, bicubic without antialiasing (Wan2.1 ``wan/modules/clip.py``).
    ``diffusers``: the shorter side becomes ``size`` by antialiased bicubic, then the middle square is cut out
    (transformers' ``CLIPImageProcessor`` with PIL, bit for bit). A wide picture loses its ends there.
    Raises RequestError for another name or another kind of picture."""
    if processing not in PROCESSINGS:
        found = f"it is {processing!r}{nearest(processing, PROCESSINGS)}"
        raise RequestError("choosing how pictures are prepared", found, f"Use {' or '.join(PROCESSINGS)}")
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[-1] != 3 or 0 in images.shape:
        found = f"they are {images.dtype} {list(images.shape)}"
        raise RequestError("preparing pictures for CLIP", found, "Give bytes of shape [B, H, W, 3]")
    images = images.cpu()
    if processing == "diffusers":
        return torch.stack([_cropped(image.numpy(), size) for image in images])
    x = images.permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5)
    x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False).mul(0.5).add(0.5)
    shape = (1, 3, 1, 1)
    return (x - torch.tensor(MEAN).view(shape)) / torch.tensor(STD).view(shape)


def _cropped(image: np.ndarray, size: int) -> Tensor:
    """uint8 [H, W, 3] -> float32 [3, size, size]."""
    from PIL import Image

    height, width = image.shape[:2]
    longer = int(size * max(height, width) / min(height, width))
    to = (size, longer) if width <= height else (longer, size)
    resized = np.asarray(Image.fromarray(image).resize(to, Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    square = resized[top : top + size, left : left + size]
    scaled = square / np.float32(255)
    return torch.from_numpy((scaled - np.array(MEAN, np.float32)) / np.array(STD, np.float32)).permute(2, 0, 1)


PROCESSOR = {
    "do_convert_rgb": (True,), "do_resize": (True,), "do_center_crop": (True,), "do_rescale": (True,),
    "do_normalize": (True,), "do_pad": (None, False), "resample": (3,), "rescale_factor": (1 / 255,),
    "image_mean": (list(MEAN),), "image_std": (list(STD),),
}  # fmt: skip
"""What ``preprocess`` does in the mode ``diffusers``, in the words of a ``preprocessor_config.json`` (3: bicubic)."""


def check_processor(config: Mapping[str, Any], size: int) -> None:
    """That the mode ``diffusers`` of ``preprocess`` is what a ``preprocessor_config.json`` asks for, at ``size``.

    A key that is not there means CLIP's default. Raises LoadError with the first key that says something else."""
    allowed = PROCESSOR | {
        "size": (size, {"shortest_edge": size}),
        "crop_size": (size, {"height": size, "width": size}),
    }
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            asked, found = "reading the image processor's config", f"its {key} is {config[key]!r}, not {values[-1]!r}"
            raise LoadError(asked, found, "Use image_processing=wan, or the config of a CLIP image processor")
