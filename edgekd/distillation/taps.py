"""Named taps: what a network computes on the way, read by hooks. The network is not changed, and nothing of a tap is ever exported.

    stage1, stage2, ...   the last block's map of every resolution, finest first
    block0, block1, ...   the output of every block
    attention0, ...       attention probabilities (B, heads, N, N), fused kernels included; of attention in windows every window counts as
                          heads of its own, window by window. Linear attention has no probabilities and no such tap
    embedding, logits, pooled   what the model gives anyway
    any.module.path       the output of that module

Maps are (B, C, h, w) whatever the block's own layout; tokens before the picture's (class, distillation, registers) are left out.
"""
from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edgekd.distillation.outputs import FEATURES
from edgekd.errors import EdgekdError, UsageError

CONTAINERS = ("blocks", "features", "stages", "layers", "layer")
MOST_PREFIX_TOKENS = 5
"""A class token and four registers; a longer sequence that is no square is not a picture."""
ATTENTION = re.compile(r"attention\d+")
NEAR = 3
Seen = dict[str, Tensor]


def outputs(model: Any, images: Tensor) -> Seen:
    """What a model gives for photos (B, 3, S, S), by name (`outputs.FEATURES`). One without `outputs` gives its embedding."""
    return model.outputs(images) if hasattr(model, "outputs") else {"embedding": model.embed(images)}


@torch.no_grad()
def discover(model: nn.Module, images: Tensor) -> dict[str, str]:
    """Tap name -> module path of a model, found by showing it `images` (B, 3, S, S). Only shapes are kept while it looks."""
    trunk, prefix = _trunk(model)
    blocks = {f"{prefix}{path}": module for path, module in _blocks(trunk)}
    attention = {p: m for p, m in model.named_modules() if p.startswith(prefix) and "attention" in type(m).__name__.lower() and _is_leaf_attention(m)}
    with ExitStack() as stack:
        seen: dict[str, torch.Size] = stack.enter_context(_recorded(blocks, {}, lambda x: x.shape))
        found: dict[str, torch.Size] = {}
        for path, module in attention.items():
            stack.enter_context(_probabilities(module, path, found, lambda x: x.shape))
        outputs(model, images)
    maps = [(path, seen[path]) for path in blocks if path in seen and len(seen[path]) == 4]
    names = {f"block{i}": path for i, (path, _) in enumerate(maps)}
    last = {shape[-1]: path for path, shape in maps}  # a block of a resolution that was left and came back replaces the one before
    names |= {f"stage{n}": last[side] for n, side in enumerate(sorted(last, reverse=True), 1)}
    return names | {f"attention{i}": path for i, path in enumerate(p for p in attention if p in found)}


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
    near = difflib.get_close_matches(name, [*sorted(FEATURES), *known, *sorted(paths)], n=NEAR, cutoff=0.5)
    some = ", ".join([*known][:12]) + (", ..." if len(known) > 12 else "")
    raise UsageError(f"the {whose} '{getattr(model, 'name', type(model).__name__)}' has no tap '{name}'"
                     + (f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""),
                     where=where, hint=f"its taps: {', '.join(filter(None, ['embedding', some]))}, or a module's path")


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
            stack.enter_context(recording({name: modules[path] for name, path in wanted.items() if not ATTENTION.fullmatch(name)}, seen))
            for name, path in wanted.items():
                if ATTENTION.fullmatch(name):
                    stack.enter_context(_probabilities(modules[path], name, seen, lambda x: x))
            yield seen

    def run(self, images: Tensor) -> Seen:
        """The model's own outputs and the taps for photos (B, 3, S, S)."""
        with self.open() as seen:
            given = outputs(self.model, images)
        missing = [n for n, p in self.paths.items() if p is not None and n not in seen]
        if missing:
            raise EdgekdError(f"the tap '{missing[0]}' gave nothing", where=getattr(self.model, "name", ""), hint="its module is not run, or computes no softmax")
        absent = [n for n, p in self.paths.items() if p is None and n not in given]
        if absent:
            raise UsageError(f"{getattr(self.model, 'name', type(self.model).__name__)} gives no {absent[0]}", where="outputs of a model",
                             hint=f"it gives {', '.join(given)}; take objectives that compare these, or another teacher")
        for name in filter(ATTENTION.fullmatch, seen):
            seen[name] = of_photos(seen[name], len(images))
        return given | seen


def recording(modules: Mapping[str, nn.Module], seen: Seen | None = None) -> AbstractContextManager[Seen]:
    """What each of `modules` (name -> module) gives within the context, as maps where it can be one."""
    return _recorded(modules, {} if seen is None else seen, lambda x: x)


@contextmanager
def _recorded(modules: Mapping[str, nn.Module], seen: dict[str, Any], keep: Callable[[Tensor], Any]) -> Iterator[dict[str, Any]]:
    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, _: Any, out: Any) -> None:
            first = tensor_of(out)
            if first is not None:
                seen[name] = keep(as_map(first, getattr(module, "layout", None)))
        return hook

    handles = [m.register_forward_hook(hook_of(name)) for name, m in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def tensor_of(out: Any) -> Tensor | None:
    """The first tensor of what a module gave: a tensor, a tuple, or a library's dictionary of outputs."""
    if isinstance(out, Mapping):
        out = tuple(out.values())
    while isinstance(out, (tuple, list)) and len(out):
        out = out[0]
    return out if isinstance(out, Tensor) else None


def of_photos(probabilities: Tensor, photos: int) -> Tensor:
    """Attention (photos x windows, heads, N, N) -> (photos, windows x heads, N, N), so that a row belongs to a photo."""
    return probabilities if len(probabilities) == photos else probabilities.unflatten(0, (photos, -1)).flatten(1, 2)


def as_map(x: Tensor, layout: str | None = None) -> Tensor:
    """A block's output as (B, C, h, w): from (B, C, h, w), (B, h, w, C) or tokens (B, N, C) of a square; others stay as they are."""
    if x.ndim == 4 and (layout == "nhwc" or (layout is None and x.shape[1] == x.shape[2] != x.shape[3])):
        return x.permute(0, 3, 1, 2)
    if x.ndim == 3:
        side = math.isqrt(x.shape[1])
        before = x.shape[1] - side * side
        if before <= MOST_PREFIX_TOKENS:
            return x[:, before:].transpose(1, 2).unflatten(2, (side, side))
    return x


class _Keep(TorchFunctionMode):
    """Keeps the probabilities of attention within a module; a fused kernel is computed in steps instead, with the same result.

    Args:
        found: what to do with the probabilities of each attention that is computed.
    """

    def __init__(self, found: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            out, probabilities = attend(*args, **kwargs)
            self.found(probabilities)
            return out
        if func is F.multi_head_attention_forward:  # torch's own module; its kernel is out of reach from here, its weights are not
            weighted: Any = func(*args, **kwargs | {"need_weights": True, "average_attn_weights": False})
            self.found(weighted[1])
            asked = weighted[1].mean(1) if kwargs.get("average_attn_weights", True) else weighted[1]
            return weighted[0], asked if kwargs.get("need_weights", True) else None
        out = func(*args, **kwargs)
        if func in (torch.softmax, F.softmax, Tensor.softmax) and isinstance(out, Tensor) and out.ndim == 4:
            self.found(out)
        return out


def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
           scale: float | None = None, enable_gqa: bool = False) -> tuple[Tensor, Tensor]:
    """`scaled_dot_product_attention` in steps: q, k, v (B, h, N, d) -> out (B, h, N, d), probabilities (B, h, N, N) before dropout."""
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    scores = (q @ k.transpose(-2, -1)) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    probabilities = scores.softmax(-1)
    return (F.dropout(probabilities, dropout_p) if dropout_p else probabilities).to(v.dtype) @ v, probabilities


@contextmanager
def _probabilities(module: nn.Module, name: str, seen: dict[str, Any], keep: Callable[[Tensor], Any]) -> Iterator[None]:
    """The attention probabilities of one module within the context."""
    mode = _Keep(lambda probabilities: seen.update({name: keep(probabilities)}))
    running: list[ExitStack] = []

    def before(*_: Any) -> None:
        running.append(ExitStack())
        running[-1].enter_context(mode)

    def after(*_: Any) -> None:
        running.pop().close()

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
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
