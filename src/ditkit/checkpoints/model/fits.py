"""A whole model judged: which parts it needs, what is missing, and whether one part fits the other.

Each problem is a sentence of what was looked for, where, and how to get it. What a part needs and the widths at which
it fits others are said by the row of its kind. Leaves out: opening parts."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditkit.checkpoints.files.text import some
from ditkit.checkpoints.kinds.kind import KINDS, Kind, Port, Published, kinds_of
from ditkit.checkpoints.model.part import EXPERTS, WHOLE, ModelParts, Part, Scope, component_names, main_of
from ditkit.errors import LoadError
from ditkit.reading import folder_at

NATIVE_TOKENIZER = Path("google", "umt5-xxl")
USUAL = {"tokenizer": "tokenizer", "text_encoder": "umt5", "vae": "wan_vae", "transformer": "wan"}
"""What a model needs of which no transformer is known."""
SECOND = ("the second expert", "Download the other expert too, from where this one is")


def model_parts(
    path: Path | str, layout: str, parts: Mapping[str, Part], values: Mapping[str, Any],
    unused: Mapping[str, str] = {}, promised: Collection[str] = (), scope: Scope = WHOLE,
) -> ModelParts:  # fmt: skip
    """``parts`` as one model, with all that is wrong with it. ``path`` is what messages call it; ``values``: of its
    index or manifest (``boundary_ratio``, ``expand_timesteps``); ``promised``: components that its index names."""
    parts = {name: part for name, part in parts.items() if scope.opens(name)}
    halves = layout == "native" and any(folder_at(Path(path) / folder) for folder in EXPERTS)
    needed, far = _needed(parts, halves or "transformer_2" in parts, (*promised, *scope.experts), scope)
    look = _Look(path, layout, {**parts, **far}, unused)
    main = main_of(look.parts)
    task = main.row.task(main.config) if main else None
    about = main.row.tasks.get(task or "", Published("")) if main else Published("")
    boundary, expand = values.get("boundary_ratio"), values.get("expand_timesteps")
    if boundary is None and "transformer_2" in look.parts and layout != "diffusers":
        boundary = about.boundary  # the layout has no place for it
    whole = scope.only is None
    problems = [*look.missing(needed, promised if whole else ()), *(look.experts(boundary) if whole else ()),
                *look.fits()]  # fmt: skip
    if expand not in (None, True, False):
        problems.append(look.problem(f"expand_timesteps is {expand!r}, not true or false", "Correct the index"))
    elif expand and main and not about.expand_timesteps:
        problems.append(look.problem(f"expand_timesteps is true and its transformer is {task}", "Correct the index"))
    here, elsewhere = ({name: found[name] for name in component_names() if name in found} for found in (parts, far))
    expand = about.expand_timesteps if expand is None else bool(expand)
    return ModelParts(path, layout, here, task, boundary, expand, unused, tuple(problems), elsewhere)


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
    two = two or (main is not None and main.detected is not None and main.detected.two_experts)
    if two or main is None or main.place is not None or "transformer_2" in promised:
        second = found("transformer_2")
        main, two = main or second, two or second is not None
    needs = main.row.needs(main.config) if main else USUAL
    needed = [*(name for name in needs if name != "transformer"), "transformer", *(["transformer_2"] if two else [])]
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
        for name in needed:
            if name not in self.parts:
                kind = self.kind_of(name)
                noun, do = SECOND if name == "transformer_2" else (kind.noun, kind.get)
                yield self.problem(f"it needs {noun}, and there is none {self.where(name)}", do)
        for name in promised:
            if name not in (*self.parts, *needed):
                found = f"its index names the component {name}, and there is none {self.where(name)}"
                yield self.problem(found, "Get that folder, or set it to null in the index")

    def kind_of(self, name: str) -> Kind:
        """The kind that the component ``name`` of this model has to be."""
        main = main_of(self.parts)
        wanted = USUAL if main is None else {"transformer": main.kind, **main.row.needs(main.config)}
        return KINDS[wanted[name]] if name in wanted else kinds_of(name)[0]

    def where(self, name: str) -> str:
        listed = some(f"{file}: {why}" for file, why in self.unused.items()) if self.unused else ""
        listed = f" (not used: {listed})" if listed else ""
        places = {"diffusers": f"in {Path(self.path) / name}", "host": f"at {self.path}",
                  "file": f"in a single file{listed}"}  # fmt: skip
        if self.layout in places:
            return places[self.layout]
        folders = {part: folder for folder, part in EXPERTS.items()}
        if name == "tokenizer" or (name in folders and len(self.parts.keys() & folders) == 1):
            return f"in {Path(self.path) / folders.get(name, NATIVE_TOKENIZER)}"
        return f"among the files of {self.path}{listed}"

    def experts(self, boundary: Any) -> Iterable[LoadError]:
        second = "transformer_2" in self.parts
        if boundary is not None and not (type(boundary) in (int, float) and 0 < boundary < 1):
            yield self.problem(f"boundary_ratio is {boundary!r}, not a number between 0 and 1", "Correct the index")
        elif boundary is not None and not second:
            do = "Set boundary_ratio to null if the model has one transformer, or add the second expert"
            yield self.problem(f"boundary_ratio is {boundary} and there is no transformer_2", do)
        elif boundary is None and second:
            yield self.problem("it has a transformer_2 and no boundary_ratio", "Add boundary_ratio to the index")
        if second and "transformer" in self.parts:
            first, other = self.parts["transformer"], self.parts["transformer_2"]
            for key in sorted(first.config.keys() | other.config.keys()):
                one, two = first.config.get(key), other.config.get(key)
                if one != two:
                    found = f"{key} is {one} in transformer{_at(first)} and {two} in transformer_2{_at(other)}"
                    yield self.problem(found, "Use two experts of one model")

    def fits(self) -> Iterable[LoadError]:
        """The widths at which one part hands over to another, by their names."""
        if (main := main_of(self.parts)) is None:
            return
        ours = _ports(main)
        for name, part in self.parts.items():
            for what, (width, field) in _ports(part).items() if name not in EXPERTS.values() else ():
                need, own = ours.get(what, Port(None, ""))
                if None not in (need, width) and need != width:
                    found = (f"its transformer{_at(main)} has {need} as the {what} ({own}) and its {name}{_at(part)} "
                             f"{width} ({field} of {part.kind})")  # fmt: skip
                    yield self.problem(found, self.kind_of(name).get if name == "vae" else "Use parts of one model")


def _ports(part: Part) -> Mapping[str, Port]:
    """Those of its kind; none where the config class refuses the sizes, which loading will tell."""
    if not part.row.config_class:
        return {}
    try:
        return part.row.ports(part.row.config(part.config))
    except (TypeError, ValueError):
        return {}


def _at(part: Part) -> str:
    return "" if part.place is None else f" at {part.place}"
