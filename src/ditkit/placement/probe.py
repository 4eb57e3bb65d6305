"""The golden probe: what a stage makes of an input that never changes, as a hash and as numbers to judge a difference.

The input is made of the sizes of the components and of fixed numbers: a prompt that needs cleaning, a picture drawn by
a formula, noise of seed 7; one step of the loop for each transformer that is there. Equal weights, dtypes and code give
an equal hash on equal devices; two kinds of devices seldom agree in every bit.
Leaves out: who compares (``remote.py``)."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ditkit.contracts import EXPERTS
from ditkit.errors import PlaceError
from ditkit.execution.stage import Stage
from ditkit.placement.job import Job, Message, error_of, options_to_send, state_to_outcome
from ditkit.placement.worker import Worker
from ditkit.request import Request
from ditkit.state import State, digest, kind_of

PROMPT = "A  “red” kite &amp; two dogs,\n一只猫 "  # each step of the cleaning changes it
FIXED = ("tokenizer", "text_encoder", "image_encoder", "vae")  # they and transformers give the same for the same
SEED, ROWS, SIGMAS = 7, 5, [0.75, 0.0]


def probe_of(worker: Worker, name: str, cancelled: threading.Event | None = None) -> dict[str, Any]:
    """``hash`` over all that the stage writes, and of each tensor its dtype, shape, root mean square and first values.
    Raises PlaceError for a stage whose fixed input is not known."""
    stage, written = worker.stages[name], list[dict[str, Any]]()
    for inputs in cases(stage, worker.components):
        frames = list[Message]()
        job = Job("probe", name, options_to_send(stage), ignore=("prediction", "frames"))
        worker.run(job, inputs, frames.append, cancelled or threading.Event())
        if frames[-1].kind != "outcome":
            raise error_of(frames[-1].payload, "the probe")
        outcome, _ = state_to_outcome(frames[-1].state("the probe"))
        written.append(dict(outcome.written))
    hashes = [[[field, digest(fields[field])] for field in sorted(fields)] for fields in written]
    numbers = [{k: figures(v) for k, v in fields.items() if kind_of(v) != "tensors"} for fields in written]
    return {"stage": name, "hash": digest(hashes), "numbers": numbers}


def has_probe(components: Iterable[str]) -> bool:
    """Whether a stage that calls these gives the same for the same input."""
    return all(name in FIXED or name in EXPERTS for name in components)


def figures(value: Any) -> Any:
    """Of a tensor what a person compares; of a plain field its value."""
    if kind_of(value) != "tensor":
        return value
    wide = value.double()
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape),
            "rms": float(wide.square().mean().sqrt()), "first": [float(x) for x in wide.flatten()[:4]]}  # fmt: skip


def cases(stage: Stage, components: Mapping[str, Any]) -> Iterator[State]:
    """One input; of a stage with several transformers one for each of them that is here. Raises PlaceError."""
    makers: dict[str, Callable[[], Any]] = {
        "prompt": lambda: [PROMPT], "negative_prompt": lambda: ["blurry"], "seed": lambda: [SEED],
        "image": lambda: picture(40, 56), "request": lambda: _request(stage),
        "latents": lambda: noise(components["vae"].config.z_dim, 2, 4, 4),
    }  # fmt: skip
    if stage.loop:
        for name in (name for name in stage.components if name in components):
            second = float(name != stage.components[0]) if len(stage.components) > 1 else None
            yield _denoising(stage, components[name], second)
        return
    names = {*stage.reads, *stage.triggers}
    unknown = [*sorted(names - set(makers)), *(n for n in stage.components if not has_probe([n]))]
    if unknown:
        found = f"there is no fixed input for {', '.join(unknown)}"
        raise PlaceError(f"probing stage {stage.name!r}", found, "Do without")
    yield State({name: makers[name]() for name in sorted(names)})


def _denoising(stage: Stage, transformer: Any, boundary: float | None) -> State:
    """``boundary`` 1 is a step of the second transformer, 0 of the first; None where there is one alone. Raises
    PlaceError for a network that brings no inputs to try it with."""
    if not hasattr(transformer, "probe_fields"):
        found = f"{type(transformer).__name__} has no probe_fields"
        raise PlaceError(f"probing stage {stage.name!r}", found, "Do without, or add the method")
    request = _request(stage, boundary, transformer.patch)
    return State({"request": request, "seed": [SEED], **transformer.probe_fields(noise, ROWS)})


def _request(stage: Stage, boundary: float | None = None, patch: tuple[int, int, int] = (1, 2, 2)) -> dict[str, Any]:
    """Two latent frames of two patches each way, by the strides that the stage knows."""
    t, h, w = getattr(stage, "strides", (4, 16, 16))
    request = Request(
        prompt=PROMPT, seed=SEED, sigmas=SIGMAS, scheduler="euler", boundary=boundary, guidance_scale=3.0,
        width=2 * w * patch[2], height=2 * h * patch[1], frames=t + 1,
    )  # fmt: skip
    return request.model_dump()


def noise(channels: int, frames: int, height: int, width: int, seed: int = 0) -> Any:
    """float32 [1, channels, frames, height, width]."""
    from ditkit.schedulers.noise import initial_noise

    return initial_noise(SEED + seed, (channels, frames, height, width))[None]


def picture(height: int, width: int) -> Any:
    """uint8 [1, height, width, 3]; no generator of random numbers has a say in it."""
    import torch

    y, x, c = torch.meshgrid(torch.arange(height), torch.arange(width), torch.arange(3), indexing="ij")
    return ((x * x + 3 * y * (c + 1) + 31 * c) % 256).to(torch.uint8)[None]
