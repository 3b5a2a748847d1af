"""Training a teacher from labels: pieces with known answers, and a run that learns and resumes exactly."""
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from edgekd.data.scenes import Scenes
from edgekd.distillation.labelled import augment, batches, draw_masks, to_frame
from edgekd.distillation.losses import bce, dice, iou
from edgekd.distillation.supervised import Affinity, SupervisedTrainer, learning_rate, mask_losses
from edgekd.models.sam import DecoderShape, Sam
from edgekd.protocols import Preprocess

SPEC = Preprocess(64)


def config(**changes: object) -> SimpleNamespace:
    given = dict(weight_decay=0.0, trunk_lr=0.0, lr=3e-3, steps=6, warmup=1, decay=0.5, seed=1, batch_size=2, instances=3, max_clicks=1, bf16=False,
                 affinity=0.5, clip=1.0, ema=0.9, checkpoint_every=2, workers=0)
    return SimpleNamespace(**given | changes)


def model() -> Sam:
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 16, 16))
    return Sam("tiny", encoder, DecoderShape(embed_dim=32, heads=2, mlp_dim=32), SPEC)


SOURCES = [Scenes(seed=4, count=20, size=64)]


def test_run__the_loss_falls_and_the_log_is_written(tmp_path: Path) -> None:
    rows: list[dict] = []
    SupervisedTrainer(model(), config(steps=40, batch_size=4), SOURCES, [1.0], tmp_path).run(rows.append)
    first, last = (sum(r["loss"] for r in part) for part in (rows[:8], rows[-8:]))
    assert last < 0.9 * first
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 40


def test_run__resumed_equals_one_run(tmp_path: Path) -> None:
    whole = model()
    for name in "ab":
        (tmp_path / name).mkdir()
    SupervisedTrainer(whole, config(), SOURCES, [1.0], tmp_path / "a").run()

    class Killed(Exception):
        pass

    def kill(row: dict) -> None:
        if row["step"] == 3:
            raise Killed

    with pytest.raises(Killed):
        SupervisedTrainer(model(), config(), SOURCES, [1.0], tmp_path / "b").run(kill)
    again = model()
    trainer = SupervisedTrainer(again, config(), SOURCES, [1.0], tmp_path / "b")
    assert trainer.step == 2, "the last checkpoint"
    trainer.run()
    for (k, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-4), k  # a step moves weights by 3e-3; summation order alone by 1e-5


def test_batches__step_k_is_the_same_from_anywhere() -> None:
    def at(first: int) -> dict:
        return dict(batches(SOURCES, [1.0], SPEC, batch_size=2, prompts=2, seed=5, first=first, last=4, workers=0))

    a, b = at(0)[3], at(3)[3]
    assert torch.equal(a.images, b.images) and torch.equal(a.masks, b.masks)


def test_draw_masks__only_instances_that_are_there() -> None:
    labels = torch.zeros(2, 64, 64, dtype=torch.int16)
    labels[0, :32] = 1
    labels[1, 10:20, 10:20], labels[1, 40:60] = 3, 5
    labels[1, 0, 0] = 4  # one pixel is no instance
    masks = draw_masks(labels, 20, torch.Generator().manual_seed(0))
    sizes = {int(m.sum()) for m in masks[:20]}, {int(m.sum()) for m in masks[20:]}
    assert sizes == ({32 * 64}, {100, 20 * 64})


def test_to_frame__pads_right_and_bottom_with_nothing() -> None:
    import numpy as np

    image, labels = np.full((20, 40, 3), 200, np.uint8), np.ones((20, 40), np.int16)
    frame, target = to_frame(image, labels, SPEC)
    assert frame.shape == (3, 64, 64) and target.shape == (64, 64)
    assert (target[:32] == 1).all() and (target[32:] == -1).all() and (frame[:, 32:] == 0).all()
    assert frame[0, 0, 0] == pytest.approx((200 - SPEC.mean[0]) / SPEC.std[0], abs=1e-5)


def test_augment__moves_image_and_labels_together() -> None:
    import numpy as np

    labels = np.arange(80 * 60).reshape(80, 60).astype(np.int16)
    image = np.repeat(labels[..., None] % 251, 3, axis=2).astype(np.uint8)
    for seed in range(10):
        moved, target = augment(np.random.default_rng(seed), image, labels)
        assert (moved[..., 0] == target % 251).all()


def test_mask_losses__only_the_best_alternative_learns() -> None:
    logits = torch.zeros(1, 4, 4, 4, requires_grad=True)
    with torch.no_grad():
        logits[0, 2] = 4.0
    target, valid = torch.ones(1, 4, 4), torch.ones(1, 4, 4)
    loss, true = mask_losses(logits, torch.zeros(1, 4), target, valid)
    loss.sum().backward()
    pull = logits.grad.abs().sum((2, 3))[0]
    assert true.tolist() == [[0, 0, 1, 0]]
    assert pull[0] > 0 and pull[2] > 0 and pull[1] == pytest.approx(float(pull[3]))
    assert pull[1] < 0.1 * pull[0], "the others only feel the small share that keeps them alive"


def test_affinity__knows_what_belongs_together() -> None:
    torch.manual_seed(0)
    head = Affinity(8)
    labels = torch.zeros(1, 64, 64, dtype=torch.int16)
    labels[:, :, 32:] = 1
    labels[:, 60:] = -1
    embedding = torch.randn(1, 8, 4, 4)
    before = head(embedding, labels, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam([*head.parameters()], lr=0.05)
    for step in range(60):
        optimizer.zero_grad()
        head(embedding, labels, torch.Generator().manual_seed(step)).backward()
        optimizer.step()
    assert head(embedding, labels, torch.Generator().manual_seed(0)) < 0.5 * before


def test_losses__by_hand() -> None:
    logits, target, valid = torch.zeros(2, 2), torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.ones(2, 2)
    assert bce(logits, target, valid).item() == pytest.approx(0.6931472)
    assert dice(logits, target, valid).item() == pytest.approx(1 - 3 / 5)
    valid[1] = 0
    assert dice(logits, target, valid).item() == pytest.approx(1 - 3 / 4)
    assert iou(torch.tensor([[True, False]]), torch.tensor([[True, True]])).item() == 0.5
    assert iou(torch.zeros(2, 2, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.bool)).item() == 1


def test_learning_rate__warm_up_constant_then_down() -> None:
    rates = [learning_rate(k, 100, 10, 0.2) for k in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1 and set(rates[10:80]) == {1.0}
    assert rates[90] == pytest.approx(0.5) and rates[99] == pytest.approx(0.05)
