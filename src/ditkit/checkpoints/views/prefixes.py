"""What training code and other programs put in front of a network's names, taken away.

A prefix counts only as whole segments of a name, and only when every tensor of the file has it. Wrappers of torch are
removed wherever they stand. Leaves out: the names themselves (key_table.py), files of several networks, LoRA.
Sources: Self-Forcing ``inference.py``, ComfyUI ``model_detection.py``, torch ``fully_sharded_data_parallel.py``,
``eval_frame.py`` (``_orig_mod``), ``checkpoint_wrapper.py``."""

from collections.abc import Iterable
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
        self.prefix = shared_prefix(inner.values())
        names: dict[str, str] = {}
        for name, middle in inner.items():
            bare = middle.removeprefix(self.prefix)
            if bare in names:
                asked, both = f"removing the prefixes in {source.path}", some((name, names[bare]))
                raise LoadError(asked, f"{both} would both be {bare}", "Use a file that holds one network once")
            names[bare] = name
        wrappers = {part for name in source.tensors for part in name.split(".")} & WRAPPERS
        away = (self.prefix, *sorted(wrappers))
        super().__init__(source, tuple(f"{part} was removed from the names" for part in away if part))
        self._names = names
        self.tensors = MappingProxyType({bare: source.tensors[name] for bare, name in names.items()})

    def same(self, name: str) -> str:
        return self._names[name]
