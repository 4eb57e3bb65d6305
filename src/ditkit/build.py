"""Setup -> components: find the model's folder, build each part on the meta device, fill it strictly, apply swaps.

The one place where model classes, their files, dtypes and devices come together. Leaves out: running (``pipe.py``).
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import threading
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ditkit.contracts import Swap
from ditkit.errors import LoadError, RequestError, SetupError, nearest
from ditkit.events import SILENT, Events
from ditkit.pipeline import Pipeline
from ditkit.request import Request
from ditkit.setup import Setup

ASSETS = Path(__file__).parent / "assets"
MODELS = {"shapes": ASSETS / "shapes"}
"""Models that come with the package, by name."""

_CLASSES = {"transformer": "WanTransformer3DModel", "vae": "AutoencoderKLWan", "text_encoder": "UMT5EncoderModel"}


@dataclass(frozen=True)
class Model:
    """A model's folder, opened: what is in it, and its own defaults for a Request (``ditkit.toml``)."""

    folder: Path
    flow_shift: float | None
    defaults: Mapping[str, Any]
    latents_rgb: LatentsRgb | None
    strides: tuple[int, int, int]
    patch: tuple[int, int, int]

    @classmethod
    def open(cls, name: str) -> Model:
        """``name`` is a model that comes with the package, or a folder in the Diffusers layout (``~`` is home).

        No weights are read. Raises LoadError."""
        from ditkit.checkpoints.diffusers_folder import (
            read_config,
            read_index,
            text_encoder_config,
            transformer_config,
            vae_config,
        )
        from ditkit.models.wan import WanConfig
        from ditkit.models.wan_vae import WanVAEConfig

        place = os.path.expanduser(name)
        if name not in MODELS and os.path.isfile(place):
            raise LoadError(
                f"model {name!r}", "it is a file, not a folder", "Give the folder that holds model_index.json"
            )
        if name not in MODELS and not (name and os.path.exists(place)):
            raise LoadError(
                f"model {name!r}",
                f"there is no folder and no model of that name{nearest(name, MODELS)}",
                f"Give a folder in the Diffusers layout, or one of {', '.join(MODELS)}",
            )
        folder = MODELS.get(name, Path(place))
        index = read_index(folder)
        for part, wanted in _CLASSES.items():
            found = index.components.get(part, ("", "nothing"))[1]
            if found != wanted:
                raise LoadError(
                    f"model {folder}", f"its {part} is {found}", f"A text-to-video model has a {wanted} there"
                )
        extra = {k: v for k, v in index.values.items() if v not in (None, False)}
        if "transformer_2" in index.components or extra:
            named = ", ".join(["transformer_2"] * ("transformer_2" in index.components) + sorted(extra))
            raise LoadError(
                f"model {folder}",
                f"its model_index.json names {named}",
                "Only Wan 2.1 text-to-video models run in this version",
            )
        vae = WanVAEConfig(**vae_config(read_config(folder / "vae")))
        transformer = WanConfig(**transformer_config(read_config(folder / "transformer")))
        text_dim = text_encoder_config(read_config(folder / "text_encoder"))["d_model"]
        for one, its, other, has in (
            ("text_dim of the transformer", transformer.text_dim, "d_model of the text encoder", text_dim),
            ("in_channels of the transformer", transformer.in_dim, "z_dim of the VAE", vae.z_dim),
            ("in_channels of the transformer", transformer.in_dim, "its out_channels", transformer.out_dim),
        ):
            if its != has:
                raise LoadError(
                    f"opening the model in {folder}", f"{one} is {its} and {other} is {has}", "Use parts of one model"
                )
        strides = vae.temporal_stride, vae.spatial_stride, vae.spatial_stride
        defaults, latents_rgb = _read_notes(
            folder / "ditkit.toml", strides[1] * transformer.patch_size[1], strides[0], transformer.in_dim
        )
        return cls(
            folder,
            _flow_shift(folder),
            defaults,
            latents_rgb,
            strides,
            transformer.patch_size,
        )

    @functools.cached_property
    def identity(self) -> str:
        """Stands for the configs, the weights and the tokenizer, wherever the folder lies; a State remembers it.

        Made when first asked for, in milliseconds: of the weights it takes the headers, the sizes and samples of the
        data. Full hashes are in the components' fingerprints and in the manifest. Raises LoadError."""
        from ditkit.checkpoints.diffusers_folder import read_config
        from ditkit.checkpoints.files import TensorFiles, file_sample

        parts = [(read_config(self.folder / part), TensorFiles(self.folder / part).sketch) for part in sorted(_CLASSES)]
        about = [parts, file_sample(self.folder / "tokenizer" / "tokenizer.json")]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def request(self, values: Mapping[str, Any], origin: str = "request") -> Request:
        """A Request with this model's defaults, checked against its sizes."""
        defaults = dict(self.defaults)
        if values.get("schedule", defaults.get("schedule")) == "diffusers" and self.flow_shift is not None:
            defaults.setdefault("shift", self.flow_shift)  # the convention's own default is the one in the folder
        request = Request.of(values, defaults, origin)
        request.check_size(self.strides[1] * self.patch[1], self.strides[0])
        return request


def _flow_shift(folder: Path) -> float | None:
    """The shift in the folder's scheduler_config.json, which is the default of the diffusers convention."""
    from ditkit.checkpoints.diffusers_folder import read_config

    if not (folder / "scheduler").is_dir():
        return None
    config = read_config(folder / "scheduler", "scheduler_config.json")
    shift = config.get("flow_shift", config.get("shift"))
    return float(shift) if isinstance(shift, int | float) and shift > 0 else None


LatentsRgb = tuple[list[list[float]], list[float]]


def _read_notes(file: Path, multiple: int, temporal: int, channels: int) -> tuple[dict[str, Any], LatentsRgb | None]:
    """The defaults and the preview's matrix in a ``ditkit.toml``; each is checked as if it had been asked for.

    ``multiple`` and ``temporal``: what sides and frames are made of; ``channels`` of the latents. Raises LoadError."""
    asked = f"reading {file}"
    if not file.exists():
        return {}, None
    try:
        notes = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise LoadError(asked, f"it cannot be read ({e.strerror})", "Check the file and its permissions") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValueError) as e:
        raise LoadError(asked, f"it is not valid TOML ({e})", "Correct it") from None
    except RecursionError:
        raise LoadError(asked, "its lists are nested too deeply", "Correct it") from None
    if unknown := set(notes) - {"defaults", "preview"}:
        raise LoadError(asked, f"it has unknown tables {', '.join(sorted(unknown))}", "Use [defaults] and [preview]")
    for name, table in notes.items():
        if not isinstance(table, dict):
            raise LoadError(asked, f"{name} is {table!r}, not a table", f"Write [{name}] above its keys")
    defaults, preview = notes.get("defaults", {}), notes.get("preview")
    fitting = {"width": multiple, "height": multiple, "frames": 1}  # so that only a fault of the file is found
    try:
        request = Request.parse(fitting | defaults, str(file), LoadError)
        request.samples()
        request.check_size(multiple, temporal)
    except RequestError as e:
        raise LoadError(f"{e.asked} ({file})", e.found, e.do) from None
    if preview is None:
        return defaults, None
    factors, bias = preview.get("factors"), preview.get("bias")
    if set(preview) != {"factors", "bias"} or not (_is_row(bias) and _is_matrix(factors, channels)):
        raise LoadError(
            asked,
            f"its [preview] does not consist of factors, {channels} rows of 3 numbers, and bias, 3 numbers",
            "Correct it, or remove [preview]",
        )
    return defaults, (factors, bias)


def _is_row(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 3 and all(type(x) in (int, float) and math.isfinite(x) for x in value)
    )


def _is_matrix(value: Any, rows: int) -> bool:
    return isinstance(value, list) and len(value) == rows and all(map(_is_row, value))


class Components(Mapping[str, Any]):
    """The parts of a model, each loaded when it is first asked for, once, whichever thread asks.

    ``describe()`` tells of each loaded part its class, dtype, device, policy and files."""

    def __init__(self, model: Model, setup: Setup, swaps: tuple[Swap, ...] = ()):
        self.model, self.setup, self.swaps = model, setup, swaps
        self._loaders: dict[str, Callable[[], Any]] = {
            "tokenizer": self._tokenizer,
            "text_encoder": self._text_encoder,
            "transformer": self._transformer,
            "vae": self._vae,
        }
        self._loaded: dict[str, Any] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        self._lock = threading.RLock()

    def __getitem__(self, name: str) -> Any:
        return self.get_component(name, SILENT)

    def get_component(self, name: str, events: Events) -> Any:
        with self._lock:
            if name not in self._loaded:
                with events.span("load", component=name):
                    self._loaded[name] = self._loaders[name]()
            return self._loaded[name]

    def listening(self, events: Events) -> Mapping[str, Any]:
        """The same components; ``events`` hears of those that are loaded through this view."""
        return _Listening(self, events)

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)

    def describe(self) -> dict[str, dict[str, Any]]:
        with self._lock:
            return {name: {**facts, "files": facts["files"]()} for name, facts in self._facts.items()}

    def _note(
        self, name: str, component: Any, dtype: str, device: str, files: Callable[[], dict[str, str]], **more: Any
    ) -> None:
        self._facts[name] = {
            "class": type(component).__name__,
            "dtype": dtype,
            "device": device,
            "files": files,
            **more,
        }

    def _tokenizer(self) -> Any:
        from ditkit.checkpoints.files import file_hash
        from ditkit.models.text import WanTokenizer

        file = self.model.folder / "tokenizer" / "tokenizer.json"
        tokenizer = WanTokenizer(file.parent)
        self._note("tokenizer", tokenizer, "none", "cpu", lambda: {file.name: file_hash(file)})
        return tokenizer

    def _place(self, name: str) -> tuple[Any, str]:
        import torch

        return getattr(torch, self.setup.dtype_of(name)), self.setup.device_of(name)

    def _text_encoder(self) -> Any:
        from ditkit.checkpoints.diffusers_folder import read_config, text_encoder_config
        from ditkit.checkpoints.files import TensorFiles
        from ditkit.models.umt5 import UMT5Config, UMT5TextEncoder

        folder = self.model.folder / "text_encoder"
        files = TensorFiles(folder)
        config = UMT5Config(**text_encoder_config(read_config(folder), files.tensors))
        dtype, device = self._place("text_encoder")
        encoder = UMT5TextEncoder.load(config, files, None, dtype, device)
        self._note("text_encoder", encoder, self.setup.dtype_of("text_encoder"), device, lambda: files.sha256)
        return encoder

    def _transformer(self) -> Any:
        import torch

        from ditkit.checkpoints.diffusers_folder import read_config, transformer_config
        from ditkit.checkpoints.files import TensorFiles
        from ditkit.checkpoints.keys import transformer_keys
        from ditkit.checkpoints.load import load_into
        from ditkit.models.wan import WanConfig, WanTransformer
        from ditkit.nn.precision import precision

        folder = self.model.folder / "transformer"
        files = TensorFiles(folder)
        config = WanConfig(**transformer_config(read_config(folder), files.tensors))
        dtype, device = self._place("transformer")
        policy = precision(self.setup.precision, dtype)
        with torch.device("meta"):
            module = WanTransformer(config, policy).eval().requires_grad_(False)
        names = transformer_keys(config.num_layers).to_native
        load_into(module, files, names, dtype_of=policy.weight_dtype, device=device, check_finite=True)
        apply_swaps(module, self.swaps)
        module.identify = identity(
            files, [asdict(config), self.setup.precision, str(dtype), [s.fingerprint for s in self.swaps]]
        )
        self._note(
            "transformer",
            module,
            self.setup.dtype_of("transformer"),
            device,
            lambda: files.sha256,
            precision=self.setup.precision,
            attention=self.setup.attention,
            swaps=[s.name for s in self.swaps],
        )
        return module

    def _vae(self) -> Any:
        import torch

        from ditkit.checkpoints.diffusers_folder import read_config, vae_config
        from ditkit.checkpoints.files import TensorFiles
        from ditkit.checkpoints.keys import vae_keys
        from ditkit.checkpoints.load import load_into
        from ditkit.models.wan_vae import WanVAE, WanVAEConfig

        folder = self.model.folder / "vae"
        files = TensorFiles(folder)
        config = WanVAEConfig(**vae_config(read_config(folder), files.tensors))
        dtype, device = self._place("vae")
        with torch.device("meta"):
            module = WanVAE(config).eval().requires_grad_(False)
        names = vae_keys(len(config.dim_mult), config.num_res_blocks).to_native
        load_into(module, files, names, dtype_of=lambda name: dtype, device=device, check_finite=True)
        module.identify = identity(files, [asdict(config), str(dtype)])
        self._note("vae", module, self.setup.dtype_of("vae"), device, lambda: files.sha256)
        return module


class _Listening(Mapping[str, Any]):
    def __init__(self, components: Components, events: Events):
        self._components, self._events = components, events

    def __getitem__(self, name: str) -> Any:
        return self._components.get_component(name, self._events)

    def __iter__(self) -> Iterator[str]:
        return iter(self._components)

    def __len__(self) -> int:
        return len(self._components)


def identity(files: Any, how: list[Any]) -> Callable[[], str]:
    """A hash over the weights and how they compute, made when first asked for (it reads all files)."""

    @functools.cache
    def identify() -> str:
        return hashlib.sha256(json.dumps([files.fingerprint, *how], sort_keys=True).encode()).hexdigest()

    return identify


def apply_swaps(module: Any, swaps: tuple[Swap, ...]) -> None:
    """Seam C: replace every module that a swap matches. Raises SetupError for a swap that matches none."""
    for swap in swaps:
        found = [name for name, child in module.named_modules() if name and swap.match(name, child)]
        if not found:
            raise SetupError(
                f"swap {swap.name!r}", "it matches no module of the transformer", "Compare with named_modules()"
            )
        for name in found:
            parent, _, leaf = name.rpartition(".")
            owner = module.get_submodule(parent)
            setattr(owner, leaf, swap.make(module.get_submodule(name)))


def text_to_video(model: Model, setup: Setup) -> Pipeline:
    """The stages of Wan 2.1 text-to-video."""
    from ditkit.stages.decode_latents import DecodeLatents
    from ditkit.stages.denoise import Denoise
    from ditkit.stages.encode_text import EncodeText

    return Pipeline(
        [
            EncodeText(),
            Denoise(model.strides, setup.attention, setup.remember_text),
            DecodeLatents(setup.vae_frames_per_chunk),
        ]
    )
