"""Named taps: what a network computes on the way, read by hooks. The network is not changed, and nothing of a tap is ever exported.

    stage1, stage2, ...   the last block's map before each change of resolution, finest first
    block0, block1, ...   the output of every block
    attention0, ...       attention probabilities (B, heads, N, N), fused kernels included
    embedding, logits, pooled   what the model gives anyway
    any.module.path       the output of that module

Maps are (B, C, h, w) whatever the block's own layout; of tokens with a class token that one is left out.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edgekd.distillation.outputs import FEATURES
from edgekd.errors import EdgekdError, UsageError, closest

CONTAINERS = ("blocks", "features", "stages", "layers", "layer")
Seen = dict[str, Tensor]


def outputs(model: Any, images: Tensor) -> Seen:
    """What a model gives for photos (B, 3, S, S), by name (`outputs.FEATURES`). One without `outputs` gives its embedding."""
    return model.outputs(images) if hasattr(model, "outputs") else {"embedding": model.embed(images)}


@torch.no_grad()
def discover(model: nn.Module, images: Tensor) -> dict[str, str]:
    """Tap name -> module path of a model, found by showing it `images` (B, 3, S, S)."""
    trunk, prefix = _trunk(model)
    blocks = {f"{prefix}{path}": module for path, module in _blocks(trunk)}
    attention = [p for p, m in model.named_modules() if p.startswith(prefix) and "attention" in type(m).__name__.lower() and _is_leaf_attention(m)]
    with recording(model, blocks) as seen:
        outputs(model, images)
    maps = [(path, seen[path]) for path in blocks if path in seen and seen[path].ndim == 4]
    names = {f"block{i}": path for i, (path, _) in enumerate(maps)}
    sides = [m.shape[-1] for _, m in maps]
    last = [i for i, side in enumerate(sides) if i + 1 == len(sides) or sides[i + 1] != side]
    names |= {f"stage{n}": maps[i][0] for n, i in enumerate(last, 1)}
    return names | {f"attention{i}": path for i, path in enumerate(attention)}


def resolve(model: nn.Module, known: Mapping[str, str], name: str, whose: str, where: str) -> str | None:
    """The module path of a tap; None for an output of the model itself.

    Raises:
        UsageError: the model has no such tap, with the nearest ones.
    """
    if name in FEATURES:
        return None
    if name in known:
        return known[name]
    paths = {p for p, _ in model.named_modules()}
    if name in paths:
        return name
    near = closest(name, [*known, *paths])
    some = ", ".join([*known][:12]) + (", ..." if len(known) > 12 else "")
    raise UsageError(f"the {whose} '{getattr(model, 'name', type(model).__name__)}' has no tap '{name}'" + (f"; did you mean '{near}'?" if near else ""),
                     where=where, hint=f"its taps: embedding, {some}, or a module's path")


class Taps:
    """Taps of one model, `{name: module path or None}`; `with taps as seen:` fills `seen` while the model runs."""

    def __init__(self, model: nn.Module, paths: Mapping[str, str | None]) -> None:
        self.model, self.paths = model, dict(paths)

    @contextmanager
    def open(self) -> Iterator[Seen]:
        """Record while the model runs inside; attention is read by name, everything else by module."""
        modules = dict(self.model.named_modules())
        wanted = {name: path for name, path in self.paths.items() if path is not None}
        with ExitStack() as stack:
            seen: Seen = {}
            plain = {name: modules[path] for name, path in wanted.items() if not name.startswith("attention")}
            stack.enter_context(recording(self.model, plain, seen))
            for name, path in wanted.items():
                if name.startswith("attention"):
                    stack.enter_context(_probabilities(modules[path], name, seen))
            yield seen

    def run(self, images: Tensor) -> Seen:
        """The model's own outputs and the taps for photos (B, 3, S, S)."""
        with self.open() as seen:
            given = outputs(self.model, images)
        missing = [n for n, p in self.paths.items() if p is not None and n not in seen]
        if missing:
            raise EdgekdError(f"the tap '{missing[0]}' gave nothing", where=getattr(self.model, "name", ""), hint="its module is not run, or computes no softmax")
        return given | seen


@contextmanager
def recording(model: nn.Module, modules: Mapping[str, nn.Module], seen: Seen | None = None) -> Iterator[Seen]:
    """What each of `modules` (name -> module) gives within the context, as maps where it can be one."""
    seen = {} if seen is None else seen

    def keep(name: str) -> Any:
        def hook(module: nn.Module, _: Any, out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else out
            if isinstance(out, Tensor):
                seen[name] = as_map(out, getattr(module, "layout", None))
        return hook

    handles = [m.register_forward_hook(keep(name)) for name, m in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def as_map(x: Tensor, layout: str | None = None) -> Tensor:
    """A block's output as (B, C, h, w): from (B, C, h, w), (B, h, w, C) or tokens (B, N, C) of a square; others stay as they are."""
    if x.ndim == 4 and (layout == "nhwc" or (layout is None and x.shape[1] == x.shape[2] != x.shape[3])):
        return x.permute(0, 3, 1, 2)
    if x.ndim == 3:
        side = math.isqrt(x.shape[1])
        if side * side == x.shape[1]:
            return x.transpose(1, 2).unflatten(2, (side, side))
        side = math.isqrt(x.shape[1] - 1)
        if side * side == x.shape[1] - 1:
            return x[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    return x


class _Keep(TorchFunctionMode):
    """Keeps the probabilities of attention within a module; a fused kernel is computed in steps instead, with the same result."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            out, self.last = attend(*args, **kwargs)
            return out
        out = func(*args, **kwargs)
        if func in (torch.softmax, F.softmax, Tensor.softmax) and isinstance(out, Tensor) and out.ndim == 4:
            self.last = out
        return out


def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
           scale: float | None = None, enable_gqa: bool = False) -> tuple[Tensor, Tensor]:
    """`scaled_dot_product_attention` in steps: q, k, v (B, h, N, d) -> out (B, h, N, d), probabilities (B, h, N, N). Training without dropout."""
    scores = (q @ k.transpose(-2, -1)) * (scale or 1 / math.sqrt(q.shape[-1]))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    probabilities = scores.softmax(-1)
    return probabilities.to(v.dtype) @ v, probabilities


@contextmanager
def _probabilities(module: nn.Module, name: str, seen: Seen) -> Iterator[None]:
    """The attention probabilities of one module within the context."""
    keep = _Keep()

    def before(*_: Any) -> None:
        keep.__enter__()

    def after(*_: Any) -> None:
        keep.__exit__(None, None, None)
        if keep.last is not None:
            seen[name] = keep.last

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _trunk(model: nn.Module) -> tuple[nn.Module, str]:
    """The encoder of a model and its prefix; what is after it (decoders, heads) has no taps of its own name."""
    encoder = getattr(model, "encoder", None)
    return (encoder, "encoder.") if isinstance(encoder, nn.Module) else (model, "")


def _blocks(trunk: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """(path, module) of the blocks, in order: the children of the outermost lists called like `CONTAINERS`, lists in lists opened once."""
    taken: list[str] = []
    for path, module in trunk.named_modules():
        leaf = path.rsplit(".", 1)[-1].rstrip("0123456789")
        if any(path.startswith(f"{t}.") or path == t for t in taken) or leaf not in CONTAINERS or not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        taken.append(path)
        for name, child in module.named_children():
            inner = getattr(child, "blocks", getattr(child, "op_list", child))
            if isinstance(inner, (nn.ModuleList, nn.Sequential)) and inner is not child:
                where = "blocks" if hasattr(child, "blocks") else "op_list"
                yield from ((f"{path}.{name}.{where}.{i}", block) for i, block in inner.named_children())
            yield f"{path}.{name}", child


def _is_leaf_attention(module: nn.Module) -> bool:
    return not any("attention" in type(m).__name__.lower() for p, m in module.named_modules() if p)
