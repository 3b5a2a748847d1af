"""The child's side of `export/ncnn.py`: pnnx turns a TorchScript file into ncnn's two, and ncnn tries them, both with exit codes for words."""
from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

SPARE = 16_000_000
"""Bytes free on a disk that was not full when pnnx failed."""


def convert(script: str, shapes: list[list[int]], half: bool) -> dict[str, Any]:
    """Run pnnx on a TorchScript file: `X.pt` becomes `X.ncnn.param` and `X.ncnn.bin` beside it, among others.

    Args:
        shapes: of the inputs, all float32, batch axis included.
        half: store weights in 16 bits.

    Returns:
        {"refused": why} when pnnx gives up on the network, else {}. It writes operations that ncnn lacks under torch's names, with exit code 0.

    Raises:
        RuntimeError: no disk space.
    """
    file = Path(script)
    given = ",".join("[" + ",".join(map(str, shape)) + "]f32" for shape in shapes)
    done = subprocess.run([pnnx(), file.name, f"inputshape={given}", f"fp16={int(half)}"], cwd=file.parent, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = done.stdout.decode("utf-8", errors="replace")
    if done.returncode == 0 and all(file.with_name(f"{file.stem}.ncnn.{kind}").is_file() for kind in ("param", "bin")):
        return {"limits": sorted(set(re.findall(r"^\w+ has unsupported .*$", log, re.MULTILINE)))}
    if shutil.disk_usage(file.parent).free < SPARE:
        raise RuntimeError(f"no space left in {file.parent}")
    said = [line.strip() for line in log.splitlines() if line.strip()]
    return {"refused": f"pnnx gives up on it (exit code {done.returncode}): {said[-1][:200] if said else 'it said nothing'}"}


def pnnx() -> str:
    """The compiled tool in the pnnx package. Importing the package would import torch, and its command is a shell around this."""
    spec = importlib.util.find_spec("pnnx")
    folder = Path((spec.submodule_search_locations or [""])[0]) if spec else Path()
    return str(folder / ("pnnx.exe" if os.name == "nt" else "pnnx"))


def attempt(param: str, inputs: dict[str, list[int]], outputs: dict[str, list[int]]) -> dict[str, Any]:
    """Load the files and run them once on zeros.

    Args:
        inputs: name -> shape with the batch axis, which ncnn does not have.
        outputs: name -> shape that torch gives.

    Returns:
        {"refused": why} when ncnn cannot, else {"other": names of outputs with torch's numbers of values in other axes}.
    """
    import ncnn
    import numpy as np

    unknown = Counter(kind for kind in kinds(Path(param)) if ncnn.layer_to_index(kind) < 0)
    if unknown:
        most = ", ".join(f"{kind} ({count})" for kind, count in unknown.most_common(4))
        return {"refused": f"ncnn has no layers for {len(unknown)} kinds of its operations, such as {most}"}
    net = ncnn.Net()
    net.opt.num_threads = 1
    for step, load, file in (("load_param", net.load_param, param), ("load_model", net.load_model, param.removesuffix(".param") + ".bin")):
        if code := load(file):
            return {"refused": f"ncnn does not load it: {step} gives {code}"}
    extractor = net.create_extractor()
    taken = set(net.input_names())
    held = {name: np.zeros(shape[1:] or (1,), np.float32) for name, shape in inputs.items() if name in taken}
    for name, value in held.items():
        extractor.input(name, ncnn.Mat(value).clone())
    other = []
    for name, shape in outputs.items():
        code, found = extractor.extract(name)
        if code:
            return {"refused": f"ncnn does not compute its {name}: extract gives {code}"}
        given = [1, *np.array(found).shape]
        if math.prod(given) != math.prod(shape):
            return {"refused": f"its {name} comes out of ncnn in the shape {given}, not {shape}"}
        other += [name] if given != shape else []
    return {"other": other}


def kinds(param: Path) -> list[str]:
    """The kind of every layer of a .param file: the first word of each line from the third on."""
    return [line.split()[0] for line in param.read_text(encoding="utf-8").splitlines()[2:] if line.strip()]
