"""Setup -> components: find a model's parts, build each on the meta device, fill it strictly, apply swaps.

The one room where model classes, their files, dtypes and devices come together. Leaves out: running (``pipeline.py``).
"""

from ditkit.assembly.adapters import placed
from ditkit.assembly.components import Components
from ditkit.assembly.model import Model
from ditkit.assembly.notes import LatentsRgb
from ditkit.assembly.pipelines import CALLS, pipeline_of, stage_of
from ditkit.checkpoints.model.find import ASSETS, MODELS

__all__ = [
    "ASSETS", "CALLS", "MODELS", "Components", "LatentsRgb", "Model", "pipeline_of", "placed",
    "stage_of",
]  # fmt: skip
