"""Hints at every stage: the plain several-stage form of FitNets (arXiv 1412.6550), the baseline of stage-wise feature distillation."""
from __future__ import annotations

from edgekd.distillation.objectives.hint import Hint


class FitnetStages(Hint):
    """The mean over stages of `hint`: a 1x1 regressor and a squared error at each resolution, deepest with deepest.

    Args:
        kernel: side of the regressors' convolution, odd.
    """

    name, family, paper = "fitnet_stages", "feature", "FitNets: Hints for Thin Deep Nets (arXiv 1412.6550), at every stage"
    default_taps = "stages"


objective = FitnetStages
