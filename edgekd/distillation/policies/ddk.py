"""Domain re-weighting: data sets on which the student is still far from the teacher are drawn more often.

Liu et al., "DDK: Distilling Domain Knowledge for Efficient Large Language Models" (arXiv 2407.16154): a factor a domain from the gap of
student and teacher, renewed at intervals and smoothed towards an even mixture.
"""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from edgekd.distillation.outputs import Context, Setup
from edgekd.distillation.points import Policy
from edgekd.errors import UsageError

MOST_DOMAINS = 64
EPOCHS_KEPT = 3


class Ddk(Policy):
    """p_d = smooth * gap_d / sum(gap) + (1 - smooth) / D, spread evenly over the photos of data set d; gap_d is the mean loss of its photos.

    DDK compares the perplexities of both models on held-out text. A distillation loss is that gap itself (0 where the student gives what
    the teacher gives), and is measured on the photos as they are drawn. The gaps of an epoch count from the epoch after the next on, so
    that neither batches made ahead nor a killed run change what is drawn.

    Args:
        smooth: share of the mixture that follows the gaps; 0 draws every data set alike.
    """

    name, family, paper = "ddk", "data", "DDK: Distilling Domain Knowledge for Efficient Large Language Models (arXiv 2407.16154)"

    gaps: Tensor
    total: Tensor
    count: Tensor
    drawn: Tensor

    def __init__(self, smooth: float = 0.5) -> None:
        super().__init__()
        if not 0 <= smooth <= 1:
            raise UsageError(f"ddk takes 0 <= smooth <= 1, not {smooth:g}")
        self.smooth = smooth

    def bind(self, setup: Setup) -> None:
        """Room for the gaps of the last epochs."""
        self.images = setup.context.images_total
        assert self.images > 0, "the step must know how many photos there are"
        self.register_buffer("gaps", torch.zeros(EPOCHS_KEPT, MOST_DOMAINS))
        self.register_buffer("total", torch.zeros(MOST_DOMAINS))
        self.register_buffer("count", torch.zeros(MOST_DOMAINS))
        self.register_buffer("drawn", torch.zeros((), dtype=torch.long))

    def weights(self, images: int, domains: np.ndarray, epoch: int) -> np.ndarray | None:
        """The mixture from the gaps of two epochs ago; None before there are any, and with one data set.

        Raises:
            UsageError: more data sets than there is room for.
        """
        sets = int(domains.max()) + 1
        if sets > MOST_DOMAINS:
            raise UsageError(f"ddk keeps the gaps of {MOST_DOMAINS} data sets at most, and there are {sets}", hint="join some of them")
        if sets < 2 or epoch < 2 or int(self.drawn) < (epoch - 1) * self.images:
            return None
        return mixture(self.gaps[(epoch - 2) % EPOCHS_KEPT, :sets].double().cpu().numpy(), domains, self.smooth)

    def observe(self, losses: Tensor, context: Context) -> None:
        """Add up the losses of every data set; at the end of an epoch their means are its gaps."""
        assert context.domains is not None
        domains, found = context.domains.to(self.total.device), losses.detach().float().to(self.total.device)
        self.total.index_add_(0, domains, found)
        self.count.index_add_(0, domains, torch.ones_like(found))
        epoch = int(self.drawn) // self.images
        self.drawn += len(domains)
        if int(self.drawn) // self.images > epoch:
            before = self.gaps[(epoch - 1) % EPOCHS_KEPT]  # of a data set that was not drawn, what was known
            self.gaps[epoch % EPOCHS_KEPT] = torch.where(self.count > 0, self.total / self.count.clamp(min=1), before)
            self.total.zero_()
            self.count.zero_()


def mixture(gaps: np.ndarray, domains: np.ndarray, smooth: float) -> np.ndarray:
    """gaps (D,) of the data sets, domains (images,) the data set of each photo -> how often each photo is drawn, summing to 1."""
    gaps = np.clip(np.nan_to_num(gaps), 0, None)
    follow = gaps / gaps.sum() if gaps.sum() > 0 else np.full(len(gaps), 1 / len(gaps))
    share = smooth * follow + (1 - smooth) / len(gaps)
    return (share / np.maximum(np.bincount(domains, minlength=len(gaps)), 1))[domains]


policy = Ddk
