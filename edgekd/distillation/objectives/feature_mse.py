"""Mean squared error of the image embedding, padding left out (MobileSAM, arXiv 2306.14289; EdgeSAM, arXiv 2312.06660 sec. 3.2)."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from edgekd.distillation.objectives import Context, Objective, Outputs


class FeatureMSE(Objective):
    """Mean over channels, then over the cells that are more than half photo. A teacher of another size is resampled to the student's grid."""

    name, family, paper = "feature_mse", "feature", "MobileSAM (arXiv 2306.14289), EdgeSAM phase 1 (arXiv 2312.06660)"
    needs = frozenset({"embedding"})

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """embeddings (B, E, s, s) -> (B,)."""
        ours, theirs = student.embedding.float(), teacher.embedding.float()
        if theirs.shape[-1] != ours.shape[-1]:
            theirs = F.interpolate(theirs, ours.shape[-2:], mode="bilinear", align_corners=False, antialias=True)
        valid = (F.interpolate(context.valid, ours.shape[-2:], mode="bilinear", align_corners=False) > 0.5).float()
        error = (ours - theirs).square().mean(1, keepdim=True) * valid
        return error.sum((1, 2, 3)) / valid.sum((1, 2, 3)).clamp(min=1)


objective = FeatureMSE
