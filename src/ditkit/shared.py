"""Components by what they are: models that have a component in common hold one copy, and a switch loads the rest only.

A key stands for everything that makes two components interchangeable: the bytes of the weights, the config, dtype,
device, precision, swaps. Whoever asks for a key that somebody holds gets that same object. Nothing is kept alive
here: a component goes when its last holder lets go. Leaves out: how a component is made, and how its key is."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Key = str
Parts = Mapping[str, tuple[Callable[[], Key], Callable[[], Any]]]
"""name -> (its key, made in milliseconds when it is first needed; how to make it)."""


class Shared:
    """The components that are alive, by key. Threads may share it; each key is made once, whoever asks first.

    Components must be objects that a weak reference can be made to, and nobody may change one that is shared."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._making: dict[Key, threading.Lock] = {}
        self._alive: weakref.WeakValueDictionary[Key, Any] = weakref.WeakValueDictionary()

    def get(self, key: Key, make: Callable[[], Any]) -> Any:
        """The component of this key: the one that is alive, or what ``make`` gives. What ``make`` raises passes
        through, and the next who asks tries again."""
        if (found := self._alive.get(key)) is not None:
            return found
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:  # others make other keys meanwhile
            if (found := self._alive.get(key)) is None:
                found = self._alive[key] = make()
        return found

    def __contains__(self, key: Key) -> bool:
        return key in self._alive


class Holder(Mapping[str, Any]):
    """The components of one model, each loaded when it is first asked for and held until ``drop``.

    ``check`` is asked before a component is taken, also one that somebody else has loaded; what it raises passes."""

    def __init__(self, shared: Shared, parts: Parts, check: Callable[[str], None] = lambda name: None):
        self.shared, self._parts, self._check = shared, dict(parts), check
        self._lock = threading.Lock()
        self._keys: dict[str, Key] = {}
        self._held: dict[str, Any] = {}

    def key(self, name: str) -> Key:
        """Stands for the component, whether or not it is loaded. Raises KeyError."""
        if name not in self._keys:
            self._keys[name] = self._parts[name][0]()
        return self._keys[name]

    def __getitem__(self, name: str) -> Any:
        if (found := self._held.get(name)) is not None:
            return found
        key = self.key(name)
        self._check(name)
        found = self.shared.get(key, self._parts[name][1])
        with self._lock:
            return self._held.setdefault(name, found)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def loaded(self) -> Mapping[str, Any]:
        """What is held now, by name; asking loads nothing."""
        with self._lock:
            return dict(self._held)

    def drop(self) -> None:
        """Let go of all components; asked for again, they are loaded again."""
        with self._lock:
            self._held.clear()


@dataclass(frozen=True)
class Switch:
    """What going from one model to another did; the numbers are bytes of tensors, by component."""

    kept: Mapping[str, int]
    freed: Mapping[str, int]
    loaded: Mapping[str, int]
    still_held: Mapping[str, int]
    """What the first model let go of and somebody else still holds."""

    def __str__(self) -> str:
        parts = []
        for word in ("kept", "freed", "loaded", "still_held"):
            if sizes := getattr(self, word):
                each = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
                parts.append(f"{word.replace('_', ' ')} {sum(sizes.values()):,} bytes ({each})")
        return "; ".join(parts) or "nothing was loaded"


def switch(old: Holder, new: Holder) -> Switch:
    """Let go of what only ``old`` needs, then load what ``new`` lacks: the peak is the larger model, not both.

    Components that both have stay where they are. ``old`` can be used again afterwards, also when loading ``new``
    fails; it loads what it lost. Both must hold from one Shared."""
    before = old.loaded
    wanted = {new.key(name): name for name in new}
    both = {name: wanted[old.key(name)] for name in before if old.key(name) in wanted}
    kept = {mine: nbytes([new[mine]]) for mine in both.values()}
    sizes = {name: nbytes([part]) for name, part in before.items() if name not in both}
    keys = {name: old.key(name) for name in sizes}
    old.drop()
    del before
    gc.collect()  # modules with hooks stand in circles
    still = {name: size for name, size in sizes.items() if keys[name] in old.shared}
    freed = {name: size for name, size in sizes.items() if name not in still}
    alive = {name for name in new if name not in kept and new.key(name) in new.shared}
    made = {name: nbytes([new[name]]) for name in new if name not in kept}
    kept |= {name: made.pop(name) for name in alive}
    return Switch(kept, freed, made, still)


def nbytes(components: Iterable[Any]) -> int:
    """Bytes of the tensors of modules, each piece of memory once; tensors without memory (meta) are 0, and so are
    components that neither are a module nor hold one as ``model``."""
    import torch

    seen: dict[tuple[str, int], int] = {}
    for component in components:
        module = component if isinstance(component, torch.nn.Module) else getattr(component, "model", None)
        if isinstance(module, torch.nn.Module):
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.device.type != "meta":
                    memory = tensor.untyped_storage()
                    seen[str(tensor.device), memory.data_ptr()] = memory.nbytes()
    return sum(seen.values())
