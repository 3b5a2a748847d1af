"""Builds a TensorRT engine from an ONNX file, on the device that will run it.

Needs nothing but Python and TensorRT 10 or newer (JetPack 6 has 10.3), so that it can be copied to a board as it is and run there:

    python _tensorrt_build.py decoder.build.json [--folder FOLDER] [--engine decoder.engine] [--layers decoder.layers.json]

`build.json` has the file's name, the least, usual and greatest shapes of inputs with axes of any length, and the memory a kernel may ask for. Types are
the file's own (strongly typed network): nothing is left to the builder's taste. The last line on stdout is a JSON object with what was built.
"""
from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

OLDEST = 10
NOISE = ("cudaError", "Invalid Node", "catchCudaError")
"""what stands in messages without being their reason"""


class Refused(Exception):
    """TensorRT does not take the file. `found` names every node it complains of: node, operator, reason."""

    def __init__(self, what: str, found: list[dict[str, str]] | None = None) -> None:
        super().__init__(what)
        self.what, self.found = what, found or []


def load(name: str = "tensorrt") -> Any:
    """The TensorRT package. Raises Refused when it is missing, broken or too old."""
    try:
        trt = importlib.import_module(name)
    except (ImportError, OSError) as e:  # the Python package alone, without its libraries, fails here
        raise Refused(f"{name} cannot be imported: {_first_line(e)}") from e
    if name == "tensorrt" and int(trt.__version__.split(".")[0]) < OLDEST:
        raise Refused(f"TensorRT {trt.__version__} has no strongly typed networks with quantization; {OLDEST} or newer is needed (JetPack 6)")
    return trt


def logger(trt: Any) -> Any:
    """A logger that keeps what went wrong: TensorRT tells reasons to its logger, and returns nothing but None."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()


def parse(trt: Any, log: Any, file: Path) -> tuple[Any, Any]:
    """(builder, network) of an ONNX file. Raises Refused with every node that TensorRT does not take."""
    builder = trt.Builder(log)
    if builder is None:
        raise Refused(f"TensorRT does not start: {reason(log)}")
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # some day the only kind there is
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(file)):  # from the file, so that weights beside it are found
        found = [{"node": e.node_name() or "?", "operator": e.node_operator() or "?", "reason": _why(e.desc())}
                 for e in (parser.get_error(i) for i in range(parser.num_errors))]
        first = found[0] if found else {"node": "?", "operator": "?", "reason": reason(log)}
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        raise Refused(f"TensorRT's parser refuses the operator {first['operator']} of node '{first['node']}': {first['reason']}{more}", found or [first])
    return builder, network


def configure(trt: Any, builder: Any, network: Any, spec: dict[str, Any]) -> Any:
    """The builder's configuration: profile of shapes, memory, detailed layer information."""
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(spec["workspace_mib"]) << 20)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if not spec.get("tf32", False):
        config.clear_flag(trt.BuilderFlag.TF32)
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    varying = [tensor for tensor in inputs if any(n < 0 for n in tensor.shape)]
    if missing := [tensor.name for tensor in varying if tensor.name not in spec["shapes"]]:
        raise Refused(f"build.json has no shapes for {', '.join(missing)}")
    if varying:
        profile = builder.create_optimization_profile()
        for tensor in varying:
            shape = spec["shapes"][tensor.name]
            profile.set_shape(tensor.name, tuple(shape["min"]), tuple(shape["opt"]), tuple(shape["max"]))
        if config.add_optimization_profile(profile) < 0:
            raise Refused(f"the shapes in build.json do not fit the file: {json.dumps(spec['shapes'])}")
    return config


def serialized(trt: Any, log: Any, builder: Any, network: Any, config: Any) -> bytes:
    """The engine. Raises Refused with the reason, and with the node where the message names one."""
    log.errors.clear()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        names = {network.get_layer(i).name for i in range(network.num_layers)}
        node = next((n for message in log.errors for n in re.findall(r"'([^']+)'", message) if n in names), "?")
        raise Refused(f"TensorRT cannot compile the file: {reason(log)}", [{"node": node, "operator": "?", "reason": reason(log)}])
    return bytes(plan)


def with_timing_cache(config: Any, file: Path) -> None:
    """Let kernels be chosen from earlier measurements on this device. A cache of another device or version is started anew."""
    kept = file.read_bytes() if file.is_file() else b""
    cache = config.create_timing_cache(kept)
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def layer_information(trt: Any, log: Any, plan: bytes) -> str:
    """JSON of the engine's layers with the type of every tensor; needs the GPU."""
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        raise Refused(f"the engine does not load: {reason(log)}")
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def build(spec: dict[str, Any], folder: Path, *, engine: Path | None = None, layers: Path | None = None, timing_cache: Path | None = None) -> dict[str, Any]:
    """Build what `build.json` describes; every file appears whole or not at all.

    Args:
        folder: where the ONNX file is, and where what is written goes unless named.

    Returns:
        JSON: version, files, bytes, seconds.
    """
    trt, start = load(), time.monotonic()
    engine, layers = engine or folder / spec["engine"], layers or folder / spec["layers"]
    timing_cache = timing_cache or folder / spec["timing_cache"]
    log = logger(trt)
    builder, network = parse(trt, log, folder / spec["onnx"])
    config = configure(trt, builder, network, spec)
    with_timing_cache(config, timing_cache)
    plan = serialized(trt, log, builder, network, config)
    write(timing_cache, bytes(config.get_timing_cache().serialize()))
    write(layers, layer_information(trt, log, plan).encode())
    write(engine, plan)
    return {"tensorrt": trt.__version__, "engine": str(engine), "layers": str(layers), "bytes": len(plan), "seconds": round(time.monotonic() - start, 1)}


def write(path: Path, data: bytes) -> None:
    """The whole file or nothing: a board that loses power leaves no engine cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def reason(log: Any) -> str:
    """The first error that was logged, in one line."""
    return next((text for message in log.errors if (text := _reason(message))), "it gave no reason")


def _why(description: str) -> str:
    """The parser's reason; for an operator it does not know it gives a failed assertion, or the plug-in that it looked for instead."""
    said = _reason(description)
    return "it has no such operator" if said in ("", "false") or "Plugin not found" in said else said


def _reason(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return next((line for line in lines if not any(noise in line for noise in NOISE)), lines[0] if lines else "")[:300]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 when TensorRT refuses, with the reason on stderr."""
    parser = argparse.ArgumentParser(description="Build a TensorRT engine on the device that will run it.")
    parser.add_argument("spec", type=Path, help="build.json")
    parser.add_argument("--folder", type=Path, help="where the ONNX file is (default: beside build.json)")
    for option in ("engine", "layers", "timing-cache"):
        parser.add_argument(f"--{option}", type=Path)
    given = parser.parse_args(arguments)
    try:
        spec = json.loads(given.spec.read_text(encoding="utf-8"))
        told = build(spec, given.folder or given.spec.parent, engine=given.engine, layers=given.layers, timing_cache=given.timing_cache)
    except Refused as e:
        print(e.what, *(json.dumps(found) for found in e.found), sep="\n", file=sys.stderr)
        return 1
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
