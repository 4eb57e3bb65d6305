"""Request: what to make. Every default says where it comes from; nothing here says how (``setup.py``)."""

import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ditkit import limits
from ditkit.errors import RequestError, UserError, nearest
from ditkit.hiding import holds_secret
from ditkit.plain import SHOWN, plain, shown, whole
from ditkit.reading import check_value

MAX_SEED = 2**64 - 1  # what torch takes, and ComfyUI gives
DRAWN = 2**32  # seeds that are drawn lie below: torch's CPU generator tells no more than that apart
CHANCE = (-1, "-1", "random")
POSITIONS = 1024  # along each axis of the latents' tokens, in the networks' rotary embedding
MOST = 2**31 - 1  # of anything that is counted
MAX_STEPS = 10_000  # ten for each timestep that a Wan model was trained with; a host must not be asked for more

OLD_NAMES: Mapping[str, str] = MappingProxyType({
    "solver": "scheduler", "solver_options": "scheduler_options", "schedule": "convention", "precision": "dtype_policy",
    "remember_text": "cache_text_kv", "parts": "components", "patience": "timeout", "expect": "expected_probes",
})  # fmt: skip
"""Earlier names of settings -> today's. States, manifests, configs and flags with them are still read."""

LATER = ("stage_settings", "control_timing", "expand", "expand_template", "expand_temperature", "expand_max_tokens",
         "expand_attempt", "expand_fallback")  # fmt: skip
"""Settings that came after the first States: what ditkit wrote may lack these, whose defaults change nothing, and no
others."""

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


def default(value: Any, source: str, text: str, **limits: Any) -> Any:
    """A field with its default, where that default comes from, one line of help, and limits such as ``ge=1``."""
    return Field(value, description=text, json_schema_extra={"source": source}, **limits)


PROSE = ("prompt", "negative_prompt", "expand_template")
"""Settings whose text means nothing to a machine; all others may hold no secret."""

KEYS = "keys belong into the environment (DITKIT_HOST_TOKEN, DITKIT_EXPANDER_KEY, OPENAI_API_KEY, HF_TOKEN)"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in [*value, *value.values()] if isinstance(value, Mapping) else value:
            yield from _texts(item)


class Settings(BaseModel):
    """Base of Request and Setup: immutable, typed, and without room for unknown keys. A whole number may stand where a
    float is meant."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @field_validator("*")
    @classmethod
    def _kept(cls, value: Any) -> Any:
        """What a manifest could not hold is refused now and not after the run."""
        try:
            check_value(value)
        except UnicodeEncodeError:
            raise ValueError("it has a character that is no UTF-8") from None
        if isinstance(value, str) and len(value) > limits.WORDS:
            raise ValueError(f"it has more than {limits.WORDS:,} characters")
        return value

    @model_validator(mode="before")
    @classmethod
    def _today(cls, values: Any) -> Any:
        fields = cls.model_fields
        return {k: whole(plain(v), fields[k].annotation) if k in fields else v for k, v in renamed(values).items()}

    @field_validator("*")
    @classmethod
    def _without_secrets(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name not in PROSE and any(map(holds_secret, _texts(value))):
            raise ValueError(f"it holds a password or a key, which would stand in every clip; {KEYS}")
        return value

    @classmethod
    def parse(cls, values: Mapping[str, Any], origin: str | Mapping[str, str], error: type[UserError]) -> Self:
        """Build from a mapping; the first fault becomes one sentence that names its ``origin``, or that of its
        setting."""
        check_text(values, origin, error)
        try:
            return cls(**values)
        except ValidationError as e:
            raise sentence(cls, e, values, origin, error) from None
        except TypeError:
            where = f" ({origin})" if isinstance(origin, str) else ""
            raise error(f"the settings{where}", "the name of one of them is no text", "Correct it") from None


def check_text(values: Mapping[str, Any], origin: str | Mapping[str, str], error: type[UserError]) -> None:
    """Raise ``error`` for a value with bytes that are no UTF-8 (halves of characters, in Python): it could be computed
    with, and then not be written down."""
    for name, value in values.items():
        try:
            check_value([name, value])
        except ValueError as e:
            found, do = f"it has {e}", "Give another value"
            if isinstance(e, UnicodeEncodeError):
                found, do = "it holds bytes that are no UTF-8", "Write it in UTF-8"
                if (encoding := sys.getfilesystemencoding()) != "utf-8":
                    found = f"it holds letters that this locale ({encoding}) does not have"
                    do = "Set PYTHONUTF8=1, or a locale with UTF-8 such as LC_ALL=C.UTF-8"
            where = origin if isinstance(origin, str) else origin.get(name, "default")
            raise error(f"{ascii(name)[1:-1][:SHOWN]}={ascii(shown(value))[1:-1]} ({where})", found, do) from None


def sentence(
    cls: type[BaseModel], e: ValidationError, values: Mapping[str, Any], origin: str | Mapping[str, str],
    error: type[UserError],
) -> UserError:  # fmt: skip
    """The first fault of ``values`` that were to be a ``cls``, whose fields say in their descriptions what to give."""
    first = min(e.errors(), key=lambda f: f["type"] == "missing")["loc"]  # it may be there under a wrong name
    # Of a setting that may have several types, the fault that lies deepest is of the one that was meant.
    fault = max((f for f in e.errors() if f["loc"][:1] == first[:1]), key=lambda f: len(f["loc"]))
    key = str(first[0]) if first else ""
    said = next((f"{name[:SHOWN]}={shown(v)}" for name, v in values.items() if OLD_NAMES.get(name, name) == key), key)
    asked = f"{said or 'the settings'} ({origin if isinstance(origin, str) else origin.get(key, 'default')})"
    if fault["type"] == "extra_forbidden":
        hint, names = nearest(key[:SHOWN], cls.model_fields), ", ".join(cls.model_fields)
        return error(asked, f"there is no setting {shown(key)}{hint}", f"The known ones are: {names}")
    message = str(fault["ctx"]["error"]) if fault["type"] == "value_error" else fault["msg"]
    field = cls.model_fields.get(key)
    do = "Give it once, by today's name" if field is None else f"Give {field.description}"
    return error(asked, message[:1].lower() + message[1:], do)


def drawn(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with a number in the place of each seed that is -1 or ``random``. It is drawn when somebody asks for a
    run and never when a file is read, so that what is kept has the number."""

    given = values.get("seed")
    seeds = whole(plain(given))
    each = seeds if isinstance(seeds, list) else [seeds]
    chance = [(seed.strip().lower() if isinstance(seed, str) else seed) in CHANCE for seed in each]
    if not any(chance):
        return dict(values)
    numbers = [secrets.randbelow(DRAWN) if by_chance else seed for seed, by_chance in zip(each, chance, strict=True)]
    return {**values, "seed": numbers if isinstance(seeds, list) else numbers[0]}


def one_of(names: Sequence[str], what: str) -> AfterValidator:
    """For a text that is one of ``names``, each a ``what``."""

    def check(value: str) -> str:
        if value not in names:
            raise ValueError(f"there is no {what} {value!r}{nearest(value, names)}; there are {', '.join(names)}")
        return value

    return AfterValidator(check)


NO_SIGN = AfterValidator(lambda value: value + 0.0)  # -0.0 and 0.0 are one request
Float = Annotated[float, Field(allow_inf_nan=False), NO_SIGN]
Scale = Annotated[float, Field(allow_inf_nan=False, ge=0), NO_SIGN]
Level = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1), NO_SIGN]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


class Request(Settings):
    """One run. ``prompt`` and ``seed`` may be lists: then the run makes as many clips as the longer list has entries.

    Defaults are those of the official Wan 2.1 text-to-video code; a model may bring its own (``ditkit.toml``)."""

    # fmt: off
    prompt: str | list[str] = default("", "none", "a text, or a list of texts")
    negative_prompt: str | list[str] = default("", "diffusers' default; the official one is Wan's own list of defects",
                                               "a text to steer away from, or a list with one for each prompt")
    seed: Seed | list[Seed] = default(0, "ditkit; the official default is random, which cannot be repeated",
                                      f"a whole number from 0 to {MAX_SEED}, -1 or random to draw one, or a list")
    width: int = default(832, "Wan2.1 generate.py --size 832*480", "a width in pixels, a multiple of 16", ge=1, le=MOST)
    height: int = default(480, "Wan2.1 generate.py --size 832*480", "a height in pixels, a multiple of 16",
                          ge=1, le=MOST)
    frames: int = default(81, "Wan2.1 generate.py --frame_num", "a number of frames of the form 4n + 1", ge=1, le=MOST)
    fps: int = default(16, "Wan2.1 shared_config sample_fps", "frames for each second, 1 or more", ge=1, le=MOST)
    steps: int = default(50, "Wan2.1 generate.py --sample_steps", f"a number of denoising steps, from 1 to {MAX_STEPS}",
                         ge=1, le=MAX_STEPS)
    guidance_scale: Scale = default(5.0, "Wan2.1 generate.py --sample_guide_scale",
                                    "a finite number of at least 0; 1 turns guidance off")
    guidance_scale_2: Scale | None = default(None, "Wan2.2 configs: the low-noise expert has its own",
                                             "a number for the second expert, as guidance_scale")
    boundary: Level | None = default(None, "the model: 0.875 or 0.9 in Wan2.2",
                                     "where the second expert takes over, a noise level from 0 to 1")
    image: str | None = default(None, "none", "a picture file, which the video begins with")
    last_image: str | None = default(None, "none", "a picture file, which the video ends with")
    control_video: str | None = default(None, "none", "a video file whose frames steer the result (VACE)")
    control_mask: str | None = default(None, "none: all is made anew",
                                       "a video or picture file, white where the model shall make pixels (VACE)")
    reference_images: list[str] = default([], "none", "a list of picture files of what shall appear (VACE)")
    control_scale: Scale = default(1.0, "Wan2.1 vace.py context_scale", "how much the control counts, 0 for nothing")
    control_timing: Literal["auto", "time", "frames"] = default(
        "auto", "ditkit; the official VACE code goes by time where a video is faster",
        "time (of control_video and control_mask what is on screen when a frame of the run is), frames (one by one), "
        "or auto: frames where there are as many as the run makes, else time")
    size_from: Literal["request", "image"] = default(
        "request", "ditkit; the official image-to-video code takes it from the image",
        "image for the image's proportions on the area of width x height, or request")
    image_processing: Literal["wan", "diffusers"] = default(
        "wan", "the official code", "wan or diffusers: how pictures are resized and cropped")
    scheduler: str = default("unipc", "Wan2.1 generate.py --sample_solver",
                             "the name of a scheduler, such as unipc, dpm++ or euler")
    scheduler_options: dict[str, int | Float | str | bool] = default(
        {}, "none", "options of that scheduler, such as {order = 3}")
    shift: Float = default(5.0, "Wan2.1 generate.py --sample_shift", "a finite number above 0", gt=0)
    convention: Literal["wan", "diffusers"] = default("wan", "the official code", "wan or diffusers")
    sigmas: list[Float] | None = default(
        None, "none", "a falling list of noise levels in [0, 1], which replaces steps and shift", max_length=MAX_STEPS)
    max_sequence_length: int = default(512, "Wan2.1 text_len", "a number of text tokens from 1 to 512", ge=1, le=512)
    rounding: Literal["wan", "diffusers"] = default(
        "wan", "Wan2.1 cache_video truncates to 8 bits; diffusers rounds", "wan or diffusers")
    stage_settings: dict[str, dict[str, Any]] = default(
        {}, "the stages", "settings of stages that have some of their own, such as {sharpness = {amount = 3}}")
    expand: Literal["no", "yes", "ask"] = default(
        "no", "ditkit",
        "no, yes, or ask to see what became of the prompt and to change it: a language model expands it")
    expand_template: str = default(
        "auto", "ditkit", "a template's name or file; auto goes by task and language of the prompt")
    expand_temperature: Scale = default(0.7, "Qwen2.5's own setting", "0 or more; 0 takes the likeliest word")
    expand_max_tokens: int = default(512, "Wan2.1 prompt_extend", "how many tokens an expansion may have, 1 or more",
                                     ge=1, le=MOST)
    expand_attempt: int = default(0, "ditkit", "which of a seed's expansions: it is added to the seed, 0 or more",
                                  ge=0, le=MOST)
    expand_fallback: bool = default(False, "ditkit", "true to go on with the raw prompt when expanding it fails")
    batched: bool = default(False, "ditkit", "true to run all samples in one batch, false for one after the other")
    # fmt: on

    @field_validator("prompt", "seed")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value == []:
            raise ValueError("the list is empty")
        return value

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """What somebody asks for in Python; a seed that is to be drawn is drawn here. Raises RequestError."""
        request = cls.parse(drawn(values), "request", RequestError)
        request.samples()
        return request

    @classmethod
    def whole(cls, values: Mapping[str, Any], origin: str, error: type[UserError]) -> Self:
        """What ditkit wrote with all its settings: a default does not take the place of one that was lost."""
        request, known = cls.parse(values, origin, error), renamed(values)
        for name in cls.model_fields:
            if name not in known and name not in LATER:
                raise error(f"reading {origin}", f"it has no {name}", "Use an untouched file")
        return request

    def samples(self) -> list[tuple[str, str, int]]:
        """(prompt, negative prompt, seed) of every clip that the run makes. A single value serves for all."""
        given = {"prompt": self.prompt, "negative_prompt": self.negative_prompt, "seed": self.seed}
        lists = {name: v if isinstance(v, list) else [v] for name, v in given.items()}
        count = max(map(len, lists.values()))
        for name, values in lists.items():
            if len(values) not in (1, count):
                raise RequestError(f"a run of {count} clips with a list of {len(values)} for {name}",
                                   "the lengths differ", f"Give one {name}, or {count}")  # fmt: skip
        columns = [values * count if len(values) == 1 else values for values in lists.values()]
        return list(zip(*columns, strict=True))

    def check_size(self, multiple: int, temporal: int) -> None:
        """Raise RequestError unless the sides are multiples of ``multiple`` and frames of the form temporal*n + 1."""
        for name, unit, rest in (("width", multiple, 0), ("height", multiple, 0), ("frames", temporal, 1)):
            value, last = getattr(self, name), (POSITIONS - rest) * unit + rest
            low = (value - rest) // unit * unit + rest
            if value != low:
                found = f"this model makes {unit}n + 1 frames" if rest else f"this model needs multiples of {unit}"
                raise RequestError(f"{name}={value}", found, f"Use {low or unit} or {low + unit}")
            if value > last:
                found = f"the model's positions end at {last} {'frames' if rest else 'pixels'}"
                raise RequestError(f"{name}={value}", found, f"Use at most {last}")
