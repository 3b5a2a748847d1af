"""Leaving channels and blocks out of an encoder.

torch-pruning (DepGraph, arXiv 2301.12900) finds which layers' channels can only go together, scores them and cuts the tensors. What is
chosen is ours: the share of channels that goes is the same in every set, what is left is a multiple of 8 for the kernels' sake, and a
set is only touched where a channel of zeros is as good as none. That makes every cut provable, and it is proved: the cut encoder must
compute what the whole one does with the same channels set to zero.
"""
from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.errors import EdgekdError, UsageError
from edgekd.models.pruned import replace
from edgekd.protocols import package_version

INSTALL = 'pip install "edgekd[pruning]"'
EQUAL = 1e-3
"""Of the embedding's largest value: how far a cut encoder may be from its zeroed original. Summing in another order makes 1e-6; a channel too much or too
few, 1e-1."""
BATCH = 8
"""Photos that the statistics of batch norms are taken over at a time."""
_PASSING = ("_ElementWiseOp", "_ReshapeOp", "_ReshapeDummyModule", "_Reshape")
"""What torch-pruning calls operations that channels pass one by one."""
Loss = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Channels:
    """Channels that can only go together. `layer` makes them, `scores` (n,) say how little each is missed; `layers` are all that they touch."""

    layer: str
    layers: tuple[str, ...]
    scores: Tensor

    def going(self, ratio: float, multiple: int) -> list[int]:
        """The least important channels, so many that the nearest multiple to the share 1 - ratio stays; at least one multiple does."""
        count = len(self.scores)
        stay = max(multiple, int(count * (1 - ratio) / multiple + 0.5) * multiple)
        return sorted(self.scores.argsort()[: max(0, count - stay)].tolist())


def library() -> Any:
    """torch-pruning. Raises UsageError when it is not installed, with the command."""
    if package_version("torch-pruning") is None:
        raise UsageError("torch-pruning is not installed", hint=f"install it: {INSTALL}")
    import torch_pruning

    return torch_pruning


def coupled(encoder: nn.Module, image: Tensor, losses: Sequence[Loss] = ()) -> list[Channels]:
    """The sets of channels of an encoder that can be cut, with their scores.

    Args:
        image: (1, 3, S, S), to follow the channels with.
        losses: of an encoder, on photos each: scores are then Taylor's, the change of the loss to first order (arXiv 1906.10771). Without:
            the group's L2 norm.

    Raises:
        UsageError: torch-pruning is not installed.
        EdgekdError: it cannot follow this encoder.
    """
    tp = library()
    encoder = _trainable(encoder)
    graph = _graph(tp, encoder, image)
    for loss in losses:
        loss(encoder).backward()
    if losses:
        for weight in encoder.parameters():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    score = tp.importance.GroupTaylorImportance() if losses else tp.importance.GroupMagnitudeImportance(p=2)
    paths, found, seen = {layer: path for path, layer in encoder.named_modules()}, [], set()
    for layer in [m for m in graph.module2node if isinstance(m, (nn.Conv2d, nn.Linear))]:
        targets = _reached(graph, layer)
        if layer in seen or not all(_passes(node) for node, _ in targets):
            continue
        seen |= {node.module for node, out in targets if out}
        channels = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
        group = graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, list(range(channels)))
        touched = sorted({paths[node.module] for node, _ in targets if node.module in paths})
        found.append(Channels(paths[layer], tuple(touched), score(group).detach().cpu()))
    return sorted(found, key=lambda c: c.layer)


def cut(encoder: nn.Module, image: Tensor, going: Mapping[str, Sequence[int]]) -> nn.Module:
    """A copy of the encoder without some channels; `going` are the numbers of those of a layer, as `Channels.layer` names it.

    Raises:
        EdgekdError: the copy does not compute what the encoder does with these channels set to zero.
    """
    tp = library()
    whole, left = _trainable(encoder), _trainable(encoder)
    graphs = [_graph(tp, each, image) for each in (whole, left)]
    for path, channels in going.items():
        if not channels:
            continue
        for each, graph in zip((whole, left), graphs, strict=True):
            layer = each.get_submodule(path)
            group = graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, list(channels))
            if each is whole:
                _silence(graph, group)
            else:
                group.prune()
    for each in (whole, left):
        each.zero_grad(set_to_none=True)
    with torch.no_grad():
        wanted, got = whole(image), left(image)
    if got.shape != wanted.shape or not float((got - wanted).abs().max()) <= EQUAL * float(wanted.abs().max()):
        raise EdgekdError("cutting the channels changed more than they are: the network was not followed rightly", where=type(encoder).__name__,
                          hint="this encoder cannot be pruned; choose a student of another family")
    return left.requires_grad_(False)


def blocks(encoder: nn.Module, image: Tensor) -> list[str]:
    """Paths of the blocks that could be left out: members of a list whose output has the shape of their input, the outermost of them,
    with weights; the neck is none."""
    shapes: dict[str, bool] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            shapes[path] = len(inputs) == 1 and isinstance(output, Tensor) and isinstance(inputs[0], Tensor) and inputs[0].shape == output.shape
        return hook

    listed = {path: module for path, module in encoder.named_modules() if path.rpartition(".")[2].isdigit() and not path.startswith("neck")
              and any(isinstance(m, (nn.Conv2d, nn.Linear)) for m in module.modules() if m is not module)}
    hooks = [module.register_forward_hook(note(path)) for path, module in listed.items()]
    try:
        with torch.no_grad():
            encoder(image)
    finally:
        for one in hooks:
            one.remove()
    same = [path for path in listed if shapes.get(path)]
    return [path for path in same if not any(path.startswith(f"{other}.") for other in same)]


def without(encoder: nn.Module, paths: Sequence[str]) -> nn.Module:
    """A copy of the encoder in which these blocks are the identity."""
    left = copy.deepcopy(encoder)
    for path in paths:
        replace(left, path, nn.Identity())
    return left


def cosine(encoder: nn.Module, photos: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Mean cosine of the embeddings with those wanted, photo by photo; photos are (1, 3, S, S) each."""
    with torch.no_grad():
        found = [F.cosine_similarity(encoder(photo).flatten(1).double(), other.flatten(1).double()) for photo, other in zip(photos, wanted, strict=True)]
    return float(torch.cat(found).mean())


def settled(encoder: nn.Module, photos: Sequence[Tensor]) -> nn.Module:
    """A copy whose batch norms have the statistics of what now reaches them; the encoder itself where it has none."""
    norms = [path for path, m in encoder.named_modules() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        return encoder
    found = copy.deepcopy(encoder)
    layers = [found.get_submodule(path) for path in norms]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()  # type: ignore[operator]
        layer.momentum = None  # type: ignore[assignment]  # the mean over all batches
        layer.train()
    with torch.no_grad():
        for start in range(0, len(photos), BATCH):
            found(torch.cat(list(photos[start:start + BATCH])))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    return found.eval()


def least_missed(encoder: nn.Module, photos: Sequence[Tensor], wanted: Sequence[Tensor], count: int) -> list[str]:
    """The blocks to leave out one after the other: each time the one without which the embedding stays nearest. At most `count`."""
    gone: list[str] = []
    left = blocks(encoder, photos[0])
    while left and len(gone) < count:
        near = {path: cosine(without(encoder, [*gone, path]), photos, wanted) for path in left}
        best = max(left, key=lambda path: near[path])
        gone.append(best)
        left.remove(best)
    return gone


def _trainable(encoder: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters take gradients, as torch-pruning needs to follow them."""
    return copy.deepcopy(encoder).eval().requires_grad_(True)


def _graph(tp: Any, encoder: nn.Module, image: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters outside layers, which are left alone here
        try:
            return tp.DependencyGraph().build_dependency(encoder, example_inputs=image)
        except Exception as e:  # it walks through somebody's network and may raise anything
            raise EdgekdError(f"torch-pruning cannot follow the encoder: {type(e).__name__}: {e}", where=type(encoder).__name__,
                              hint="choose a student of another family") from e


def _reached(graph: Any, layer: nn.Module) -> set[tuple[Any, bool]]:
    """The layers and operations that the outgoing channels of a layer reach, and whether as outgoing channels of theirs.

    Ahead of `get_pruning_group`, which also follows each channel's number and does not come to an end in linear attention (EfficientViT).
    """
    found: set[tuple[Any, Any]] = set()
    ways = [(graph.module2node[layer], graph.get_pruner_of_module(layer).prune_out_channels)]
    while ways:
        node, how = ways.pop()
        if (node, how) in found:
            continue
        found.add((node, how))
        ways += [(dep.target, dep.handler) for dep in node.dependencies if dep.is_triggered_by(how)]
    return {(node, graph.is_out_channel_pruning_fn(how)) for node, how in found}


def _passes(node: Any) -> bool:
    """Whether a channel of zeros is as good as none to a layer or operation: not to norms over channels, attention or what joins and splits."""
    module = node.module
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 or module.groups == module.in_channels == module.out_channels
    return isinstance(module, (nn.Linear, nn.BatchNorm2d)) or type(module).__name__ in _PASSING


def _silence(graph: Any, group: Any) -> None:
    """Set the outgoing channels of all layers of a group to zero."""
    with torch.no_grad():
        for dep, numbers in group:
            layer = dep.target.module
            if isinstance(layer, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)) and graph.is_out_channel_pruning_fn(dep.handler):
                for value in (layer.weight, layer.bias):
                    if value is not None:
                        value[list(numbers)] = 0
