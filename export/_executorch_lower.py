"""Lowering a torch program to a `.pte` file: the part of ExecuTorch's exporters that runs in a process of its own (`_child.call`).

Lowering prints, sets up logging for the whole process, and takes a minute or more.
"""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgekd.export._executorch_file import NAMES


def lower(program: str, output: str, backend: str, names: dict[str, list[str]], options: dict[str, Any]) -> dict[str, Any]:
    """Write `output` from a saved torch program.

    Args:
        backend: one of `PARTITIONERS`.
        names: of inputs and outputs, in order; kept in the file.
        options: of the backend.
    """
    import torch
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e import quantize_pt2e  # noqa: F401  registers the operators of quantized programs

    loaded = torch.export.load(program)
    for node in loaded.graph.nodes:  # where a node came from, copied whole by every pass over the graph: a quarter of the time
        for key in ("from_node", "nn_module_stack", "stack_trace"):
            node.meta.pop(key, None)
    edge = to_edge_transform_and_lower(loaded, partitioner=PARTITIONERS[backend](options), constant_methods={NAMES: json.dumps(names)})
    made = edge.to_executorch()
    with Path(output).open("wb") as file:
        made.write_to_file(file)
    return {"bytes": Path(output).stat().st_size}


def _xnnpack(options: dict[str, Any]) -> list[Any]:
    """`dynamic`: linear layers whose activations are quantized at run time are pieces of their own, or the partitioner makes pieces that wait for
    each other."""
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    alone = [XnnpackPartitioner(config_precisions=ConfigPrecisionType.DYNAMIC_QUANT, per_op_mode=True)] if options["dynamic"] else []
    return [*alone, XnnpackPartitioner()]


def _coreml(options: dict[str, Any]) -> list[Any]:
    import coremltools as ct
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    precision = {"fp32": ct.precision.FLOAT32, "fp16": ct.precision.FLOAT16}[options["precision"]]
    specs = CoreMLBackend.generate_compile_specs(compute_precision=precision, minimum_deployment_target=getattr(ct.target, options["target"]))
    return [CoreMLPartitioner(compile_specs=specs)]


def _vulkan(options: dict[str, Any]) -> list[Any]:
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    return [VulkanPartitioner(compile_options=options)]


PARTITIONERS: dict[str, Callable[[dict[str, Any]], list[Any]]] = {"xnnpack": _xnnpack, "coreml": _coreml, "vulkan": _vulkan}
"""backend -> what makes its partitioners, which are asked in turn"""
