"""Seam A: classifier-free guidance, ``uncond + scale * (cond - uncond)``."""

from dataclasses import replace

from torch import Tensor

from ditkit.contracts import Predict, Step


def classifier_free_guidance(predict: Predict) -> Predict:
    """Two passes a step, the conditional one first as in the official code, told apart by ``step.branch``.

    At a guidance scale of 1 there is one pass, of the branch that the step names, and nothing is added: bit-equal to no
    guidance. So a wrapper around this one can ask for either branch alone and combine them in its own way."""

    def guided(x: Tensor, step: Step) -> Tensor:
        if step.guidance_scale == 1:
            return predict(x, step)
        cond = predict(x, replace(step, branch="cond"))
        uncond = predict(x, replace(step, branch="uncond"))
        return uncond + step.guidance_scale * (cond - uncond)

    return guided
