"""What lies beside a Core ML package for whoever has a Mac: inputs with expected outputs, the script that compares, and how to use both from Swift."""
from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.export import _coreml_selfcheck, _mil
from edgekd.export._mil import Interpreter, Program

from edgekd.protocols import Component

if TYPE_CHECKING:
    import numpy as np

PLACES = 1024
"""of an output that are compared: enough to tell, too few to weigh"""
COARSE = 8
"""cells along a side of the pattern that stands for a photo or a map"""
LIMITS = {"fp32": 1e-3, "fp16": 0.02}
INTEGER_LIMIT = 0.05
"""relative L2 between Core ML and the interpreter: what the order of sums in fp16, and a rounding of integers, may do"""
GUIDE = "RUN_ON_A_MAC.md"
TEXT = """# On a Mac

Needs macOS 14 (or iOS 17 on the device). The packages were checked where they were made, and did not run there.

    pip install coremltools numpy
    python3 selfcheck.py                                   # compiles, runs, compares with expected outputs, tells the unit of every operation
    xcrun coremlcompiler compile encoder.mlpackage .       # what Xcode does when the package is added to an app

In Swift (no preprocessing: `manifest.json` says what the encoder is given; point labels are 1, 0, box corners 2 and 3):

```swift
import CoreML

let compiled = try await MLModel.compileModel(at: URL(fileURLWithPath: "encoder.mlpackage"))
let encoder = try MLModel(contentsOf: compiled)
let images = try MLMultiArray(shape: [1, 3, SIZE, SIZE], dataType: .float32)   // fill it: RGB planes, normalised
let found = try encoder.prediction(from: MLDictionaryFeatureProvider(dictionary: ["images": images]))
let embedding = found.featureValue(for: "image_embeddings")!.multiArrayValue!
```

The decoder takes up to {prompts} prompts of up to {points} points in a call.
"""


def write(component: Component, program: Program, folder: Path, scheme: str) -> list[Path]:
    """Write the three files into `folder`; the files."""
    import numpy as np

    expected = folder / f"{component.name}.selfcheck.npz"
    np.savez_compressed(expected, **_expected(component, program, scheme))  # type: ignore[arg-type]
    script, guide = folder / "selfcheck.py", folder / GUIDE
    shutil.copyfile(_coreml_selfcheck.__file__, script)
    from edgekd.export._coreml import MOST

    guide.write_text(TEXT.format(**MOST), encoding="utf-8")
    return [expected, script, guide]


def _expected(component: Component, program: Program, scheme: str) -> dict[str, np.ndarray]:
    """Inputs, places, and what the model and, where it is known, the file give there."""
    import numpy as np
    import torch

    rng = np.random.default_rng(0)
    inputs = {name: _pattern(t.detach().cpu().numpy(), rng) for name, t in component.example.items()}
    with torch.no_grad():
        given = component.module(*(torch.from_numpy(inputs[name]) for name in component.example))
    model = dict(zip(component.outputs, given if isinstance(given, tuple) else (given,), strict=True))
    file = Interpreter(program).run(inputs) if not _mil.unknown(program) else {}
    held = {f"in/{name}": value for name, value in inputs.items()} | {"limit": np.float64(LIMITS.get(scheme, INTEGER_LIMIT))}
    for name, tensor in model.items():
        own = tensor.detach().float().numpy().reshape(-1)
        places = np.sort(rng.choice(own.size, min(PLACES, own.size), replace=False)).astype(np.int32)
        held |= {f"at/{name}": places, f"torch/{name}": own[places]}
        if name in file:
            held[f"file/{name}"] = file[name].reshape(-1)[places]
    return held


def _pattern(example: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The example; of a photo or map a coarse pattern of the same shape, which packs small."""
    import numpy as np

    if example.ndim != 4 or min(example.shape[2:]) < 2 * COARSE:
        return example
    height, width = example.shape[2:]
    coarse = rng.choice(np.float32([-1.5, -0.5, 0.5, 1.5]), (*example.shape[:2], COARSE, COARSE))
    return np.ascontiguousarray(coarse[:, :, np.arange(height) * COARSE // height][:, :, :, np.arange(width) * COARSE // width])
