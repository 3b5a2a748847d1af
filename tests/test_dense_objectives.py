"""Objectives for dense prediction: perceptual, instance graphs, regions and cells. By hand; padding counts nothing; they train."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from objective_training import bound, convolutional, everywhere, falls, left, train
from torch import Tensor

from edgekd.distillation import points
from edgekd.distillation.objectives.mask_graph import edges, nodes, regions
from edgekd.distillation.objectives.region_pixel import reliability, weighted
from edgekd.distillation.outputs import Outputs

NAMES = ["perceptual", "mask_graph", "region_pixel"]


def build(name: str, **options: object) -> points.Objective:
    return points.build("objective", name, options)


def embedding(cells: list[list[tuple[float, ...]]]) -> Outputs:
    """Rows of cells -> an embedding (1, C, h, w)."""
    return Outputs(embedding=torch.tensor(cells, dtype=torch.float32).permute(2, 0, 1)[None])


# --- regions --------------------------------------------------------------------------------------------------------------


def test_regions__count_pixels_of_each_instance_in_each_cell() -> None:
    labels = torch.zeros(2, 4, 4, dtype=torch.int16)
    labels[0, :2, :3], labels[0, 3], labels[1, 0, 0] = 2, -1, 1
    found = regions(labels, (2, 2))
    assert found.shape == (2, 3, 4)
    assert found[0].tolist() == [[0, 2, 2, 2], [0, 0, 0, 0], [4, 2, 0, 0]], "padding is in no region"
    assert found[1].tolist() == [[3, 4, 4, 4], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert regions(labels[:1], (3, 3)).sum() == 12, "a grid that does not divide the frame loses no pixel"


def test_nodes_and_edges__by_hand() -> None:
    features = torch.tensor([[[[1.0, 3.0]], [[0.0, 4.0]]]])  # cells (1, 0) and (3, 4)
    pixels = torch.tensor([[[3.0, 1.0], [0.0, 2.0], [0.0, 0.0]]])
    found, there = nodes(features, pixels)
    assert found[0].tolist() == [[1.5, 1.0], [3.0, 4.0], [0.0, 0.0]] and there.tolist() == [[1, 1, 0]]
    cosine = (1.5 * 3 + 1 * 4) / (5 * (1.5**2 + 1) ** 0.5)
    assert torch.allclose(edges(found)[0, :2, :2], torch.tensor([[1, cosine], [cosine, 1]]), atol=1e-6)


# --- by hand --------------------------------------------------------------------------------------------------------------


def two_instances() -> Tensor:
    """Left and right half, no background."""
    labels = torch.ones(1, 4, 4, dtype=torch.int16)
    labels[..., 2:] = 2
    return labels


def test_mask_graph__by_hand() -> None:
    """Two instances at a right angle in the teacher, alike in the student: an edge of 1 against 0, one node of two at a right angle."""
    theirs, ours = embedding([[(1, 0), (0, 1)]] * 2), embedding([[(2, 0), (3, 0)]] * 2)
    for weights, wanted in (((1.0, 0.0), 1.0), ((0.0, 1.0), 0.5), ((2.0, 3.0), 2 + 1.5)):
        one = build("mask_graph", edges=weights[0], nodes=weights[1])
        assert one(ours, theirs, everywhere(instances=two_instances())).tolist() == pytest.approx([wanted])


def test_mask_graph__background_is_a_node_and_a_photo_of_one_region_has_no_edge() -> None:
    theirs, ours = embedding([[(1, 0), (0, 1)]] * 2), embedding([[(1, 0), (1, 0)]] * 2)
    one = build("mask_graph", nodes=0.0)
    assert one(ours, theirs, everywhere(instances=two_instances() - 1)).tolist() == pytest.approx([1.0])
    assert one(ours, theirs, everywhere(instances=torch.ones(1, 4, 4, dtype=torch.int16))).tolist() == [0.0]
    assert one(ours, theirs, everywhere(instances=torch.full((1, 4, 4), -1, dtype=torch.int16))).tolist() == [0.0], "nothing but padding"


def test_region_pixel__by_hand() -> None:
    """The left region is of one mind (reliability 1), the right one of two: cells (0, 1) and (1, 0), mean (1/2, 1/2), each at cos 45 degrees."""
    theirs = embedding([[(1, 0), (0, 1)], [(1, 0), (1, 0)]])
    ours = embedding([[(1, 0), (1, 0)], [(1, 0), (1, 0)]])
    context, c = everywhere(instances=two_instances()), 0.5**0.5
    pixels = regions(two_instances(), (2, 2))
    assert reliability(theirs["embedding"], nodes(theirs["embedding"], pixels)[0], pixels)[0].tolist() == pytest.approx([0, 1, c])
    whole = 1 - 3 / 10**0.5
    for level, wanted in (("image", whole), ("region", c * (1 - c) / (1 + c)), ("pixel", c / (2 + 2 * c))):
        weights = {"image": 0.0, "region": 0.0, "pixel": 0.0} | {level: 2.0}
        assert build("region_pixel", **weights)(ours, theirs, context).tolist() == pytest.approx([2 * wanted], rel=1e-4)
    assert weighted(torch.ones(1, 3), torch.zeros(1, 3)).tolist() == [0.0]


def test_region_pixel__a_region_that_points_nowhere_counts_nothing() -> None:
    """Cells of the right region cancel out: its mean is no direction, and only the left region is learnt."""
    theirs = embedding([[(1, 0), (0, 1)], [(1, 0), (0, -1)]])
    ours = embedding([[(1, 0), (5, 5)], [(1, 0), (-3, 2)]])
    one = build("region_pixel", image=0.0)
    assert one(ours, theirs, everywhere(instances=two_instances())).tolist() == pytest.approx([0.0], abs=1e-5)


def test_perceptual__by_hand_with_one_filter_each() -> None:
    """Filters that pass the two channels on: unit vectors of the cells, then of means of four; a level of opposite cells is 0 after the ReLU."""
    theirs, ours = embedding([[(1, 0), (1, 0)], [(1, 0), (1, 0)]]), embedding([[(0, 3), (0, 3)], [(0, 3), (2, 0)]])
    one = bound(build("perceptual", levels=2, width=2), ours, theirs)
    for level in range(2):
        getattr(one, f"filters{level}").zero_()[:, :, 1, 1] = torch.eye(2)
    first = 3 * 2 / 4
    mean = torch.tensor([0.5, 2.25])  # of the four cells after the ReLU, as the filters pass everything
    second = float((mean / mean.norm() - torch.tensor([1.0, 0.0])).square().sum())
    assert one(ours, theirs, everywhere()).tolist() == pytest.approx([first + second], rel=1e-5)


def test_perceptual__the_filters_are_drawn_from_the_seed_and_orthonormal() -> None:
    of = Outputs(embedding=torch.randn(1, 8, 16, 16))
    one, same, other = (bound(build("perceptual", seed=s), of, of) for s in (0, 0, 1))
    assert torch.equal(one.filters0, same.filters0) and not torch.equal(one.filters0, other.filters0) and not list(one.parameters())
    rows = one.filters0.flatten(1)
    assert torch.allclose(rows @ rows.T, torch.eye(64) * 2 * 64 / 72, atol=1e-4) and set(one.state_dict()) == {"filters0", "filters1", "filters2"}
    assert bound(build("perceptual", levels=9), Outputs(embedding=torch.zeros(1, 8, 2, 2)), of).count == 2, "no more levels than the embedding has"


def test_perceptual__sees_how_neighbours_go_together() -> None:
    """Two students with the same squared error: one is off everywhere alike, one in a checkerboard of signs. A local loss cannot tell them apart."""
    torch.manual_seed(0)
    theirs = torch.randn(1, 8, 16, 16).mul(0.1) + 1
    smooth, rough = theirs + 0.3, theirs + 0.3 * (-1.0) ** (torch.arange(16)[:, None] + torch.arange(16)[None])
    assert F.mse_loss(smooth, theirs).item() == pytest.approx(F.mse_loss(rough, theirs).item(), rel=1e-5)
    one = bound(build("perceptual"), Outputs(embedding=smooth), Outputs(embedding=theirs))
    found = [one(Outputs(embedding=x), Outputs(embedding=theirs), everywhere()).item() for x in (smooth, rough)]
    assert found[1] > 2 * found[0]


# --- padding and training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_padding__counts_nothing(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 6, 8, 8, generator=g), torch.randn(2, 6, 8, 8, generator=g)
    labels = torch.zeros(2, 32, 32, dtype=torch.int16)
    labels[:, 4:20, 2:12], labels[..., 16:] = 1, -1
    context = left(2, instances=labels)
    one = bound(build(name), Outputs(embedding=ours), Outputs(embedding=theirs), context)
    wanted = one(Outputs(embedding=ours), Outputs(embedding=theirs), context)
    for x in (ours, theirs):
        x[..., 4:] += 30
    assert torch.allclose(one(Outputs(embedding=ours), Outputs(embedding=theirs), context), wanted, rtol=1e-4) and (wanted > 0.01).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_of_another_grid_and_with_further_channels(name: str) -> None:
    ours, theirs = Outputs(embedding=torch.randn(1, 6, 4, 4, requires_grad=True)), Outputs(embedding=torch.randn(1, 9, 8, 8))
    one = bound(build(name), ours, theirs)
    labels = torch.zeros(1, 16, 16, dtype=torch.int16)
    labels[:, 4:, :8] = 3
    loss = one(ours, theirs, everywhere(instances=labels))
    loss.mean().backward()
    assert torch.isfinite(loss).all() and ours["embedding"].grad is not None and ours["embedding"].grad.abs().sum() > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_objective__the_loss_falls(name: str, precision: str, tmp_path: Path) -> None:
    trainer, losses = train(convolutional, tmp_path, [{"name": name}], precision=precision)
    assert falls(losses, 0.9), losses
    before = convolutional(1, 8).state_dict()
    assert any(not torch.equal(v, before[k]) for k, v in trainer.student.state_dict().items() if k.startswith("encoder"))
