"""What training code and other programs put in front of a network's names, taken away.

A prefix counts only as whole segments of a name, and only when every tensor of the network has it. Wrappers of torch
are removed wherever they stand. A file of several networks, each under a prefix of its own, is seen as one of them
(``Section``); which prefixes those are is told by ``kinds/detect.py``. Leaves out: the names themselves (key_table.py),
LoRA.
Sources: Self-Forcing ``inference.py``, ComfyUI ``model_detection.py``, torch ``fully_sharded_data_parallel.py``,
``eval_frame.py`` (``_orig_mod``), ``checkpoint_wrapper.py``."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from ditkit.checkpoints.files.text import some
from ditkit.checkpoints.views.source import TensorSource, View
from ditkit.errors import LoadError

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "module.")
MARKERS = MappingProxyType({
    "spiece_model": "the tokenizer is opened from its own file", "scaled_fp8": "a marker; the scales say the same",
})  # fmt: skip
"""Tensors that belong to the file and not to the network, so they may stand outside of the prefix -> why nothing is
lost without them."""


def unwrapped(name: str) -> str:
    """``name`` without the segments that torch's wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def shared_prefix(names: Iterable[str]) -> str:
    """The prefixes of the table that all ``names`` begin with, one after the other; markers do not count."""
    names = [name for name in names if name not in MARKERS]
    found = ""
    while here := next((p for p in PREFIXES if names and all(name.startswith(p) for name in names)), ""):
        found += here
        names = [name.removeprefix(here) for name in names]
    return found


class Unprefixed(View):
    """``source`` under its bare names. ``prefix`` is what was taken from the front, ``""`` when there was nothing.

    Raises LoadError when two tensors would get one name."""

    def __init__(self, source: TensorSource):
        inner = {name: unwrapped(name) for name in source.tensors}
        self._remove(source, inner, shared_prefix(inner.values()))

    def _remove(self, source: TensorSource, inner: Mapping[str, str], prefix: str) -> None:
        """``inner``: name in the source -> that without wrappers, for the tensors that are seen."""
        self.prefix = prefix
        names: dict[str, str] = {}
        for name, middle in inner.items():
            bare = middle.removeprefix(self.prefix)
            if bare in names:
                asked, both = f"removing the prefixes in {source.path}", some((name, names[bare]))
                raise LoadError(asked, f"{both} would both be {bare}", "Use a file that holds one network once")
            names[bare] = name
        wrappers = {part for name in inner for part in name.split(".")} & WRAPPERS
        away = (self.prefix, *sorted(wrappers))
        View.__init__(self, source, tuple(f"{part} was removed from the names" for part in away if part))
        self._names = names
        self.tensors = MappingProxyType({bare: source.tensors[name] for bare, name in names.items()})

    def same(self, name: str) -> str:
        return self._names[name]


class Section(Unprefixed):
    """The tensors of ``source`` whose names begin with ``prefix``, without it: one of several networks in a file, or
    the only one. ``others``: prefixes of the rest, which is not seen. Raises LoadError where nothing begins so."""

    def __init__(self, source: TensorSource, prefix: str, others: Iterable[str] = ()):
        deeper = tuple(other for other in others if other.startswith(prefix) and other != prefix)
        names = {name: unwrapped(name) for name in source.tensors}
        own = {
            name: inner for name, inner in names.items() if inner.startswith(prefix) and not inner.startswith(deeper)
        }
        self.whole = all(name in own or name in MARKERS for name in names)
        if self.whole:
            own = names
        if not own:
            begin = ", ".join(sorted({name.split(".")[0] for name in names})[:6])
            found = f"no name of its tensors begins with {prefix!r}; they begin with {begin}"
            raise LoadError(f"opening {source.path}", found, "Name one of its networks by its prefix: FILE#PREFIX")
        self._remove(source, own, prefix)
        if not self.whole:
            self.notes += (f"{len(names) - len(own)} other tensors of {source.path.name} belong to other networks",)

    def _hash(self, base: str) -> str:
        return base if self.whole else hashlib.sha256(json.dumps([base, self.prefix]).encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        return self._hash(self.source.fingerprint)

    @property
    def sketch(self) -> str:
        return self._hash(self.source.sketch)
