"""Int8 by NVIDIA's Model Optimizer in place of onnxruntime's quantizer: `w8a8_static[modelopt]` for TensorRT. It quantizes what TensorRT fuses, residual sums
and inputs of pooling included, and leaves alone what would break a fusion. It lives in an environment of its own (`_envs.py`): it brings CUDA libraries and
an onnxruntime of another version, neither of which it needs a GPU for.
"""
from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.export import _child, _envs
from edgekd.export._half import layers_of
from edgekd.export._ranges import Checked

from edgekd.errors import EdgekdError, UsageError
from edgekd.tuning import Tuning, stays_float

if TYPE_CHECKING:
    import numpy as np

NAME = "modelopt"
CHILD = Path(__file__).with_name("_modelopt_child.py")
METHODS = {"minmax": "max", "entropy": "entropy"}
MINUTES = 60.0


def quantize(source: Path, target: Path, calibration: Iterable[Mapping[str, np.ndarray]], tuning: Tuning, *, where: str) -> Path:
    """Write the int8 form of a float graph to `target`, in fp32 between the integers; its path.

    Raises:
        UsageError: options that Model Optimizer does not have, or calibration samples from which no ranges can be found.
        EdgekdError: its environment is not installed, or it fails, with its own last words.
    """
    import numpy as np
    import onnx

    if tuning.method not in METHODS:
        raise UsageError(f"Model Optimizer has no ranges by {tuning.method}", where=where, hint=f"one of {', '.join(METHODS)}")
    if other := sorted(set(tuning.changed()) - {"keep", "method", "quantizer"}):
        raise UsageError(f"Model Optimizer is not told {other[0]}", where=where, hint="leave it out, or leave out modelopt")
    python = _envs.python_of(NAME)
    if python is None:
        raise EdgekdError("NVIDIA's Model Optimizer is not installed: it needs an environment of its own", where=where, hint=_envs.command(NAME))
    nodes = onnx.load(source, load_external_data=False).graph.node
    floats = [f"^{re.escape(n.name)}$" for n in nodes if any(stays_float(layer, tuning) for layer in layers_of(n))]
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        for count, sample in enumerate(Checked(calibration, where)):
            np.savez(Path(folder) / f"{count:06d}.npz", **sample)
        request = {"graph": str(source), "output": str(target), "samples": folder, "excluded": floats, "method": METHODS[tuning.method]}
        _child.call(f"{CHILD}:quantize", request, minutes=MINUTES, what="NVIDIA's Model Optimizer", python=python)
    return target
