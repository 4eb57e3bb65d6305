"""Setup -> components: find a model's parts, build each on the meta device, fill it strictly, apply swaps.

The one room where model classes, their files, dtypes and devices come together. Leaves out: running (``pipeline.py``).
"""

from ditkit.assembly.adapters import placed
from ditkit.assembly.components import Components
from ditkit.assembly.model import LatentsRgb, Model
from ditkit.assembly.plugs import PLUGS, PlugRow, pipeline_of, stage_of
from ditkit.assembly.tasks import STAGES, TASKS, StageRow, TaskRow, calls_of
from ditkit.checkpoints.model.find import ASSETS, MODELS

__all__ = [
    "ASSETS", "MODELS", "PLUGS", "STAGES", "TASKS", "Components", "LatentsRgb", "Model", "PlugRow", "StageRow",
    "TaskRow", "calls_of", "pipeline_of", "placed", "stage_of",
]  # fmt: skip
