"""How alike the photos of a batch are to each other, as the teacher has it (SPKD, arXiv 1907.09682; affinity mimicking of TinyCLIP, arXiv 2309.12314)."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.relations import check_batch, cosines, inside, own_channels, photo_vector
from edgekd.distillation.softmax import exact, soft_kl


class Affinity(Objective):
    """Squared difference (or KL) of the similarities of the batch's photos to each other.

    Row i of the Gram matrix of whole maps (padding as 0), scaled to length 1, student's against teacher's: mean squared difference over j.
    With a `temperature` instead T^2 KL of the softmax of the cosine similarities to all other photos, of one vector a photo, as TinyCLIP does
    it between photos and texts. Widths and sizes may differ.

    Args:
        temperature: 0 compares Gram matrices (SPKD).
    """

    name, family, paper = "affinity", "relation", "Similarity-Preserving Knowledge Distillation (arXiv 1907.09682)"
    needs = frozenset({"feats"})
    default_taps = "embedding"
    min_batch = 2

    def __init__(self, temperature: float = 0.0) -> None:
        super().__init__()
        self.temperature = temperature

    def bind(self, setup: Setup) -> None:
        """Refuses batches that cannot be compared within: two photos, three for a softmax over the others."""
        check_batch(setup, self.name, 3 if self.temperature else self.min_batch)
        self.channels = own_channels(setup)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """feats (B, C, h, w) or (B, D) -> (B,), the mean over the taps."""
        losses = []
        for ours, theirs, channels in zip(student.feats, teacher.feats, self.channels, strict=True):
            theirs = theirs[:, :channels]
            if self.temperature:
                s, t = photo_vector(ours, context), photo_vector(theirs, context)
                with exact(s):
                    losses.append(soft_kl(others(cosines(s)), others(cosines(t)), self.temperature))
            else:
                s, t = whole(ours, context), whole(theirs, context)
                with exact(s):
                    losses.append((gram(s) - gram(t)).square().mean(1))
        return torch.stack(losses).mean(0)


def whole(x: Tensor, context: Context) -> Tensor:
    """A map (B, C, h, w) with its padding set to 0, or (B, D), as one vector (B, D) float32 a photo."""
    x = x.float()
    return (x * inside(context.valid, (x.shape[2], x.shape[3])).unsqueeze(1)).flatten(1) if x.ndim == 4 else x


def gram(x: Tensor) -> Tensor:
    """(B, D) -> inner products (B, B), rows of length 1."""
    return F.normalize(x @ x.T, dim=1)


def others(x: Tensor) -> Tensor:
    """Without the diagonal: (B, B) -> (B, B - 1)."""
    return x[~torch.eye(len(x), dtype=torch.bool, device=x.device)].unflatten(0, (len(x), -1))


objective = Affinity
