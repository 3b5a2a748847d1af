"""A classifier: any encoder with a map of features, and a pooled head. And anybody's classifier, taken apart so that it fits."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.errors import UsageError, first_line
from edgekd.models.blocks import initialise
from edgekd.protocols import Component, Preprocess


class PooledHead(nn.Module):
    """(B, C, h, w) -> pooled features (B, D), logits (B, K): the mean of the map, with `hidden` one more layer (MobileNetV3), a linear layer."""

    def __init__(self, channels: int, classes: int, hidden: int = 0) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(channels, hidden), nn.Hardswish()) if hidden else nn.Identity()
        self.fc = nn.Linear(hidden or channels, classes)
        initialise(self)

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.hidden(embedding.mean((2, 3)))
        return pooled, self.fc(pooled)


class Classifier(nn.Module):
    """Encoder and head.

    Args:
        encoder: (B, 3, S, S) -> (B, C, h, w).
        head: (B, C, h, w) -> (B, D), (B, K).
        labels: names of the K classes, or none.
    """

    task = "classification"

    def __init__(self, name: str, encoder: nn.Module, head: nn.Module, preprocess: Preprocess, *, classes: int, embed_dim: int,
                 labels: Sequence[str] = ()) -> None:
        super().__init__()
        self.name, self.preprocess, self.classes, self.embed_dim, self.labels = name, preprocess, classes, embed_dim, tuple(labels)
        self.encoder, self.head = encoder, head

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What can be trained on its own, by the names that recipes use."""
        return {"encoder": self.encoder, "head": self.head}

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) normalised -> (B, C, h, w)."""
        return self.encoder(images)

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, S, S) normalised -> `embedding` (B, C, h, w), `pooled` (B, D), `logits` (B, K)."""
        embedding = self.encoder(images)
        pooled, logits = self.head(embedding)
        return {"embedding": embedding, "pooled": pooled, "logits": logits}

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) normalised -> logits (B, K)."""
        return self.head(self.encoder(images))[1]


class Taken(nn.Module):
    """Somebody else's classifier: `encoder` is all of it up to its last linear layer, which is `head`.

    What it pools from, the embedding, is found with an empty picture: the last map, or tokens of a square grid, that any of its modules gives.

    Args:
        model: (B, 3, S, S) -> logits (B, K), or an object with them as `logits`. It is taken apart: its last layer is replaced in place.

    Raises:
        UsageError: it does not run on an image of that size, or does not end with a linear layer.
    """

    task = "classification"

    def __init__(self, name: str, model: nn.Module, preprocess: Preprocess, *, labels: Sequence[str] = ()) -> None:
        super().__init__()
        self.name, self.preprocess, self.labels = name, preprocess, tuple(labels)
        side = preprocess.image_size
        found = _look(model, torch.zeros(1, 3, side, side), name)
        path, self.tap, example = found
        parent = model.get_submodule(path.rpartition(".")[0])
        head = getattr(parent, path.rpartition(".")[2])
        setattr(parent, path.rpartition(".")[2], nn.Identity())
        self.encoder, self.head = model, head
        self.classes, self.embed_dim = head.out_features, example.shape[1]

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What can be trained on its own."""
        return {"encoder": self.encoder, "head": self.head}

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, S, S) normalised -> `embedding` (B, C, h, w), `pooled` (B, D), `logits` (B, K)."""
        seen: list[Tensor] = []
        handle = self.encoder.get_submodule(self.tap).register_forward_hook(lambda _, __, out: seen.append(tensor_of(out)))
        try:
            pooled = answer(self.encoder, images)
        finally:
            handle.remove()
        embedding = grid(seen[-1])
        assert embedding is not None
        return {"embedding": embedding, "pooled": pooled, "logits": self.head(pooled)}

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) normalised -> (B, C, h, w)."""
        return self.outputs(images)["embedding"]

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) normalised -> logits (B, K)."""
        return self.head(answer(self.encoder, images))


def answer(model: nn.Module, images: Tensor) -> Tensor:
    """What a classifier says, whether it returns a tensor or an object with `logits`."""
    out: Any = model(images)
    return out if isinstance(out, Tensor) else out.logits


def tensor_of(out: Any) -> Any:
    """The tensor of a module's output, the first of several."""
    if isinstance(out, Tensor):
        return out
    return tensor_of(out[0]) if isinstance(out, (tuple, list)) and out else getattr(out, "last_hidden_state", None)


def grid(x: Any) -> Tensor | None:
    """A module's output as a map (B, C, h, w) of more than one cell: of one, of (B, h, w, C), or of tokens (B, N, C), class and register
    tokens first, on a square; None for anything else."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return None
    if x.ndim == 4 and x.shape[1] == x.shape[2] != x.shape[3]:
        x = x.permute(0, 3, 1, 2)
    if x.ndim == 4:
        return x if x.shape[2] == x.shape[3] > 1 else None
    side = math.isqrt(x.shape[1]) if x.ndim == 3 else 0
    return x[:, x.shape[1] - side * side:].transpose(1, 2).unflatten(2, (side, side)) if side > 1 else None


@torch.no_grad()
def _look(model: nn.Module, images: Tensor, name: str) -> tuple[str, str, Tensor]:
    """Path of the linear layer that gives the logits, path of the module that gives the last map before it, and that map."""
    seen: list[tuple[str, Any]] = []
    handles = [module.register_forward_hook(lambda _, __, out, path=path: seen.append((path, tensor_of(out)))) for path, module in model.named_modules() if path]
    training = model.training
    try:
        logits = answer(model.eval(), images)
    except Exception as e:  # somebody else's network may raise anything
        raise UsageError(f"the model does not run on an image {tuple(images.shape)}: {type(e).__name__}: {first_line(e)}", where=name,
                         hint="a classifier maps (B, 3, S, S) to logits (B, K)") from e
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    ends = [path for path, out in seen if isinstance(model.get_submodule(path), nn.Linear) and isinstance(out, Tensor) and out.shape == logits.shape
            and torch.equal(out, logits)]
    maps = [(path, found) for path, out in seen if (found := grid(out)) is not None]
    if logits.ndim != 2 or not ends or not maps:
        what = "does not end with a linear layer" if maps else "has no map of features"
        raise UsageError(f"the model {what}, so it cannot be taken apart", where=name, hint="wrap it in a module that ends with nn.Linear, or give another")
    return ends[-1], *maps[-1]


class _Logits(nn.Module):
    """The part that is exported: nothing but photos in and logits out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder, self.head = model.encoder, model.head
        self.taken = isinstance(model, Taken)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(answer(self.encoder, images)) if self.taken else self.head(self.encoder(images))[1]


def components(model: Any) -> dict[str, Component]:
    """A classifier as its one exportable part: images (1, 3, S, S) -> logits (1, K)."""
    side = model.preprocess.image_size
    return {"classifier": Component("classifier", _Logits(model).eval(), {"images": torch.randn(1, 3, side, side)}, ("logits",))}
