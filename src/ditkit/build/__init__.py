"""Setup -> components: find a model's parts, build each on the meta device, fill it strictly, apply swaps.

The one room where model classes, their files, dtypes and devices come together. Leaves out: running (``pipe.py``).
"""

from ditkit.build.adapters import placed
from ditkit.build.components import Components, apply_swaps
from ditkit.build.model import Model
from ditkit.build.notes import LatentsRgb
from ditkit.build.pipelines import CALLS, pipeline_of, stage_of
from ditkit.checkpoints.find import ASSETS, MODELS

__all__ = [
    "ASSETS", "CALLS", "MODELS", "Components", "LatentsRgb", "Model", "apply_swaps", "pipeline_of", "placed",
    "stage_of",
]  # fmt: skip
