"""Wrappers at the seams A, B and D: how they are put around what they wrap, and what a plug is given of the run.

A plug's memory belongs to the run: it is kept apart by plug, expert and branch, and it is saved with the loop, so that
a run that was cut goes on with it. Leaves out: the signatures (``contracts.py``) and names of plugs (``identify.py``).
"""

from __future__ import annotations

import inspect
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ditkit.contracts import Step
from ditkit.devices import lacks
from ditkit.errors import PipelineError, RequestError, StateError
from ditkit.events import SILENT, Events
from ditkit.state import CODES

if TYPE_CHECKING:
    from torch import Tensor


class Memory(UserDict[str, "Tensor"]):
    """Named tensors that one plug remembers from step to step, of one expert and one branch.

    Any shape and device, and every dtype that a State can hold; a view is made contiguous, as it is in a State. A
    tensor is replaced, never written in place: the one of the last whole step is what a run goes on from. Raises
    PipelineError for what cannot be saved so, also a name that is no text; RequestError in a batch of several clips."""

    def __init__(self, owner: str, clips: int = 1):
        super().__init__()
        self._owner, self._clips = owner, clips

    def __setitem__(self, name: str, value: Tensor) -> None:
        asked, do = f"remembering {name!r} of {self._owner}", "Make it a tensor, such as torch.tensor(value)"
        if not isinstance(name, str):
            raise PipelineError(
                asked, f"its name is a {type(name).__name__}", "Make it a text, such as str(site.block)"
            )
        if not hasattr(value, "untyped_storage"):
            raise PipelineError(asked, f"it is a {type(value).__name__}", do)
        if (
            f"{value.dtype}".removeprefix("torch.") not in CODES
            or f"{value.layout}" != "torch.strided"
            or value.is_meta
        ):
            found = f"a State holds no {value.dtype} of layout {value.layout} on {value.device}"
            raise PipelineError(asked, found, "Remember plain tensors of real numbers")
        if self._clips > 1:
            asked = f"a batch of {self._clips} clips with {self._owner}"
            raise RequestError(asked, "its memory would be shared by all of them", "Set batched to false")
        self.data[name] = value.contiguous()


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
        self._memories: dict[str, Memory] = {}
        for name, t in (remembered or {}).items():
            owner, _, key = name.partition("/")
            if device is not None and lacks(device, t.dtype):
                found = f"{owner} remembers {str(t.dtype).removeprefix('torch.')}, which that device does not have"
                raise StateError(f"going on from a State on {device}", found, "Go on where it was begun")
            self._memory(owner).data[key] = t.detach().to(device or t.device, copy=True)

    def wrap(self, inner: Any, seam: str, wrappers: Sequence[Callable[..., Any]], expert: str, branch: str = "") -> Any:
        """``inner`` inside of ``wrappers``, the first listed outermost. One that takes a second argument is given the
        run (PlugContext), with a memory of its own for each expert and branch."""
        names = plug_names(wrappers)
        for wrapper, name in reversed([*zip(wrappers, names, strict=True)]):
            owner = ".".join(part for part in (seam, name, expert, branch) if part)
            owner = owner.replace("%", "%25").replace("/", "%2F")  # a slash is where the name of a tensor begins
            run = PlugContext(name, seam, expert, branch, self._memory(owner), self.events, self.settings)
            inner = wrapper(inner, run) if takes_run(wrapper) else wrapper(inner)
            if not callable(inner):
                found = f"it gave {type(inner).__name__}, which cannot be called"
                raise PipelineError(
                    f"plugging {name} into the seam {seam}", found, "Return a function like the one given"
                )
        return inner

    def _memory(self, owner: str) -> Memory:
        return self._memories.setdefault(owner, Memory(owner, self.clips))

    def remembered(self) -> dict[str, Tensor]:
        """All that is remembered now, on the device where it is; later changes do not reach it."""
        return {f"{owner}/{name}": t for owner, memory in self._memories.items() for name, t in memory.items()}

    def drop_strangers(self, seams: Mapping[str, Sequence[Any]]) -> None:
        """Forget what plugs remember that are not plugged in now, and tell of it."""
        known = {(seam, name) for seam, wrappers in seams.items() for name in plug_names(wrappers)}
        for owner in sorted(self._memories):
            if tuple(owner.split(".")[:2]) not in known:
                self.events.emit("memory.dropped", plug=owner, names=[*self._memories.pop(owner)])


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
