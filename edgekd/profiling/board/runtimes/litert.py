"""`.tflite` files in LiteRT's interpreter on the CPU, with XNNPACK for what that takes. LiteRT tells operators and types, and no times of its own here."""
from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from ..job import Trouble
from . import Array, Facts, Session, first_line, module, of_numpy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..job import Part

ARITHMETIC = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "CONV_3D", "FULLY_CONNECTED", "BATCH_MATMUL")
TYPES = {"float32": "f32", "float16": "f16", "int8": "i8", "uint8": "u8", "int16": "i16"}
PRECISIONS = {"f32": "fp32", "f16": "fp16", "i8": "int8", "u8": "int8", "i16": "int16"}
OUTSIDE = " (outside XNNPACK)"


def opened(part: Part, threads: int | None, tools: Mapping[str, str]) -> LitertSession:
    """See `edgekd.profiling.board.runtimes`."""
    return LitertSession(part, threads)


class LitertSession(Session):
    """One interpreter. Inputs are named by the file's signature, or by its tensors where it has none."""

    def __init__(self, part: Part, threads: int | None) -> None:
        litert = module("litert")
        kind = litert.Interpreter if hasattr(litert, "Interpreter") else litert.lite.Interpreter
        try:
            self._interpreter = kind(model_path=part.file, num_threads=threads)
            self._interpreter.allocate_tensors()
            inputs, self._outputs = self._described()
        except (ValueError, RuntimeError, OSError) as e:
            raise Trouble(f"LiteRT cannot open the file: {first_line(e)}", "the runtime on the board may be older than the file: update ai-edge-litert "
                          "there") from e
        given = part.arrays()
        lacking = [name for name in inputs if name not in given]
        if lacking:
            raise Trouble(f"the file takes {', '.join(lacking)}, of which the job has nothing", "export the model again")
        self._feed = [(int(about["index"]), given[name].astype(about["dtype"], copy=False)) for name, about in inputs.items()]

    def run(self) -> None:
        """One call, its inputs set anew as an application would."""
        for index, value in self._feed:
            self._interpreter.set_tensor(index, value)
        self._interpreter.invoke()

    def outputs(self) -> dict[str, Array]:
        """Of the last call."""
        return {name: of_numpy(self._interpreter.get_tensor(about["index"])) for name, about in self._outputs.items()}

    def facts(self) -> Facts:
        """Operators and types of the graph; what XNNPACK left to LiteRT's own kernels fell back."""
        found = self._operators()
        if found is None:
            return Facts()
        tags = [PRECISIONS.get(tag, tag) for kind, tag, _ in found if kind in ARITHMETIC]
        told = "+".join(sorted(set(tags), key=lambda p: (not p.startswith("int"), -tags.count(p)))) or "fp32"
        away = Counter(kind for kind, _, inside in found if not inside)
        some = any(inside for _, _, inside in found)
        return Facts(told, dict(Counter(f"{kind}{'' if inside else OUTSIDE}:{tag}" for kind, tag, inside in found).most_common()),
                     [f"{n} {kind} in LiteRT's own kernels instead of XNNPACK" for kind, n in away.most_common()] if some else [])

    def _described(self) -> tuple[dict[str, Any], dict[str, Any]]:
        signatures = self._interpreter.get_signature_list()
        if signatures:
            runner = self._interpreter.get_signature_runner(next(iter(signatures)))
            return runner.get_input_details(), runner.get_output_details()
        return ({str(d["name"]): d for d in self._interpreter.get_input_details()}, {str(d["name"]): d for d in self._interpreter.get_output_details()})

    def _operators(self) -> list[tuple[str, str, bool]] | None:
        """(operator, type, whether XNNPACK computes it); None where this version of the interpreter does not tell."""
        try:
            nodes = self._interpreter._get_ops_details()
            types = {int(t["index"]): t["dtype"].__name__.rstrip("_") for t in self._interpreter.get_tensor_details()}
        except Exception:  # not part of the documented interface
            return None
        plain = [n for n in nodes if n["op_name"] != "DELEGATE"]
        inside = _delegated(plain, [n for n in nodes if n["op_name"] == "DELEGATE"])

        def of(tensors: Any) -> list[str]:
            return [types[int(t)] for t in tensors if int(t) in types]

        return [(str(n["op_name"]), _tag(str(n["op_name"]), of(n["inputs"]), of(n["outputs"])), int(n["index"]) in inside) for n in plain]


def _tag(kind: str, inputs: list[str], outputs: list[str]) -> str:
    """The type that an operator computes in: that of its output; and of arithmetic on floats with 8-bit weights, theirs."""
    result = TYPES.get(outputs[0], outputs[0]) if outputs else "none"
    return "i8" if kind in ARITHMETIC and result == "f32" and "int8" in inputs else result


def _delegated(plain: list[dict[str, Any]], delegates: list[dict[str, Any]]) -> set[int]:
    """Operators that a delegate's node stands for: all on the way from its inputs to its outputs."""
    source = {int(t): node for node in plain for t in node["outputs"]}
    found: set[int] = set()
    for delegate in delegates:
        ends, waiting = {int(t) for t in delegate["inputs"]}, [int(t) for t in delegate["outputs"]]
        while waiting:
            tensor = waiting.pop()
            if tensor not in ends and tensor in source and int(source[tensor]["index"]) not in found:
                found.add(int(source[tensor]["index"]))
                waiting.extend(int(t) for t in source[tensor]["inputs"])
    return found
