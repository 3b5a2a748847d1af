"""Relational distillation: distances between photos and angles between three of them, as the teacher has them (arXiv 1904.05068)."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.relations import check_batch, own_channels, photo_vector
from edgekd.distillation.softmax import exact


class RKD(Objective):
    """Huber loss of the distances between photos and of the angles between three of them.

    distance x Huber(d_ij / mean d) + angle x Huber(cos of the angle j-i-k), student's against teacher's, over all photos j (and k) of the batch.
    A photo is one vector: the mean over its cells of a map, or `pooled` with `taps: [[pooled, pooled]]`. Widths may differ. Photo i's share
    is the mean over what starts from it.

    Args:
        distance, angle: 1 and 2 as in the paper's classifiers.
    """

    name, family, paper = "rkd", "relation", "Relational Knowledge Distillation (arXiv 1904.05068)"
    needs = frozenset({"feats"})
    default_taps = "embedding"
    min_batch = 3

    def __init__(self, distance: float = 1.0, angle: float = 2.0) -> None:
        super().__init__()
        self.distance, self.angle = distance, angle

    def bind(self, setup: Setup) -> None:
        """Refuses batches without three photos."""
        check_batch(setup, self.name, self.min_batch)
        self.channels = own_channels(setup)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """feats (B, C, h, w) or (B, D) -> (B,), the mean over the taps."""
        losses = []
        for ours, theirs, channels in zip(student.feats, teacher.feats, self.channels, strict=True):
            s, t = photo_vector(ours, context), photo_vector(theirs[:, :channels], context)
            with exact(s):
                apart = F.smooth_l1_loss(distances(s), distances(t), reduction="none").mean(1)
                turned = F.smooth_l1_loss(angles(s), angles(t), reduction="none").mean((1, 2))
            losses.append(self.distance * apart + self.angle * turned)
        return torch.stack(losses).mean(0)


def distances(x: Tensor) -> Tensor:
    """(B, D) -> Euclidean distances (B, B) in units of their mean over different points."""
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return d / (d.sum() / (d > 0).sum().clamp(min=1)).clamp(min=1e-6)


def angles(x: Tensor) -> Tensor:
    """(B, D) -> cosines (B, B, B) of the angle at i between the lines to j and to k; 0 where i is one of them."""
    lines = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), dim=2)
    return lines @ lines.transpose(1, 2)


objective = RKD
