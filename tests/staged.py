"""A job staged by hand, as edgekd/profiling/boards.py stages one: what tests of transports and drivers start from."""
from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.artifact import Manifest
from edgekd.runtime import open_artifact
from edgekd.workspace import write_json

LENGTHS = {"P": 1, "N": 2}


def inputs_of(artifact: Path, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """component -> input -> seeded array; every free axis is 2 long, but for the prompts, of which there is one."""
    rng = np.random.default_rng(seed)

    def drawn(name: str, shape: list[Any]) -> np.ndarray:
        sizes = [n if isinstance(n, int) else LENGTHS.get(n, 1 if axis == 0 else 2) for axis, n in enumerate(shape)]
        value = np.ones(sizes) if name == "point_labels" else rng.uniform(0, 63, sizes) if name == "point_coords" else rng.standard_normal(sizes)
        return value.astype(np.float32)

    return {n: {i.name: drawn(i.name, i.shape) for i in p.inputs} for n, p in Manifest.load(artifact).components.items()}


def answers_of(artifact: Path, inputs: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """component -> output -> what the runtime here gives."""
    model = open_artifact(artifact, threads=1)
    return {name: model.session(name).run(values) for name, values in inputs.items()}


def stage(folder: Path, *artifacts: Path, **asked: Any) -> dict[str, Any]:
    """Write the job of some artifacts into a folder; `asked` are further keys of it."""
    models = []
    for index, artifact in enumerate(artifacts):
        manifest, own, parts = Manifest.load(artifact), folder / f"m{index}", {}
        own.mkdir(parents=True)
        given = inputs_of(artifact)
        for name, part in manifest.components.items():
            for file in part.files:
                shutil.copyfile(artifact / file, own / file)
            told = []
            for i in part.inputs:
                value = given[name][i.name]
                (own / f"{name}.{i.name}.bin").write_bytes(value.tobytes())
                told.append({"name": i.name, "dtype": str(value.dtype), "shape": list(value.shape), "file": f"m{index}/{name}.{i.name}.bin"})
            parts[name] = {"format": part.format or manifest.format, "scheme": part.scheme, "file": f"m{index}/{part.file}",
                           "files": [f"m{index}/{f}" for f in part.files], "inputs": told, "outputs": [o.name for o in part.outputs], "calls": 1}
        models.append({"id": f"{index}-{manifest.id}", "components": parts, "together": ["encoder", "decoder"]})
    job = {"schema": "edgekd.job/1", "models": models, "threads": 1, "warmup": 3, "repeats": 12, "max_seconds": 2.0, "mode": "count", "memory": False,
           "layers": False, "answers": True, "tools": {}, **asked}
    write_json(folder / "job.json", job)
    return job
