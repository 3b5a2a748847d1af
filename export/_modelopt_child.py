"""What runs in the environment of NVIDIA's Model Optimizer: puts the quantizing nodes where TensorRT fuses over them. Needs nothing of edgekd.

Its quantizer asks for batches of one shape; prompts come in several, so samples go in through a reader of its own, one at a time.
"""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Reader:
    """Samples, a .npz file each, as onnxruntime's calibration reads them."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.rewind()

    def get_next(self) -> dict[str, Any] | None:
        """The next sample, input -> array; None behind the last."""
        return next(self._rest, None)

    def get_first(self) -> dict[str, Any]:
        """The first sample."""
        return _sample(self.files[0])

    def rewind(self) -> None:
        """Begin again."""
        self._rest: Iterator[dict[str, Any]] = (_sample(f) for f in self.files)


def _sample(file: Path) -> dict[str, Any]:
    import numpy as np

    with np.load(file) as found:
        return dict(found)


def quantize(graph: str, output: str, samples: str, excluded: list[str], method: str) -> dict[str, Any]:
    """Write `graph` with int8 QuantizeLinear and DequantizeLinear to `output`, in fp32 between them.

    Args:
        samples: a folder of .npz files, in the order of their names.
        excluded: patterns (`re.match`) of names of nodes that stay in float.
        method: `max` or `entropy`.

    Returns:
        {"version": of the library}
    """
    from importlib import metadata

    from modelopt.onnx.quantization import quantize as quantized

    quantized(graph, quantize_mode="int8", calibration_method=method, calibration_data_reader=Reader(sorted(Path(samples).glob("*.npz"))),
              calibration_eps=["cpu"], nodes_to_exclude=excluded, high_precision_dtype="fp32", dq_only=True, output_path=output)
    return {"version": metadata.version("nvidia-modelopt")}
