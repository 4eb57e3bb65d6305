"""One row for each stage: its class, what it calls, and the options that follow from a model and a Setup."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ditkit.execution.stage import Stage
from ditkit.registry import Registry, Row

STAGES: Registry[StageRow] = Registry("stage", "ditkit.stages")


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
        stage: Stage = self.made(**{**self.options(model, setup), **given})
        return stage


def calls_of(stage: str) -> tuple[str, ...]:
    """The components that a stage may call; none where nobody knows it."""
    return STAGES[stage].calls if stage in STAGES else ()


def _denoise(model: Any, setup: Any) -> Mapping[str, Any]:
    """Raises SetupError for a kernel that is not there."""
    from ditkit.errors import SetupError
    from ditkit.nn.attention import ATTENTION

    if why := ATTENTION[setup.attention].lacks():
        raise SetupError(f"attention={setup.attention!r}", why, "Install what it needs, or choose another kernel")
    kernel = ATTENTION.pinned(setup.attention)
    return {"strides": model.strides, "attention": kernel, "cache_text_kv": setup.cache_text_kv,
            "experts": model.experts, "timestep_scale": model.network.timestep_scale,
            "conditions": model.network.reads, "cfg": model.network.cfg}  # fmt: skip


for row in (
    StageRow(
        "expand_prompt", "ditkit.stages.expand_prompt:ExpandPrompt", ("prompt_expander",),
        wanted=lambda model, setup: setup.expander is not None,
    ),
    StageRow(
        "encode_text", "ditkit.stages.encode_text:EncodeText", ("tokenizer", "text_encoder"),
        lambda model, setup: {"cfg": model.network.cfg},
    ),
    StageRow(
        "encode_image", "ditkit.stages.encode_pictures:EncodeImage", ("image_encoder",),
        wanted=lambda model, setup: model.has_image_branch,
    ),
    StageRow(
        "encode_condition", "ditkit.stages.encode_pictures:EncodeCondition", ("vae",),
        lambda model, setup: {"strides": model.strides},
    ),
    StageRow("encode_first_frame", "ditkit.stages.encode_pictures:EncodeFirstFrame", ("vae",)),
    StageRow("encode_control", "ditkit.stages.encode_pictures:EncodeControl", ("vae",)),
    StageRow("denoise", "ditkit.stages.denoise:Denoise", ("transformer", "transformer_2"), _denoise),
    StageRow(
        "decode_latents", "ditkit.stages.decode_latents:DecodeLatents", ("vae",),
        lambda model, setup: {"frames_per_chunk": setup.vae_frames_per_chunk},
    ),
):  # fmt: skip
    STAGES.add(row, "ditkit")
