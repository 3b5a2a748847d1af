"""A component as a torch program that every converter understands: what Core ML, LiteRT and ExecuTorch are made from.

Three things are mended, each met as a wrong answer or a refusal: parameters and buffers are made contiguous (ExecuTorch reads the others as if they
were, without a word), aliases are removed (Core ML knows no such operation), and what depends on no input is computed now (index tables of relative
positions, which runtimes would build again in every call, in operations that no accelerator has).
"""
from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edgekd.errors import EdgekdError, first_line
from edgekd.protocols import Component

if TYPE_CHECKING:
    import torch


def program(component: Component, *, longest: dict[str, int] | None = None) -> torch.export.ExportedProgram:
    """The component's torch.export program, mended.

    Args:
        longest: symbol -> the largest length it may have; the axes that `component.dynamic` names then vary up to that. Without it
            shapes are those of the example.

    Raises:
        EdgekdError: it cannot be captured, with torch's reason.
    """
    import torch

    if component.module.training:
        raise EdgekdError("the module is in training mode and would be exported with its training behaviour", where=component.name,
                          hint="call .eval() first")
    module = contiguous(component.module)
    example = tuple(t.contiguous() for t in component.example.values())
    try:
        with quiet(), torch.no_grad():
            shapes = _shapes(component, longest)
            # captured twice: folded first, then again for a program whose buffers are what was folded
            folded = torch.export.export(module, example, dynamic_shapes=shapes, strict=False).module(check_guards=False)
            fold_constants(folded)
            return without_aliases(torch.export.export(folded, example, dynamic_shapes=shapes, strict=False).run_decompositions({}))
    except Exception as e:  # torch raises dozens of kinds: all mean that it cannot be captured
        raise EdgekdError(f"the component cannot be captured by torch.export: {first_line(e)}", where=component.name,
                          hint="`TORCH_LOGS=export` shows where it stopped") from e


def contiguous(module: torch.nn.Module) -> torch.nn.Module:
    """A copy whose parameters and buffers lie in the order of their axes."""
    made = copy.deepcopy(module)
    for tensor in [*made.parameters(), *made.buffers()]:
        tensor.data = tensor.data.contiguous()
    return made


def fold_constants(graph: torch.fx.GraphModule) -> None:
    """Replace, in place, every value that depends on no input by a buffer that holds it."""
    import torch

    known: dict[torch.fx.Node, Any] = {}
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            value = _attribute(graph, str(node.target))
            if isinstance(value, torch.Tensor):
                known[node] = value.detach()
        elif node.op == "call_function" and all(n in known for n in node.all_input_nodes) and isinstance(node.meta.get("val"), (torch.Tensor, list, tuple)):
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                continue
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            value = node.target(*args, **kwargs)
            if not isinstance(value, torch.Tensor):  # a list, whose items are folded in turn
                known[node] = value
                continue
            value, name = value.contiguous(), f"folded_{node.name}"
            graph.register_buffer(name, value)
            with graph.graph.inserting_before(node):
                made = graph.graph.get_attr(name)
            made.meta = dict(node.meta)
            known[made] = value
            node.replace_all_uses_with(made)
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def without_aliases(found: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with every other name of a tensor replaced by the tensor, and without checks of what torch traced."""
    import torch

    names = (torch.ops.aten.alias.default, torch.ops.aten.detach.default, torch.ops.aten.lift_fresh_copy.default)
    graph = found.graph_module
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.graph.erase_node(node)
        elif node.op == "call_function" and node.target in names:
            found.graph_signature.replace_all_uses(node.name, node.args[0].name)  # an alias may be what is given out
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()
    return found


def _shapes(component: Component, longest: dict[str, int] | None) -> Any:
    import torch

    if not longest or not component.dynamic:
        return None
    dims = {symbol: torch.export.Dim.DYNAMIC(max=most) for symbol, most in longest.items()}
    return tuple({axis: dims[s] for axis, s in component.dynamic.get(name, {}).items()} or None for name in component.example)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters' advice to developers; failures still raise."""
    root, names = logging.getLogger(), ("torch", "torch.export", "torch.fx", "torchao")
    before = [(logging.getLogger(n), logging.getLogger(n).level) for n in names] + [(root, root.level)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger, _ in before:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in before:
                logger.setLevel(level)
