"""Measuring by the runtimes' own programs on a fake phone: programs that print what the real ones print, in their words (tflite/tools/benchmark,
executor_runner.cpp, onnxruntime/test/perftest); the one of ONNX Runtime computes with ONNX Runtime."""
from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_adbd import FakePhone
from phones import opened, phones, server  # noqa: F401  fixtures
from staged import stage
from tiny import tiny_sam

from edgekd.errors import EdgekdError
from edgekd.exporting import export_model
from edgekd.measurement import Circumstances
from edgekd.profiling import drivers
from edgekd.profiling.drivers import _tool_litert, tools
from edgekd.profiling.drivers._program import Launch, Program
from edgekd.profiling.drivers._tool_litert import operators, read
from edgekd.profiling.transport import Completed, Lost, adb
from edgekd.target import resolve

pytest.importorskip("adbutils", reason='pip install "edgekd[devices]"')
TARGET = resolve("pixel_8")

LITERT = """#!/bin/sh
echo "$*" >> {log}
for w in "$@"; do case $w in --graph=*) graph=${{w#--graph=}};; --profiling_output_csv_file=*) csv=${{w#*=}};; --report_peak_memory_footprint=true) memory=1;; esac; done
[ -f "$graph" ] || {{ echo "Failed to load model $graph" >&2; exit 1; }}
case $graph in *encoder*) ms=2000;; *) ms=500;; esac
n=$(wc -l < {log})
echo 'INFO: STARTING!'
echo "INFO: Log parameter values verbosely: [0]"
echo "INFO: Loaded model $graph"
echo 'INFO: Created TensorFlow Lite XNNPACK delegate for CPU.'
echo 'INFO: Explicitly applied XNNPACK delegate, and the model graph will be {how} executed by the delegate.'
echo 'INFO: The input model file size (MB): 11.983'
echo 'INFO: Initialized session in 20.283ms.'
echo 'INFO: Running benchmark for at least 3 iterations and at least 0.2 seconds but terminate if exceeding 8 seconds.'
echo 'INFO: count=7 first=9000 curr=2000 min=1900 max=9000 avg=2814 std=48 p5=1900 median=2000 p95=9000'
echo 'INFO: '
echo 'INFO: Running benchmark for at least 2 iterations and at least 0 seconds but terminate if exceeding 8 seconds.'
echo "INFO: count=2 first=$((ms + n)) curr=$((ms - n)) min=$((ms - n)) max=$((ms + n)) avg=$ms std=$n p5=$ms median=$ms p95=$ms"
echo 'INFO: '
echo "INFO: Inference timings in us: Init: 20283, First inference: 9000, Warmup (avg): 2814.43, Inference (avg): $ms"
[ -z "$memory" ] || echo 'INFO: Overall peak memory footprint (MB) via periodic monitoring: 12.5'
[ -z "$csv" ] || cp {profile} "$csv"
"""
PROFILE = """Profiling Info for Benchmark Initialization:
============================== Run Order ==============================
node type,first,avg_ms,%,cdf%,mem KB,times called,name
ModifyGraphWithDelegate,5.1,5.1,90%,90%,0,1,ModifyGraphWithDelegate/0
Number of nodes executed: 1

Operator-wise Profiling Info for Regular Benchmark Runs:
============================== Run Order ==============================
node type,first,avg_ms,%,cdf%,mem KB,times called,name
Convolution (NHWC, {conv}) IGEMM,0.16,0.1999,11.4405%,11.4405%,0,1,Delegate/Convolution (NHWC\t {conv}) IGEMM:0
HardSwish (NC),0.016,0.0656,3.75436%,15.1949%,0,1,Delegate/HardSwish (NC):1
{outside}Fully Connected (NC, {fc}),0.013,0.0408,2.33503%,17.5299%,0,1,Delegate/Fully Connected (NC\t {tabbed}):2

============================== Top by Computation Time ==============================
node type,first,avg_ms,%,cdf%,mem KB,times called,name
Convolution (NHWC, {conv}) IGEMM,0.16,0.1999,11.4405%,11.4405%,0,1,Delegate/Convolution (NHWC\t {conv}) IGEMM:0
"""
RUNNER = """#!/bin/sh
echo "$*" >> {log}
for w in "$@"; do case $w in --num_executions=*) n=${{w#*=}};; --output_file=*) out=${{w#*=}};; --inputs=*) inputs=${{w#*=}};; esac; done
{old}
echo 'I 00:00:00.000241 executorch:executor_runner.cpp:328] Resetting threadpool with num threads = 2'
echo 'I 00:00:00.012342 executorch:executor_runner.cpp:420] Model file /x/encoder.pte is loaded.'
echo 'I 00:00:00.034342 executorch:executor_runner.cpp:560] Model loaded in 21.500000 ms.'
i=1
while [ $i -le $n ]; do
  [ $i -le 3 ] && ms=90.0 || ms=4.$((i % 5))00000
  echo "I 00:00:00.1 executorch:executor_runner.cpp:700] Iteration $i of $n: $ms ms"
  i=$((i + 1))
done
[ -z "$out" ] || cp "${{inputs%%,*}}" "$out-0.bin"
echo "I 00:00:01.034342 executorch:executor_runner.cpp:720] Model executed successfully $n time(s) in $((n * 6)).500000 ms."
"""
OLD = """case "$*" in *--inputs=*|*--cpu_threads=*|*--print_output=*|*--output_file=*)
  f=; for w in "$@"; do case $w in --inputs=*|--cpu_threads=*|--print_output=*|--output_file=*) f=${w%%=*}; echo "ERROR: unknown command line flag '${f#--}'" >&2;; esac; done; exit 1;;
esac
echo "I 00:00:01.034342 executorch:executor_runner.cpp:298] Model executed successfully $n time(s) in $((n * 6)).500000 ms."
exit 0
"""
PERF_TEST = """#!{python}
import glob, json, os, sys, time
import numpy as np, onnx, onnxruntime as ort
from onnx import numpy_helper
words, options, i = sys.argv[1:], {{}}, 0
while words[i].startswith("-"):
    options[words[i]] = words[i + 1]
    i += 2
model, result = words[i:]
assert options["-e"] == "cpu" and options["-m"] == "times"
settings = ort.SessionOptions()
settings.intra_op_num_threads = int(options.get("-x", 0))
if "-p" in options:
    settings.enable_profiling, settings.profile_file_prefix = True, options["-p"]
start = time.perf_counter()
session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
print(f"Session creation time cost: {{time.perf_counter() - start}} s")
feed = {{}}
for file in sorted(glob.glob(os.path.join(os.path.dirname(model), "test_data_set_0", "input_*.pb"))):
    tensor = onnx.TensorProto.FromString(open(file, "rb").read())
    feed[tensor.name] = numpy_helper.to_array(tensor)
if set(feed) != {{i.name for i in session.get_inputs()}}:
    print("there is no test input data for input and model")
    sys.exit(-1)
session.run(None, feed)
times = []
for _ in range(int(options["-r"])):
    start = time.perf_counter()
    session.run(None, feed)
    times.append(time.perf_counter() - start)
print(f"Total inference requests: {{len(times)}}\\nAverage inference time cost total: {{1e3 * sum(times) / len(times):.6f}} ms\\nPeak working set size: 35299328 bytes")
with open(result, "a") as f:
    f.write("".join(f"m0,{{t}},35299328,98,{{i}}\\n" for i, t in enumerate(times)))
if "-p" in options:
    session.end_profiling()
"""


def job_of(folder: Path, format: str, suffix: str, **asked: Any) -> dict[str, Any]:
    """Two components of no contents, as LiteRT's and ExecuTorch's fakes take them."""
    (folder / "m0").mkdir(parents=True)
    parts = {}
    for name, shape in (("encoder", [1, 3, 8, 8]), ("decoder", [1, 4])):
        (folder / f"m0/{name}{suffix}").write_bytes(name.encode() * 100)
        (folder / f"m0/{name}.x.bin").write_bytes(np.arange(np.prod(shape), dtype=np.float32).tobytes())
        parts[name] = {"format": format, "scheme": "fp32", "file": f"m0/{name}{suffix}", "files": [f"m0/{name}{suffix}"], "outputs": [f"{name}_out"], "calls": 1,
                       "inputs": [{"name": "x", "dtype": "float32", "shape": shape, "file": f"m0/{name}.x.bin"}]}
    return {"schema": "edgekd.job/1", "models": [{"id": "tiny", "components": parts, "together": ["encoder", "decoder"]}], "threads": 2, "warmup": 3, "repeats": 12,
            "max_seconds": 4.0, "mode": "count", "memory": True, "layers": True, "answers": True, "tools": {}, **asked}


@pytest.fixture
def phone(phones: Callable[..., FakePhone]) -> FakePhone:  # noqa: F811
    return phones()


def measured(phone: FakePhone, job: dict[str, Any], folder: Path, **given: str) -> dict[str, Any]:
    target = TARGET.at(f"adb://{phone.serial}", tools=given)
    with opened(phone) as device:
        found = drivers.measure(device, job, folder, target)
    Circumstances(**found["circumstances"])
    return found


def litert(phone: FakePhone, how: str = "completely", conv: str = "QC8", fc: str = "QC8", outside: str = "") -> Path:
    log, profile = phone.root.parent / "log", phone.root.parent / "profile.csv"
    profile.write_text(PROFILE.format(conv=conv, fc=fc, tabbed=fc.replace(",", "\t"), outside=outside))
    log.write_text("")
    program = phone.root.parent / "supplied" / "benchmark_model"
    program.parent.mkdir(exist_ok=True)
    program.write_text(LITERT.format(log=log, profile=profile, how=how))
    return program


def test_litert_is_measured_by_single_runs_in_turns(phone: FakePhone, tmp_path: Path) -> None:
    program = litert(phone)
    found = measured(phone, job_of(tmp_path / "job", "litert", ".tflite"), tmp_path / "job", benchmark_model=str(program))
    model, log = found["models"][0], (phone.root.parent / "log").read_text().splitlines()
    encoder = model["components"]["encoder"]
    assert found["complete"] and len(encoder["samples_ms"]) == 12 and len(set(encoder["samples_ms"])) == 12 and statistics.median(encoder["samples_ms"]) == pytest.approx(2, 0.01)
    assert model["together_ms"] == pytest.approx([a + b for a, b in zip(encoder["samples_ms"], model["components"]["decoder"]["samples_ms"], strict=True)])
    assert encoder["load_ms"] == 20.283 and encoder["warmup"] == 7 and encoder["steady"] and encoder["fell_back"] == []
    assert encoder["executed_precision"] == "int8" and encoder["executed_ops"]["Convolution (NHWC, QC8) IGEMM"] == 1
    assert [(r["name"], r["ms"], r["precision"]) for r in encoder["layers"]] == [
        ("Delegate/Convolution (NHWC, QC8) IGEMM", 0.1999, "int8"), ("Delegate/HardSwish (NC)", 0.0656, None), ("Delegate/Fully Connected (NC, QC8)", 0.0408, "int8")]
    assert model["peak_memory_bytes"] == 2 * int(12.5 * 2**20)
    timed = ["encoder" if "encoder" in line else "decoder" for line in log if "--num_runs=2" in line and "memory" not in line]
    assert timed[:4] == ["encoder", "decoder", "decoder", "encoder"] and all("--num_threads=2" in line and "--use_xnnpack=true" in line for line in log)
    assert found["circumstances"]["versions"]["benchmark_model"].startswith("sha256") and found["circumstances"]["soc"] == "Google Tensor G3"
    assert any("random inputs" in n for n in found["notes"]) and any("sum of its components'" in n for n in found["notes"])
    assert not list(phone.root.rglob("session-*"))


def test_what_a_delegate_leaves_out_fell_back(phone: FakePhone, tmp_path: Path) -> None:
    program = litert(phone, how="partially", conv="F32", fc="QD8, F32, QC8W", outside="SOFTMAX,0.1,0.2,1%,1%,0,1,[decoder/softmax]:5\n")
    found = measured(phone, job_of(tmp_path / "job", "litert", ".tflite", repeats=2, layers=False), tmp_path / "job", benchmark_model=str(program))
    part = found["models"][0]["components"]["encoder"]
    assert part["fell_back"] == ["decoder/softmax (SOFTMAX) on LiteRT's own kernels"] and part["executed_precision"] == "int8+fp32" and "layers" not in part


@pytest.mark.parametrize(("delegate", "scheme", "words", "precision"), [
    ("gpu", "fp32", ["--use_gpu=true", "--gpu_precision_loss_allowed=false"], "fp32"), ("gpu", "fp16", ["--gpu_precision_loss_allowed=true"], "fp16"),
    ("nnapi", "fp32", ["--use_nnapi=true"], "unknown"), ("none", "fp32", ["--use_xnnpack=false"], ""), ("xnnpack", "fp16", ["--xnnpack_force_fp16=true"], "")])
def test_delegates_are_asked_for_and_told_honestly(delegate: str, scheme: str, words: list[str], precision: str) -> None:
    said: list[str] = []

    class Device:
        name = "adb"

        def run(self, command: list[str], *, timeout_s: float) -> Completed:
            said.extend(command)
            return Completed(0, "", "")

    tool = _tool_litert.Litert(Program(Device(), "benchmark_model", "/b", ""), {"file": "x.tflite", "scheme": scheme}, "/s", None, {"delegate": delegate})  # type: ignore[arg-type]
    assert tool.executed(layers=False).precision == precision and set(words) <= set(said)
    with pytest.raises(EdgekdError, match="hexagon"):
        _tool_litert.Litert(Program(Device(), "b", "/b", ""), {"file": "x", "scheme": "fp32"}, "/s", None, {"delegate": "hexagon"})  # type: ignore[arg-type]


@pytest.mark.parametrize(("stats", "samples", "runs"), [
    ("count=2 first=300 curr=200 min=200 max=300 avg=250 std=50", [0.3, 0.2], 1), ("count=2 curr=300(all same)", [0.3, 0.3], 1), ("count=1 curr=300", [0.3], 1),
    ("count=50 first=266601 curr=266931 min=265837 max=268116 avg=266473 std=419", [266.473], 50)])
def test_litert_tells_single_runs_or_a_mean(stats: str, samples: list[float], runs: int) -> None:
    text = f"count=4 first=9 curr=8 min=8 max=9 avg=8 std=1\n{stats}\nInference timings in us: Init: 20283, First inference: 339304, Warmup (avg): 302814, Inference (avg): 266473"

    class Device:
        name = "adb"

        def run(self, command: list[str], *, timeout_s: float) -> Completed:
            return Completed(0, "", text)  # old builds log to stderr

    tool = _tool_litert.Litert(Program(Device(), "benchmark_model", "/b", ""), {"file": "x", "scheme": "fp32"}, "/s", None, {})  # type: ignore[arg-type]
    found = tool.launch(warmup=1, seconds=1)
    assert found == Launch(pytest.approx(samples), 20.283, runs, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "node type\n1,2,3", "node type,first,avg_ms,%,cdf%,mem KB,times called,name\na,b,c,d,e,f,g,h", "\0" * 50])
def test_a_profile_of_something_else_is_none(text: str) -> None:
    assert operators(text) == [] and read([], "", "xnnpack", True).precision == "" and read([], "", "xnnpack", True).layers is None


def runner(phone: FakePhone, old: bool = False) -> Path:
    program = phone.root.parent / "executor_runner"
    program.write_text(RUNNER.format(log=phone.root.parent / "log", old=OLD if old else ""))
    return program


def test_executorch_tells_every_run_and_answers(phone: FakePhone, tmp_path: Path) -> None:
    found = measured(phone, job_of(tmp_path / "job", "executorch", ".pte"), tmp_path / "job", executor_runner=str(runner(phone)))
    model = found["models"][0]
    part = model["components"]["encoder"]
    assert len(part["samples_ms"]) == 12 and set(part["samples_ms"]) <= {4.0, 4.1, 4.2, 4.3, 4.4} and part["load_ms"] == 21.5 and part["warmup"] == 3
    assert (tmp_path / "job" / part["answers"]["encoder_out"]).read_bytes() == (tmp_path / "job/m0/encoder.x.bin").read_bytes()
    assert model["peak_memory_bytes"] is None and part["executed_precision"] == "" and any("cannot be read here" in n for n in found["notes"])
    assert "--cpu_threads=2" in (phone.root.parent / "log").read_text()


def test_an_older_executorch_gives_means_and_the_notes_say_so(phone: FakePhone, tmp_path: Path) -> None:
    found = measured(phone, job_of(tmp_path / "job", "executorch", ".pte", repeats=4), tmp_path / "job", executor_runner=str(runner(phone, old=True)))
    part = found["models"][0]["components"]["encoder"]
    assert found["models"][0]["error"] is None and len(part["samples_ms"]) == 4 and part["samples_ms"][-1] == pytest.approx(78.5 / 13) and "answers" not in part
    assert any("mean of 13 runs" in n for n in found["notes"]) and any("how long a model takes to load" in n for n in found["notes"])


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "fp32"
    export_model(tiny_sam(2), folder, format="onnx", scheme="fp32", threads=1)
    return folder


def test_onnx_is_measured_on_the_inputs_of_the_job(phone: FakePhone, tmp_path: Path, artifact: Path) -> None:
    program = tmp_path / "onnxruntime_perf_test"
    program.write_text(PERF_TEST.format(python=sys.executable))
    job = stage(tmp_path / "job", artifact, repeats=8, memory=True, layers=True)
    job["models"][0]["components"]["decoder"]["calls"] = 3
    found = measured(phone, job, tmp_path / "job", onnxruntime_perf_test=str(program))
    model = found["models"][0]
    assert model["error"] is None, model["error"]
    for part in model["components"].values():
        assert len(part["samples_ms"]) == 8 and part["executed_precision"] == "fp32" and part["fell_back"] == [] and part["load_ms"] > 0
        assert len(part["layers"]) == sum(part["executed_ops"].values()) and all(r["ms"] >= 0 for r in part["layers"])
    assert model["peak_memory_bytes"] == 2 * 35299328 and "answers" not in model["components"]["encoder"]
    assert json.loads(json.dumps(found)) == found


def test_profiles_come_out_of_the_whole_way(phone: FakePhone, tmp_path: Path, artifact: Path) -> None:
    from edgekd.profiling import profile_artifact

    program = tmp_path / "onnxruntime_perf_test"
    program.write_text(PERF_TEST.format(python=sys.executable))
    target = TARGET.at(f"adb://{phone.serial}", tools={"onnxruntime_perf_test": str(program)})
    found = profile_artifact(artifact, target, repeats=5, threads=1, max_seconds=2.0)
    assert found.transport == "adb" and found.latency_ms.n == 5 and found.latency_ms.provenance == "measured" and found.executed_precision == "fp32"
    assert found.circumstances.device == "Google Pixel 8 (Google Tensor G3)" and found.circumstances.python.startswith("none")


def test_a_missing_program_says_where_to_get_it(phone: FakePhone, tmp_path: Path) -> None:
    job = job_of(tmp_path / "job", "litert", ".tflite")
    job["models"].append({**job_of(tmp_path / "other", "openvino", ".xml")["models"][0], "id": "other"})
    found = measured(phone, job, tmp_path / "job")
    errors = [m["error"] for m in found["models"]]
    assert "benchmark_model" in errors[0]["what"] and "ai.google.dev" in errors[0]["hint"] and "tools: {benchmark_model:" in errors[0]["hint"]
    assert "openvino" in errors[1]["what"] and not found["complete"]
    found = measured(phone, job, tmp_path / "job", benchmark_model="/data/local/tmp/not-there")
    assert "nor there at /data/local/tmp/not-there" in found["models"][0]["error"]["what"]


def test_a_program_that_is_on_the_device_is_taken(phone: FakePhone, tmp_path: Path) -> None:
    there = phone.programs / "benchmark_model"
    there.write_text(litert(phone).read_text())
    there.chmod(0o755)
    found = measured(phone, job_of(tmp_path / "job", "litert", ".tflite", repeats=2), tmp_path / "job")
    assert found["complete"] and found["circumstances"]["versions"]["benchmark_model"] == f"on the device at {there}"
    assert measured(phone, job_of(tmp_path / "again", "litert", ".tflite", repeats=2), tmp_path / "again", benchmark_model=str(there))["complete"]


def test_a_program_for_another_processor_is_refused_before_it_is_sent(phone: FakePhone, tmp_path: Path) -> None:
    program = tmp_path / "benchmark_model"
    program.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + (2).to_bytes(2, "little") + (183).to_bytes(2, "little") + bytes(5000))
    found = measured(phone, job_of(tmp_path / "job", "litert", ".tflite"), tmp_path / "job", benchmark_model=str(program))
    assert "built for aarch64" in found["models"][0]["error"]["what"] and phone.came < 5000


@pytest.mark.parametrize(("script", "words"), [("#!/bin/sh\necho 'Failed to load model' >&2; exit 3\n", "code 3: Failed to load model"),
                                               ("#!/bin/sh\necho hello\n", "without telling times: hello")])
def test_a_program_that_fails_is_quoted_and_other_models_go_on(phone: FakePhone, tmp_path: Path, script: str, words: str) -> None:
    program = tmp_path / "benchmark_model"
    program.write_text(script)
    job = job_of(tmp_path / "job", "litert", ".tflite", repeats=2)
    other = job_of(tmp_path / "job2", "executorch", ".pte")["models"][0]
    for part in other["components"].values():  # in the same folder
        for key in ("file",):
            (tmp_path / "job" / part[key]).write_bytes(b"x")
    job["models"].append({**other, "id": "other"})
    found = measured(phone, job, tmp_path / "job", benchmark_model=str(program), executor_runner=str(runner(phone)))
    assert words in found["models"][0]["error"]["what"] and found["models"][0]["components"] == {} and found["models"][1]["error"] is None


def test_a_phone_that_comes_back_is_gone_on_with(phone: FakePhone, tmp_path: Path) -> None:
    program = litert(phone)
    phone.faults.gone_in_shell = "--num_runs=2"
    program.write_text(program.read_text().replace("echo 'INFO: STARTING!'", "sleep 1.2; echo 'INFO: STARTING!'", 1))
    found = measured(phone, job_of(tmp_path / "job", "litert", ".tflite", repeats=2, memory=False), tmp_path / "job", benchmark_model=str(program))
    assert found["complete"] and any("went away while it was measured, and came back" in n for n in found["notes"])


def test_a_phone_that_stays_away_ends_it_with_what_there_is(phone: FakePhone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adb, "BACK_S", 0.5)
    program = litert(phone)
    target = TARGET.at(f"adb://{phone.serial}", tools={"benchmark_model": str(program)})
    with opened(phone) as device:
        monkeypatch.setattr(tools, "_take_turns", lambda work, phone_: phone.close() or phone_.run(["true"], timeout_s=5))
        with pytest.raises(Lost) as e:
            drivers.measure(device, job_of(tmp_path / "job", "litert", ".tflite"), tmp_path / "job", target)
    assert e.value.partial["schema"] == "edgekd.measured/1" and not e.value.partial["complete"]  # type: ignore[attr-defined]


def test_throttling_is_told(phone: FakePhone, tmp_path: Path) -> None:
    (phone.root.parent / "thermal").write_text("3")
    found = measured(phone, job_of(tmp_path / "job", "litert", ".tflite", repeats=2), tmp_path / "job", benchmark_model=str(litert(phone)))
    assert found["circumstances"]["throttled"] == ["Android's thermal status is severe (3)"] and found["circumstances"]["temperature_c"] is not None


class Slow:
    """A tool whose starts take as long as a clock says."""

    note = ""

    def __init__(self, samples: list[float]) -> None:
        self.samples = samples

    def launch(self, *, warmup: int, seconds: float) -> Launch:
        return Launch(self.samples, 1.0)


@pytest.mark.parametrize(("asked", "wall", "samples", "starts"), [
    ({"repeats": 30, "max_seconds": 8.0}, 0.1, [5.0, 5.0], 15), ({"repeats": 30, "max_seconds": 1.0}, 0.1, [400.0, 400.0], 5), ({"repeats": 4, "max_seconds": 0.1}, 9.0, [1.0], 4),
    ({"repeats": 30, "max_seconds": 1.0}, 6.0, [1.0, 1.0], 5), ({"mode": "time", "max_seconds": 1.0}, 0.01, [50.0, 50.0], 10)])
def test_how_often_a_program_is_started(asked: dict[str, Any], wall: float, samples: list[float], starts: int) -> None:
    now = iter(n * wall for n in range(1000))
    timed, clock = tools.Timed(Slow(samples), 1), [0.0]  # type: ignore[arg-type]

    def tick() -> float:
        clock.append(next(now))
        return clock[-1]

    while timed.wanted(asked):
        timed.take(asked, tick)
    assert len(timed.launches) == starts
