"""The receipt: what really ran. A listener collects it during a run; with what was asked it becomes the manifest that
a finished clip carries, and from a manifest the same clip can be made again."""

import platform
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ditkit import pictures, samples
from ditkit.events import Event
from ditkit.media import frames_sha256
from ditkit.setup import Setup
from ditkit.stages.expand_prompt import ExpandPrompt
from ditkit.state import State, digest

PACKAGES = ("ditkit", "torch", "numpy", "safetensors", "tokenizers", "transformers", "av", "pillow")


class Recorder:
    """A listener that keeps times, skipped stages, loads, truncations, what plugs decided and the steps as they were
    taken; of one run, or of its parts one after the other."""

    ignores = frozenset({"prediction", "frames"})

    def __init__(self) -> None:  # the names are those of the receipt
        self.stages: dict[str, float] = {}
        self.skipped: dict[str, str] = {}
        self.places: dict[str, list[str]] = {}
        self.travelled: list[dict[str, Any]] = []
        self.cached: dict[str, str] = {}
        self.retries: list[dict[str, Any]] = []
        self.loads: dict[str, float] = {}
        self.truncated: list[dict[str, Any]] = []
        self.pictures: dict[str, str] = {}
        self.noted: list[dict[str, Any]] = []
        self.plugs: dict[str, dict[str, int]] = {}
        self.steps: list[dict[str, Any]] = []

    @property
    def done(self) -> set[str]:
        """Stages that were run, or whose result came from the cache. To pass over them later is no news."""
        return {*self.stages, *self.cached}

    def __call__(self, event: Event) -> None:
        match event.name:
            case "stage.end":
                self.stages[event["stage"]] = self.stages.get(event["stage"], 0.0) + event["elapsed"]
                places = self.places.setdefault(event["stage"], [])
                places += [event["place"]] if event["place"] not in places else []
            case "travel":
                self.travelled.append(dict(event.values))
            case "cache.hit" | "cache.miss":
                self.cached[event["stage"]] = f"{event.name.removeprefix('cache.')}: {event['why']}"
            case "cache.refused":
                self.cached[event["stage"]] += f"; not kept: {event['why']}"
            case "place.retry":
                self.retries.append(dict(event.values))
            case "stage.skipped" if event["stage"] not in self.done:
                self.skipped[event["stage"]] = event["reason"]
            case "load.end":
                self.loads[event["component"]] = event["elapsed"]
            case "prompt.truncated":
                cut = {"field": event["field"], "tokens_cut": event["tokens"], "prompt": event["prompt"]}
                self.truncated.append(cut)
            case "picture.note":
                self.pictures[event["field"]] = event["text"]
            case "load.note" | "setup.note":
                self.noted.append(dict(event.values))
            case "plug" | "memory.dropped":
                counts = self.plugs.setdefault(event["plug"], {})
                what = event["what"] if event.name == "plug" else "memory dropped"
                counts[what] = counts.get(what, 0) + 1
            case "step.end":
                told = ("index", "sigma", "timestep", "guidance_scale", "expert")
                step = {name: getattr(event["step"], name) for name in told}
                self.steps.append({**step, "seconds": event["elapsed"]})

    def receipt(
        self,
        components: Mapping[str, Any],
        weights: Mapping[str, str],
        hosts: Mapping[str, Mapping[str, Any]],
        seams: Mapping[str, Any],
        pipeline: list[str],
    ) -> dict[str, Any]:
        """``components``: facts of those that worked; ``weights``: their fingerprints. ``hosts``: what each place said
        of itself. ``seams``: what was plugged in. ``pipeline``: all stages."""
        parts = ("model", "parts", "stages")
        said = {name: {k: v for k, v in about.items() if k not in parts} for name, about in hosts.items()}
        own = {"machine": machine(), "weights": weights, "hosts": said, "seams": seams, "pipeline": pipeline}
        return {"components": dict(components), **vars(self), **own}


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}


@cache  # what is imported is what was installed then
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, Any]:
    """Where it ran: processor, threads, GPU, and the peak of resident memory in bytes (None where unknown)."""
    import torch

    return {
        "platform": platform.platform(), "processor": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(), "peak_memory": peak_memory(), "versions": versions(),
    }  # fmt: skip


def peak_memory() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def manifests(setup: Setup, state: State, receipt: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """For each clip all that is needed to make it again and to know that it is the same. ``request`` is that of the
    clip alone, or that of the whole run if it was one batch, of which it is number ``clip``. ``inputs``: hashes of
    pictures. ``expanded``: what a language model made of the prompt, as it is in the State."""
    columns = zip(state["prompt"], state["negative_prompt"], state["seed"], state["video"].numpy(), strict=True)
    together = state["request"]["batched"] and samples.count(state) > 1
    for i, (prompt, negative, seed, video) in enumerate(columns):
        # A batch rounds otherwise than a clip alone: to be made again bit for bit, all of it has to be.
        sample = {} if together else {"prompt": prompt, "negative_prompt": negative, "seed": seed, "batched": False}
        own = slice(None) if together else slice(i, i + 1)
        yield {
            "manifest": 1, "model": setup.model, "setup": setup.model_dump(),
            "request": {**state["request"], **sample}, "sigmas": list(state.get("sigmas", [])),
            **receipt,
            "clip": i if together else 0,
            "inputs": {n: digest(state[n][own]) for n in pictures.FIELDS if n in state},
            "expanded": {n: state[n][own] for n in ExpandPrompt.writes if n in state},
            "output_sha256": frames_sha256(video),
        }  # fmt: skip
