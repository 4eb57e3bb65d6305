"""Components: the parts of a model, each loaded when it is first asked for, and known by a fingerprint without that.
Leaves out: finding the parts (``model.py``) and how each is loaded (``loaders.py``)."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from ditkit.assembly.adapters import Adapters
from ditkit.assembly.loaders import LoadOptions
from ditkit.assembly.model import Model, vocabulary
from ditkit.checkpoints.files.text import readable
from ditkit.checkpoints.model.part import Part
from ditkit.contracts import EXPERTS, Swap, identify
from ditkit.errors import LoadError, SetupError
from ditkit.events import SILENT, Events
from ditkit.mlx import exact_name
from ditkit.prompting import open_expander
from ditkit.reading import file_at
from ditkit.registry import resolve
from ditkit.setup import PARTS, Setup
from ditkit.shared import Holder, Shared
from ditkit.store.cache import remember_hashes

if TYPE_CHECKING:
    import torch

EXPANDER = "prompt_expander"
"""Of the setup, not of the model: it is held beside the model's parts, and told of in the State's ``expansion``."""


class Components(Mapping[str, Any]):
    """The parts of a model, each loaded once, whichever thread asks.

    Parts of equal files, sizes, dtype, device and swaps are one object for all Components with the same ``shared``.
    ``describe()`` tells of each loaded part its class, dtype, device, policy and files. ``device_of``: (component, name
    of a tensor) -> its device, where a component's weights do not all lie on the device that computes it; on ``meta``
    it is not read."""

    def __init__(
        self, model: Model, setup: Setup, swaps: tuple[Swap, ...] = (), shared: Shared | None = None,
        device_of: Callable[[str, str], torch.device | str] | None = None,
    ):  # fmt: skip
        self.model, self.setup, self.own_swaps, self.device_of = model, setup, swaps, device_of
        self._events = SILENT
        self._told: set[str] = set()
        there = [name for name in model.known if name != "tokenizer"]
        for swap in swaps:
            named = {*swap.components}
            if not named & {*there} or not named <= {*there, *PARTS} - {"tokenizer"}:
                asked = f"swap {swap.name!r} for {', '.join(swap.components)}"
                found = f"{model.name} has no such component with weights; it has {', '.join(there)}"
                raise SetupError(asked, found, "Name one of these")
        remember_hashes(setup)
        self.adapters = Adapters.open(setup, model.parts)
        parts = {name: (partial(self._key, name), partial(self._make, name)) for name in model.parts}
        self.holder = Holder(shared or Shared(), parts, self._check)
        self.expander = None if setup.expander is None else open_expander(setup)
        self._identities = {name: cache(partial(self._identify, part)) for name, part in model.parts.items()}
        self._stamps = {name: self._stamp(name) for name in model.parts}
        self._lock = threading.RLock()

    def listening(self, events: Events) -> Components:
        """The same components; ``events`` hears of those that are loaded through this view."""
        view = copy.copy(self)
        view._events = events
        return view

    def __getitem__(self, name: str) -> Any:
        with self._lock:
            if name == EXPANDER and self.expander is not None:
                self.expander.load(self._events)
                return self.expander
            if name in self.holder.loaded:
                return self.holder[name]
            with self._events.span("load", component=name):
                component = self.holder[name]
            for note in self.model.parts[name].notes:
                self._events.emit("load.note", component=name, note=note)
            for text in self.setup.notes_of(name) if self.model.parts[name].source else ():
                if text not in self._told:  # once, however many parts it is true of
                    self._told.add(text)
                    self._events.emit("setup.note", text=text)
            return component

    def __contains__(self, name: object) -> bool:  # a Mapping's own one would load it
        return name in [*self]

    def __iter__(self) -> Iterator[str]:
        return iter([*self.model.parts, *([] if self.expander is None else [EXPANDER])])

    def __len__(self) -> int:
        return len(self.model.parts) + (self.expander is not None)

    def fingerprint_of(self, name: str) -> str:
        """That of the component, also of one that is not loaded: its files are read once, and hashed."""
        if name == EXPANDER and self.expander is not None:
            return self.expander.fingerprint
        if (loaded := self.holder.loaded.get(name)) is not None:
            return loaded.fingerprint
        self._check(name)
        return self._identities[name]()

    def _identify(self, part: Part) -> str:
        """A hash over its weights and how they compute; it reads all files. Two components of one fingerprint give the
        same bits on the same kind of device."""
        if part.source is None:
            from ditkit.models.text import tokenizer_fingerprint

            about: list[Any] = [part.row.pinned, tokenizer_fingerprint(vocabulary(part))]
        else:
            dtype, how = str(self.place(part.component)[0]), self._how(part.component)
            about = [part.row.pinned, self.source(part).fingerprint, dtype, dict(part.config), *how]
            if (backend := self.setup.backend_of(part.component)) != "torch":
                about.append(exact_name(backend))
        return hashlib.sha256(json.dumps(about, sort_keys=True, default=list).encode()).hexdigest()

    def _how(self, name: str) -> list[Any]:
        """What changes how its weights compute, as plain values; nothing for a part without policy and swaps. The
        policy ``wan`` has its first name here: the fingerprints in saved States hold it."""
        swaps, policy = [swap.fingerprint for swap in self.swaps(name)], self.setup.dtype_policy
        return ["official" if policy == "wan" else policy, swaps] if name in EXPERTS else [swaps] if swaps else []

    def _make(self, name: str) -> Any:
        part = self.model.parts[name]
        device_of = None if self.device_of is None else partial(self.device_of, name)
        policy, backend = self.setup.dtype_policy, self.setup.backend_of(name)
        how = LoadOptions(*self.place(name), self.swaps(name), device_of, policy, backend)
        component = resolve(part.row.load)(replace(part, source=self.source(part)), how)
        component.identify = self._identities[name]
        return component

    def _check(self, name: str) -> None:
        """Raises LoadError when the part is locked and its bytes are others, whoever loaded them; and when a file is
        not the one that was opened: its tensors would be read from the places that the old header told."""
        self.model.verify.get(name, lambda: None)()
        now, opened = self._stamp(name), self._stamps[name]
        if changed := sorted(file for file in opened if now.get(file) != opened[file]):
            found = f"{changed[0]} has changed since the model was opened"
            raise LoadError(f"loading the {name} of {self.model.name}", found, "Open the model again")

    def _stamp(self, name: str) -> dict[str, tuple[int, int]]:
        """Size and time of change of all files that a part is read from, LoRAs and config included."""
        part = self.model.parts[name]
        weights = part.source.files if part.source else (vocabulary(part),)
        config = (part.path if os.path.isdir(part.path) else part.path.parent) / "config.json"
        loras = [file for adapter, _ in self.adapters.by_expert.get(name, ()) for file in adapter.source.files]
        with readable(f"looking at the {name} of {self.model.name}"):
            there = [file for file in (*weights, *loras, config) if file_at(file)]
            return {str(file): (stat.st_size, stat.st_mtime_ns) for file in there for stat in (file.stat(),)}

    def _key(self, name: str) -> Any:
        """What two parts must have in common to be one object. Files count by place, size and time, so a copy of a file
        is another one: to know that it is not would mean to read both."""
        part = self.model.parts[name]
        source = self.source(part)
        files = source.files if source else [vocabulary(part)]
        with readable(f"looking at the {name} of {self.model.name}"):
            stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        told = [part.row.pinned, dict(part.config), stats, source.sketch if source else "", *self._how(name)]
        if source:
            told += [*map(str, self.place(name)), self.setup.backend_of(name), identify(self.device_of)]
        return json.dumps(told, sort_keys=True, default=list)

    def source(self, part: Part) -> Any:
        """The tensors of a part as they are loaded: LoRAs added, where they are to be."""
        return self.adapters.fused(part.component, part.source)

    def swaps(self, name: str) -> tuple[Swap, ...]:
        """Those of a component; LoRAs come last, beside whatever is there then."""
        return (*(swap for swap in self.own_swaps if name in swap.components), *self.adapters.swaps(name))

    def place(self, name: str) -> tuple[Any, str]:
        """dtype and device of a component."""
        import torch

        return getattr(torch, self.setup.dtype_of(name)), self.setup.device_of(name)

    def files(self, name: str) -> dict[str, str]:
        """File name -> sha256 of what a part is made of, LoRAs included; they are read, the part is not loaded.

        Of files with one name in different folders the second is ``NAME (2)``."""
        part = self.model.parts[name]
        if part.source is None:
            from ditkit.checkpoints.files.stored import hash_of  # needs torch

            return {vocabulary(part).name: hash_of(vocabulary(part))}
        found = dict(part.source.sha256)
        for adapter, _ in self.adapters.by_expert.get(name, ()):
            for file, sha256 in adapter.source.sha256.items():
                names = itertools.chain([file], (f"{file} ({n})" for n in itertools.count(2)))
                found[next(free for free in names if found.get(free, sha256) == sha256)] = sha256
        return found

    def describe(self) -> dict[str, dict[str, Any]]:
        with self._lock:
            return {name: self.facts(name) for name in self.holder.loaded}

    def facts(self, name: str) -> dict[str, Any]:
        """What ``describe`` tells of one part, loaded or not; its class only once it is loaded."""
        part, component = self.model.parts[name], self.holder.loaded.get(name)
        facts: dict[str, Any] = {} if component is None else {"class": type(component).__name__}
        facts |= {"dtype": "none", "device": "cpu", "files": self.files(name), "notes": list(part.notes)}
        if part.source is None:
            return facts
        dtype, device = self.place(name)
        facts |= {"dtype": str(dtype).removeprefix("torch."), "device": device, "layout": part.layout,
                  "quantization": part.quantization}  # fmt: skip
        if (backend := self.setup.backend_of(name)) != "torch":
            facts |= {"backend": exact_name(backend), **getattr(component, "facts", {})}
        swaps = [swap.name for swap in self.own_swaps if name in swap.components]
        if name not in EXPERTS:
            return {**facts, "swaps": swaps} if swaps else facts
        more = {"dtype_policy": self.setup.dtype_policy, "attention": self.setup.attention}
        return {**facts, **more, "swaps": swaps, "loras": self.adapters.describe(name)}
