"""Seam A: two transformers that share a run, the one for high noise and the one for low noise (Wan 2.2 A14B).

Which one takes a step stands in the step table (``step.expert``), made from the timestep and the model's boundary
before anything is computed. Source: Wan2.2 ``wan/text2video.py`` ``_prepare_model_for_timestep``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ditkit.contracts import Predict, Step


def by_expert(makers: Mapping[str, Callable[[], Predict]]) -> Predict:
    """``makers``: expert -> what makes its prediction. Each is called at the first step of its own, so text is prepared
    for an expert only in a run that comes to its steps."""
    made: dict[str, Predict] = {}

    def predict(x: Tensor, step: Step) -> Tensor:
        if step.expert not in made:
            made[step.expert] = makers[step.expert]()
        return made[step.expert](x, step)

    return predict
