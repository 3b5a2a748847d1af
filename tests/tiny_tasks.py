"""Models of the other tasks, small enough for tests, and factories of them that a recipe can name (`tiny_tasks:classifier`)."""
from __future__ import annotations

import torch
from tiny import WIDTH, Encoder
from torch import Tensor, nn

from edgekd.models.classifier import Classifier, PooledHead
from edgekd.models.features import DenseFeatures
from edgekd.protocols import Preprocess

SIDE, CLASSES = 64, 6
LABELS = ("ant", "bee", "cat", "dog", "eel", "fox")
CROP = Preprocess(SIDE, (127.0, 127.0, 127.0), (64.0, 64.0, 64.0), "crop")


def classifier() -> Classifier:
    """A seeded classifier of 64 px with six named classes, whose answers differ from photo to photo."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier("tiny_classifier", Encoder(), PooledHead(WIDTH, CLASSES), CROP, classes=CLASSES, embed_dim=WIDTH, labels=LABELS)
        nn.init.normal_(model.head.fc.weight, std=3.0)  # type: ignore[union-attr, arg-type]
    return model.eval()


def unnamed() -> Classifier:
    """The same, which does not name its classes."""
    model = classifier()
    model.labels = ()
    return model


def wider() -> Classifier:
    """A classifier of one more class."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Classifier("wider", Encoder(), PooledHead(WIDTH, CLASSES + 1), CROP, classes=CLASSES + 1, embed_dim=WIDTH).eval()


def features() -> DenseFeatures:
    """A seeded model of dense features: 24 on a grid of 5 x 5, of photos of 64 px padded to a square."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DenseFeatures("tiny_features", Encoder(), WIDTH, Preprocess(SIDE), embed_dim=24, grid=5).eval()


class Plain(nn.Module):
    """Somebody's classifier that knows nothing of ours: logits from three convolutions."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.Conv2d(8, 12, 4, 4), nn.ReLU())
        self.classify = nn.Linear(12, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.body(images).mean((2, 3)))


def plain() -> Plain:
    """Seeded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Plain()


def map_only() -> nn.Module:
    """Somebody's network that gives a map (B, h, w, C)."""
    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.permute(0, 2, 3, 1)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 10, 32, 32), Last())
