"""Mean squared error of the image embedding, padding left out (MobileSAM, arXiv 2306.14289; EdgeSAM, arXiv 2312.06660 sec. 3.2)."""
from __future__ import annotations

from torch import Tensor

from edgekd.distillation.losses import aligned, over_photo
from edgekd.distillation.outputs import Context, Outputs
from edgekd.distillation.points import Objective


class FeatureMSE(Objective):
    """Mean over channels, then over the cells that are more than half photo. A teacher of another size is resampled to the student's grid."""

    name, family, paper = "feature_mse", "feature", "MobileSAM (arXiv 2306.14289), EdgeSAM phase 1 (arXiv 2312.06660)"
    needs = frozenset({"embedding"})

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """embeddings (B, E, s, s) -> (B,)."""
        ours, theirs = aligned(student["embedding"], teacher["embedding"])
        return over_photo((ours - theirs).square(), context.valid)


objective = FeatureMSE
