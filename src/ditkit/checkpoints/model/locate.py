"""The parts of a model on disk, opened but not read: what each is, its sizes, and its tensors under the module's names.

``open_part`` opens one component, a file or a folder in any layout. ``locate`` finds all parts of a model: in a folder
of diffusers by the names in its index, in a native folder by what its files hold, for a single file that file alone.
What is missing or does not fit is in ``ModelParts.problems``, each one a sentence of what was looked for, where, and
how to get it. Only headers are read. Leaves out: manifests (manifest.py), building modules, and LoRAs (lora.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ditkit.checkpoints.files.formats import INDEX, OTHERS, read_shards
from ditkit.checkpoints.files.opening import open_source, split_entry
from ditkit.checkpoints.files.text import read_json, readable, some
from ditkit.checkpoints.kinds.configs import note_unknown
from ditkit.checkpoints.kinds.detect import Detected, bare, recognise
from ditkit.checkpoints.kinds.diffusers_folder import read_index
from ditkit.checkpoints.kinds.keys import table_of
from ditkit.checkpoints.kinds.sizes import Tensors
from ditkit.checkpoints.kinds.table import SIZES, config_of, kind_of_config, task_of
from ditkit.checkpoints.model.side_configs import check_tokenizer, flow_shift, processor_config
from ditkit.checkpoints.views.mapped import Mapped
from ditkit.checkpoints.views.source import TensorSource, notes_of
from ditkit.errors import LoadError, nearest

KINDS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "transformer": ("wan",),
    "transformer_2": ("wan",),
    "vae": ("wan_vae", "wan_vae22", "taehv"),
    "text_encoder": ("umt5",),
    "image_encoder": ("clip",),
    "preview_decoder": ("taehv",),
})  # fmt: skip
"""Component -> the kinds that it may be."""

COMPONENT_OF: Mapping[str, str] = MappingProxyType({
    "wan": "transformer", "wan_vae": "vae", "wan_vae22": "vae", "umt5": "text_encoder", "clip": "image_encoder",
    "taehv": "preview_decoder",
})  # fmt: skip
THEIR_SIDE = ("umt5", "clip")  # kinds whose modules have transformers' names
WITHOUT_WEIGHTS = ("scheduler", "image_processor", "feature_extractor", "video_processor")
"""Components of an index that we have no use for: our own code does what they do."""

EXPERTS: Mapping[str, str] = MappingProxyType({
    "high_noise_model": "transformer", "low_noise_model": "transformer_2",
})  # fmt: skip
"""Folder of the native layout -> component, by diffusers' rule that ``transformer`` is the one for high noise."""

BOUNDARIES: Mapping[str, float] = MappingProxyType({"t2v": 0.875, "i2v": 0.9})
"""Task -> the sigma at which the second expert takes over (Wan2.2 ``wan/configs/wan_{t2v,i2v}_A14B.py``)."""

NATIVE_TOKENIZER = Path("google", "umt5-xxl")


@dataclass(frozen=True)
class Part:
    """One component. ``config``: keywords of the kind's config class. ``source``: tensors under the names of our
    module (transformers' own for umt5 and clip), without scales; None for a tokenizer. ``layout`` is the file's.
    ``notes``: what was left out or chosen on the way, in plain words.

    A part that lies at a host has the host's address as its ``place``, no source, and in ``told`` what that host says
    of it besides."""

    component: str
    kind: str
    path: Path
    config: Mapping[str, Any]
    source: TensorSource | None
    layout: str
    quantization: str | None = None
    detected: Detected | None = None
    notes: tuple[str, ...] = ()
    place: str | None = None
    told: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scope:
    """Which parts of a model matter on this machine.

    ``only``: those that are opened; None for all. Of two experts one is enough then. ``elsewhere``: of parts that may
    lie at a host, what asks that host (None: it has no such part); one that is here, or that the model does not need,
    is not asked for. ``meant``: those of them that are to be the host's, whatever lies here. ``experts``: transformers
    that the user named: a second one is asked for."""

    only: Collection[str] | None = None
    elsewhere: Mapping[str, Callable[[], Part | None]] = field(default_factory=dict)
    meant: Collection[str] = ()
    experts: Collection[str] = ()

    def opens(self, name: str) -> bool:
        return name not in self.meant and (self.only is None or name in self.only)


WHOLE = Scope()


@dataclass(frozen=True)
class ModelParts:
    """A model's parts: ``parts`` are here, ``elsewhere`` at hosts. ``boundary``: the sigma below which
    ``transformer_2`` runs. ``expand_timesteps``: each token has its own timestep. ``unused``: files beside the parts,
    and why they are none. ``problems``: what keeps the model from running; ``check`` raises the first."""

    path: Path | str
    layout: str
    parts: Mapping[str, Part]
    task: str | None = None
    boundary: float | None = None
    expand_timesteps: bool = False
    unused: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[LoadError, ...] = ()
    elsewhere: Mapping[str, Part] = field(default_factory=dict)

    def check(self) -> ModelParts:
        if self.problems:
            raise self.problems[0]
        return self


def open_part(
    path: str | Path,
    component: str | None = None,
    variant: str | None = None,
    *,
    entry: str | None = None,
    allow: Collection[str] = (),
) -> Part:
    """The component in ``path``, a file of weights or a folder with one set of them (or with a tokenizer).

    ``component``: what it must be; None takes what is found. ``variant`` and ``entry`` as for ``open_source``;
    ``allow``: rules of ``layouts.config_of``. A ``config.json`` beside the weights is used when it is theirs; in a
    folder of their own another one is an error. Raises LoadError."""
    path = Path(os.path.expanduser(path))
    with readable(f"opening {path}"):
        return _open_part(path, component, variant, entry, allow)


def _open_part(
    path: Path, component: str | None, variant: str | None, entry: str | None, allow: Collection[str]
) -> Part:
    if component == "tokenizer":
        return _tokenizer(path, allow)
    if component is not None and component not in KINDS:
        raise LoadError(
            f"opening {path} as {component!r}",
            f"there is no such component{nearest(component, [*KINDS, 'tokenizer'])}",
            f"Choose one of {', '.join(KINDS)}, tokenizer",
        )
    source = open_source(path, variant, entry)
    return _part(source, component, _config_beside(path, source), allow)


def _part(
    source: TensorSource, component: str | None, beside: tuple[Path, dict[str, Any], bool] | None,
    allow: Collection[str] = (),
) -> Part:  # fmt: skip
    asked = f"opening {source.path}" + (f" as {component}" if component else "")
    found, view = recognise(source)
    if found.kind not in COMPONENT_OF:
        raise LoadError(asked, found.problems[0] if found.problems else f"it is a {found.kind}", "Give a model's part")
    if component is not None and found.kind not in KINDS[component]:
        raise LoadError(asked, f"its tensors are those of {found.kind}", f"Give {' or '.join(KINDS[component])}")
    if found.problems:
        raise LoadError(asked, found.problems[0], "Use a model of a supported kind")
    tensors = bare(found.kind, view.tensors)
    notes: list[str] = []
    config = _config(found, view, tensors, beside, allow, notes)
    return Part(
        component or COMPONENT_OF[found.kind], found.kind, source.path, MappingProxyType(config),
        under_module_names(view, found.kind, found.layout, config), found.layout, found.quantization, found,
        (*notes_of(view), *_assumed(found, beside), *notes),
    )  # fmt: skip


def _assumed(found: Detected, beside: tuple[Path, dict[str, Any], bool] | None) -> list[str]:
    """What neither the tensors nor a config say."""
    if found.kind not in ("wan_vae", "wan_vae22") or (beside is not None and kind_of_config(beside[1]) is not None):
        return []
    return ["no config says the mean and the std of its latents; the official ones are taken"]


def under_module_names(view: TensorSource, kind: str, layout: str, config: Mapping[str, Any]) -> TensorSource:
    """``view`` under the names of our module of that kind; what no key table knows keeps its name."""
    if kind == "taehv":
        return view
    table = table_of(kind, config)
    if kind not in THEIR_SIDE:
        return view if layout == "native" else Mapped(view, table, "native")
    return Mapped(view, table, "other", of="native" if layout == "native" else "other")


def _config_beside(path: Path, source: TensorSource) -> tuple[Path, dict[str, Any], bool] | None:
    """(file, its content, whether the folder is the weights' own) of the ``config.json`` beside the weights."""
    file = (path if path.is_dir() else source.path.parent) / "config.json"
    return (file, read_json(file), path.is_dir()) if file.is_file() else None


def _config(
    found: Detected, view: TensorSource, tensors: Tensors, beside: tuple[Path, dict[str, Any], bool] | None,
    allow: Collection[str], notes: list[str],
) -> dict[str, Any]:  # fmt: skip
    kind, layout = found.kind, found.layout
    if beside is None:
        return config_of(kind, layout, None, tensors, allow)
    file, config, own = beside
    belongs = kind_of_config(config)
    if belongs is not None and belongs[0] == kind and belongs[1] != layout:  # native weights, the other's config
        sizes = SIZES[kind, layout](tensors)
        table = table_of(
            kind, {**sizes.fields, **sizes.assumed, "vace_layers": (0,) * sizes.lengths.get("vace_layers", 0)}
        )
        layout = belongs[1]
        tensors = Mapped(view, table, "native" if layout == "native" else "other").tensors
    elif (belongs is None or belongs[0] != kind) and not own:
        return config_of(kind, layout, None, tensors, allow)
    try:
        return config_of(kind, layout, config, tensors, allow, notes)
    except LoadError as error:
        raise LoadError(f"{error.asked} ({file})", error.found, error.do) from None


def _tokenizer(folder: Path, rules: Collection[str]) -> Part:
    """Raises LoadError when there is no ``tokenizer.json``."""
    folder = folder.parent if folder.name == "tokenizer.json" else folder
    file = folder / "tokenizer.json"
    if not file.is_file():
        bare_model = (folder / "spiece.model").is_file()
        found = "it has only spiece.model and no tokenizer.json" if bare_model else "there is no tokenizer.json"
        raise LoadError(f"opening the tokenizer in {folder}", found, HOW["tokenizer"])
    notes: list[str] = []
    check_tokenizer(folder, rules, notes)
    return Part("tokenizer", "tokenizer", folder, MappingProxyType({}), None, "tokenizers", notes=tuple(notes))


# --- a whole model


def locate(
    path: str | Path,
    variant: str | None = None,
    *,
    instead: Mapping[str, Path] = MappingProxyType({}),
    values: Mapping[str, Any] = MappingProxyType({}),
    allow: Collection[str] = (),
    scope: Scope = WHOLE,
    notes: Collection[str] = (),
) -> ModelParts:
    """All parts of the model in ``path``: a folder of diffusers, a native one, or one file of weights.

    ``variant`` selects among the weights of each folder of diffusers. ``instead``: component -> a file or folder that
    stands in for the model's own, or for one that it does not have. ``values`` go before those of the model's index
    (``boundary_ratio``, ``expand_timesteps``). ``scope``: which parts matter here. ``notes``: what its
    manifest left out. Raises LoadError when nothing can be opened, or when two files are the same part; whatever keeps
    the parts from running is in ``problems``."""
    path = Path(os.path.expanduser(path))
    asked = f"opening the model in {path}"
    with readable(asked):
        return _locate(path, variant, instead, values, allow, scope, notes, asked)


def _locate(
    path: Path,
    variant: str | None,
    instead: Mapping[str, Path],
    values: Mapping[str, Any],
    allow: Collection[str],
    scope: Scope,
    notes: Collection[str],
    asked: str,
) -> ModelParts:
    path, entry = split_entry(path)
    if not path.exists():
        raise LoadError(asked, "there is no such file or folder", "Check the path")
    if not path.is_dir() and not path.is_file():
        raise LoadError(asked, "it is neither a file nor a folder", "Check the path")
    if path.is_dir() and (path / "model_index.json").is_file():
        return _diffusers(path, variant, instead, values, allow, scope)
    if path.is_dir() and (path / "modular_model_index.json").is_file():
        found = "it has only modular_model_index.json, which names parts in other places"
        raise LoadError(asked, found, "Open it as a manifest")
    if path.is_dir() and any((path / name).is_dir() for name in scope.only or ()):  # some folders of a Diffusers model
        places = {name: path / name for name in scope.only or () if (path / name).is_dir()}
        variants = dict.fromkeys(places, variant)
        return assemble(path, "diffusers", {**places, **instead}, values, variants, allow, scope=scope, notes=notes)
    if variant is not None:
        raise LoadError(asked, f"variant {variant!r} was given and it has no model_index.json", "Leave it out")
    others = {name: open_part(place, name, allow=allow) for name, place in instead.items() if scope.opens(name)}
    if path.is_file():
        part = open_part(path, None, entry=entry, allow=allow)
        return _located(path, "file", {part.component: part, **others}, values, scope=scope, notes=notes)
    parts, unused = _native(path, others, allow, scope)
    return _located(path, "native", parts, values, unused, scope=scope, notes=notes)


def assemble(
    path: Path,
    layout: str,
    places: Mapping[str, Path],
    values: Mapping[str, Any],
    variants: Mapping[str, str | None] = MappingProxyType({}),
    allow: Collection[str] = (),
    promised: Collection[str] = (),
    scope: Scope = WHOLE,
    notes: Collection[str] = (),
) -> ModelParts:
    """The model whose components are in ``places``, with the ``values`` of its index or manifest (``boundary_ratio``,
    ``expand_timesteps``). ``path`` is what messages call it. ``promised``: the components that its index names; one
    that is not in ``places`` is a problem. ``notes``: what the index has besides. Raises LoadError."""
    parts = {
        name: open_part(place, name, variants.get(name), allow=allow)
        for name, place in places.items()
        if name not in WITHOUT_WEIGHTS and scope.opens(name)
    }
    return _located(path, layout, parts, values, promised=promised, scope=scope, notes=notes)


def announced(where: str, parts: Mapping[str, Part], values: Mapping[str, Any], scope: Scope) -> ModelParts:
    """The model that a host has, at the address ``where``, with ``parts`` of this machine in their places."""
    return _located(where, "host", parts, values, scope=scope)


def _diffusers(
    folder: Path,
    variant: str | None,
    instead: Mapping[str, Path],
    values: Mapping[str, Any],
    allow: Collection[str],
    scope: Scope,
) -> ModelParts:
    index = read_index(folder, require_folders=False)
    asked = f"opening the model in {folder}"
    known = (*KINDS, "tokenizer", *WITHOUT_WEIGHTS, "boundary_ratio", "expand_timesteps")
    unknown = {k: v for k, v in {**index.values, **index.components}.items() if k not in known and v is not None}
    notes = [*note_unknown(asked, "model_index.json", unknown, known, allow)]
    if (folder / "scheduler" / "scheduler_config.json").is_file():
        flow_shift(folder / "scheduler", allow, notes)
    if (folder / "image_processor" / "preprocessor_config.json").is_file():
        processor_config(folder / "image_processor", allow, notes)
    components = [name for name in index.components if name in known]
    places = {name: folder / name for name in components if (folder / name).is_dir()}
    variants = dict.fromkeys(places.keys() - instead.keys(), variant)
    together = {**index.values, **values}
    return assemble(folder, "diffusers", {**places, **instead}, together, variants, allow, components, scope, notes)


def _native(
    folder: Path, others: Mapping[str, Part], allow: Collection[str], scope: Scope
) -> tuple[dict[str, Part], dict[str, str]]:
    """The parts of a native folder, weights beside one another and two experts in folders of their own, with
    ``others`` in their places; and the files that are none."""
    parts, unused = dict(others), {}
    experts = [name for name, part in EXPERTS.items() if part not in others and (folder / name).is_dir()]
    for name in experts:
        if scope.opens(EXPERTS[name]):
            parts[EXPERTS[name]] = open_part(folder / name, EXPERTS[name], allow=allow)
    for file in weight_files(folder):
        try:
            source = open_source(file)
            part = _part(source, None, _config_beside(file, source), allow)
        except LoadError as error:
            unused[file.name] = error.found
            continue
        if not scope.opens(part.component):
            unused[file.name] = f"the {part.component} is not used here"
        elif part.component in others:
            unused[file.name] = f"another {part.component} stands in for it"
        elif part.component in parts:
            raise LoadError(
                f"opening the model in {folder}",
                f"both {parts[part.component].path.name} and {file.name} are its {part.component}",
                "Leave one of them, or name one in a manifest",
            )
        elif part.kind == "wan" and experts:
            raise LoadError(
                f"opening the model in {folder}",
                f"it has the transformer {file.name} and another one in {experts[0]}",
                "Leave one of them, or name both in a manifest if they are two experts",
            )
        else:
            parts[part.component] = part
    if (
        "tokenizer" not in parts
        and scope.opens("tokenizer")
        and (folder / NATIVE_TOKENIZER / "tokenizer.json").is_file()
    ):
        parts["tokenizer"] = _tokenizer(folder / NATIVE_TOKENIZER, allow)
    if not parts:
        why = f" ({some(f'{name}: {reason}' for name, reason in unused.items())})" if unused else ""
        raise LoadError(f"opening the model in {folder}", f"it holds no part of a model{why}", "Check the path")
    return parts, unused


def weight_files(folder: Path) -> list[Path]:
    """The sets of weights in ``folder``: indices, and files that none of them names. Of two files that differ in their
    ending only, the safetensors one."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    indices = [file for file in files if INDEX.fullmatch(file.name)]
    claimed = {shard for index in indices for shard in read_shards(index).values()}
    loose = [file for file in files if file.suffix in (".safetensors", *OTHERS) and file.name not in claimed]
    safe = {file.stem for file in loose if file.suffix == ".safetensors"}
    return indices + [file for file in loose if file.suffix == ".safetensors" or file.stem not in safe]


# --- what is missing, and what does not fit

HOW: Mapping[str, str] = MappingProxyType({
    "transformer": "Give the transformer, or download a whole model such as Wan-AI/Wan2.1-T2V-1.3B",
    "transformer_2": "Download the other expert too, from the same Wan-AI/Wan2.2 repository",
    "tokenizer": "Take the folder google/umt5-xxl of a native Wan repository or tokenizer/ of a -Diffusers one",
    "text_encoder": "Take models_t5_umt5-xxl-enc-bf16.pth of a native Wan repository or text_encoder/ of a -Diffusers "
    "one",
    "wan_vae": "Take Wan2.1_VAE.pth of a native Wan repository or vae/ of a -Diffusers one",
    "wan_vae22": "Take Wan2.2_VAE.pth of Wan-AI/Wan2.2-TI2V-5B or vae/ of Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "image_encoder": "Take models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth of a native Wan 2.1 image-to-video "
    "repository or image_encoder/ of a -Diffusers one",
})  # fmt: skip
WHAT: Mapping[str, str] = MappingProxyType({
    "transformer": "a Wan transformer",
    "transformer_2": "the second expert",
    "tokenizer": "a tokenizer (tokenizer.json)",
    "text_encoder": "a UMT5 text encoder",
    "vae": "a Wan VAE",
    "image_encoder": "a CLIP image encoder",
})  # fmt: skip


def _located(
    path: Path | str,
    layout: str,
    parts: Mapping[str, Part],
    values: Mapping[str, Any],
    unused: Mapping[str, str] = MappingProxyType({}),
    promised: Collection[str] = (),
    scope: Scope = WHOLE,
    notes: Collection[str] = (),
) -> ModelParts:
    parts = {name: part for name, part in parts.items() if scope.opens(name)}
    halves = layout == "native" and any((Path(path) / folder).is_dir() for folder in EXPERTS)
    two = halves or "transformer_2" in parts
    needed, far = _needed(parts, two, (*promised, *scope.experts), scope)
    whole = {**parts, **far}
    main = whole.get("transformer") or whole.get("transformer_2")
    task = task_of(main.config) if main else None
    boundary = values.get("boundary_ratio")
    if boundary is None and "transformer_2" in whole and layout != "diffusers":
        boundary = BOUNDARIES.get(str(task))  # the layout has no place for it
    expand = values.get("expand_timesteps")
    look = _Look(path, layout, whole, unused)
    problems = [
        *look.missing(needed, promised if scope.only is None else ()),
        *(look.experts(boundary) if scope.only is None else ()),
        *look.fits(),
    ]
    if expand and main and task != "ti2v":
        problems.append(look.problem(f"expand_timesteps is true and its transformer is {task}", "Correct the index"))
    if notes and parts:  # on the whole: they go with its main part
        name = next((name for name in EXPERTS.values() if name in parts), next(iter(parts)))
        parts[name] = replace(parts[name], notes=(*parts[name].notes, *notes))
    ordered = [{n: some[n] for n in (*KINDS, "tokenizer") if n in some} for some in (parts, far)]
    return ModelParts(
        path, layout, MappingProxyType(ordered[0]), task, boundary, task == "ti2v" if expand is None else bool(expand),
        MappingProxyType(dict(unused)), tuple(problems), MappingProxyType(ordered[1]),
    )  # fmt: skip


def _needed(
    parts: Mapping[str, Part], two: bool, promised: Collection[str], scope: Scope
) -> tuple[list[str], dict[str, Part]]:
    """The names of the parts that must be there, and those of them that a host has."""
    far: dict[str, Part] = {}

    def found(name: str) -> Part | None:
        if name not in (*parts, *far) and name in scope.elsewhere and (part := scope.elsewhere[name]()) is not None:
            far[name] = part
        return parts.get(name) or far.get(name)

    if scope.only is not None:
        experts = [name for name in EXPERTS.values() if name in scope.only]
        one = [name for name in experts if name in parts] or experts[:1]
        return [*(name for name in scope.only if name not in experts), *one], far
    main = found("transformer")
    two = two or (main is not None and main.detected is not None and _always_two(main.detected))
    if two or main is None or main.place is not None or "transformer_2" in promised:
        second = found("transformer_2")
        main, two = main or second, two or second is not None
    needed = ["tokenizer", "text_encoder", "transformer", "vae"]
    if main is not None and main.config.get("image_dim") is not None:
        needed.append("image_encoder")
    if two:
        needed.append("transformer_2")
    for name in needed:
        found(name)
    return needed, far


@dataclass(frozen=True)
class _Look:
    """Looks through the parts for what is wrong with the whole."""

    path: Path | str
    layout: str
    parts: Mapping[str, Part]
    unused: Mapping[str, str]

    def problem(self, found: str, do: str) -> LoadError:
        return LoadError(f"opening the model in {self.path}", found, do)

    def missing(self, needed: Collection[str], promised: Collection[str]) -> Iterable[LoadError]:
        main = self.parts.get("transformer") or self.parts.get("transformer_2")
        for name in needed:
            if name not in self.parts:
                yield self.problem(f"it needs {WHAT[name]}, and there is none {self.where(name)}", self.how(name, main))
        for name in promised:
            if name not in (*self.parts, *needed, *WITHOUT_WEIGHTS):
                found = f"its index names the component {name}, and there is none {self.where(name)}"
                yield self.problem(found, "Get that folder, or set it to null in the index")

    def where(self, name: str) -> str:
        if self.layout == "diffusers":
            return f"in {Path(self.path) / name}"
        if self.layout == "native" and name in EXPERTS.values() and len(self.parts.keys() & set(EXPERTS.values())) == 1:
            return f"in {next(Path(self.path) / folder for folder, part in EXPERTS.items() if part == name)}"
        if self.layout == "native" and name == "tokenizer":
            return f"in {Path(self.path) / NATIVE_TOKENIZER}"
        if self.layout == "host":
            return f"at {self.path}"
        if self.layout == "file":
            return "in a single file"
        listed = some(f"{file}: {why}" for file, why in self.unused.items()) if self.unused else ""
        return f"among the files of {self.path}" + (f" (not used: {listed})" if listed else "")

    def how(self, name: str, main: Part | None) -> str:
        if name == "vae":
            name = "wan_vae22" if main is not None and main.config["out_dim"] == 48 else "wan_vae"
        return HOW[name]

    def experts(self, boundary: Any) -> Iterable[LoadError]:
        second = "transformer_2" in self.parts
        if boundary is not None and not (type(boundary) in (int, float) and 0 < boundary < 1):
            yield self.problem(f"boundary_ratio is {boundary!r}, not a number between 0 and 1", "Correct the index")
        elif boundary is not None and not second:
            yield self.problem(
                f"boundary_ratio is {boundary} and there is no transformer_2",
                "Set boundary_ratio to null if the model has one transformer, or add the second expert",
            )
        elif boundary is None and second:
            yield self.problem("it has a transformer_2 and no boundary_ratio", "Add boundary_ratio to the index")
        if second and "transformer" in self.parts:
            first, other = self.parts["transformer"].config, self.parts["transformer_2"].config
            for key in sorted(first.keys() | other.keys()):
                if first.get(key) != other.get(key):
                    yield self.problem(
                        f"{key} is {first.get(key)} in transformer{_at(self.parts['transformer'])} and "
                        f"{other.get(key)} in transformer_2{_at(self.parts['transformer_2'])}",
                        "Use two experts of one model",
                    )

    def fits(self) -> Iterable[LoadError]:
        """The widths at which one part hands over to another."""
        main = self.parts.get("transformer") or self.parts.get("transformer_2")
        if main is None:
            return
        for name, ours, theirs, what in (
            ("vae", "out_dim", "z_dim", "latent channels"),
            ("preview_decoder", "out_dim", "z_dim", "latent channels"),
            ("text_encoder", "text_dim", "d_model", "width of the text"),
            ("image_encoder", "image_dim", "hidden_size", "width of the image features"),
        ):
            other = self.parts.get(name)
            if other is None or main.config[ours] in (None, other.config[theirs]):
                continue
            yield self.problem(
                f"its transformer{_at(main)} has {main.config[ours]} as the {what} ({ours}) and its {name}{_at(other)} "
                f"{other.config[theirs]} ({theirs} of {other.kind})",
                self.how(name, main) if name == "vae" else "Use parts of one model",
            )


def _at(part: Part) -> str:
    return "" if part.place is None else f" at {part.place}"


def _always_two(found: Detected) -> bool:
    """Whether every published model that this could be has two experts."""
    return bool(found.possible) and all("expert" in name and "or alone" not in name for name in found.possible)
