"""Processes that tests start: one thread each, and none of the settings of whoever runs the tests."""

from __future__ import annotations

import os


def alone() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DITKIT_")}
    return {**kept, "OMP_NUM_THREADS": "1"}
