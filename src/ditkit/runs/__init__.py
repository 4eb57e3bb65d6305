"""Runs that are kept in a folder: they survive the end of their process, go on, and are forked.
``Run.create``, ``Run.open``, ``run.go``, ``run.fork``; ``listed`` for a folder of runs. Leaves out: the computing
(``pipeline.py``)."""

from ditkit.runs.folder import Description, Kept, Parent, located
from ditkit.runs.run import Listed, Run, listed

__all__ = ["Description", "Kept", "Listed", "Parent", "Run", "listed", "located"]
