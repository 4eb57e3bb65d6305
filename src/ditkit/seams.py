"""Wrappers at the seams A, B and D: how they are put around what they wrap, and what a plug is given of the run.

A plug's memory belongs to the run: it is kept apart by plug, expert and branch, and it is saved with the loop, so that
a run that was cut goes on with it. Leaves out: the signatures (``contracts.py``) and names of plugs (``identify.py``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from ditkit.contracts import Step
from ditkit.errors import PipelineError, RequestError
from ditkit.events import SILENT, Events

if TYPE_CHECKING:
    from torch import Tensor


class Memory(MutableMapping[str, "Tensor"]):
    """Named tensors that one plug remembers from step to step, of one expert and one branch.

    Any shape, dtype and device. A tensor is replaced, never written in place: the one of the last whole step is what a
    run goes on from. Raises PipelineError for anything but a tensor, RequestError in a batch of several clips."""

    def __init__(self, store: dict[str, Tensor], owner: str, clips: int = 1):
        self._store, self._owner, self._clips = store, owner, clips

    def __getitem__(self, name: str) -> Tensor:
        return self._store[f"{self._owner}/{name}"]

    def __setitem__(self, name: str, value: Tensor) -> None:
        if not hasattr(value, "untyped_storage"):
            raise PipelineError(f"remembering {name!r} of {self._owner}", f"it is a {type(value).__name__}",
                                "Make it a tensor, such as torch.tensor(value)")  # fmt: skip
        if self._clips > 1:
            raise RequestError(f"a batch of {self._clips} clips with {self._owner}",
                               "its memory would be shared by all of them", "Set batched to false")  # fmt: skip
        self._store[f"{self._owner}/{name}"] = value

    def __delitem__(self, name: str) -> None:
        del self._store[f"{self._owner}/{name}"]

    def __iter__(self) -> Iterator[str]:
        start = f"{self._owner}/"
        return iter([name.removeprefix(start) for name in self._store if name.startswith(start)])

    def __len__(self) -> int:
        return sum(1 for _ in self)


class PlugContext:
    """What a plug is given of the run. ``memory``: tensors that are saved with the loop; ``events``: who listens;
    ``settings``: those of the request, as attributes. ``expert``, ``branch``: whose calls it wraps; at seam A all
    branches, and the name is empty."""

    def __init__(self, name: str, seam: str, expert: str, branch: str, memory: Memory, events: Events, settings: Any):
        self.name, self.seam, self.expert, self.branch = name, seam, expert, branch
        self.memory, self.events, self.settings = memory, events, settings

    def tell(self, what: str, step: Step, **values: Any) -> None:
        """Tell of a decision, such as ``hit``: an event ``plug``, counted in the receipt."""
        self.events.emit("plug", plug=self.name, seam=self.seam, what=what, expert=self.expert, branch=self.branch,
                         step=step, **values)  # fmt: skip


class RunPlugs:
    """The plugs of one run and what they remember. ``remembered``: the tensors of a State's field ``memory``."""

    def __init__(self, events: Events = SILENT, settings: Any = None, clips: int = 1,
                 remembered: Mapping[str, Tensor] | None = None, device: Any = None):  # fmt: skip
        self.events, self.settings, self.clips = events, settings, clips
        kept = remembered or {}
        self._store = {name: t.detach().to(device or t.device, copy=True) for name, t in kept.items()}

    def wrap(self, inner: Any, seam: str, wrappers: Sequence[Callable[..., Any]], expert: str, branch: str = "") -> Any:
        """``inner`` inside of ``wrappers``, the first listed outermost. One that takes a second argument is given the
        run (PlugContext), with a memory of its own for each expert and branch."""
        names = plug_names(wrappers)
        for wrapper, name in reversed([*zip(wrappers, names, strict=True)]):
            owner = ".".join(part for part in (seam, name, expert, branch) if part)
            memory = Memory(self._store, owner, self.clips)
            run = PlugContext(name, seam, expert, branch, memory, self.events, self.settings)
            inner = wrapper(inner, run) if takes_run(wrapper) else wrapper(inner)
        return inner

    def remembered(self) -> dict[str, Tensor]:
        """All that is remembered now, on the device where it is; later changes do not reach it."""
        return dict(self._store)

    def drop_strangers(self, seams: Mapping[str, Sequence[Any]]) -> None:
        """Forget what plugs remember that are not plugged in now, and tell of it."""
        known = {(seam, name) for seam, wrappers in seams.items() for name in plug_names(wrappers)}
        for owner in sorted({name.partition("/")[0] for name in self._store}):
            if tuple(owner.split(".")[:2]) not in known:
                lost = [key for key in self._store if key.startswith(f"{owner}/")]
                self.events.emit("memory.dropped", plug=owner, names=[key.partition("/")[2] for key in lost])
                for key in lost:
                    del self._store[key]


def plug_names(wrappers: Sequence[Any]) -> list[str]:
    """Short names, told apart by a number where one occurs twice: ``FirstBlockCache``, ``FirstBlockCache-2``."""
    names: list[str] = []
    for wrapper in wrappers:
        name = getattr(wrapper, "plug_name", None) or getattr(wrapper, "__name__", type(wrapper).__name__)
        name = str(name).replace(".", "_").replace("/", "_")
        count = sum(1 for other in names if other == name or other.startswith(f"{name}-"))
        names.append(name if count == 0 else f"{name}-{count + 1}")
    return names


def takes_run(wrapper: Any) -> bool:
    """Whether a wrapper has a second parameter for the run. Raises PipelineError where that cannot be told."""
    try:
        parameters = [*inspect.signature(wrapper).parameters.values()]
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 1 and positional[1].default is inspect.Parameter.empty
