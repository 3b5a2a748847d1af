"""A torch program as XNNPACK's partitioner takes it whole: what is written otherwise before ExecuTorch sees it.

    layer_norm      written out. The runtime's own kernel finds the variance as E[x²] - E[x]², which for few channels far from zero is negative:
                    NaN, without a word; and XNNPACK has none. The two means are products with a row of 1/C, which it has
    attention       written out, with the plain softmax. torch's guards rows that are masked altogether by six operations that XNNPACK lacks
    matmul, expand  batches are one axis; what has its shape already is not expanded
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def rewrite(graph: torch.fx.GraphModule) -> None:
    """Replace, in place, what the docstring above names; the graph must be captured again afterwards, which gives its new parts shapes."""
    import torch

    aten = torch.ops.aten
    # attention's own result lies otherwise in memory than what takes its place, which a view depends on and a reshape does not
    plain = {aten.view.default: aten.reshape.default, aten.scaled_dot_product_attention.default: attention, aten.matmul.default: matmul,
             aten.expand.default: expand}
    for node in list(graph.graph.nodes):
        if node.target is aten.layer_norm.default and len(node.args[1]) == 1:
            with graph.graph.inserting_before(node):
                node.args = (node.args[0], _row(graph, node.args[1][0]), *node.args[2:5])
            node.target = layer_norm
        elif node.op == "call_function" and node.target in plain:
            node.target = plain[node.target]
    graph.recompile()


def _row(graph: torch.fx.GraphModule, channels: int) -> torch.fx.Node:
    """(1, C) of 1/C, one buffer for every C."""
    import torch

    name = f"mean_of_{channels}"
    if not hasattr(graph, name):
        graph.register_buffer(name, torch.full((1, channels), 1.0 / channels))
    return graph.graph.get_attr(name)


def layer_norm(x: torch.Tensor, row: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5) -> torch.Tensor:
    """Layer norm over the last axis of (..., C); row (1, C) of 1/C."""
    import torch

    away = x - torch.nn.functional.linear(x, row)
    y = away * torch.rsqrt(torch.nn.functional.linear(away * away, row) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, dropout: float = 0.0, causal: bool = False, *,
              scale: float | None = None, enable_gqa: bool = False) -> torch.Tensor:
    """(..., N, D), (..., M, D), (..., M, E), mask (..., N, M) to be added -> (..., N, E). A row that is masked altogether by -inf gives NaN."""
    import torch

    if causal or enable_gqa or dropout or (mask is not None and mask.dtype == torch.bool):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=enable_gqa)
    scores = matmul(q * (scale if scale is not None else 1.0 / math.sqrt(q.shape[-1])), k.transpose(-1, -2))
    return matmul(torch.softmax(scores if mask is None else scores + mask, dim=-1), v)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """torch.matmul, over one batch axis where both have the same batches."""
    import torch

    if a.ndim != b.ndim or a.ndim < 3 or any(not _same(m, n) for m, n in zip(a.shape[:-2], b.shape[:-2], strict=True)):
        return torch.matmul(a, b)
    batch = math.prod(a.shape[:-2])
    out = torch.bmm(a.reshape(batch, *a.shape[-2:]), b.reshape(batch, *b.shape[-2:]))
    return out.reshape(*a.shape[:-1], b.shape[-1])


def expand(x: torch.Tensor, size: Sequence[int], *, implicit: bool = False) -> torch.Tensor:
    """x.expand(size), or x where it has that shape."""
    if len(size) == x.ndim and all(_same(n, -1) or _same(n, m) for n, m in zip(size, x.shape, strict=True)):
        return x
    return x.expand(list(size))


def _same(a: Any, b: Any) -> bool:
    """Whether two lengths, perhaps symbols, are known to be the same."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b))
