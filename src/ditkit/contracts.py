"""The shapes that parts must have to fit together: components and seams, as protocols.

A component is any object with these attributes; nothing needs to be inherited. Importing this file does not import
torch. Legend: B batch, C latent channels, F latent frames, h x w latent size, T pixel frames, H x W pixel size,
L tokens, N heads, d head width, D text width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ditkit.events import SILENT, Events
from ditkit.identify import described, identify

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

EXPERTS = ("transformer", "transformer_2")
"""The transformers that a model may have; of two, the first is the one for high noise."""

History = Mapping[str, "Tensor"]
"""What a scheduler remembers between steps; named tensors only, so that it can be saved in a State."""


@dataclass(frozen=True)
class Step:
    """One step of a denoising run, handed to everything that needs to know where it is.

    ``sigma`` and ``sigma_next`` are in [0, 1]; ``timestep`` is what the transformer is told (its own unit);
    ``guidance_scale`` is 1 when no second pass runs; ``branch`` is ``cond`` or ``uncond`` inside guidance, or one of
    these with a plug's own name behind a colon (``cond:skip``); ``expert`` names the transformer that runs the step.
    ``frames``: the latent frames (from, to) that x holds where a plug works on a part of them, else None."""

    index: int
    count: int
    sigma: float
    sigma_next: float
    timestep: float
    guidance_scale: float = 1.0
    branch: str = "cond"
    expert: str = "transformer"
    frames: tuple[int, int] | None = None

    def window(self, start: int, stop: int) -> Step:
        """The same step for ``x[:, :, start:stop]``: what the transformer is conditioned on is narrowed with it."""
        first = self.frames[0] if self.frames else 0
        return replace(self, frames=(first + start, first + stop))


@dataclass(frozen=True)
class Site:
    """Where an attention call stands: ``kind`` is ``self``, ``cross`` (text), ``image`` or ``joint``; ``grid`` the
    tokens as (F, h/2, w/2); ``step`` the denoising step with its branch, None when the transformer is called outside a
    run; ``control`` whether it is VACE's control block beside that block, and not the block itself."""

    block: int
    kind: str
    grid: tuple[int, int, int]
    step: Step | None = None
    control: bool = False


class Predict(Protocol):
    """Seam A. ``x`` [B, C, F, h, w] float32 -> velocity of the same shape, float32."""

    def __call__(self, x: Tensor, step: Step) -> Tensor: ...


class BlockContext(Protocol):
    """What each block needs besides its tokens, as plugs at seam B see it; a network may put more into its own.

    ``step``: with its branch, None outside of a run. ``grid``: the video tokens as (F, h/2, w/2). ``tokens``: which
    rows of x are ``video``, ``text`` or ``control``; networks with joint attention have several kinds in one x."""

    step: Step | None
    grid: tuple[int, int, int]
    tokens: Mapping[str, slice]

    def rows(self, index: slice) -> BlockContext:
        """The context of the rows ``x[:, index]``."""

    def shifted(self, frames: int) -> BlockContext:
        """The context of the same tokens as if they stood ``frames`` latent frames later."""


class RunBlocks(Protocol):
    """Seam B. All tokens ``x`` [B, L, dim] through the blocks, with what each of them needs besides (a BlockContext).
    A block knows its own number."""

    def __call__(self, blocks: Iterable[nn.Module], x: Tensor, ctx: Any) -> Tensor: ...


class Attend(Protocol):
    """Seam D. ``q`` [B, Lq, N, d], ``k`` and ``v`` [B, Lk, N, d] -> [B, Lq, N, d] in v's dtype."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor: ...


@dataclass(frozen=True)
class Swap:
    """Seam C. Before a component's weights are read, every module whose dotted path and type satisfy ``match`` is
    replaced by ``make(module)``. All that is there then is on the meta device: shapes and types without data.

    A parameter that the new module takes over from the old one, wherever it puts it, is filled from the files as it
    would have been, and so is a new one of the same name and shape. A method ``load_weight(tensor)`` (``load_NAME`` for
    the parameter NAME) fills it in another way: it is given a ``checkpoints.load.SourceTensor``, which has the numbers
    (``read``) and the stored form (``stored``: codes, scales, format). What it returns becomes the parameter; after
    None there is none. Tensors with data of their own are moved to where the component is. Every tensor of the files
    has to be read, every parameter filled.

    ``components``: those that it is for. One in which it matches nothing is an error, and so is a model without any."""

    name: str
    match: Callable[[str, nn.Module], bool]
    make: Callable[[nn.Module], nn.Module]
    components: tuple[str, ...] = EXPERTS

    @property
    def fingerprint(self) -> str:
        """Its name, what its functions are (``identify``), and whom it is for, if not the transformers."""
        whom = "" if self.components == EXPERTS else f" {','.join(self.components)}"
        return f"{self.name} {identify(self.match)} {identify(self.make)}{whom}"


class Scheduler(Protocol):
    """Seam E. Where the sigmas lie and how one step is taken."""

    name: str
    needs_noise: bool

    def sigmas(self, steps: int, shift: float, convention: str) -> list[float]:
        """``steps + 1`` falling values in [0, 1], the last one 0."""

    def solve(
        self, x: Tensor, velocity: Tensor, step: Step, history: History, noise: Tensor | None = None
    ) -> tuple[Tensor, History]:
        """One step: x at ``step.sigma`` -> x at ``step.sigma_next``, all float32 (float64 stays float64).

        ``history`` is the mapping returned by the step before ({} at first); it is never changed in place."""


@dataclass(frozen=True)
class Seams:
    """What plugs into a run. Wrappers take the inner function, and the run (``seams.PlugContext``) if they have a
    second parameter, and return the outer function; the first listed is the outermost. Empty is neutral: bit-equal to
    nothing being there."""

    predict: tuple[Callable[..., Predict], ...] = ()
    run_blocks: tuple[Callable[..., RunBlocks], ...] = ()
    attend: tuple[Callable[..., Attend], ...] = ()
    swaps: tuple[Swap, ...] = ()
    scheduler: Scheduler | None = None

    def of(self, components: Iterable[str]) -> Seams:
        """What counts for a stage that calls these: of the swaps those that change one of them."""
        return replace(self, swaps=tuple(swap for swap in self.swaps if {*swap.components} & {*components}))

    def describe(self) -> dict[str, list[str]]:
        """What is plugged in, by seam; neutral seams are left out. Equal descriptions mean equal plugs: one that could
        hide a difference (a lambda, a closure) gets a name that no other ever has. Give it a ``fingerprint``
        attribute, make it a function without closure or a frozen dataclass, and its description lasts."""
        plugs = {**vars(self), "scheduler": () if self.scheduler is None else (self.scheduler,)}
        return {seam: [described(p) for p in plugged] for seam, plugged in plugs.items() if plugged}


@runtime_checkable
class Tokenizer(Protocol):
    def __call__(self, prompts: Sequence[str], max_length: int) -> tuple[list[list[int]], list[int]]:
        """Token ids of each prompt, unpadded, end token kept, at most ``max_length``; and how many were cut off."""


@runtime_checkable
class TextEncoder(Protocol):
    fingerprint: str

    def __call__(self, ids: Sequence[int]) -> Tensor:
        """Ids of one prompt -> [len(ids), D]."""


@runtime_checkable
class ImageEncoder(Protocol):
    fingerprint: str

    def encode(self, images: Tensor, processing: str) -> Tensor:
        """Pictures uint8 [B, I, J, 3] -> features [B, r, d]. ``processing``: wan or diffusers (resize, crop)."""


@runtime_checkable
class Transformer(Protocol):
    fingerprint: str
    timestep_scale: float  # timestep = timestep_scale * sigma
    latent_channels: int
    reads: tuple[str, ...]  # fields of a State that it is conditioned on besides the text
    cfg: bool  # whether guidance is a second pass; without it the step's scale is for the network itself
    device: torch.device
    run_blocks: RunBlocks  # seam B at its neutral setting

    def prepare(
        self, fields: Mapping[str, Any], settings: Any, branch: str = "cond", cache_text_kv: bool = True
    ) -> Any:
        """What forward passes of one branch are conditioned on, made of fields of a State. The object belongs to the
        caller; ``frames(start, stop)`` narrows it to a range of latent frames. With ``cache_text_kv`` it holds what
        each block derives from the text. ``settings``: those of the request, as attributes. Raises StateError."""

    def __call__(self, latents: Tensor, timestep: Tensor, conditioning: Any, *, run_blocks: RunBlocks, attend: Attend,
                 step: Step | None = None) -> Tensor:  # fmt: skip
        """``latents`` [B, C, F, h, w], ``timestep`` [B] -> velocity (noise minus data) of the latents' shape.
        ``timestep`` is float64 on the latents' device, or on the CPU where that has no float64 (Apple's GPU).

        ``step`` changes nothing here; it is what seams B and D are told."""


@runtime_checkable
class VAE(Protocol):
    fingerprint: str
    device: torch.device
    dtype: torch.dtype

    def encode(self, video: Tensor, frames_per_chunk: int = 4) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] -> normalised latents [B, C, F, h, w]."""

    def decode(self, latents: Tensor, frames_per_chunk: int = 1) -> Iterator[Tensor]:
        """Normalised latents -> chunks [B, 3, t, H, W] in [-1, 1], in order."""


@dataclass(frozen=True)
class Wish:
    """What a language model is asked for: ``instructions`` tell how, ``pictures`` are uint8 [H, W, 3] arrays."""

    instructions: str
    prompt: str
    pictures: tuple[Any, ...]
    temperature: float
    seed: int
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    """``raw`` is all that came, ``text`` without a reasoning block. ``told_model`` and ``told_build``: what the server
    said of itself. ``finish``: ``stop``, or why it ended early, such as ``length``. Tokens are None where not told."""

    raw: str
    text: str
    reasoning: str
    model: str
    told_model: str
    told_build: str
    finish: str
    prompt_tokens: int | None
    tokens: int | None


@runtime_checkable
class PromptExpander(Protocol):
    """A language model that makes a longer prompt of a short one. ``name`` is where it is, as a person wrote it."""

    name: str

    @property
    def fingerprint(self) -> str: ...

    def load(self, events: Events = SILENT) -> None:
        """Bring it into memory, if it is to be in this process, and tell of that. Raises LoadError."""

    def __call__(self, wish: Wish) -> Answer:
        """Raises PlaceError when no answer came."""
