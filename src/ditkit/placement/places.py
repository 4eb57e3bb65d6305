"""Places: the setting ``placement`` made real, for one model. Channels are opened when they are first needed.

Other settings may be about parts that lie elsewhere: what would have no effect is refused and not ignored. A host over
HTTP has its own Setup; a child process and a Ray actor have ours, but for the device if one is given. Options of a
stage (attention, frames per chunk) travel with it and contradict nothing. Leaves out: what hosts say."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

from ditkit.assembly.adapters import named_expert
from ditkit.assembly.plugs import plugs_of
from ditkit.contracts import EXPERTS, Seams, Step
from ditkit.errors import SetupError, nearest
from ditkit.execution.place import Here, Place, Segment
from ditkit.execution.stage_list import StageList
from ditkit.keys import token_for
from ditkit.placement.job import Channel
from ditkit.placement.remote import Remote
from ditkit.placement.spec import Spec, Target, address, expected_of, specs_of
from ditkit.setup import Setup

HERE = Spec("here", "here")


class Places:
    """Which place runs which stage, and from which step on. One channel for each place, whoever uses it."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.specs = specs_of(setup.placement)
        self.expected = expected_of(setup.expected_probes, self.specs)
        self._remotes: dict[str, Remote] = {}
        self._lock = threading.RLock()

    def also(self, setup: Setup) -> Self:
        """Those of ``setup``, which places more stages; who was asked already is not asked again."""
        places = type(self)(setup)
        places._remotes, places._lock = self._remotes, self._lock
        return places

    def devices(self, pipeline: StageList) -> dict[str, str]:
        """Devices of the components of stages that are placed on a device of this process. Raises SetupError where two
        settings contradict each other, or where nothing would heed one."""
        found: dict[str, str] = dict(self.setup.devices)
        for target in self.specs:
            self._check(target, pipeline)
        check_heeded(self.setup, self.specs, pipeline)
        for target, spec in self.specs.items():
            if spec.kind != "here" or spec.device is None:
                continue
            names = [target.expert] if target.expert else list(pipeline[target.stage].components)
            for name in (n for n in names if n != "tokenizer"):
                if found.setdefault(name, spec.device) != spec.device:
                    asked, what = f"placement of {target.stage} at {spec.text}", f"its {name} is on {found[name]}"
                    raise SetupError(asked, what, "Name one device for each component, or use process:DEVICE")
        return found

    def of_run(
        self, pipeline: StageList, components: Mapping[str, Any], seams: Seams, steps: Callable[[], Sequence[Step]]
    ) -> dict[str, list[Segment]]:
        """The segments of each stage that does not simply run here. ``steps``: the step table, asked for only where an
        expert is placed. Raises SetupError."""
        here, places = Here(components), dict[str, dict[Target, Place]]()
        for target, spec in self.specs.items():
            self._check(target, pipeline)
            self._check_swaps(target, spec, pipeline, seams)
            places.setdefault(target.stage, {})[target] = here if spec.kind == "here" else self.remote(spec)
        return {stage: self._segments(stage, own, here, steps) for stage, own in places.items()}

    @staticmethod
    def _segments(
        stage: str, own: Mapping[Target, Place], here: Place, steps: Callable[[], Sequence[Step]]
    ) -> list[Segment]:
        """An expert's place has its steps alone; those of nobody run where the whole stage is placed, or else here."""
        whole, cuts, ends = own.get(Target(stage), here), dict[int, Place](), list[tuple[int, int]]()
        for target, place in own.items():
            begin = target.step
            if target.expert is not None and (taken := [s.index for s in steps() if s.expert == target.expert]):
                begin = taken[0]
                ends += [(begin, taken[-1] + 1)] if taken[-1] + 1 < len(steps()) else []
            if begin is None:
                continue
            if begin in cuts or (begin == 0 and target.expert is None and Target(stage) in own):
                raise SetupError(f"placement of {stage}", f"two places begin at step {begin}", "Leave one out")
            cuts[begin] = place
        for begin, end in ends:
            if not any(begin < cut <= end for cut in cuts):
                cuts[end] = whole
        return [Segment(place, begin) for begin, place in sorted({0: whole, **cuts}.items(), key=lambda cut: cut[0])]

    def _check(self, target: Target, pipeline: StageList) -> None:
        asked, names = f"placement of {target.stage!r}", pipeline.names
        if target.stage not in names:
            if target.stage == "expand_prompt":
                raise SetupError(asked, "it is in no pipeline without an expander", "Name it with expander here too")
            found = f"there is no such stage{nearest(target.stage, names)}"
            raise SetupError(asked, found, f"The stages are {', '.join(names)}")
        stage = pipeline[target.stage]
        if (target.step is not None or target.expert) and not stage.loop:
            raise SetupError(f"placement of a part of {target.stage}", "it takes no steps", "Place the whole stage")
        if target.expert and target.expert not in stage.components:
            found = f"its model has {', '.join(stage.components)}"
            raise SetupError(f"placement of {target.stage}.{target.expert}", found, "Place the whole stage")

    def _check_swaps(self, target: Target, spec: Spec, pipeline: StageList, seams: Seams) -> None:
        """A loop sends what is plugged in by name; other stages have no seams but the swaps of their parts, which a
        child process and an actor make as they load them."""
        stage = pipeline[target.stage]
        for swap in () if spec.kind == "here" or stage.loop else seams.of(stage.components).swaps:
            if hasattr(swap, "plug") and spec.kind != "http":
                continue
            what = "swaps of its parts" if hasattr(swap, "plug") else "Python objects"
            found = f"{stage.name} runs at {spec.text}, and {what} do not travel"
            asked = f"swap {swap.name!r} for {', '.join(swap.components)}"
            raise SetupError(asked, found, "Run the stage here, or take the swap out")

    def remote(self, spec: Spec) -> Remote:
        with self._lock:
            if spec.text not in self._remotes:
                stages = list(dict.fromkeys(t.stage for t, s in self.specs.items() if s.text == spec.text))
                expected = {t.stage: probe for t, probe in self.expected.items() if self.specs[t] == spec}
                channel = self._channel(spec, stages)
                self._remotes[spec.text] = Remote(spec.text, channel, self.setup.retries, expected)
            return self._remotes[spec.text]

    def _channel(self, spec: Spec, stages: Sequence[str]) -> Channel:
        if spec.kind == "http":
            from ditkit.placement.http.client import HTTPChannel

            hosts = {str(each.address) for each in self.specs.values() if each.kind == "http"} | {str(spec.address)}
            token = token_for(str(spec.address), hosts, self.setup.plain_http)
            return HTTPChannel(str(spec.address), self.setup.timeout, token)
        if spec.kind == "process":
            from ditkit.placement.process.parent import ProcessChannel

            return ProcessChannel(self.setup, spec.device, stages)
        from ditkit.placement.ray import RayChannel

        return RayChannel(self.setup, spec.address, spec.device, stages)

    def describe(self) -> dict[str, Any]:
        """What each place that was used said of itself."""
        with self._lock:
            return {name: dict(remote.described) for name, remote in self._remotes.items()}

    def close(self) -> None:
        with self._lock:
            for remote in self._remotes.values():
                remote.channel.close()
            self._remotes.clear()


def check_heeded(setup: Setup, specs: Mapping[Target, Spec], pipeline: StageList) -> None:
    """``setup``: as it was given. Raises SetupError for the first setting that nothing would heed."""
    used = uses(specs, pipeline)
    for asked, names, device in concerns(setup):
        places = [spec for name in names for at in used.get(name, {}).values() for spec in at]
        if places and not any(heeds(spec, device) for spec in places):
            where = " and ".join(dict.fromkeys(spec.text for spec in places))
            hosts = any(spec.kind == "http" for spec in places)
            do = "Give it to the host, or name another place" if hosts else "Leave one of the two devices out"
            raise SetupError(asked, f"what it concerns is at {where}, where nobody heeds it", do)


def uses(specs: Mapping[Target, Spec], pipeline: StageList) -> dict[str, dict[str, list[Spec]]]:
    """For each component, by the stages that call it, the places where they may. Where a loop moves at a step, all its
    components may be at all its places."""
    found: dict[str, dict[str, list[Spec]]] = {}
    for stage in pipeline.stages:
        own = {target: spec for target, spec in specs.items() if target.stage == stage.name}
        rest = [spec for target, spec in own.items() if target.expert is None]
        if all(target.expert or target.step for target in own):
            rest.append(HERE)
        moves = any(target.step for target in own)
        for name in stage.components:
            expert = own.get(Target(stage.name, None, name))
            places = rest if expert is None else [*rest, expert] if moves else [expert]
            found.setdefault(name, {})[stage.name] = places
    return found


def heeds(spec: Spec, device: str | None) -> bool:
    """Whether a setting about parts that lie there has an effect; ``device``: the one that it names."""
    return spec.kind == "here" or (spec.kind != "http" and (device is None or spec.device in (None, device)))


def concerns(setup: Setup) -> Iterator[tuple[str, Iterable[str], str | None]]:
    """Each setting about components: how it was written, the names that it concerns, and the device that it names.

    One for all components is refused only where none of them is left to heed it."""
    plain, every = Setup(), ("tokenizer", "text_encoder", "image_encoder", *EXPERTS, "vae")
    for setting in ("components", "dtypes", "backends"):
        for name, value in getattr(setup, setting).items():
            if setting == "components" and address(value) is not None:
                continue  # it says that the host's is meant
            yield f"{setting} with {name} = {value!r}", [name], None
    for name, device in setup.devices.items():
        yield f"devices with {name} = {device!r}", [name], device
    for text in setup.loras:
        expert, _ = named_expert(text)
        yield f"loras with {text!r}", EXPERTS if expert in (None, "both") else [str(expert)], None
    for plug in plugs_of(setup.plugs):
        if plug.seam == "swap":
            yield f"plugs with {plug.row.name!r}", getattr(plug.row.made, "components", EXPERTS), None
    for setting, names in (("dtype_policy", EXPERTS), ("dtype", every), ("variant", every)):
        if (value := getattr(setup, setting)) != getattr(plain, setting):
            yield f"{setting} = {value!r}", names, None
    if setup.device != plain.device:
        yield f"device = {setup.device!r}", every, setup.device
