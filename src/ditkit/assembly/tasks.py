"""What models are for: for each task of the family its stages, its inputs and its official sampling defaults; and for
each stage its class, what it calls, and the options that follow from a model and a Setup.

Sources of the defaults: Wan2.1 and Wan2.2 ``generate.py`` and ``wan/configs/*.py``. The 480p and 720p image-to-video
models cannot be told apart, and need not be: the official code goes by the size that is asked for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ditkit.execution.stage import Stage
from ditkit.registry import Registry, Row

AREA_480P = 832 * 480

TASKS: Registry["TaskRow"] = Registry("task", "ditkit.tasks")
STAGES: Registry["StageRow"] = Registry("stage", "ditkit.stages")


@dataclass(frozen=True)
class TaskRow(Row):
    """``stages``: by name, in order; one that its row does not want for a model is left out. ``inputs``: the fields
    with pictures that a caller may bring; ``needed``: those that it cannot do without. ``defaults``: of a Request, what
    is not named is as there; ``small``: other ones up to 480p; ``experts``: those of a model with two transformers."""

    name: str
    stages: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    small: Mapping[str, Any] = field(default_factory=dict)
    experts: Mapping[str, Any] = field(default_factory=dict)
    help: str = ""

    registry: ClassVar[Registry[Any]] = TASKS

    def sampling(self, experts: int, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The defaults for a model of 1 or 2 ``experts``; ``asked`` decides where the size matters."""
        width, height = asked.get("width", 832), asked.get("height", 480)
        numbers = all(
            isinstance(side, int | float) and abs(side) <= AREA_480P for side in (width, height)
        )  # else Request says
        small = experts == 1 and numbers and width * height <= AREA_480P
        found = {**(self.experts if experts == 2 else self.defaults), **(self.small if small else {})}
        if "guidance_scale" in asked:  # one number is for both experts, in the official code and in diffusers
            found.pop("guidance_scale_2", None)
        return found


def _stages(*encoders: str) -> tuple[str, ...]:
    return "expand_prompt", "encode_text", *encoders, "denoise", "decode_latents"


PICTURES, BY_IMAGE = ("image", "last_image"), {"size_from": "image"}

for row in (
    TaskRow(
        "t2v", _stages(), help="text to video",
        defaults={"shift": 5.0, "steps": 50, "guidance_scale": 5.0},
        experts={"shift": 12.0, "steps": 40, "guidance_scale": 4.0, "guidance_scale_2": 3.0, "boundary": 0.875},
    ),
    TaskRow(
        "i2v", _stages("encode_image", "encode_condition"), PICTURES, ("image",), help="image to video",
        defaults={"shift": 5.0, "steps": 40, "guidance_scale": 5.0} | BY_IMAGE, small={"shift": 3.0},
        experts={"shift": 5.0, "steps": 40, "guidance_scale": 3.5, "guidance_scale_2": 3.5, "boundary": 0.9} | BY_IMAGE,
    ),
    TaskRow(
        "flf2v", _stages("encode_image", "encode_condition"), PICTURES, PICTURES, help="first and last frame to video",
        defaults={"shift": 16.0, "steps": 50, "guidance_scale": 5.0} | BY_IMAGE,
    ),
    TaskRow(
        "ti2v", _stages("encode_first_frame"), ("image",), help="text, or text and image, to video",
        defaults={"shift": 5.0, "steps": 50, "guidance_scale": 5.0, "frames": 121, "fps": 24, "width": 1280,
                  "height": 704} | BY_IMAGE,
    ),
    TaskRow(
        "vace", _stages("encode_control"), ("control_video", "control_mask", "reference_images"),
        help="text and control to video", defaults={"shift": 16.0, "steps": 50, "guidance_scale": 5.0},
    ),
):  # fmt: skip
    TASKS.add(row, "ditkit")


@dataclass(frozen=True)
class StageRow(Row):
    """``make``: the class. ``components``: those that it may call, known before a model is; of a class that names its
    own they need not be given. ``options(model, setup)``: dataclass fields of the class. ``wanted(model, setup)``:
    whether a task that names the stage has it with this model. ``before``, ``after``: the stage beside which it is put
    where no task names it."""

    name: str
    make: Any
    components: tuple[str, ...] = ()
    options: Callable[[Any, Any], Mapping[str, Any]] = lambda model, setup: {}
    wanted: Callable[[Any, Any], bool] = lambda model, setup: True
    before: str = ""
    after: str = ""
    help: str = ""

    registry: ClassVar[Registry[Any]] = STAGES

    @property
    def calls(self) -> tuple[str, ...]:
        named = getattr(self.make, "components", ())  # a property, where they follow from its options
        return self.components or (named if isinstance(named, tuple) else ())

    def build(self, model: Any, setup: Any, **given: Any) -> Stage:
        """The stage; ``given``: options that somebody chose."""
        return self.made(**{**self.options(model, setup), **given})


def calls_of(stage: str) -> tuple[str, ...]:
    """The components that a stage may call; none where nobody knows it."""
    return STAGES[stage].calls if stage in STAGES else ()


def _denoise(model: Any, setup: Any) -> Mapping[str, Any]:
    from ditkit.nn.attention import ATTENTION

    network, kernel = model.network, ATTENTION.pinned(setup.attention)
    return {"strides": model.strides, "attention": kernel, "cache_text_kv": setup.cache_text_kv, "cfg": network.cfg,
            "experts": model.experts, "timestep_scale": network.timestep_scale,
            "conditions": network.reads}  # fmt: skip


for stage in (
    StageRow("expand_prompt", "ditkit.stages.expand_prompt:ExpandPrompt", ("prompt_expander",),
             wanted=lambda model, setup: setup.expander is not None),
    StageRow("encode_text", "ditkit.stages.encode:EncodeText", ("tokenizer", "text_encoder"),
             lambda model, setup: {"cfg": model.network.cfg}),
    StageRow("encode_image", "ditkit.stages.encode:EncodeImage", ("image_encoder",),
             wanted=lambda model, setup: model.has_image_branch),
    StageRow("encode_condition", "ditkit.stages.encode:EncodeCondition", ("vae",),
             lambda model, setup: {"strides": model.strides}),
    StageRow("encode_first_frame", "ditkit.stages.encode:EncodeFirstFrame", ("vae",)),
    StageRow("encode_control", "ditkit.stages.encode:EncodeControl", ("vae",)),
    StageRow("denoise", "ditkit.stages.denoise:Denoise", ("transformer", "transformer_2"), _denoise),
    StageRow("decode_latents", "ditkit.stages.decode_latents:DecodeLatents", ("vae",),
             lambda model, setup: {"frames_per_chunk": setup.vae_frames_per_chunk}),
):  # fmt: skip
    STAGES.add(stage, "ditkit")
