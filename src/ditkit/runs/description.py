"""``run.json``: what a run is, settled when it begins and never changed. How far it came is in its kept States.

Leaves out: the folder around it (``run.py``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from ditkit.errors import StateError
from ditkit.request import Request, renamed
from ditkit.state import write_whole

VERSION = 1
NAME = "run.json"


class Parent(BaseModel):
    """What a run was forked from. ``step``: where in the loop, if a step was named; ``changed``: settings by name with
    the value before and after; ``spliced``: a part of the loop was taken with other settings, so that the request alone
    does not make this run again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    id: str
    step: int | None
    clip: int | None
    changed: dict[str, tuple[Any, Any]]
    spliced: bool


class Description(BaseModel):
    """``setup``: the settings that somebody gave. ``steps``: of the loop. ``every``, ``keep_steps``: which States are
    kept. ``out`` and ``sheet``: where results go; None and True stand for places in the run's own folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: int = VERSION
    id: str
    created: str
    model: dict[str, Any]
    request: dict[str, Any]
    setup: dict[str, Any]
    clips: int
    steps: int
    every: int
    keep_steps: Literal["last", "all"]
    out: str | None = None
    sheet: str | bool = True
    parent: Parent | None = None

    @field_validator("model")
    @classmethod
    def _named(cls, model: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(model.get("name"), str):
            raise ValueError("it has no name")
        return model

    @field_validator("request")
    @classmethod
    def _asking(cls, request: dict[str, Any]) -> dict[str, Any]:
        """What a list of runs shows of it; all else is looked at when the run goes on."""
        prompt = request.get("prompt")
        if not all(isinstance(text, str) for text in (prompt if isinstance(prompt, list) else [prompt])):
            raise ValueError("it has no prompt")
        if not isinstance(request.get("batched"), bool):
            raise ValueError("it does not say whether its clips are batched")
        known = {name: field.get_default() for name, field in Request.model_fields.items()}
        return {**known, **renamed(request)}  # an older run knows fewer settings

    def write(self, folder: Path) -> None:
        """Whole or not at all, and there for good. Raises OutputError."""
        text = json.dumps(self.model_dump(), indent=1, ensure_ascii=False) + "\n"
        write_whole(folder / NAME, [text.encode()], f"writing {folder / NAME}")

    @classmethod
    def read(cls, folder: Path) -> Description:
        """Raises StateError."""
        path = folder / NAME
        asked = f"opening the run {folder}"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            do = "Check its name; `ditkit runs` lists those that are there"
            raise StateError(asked, f"there is no {NAME}", do) from None
        except (OSError, ValueError, RecursionError) as e:
            raise StateError(asked, f"its {NAME} cannot be read ({e})", "Begin the run anew elsewhere") from None
        version = values.get("run") if isinstance(values, dict) else None
        if version != VERSION:
            found = f"its version is {version!r}; this ditkit reads {VERSION}"
            raise StateError(asked, found, "Use the ditkit that wrote it")
        try:
            return cls(**values)
        except ValidationError as e:
            fault = e.errors()[0]
            found = f"its {NAME} is damaged at {'.'.join(map(str, fault['loc']))} ({fault['msg']})"
            raise StateError(asked, found, "Begin the run anew elsewhere") from None
