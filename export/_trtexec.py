"""TensorRT's command line tool: what is asked of it on the device, and what it writes there.

`build.json` beside a file holds everything that building an engine takes; the script, the command lines and `_tensorrt_build.py` all read it. Options
and formats are those of trtexec in TensorRT 10.3 (JetPack 6) to 11.1, as its published source has them; from 11 on strong typing, CUDA graphs and
leaving out transfers are the default and their options do nothing. TF32 is off: what stays in fp32 does so for its precision, and TF32 has fp16's.
"""
from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.errors import EdgekdError

SCHEMA = "edgekd.tensorrt-build/1"
LENGTHS = {"prompts": (1, 4, 64), "points": (1, 3, 16), "num_points": (1, 3, 16)}
"""symbol of an axis -> its least, its usual and its greatest length in an engine; kernels are chosen for the usual one"""

WORKSPACE_MIB = 2048
"""scratch memory a kernel may ask for; without a limit TensorRT takes what the device has, which on a Jetson is also the CPU's"""

WARM_UP_MS, SECONDS = 500, 10
ON_JETSON = "/usr/src/tensorrt/bin/trtexec"
"""where JetPack puts it, which is on no PATH"""

TYPES = (("BF16", "bf16"), ("BFLOAT16", "bf16"), ("FP8", "fp8"), ("FP16", "fp16"), ("HALF", "fp16"), ("INT8", "i8"), ("FP32", "fp32"), ("FLOAT", "fp32"))
"""words in an engine's "Format/Datatype" -> ours; the first that is found counts"""

ARITHMETIC = re.compile(r"conv|gemm|matrix|matmul|fully|attention|mha|einsum", re.IGNORECASE)
MOVES = re.compile(r"reformat|noop|constant|shuffle|slice|shape|gather|concat|cast|copy|quantize|signal|wait", re.IGNORECASE)


def build_spec(inputs: Mapping[str, Sequence[int | str]], file: str, *, scheme: str, usual: Mapping[str, int] | None = None) -> dict[str, Any]:
    """What `build.json` says.

    Args:
        inputs: what the file takes -> its shape, with a symbol for every axis of any length.
        file: name of the ONNX file.
        usual: symbol -> a length to expect, for symbols that are not in `LENGTHS`.
    """
    stem, shapes = Path(file).stem, {}
    for name, shape in inputs.items():
        if any(isinstance(n, str) for n in shape):
            ranges = [lengths(n, (usual or {}).get(n, 1)) if isinstance(n, str) else (n, n, n) for n in shape]
            shapes[name] = {kind: [r[i] for r in ranges] for i, kind in enumerate(("min", "opt", "max"))}
    return {"schema": SCHEMA, "onnx": file, "engine": f"{stem}.engine", "layers": f"{stem}.layers.json", "timing_cache": "timing.cache", "scheme": scheme,
            "strongly_typed": True, "tf32": False, "workspace_mib": WORKSPACE_MIB, "shapes": shapes,
            "axes": {name: {str(axis): n for axis, n in enumerate(inputs[name]) if isinstance(n, str)} for name in shapes},
            "needs": "TensorRT 10 or newer" + (" and a GPU with fp8 (compute capability 8.9 and newer)" if scheme == "fp8_static" else "")}


def lengths(symbol: str, example: int) -> tuple[int, int, int]:
    """Least, usual and greatest length of an axis."""
    return LENGTHS.get(symbol, (1, max(1, example), 8 * max(1, example)))


def build_command(spec: Mapping[str, Any], *, trtexec: str = "trtexec", folder: str = "") -> list[str]:
    """The command line that builds an engine, and times nothing. `folder` is where the files are, "" for the working directory."""
    at = _at(folder)
    return [trtexec, f"--onnx={at(spec['onnx'])}", f"--saveEngine={at(spec['engine'])}", "--stronglyTyped", "--noTF32", *_profile_options(spec["shapes"]),
            f"--memPoolSize=workspace:{spec['workspace_mib']}", f"--timingCacheFile={at(spec['timing_cache'])}", "--profilingVerbosity=detailed",
            f"--exportLayerInfo={at(spec['layers'])}", "--skipInference"]


def time_command(spec: Mapping[str, Any], *, lengths: Mapping[str, int] | None = None, trtexec: str = "trtexec", folder: str = "",
                 layers: bool = False) -> list[str]:
    """The command line that times a built engine with random inputs, without transfers.

    Args:
        lengths: symbol of an axis -> its length; the usual ones of the profile when left out.
        layers: time every layer, in a run of its own since that slows the whole, instead of every call.
    """
    at, stem = _at(folder), Path(spec["engine"]).stem
    shapes = {name: list(shape["opt"]) for name, shape in spec["shapes"].items()}
    for name, shape in shapes.items():
        for axis, symbol in spec["axes"].get(name, {}).items():
            shape[int(axis)] = (lengths or {}).get(symbol, shape[int(axis)])
    told = [f"--exportProfile={at(f'{stem}.profile.json')}", "--separateProfileRun"] if layers else [f"--exportTimes={at(f'{stem}.times.json')}"]
    return [trtexec, f"--loadEngine={at(spec['engine'])}", *([f"--shapes={_shapes(shapes)}"] if shapes else []), f"--warmUp={WARM_UP_MS}",
            f"--duration={SECONDS}", "--noDataTransfers", "--useSpinWait", *([] if layers else ["--useCudaGraph"]), *told]


def run_on_device(spec: Mapping[str, Any], *, lengths: Mapping[str, int] | None = None, trtexec: str = "trtexec", folder: str = "") -> dict[str, list[str]]:
    """What is run on the device for one file, in this order: `build`, `time` and `layers`."""
    return {"build": build_command(spec, trtexec=trtexec, folder=folder), "time": time_command(spec, lengths=lengths, trtexec=trtexec, folder=folder),
            "layers": time_command(spec, lengths=lengths, trtexec=trtexec, folder=folder, layers=True)}


def script(spec: Mapping[str, Any]) -> str:
    """`build_engine.sh`: the same commands for somebody at the device."""
    commands = run_on_device({**spec, "engine": f"{spec['engine']}.part"}, trtexec="$TRTEXEC")["build"], *(
        run_on_device(spec, trtexec="$TRTEXEC")[step] for step in ("time", "layers"))
    build, timing, layers = (" \\\n  ".join(['"$TRTEXEC"', *map(shlex.quote, command[1:])]) for command in commands)
    name, stem, file = Path(spec["onnx"]).stem, Path(spec["engine"]).stem, shlex.quote(spec["engine"])
    return f"""#!/bin/sh
# Builds {spec["engine"]} from {spec["onnx"]} on the device that will run it: an engine fits one kind of GPU and one version of TensorRT.
# Needs {spec["needs"]}. {spec["layers"]} then says which precision every layer got.
#
#   sh {name}.build_engine.sh         build
#   sh {name}.build_engine.sh time    build, then time calls ({stem}.times.json) and layers ({stem}.profile.json)
set -eu
cd "$(dirname "$0")"
TRTEXEC=${{TRTEXEC:-$(command -v trtexec || echo {ON_JETSON})}}

{build}
mv {shlex.quote(spec["engine"] + ".part")} {file}
[ "${{1:-}}" = time ] || exit 0

{timing}

{layers}
"""


@dataclass(frozen=True)
class Times:
    """Milliseconds of every call that trtexec timed, after its warm-up. `latency` is transfers (none when they were left out) and `compute`."""

    latency: list[float]
    compute: list[float]
    enqueue: list[float]
    """of the CPU; where this is longer than `compute`, the GPU waited"""


@dataclass(frozen=True)
class Layer:
    """A layer of a built engine. `kind` is its own word for what it is; `precision` the type of what it reads."""

    name: str
    kind: str
    precision: str
    tactic: str | None = None


def read_times(file: Path) -> Times:
    """What `--exportTimes` wrote. Raises EdgekdError when it is no such file, or empty."""
    calls = read_json(file, list)
    try:
        enqueue = [float(c["endEnqMs"]) - float(c["startEnqMs"]) for c in calls]
        return Times([float(c["latencyMs"]) for c in calls], [float(c["computeMs"]) for c in calls], enqueue)
    except (KeyError, TypeError, ValueError) as e:
        raise EdgekdError(f"these are not the times of trtexec: {e!r}", where=file) from e


def read_profile(file: Path) -> dict[str, float]:
    """What `--exportProfile` wrote: layer -> its mean time in milliseconds, in the engine's order."""
    try:
        return {row["name"]: float(row["averageMs"]) for row in read_json(file, list) if "name" in row}
    except (KeyError, TypeError, ValueError) as e:
        raise EdgekdError(f"this is not the profile of trtexec: {e!r}", where=file) from e


def profile_rows(file: Path) -> list[tuple[str, float]]:
    """The same with the median where there is one, which TensorRT 8.5 and newer write."""
    means = read_profile(file)
    return [(row["name"], float(row.get("medianMs", means[row["name"]]))) for row in read_json(file, list) if "name" in row]


def read_layers(file: Path) -> list[Layer]:
    """What `--exportLayerInfo`, or the engine's inspector, wrote."""
    return layers_of(read_json(file, dict), where=file)


def layers_of(document: Mapping[str, Any], *, where: object = None) -> list[Layer]:
    """The layers in an engine's JSON description.

    Raises:
        EdgekdError: it has none, or only their names.
    """
    rows = document.get("Layers") or []
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise EdgekdError("the engine does not say what its layers compute in", where=where, hint="build it with --profilingVerbosity=detailed")
    return [Layer(str(row.get("Name", "")), str(row.get("ParameterType") or row.get("LayerType") or "?"), _type(row), row.get("TacticName")) for row in rows]


def precision(layers: Iterable[Layer]) -> str:
    """Of the layers that carry the arithmetic: `fp16`, `int8+fp16`, ... Of an engine whose layers are all fused under other names, of all that compute."""
    found = list(layers)
    carrying = [one for one in found if ARITHMETIC.search(one.kind) or ARITHMETIC.search(one.tactic or "")]
    counted = Counter(one.precision for one in carrying or [one for one in found if not MOVES.search(one.kind)] if one.precision != "?")
    return joined(counted)


def operators(layers: Iterable[Layer]) -> dict[str, int]:
    """`kind:precision` -> how many layers, most frequent first."""
    return dict(Counter(f"{one.kind}:{one.precision}" for one in layers).most_common())


def joined(counted: Mapping[str, int]) -> str:
    """Types with their counts -> `int8+fp16`: eight bits first, then what is most frequent; `fp32` for nothing."""
    ordered = sorted(counted, key=lambda kind: (kind not in ("i8", "fp8"), -counted[kind]))
    return "+".join("int8" if kind == "i8" else kind for kind in ordered) or "fp32"


def _type(row: Mapping[str, Any]) -> str:
    """The type of the first tensor a layer reads, or writes where it reads none."""
    for tensor in [*(row.get("Inputs") or []), *(row.get("Outputs") or [])]:
        said = str(tensor.get("Format/Datatype", "")).upper()
        if found := next((ours for word, ours in TYPES if word in said), None):
            return found
    return "?"


def _profile_options(shapes: Mapping[str, Mapping[str, list[int]]]) -> list[str]:
    return [f"--{kind}Shapes={_shapes({name: shape[kind] for name, shape in shapes.items()})}" for kind in ("min", "opt", "max")] if shapes else []


def _shapes(shapes: Mapping[str, list[int]]) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def _at(folder: str) -> Any:
    return lambda name: f"{folder.rstrip('/')}/{name}" if folder else name


def read_json(file: Path, kind: type) -> Any:
    """A document of trtexec. Raises EdgekdError when it cannot be read, is of another kind or empty."""
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise EdgekdError(f"trtexec's output cannot be read: {e}", where=file) from e
    if not isinstance(found, kind) or not found:
        raise EdgekdError("trtexec's output holds nothing that is known", where=file)
    return found
