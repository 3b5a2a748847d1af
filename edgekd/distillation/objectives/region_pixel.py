"""Three granularities at once: the photo, its regions and its cells, each region counted as far as the teacher is of one mind there.

Image-, region- and pixel-level terms follow the multi-granularity scheme for segmentation (Qin et al., arXiv 2208.10169); weighing regions and
pixels by reliability follows CNN-transformer collaborative learning (Zhu et al., arXiv 2307.12574), where it decides who teaches whom. A frozen
teacher always teaches, so reliability only says how much.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distillation.losses import aligned
from edgekd.distillation.objectives.mask_graph import nodes, regions
from edgekd.distillation.outputs import Context, Outputs
from edgekd.distillation.points import Objective
from edgekd.distillation.projectors import photo, photo_mean


class RegionPixel(Objective):
    """`image` x (1 - cos of the means) + `region` x sum_k r_k (1 - cos of region k's means) / sum_k r_k + `pixel` x the same of cells, a cell counting
    as its regions do. r_k, from 0 to 1, is the mean cosine of the teacher's cells in region k with the region's mean.

    Args:
        image: weight of the photo as a whole.
        region: weight of the regions: instances and background.
        pixel: weight of the cells.
    """

    name, family = "region_pixel", "dense_prediction"
    paper = "MGD for semi-supervised segmentation (arXiv 2208.10169), CNN-Transformer Collaborative Learning (arXiv 2307.12574)"
    needs = frozenset({"embedding", "instances"})

    def __init__(self, image: float = 1.0, region: float = 1.0, pixel: float = 1.0) -> None:
        super().__init__()
        self.weights = image, region, pixel

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """embeddings (B, E, s, s), instances (B, F, F) -> (B,)."""
        assert context.instances is not None
        ours, theirs = aligned(student["embedding"], teacher["embedding"])
        pixels = regions(context.instances, (ours.shape[-2], ours.shape[-1]))
        with torch.autocast(ours.device.type, enabled=False):
            (a, _), (b, _) = nodes(ours, pixels), nodes(theirs, pixels)
            sure = reliability(theirs, b, pixels)
            cells = torch.einsum("bk,bkn->bn", sure, pixels / pixels.sum(1, keepdim=True).clamp(min=1)) * photo(context.valid, ours.shape[-2:]).flatten(1)
            image = 1 - F.cosine_similarity(photo_mean(ours, context.valid), photo_mean(theirs, context.valid), dim=1)
            region = weighted(1 - F.cosine_similarity(a, b, dim=2), sure)
            pixel = weighted(1 - F.cosine_similarity(ours, theirs, dim=1).flatten(1), cells)
        return self.weights[0] * image + self.weights[1] * region + self.weights[2] * pixel


def reliability(features: Tensor, means: Tensor, pixels: Tensor) -> Tensor:
    """Mean cosine of the cells of each region with its mean, 0 where there is no region or it points nowhere: features (B, C, h, w), means (B, K, C),
    pixels (B, K, h * w) -> (B, K)."""
    alike = F.normalize(means, dim=2) @ F.normalize(features.flatten(2), dim=1)
    return ((alike * pixels).sum(2) / pixels.sum(2).clamp(min=1)).clamp(min=0)


def weighted(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of values (B, N) -> (B,); 0 without any weight."""
    return (values * weights).sum(1) / weights.sum(1).clamp(min=1e-6)


objective = RegionPixel
