"""A Core ML package read back from disk and held against the component it was made from: what can be said of it where Core ML is not."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.export import _coreml
from edgekd.export._mil import Program, Value, coremltools, unknown

from edgekd.errors import EdgekdError, first_line
from edgekd.protocols import Check, Component, package_version

if TYPE_CHECKING:
    import torch

VERSION = 8
"""of the specification: iOS 17, macOS 14"""
LOST = {"fp32": 1e-6, "fp16": 1e-3, "w8_weight_only": 0.05, "w8a8_static": 0.05, "w6_weight_only": 0.15, "w4_weight_only": 0.5}
"""Largest relative error (L2) of a weight that still is the model's: twice to five times what these schemes do to bell-shaped weights"""


def check(component: Component, path: Path, scheme: str) -> Check:
    """See `edgekd.protocols.Exporter.check`. coremltools decompresses the weights, independently of our interpreter."""
    program = Program.read(path)
    _same_ports(component, program)
    if program.version != VERSION:
        raise EdgekdError(f"the package is of specification {program.version}, not {VERSION}", where=path, hint="export it with coremltools 9")
    weights = _weights(component, path)
    most = LOST["w4_weight_only" if program.metadata.get(_coreml.GRANULARITY) == "tensor" and scheme.startswith("w8") else scheme]  # one step for all is coarse
    if weights and max(weights.values()) > most:
        worst = max(weights, key=lambda n: weights[n])
        raise EdgekdError(f"the weight {worst} in the package is not the model's: it differs by {weights[worst]:.2g} of its size", where=path,
                          hint="use another scheme; the file was not kept")
    compressed = Counter(op.kind for op in program.ops if op.kind.startswith("constexpr_"))
    if scheme not in ("fp16", "fp32") and not compressed:
        raise EdgekdError(f"{scheme} compresses nothing: no weight has {_coreml.LEAST_WEIGHTS} numbers", where=component.name, hint="use fp16")
    strange = unknown(program)
    details: dict[str, Any] = {
        "specification": program.version, "opset": program.opset, "bytes": {p.name: p.stat().st_size for p in sorted(path.rglob("*")) if p.is_file()},
        "ranges": {name: list(map(list, axes)) for name, axes in program.ranges.items() if any(a != b for a, b in axes)}, "compressed": dict(compressed),
        "weights": {"types": _types(program), "compared": len(weights), "largest_relative_error": max(weights.values(), default=0.0)}}
    if strange:
        details["not_interpreted"] = strange
    how = f"read back by coremltools {package_version('coremltools')}: inputs, outputs and operations; {len(weights)} weights decompressed and compared with the model's"
    return Check("checked", how, program.arithmetic_precision(), program.ops_by_precision(), details)


def _same_ports(component: Component, program: Program) -> None:
    """Raises EdgekdError when inputs or outputs are not the component's by name, type and shape."""
    if set(program.inputs) != set(component.example):
        raise EdgekdError(f"the package takes {', '.join(program.inputs)} and not {', '.join(component.example)}", where=program.path)
    if program.outputs != component.outputs:
        raise EdgekdError(f"the package gives {', '.join(program.outputs)} and not {', '.join(component.outputs)}", where=program.path)
    for name, tensor in component.example.items():
        free = component.dynamic.get(name, {})
        wanted = Value(name, "fp32" if tensor.is_floating_point() else "i32", tuple(None if axis in free else n for axis, n in enumerate(tensor.shape)))
        if program.inputs[name] != wanted:
            raise EdgekdError(f"the package's input is {program.inputs[name]} and not {wanted}", where=program.path)
    for name, tensor in _coreml.results(component).items():
        found = program.types[name]
        if found.dtype != ("fp32" if tensor.is_floating_point() else "i32") or len(found.shape) != tensor.ndim:
            raise EdgekdError(f"the package gives {found}, and the model {tuple(tensor.shape)} of {tensor.dtype}", where=program.path)


def _types(program: Program) -> dict[str, int]:
    """Type of the numbers in the weight file -> how many of them there are; packed indices of palettes count bytes."""
    found: Counter[str] = Counter()
    for op in program.ops:
        for key in ("val", "quantized_data", "indices", "nonzero_data"):
            value = op.attributes.get(key)
            if getattr(value, "size", 0) > 1:
                found[str(value.dtype)] += value.size
    return dict(found)


def _weights(component: Component, path: Path) -> dict[str, float]:
    """Parameter, as the state dict names it -> relative error (L2) of what the package holds of it. Those that the conversion joined with others,
    and so renamed, are left out."""
    import torch

    found = dict(_decompressed(path))
    errors = {}
    for name, parameter in component.module.named_parameters():
        held = found.get(f"p_{name.replace('.', '_')}")
        own = parameter.detach().float()
        if held is None or held.numel() != own.numel() or not own.any():
            continue
        errors[name] = float(torch.linalg.vector_norm(held.reshape(own.shape) - own) / torch.linalg.vector_norm(own))
    return errors


def _decompressed(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the torch program, value) of every weight."""
    import tempfile

    from edgekd.export._mil import as_tensor

    ct = coremltools()
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        whole = Path(folder) / "whole.mlpackage"
        try:
            with _coreml._silent():
                model = ct.optimize.coreml.decompress_weights(ct.models.MLModel(str(path), skip_model_load=True))
                model.save(str(whole))
        except Exception as e:  # coremltools raises its own kinds
            raise EdgekdError(f"coremltools cannot decompress the weights: {first_line(e)}", where=path, hint="export the model again") from e
        for op in Program.read(whole).ops:
            if op.kind == "const" and op.outputs[0].dtype in ("fp16", "fp32"):
                name = op.outputs[0].name
                for ending in ("_palettized", "_quantized", "_to_fp16"):
                    name = name.removesuffix(ending)
                yield name, as_tensor(op.attributes["val"])
