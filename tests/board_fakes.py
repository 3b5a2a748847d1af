"""What tests of boards stand on: a board that is a folder here, an onnxruntime that does what its files say, and a trtexec that writes what the real one does."""
from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.errors import EdgekdError
from edgekd.profiling.boards import RUNNER, bundle
from edgekd.profiling.transport import Completed

ONNXRUNTIME = '''
import json, os, signal, sys, time
PROVIDERS = os.environ.get("FAKE_PROVIDERS", "CPUExecutionProvider").split(",")
def get_available_providers():
    return PROVIDERS
class SessionOptions:
    enable_profiling = False
    profile_file_prefix = ""
class Named:
    def __init__(self, name):
        self.name = name
class InferenceSession:
    def __init__(self, path, options, providers):
        with open(path) as f:
            self.does = f.read().split()
        if "FAKE_LOG" in os.environ:
            with open(os.environ["FAKE_LOG"], "a") as f:
                f.write(os.path.basename(os.path.dirname(path)) + "\\\\n")
        self.options, self.providers, self.runs = options, providers, 0
        if "refuse" in self.does:
            raise RuntimeError("no kernel for Foo")
    def get_providers(self):
        return ["CPUExecutionProvider"] if "silently" in self.does else self.providers
    def get_inputs(self):
        return [Named("x")]
    def get_outputs(self):
        return [Named("y")]
    def run(self, names, feed):
        self.runs += 1
        if "crash" in self.does:
            print("about to crash", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if "hang" in self.does:
            with open(os.environ["FAKE_PID"], "w") as f:
                f.write(str(os.getpid()))
            time.sleep(1000)
        if "late" in self.does and self.runs > 8:
            raise RuntimeError("out of memory in run 9")
        return [feed["x"] * 2]
    def end_profiling(self):
        path = self.options.profile_file_prefix + ".json"
        node = lambda name, op, provider, types, i: {"cat": "Node", "name": name + "_kernel_time", "dur": 100 * (i + 1), "args": {
            "op_name": op, "provider": provider, "node_index": str(i), "input_type_shape": [{t: [1]} for t in types]}}
        events = []
        for _ in range(self.runs):
            events += [node("conv", "Conv", self.providers[0], ["float", "float16" if "half" in self.does else "float"], 0),
                       node("act", "Gelu", "CPUExecutionProvider", ["float"], 1), {"cat": "Session", "name": "model_run", "dur": 300, "args": {}}]
        with open(path, "w") as f:
            json.dump(events, f)
        return path
'''

TRTEXEC = '''#!{python}
import json, os, struct, sys, time
told = dict(a[2:].partition("=")[::2] for a in sys.argv[1:])
with open({log!r}, "a") as f:
    f.write(json.dumps(sys.argv[1:]) + "\\n")
print("&&&& RUNNING TensorRT.trtexec [TensorRT v100300] [b31] # " + " ".join(sys.argv))
print("[11/22/2026-10:00:00] [I] === Model Options ===")
def end(code, words):
    print("&&&& %s TensorRT.trtexec [TensorRT v100300] [b31]" % words)
    sys.exit(code)
if "onnx" in told:
    if os.path.exists({refuse!r}):
        print("[11/22/2026-10:00:01] [E] [TRT] ModelImporter.cpp:949: ERROR: In function parse: no importer for node Foo")
        end(1, "FAILED")
    with open(told["saveEngine"], "w") as f:
        f.write(os.path.abspath(told["onnx"]))
    half = "Half" if "fp16" in told else "Float"
    layer = lambda name, kind, type: {{"Name": name, "LayerType": kind, "ParameterType": kind, "TacticName": "sm80_xmma_fprop", "Inputs": [
        {{"Name": "x", "Dimensions": [1], "Format/Datatype": type}}], "Outputs": []}}
    with open(told["exportLayerInfo"], "w") as f:
        json.dump({{"Layers": [layer("Reformatting CopyNode for Input Tensor 0", "Reformat", "Row major linear FP32"),
                              layer("node_conv2d + node_gelu", "Convolution", "Channel major FP16 format where channel % 4 == 0" if half == "Half"
                                    else "Row major linear FP32")]}}, f)
    end(0, "PASSED")
with open(told["loadEngine"]) as f:
    onnx = f.read()
print("[11/22/2026-10:00:00] [I] Engine loaded in 0.0125 sec.")
print("[11/22/2026-10:00:00] [I] [TRT] Loaded engine size: 10 MiB")
arrays = {{}}
for one in told["loadInputs"].split(","):
    name, path = one.split(":", 1)
    with open(path, "rb") as f:
        arrays[name] = f.read()
print("[11/22/2026-10:00:00] [I] Starting inference")
count = max(int(told.get("iterations", 10)), int(float(told.get("duration", 3)) * 100))
print("[11/22/2026-10:00:03] [I] Warmup completed 7 queries over 500 ms")
print("[11/22/2026-10:00:03] [I] Timing trace has %d queries over %g s" % (count, count * 0.01), flush=True)
if "exportTimes" in told:
    row = lambda i: {{"startH2dMs": i * 3.0, "endH2dMs": i * 3.0 + 0.5, "startComputeMs": i * 3.0 + 0.5, "endComputeMs": i * 3.0 + 2.5, "startD2hMs": i * 3.0 + 2.5,
                     "endD2hMs": i * 3.0 + 2.75, "startEnqMs": i * 3.0, "endEnqMs": i * 3.0 + 0.1, "h2dMs": 0.5, "computeMs": 2.0, "d2hMs": 0.25, "latencyMs": 2.75}}
    with open(told["exportTimes"], "w") as f:
        f.write("[\\n  " + "\\n, ".join(json.dumps(row(i)) for i in range(count)) + "\\n]\\n")
if "exportProfile" in told:
    with open(told["exportProfile"], "w") as f:
        f.write('[\\n  {{ "count" : 100 }}\\n, {{ "name" : "Reformatting CopyNode for Input Tensor 0", "timeMs" : 20, "averageMs" : 0.2, "medianMs" : 0.19, "percentage" : 10 }}\\n'
                ', {{ "name" : "node_conv2d + node_gelu", "timeMs" : 180, "averageMs" : 1.8, "medianMs" : 1.75, "percentage" : 90 }}\\n]\\n')
if "exportOutput" in told:
    shapes = dict((s.split(":")[0], [int(n) for n in s.split(":")[1].split("x")]) for s in told.get("shapes", "").split(",") if s)
    try:
        if os.path.getsize(onnx) < 100:
            raise ImportError("not looked at")
        import numpy, onnxruntime
        session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
        fixed = dict((i.name, shapes.get(i.name) or i.shape) for i in session.get_inputs())
        feed = dict((n, numpy.frombuffer(arrays[n], numpy.float32).reshape(fixed[n])) for n in fixed)
        found = [(o.name, v.shape, v.ravel().tolist()) for o, v in zip(session.get_outputs(), session.run(None, feed))]
    except ImportError:
        found = [("y", [2, 2], [1.0, 2.0, 3.0, 4.0])]
    with open(told["exportOutput"], "w") as f:
        f.write("[\\n" + ", ".join('{{ "name" : "%s"\\n  , "dimensions" : "%s"\\n  , "values" : [ %s ]\\n  }}\\n' % (n, "x".join(map(str, s)), ", ".join(repr(v) for v in vs))
                                   for n, s, vs in found) + "]\\n")
end(0, "PASSED")
'''


def fake_onnxruntime(folder: Path) -> dict[str, str]:
    """The environment in which `import onnxruntime` gives one that does what its files say: `refuse`, `crash`, `hang`, `late`, `half`, `silently`, or
    anything else, which doubles its input `x`."""
    (folder / "modules").mkdir(parents=True, exist_ok=True)
    (folder / "modules" / "onnxruntime.py").write_text(ONNXRUNTIME.replace("\\\\n", "\\n"), encoding="utf-8")
    return {"PYTHONPATH": str(folder / "modules"), "FAKE_LOG": str(folder / "opened.log"), "FAKE_PID": str(folder / "hanging.pid"), "PATH": "/usr/bin:/bin"}


def fake_trtexec(folder: Path, python: str = sys.executable) -> tuple[Path, Path]:
    """A program `trtexec`, and the file in which it keeps the words it was called with. It refuses models while a file `refuse` lies beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    program, log = folder / "trtexec", folder / "calls.jsonl"
    program.write_text(TRTEXEC.format(python=python, log=str(log), refuse=str(folder / "refuse")), encoding="utf-8")
    program.chmod(0o755)
    return program, log


def fake_job(folder: Path, *does: str, **asked: Any) -> Path:
    """A job of one model each for `fake_onnxruntime`, with the runner beside it; its path."""
    models = []
    for i, words in enumerate(does):
        own = folder / f"m{i}"
        own.mkdir(parents=True, exist_ok=True)
        (own / "model.onnx").write_text(words)
        (own / "x.bin").write_bytes(np.arange(6, dtype="<f4").tobytes())
        part = {"format": "onnx", "scheme": "fp32", "file": f"m{i}/model.onnx", "files": [f"m{i}/model.onnx"], "outputs": ["y"], "calls": 1,
                "inputs": [{"name": "x", "dtype": "float32", "shape": [2, 3], "file": f"m{i}/x.bin"}]}
        models.append({"id": f"model{i}", "components": {"model": part}, "together": ["model"]})
    job = {"schema": "edgekd.job/1", "models": models, "threads": 1, "warmup": 1, "repeats": 5, "max_seconds": 1.0, "memory": False, **asked}
    (folder / "job.json").write_text(json.dumps(job))
    bundle(folder / RUNNER)
    return folder / "job.json"


class Board:
    """A transport to a board that is a folder here: what is pushed is copied, programs run in it. `faults` come before a run, one each; None is none."""

    name = "ssh"

    def __init__(self, folder: Path, *, env: dict[str, str] | None = None, faults: Sequence[Callable[[], object] | None] = ()) -> None:
        self.folder, self.env, self.faults = folder, env, list(faults)
        self.runs: list[list[str]] = []
        self.asked: list[list[str]] = []

    def probe(self) -> dict[str, object]:
        return {"os": "here"}

    def push(self, path: Path) -> str:
        shutil.copytree(path, self.folder / path.name, dirs_exist_ok=True)
        return str(self.folder / path.name)

    def python(self, needs: Sequence[str]) -> str:
        self.asked.append(list(needs))
        return sys.executable

    def run(self, command: Sequence[str], *, timeout_s: float) -> Completed:
        self.runs.append(list(command))
        fault = self.faults.pop(0) if self.faults else None
        if fault:
            fault()
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=timeout_s, env=self.env, check=False)
        return Completed(done.returncode, done.stdout, done.stderr)

    def pull(self, path: str, local: Path) -> Path:
        if not Path(path).exists():
            raise EdgekdError("no such file there", where=path)
        local.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, local)
        return local

    def close(self) -> None:
        pass

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        pass
