"""The perceptual loss of KD SAM: embeddings are compared in the feature space of a fixed network (Patil et al., arXiv 2501.16740; Johnson et al.,
arXiv 1603.08155).

The paper adds it to the squared error (`feature_mse` here). The fixed network here is a pyramid of convolutions with random orthonormal filters
drawn from a seed: it reads embeddings, which no network trained on photos does, needs no download, and its levels see 3, 8 and 18 cells. Random
filters keep distances in expectation; what they add to the squared error is context, how neighbouring cells go together.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distillation.losses import aligned, over_photo
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.projectors import photo


class Perceptual(Objective):
    """Sum over levels of the mean over cells of |a - b|^2, a and b the unit vectors of the levels' channels; a level is a fixed 3x3 convolution with a
    ReLU, and the next one sees it at half the resolution.

    Args:
        levels: how many; fewer where the embedding gets too small.
        width: channels of a level.
        seed: of the filters.
    """

    name, family, paper = "perceptual", "dense_prediction", "Efficient Knowledge Distillation of SAM for Medical Image Segmentation (arXiv 2501.16740)"
    needs = frozenset({"embedding"})

    def __init__(self, levels: int = 3, width: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.levels, self.width, self.seed = levels, width, seed

    def bind(self, setup: Setup) -> None:
        """The filters, buffers: nothing here is trained."""
        side, channels = min(setup.ours["embedding"].shape[-2:]), setup.ours["embedding"].shape[1]
        self.count = max(1, min(self.levels, side.bit_length()))
        generator = torch.Generator().manual_seed(self.seed)
        for level in range(self.count):
            fan = (channels if level == 0 else self.width) * 9
            filters = torch.linalg.qr(torch.randn(max(fan, self.width), min(fan, self.width), generator=generator))[0]
            filters = filters.T if fan >= self.width else filters
            self.register_buffer(f"filters{level}", filters.reshape(self.width, fan // 9, 3, 3) * (2 * self.width / fan) ** 0.5)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """embeddings (B, E, s, s) -> (B,)."""
        ours, theirs = aligned(student["embedding"], teacher["embedding"])
        inside = photo(context.valid, ours.shape[-2:])
        ours, theirs, total = ours * inside, theirs * inside, torch.zeros(len(ours), device=ours.device)
        for level in range(self.count):
            ours, theirs = (F.conv2d(x, getattr(self, f"filters{level}").to(x), padding=1).float().relu() for x in (ours, theirs))
            total = total + over_photo((F.normalize(ours, dim=1) - F.normalize(theirs, dim=1)).square().sum(1, keepdim=True), context.valid)
            if min(ours.shape[-2:]) > 1:
                ours, theirs = F.avg_pool2d(ours, 2), F.avg_pool2d(theirs, 2)
        return total


objective = Perceptual
