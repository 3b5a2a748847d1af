"""Mean absolute error of the image embedding, padding left out (TinySAM, arXiv 2312.13789: the squared error is too small to lead)."""
from __future__ import annotations

from torch import Tensor

from edgekd.distillation.losses import aligned, over_photo
from edgekd.distillation.outputs import Context, Outputs
from edgekd.distillation.points import Objective


class FeatureL1(Objective):
    """|ours - theirs|, mean over channels, then over the cells that are more than half photo."""

    name, family, paper = "feature_l1", "feature", "TinySAM (arXiv 2312.13789)"
    needs = frozenset({"embedding"})

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """embeddings (B, E, s, s) -> (B,)."""
        ours, theirs = aligned(student["embedding"], teacher["embedding"])
        return over_photo((ours - theirs).abs(), context.valid)


objective = FeatureL1
