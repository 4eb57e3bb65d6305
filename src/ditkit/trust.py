"""What a file from somebody else does not decide: where anything goes.

A State, a clip's manifest and a run's folder may say to which address something is sent, what is downloaded and where
something is written. That is shown, and followed only once the person names it again (command line, environment, own
config, Python) or allows it. Leaves out: code (``assembly/plugs.py``) and pictures (``replay.py``)."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from ditkit.errors import SetupError, StateError, nearest

PLACES = ("placement", "components", "model", "expander", "loras", "cache", "plain_http")
PICTURES, OUT = "pictures", "out"
ALLOWED = (*PLACES, PICTURES, OUT)
_AWAY = re.compile(r"://|^(\w+=)?hf:|^(\w+=)?(\\\\|//)")
"""An address, a repository (of a LoRA also behind the expert that it is for), a share of another machine."""


def placed_by(setup: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What ``setup``, which came out of a file, says of where something goes: setting -> entry -> what it says. The
    entry is that of a table or a list, and empty for a single value."""
    found: dict[str, dict[str, str]] = {}
    for key in PLACES:
        value = setup.get(key)
        entries = value if isinstance(value, Mapping) else {str(n): v for n, v in enumerate(value)} if isinstance(
            value, list) else {"": value}  # fmt: skip
        anything = key in ("expander", "cache", "plain_http")
        away = {k: str(v) for k, v in entries.items() if (v if anything else is_away(str(v)))}
        found |= {key: away} if away else {}
    return found


def is_away(text: str) -> bool:
    """Whether a place is an address, a share of another machine, or a repository to be downloaded from."""
    return _AWAY.search(text) is not None


def check_named(what: str, flag: str, value: str, allowed: Collection[str], asked: str) -> None:
    """Raise StateError for a file or folder ``value`` that a file decides on, and that the person has not named with
    ``flag``, unless they ``allowed`` it."""
    if what not in allowed:
        do = f"Name it yourself if it is meant: {flag} {value}; or --allow-from-file {what} if the file is yours"
        raise StateError(asked, f"it names {value} for {flag}, and a file does not decide where anything goes", do)


def check_places(
    setup: Mapping[str, Any], named: Mapping[str, Any], allowed: Collection[str], asked: str, more: str = ""
) -> None:
    """Raise StateError for what ``setup``, out of a file, says of where something goes, unless it is among what the
    person ``named`` (settings; of a table its entries) or ``allowed`` (settings). ``more``: another way out."""
    for key, entries in placed_by(setup).items():
        own = named.get(key)
        missing = {k: v for k, v in entries.items() if not (k in own if isinstance(own, Mapping) else key in named)}
        if missing and key not in allowed:
            said = ", ".join(
                f"{entry}={value}" if entry and key != "loras" else value for entry, value in missing.items()
            )
            flag = " ".join(f"--{key.replace('_', '-')} {word}".removesuffix(" True") for word in said.split(", "))
            do = f"Name it yourself if it is meant: {flag}; or --allow-from-file {key} if the file is yours{more}"
            raise StateError(asked, f"it names {key} {said}, and a file does not decide where anything goes", do)


def check_allowed(names: Collection[str]) -> frozenset[str]:
    """What ``--allow-from-file`` named. Raises SetupError."""
    for name in names:
        if name not in ALLOWED:
            raise SetupError(f"--allow-from-file {name}", f"there is no such thing{nearest(name, ALLOWED)}",
                             f"Name one of {', '.join(ALLOWED)}")  # fmt: skip
    return frozenset(names)
