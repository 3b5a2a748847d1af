"""The masks of the data, compared at the points where the student is least sure (EfficientViT-SAM's second stage, arXiv 2402.05008).

PointRend's sampling (arXiv 1912.08193): of three times as many random points as wanted those with logits nearest to 0 are kept, and a
share of the points is drawn anywhere. 112 x 112 points cost less than the 256 x 256 logits of a 1024 px model, and lie on borders.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distillation.losses import bce, best_answer, dice
from edgekd.distillation.outputs import Context, Outputs
from edgekd.distillation.points import Objective


def sample(maps: Tensor, xy: Tensor) -> Tensor:
    """Bilinear values of maps (N, h, w) at points xy (N, K, 2) in 0..1 -> (N, K)."""
    return F.grid_sample(maps.unsqueeze(1), (2 * xy - 1).unsqueeze(1), mode="bilinear", padding_mode="border", align_corners=False)[:, 0, 0]


def uncertain_points(logits: Tensor, count: int, oversample: float, share: float, generator: torch.Generator | None) -> Tensor:
    """logits (N, h, w) -> xy (N, count, 2) in 0..1, `share` of them where a logit is near 0."""
    candidates = torch.rand(len(logits), int(count * oversample), 2, generator=generator).to(logits)
    sure = sample(logits, candidates).abs()
    picked = sure.topk(round(share * count), dim=1, largest=False).indices
    chosen = candidates.gather(1, picked.unsqueeze(2).expand(-1, -1, 2))
    return torch.cat([chosen, torch.rand(len(logits), count - picked.shape[1], 2, generator=generator).to(logits)], dim=1)


class PointMasks(Objective):
    """`bce` x BCE + `dice` x dice at `side` x `side` points, of the best of the masks that are predicted.

    Args:
        side: points are side squared.
        oversample: candidates for one uncertain point.
        uncertain: share of the points that are uncertain ones.
        several: share of the prompts that are answered with three alternatives, of which the best learns; the others with mask 0.
    """

    name, family, paper = "point_masks", "prompt_in_the_loop", "EfficientViT-SAM stage 2 (arXiv 2402.05008), PointRend (arXiv 1912.08193)"
    needs = frozenset({"masks", "truth"})
    asks_teacher = False

    def __init__(self, bce: float = 20.0, dice: float = 1.0, side: int = 112, oversample: float = 3.0, uncertain: float = 0.75, several: float = 0.5) -> None:
        super().__init__()
        self.weights, self.count, self.oversample, self.uncertain, self.several = (bce, dice), side * side, oversample, uncertain, several

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """masks (P, 4, h, w), truth (P, F, F) -> (P,)."""
        assert student.masks is not None and context.truth is not None and context.valid_prompts is not None
        logits = student.masks.float()
        prompts, masks = logits.shape[:2]
        with torch.no_grad():
            xy = uncertain_points(logits.flatten(0, 1), self.count, self.oversample, self.uncertain, context.generator).unflatten(0, (prompts, masks))
            target = (sample(context.truth.float(), xy.flatten(1, 2)) > 0.5).float().unflatten(1, (masks, 1, self.count))
            valid = (sample(context.valid_prompts.float(), xy.flatten(1, 2)) > 0.5).float().unflatten(1, (masks, 1, self.count))
        at = sample(logits.flatten(0, 1), xy.flatten(0, 1)).unflatten(0, (prompts, masks)).unsqueeze(2)
        each = self.weights[0] * bce(at, target, valid) + self.weights[1] * dice(at, target, valid)
        several = torch.rand(prompts, generator=context.generator).to(each) < self.several
        return each.gather(1, best_answer(each, several).unsqueeze(1)).squeeze(1)


objective = PointMasks
