"""Reading a `.pte` file back: what it says of itself, which operators its delegates hold and in which precision, and what is left outside of them.

Nothing is asked of the program that wrote it: the plan, the graph that XNNPACK is given, Vulkan's, and the Core ML program are taken from the file.
"""
from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from edgekd.errors import EdgekdError, first_line

NAMES = "edgekd_names"
"""The constant method of a file that answers with the names of its inputs and outputs, as JSON: {"inputs": [...], "outputs": [...]}."""

ARITHMETIC = ("Conv2d", "DepthwiseConv2d", "ConvTranspose2d", "FullyConnected", "BatchMatrixMultiply", "ScaledDotProductAttention",
              "conv", "conv_transpose", "linear", "matmul")
"""The operators of XNNPACK and Core ML that carry the arithmetic."""

PRECISIONS = {"i8": "int8", "f16": "fp16", "f32": "fp32"}

INTEGER = ("qint8", "quint8", "qdint8", "qpint8", "qcint8")
FLOAT = {"FLOAT16": "f16", "FLOAT32": "f32", "Float16": "f16", "Float32": "f32", "fp16": "f16", "fp32": "f32"}


@dataclass(frozen=True)
class Contents:
    """A file's delegates and the operators in and outside of them.

    Args:
        delegates: backend -> how many pieces of the program it is given.
        inside: `operator:precision` -> count, of all delegates.
        outside: name of a portable kernel -> count, of what runs between them.
    """

    delegates: dict[str, int]
    inside: dict[str, int]
    outside: dict[str, int]

    @property
    def ops(self) -> dict[str, int]:
        """All operators, most frequent first; a portable kernel as `portable aten.add`."""
        return dict((Counter(self.inside) + Counter({f"portable {name}": n for name, n in self.outside.items()})).most_common())

    @property
    def precision(self) -> str:
        """Of the arithmetic inside the delegates: `fp32`, `fp16`, `int8`, or e.g. `int8+fp32` when both are left; of a program outside, `fp32`."""
        named = {op: op.rpartition(":") for op in self.inside}
        carrying = [op for op, (kind, _, _) in named.items() if kind in ARITHMETIC] or list(named)
        found = Counter({name: n for short, name in PRECISIONS.items() if (n := sum(self.inside[op] for op in carrying if named[op][2] == short))})
        return "+".join(sorted(found, key=lambda p: (p != "int8", -found[p]))) or "fp32"


def read(path: Path) -> Contents:
    """What is in a `.pte` file.

    Raises:
        EdgekdError: it is none, or not of a version that the installed ExecuTorch reads.
    """
    from executorch.exir._serialize._program import deserialize_pte_binary

    try:
        program = deserialize_pte_binary(Path(path).read_bytes()).program
        plan = next(p for p in program.execution_plan if p.name == "forward")
    except Exception as e:  # struct, index and flatbuffer errors: all mean that it is not such a file
        raise EdgekdError(f"ExecuTorch cannot read the file: {first_line(e)}", where=path, hint="export the model again") from e
    outside: Counter[str] = Counter()
    for call in (i.instr_args for chain in plan.chains for i in chain.instructions):
        if hasattr(call, "op_index"):
            name = plan.operators[call.op_index].name.replace("::", ".")
            if not name.startswith("executorch_prim."):  # sizes of axes and views: no kernel runs
                outside[name] += 1
    inside: Counter[str] = Counter()
    for delegate in plan.delegates:
        data = bytes(program.backend_delegate_data[delegate.processed.index].data)
        inside.update(READERS[delegate.id](data) if delegate.id in READERS else {})
    return Contents(dict(Counter(d.id for d in plan.delegates)), dict(inside.most_common()), dict(outside.most_common()))


def _xnnpack(data: bytes) -> Counter[str]:
    """`operator:precision` of one delegate, by what every operator is fed."""
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader

    header = XNNHeader.from_bytes(data[:XNNHeader.EXPECTED_LENGTH])
    graph = _as_json(data[header.flatbuffer_offset:][:header.flatbuffer_size], "executorch.backends.xnnpack.serialization", "schema.fbs")
    types = {}
    for value in (v["xvalue_union"] for v in graph["xvalues"]):
        tensor = value.get("tensor_value", value)
        types[tensor["id_out"]] = tensor["datatype"].removeprefix("xnn_datatype_")
    found: Counter[str] = Counter()
    for node in graph["xnodes"]:
        kind, union = node["xnode_union_type"].removeprefix("XNN"), node["xnode_union"]
        fed = types.get(next((union[k] for k in ("input_id", "input1_id", "query_id") if k in union), -1), "fp32")
        found[f"{kind}:{'i8' if fed in INTEGER else FLOAT.get(fed, fed)}"] += 1
    return found


def _vulkan(data: bytes) -> Counter[str]:
    """`operator:precision` of one delegate. Its tensors are of one float type, which the graph's values name."""
    from executorch.backends.vulkan.serialization.vulkan_graph_serialize import VulkanDelegateHeader

    header = VulkanDelegateHeader.from_bytes(data[:VulkanDelegateHeader.EXPECTED_LENGTH])
    graph = _as_json(data[header.flatbuffer_offset:][:header.flatbuffer_size], "executorch.backends.vulkan.serialization", "schema.fbs")
    types = Counter(v["value"]["datatype"] for v in graph["values"] if v.get("value_type") == "VkTensor")
    half = graph.get("force_fp16") or (types and types.most_common(1)[0][0] == "FLOAT16")
    return Counter(f"{call['name'].removeprefix('et_vk.').removesuffix('.default')}:{'f16' if half else 'f32'}" for call in graph["chain"])


def _coreml(data: bytes) -> Counter[str]:
    """`operator:precision` of the ML program of one delegate."""
    import coremltools
    from executorch.backends.apple.coreml.executorchcoreml import unflatten_directory_contents

    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        unflatten_directory_contents(data, folder)
        model = next(Path(folder).rglob("*.mlmodel"))
        spec = coremltools.utils.load_spec(str(model))
    found: Counter[str] = Counter()
    names = coremltools.proto.MIL_pb2.DataType
    for function in spec.mlProgram.functions.values():
        for block in function.block_specializations.values():
            for op in (o for o in block.operations if o.type != "const"):
                kind = names.Name(op.outputs[0].type.tensorType.dataType) if op.outputs else ""
                found[f"{op.type}:{FLOAT.get(kind, kind.lower())}"] += 1
    return found


READERS = {"XnnpackBackend": _xnnpack, "VulkanBackend": _vulkan, "CoreMLBackend": _coreml}
"""backend -> operators of one of its delegates"""


def _as_json(flatbuffer: bytes, package: str, schema: str) -> dict[str, Any]:
    """A flatbuffer by its schema, decoded by the `flatc` of ExecuTorch's wheel."""
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        fbs, binary = Path(folder) / schema, Path(folder) / "graph.bin"
        fbs.write_bytes(resources.files(package).joinpath(schema).read_bytes())
        binary.write_bytes(flatbuffer)
        _flatc_decompile(folder, str(fbs), str(binary), ["--raw-binary"])
        text = binary.with_suffix(".json").read_text(encoding="utf-8")
    return dict(json.loads(re.sub(r"(?<=: )[+-]?(inf|nan)\b", "null", text)))  # of a clamp without a limit
