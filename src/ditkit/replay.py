"""Replay: make a clip again from the manifest that it carries, and tell whether it is the same, bit for bit.

First the weights are compared by hash; then the run is repeated with the recorded devices, dtypes and number of
threads; then the frames are compared by hash. Leaves out: files (``media``) and what a manifest holds (``receipt``)."""

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ditkit import pictures
from ditkit.assembly import MODELS, Components
from ditkit.assembly.plugs import plug_facts
from ditkit.checkpoints.model.manifest import check_fetches
from ditkit.errors import DitkitError, LoadError, StateError
from ditkit.events import Listener
from ditkit.execution.stage import with_own_defaults
from ditkit.pipeline import Pipeline, Result, load
from ditkit.placement.remote_parts import address, files_at
from ditkit.prompting import templates
from ditkit.receipt import machine
from ditkit.registry import PlugSpec
from ditkit.request import Request
from ditkit.setup import COMPONENTS, Setup
from ditkit.stages.expand_prompt import ExpandPrompt
from ditkit.state import State, digest
from ditkit.trust import PICTURES, check_places

VERSION = 1
_NEEDED = {"model": str, "setup": dict, "request": dict, "sigmas": list, "components": dict, "machine": dict,
           "seams": dict, "pipeline": list, "output_sha256": str}  # fmt: skip


@dataclass(frozen=True)
class Script:
    """A manifest that was read and checked. ``clip`` is which clip of the run it stands for."""

    file: Path
    manifest: Mapping[str, Any]
    request: Request
    setup: Setup
    clip: int


@dataclass(frozen=True)
class Replayed:
    """``differences`` is empty exactly when the clip is identical."""

    result: Result
    differences: tuple[str, ...]

    @property
    def identical(self) -> bool:
        return not self.differences


def replay(
    script: Script,
    pipe: Pipeline | None = None,
    listeners: Iterable[Listener] = (),
    images: Mapping[str, Any] | None = None,
    allow: Collection[str] = (),
    begun: State | None = None,
) -> Replayed:
    """Repeat the run and compare. ``images``: its pictures, by their name in the request; none is opened because the
    clip names its path, unless ``allow`` has ``pictures``. ``begun``: the State of an earlier replay that was cut off,
    which goes on. Raises LoadError when the weights are not those that were used, StateError for another picture."""
    import torch

    from ditkit.media import frames_sha256, read_video

    pipe, then = pipe or prepare(script, allow=allow), script.manifest
    if pipe.stages.names != then["pipeline"]:
        found = f"it went through the stages {', '.join(map(str, then['pipeline']))}"
        raise StateError(f"replaying {script.file}", found, "Repeat it from Python, with the same stages")
    threads = torch.get_num_threads()
    torch.set_num_threads(then["machine"]["threads"])  # sums are cut into as many parts, and rounding follows
    try:
        state = begin(script, pipe, images or {}, allow) if begun is None else going_on(script, pipe, begun)
        result = pipe.run(state, listeners=listeners)
    finally:
        torch.set_num_threads(threads)
    differences = []
    if result.state["sigmas"] != then["sigmas"]:
        differences.append("the noise levels are others than those recorded")
    now = result.state["weights"]
    differences += [f"the {n} is another one" for n, old in then.get("weights", {}).items() if now.get(n, old) != old]
    video = result.videos[script.clip]
    found, recorded = frames_sha256(video), then["output_sha256"]
    if found != recorded:
        differences.append(f"the frames hash to {found[:16]}, recorded is {recorded[:16]}")
        differences += [*plug_differences(script, pipe), *picture_differences(script.file, video)]
    if lossless(script.file) and frames_sha256(read_video(script.file)[0]) != recorded:
        differences.append("the frames in the file are not those that its manifest speaks of")
    return Replayed(result, tuple(differences))


def begin(script: Script, pipe: Pipeline, images: Mapping[str, Any], allow: Collection[str] = ()) -> State:
    """The State of the run's beginning, with the same pixels in it. Raises StateError."""
    if templates.is_file(template := script.request.expand_template):
        found = f"its expand_template {template} is a file, and a file does not decide what is read"
        raise StateError(f"replaying {script.file}", found, "Use an untouched file")
    for name in pictures.FIELDS:
        value, known = getattr(script.request, name), script.manifest.get("inputs", {})
        if value and name not in known:
            found = f"it was made with the {name} {value}, and does not say what that showed"
            raise StateError(f"replaying {script.file}", found, "Use an untouched file")
        if value and name not in images and PICTURES not in allow:
            found = f"it was made with the {name} {value}, and a file does not decide which picture is read"
            do = f"Name it: --picture {name}=FILE, or --allow-from-file {PICTURES} if the clip is yours"
            raise StateError(f"replaying {script.file}", found, do)
    given = {n: [*v] if n == "reference_images" else v for n, v in images.items()}
    pixels = {n: pictures.pixels_of(n, v, script.request) for n, v in given.items()}
    state = pipe.begin(script.request, pixels)
    for name, recorded in script.manifest.get("inputs", {}).items():
        if name not in state or digest(state[name]) != recorded:
            do = f"Bring that picture back, or name it: {name}=FILE"
            raise StateError(f"replaying {script.file}", f"its {name} is not the one that it was made with", do)
    return state.with_fields(script.manifest.get("expanded", {}))  # the language model is not asked again


def going_on(script: Script, pipe: Pipeline, begun: State) -> State:
    """``begun``, if it asks for what the clip was made of. Its pictures count by their pixels. Raises StateError."""
    request = with_own_defaults(pipe.stages.stages, script.request).model_dump()
    inputs, asked = script.manifest.get("inputs", {}), f"replaying {script.file} from a State"
    pictures_there = {name: digest(begun[name]) for name in pictures.FIELDS if name in begun}
    settings = {k: v for k, v in request.items() if k not in (*pictures.FIELDS, "expand_template")}
    if any(begun.get("request", {}).get(k) != v for k, v in settings.items()) or pictures_there != inputs:
        raise StateError(asked, "it was begun for another clip", "Take the one that its replay left")
    return begun


def read(path: str | os.PathLike[str]) -> Script:
    """Raises StateError when there is no manifest or this version cannot follow it."""
    from ditkit.media import read_manifest

    file = Path(path)
    manifest, asked, untouched = read_manifest(file), f"replaying {file}", "Use an untouched file"
    version = manifest.get("manifest") if isinstance(manifest, dict) else None
    if version != VERSION:
        found = f"its manifest has version {version!r}; this ditkit reads {VERSION}"
        raise StateError(asked, found, "Use the ditkit version that wrote it")
    if key := next(_unusable(manifest), ""):
        raise StateError(asked, f"its manifest has no usable {key!r}", untouched)
    request = Request.whole(manifest["request"], f"the manifest of {file}", StateError)
    setup = Setup.parse(manifest["setup"], f"manifest of {file}", StateError)
    clip, clips = manifest.get("clip", 0), len(request.samples())
    if clip not in range(clips):
        raise StateError(asked, f"it is clip {clip!r} of a run that makes {clips}", untouched)
    if not setup.plugs and any(manifest["seams"].values()):
        found = f"its run was changed by {', '.join(str(plug) for each in manifest['seams'].values() for plug in each)}"
        raise StateError(asked, found, "Repeat it from Python, with the same parts")
    if isinstance(fork := manifest.get("fork"), dict) and fork.get("spliced"):
        found = f"its first steps were taken with other settings, by the run {fork.get('path')} or one before it"
        raise StateError(asked, found, "Fork that run again, as its fork was")
    return Script(file, manifest, request, setup, clip)


def _unusable(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Keys of a manifest that have not the form that ``receipt.py`` gives them; what comes after the first may fail."""
    yield from (key for key, kind in _NEEDED.items() if not isinstance(manifest.get(key), kind))
    plugged, expanded, machine = manifest.get("plugged", []), manifest.get("expanded", {}), manifest["machine"]
    if not isinstance(plugged, list) or not all(isinstance(plug, dict) for plug in plugged):
        yield "plugged"
    if not isinstance(expanded, dict) or not {*expanded} <= {*ExpandPrompt.writes}:
        yield "expanded"
    threads = machine.get("threads")
    if not isinstance(machine.get("versions", {}), dict) or type(threads) is not int or threads < 1:
        yield "machine"
    for name, facts in manifest["components"].items():
        if name not in (*COMPONENTS, "tokenizer") or not isinstance(facts, dict):
            yield "components"
        files, texts = facts.get("files"), (facts.get("device"), facts.get("dtype"), facts.get("place", ""))
        if not isinstance(files, dict) or not all(isinstance(x, str) for x in (*texts, *files.values())):
            yield "components"
        if any(Path(file).name != file for file in files) or not isinstance(facts.get("swaps", []), list):
            yield "components"


def prepare(
    script: Script, model: str | None = None, here: bool = False, plugs: Iterable[str] = (),
    allow: Collection[str] = (),
) -> Pipeline:  # fmt: skip
    """Check the weights' hashes and open the model where and how it ran: a device or dtype that was chosen then is
    named now. ``model`` is where it is now, if not in its old place. ``here``: all stages run in this process, wherever
    they ran then. ``plugs``: the files and modules of its plugs that may be run, where they are now. ``allow``: what
    the clip may decide of where something goes (``trust.py``). Raises LoadError, SetupError, StateError for a plug that
    was not named and for an address that was not allowed, and PlaceError or Lost when a host of that time is gone."""
    folder = script.setup.model if model is None else model
    asked, at_host = f"replaying {script.file}", address(folder) is not None
    if here and at_host:
        do = "Name a folder with the same files, with --model"
        raise LoadError(f"{asked} here", f"its model was at {folder}", do)
    named = folder in MODELS or folder.startswith("hf:") or at_host
    if model is None and not named and not os.path.exists(folder):
        raise LoadError(asked, f"its model {folder!r} is not there", "Name the folder where it is now, with --model")
    places: dict[str, dict[str, str]] = {"devices": {}, "dtypes": {}}
    kept = script.setup.model_dump() | {"plugs": trusted(script, plugs)}
    for name, facts in script.manifest["components"].items():
        place = "" if here else facts.get("place", "")
        if name in COMPONENTS and address(place) is None:  # a host has settings of its own
            places["dtypes"][name] = facts["dtype"]
            places["devices"] |= {} if "place" in facts else {name: facts["device"]}
    if here:
        parts = {name: where for name, where in kept["components"].items() if address(where) is None}
        kept |= {"placement": {}, "expected_probes": {}, "components": parts}
    # A cache would give back the clip that is to be made again.
    kept |= {"threads": None, "model": folder, "cache": None}
    kept["expander"] = kept["expander"] if script.request.expand != "no" else None
    asks = not {*ExpandPrompt.writes} <= {*script.manifest.get("expanded", {})}  # else its words are there
    own = ({} if model is None else {"model": model}) | ({} if asks else {"expander": None})
    check_places({**kept, **places}, own, allow, asked, ", or run all of it here with --here")
    check_fetches(folder, own, allow, asked)
    pipe = load(**{**kept, **places})
    then, now = _plain(script.manifest["seams"]), _plain(pipe.seams.describe())
    if then != now:
        found = f"its seams held {then}, and now they hold {now}"
        raise StateError(asked, found, "Repeat it from Python, with the same parts")
    check_weights(script, pipe)
    return pipe


def trusted(script: Script, given: Iterable[str]) -> list[str]:
    """The plugs of the run, with each file and module as somebody names it who is no clip. Raises StateError for one
    that nobody named: a clip's word starts no code."""
    named, asked = [PlugSpec.parse(text) for text in given], f"replaying {script.file}"
    found, used = list[str](), set[PlugSpec]()
    code = [spec for spec in map(PlugSpec.parse, script.setup.plugs) if spec.is_code]
    for spec in map(PlugSpec.parse, script.setup.plugs):
        if spec.is_code:
            same = [one for one in named if one.is_code and _names(one, spec)]
            if not same:
                do = f"If you trust it, name it: --plug {spec.code}"
                raise StateError(asked, f"it was made with {spec.short}, code that a clip may not start", do)
            one = min(same, key=partial(_distance, spec))
            if any(_distance(other, one) < _distance(spec, one) for other in code if _names(one, other)):
                raise StateError(
                    asked, f"{spec.short} is another file than {one.code}", f"Name it too: --plug {spec.code}"
                )
            used.add(one)
            spec = replace(spec, code=one.code, sha256=one.sha256)
        found.append(str(spec))
    if idle := [one for one in named if one not in used]:
        raise StateError(f"{asked} with --plug {idle[0]}", "it was made without that", "Leave it out")
    return found


def _names(one: PlugSpec, spec: PlugSpec) -> bool:
    """A file may lie elsewhere now."""
    return Path(one.code).name == Path(spec.code).name if spec.is_file else one.code == spec.code


def _distance(spec: PlugSpec, one: PlugSpec) -> tuple[bool, bool]:
    """Of several files of one name the nearest is the one that holds the same, then the one that lies there."""
    there = one.placed()
    return there.sha256[:32] != spec.sha256[:32], there.code != spec.code


def _plain(seams: Mapping[str, Any]) -> dict[str, list[str]]:
    """What was plugged in, whatever its code."""
    return {seam: [re.sub("@[0-9a-f]{16,64}", "", str(plug)) for plug in each] for seam, each in seams.items() if each}


def plug_differences(script: Script, pipe: Pipeline) -> list[str]:
    """Plugs and stages whose code is not that of the clip."""
    then: dict[str, list[str]] = {}
    for one in script.manifest.get("plugged", []):
        then.setdefault(one.get("plug", ""), []).append(one.get("sha256"))
    now = [(one["plug"], one["sha256"]) for one in plug_facts(pipe.setup.plugs)]
    return [f"the code of {name} is not what it was" for name, code in now if code not in then.get(name, [code])]


def check_weights(script: Script, pipe: Pipeline) -> None:
    """The files of each part against what the clip was made with, wherever they lie; nothing is loaded. Raises
    LoadError, PlaceError."""
    assert isinstance(pipe.components, Components)
    there = files_at(pipe.places)
    for component, facts in script.manifest["components"].items():
        asked = f"replaying {script.file} with the {component} of {pipe.setup.model}"
        if (place := str(facts.get("place"))) in there:
            asked, now = f"{asked} at {place}", there[place].get(component, {})
        else:
            now = pipe.components.files(component) if component in pipe.components else {}
        for name, recorded in facts["files"].items():
            if name not in now:
                raise LoadError(asked, f"the clip was made with {name}, and it is not there", "Bring it back")
            if now[name] != recorded:
                found = f"the sha256 of {name} is {now[name][:16]}..., the clip was made with {recorded[:16]}..."
                raise LoadError(asked, found, "Bring back the weights of that time")


def machine_differences(manifest: Mapping[str, Any]) -> list[str]:
    """What is different now: versions and hardware. They may change the last bits of a result."""
    now, then = machine(), manifest["machine"]
    ours, theirs = now["versions"], then.get("versions", {})
    found = [f"{name} is {ours[name]}, it was {old}" for name, old in theirs.items() if ours.get(name, old) != old]
    for key in ("processor", "gpu"):
        if key in then and now[key] != then[key]:
            found.append(f"the {key} is {now[key]}, it was {then[key]}")
    return found


def picture_differences(file: Path, video: Any) -> list[str]:
    """How far the frames in the file are from those made again, in levels of 255; nothing if it holds no frames."""
    import numpy as np

    from ditkit.media import read_video

    try:
        old = read_video(file)[0]
    except DitkitError:  # the sidecar alone
        return []
    if old.shape != video.shape:
        return [f"the clip is {list(old.shape)}, made again it is {list(video.shape)}"]
    gap = np.abs(old.astype(np.int16) - video)
    changed = gap.any(axis=-1)
    where = f"{changed.any(axis=(1, 2)).sum()} of {len(old)} frames and {changed.mean():.1%} of the pixels differ"
    loss = "" if lossless(file) else " (of this, some is the loss of the format)"
    return [f"{where}, by {gap.mean():.2f} levels on average and {gap.max()} at most{loss}"]


def lossless(file: Path) -> bool:
    return os.path.isdir(file) or file.suffix.lower() in (".png", ".npz")
