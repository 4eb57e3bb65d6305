"""Request: what to make. Every default says where it comes from; nothing here says how (``setup.py``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ditkit.errors import RequestError, UserError, nearest

MAX_SEED = 2**63 - 1
MAX_STEPS = 10_000  # ten for each timestep that a Wan model was trained with; a host must not be asked for more


OLD_NAMES: Mapping[str, str] = MappingProxyType({
    "solver": "scheduler", "solver_options": "scheduler_options", "schedule": "convention", "precision": "dtype_policy",
    "remember_text": "cache_text_kv", "parts": "components", "patience": "timeout", "expect": "expected_probes",
})  # fmt: skip
"""Earlier names of settings -> today's. States, manifests, configs and flags with them are still read."""

CONVENTIONAL = ("convention", "dtype_policy", "image_processing", "rounding")
"""Settings that choose between the code of Wan and of diffusers; ``wan`` was called ``official`` earlier."""


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Translate earlier names and values of settings to today's. Raises ValueError where both names are given."""
    found: dict[str, Any] = {}
    for given, value in values.items():
        name = OLD_NAMES.get(given, given)
        if name in found or (name != given and name in values):
            raise ValueError(f"{name} was given twice, also by its earlier name")
        found[name] = "wan" if name in CONVENTIONAL and value == "official" else value
    return found


def default(value: Any, source: str, text: str) -> Any:
    """A field with its default, where that default comes from, and one line of help."""
    return Field(value, description=text, json_schema_extra={"source": source})


class Settings(BaseModel):
    """Base of Request and Setup: immutable, typed, and without room for unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _today(cls, values: Any) -> Any:
        return renamed(values) if isinstance(values, Mapping) else values

    @classmethod
    def parse(cls, values: Mapping[str, Any], origin: str, error: type[UserError]) -> Self:
        """Build from a mapping; the first fault becomes one sentence that names ``origin``."""
        try:
            return cls(**values)
        except ValidationError as e:
            raise describe(cls, e, values, origin, error) from None


def describe(
    cls: type[BaseModel], e: ValidationError, values: Mapping[str, Any], origin: str, error: type[UserError]
) -> UserError:
    fault = e.errors()[0]
    key = str(fault["loc"][0]) if fault["loc"] else ""
    said = next((f"{name}={value!r}" for name, value in values.items() if OLD_NAMES.get(name, name) == key), key)
    if fault["type"] == "extra_forbidden":
        known = ", ".join(cls.model_fields)
        return error(
            f"{said} ({origin})",
            f"there is no setting {key!r}{nearest(key, cls.model_fields)}",
            f"The known ones are: {known}",
        )
    message = str(fault["ctx"]["error"]) if fault["type"] == "value_error" else fault["msg"]
    message = message[:1].lower() + message[1:]
    if not key:
        return error(f"the settings ({origin})", message, "Give it once, by today's name")
    return error(f"{said} ({origin})", message, f"Give {cls.model_fields[key].description}")


def _number(value: Any) -> Any:
    """Strict typing, except that a whole number may stand where a float is meant."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


Float = Annotated[float, Field(allow_inf_nan=False)]


class Request(Settings):
    """One run. ``prompt`` and ``seed`` may be lists: then the run makes as many clips as the longer list has entries.

    Defaults are those of the official Wan 2.1 text-to-video code; a model may bring its own (``ditkit.toml``)."""

    prompt: str | list[str] = default("", "none", "a text, or a list of texts")
    negative_prompt: str | list[str] = default(
        "",
        "diffusers' default; the official one is Wan's own list of defects",
        "a text to steer away from, or a list with one for each prompt",
    )
    seed: int | list[int] = default(
        0,
        "ditkit; the official default is random, which cannot be repeated",
        f"a whole number from 0 to {MAX_SEED}, or a list of them",
    )
    width: int = default(832, "Wan2.1 generate.py --size 832*480", "a width in pixels, a multiple of 16")
    height: int = default(480, "Wan2.1 generate.py --size 832*480", "a height in pixels, a multiple of 16")
    frames: int = default(81, "Wan2.1 generate.py --frame_num", "a number of frames of the form 4n + 1")
    fps: int = default(16, "Wan2.1 shared_config sample_fps", "frames for each second, 1 or more")
    steps: int = default(50, "Wan2.1 generate.py --sample_steps", "a number of denoising steps, 1 or more")
    guidance_scale: Float = default(
        5.0, "Wan2.1 generate.py --sample_guide_scale", "a finite number of at least 0; 1 turns guidance off"
    )
    guidance_scale_2: Float | None = default(
        None, "Wan2.2 configs: the low-noise expert has its own", "a number for the second expert, as guidance_scale"
    )
    boundary: Float | None = default(
        None, "the model: 0.875 or 0.9 in Wan2.2", "where the second expert takes over, a noise level from 0 to 1"
    )
    image: str | None = default(None, "none", "a picture file, which the video begins with")
    last_image: str | None = default(None, "none", "a picture file, which the video ends with")
    control_video: str | None = default(None, "none", "a video file whose frames steer the result (VACE)")
    control_mask: str | None = default(
        None, "none: all is made anew", "a video or picture file, white where the model shall make pixels (VACE)"
    )
    reference_images: list[str] = default([], "none", "a list of picture files of what shall appear (VACE)")
    control_scale: Float = default(1.0, "Wan2.1 vace.py context_scale", "how much the control counts, 0 for nothing")
    size_from: Literal["request", "image"] = default(
        "request",
        "ditkit; the official image-to-video code takes it from the image",
        "image for the image's proportions on the area of width x height, or request",
    )
    image_processing: Literal["wan", "diffusers"] = default(
        "wan", "the official code", "wan or diffusers: how pictures are resized and cropped"
    )
    scheduler: str = default(
        "unipc", "Wan2.1 generate.py --sample_solver", "the name of a scheduler, such as unipc, dpm++ or euler"
    )
    scheduler_options: dict[str, int | float | str | bool] = default(
        {}, "none", "options of that scheduler, such as {order = 3}"
    )
    shift: Float = default(5.0, "Wan2.1 generate.py --sample_shift", "a finite number above 0")
    convention: Literal["wan", "diffusers"] = default("wan", "the official code", "wan or diffusers")
    sigmas: list[Float] | None = default(
        None, "none", "a falling list of noise levels in [0, 1], which replaces steps and shift"
    )
    max_sequence_length: int = default(512, "Wan2.1 text_len", "a number of text tokens from 1 to 512")
    rounding: Literal["wan", "diffusers"] = default(
        "wan", "Wan2.1 cache_video truncates to 8 bits; diffusers rounds", "official or diffusers"
    )
    stage_settings: dict[str, dict[str, Any]] = default(
        {}, "the stages", "settings of stages that have some of their own, such as {sharpness = {amount = 3}}"
    )
    expand: Literal["no", "yes", "ask"] = default(
        "no", "ditkit", "no, yes, or ask to see what became of the prompt and to change it: a language model expands it"
    )
    expand_template: str = default(
        "auto", "ditkit", "a template's name or file; auto goes by task and language of the prompt"
    )
    expand_temperature: Float = default(0.7, "Qwen2.5's own setting", "0 or more; 0 takes the likeliest word")
    expand_max_tokens: int = default(512, "Wan2.1 prompt_extend", "how many tokens an expansion may have, 1 or more")
    expand_attempt: int = default(0, "ditkit", "which of a seed's expansions: it is added to the seed, 0 or more")
    expand_fallback: bool = default(False, "ditkit", "true to go on with the raw prompt when expanding it fails")
    batched: bool = default(False, "ditkit", "true to run all samples in one batch, false for one after the other")

    _float = field_validator("guidance_scale", "guidance_scale_2", "shift", "boundary", "control_scale",
                             "expand_temperature", mode="before")(_number)  # fmt: skip

    @field_validator("prompt", "negative_prompt", "seed", "sigmas", "reference_images", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        return [*value] if isinstance(value, tuple) else value

    @field_validator("prompt", "seed")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value == []:
            raise ValueError("the list is empty")
        return value

    @field_validator("seed")
    @classmethod
    def _seed(cls, value: Any) -> Any:
        for seed in value if isinstance(value, list) else [value]:
            if not 0 <= seed <= MAX_SEED:
                raise ValueError(f"{seed} is outside 0 to {MAX_SEED}")
        return value

    @field_validator("width", "height", "frames", "fps", "steps", "max_sequence_length", "expand_max_tokens")
    @classmethod
    def _positive(cls, value: int) -> int:
        if value < 1:
            raise ValueError(f"{value} is less than 1")
        return value

    @field_validator("expand_attempt")
    @classmethod
    def _attempt(cls, value: int) -> int:
        if value < 0:
            raise ValueError(f"{value} is negative")
        return value

    @field_validator("steps", "sigmas")
    @classmethod
    def _steps(cls, value: Any) -> Any:
        count = len(value) if isinstance(value, list) else value
        if count is not None and count > MAX_STEPS:
            raise ValueError(f"{count} is more than {MAX_STEPS}")
        return value

    @field_validator("max_sequence_length")
    @classmethod
    def _text_length(cls, value: int) -> int:
        if value > 512:
            raise ValueError(f"{value} is more than 512")
        return value

    @field_validator("guidance_scale", "guidance_scale_2", "control_scale", "expand_temperature")
    @classmethod
    def _guidance(cls, value: float | None) -> float | None:
        if value is not None and value < 0:
            raise ValueError(f"{value} is negative")
        return value

    @field_validator("boundary")
    @classmethod
    def _boundary(cls, value: float | None) -> float | None:
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{value} is outside 0 to 1")
        return value

    @field_validator("shift")
    @classmethod
    def _shift(cls, value: float) -> float:
        if value <= 0 or not math.isfinite(value):
            raise ValueError(f"{value} is not above 0")
        return value

    @classmethod
    def of(
        cls, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, origin: str = "request"
    ) -> Request:
        """A Request from ``values``, with a model's own ``defaults`` below them."""
        request = cls.parse({**(defaults or {}), **values}, origin, RequestError)
        request.samples()
        return request

    def samples(self) -> list[tuple[str, str, int]]:
        """(prompt, negative prompt, seed) of every clip that the run makes. A single value serves for all."""
        lists = {"prompt": self.prompt, "negative_prompt": self.negative_prompt, "seed": self.seed}
        lengths = {name: len(v) for name, v in lists.items() if isinstance(v, list)}
        count = max([n for n in lengths.values() if n > 1], default=1)
        for name, length in lengths.items():
            if length not in (1, count):
                raise RequestError(
                    f"a run of {count} clips with a list of {length} for {name}",
                    "the lengths differ",
                    f"Give one {name}, or {count}",
                )
        columns = [(v * count if len(v) == 1 else v) if isinstance(v, list) else [v] * count for v in lists.values()]
        return list(zip(*columns, strict=True))

    def check_size(self, multiple: int, temporal: int, max_positions: int = 1024) -> None:
        """Raise RequestError unless the sides are multiples of ``multiple`` and frames of the form temporal*n + 1."""
        for name, value in (("width", self.width), ("height", self.height)):
            if value % multiple:
                low = max(multiple, value // multiple * multiple)
                raise RequestError(
                    f"{name}={value}",
                    f"this model needs multiples of {multiple}",
                    f"Use {low} or {value // multiple * multiple + multiple}",
                )
            if value // multiple > max_positions:
                raise RequestError(
                    f"{name}={value}",
                    f"the model's positions end at {max_positions * multiple} pixels",
                    "Use a smaller size",
                )
        if (self.frames - 1) % temporal:
            low = (self.frames - 1) // temporal * temporal + 1
            raise RequestError(
                f"frames={self.frames}", f"this model makes {temporal}n + 1 frames", f"Use {low} or {low + temporal}"
            )
        if (self.frames - 1) // temporal + 1 > max_positions:
            raise RequestError(
                f"frames={self.frames}",
                f"the model's positions end at {(max_positions - 1) * temporal + 1} frames",
                "Use fewer frames",
            )
