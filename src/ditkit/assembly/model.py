"""Model: the parts that a name, a folder, a file or a manifest stands for, understood and held against each other.

Only headers and configs are read. Leaves out: how parts are found (``checkpoints/model/find.py``) and filled with
weights (``components.py``).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditkit.assembly.notes import LatentsRgb, check_defaults, check_preview
from ditkit.assembly.tasks import TASKS
from ditkit.checkpoints.kinds.kind import KINDS
from ditkit.checkpoints.model.find import at_host, find
from ditkit.checkpoints.model.part import FoundModel, Part, Scope, main_of
from ditkit.errors import LoadError, RequestError
from ditkit.pictures import FIELDS as PICTURES
from ditkit.registry import resolve
from ditkit.request import Request

if TYPE_CHECKING:
    from ditkit.setup import Setup


@dataclass(frozen=True)
class Model:
    """``task``: t2v, i2v, flf2v, ti2v or vace; empty where no transformer is known. ``strides``: pixels to latents as
    (frames, height, width); ``patch``: latents to tokens. ``parts`` are on this machine, ``elsewhere`` are at hosts."""

    name: str
    path: Path | str
    parts: Mapping[str, Part]
    task: str
    flow_shift: float | None
    own_defaults: Mapping[str, Any]
    latents_rgb: LatentsRgb | None
    strides: tuple[int, int, int]
    patch: tuple[int, int, int]
    boundary: float | None = None

    processor: Mapping[str, Any] | None = None
    verify: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    elsewhere: Mapping[str, Part] = field(default_factory=dict)

    @classmethod
    def open(cls, name: str, setup: Setup | None = None, *, scope: Scope | None = None) -> Model:
        """``name``: a model that comes with the package, a folder of any layout, a single file, a manifest, or
        ``hf:OWNER/NAME@REVISION``. ``setup`` may put other files in the place of single parts. ``scope``: which parts
        have to be here, and who is asked for the others.

        No weights are read. Raises LoadError, and what a host that is asked has to say."""
        return cls._of(name, find(name, setup, scope), setup)

    @classmethod
    def at(cls, address: str, about: Mapping[str, Any], setup: Setup, scope: Scope) -> Model:
        """The model that the host at ``address`` speaks of; ``about`` is the ``model`` of its description. Raises
        LoadError."""
        return cls._of(address, at_host(address, about, setup, scope), setup)

    @classmethod
    def _of(cls, name: str, found: FoundModel, setup: Setup | None) -> Model:
        located = found.located.check()
        known = {**located.elsewhere, **located.parts}
        strides, patch = geometry(known)
        main, vae = main_of(known), known.get("vae")
        if (
            setup
            and "image_encoder" in setup.components
            and main
            and "image_encoder" not in main.row.needs(main.config)
        ):
            found_ = "its transformer has no image branch"
            raise LoadError(f"opening {name} with an image_encoder", found_, "Leave the part out")
        defaults = check_defaults(found.tables.get("defaults", {}), found.file, strides[1] * patch[1], strides[0])
        rgb = None
        if vae is not None:
            channels = vae.row.ports(vae.row.config(vae.config))["latent channels"].width or 0
            rgb = check_preview(found.tables.get("preview"), found.file, channels) or official_preview(vae, channels)
        return cls(
            name, located.path, located.parts, located.task or "", found.flow_shift, defaults, rgb, strides, patch,
            located.boundary, found.processor, found.verify, located.elsewhere,
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """What a host says of its model, in plain values: ``model``, the whole, and ``parts``, of each that is here its
        kind, its sizes and an identity that is told in milliseconds. ``remote_parts.py`` reads it."""
        preview = None if self.latents_rgb is None else dict(zip(("factors", "bias"), self.latents_rgb, strict=True))
        parts = {
            name: {"kind": part.row.pinned, "config": dict(part.config), "layout": part.layout,
                   "quantization": part.quantization, "notes": list(part.notes), "identity": self.identities[name]}
            for name, part in self.parts.items()
        }  # fmt: skip
        about = {
            "name": self.name, "task": self.task, "boundary": self.boundary, "flow_shift": self.flow_shift,
            "defaults": dict(self.own_defaults), "preview": preview, "processor": self.processor,
        }  # fmt: skip
        return {"model": about, "parts": parts}

    @property
    def known(self) -> dict[str, Part]:
        """All parts, wherever they lie."""
        return {**self.elsewhere, **self.parts}

    @property
    def experts(self) -> tuple[str, ...]:
        return ("transformer", "transformer_2") if "transformer_2" in self.known else ("transformer",)

    @property
    def main(self) -> Part:
        """The transformer; of two, the first that is known."""
        return main_of(self.known) or self.known["transformer"]

    @property
    def network(self) -> Any:
        """The class of the transformer, for what it says of itself without weights: ``timestep_scale``, ``reads``,
        ``cfg``. Wan's where no transformer is known."""
        part = main_of(self.known)
        return resolve((KINDS["wan"] if part is None else part.row).module)

    @property
    def has_image_branch(self) -> bool:
        return "image_encoder" in self.main.row.needs(self.main.config)

    @functools.cached_property
    def defaults(self) -> dict[str, Any]:
        """What a Request is filled with: the official values of the task, and above them the model's own."""
        return self.defaults_for({})

    def defaults_for(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The same for a request of these ``values``: some defaults follow from others."""
        return {**self.family_defaults_for(values), **self.own_defaults}

    def family_defaults_for(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The official ones of the task, without the model's own."""
        own = self.own_defaults
        found = TASKS[self.task].sampling(len(self.experts), {**own, **values})
        if self.boundary is not None:
            found["boundary"] = self.boundary
        if values.get("convention", own.get("convention")) == "diffusers" and self.flow_shift is not None:
            found["shift"] = self.flow_shift  # the convention's own default is the one in the folder
        return found

    @functools.cached_property
    def identities(self) -> dict[str, str]:
        """Stands for each part's config, weights or vocabulary, wherever they lie; a State remembers it.

        Made when first asked for, in milliseconds: of the weights it takes the headers, the sizes and samples of the
        data. Full hashes are in the components' fingerprints and in the manifest. Raises LoadError."""
        from ditkit.checkpoints.files.stored import file_sample

        found: dict[str, str] = {}
        for name, part in sorted(self.known.items()):
            if part.place is not None:
                found[name] = str(part.told["identity"])
                continue
            sketch = part.source.sketch if part.source else file_sample(vocabulary(part))
            about = json.dumps([part.row.pinned, dict(part.config), sketch], sort_keys=True)
            found[name] = hashlib.sha256(about.encode()).hexdigest()
        return found

    @functools.cached_property
    def identity(self) -> str:
        """That of all parts together, but for a preview decoder, on which no clip depends."""
        about = {name: identity for name, identity in self.identities.items() if name != "preview_decoder"}
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def request(self, values: Mapping[str, Any], origin: str = "request") -> Request:
        """A Request with this model's defaults, checked against its sizes and its task."""
        request = Request.of(values, self.defaults_for(values), origin)
        if request.size_from == "request" or request.image is None:
            request.check_size(self.strides[1] * self.patch[1], self.strides[0])
        self.check(request)
        return request

    def fit(self, request: Request, pictures: Mapping[str, Any]) -> Request:
        """``request`` with the size that its image asks for, where it goes by the image: the same area, the image's
        proportions, as the official code of the task makes them. ``pictures``: arrays by field."""
        if request.size_from == "request" or "image" not in pictures:
            return request.model_copy(update={"size_from": "request"})
        from ditkit.conditioning.sizes import size_i2v, size_ti2v

        height, width = pictures["image"].shape[:2]
        rule = size_ti2v if self.task == "ti2v" else size_i2v
        wide, high = rule(width, height, request.width * request.height)
        fitted = request.model_copy(update={"width": wide, "height": high, "size_from": "request"})
        fitted.check_size(self.strides[1] * self.patch[1], self.strides[0])
        return fitted

    def check(self, request: Request) -> None:
        """Raises RequestError for inputs that the task has no use for, and for settings that would be ignored."""
        asked = f"a run of {self.name}"
        task = TASKS[self.task]
        for name in PICTURES:
            if getattr(request, name) and name not in task.inputs:
                takes = ", ".join(task.inputs) or "text alone"
                raise RequestError(f"{asked} with {name}", f"its model takes {takes}", f"Leave {name} out")
        for name in task.needed:
            if not getattr(request, name):
                raise RequestError(f"{asked} without {name}", f"its model goes on from {name}", f"Give {name}=FILE")
        if request.image_processing == "diffusers" and self.processor is not None and self.has_image_branch:
            from ditkit.models.encoders import check_processor

            check_processor(self.processor, self.known["image_encoder"].config["image_size"])
        if request.size_from == "image" and "image" not in task.inputs:
            raise RequestError(f"{asked} with size_from=image", "its model takes no image", "Give width and height")
        if request.control_scale != 1 and "control_video" not in task.inputs:
            raise RequestError(f"{asked} with control_scale", "its model takes no control", "Leave it out")


def geometry(parts: Mapping[str, Part]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(strides, patch). A host without the VAE has the strides of the published one that its transformer needs; a job
    brings its own. Raises LoadError for a VAE whose kind says none."""
    main, vae = main_of(parts), parts.get("vae")
    patch = main.row.patch(main.row.config(main.config)) if main and main.row.patch else (1, 2, 2)
    usual = "wan_vae" if main is None else main.row.needs(main.config).get("vae", "wan_vae")
    kind, fields = (KINDS[usual], {}) if vae is None else (vae.row, vae.config)
    if kind.strides is None:
        raise LoadError(f"using a {kind.name} as vae", "its kind says no strides", "Give them in its row")
    return kind.strides(kind.config(fields)), patch


def official_preview(vae: Part, channels: int) -> LatentsRgb | None:
    """The known preview of latents; None for those that the published models do not know."""
    published = all(vae.config.get(key, value) == value for key, value in vae.row.unsaid.items())
    return resolve(vae.row.preview)(channels) if vae.row.preview and published else None


def vocabulary(part: Part) -> Path:
    return part.path / "tokenizer.json" if part.path.is_dir() else part.path
