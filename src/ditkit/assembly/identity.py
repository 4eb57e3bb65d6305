"""The fingerprint of a component: a hash over its weights and how they compute, told without loading it.

It reads all files of the part, once. Two components of one fingerprint give the same bits on the same kind of device.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ditkit.assembly.model import vocabulary
from ditkit.mlx import exact_name

if TYPE_CHECKING:
    from ditkit.assembly.components import Components
    from ditkit.checkpoints.model.locate import Part


def identity_of(components: Components, part: Part) -> Callable[[], str]:
    """Asked for the first time it reads the files; after that it remembers."""

    @functools.cache
    def identify() -> str:
        about = json.dumps(_about(components, part), sort_keys=True, default=list)
        return hashlib.sha256(about.encode()).hexdigest()

    return identify


def _about(components: Components, part: Part) -> list[Any]:
    if part.source is None:
        from ditkit.models.text import tokenizer_fingerprint

        return [part.kind, tokenizer_fingerprint(vocabulary(part))]
    source, (dtype, _) = components.source(part), components.place(part.component)
    how: list[Any] = [part.kind, source.fingerprint, str(dtype), dict(part.config)]
    if part.kind == "wan":  # the one kind that has a precision and swaps
        how += [components.setup.dtype_policy, [s.fingerprint for s in components.swaps(part.component)]]
    if (backend := components.setup.backend_of(part.component)) != "torch":
        how.append(exact_name(backend))
    return how
