"""Which files of one folder a component is made of, told from a list of names: what to download, and what to lock.

Weights are one set of one variant; beside them stand configs and vocabularies. Programs and pictures are never among
them. Leaves out: reading any file, and folders below this one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ditkit.errors import LoadError

NOTES = re.compile(r"(?!.*\.index(\..+)?\.json$).+\.json|.+\.model|(merges|vocab)\.txt")
FORMATS = ((".safetensors",), (".gguf",), (".pth", ".pt", ".bin", ".ckpt"))
"""Kinds of weights, the one that is taken before the others first."""

_SET = re.compile(
    r"(?P<base>diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<a>[^.]+?))?(?:-\d{5}-of-\d{5})?(?:\.(?P<b>[^.]+))?"
)  # the base names of diffusers and transformers; a variant stands before or after the number of the shard
_INDEX = re.compile(r"(?P<stem>.+)(?P<suffix>\.safetensors|\.bin)\.index(?:\.(?P<variant>.+))?\.json")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")


def used(names: Iterable[str], variant: str | None, where: str) -> tuple[str, ...]:
    """The names, sorted, of one set of weights (if there are any) and of all notes.

    ``names`` are the files of one folder, without paths. Raises LoadError when the variant is not there, and when
    several sets could be meant; ``where`` names the folder in it."""
    names = sorted(names)
    notes = [name for name in names if NOTES.fullmatch(name)]
    sets = [(name, *found) for name in names if (found := _weights(name))]
    asked = f"choosing the weights in {where}" + (f" (variant {variant!r})" if variant else "")
    if not sets:
        if variant is not None:
            raise LoadError(asked, "there are no weights", "Remove the variant, or correct the place")
        return tuple(notes)
    fitting = [one for one in sets if one[3] == variant]
    if not fitting:
        known = ", ".join(sorted({one[3] or "none" for one in sets}))
        raise LoadError(asked, f"the weights there have other variants ({known})", "Ask for one of these variants")
    best = min(one[1] for one in fitting)
    fitting = [one for one in fitting if one[1] == best]
    bases = sorted({one[2] for one in fitting})
    if len(bases) > 1:
        some = ", ".join(bases[:6]) + (f" and {len(bases) - 6} more" if len(bases) > 6 else "")
        raise LoadError(asked, f"{len(bases)} sets of weights could be meant ({some})", "Name one with `file`")
    return tuple(sorted([*notes, *(one[0] for one in fitting)]))


def is_weights(name: str) -> bool:
    return any(name.endswith(suffixes) for suffixes in FORMATS)


def _weights(name: str) -> tuple[int, str, str | None] | None:
    """(rank of the format, name of the set, variant), or None for a file that holds no weights."""
    if index := _INDEX.fullmatch(name):
        return (0 if index["suffix"] == ".safetensors" else 2), index["stem"], index["variant"]
    for rank, suffixes in enumerate(FORMATS):
        for suffix in suffixes:
            if name.endswith(suffix):
                stem = name.removesuffix(suffix)
                if match := _SET.fullmatch(stem):
                    return rank, match["base"], match["a"] or match["b"]
                return rank, _SHARD.sub("", stem), None
    return None
