"""Components: the parts of a model, each built on the meta device and filled strictly when it is first asked for.

Leaves out: finding the parts (``find.py``) and what a run does with them.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ditkit.assembly.adapters import Adapters
from ditkit.assembly.identity import identity_of
from ditkit.assembly.model import Model, vocabulary
from ditkit.contracts import Swap
from ditkit.errors import LoadError, SetupError
from ditkit.events import SILENT, Events
from ditkit.mlx import exact_name
from ditkit.prompting import open_expander
from ditkit.setup import Setup
from ditkit.shared import Holder, Shared
from ditkit.store.cache import remember_hashes

if TYPE_CHECKING:
    from ditkit.checkpoints.model.locate import Part

EXPANDER = "prompt_expander"
"""Of the setup, not of the model: it is held beside the model's parts, and told of in the State's ``expansion``."""


class Components(Mapping[str, Any]):
    """The parts of a model, each loaded when it is first asked for, once, whichever thread asks.

    Parts of equal files, sizes, dtype, device and swaps are one object for all Components with the same ``shared``.
    ``describe()`` tells of each loaded part its class, dtype, device, policy and files."""

    def __init__(self, model: Model, setup: Setup, swaps: tuple[Swap, ...] = (), shared: Shared | None = None):
        self.model, self.setup, self.own_swaps = model, setup, swaps
        remember_hashes(setup)
        self.adapters = Adapters.open(setup, model.parts)
        self.holder = Holder(
            shared or Shared(),
            {name: (partial(self._key, name), partial(self._make, name)) for name in model.parts},
            self._check,
        )
        self.expander = None if setup.expander is None else open_expander(setup)
        self._identities: dict[str, Callable[[], str]] = {}
        self._stamps = {name: self._stamp(name) for name in model.parts}
        self._lock = threading.RLock()

    def __getitem__(self, name: str) -> Any:
        return self.get_component(name, SILENT)

    def get_component(self, name: str, events: Events) -> Any:
        with self._lock:
            if name == EXPANDER and self.expander is not None:
                self.expander.load(events)
                return self.expander
            if name in self.holder.loaded:
                return self.holder[name]
            with events.span("load", component=name):
                component = self.holder[name]
            for note in self.model.parts[name].notes:
                events.emit("load.note", component=name, note=note)
            return component

    def fingerprint_of(self, name: str) -> str:
        """That of the component, also of one that is not loaded: its files are read once, and hashed."""
        if name == EXPANDER and self.expander is not None:
            return self.expander.fingerprint
        loaded = self.holder.loaded.get(name)
        if loaded is None:
            self._check(name)
        return loaded.fingerprint if loaded is not None else self._identity(name)()

    def _identity(self, name: str) -> Callable[[], str]:
        if name not in self._identities:
            self._identities[name] = identity_of(self, self.model.parts[name])
        return self._identities[name]

    def _make(self, name: str) -> Any:
        part = self.model.parts[name]
        component = LOADERS[part.kind](self, part)
        component.identify = self._identity(name)
        return component

    def _check(self, name: str) -> None:
        """Raises LoadError when the part is locked and its bytes are others, whoever loaded them; and when a file is
        not the one that was opened: its tensors would be read from the places that the old header told."""
        self.model.verify.get(name, lambda: None)()
        now, opened = self._stamp(name), self._stamps[name]
        if changed := sorted(file for file in opened if now.get(file) != opened[file]):
            raise LoadError(
                f"loading the {name} of {self.model.name}",
                f"{changed[0]} has changed since the model was opened",
                "Open the model again",
            )

    def _stamp(self, name: str) -> dict[str, tuple[int, int]]:
        """Size and time of change of all files that a part is read from, LoRAs and config included."""
        part = self.model.parts[name]
        weights = part.source.files if part.source else (vocabulary(part),)
        config = (part.path if part.path.is_dir() else part.path.parent) / "config.json"
        loras = [file for adapter, _ in self.adapters.by_expert.get(name, ()) for file in adapter.source.files]
        there = [file for file in (*weights, *loras, config) if file.exists()]
        return {str(file): (stat.st_size, stat.st_mtime_ns) for file in there for stat in (file.stat(),)}

    def _key(self, name: str) -> Any:
        """What two parts must have in common to be one object. Files count by place, size and time, so a copy of a file
        is another one: to know that it is not would mean to read both."""
        part = self.model.parts[name]
        source = self.source(part) if part.source else None
        files = source.files if source else [vocabulary(part)]
        stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        told = [part.kind, dict(part.config), stats, source.sketch if source else ""]
        if part.kind == "wan":  # the one kind that has a dtype_policy and swaps
            told += [self.setup.dtype_policy, [s.fingerprint for s in self.swaps(name)]]
        place = [] if part.kind == "tokenizer" else [*map(str, self.place(name)), self.setup.backend_of(name)]
        return json.dumps([*told, place], sort_keys=True, default=list)

    def source(self, part: Part) -> Any:
        """The tensors of a part as they are loaded: LoRAs added, where they are to be."""
        return self.adapters.fused(part.component, part.source) if part.kind == "wan" else part.source

    def swaps(self, name: str) -> tuple[Swap, ...]:
        return (*self.adapters.swaps(name), *self.own_swaps)

    def listening(self, events: Events) -> Mapping[str, Any]:
        """The same components; ``events`` hears of those that are loaded through this view."""
        return _Listening(self, events)

    def __contains__(self, name: object) -> bool:  # a Mapping's own one would load it
        return name in [*self]

    def __iter__(self) -> Iterator[str]:
        return iter([*self.model.parts, *([] if self.expander is None else [EXPANDER])])

    def __len__(self) -> int:
        return len(self.model.parts) + (self.expander is not None)

    def place(self, name: str) -> tuple[Any, str]:
        """dtype and device of a component."""
        import torch

        return getattr(torch, self.setup.dtype_of(name)), self.setup.device_of(name)

    def files(self, name: str) -> dict[str, str]:
        """File name -> sha256 of what a part is made of, LoRAs included; they are read, the part is not loaded.

        Of files with one name in different folders the second is ``NAME (2)``."""
        from ditkit.checkpoints.files.opening import file_hash

        part = self.model.parts[name]
        if part.source is None:
            return {vocabulary(part).name: file_hash(vocabulary(part))}
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
        facts |= {"dtype": str(dtype).removeprefix("torch."), "device": device, "layout": part.layout}
        facts |= {"quantization": part.quantization}
        if (backend := self.setup.backend_of(name)) != "torch":
            facts |= {"backend": exact_name(backend), **getattr(component, "facts", {})}
        if part.kind != "wan":
            return facts
        more = {"dtype_policy": self.setup.dtype_policy, "attention": self.setup.attention}
        return {**facts, **more, "swaps": [s.name for s in self.own_swaps], "loras": self.adapters.describe(name)}


def load_tokenizer(components: Components, part: Part) -> Any:
    from ditkit.models.text import WanTokenizer

    return WanTokenizer(vocabulary(part).parent)


def load_umt5(components: Components, part: Part) -> Any:
    from ditkit.models.umt5 import UMT5Config, UMT5TextEncoder

    assert part.source is not None
    config, place = UMT5Config(**part.config), components.place(part.component)
    backend = components.setup.backend_of(part.component)
    if backend == "torch":
        return UMT5TextEncoder.load(config, part.source, None, *place)
    from ditkit.mlx.umt5 import MLXTextEncoder

    return MLXTextEncoder.load(config, part.source, None, *place, backend)


def load_clip(components: Components, part: Part) -> Any:
    from ditkit.models.clip import CLIPConfig, CLIPImageEncoder

    assert part.source is not None
    return CLIPImageEncoder.load(CLIPConfig(**part.config), part.source, None, *components.place(part.component))


def load_wan(components: Components, part: Part) -> Any:
    import torch

    from ditkit.checkpoints.load import load_into
    from ditkit.models.wan import WanConfig, WanTransformer
    from ditkit.nn.dtype_policy import dtype_policy

    assert part.source is not None
    setup, config = components.setup, WanConfig(**part.config)
    dtype, device = components.place(part.component)
    policy = dtype_policy(setup.dtype_policy, dtype)
    with torch.device("meta"):
        module = WanTransformer(config, policy).eval().requires_grad_(False)
    source, swaps = components.source(part), components.swaps(part.component)
    load_into(module, source, dtype_of=policy.weight_dtype, device=device, check_finite=True)
    apply_swaps(module, swaps)
    return module


def load_vae(components: Components, part: Part) -> Any:
    import torch

    from ditkit.checkpoints.load import load_into
    from ditkit.models.wan_vae import WanVAE, WanVAEConfig
    from ditkit.models.wan_vae22 import WanVAE22, WanVAE22Config

    assert part.source is not None
    classes: dict[str, tuple[Any, Any]] = {
        "wan_vae": (WanVAE, WanVAEConfig),
        "wan_vae22": (WanVAE22, WanVAE22Config),
    }
    cls, config_cls = classes[part.kind]
    config = config_cls(**part.config)
    dtype, device = components.place(part.component)
    with torch.device("meta"):
        module = cls(config).eval().requires_grad_(False)
    load_into(module, part.source, dtype_of=lambda name: dtype, device=device, check_finite=True)
    return module


def load_taehv(components: Components, part: Part) -> Any:
    from ditkit.models.taehv import TAEHV, TAEHVConfig

    assert part.source is not None
    return TAEHV.load(TAEHVConfig(**part.config), part.source, *components.place(part.component))


LOADERS: Mapping[str, Callable[[Components, Any], Any]] = MappingProxyType({
    "tokenizer": load_tokenizer,
    "umt5": load_umt5,
    "clip": load_clip,
    "wan": load_wan,
    "wan_vae": load_vae,
    "wan_vae22": load_vae,
    "taehv": load_taehv,
})  # fmt: skip
"""Kind of a part -> what builds and fills it."""


class _Listening(Mapping[str, Any]):
    def __init__(self, components: Components, events: Events):
        self._components, self._events = components, events

    def __getitem__(self, name: str) -> Any:
        return self._components.get_component(name, self._events)

    def fingerprint_of(self, name: str) -> str:
        return self._components.fingerprint_of(name)

    def __contains__(self, name: object) -> bool:
        return name in self._components

    def __iter__(self) -> Iterator[str]:
        return iter(self._components)

    def __len__(self) -> int:
        return len(self._components)


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
