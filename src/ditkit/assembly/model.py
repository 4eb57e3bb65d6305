"""Model: the parts that a name, a folder, a file or a manifest stands for, understood and held against each other.

Only headers and configs are read. A State remembers a short identity of each part. It belongs to its transformers; any
other part may be exchanged until a stage has used it, and afterwards as long as that stage runs once more. Leaves out:
finding parts (``checkpoints/model``), and filling them with weights (``components.py``)."""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ditkit.assembly.tasks import TASKS
from ditkit.checkpoints.kinds.kind import KINDS
from ditkit.checkpoints.model.find import at_host, find
from ditkit.checkpoints.model.part import ModelParts, Part, Scope, main_of
from ditkit.conditioning.sizes import size_i2v, size_ti2v
from ditkit.contracts import EXPERTS
from ditkit.errors import DitkitError, LoadError, RequestError, StateError
from ditkit.execution.stage_list import Stage, StageList
from ditkit.pictures import FIELDS as PICTURES
from ditkit.registry import resolve
from ditkit.request import Request, drawn, renamed
from ditkit.setup import Setup
from ditkit.state import State

LatentsRgb = tuple[Sequence[Sequence[float]], Sequence[float]]
"""Factors, a row of three for each channel of the latents, and bias: a preview by one matrix."""


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
    def open(cls, name: str, setup: Setup | None = None, *, scope: Scope | None = None) -> Self:
        """``name``: a model that comes with the package, a folder of any layout, a single file, a manifest, or
        ``hf:OWNER/NAME@REVISION``. ``setup`` may put other files in the place of single parts. ``scope``: which parts
        have to be here, and who is asked for the others.

        No weights are read. Raises LoadError, and what a host that is asked has to say."""
        return cls._of(name, find(name, setup, scope), setup)

    @classmethod
    def at(cls, address: str, about: Mapping[str, Any], setup: Setup, scope: Scope) -> Self:
        """The model that the host at ``address`` speaks of; ``about`` is the ``model`` of its description. Raises
        LoadError, also for what nobody can make a model of."""
        try:
            return cls._of(address, at_host(address, about, setup, scope), setup)
        except DitkitError:
            raise
        except Exception as e:
            asked, found = f"taking the model from {address}", f"what it says of it is damaged ({type(e).__name__})"
            raise LoadError(asked, found, "Use the same version of ditkit on both machines") from None

    @classmethod
    def _of(cls, name: str, found: ModelParts, setup: Setup | None) -> Self:
        known = {**found.check().elsewhere, **found.parts}
        strides, patch = geometry(known)
        main, vae = main_of(known), known.get("vae")
        given = setup.components if setup else {}
        if "image_encoder" in given and main and "image_encoder" not in main.row.needs(main.config):
            asked = f"opening {name} with an image_encoder"
            raise LoadError(asked, "its transformer has no image branch", "Leave the part out")
        defaults = check_defaults(found.tables.get("defaults", {}), found.file, strides[1] * patch[1], strides[0])
        rgb = None if vae is None else preview_of(vae, found.tables.get("preview"), found.file)
        return cls(
            name, found.path, found.parts, found.task or "", found.flow_shift, defaults, rgb, strides, patch,
            found.boundary, found.processor, found.verify, found.elsewhere,
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
        return EXPERTS if "transformer_2" in self.known else EXPERTS[:1]

    @property
    def network(self) -> Any:
        """The class of the transformer, for what it says of itself without weights: ``timestep_scale``, ``reads``,
        ``cfg``. Wan's where no transformer is known."""
        part = main_of(self.known)
        return resolve((KINDS["wan"] if part is None else part.row).module)

    @property
    def has_image_branch(self) -> bool:
        part = main_of(self.known)
        return part is not None and "image_encoder" in part.row.needs(part.config)

    def defaults_for(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What a Request of these ``values`` is filled with: the official values of the task, and above them the
        model's own. Some follow from others."""
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

        def identity(part: Part) -> str:
            if part.place is not None:
                return str(part.told["identity"])
            sketch = part.source.sketch if part.source else file_sample(vocabulary(part))
            return _hash([part.row.pinned, dict(part.config), sketch])

        return {name: identity(part) for name, part in sorted(self.known.items())}

    @functools.cached_property
    def identity(self) -> str:
        """That of all parts together, but for a preview decoder, on which no clip depends."""
        return _hash({name: identity for name, identity in self.identities.items() if name != "preview_decoder"})

    def request(self, values: Mapping[str, Any]) -> Request:
        """A Request with this model's defaults, checked against its sizes and its task."""
        values = drawn(values)
        Request.parse(values, "request", RequestError)  # what follows from them is worked out with sound ones
        request = Request.of({**self.defaults_for(values), **values})
        if request.size_from == "request" or request.image is None:
            self.check_size(request)
        self.check(request)
        return request

    def fit(self, request: Request, pictures: Mapping[str, Any]) -> Request:
        """``request`` with the size that its image asks for, where it goes by the image: the same area, the image's
        proportions, as the official code of the task makes them. ``pictures``: arrays by field."""
        if request.size_from == "request" or "image" not in pictures:
            return request.model_copy(update={"size_from": "request"})
        height, width = pictures["image"].shape[:2]
        rule = size_ti2v if self.task == "ti2v" else size_i2v
        wide, high = rule(width, height, request.width * request.height)
        fitted = request.model_copy(update={"width": wide, "height": high, "size_from": "request"})
        self.check_size(fitted)
        return fitted

    def check_size(self, request: Request) -> None:
        """Raises RequestError for a size that its networks cannot make."""
        request.check_size(self.strides[1] * self.patch[1], self.strides[0])

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
        for name, neutral in (("control_scale", 1), ("control_timing", "auto")):
            if getattr(request, name) != neutral and "control_video" not in task.inputs:
                raise RequestError(f"{asked} with {name}", "its model takes no control", "Leave it out")


def model_field(name: str, model: Model) -> dict[str, Any]:
    """What a State says of its model; of a preview decoder nothing, as no result depends on it."""
    return {"name": name, "parts": {n: i for n, i in model.identities.items() if n != "preview_decoder"}}


def check_begun(state: State, name: str, model: Model, pipeline: StageList, planned: Iterable[Stage]) -> None:
    """``planned``: the stages that will run. Raises StateError that names the parts."""
    begun = state.get("model", {})
    then, now, again = begun.get("parts"), model.identities, {stage.name for stage in planned}
    if then is None:  # an older State knows all of its parts as one
        others = ["one or more parts"] if begun.get("identity", model.identity) != model.identity else []
    else:
        finished = [s for s in pipeline.stages if s.name in state.get("stages", []) and s.name not in again]
        used = dict.fromkeys((*EXPERTS, *(n for stage in finished for n in stage.components)))
        others = [n for n in used if n in then and then[n] != now.get(n, then[n])]
    if not others:
        return
    another = f"another {' and another '.join(others)}"
    found = f"it was begun with other files of it or with other parts: {another}"
    do = "Load it with the same files and parts"
    if begun.get("name") != name:
        found, do = f"it was begun with another model, {begun.get('name')}, which has {another}", "Load that one"
    if then is not None and not {*EXPERTS} & {*others}:
        stages = [s.name for s in pipeline.stages if {*s.components} & {*others} and s.name in state.get("stages", [])]
        do += f", or run it once more from {stages[0]}"
    raise StateError(f"running a State with model {name}", found, do)


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


def check_defaults(defaults: Mapping[str, Any], file: Path, multiple: int, temporal: int) -> dict[str, Any]:
    """``[defaults]`` of the model's own notes, each as if it had been asked for. ``multiple`` and ``temporal``: what
    sides and frames are made of. Raises LoadError."""
    fitting = {"width": multiple, "height": multiple, "frames": 1}  # so that only a fault of the file is found
    try:
        request = Request.parse(drawn({**fitting, **defaults}), str(file), LoadError)
        request.samples()
        request.check_size(multiple, temporal)
    except RequestError as e:
        raise LoadError(f"{e.asked} ({file})", e.found, e.do) from None
    return renamed(defaults)


def preview_of(vae: Part, table: Mapping[str, Any] | None, file: Path) -> LatentsRgb | None:
    """``[preview]`` of the model's own notes; else what is known of published latents, None of others. Raises
    LoadError."""
    channels = vae.row.ports(vae.row.config(vae.config))["latent channels"].width or 0
    if table is None:
        published = all(vae.config.get(key, value) == value for key, value in vae.row.unsaid.items())
        return resolve(vae.row.preview)(channels) if vae.row.preview and published else None
    factors, bias = table.get("factors"), table.get("bias")
    rows = [*factors, bias] if isinstance(factors, list) else []
    if {*table} != {"factors", "bias"} or len(rows) != channels + 1 or not all(map(_is_row, rows)):
        found = f"its [preview] does not consist of factors, {channels} rows of 3 numbers, and bias, 3 numbers"
        raise LoadError(f"reading {file}", found, "Correct it, or remove [preview]")
    return tuple(map(tuple, rows[:-1])), tuple(rows[-1])


def _is_row(value: Any) -> bool:
    numbers = isinstance(value, list) and all(type(x) in (int, float) and math.isfinite(x) for x in value)
    return numbers and len(value) == 3


def _hash(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def vocabulary(part: Part) -> Path:
    return part.path / "tokenizer.json" if os.path.isdir(part.path) else part.path
