"""Several teachers in one student: a ladder of projectors for each teacher, and for every photo the easy teachers dropped now and then
(UNIC, arXiv 2408.05088, sec. 3)."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillation.losses import over_photo
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.errors import UsageError


class Ladder(nn.Module):
    """Maps of several stages, each through its own two layers, summed on the grid of one teacher: (B, C_i, h_i, w_i) -> (B, E, s, s)."""

    def __init__(self, channels: list[int], out: int, hidden: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.Sequential(nn.Conv2d(c, hidden, 1), nn.GELU(), nn.Conv2d(hidden, out, 1)) for c in channels)

    def forward(self, maps: tuple[Tensor, ...], side: tuple[int, int]) -> Tensor:
        """-> (B, E, *side)."""
        found = [step(F.adaptive_avg_pool2d(m.float(), side)) for step, m in zip(self.steps, maps, strict=True)]
        return torch.stack(found).sum(0)


class Unic(Objective):
    """Of every teacher  (1 - cos + smooth L1) / 2  per cell between its standardised embedding and its ladder's map, mean over the photo; then the
    mean over teachers, of which the one that is furthest off stays and each other is dropped with probability `drop`, photo by photo.

    Args:
        drop: probability.
        hidden: width of the projectors; 0: the student's embedding's.
        standardise: bring each teacher's channels to mean 0 and deviation 1 over the photos seen so far.
    """

    name, family, paper = "unic", "multi_teacher", "UNIC (arXiv 2408.05088)"
    needs = frozenset({"teachers", "feats", "embedding"})
    default_taps = "student"
    least_at_teacher = False

    def __init__(self, drop: float = 0.5, hidden: int = 0, standardise: bool = True) -> None:
        super().__init__()
        self.drop, self.hidden, self.standardise = drop, hidden, standardise

    def bind(self, setup: Setup) -> None:
        """A ladder and running statistics for each teacher."""
        if len(setup.context.teachers) < 2:
            raise UsageError("unic needs several teachers", where=setup.where, hint="add more_teachers: [NAME]")
        channels = [f.shape[1] for f in setup.ours.feats]
        wide = self.hidden or setup.ours["embedding"].shape[1]
        self.names = list(setup.context.teachers)
        # of a foreign teacher's embedding the channels after these are for its own decoder
        given = {name: t["embedding"].shape[1] for name, t in setup.context.teachers.items()}
        self.widths = [min(width, getattr(setup.teachers.get(name), "embed_dim", None) or width) for name, width in given.items()]
        self.ladders = nn.ModuleList(Ladder(channels, out, wide) for out in self.widths)
        # momentum None: the mean over all batches so far, not one that forgets
        self.norms = nn.ModuleList(nn.BatchNorm2d(out, affine=False, momentum=None) for out in self.widths)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """feats (B, C, h, w) of the student's stages, embeddings of context.teachers -> (B,)."""
        each = []
        for name, width, ladder, norm in zip(self.names, self.widths, self.ladders, self.norms, strict=True):
            theirs = context.teachers[name]["embedding"][:, :width].detach().float()
            ours = ladder(student.feats, (theirs.shape[-2], theirs.shape[-1])).float()
            theirs = self.scaled(theirs, norm) if self.standardise else theirs
            cosine = 1 - F.cosine_similarity(ours, theirs, dim=1).unsqueeze(1)
            each.append((over_photo(cosine, context.valid) + over_photo(F.smooth_l1_loss(ours, theirs, reduction="none"), context.valid)) / 2)
        losses = torch.stack(each)
        keep = kept(losses, self.drop, context.generator) if self.training else torch.ones_like(losses)
        return (losses * keep).sum(0) / keep.sum(0)

    @staticmethod
    def scaled(x: Tensor, norm: nn.Module) -> Tensor:
        """x (B, E, s, s) with running mean 0 and deviation 1 per channel; the statistics take this batch in first when training."""
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
        if norm.training:
            norm(x)
        mean, deviation = norm.running_mean[:, None, None], (norm.running_var + norm.eps).sqrt()[:, None, None]
        return (x - mean) / deviation


def kept(losses: Tensor, drop: float, generator: torch.Generator | None) -> Tensor:
    """losses (teachers, B) -> 1 where a teacher counts for a photo, else 0: the largest loss always does, any other with 1 - `drop`."""
    keep = torch.rand(losses.shape, generator=generator).to(losses.device) >= drop
    return (keep | (losses.detach() == losses.detach().amax(0))).to(losses)


objective = Unic
