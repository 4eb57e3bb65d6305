"""Tokens of hosts: where they are read from, and how one is compared. They are in no setting, log or manifest.

Leaves out: which requests need one (``host.py``).
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Mapping
from pathlib import Path

from ditkit.config import TOKEN
from ditkit.errors import SetupError

SHORTEST = 16
"""Characters of a token at least; a short one can be guessed."""


def token_of(environment: Mapping[str, str] | None = None) -> str | None:
    """That of the environment, or None. Raises SetupError for one that cannot be used."""
    text = (os.environ if environment is None else environment).get(TOKEN)
    return None if text is None else _checked(text.strip(), TOKEN)


def token_in(file: Path) -> str:
    """The one in ``file``. Raises SetupError."""
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
        found = (e.strerror or str(e)).lower() if isinstance(e, OSError) else "it is not text"
        raise SetupError(f"the token in {file}", found, "Check the path") from None
    return _checked(text, f"the token in {file}")


def _checked(text: str, asked: str) -> str:
    if len(text) < SHORTEST or not text.isascii() or not text.isprintable() or " " in text:
        found = f"it is not {SHORTEST} or more letters, digits and signs without spaces"
        raise SetupError(asked, found, "Make one with: python -c 'import secrets; print(secrets.token_urlsafe())'")
    return text


def same(given: str | None, token: str) -> bool:
    """In a time that tells nothing of where they differ."""
    return hmac.compare_digest((given or "").encode(), token.encode())
