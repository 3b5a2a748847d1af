"""A graph of the photo's instances: nodes are features pooled inside masks, edges how alike they are (after UWSAM's MG-UKD, arXiv 2505.15581).

The paper passes messages between masked tokens by graph attention and has the student rebuild the teacher's map. What its abstract claims, that
relations between instances are what a small encoder must keep, is taken literally here: the graph itself is compared, and needs no network.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distillation.losses import aligned
from edgekd.distillation.outputs import Context, Outputs
from edgekd.distillation.points import Objective


def regions(instances: Tensor, grid: tuple[int, int]) -> Tensor:
    """Pixels of every region in every cell: instances (B, F, F) int, 0 background, -1 padding -> (B, K, h * w), region 0 the background."""
    batch, height, width = instances.shape
    rows, columns = (torch.arange(n, device=instances.device) * g // n for n, g in zip((height, width), grid, strict=True))
    cells, count = grid[0] * grid[1], int(instances.max().clamp(min=0)) + 1
    owner = torch.arange(batch, device=instances.device)[:, None, None] * count + instances.long().clamp(min=0)
    place = owner * cells + rows[:, None] * grid[1] + columns
    return torch.bincount(place[instances >= 0], minlength=batch * count * cells).reshape(batch, count, cells).float()


def nodes(features: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of features (B, C, h, w) over every region (B, K, h * w) -> (B, K, C), and which regions are there (B, K) 0/1."""
    size = pixels.sum(2)
    return pixels @ features.flatten(2).transpose(1, 2) / size.clamp(min=1).unsqueeze(2), (size > 0).float()


def edges(of: Tensor) -> Tensor:
    """Cosines of every two nodes: (B, K, C) -> (B, K, K)."""
    unit = F.normalize(of, dim=2)
    return unit @ unit.transpose(1, 2)


class MaskGraph(Objective):
    """`edges` x mean over pairs of instances of (cos_s - cos_t)^2 + `nodes` x mean over instances of 1 - cos(node_s, node_t). The background is a node.

    Args:
        edges: weight of the relations.
        nodes: weight of the instances themselves.
    """

    name, family, paper = "mask_graph", "dense_prediction", "UWSAM: Mask GAT-based Underwater Knowledge Distillation (arXiv 2505.15581)"
    needs = frozenset({"embedding", "instances"})

    def __init__(self, edges: float = 1.0, nodes: float = 1.0) -> None:
        super().__init__()
        self.weights = edges, nodes

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """embeddings (B, E, s, s), instances (B, F, F) -> (B,)."""
        assert context.instances is not None
        ours, theirs = aligned(student["embedding"], teacher["embedding"])
        pixels = regions(context.instances, (ours.shape[-2], ours.shape[-1]))
        with torch.autocast(ours.device.type, enabled=False):
            (a, there), (b, _) = nodes(ours, pixels), nodes(theirs, pixels)
            pair = (there.unsqueeze(2) * there.unsqueeze(1)).triu(1)
            relations = ((edges(a) - edges(b)).square() * pair).sum((1, 2)) / pair.sum((1, 2)).clamp(min=1)
            alone = ((1 - F.cosine_similarity(a, b, dim=2)) * there).sum(1) / there.sum(1).clamp(min=1)
        return self.weights[0] * relations + self.weights[1] * alone


objective = MaskGraph
