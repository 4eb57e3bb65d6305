"""What a place says of itself, as far as anybody here uses it: the types of its fields, and whether it keeps to them.

The other end may be another version, or no host at all. What is not in here is passed on untouched (the receipt shows
it). Leaves out: what the fields mean (``Worker.describe``), and whether the place fits the run (``remote.py``)."""

from collections.abc import Mapping
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from ditkit.allowed import Limits
from ditkit.errors import PlaceError
from ditkit.hiding import printable
from ditkit.placement.job import SAME, WIRE
from ditkit.state import SCHEMA

Strict = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class StageTold(TypedDict):
    __pydantic_config__ = Strict  # type: ignore[misc]
    version: Count
    components: dict[str, str]
    made_by: NotRequired[str]


class PartTold(TypedDict, total=False):
    __pydantic_config__ = Strict  # type: ignore[misc]
    kind: str
    config: dict[str, Any]
    identity: str
    layout: str | None
    quantization: str | None
    notes: list[str]
    files: dict[str, str]
    dtype: str
    device: str


class PreviewTold(TypedDict):
    __pydantic_config__ = Strict  # type: ignore[misc]
    factors: list[list[float]]
    bias: list[float]


class ModelTold(TypedDict, total=False):
    __pydantic_config__ = Strict  # type: ignore[misc]
    name: str
    task: str
    boundary: Annotated[float, Field(ge=0, le=1)] | None
    flow_shift: Annotated[float, Field(gt=0)] | None
    defaults: dict[str, Any]
    preview: PreviewTold | None
    processor: dict[str, Any] | None


class MachineTold(TypedDict, total=False):
    __pydantic_config__ = Strict  # type: ignore[misc]
    threads: Count | None


class Told(TypedDict):
    __pydantic_config__ = Strict  # type: ignore[misc]
    stages: dict[str, StageTold]
    versions: NotRequired[dict[str, str]]
    machine: NotRequired[MachineTold]
    model: NotRequired[ModelTold]
    parts: NotRequired[dict[str, PartTold]]
    code: NotRequired[dict[str, dict[str, str]]]
    limits: NotRequired[dict[str, Any]]


TOLD = TypeAdapter[Any](Told)


def checked_description(said: Mapping[str, Any], place: str) -> dict[str, Any]:
    """``said``, untouched. Raises PlaceError with the field that is wrong."""
    asked = f"asking {place} who it is"
    for what, mine in (("wire", WIRE), ("schema", SCHEMA)):
        if said.get(what) != mine:
            raise PlaceError(asked, f"its {what} version is {said.get(what)!r:.60}, ours is {mine}", SAME)
    try:
        TOLD.validate_python(said)
        Limits.told(said.get("limits", {}))
    except ValidationError as e:
        fault = e.errors(include_url=False, include_input=False)[0]
        where, why = printable(".".join(str(each) for each in fault["loc"]))[:100], fault["msg"]
        raise PlaceError(asked, f"its answer is damaged ({where}: {why[:1].lower()}{why[1:]})", SAME) from None
    except ValueError as e:
        raise PlaceError(asked, f"its answer is damaged ({e})", SAME) from None
    return dict(said)


def checked_probe(said: Mapping[str, Any], place: str) -> str:
    """The hash of a probe. Raises PlaceError."""
    found = said.get("hash")
    if not isinstance(found, str) or len(found) != 64 or not set(found) <= set("0123456789abcdef"):
        raise PlaceError(f"asking {place} for its probe", "its answer is damaged (hash)", SAME)
    return found
