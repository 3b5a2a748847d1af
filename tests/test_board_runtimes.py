"""The runtimes that are installed here, each through the board's own session, held against the session that the rest of edgekd uses."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from board_fakes import fake_trtexec
from test_board import oldest
from tiny import conv_component, expected, linear_component, samples

from edgekd import plugins
from edgekd.profiling import boards
from edgekd.profiling.board import runtimes
from edgekd.profiling.board.job import Input, Part, Trouble
from edgekd.profiling.board.runtimes.tensorrt import TrtexecSession, _version
from edgekd.protocols import Component


def part_of(component: Component, folder: Path, format: str, scheme: str) -> tuple[Part, dict[str, np.ndarray]]:
    """A component exported and staged, and what it is given."""
    exporter = plugins.exporter(format)
    found = exporter.availability()
    if not found.ok:
        pytest.skip(f"{format}: {found.reason} ({found.fix})")
    calibrated = scheme in ("w8a8_static", "fp16")
    files = exporter.export(component, folder / f"{component.name}{exporter.suffix}", scheme=scheme, calibration=samples(component) if calibrated else None)
    return staged(component, folder, files, format, scheme)


def staged(component: Component, folder: Path, files: list[Path], format: str, scheme: str) -> tuple[Part, dict[str, np.ndarray]]:
    given = samples(component, 1, seed=5)[0]
    inputs = []
    for name, value in given.items():
        (folder / f"{name}.bin").write_bytes(value.tobytes())
        inputs.append(Input(name, "float32", list(value.shape), str(folder / f"{name}.bin"), name in component.dynamic))
    return Part(component.name, format, scheme, str(files[0]), [str(f) for f in files], inputs, list(component.outputs)), given


def array(found: runtimes.Array) -> np.ndarray:
    return np.frombuffer(found.data, found.dtype).reshape(found.shape)


CASES = [("onnx", "fp32", conv_component), ("onnx", "fp32", linear_component), ("onnx", "w8a8_static", conv_component), ("onnx", "w8_dynamic", linear_component),
         ("onnx", "fp16", linear_component), ("openvino", "fp32", conv_component), ("openvino", "w8a8_static", conv_component), ("openvino", "bf16", conv_component),
         ("litert", "fp32", conv_component), ("ncnn", "fp32", conv_component), ("ncnn", "bf16", conv_component), ("executorch", "fp32", conv_component)]


@pytest.mark.parametrize(("format", "scheme", "make"), CASES, ids=[f"{f}-{s}-{m.__name__.partition('_')[0]}" for f, s, m in CASES])
def test_a_runtime__computes_and_tells_what_the_other_session_does(tmp_path, format, scheme, make):
    component = make()
    if scheme == "bf16" and format == "openvino":
        import openvino

        if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            pytest.skip("this CPU has no bf16 arithmetic")
    part, given = part_of(component, tmp_path, format, scheme)
    session = runtimes.open_part(part, 1, {})
    session.run()
    host = plugins.exporter(format).open(Path(part.file), scheme=scheme, threads=1)
    for name, value in host.run(given).items():
        np.testing.assert_array_equal(array(session.outputs()[name]), value)
    facts = session.facts()
    if format == "executorch":
        assert facts == runtimes.Facts(), "fixed in the file: whoever wrote it reads them"
    else:
        assert facts.precision == host.executed_precision and facts.ops == host.executed_ops
    session.close()


def test_onnx__layers_are_those_that_ran(tmp_path):
    part, _ = part_of(conv_component(), tmp_path, "onnx", "fp32")
    session = runtimes.open_part(part, 1, {})
    rows = session.layers()
    assert {r["op"] for r in rows} == set(session.facts().ops) and all(r["ms"] >= 0 and set(r) == {"name", "op", "ms", "precision"} for r in rows)
    assert {r["precision"] for r in rows if r["op"] == "Conv"} == {"fp32"}


def test_openvino__layers_are_those_that_ran(tmp_path):
    part, _ = part_of(conv_component(), tmp_path, "openvino", "fp32")
    rows = runtimes.open_part(part, 1, {}).layers()
    assert any("Conv" in r["op"] and r["ms"] > 0 and r["precision"] == "fp32" for r in rows)


@pytest.mark.parametrize("format", ["onnx", "openvino", "litert", "ncnn", "executorch"])
def test_a_file_that_is_none__is_told_in_the_runtime_s_words(tmp_path, format):
    found = plugins.exporter(format).availability()
    if not found.ok:
        pytest.skip(f"{format}: {found.reason} ({found.fix})")
    exporter = plugins.exporter(format)
    path = tmp_path / f"broken{exporter.suffix}"
    path.write_bytes(b"this is no model")
    (tmp_path / "broken.ncnn.bin").write_bytes(b"")
    with pytest.raises(Trouble, match=r"cannot (open|read)") as e:
        runtimes.open_part(Part("encoder", format, "fp32", str(path), [str(path)], [], []), 1, {})
    assert e.value.hint


def test_a_missing_runtime__is_told_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(Trouble, match="the runtime of 'onnx' is missing on the board") as e:
        runtimes.open_part(Part("encoder", "onnx", "fp32", "x", ["x"], [], []), 1, {})
    assert "pip install onnxruntime" in (e.value.hint or "") and "--board-python" in e.value.hint
    with pytest.raises(Trouble, match="no runtime for files of the format 'coreml'"):
        runtimes.open_part(Part("encoder", "coreml", "fp32", "x", ["x"], [], []), 1, {})


EXECUTOR_RUNNER = """#!{python}
import sys
told = dict(a[2:].partition("=")[::2] for a in sys.argv[1:])
assert told["method_name"] == "forward" and told["cpu_threads"] == "2"
data = open(told["inputs"], "rb").read()
count = int(told["num_executions"])
for i in range(count):
    if {single}:
        print("I 00:00:00.002000 executorch:executor_runner.cpp:700] Iteration %d of %d: %f ms" % (i + 1, count, 9.0 if i < 2 else 2.5))
print("I 00:00:00.030000 executorch:executor_runner.cpp:710] Model executed successfully %d time(s) in %f ms." % (count, 2.5 * count))
if "output_file" in told:
    open(told["output_file"] + "-0.bin", "wb").write(data[:8])
"""


@pytest.mark.parametrize("single", [True, False])
def test_executor_runner__is_used_where_there_are_no_bindings(tmp_path, single):
    tool = tmp_path / "executor_runner"
    tool.write_text(EXECUTOR_RUNNER.format(python=sys.executable, single=single))
    tool.chmod(0o755)
    (tmp_path / "x.bin").write_bytes(np.arange(4, dtype="<f4").tobytes())
    part = Part("model", "executorch", "fp32", str(tmp_path / "model.pte"), [], [Input("x", "float32", [4], str(tmp_path / "x.bin"))], ["y"])
    session = runtimes.open_part(part, 2, {"executor_runner": str(tool)})
    found = session.samples(warmup=3, repeats=12, max_seconds=8, mode="count")
    assert found.values == [2.5] * (12 if single else 10) and found.warmup == (3 if single else 0)
    assert len(session.samples(warmup=3, repeats=12, max_seconds=0.5, mode="time").values) == (200 if single else 20)
    assert bool(session.notes) is not single
    session.run()
    assert array(session.outputs()["y"]).tolist() == [0, 1]


# TensorRT --------------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trt(tmp_path):
    """A component in the format `tensorrt`, and the fake trtexec: an onnx file and what it is given."""
    from edgekd.export.onnx import exporter

    def make(component: Component, scheme: str, *, ours: bool) -> tuple[Part, dict[str, np.ndarray], Path, Path]:
        if ours:
            part, given = part_of(component, tmp_path, "tensorrt", scheme)
        else:
            part, given = staged(component, tmp_path, exporter.export(component, tmp_path / f"{component.name}.onnx", scheme="fp32"), "tensorrt", scheme)
        return part, given, *fake_trtexec(tmp_path / "bin")

    return make


def calls(log: Path) -> list[list[str]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_trtexec__a_file_of_ours_is_built_as_its_description_says(trt):
    part, given, program, log = trt(linear_component(), "fp32", ours=True)
    session = runtimes.open_part(part, None, {"trtexec": str(program)})
    build = calls(log)[0]
    assert {"--stronglyTyped", "--noTF32", "--onnx=head.onnx", "--skipInference", "--profilingVerbosity=detailed"} <= set(build)
    assert "--minShapes=x:1x8" in build and "--fp16" not in build
    session.run()
    np.testing.assert_allclose(array(session.outputs()["y"]), expected(linear_component(), given)[0], atol=1e-5)
    timed = calls(log)[-1]
    assert "--shapes=x:3x8" in timed and "--loadInputs=x:x.bin" in timed and "--loadEngine=head.onnx.engine" in timed
    assert session.load_ms == pytest.approx(12.5) and session.versions == {"tensorrt": "10.3.0"} and "copies" in session.notes[0]


def test_trtexec__latency_is_of_copies_and_computing_together(trt):
    part, _, program, log = trt(conv_component(), "fp32", ours=True)
    session = runtimes.open_part(part, None, {"trtexec": str(program)})
    found = session.samples(warmup=3, repeats=25, max_seconds=8, mode="count")
    assert found.values == [2.75] * 25 and found.warmup == 7
    assert {"--iterations=25", "--duration=0"} <= set(calls(log)[-1]) and not [a for a in calls(log)[-1] if a.startswith("--shapes")]
    assert len(session.samples(warmup=3, repeats=25, max_seconds=2, mode="time").values) == 200
    begun, ended, count = session.window(1.0)
    assert (ended - begun, count) == (pytest.approx(1.0), 100)


@pytest.mark.parametrize(("scheme", "flags"), [("fp16", {"--fp16"}), ("w8a8_static", {"--int8", "--fp16"}), ("fp32", {"--noTF32"}), ("bf16", {"--bf16"})])
def test_trtexec__another_s_file_is_built_with_the_flags_of_its_scheme(trt, scheme, flags):
    part, _, program, log = trt(linear_component(), scheme, ours=False)
    session = runtimes.open_part(part, None, {"trtexec": str(program)})
    build = set(calls(log)[0])
    assert flags <= build and "--stronglyTyped" not in build and {"--minShapes=x:3x8", "--optShapes=x:3x8", "--maxShapes=x:3x8"} <= build
    assert session.facts().precision == ("fp16" if "--fp16" in flags else "fp32")


def test_trtexec__layers_and_precision_are_the_engine_s(trt):
    part, _, program, log = trt(conv_component(), "fp32", ours=True)
    session = runtimes.open_part(part, None, {"trtexec": str(program)})
    assert session.facts() == runtimes.Facts("fp32", {"Reformat:fp32": 1, "Convolution:fp32": 1}, [])
    assert session.layers()[1] == {"name": "node_conv2d + node_gelu", "op": "Convolution", "ms": 1.75, "precision": "fp32"}
    assert "--separateProfileRun" in calls(log)[-1]


def test_trtexec__an_engine_is_built_once(trt):
    part, _, program, log = trt(conv_component(), "fp32", ours=True)
    for _ in range(2):
        runtimes.open_part(part, None, {"trtexec": str(program)})
    assert len([c for c in calls(log) if c[0].startswith("--onnx")]) == 1


def test_trtexec__its_reason_is_told_and_no_engine_is_left(trt, tmp_path):
    part, _, program, _ = trt(conv_component(), "fp32", ours=True)
    (tmp_path / "bin" / "refuse").touch()
    with pytest.raises(Trouble, match="no importer for node Foo"):
        runtimes.open_part(part, None, {"trtexec": str(program)})
    assert not list(tmp_path.glob("*.engine"))


def test_trtexec__more_prompts_than_the_engine_takes_are_refused(trt):
    part, _, program, _ = trt(linear_component(), "fp32", ours=True)
    part.inputs[0].shape = [500, 8]
    with pytest.raises(Trouble, match="along axis 0 of x, and is given 500"):
        runtimes.open_part(part, None, {"trtexec": str(program)})


def test_trtexec__is_looked_for_where_it_is_told_to_be(tmp_path):
    with pytest.raises(Trouble, match=r"trtexec is not on the board, nor at /nowhere/trtexec") as e:
        runtimes.program("tensorrt", {"trtexec": "/nowhere/trtexec"})
    assert "tools" in (e.value.hint or "")


@pytest.mark.parametrize(("digits", "version"), [("8502", "8.5.2"), ("8601", "8.6.1"), ("100300", "10.3.0"), ("101201", "10.12.1")])
def test_trtexec__tells_its_version_in_digits(digits, version):
    assert _version(digits) == version


def test_without_trtexec__onnxruntime_with_tensorrt_does(tmp_path, monkeypatch):
    part, _ = part_of(conv_component(), tmp_path, "tensorrt", "fp32")
    with pytest.raises(Trouble, match="trtexec is not on the board"):
        runtimes.open_part(part, None, {})
    program, _ = fake_trtexec(tmp_path / "bin")
    assert isinstance(runtimes.open_part(part, None, {"trtexec": str(program)}), TrtexecSession)


def test_trtexec__a_whole_job_in_an_old_python(tmp_path):
    """No numpy is needed there, and no runtime in Python."""
    component = Component("head", torch.nn.Linear(2, 2).eval(), {"x": torch.randn(2, 2)}, ("y",))
    program, _ = fake_trtexec(tmp_path / "bin", python=oldest() or sys.executable)
    (tmp_path / "m0").mkdir()
    for name, data in (("head.onnx", b"not looked at"), ("x.bin", b"\0" * 16)):
        (tmp_path / "m0" / name).write_bytes(data)
    part = {"format": "tensorrt", "scheme": "fp16", "file": "m0/head.onnx", "files": ["m0/head.onnx"], "outputs": list(component.outputs), "calls": 3,
            "inputs": [{"name": "x", "dtype": "float32", "shape": [2, 2], "file": "m0/x.bin"}]}
    job = {"schema": "edgekd.job/1", "models": [{"id": "a", "components": {"head": part}, "together": ["head"]}], "repeats": 12, "layers": True,
           "tools": {"trtexec": str(program)}}
    (tmp_path / "job.json").write_text(json.dumps(job))
    boards.bundle(tmp_path / boards.RUNNER)
    done = subprocess.run([oldest() or sys.executable, str(tmp_path / boards.RUNNER), str(tmp_path / "job.json")], capture_output=True, text=True, check=False,
                          env={"PATH": "/usr/bin:/bin"})
    assert json.loads(done.stdout)["failed"] == [], done.stderr + (tmp_path / "result.json").read_text()
    found = json.loads((tmp_path / "result.json").read_text())
    head = found["models"][0]["components"]["head"]
    assert head["samples_ms"] == [8.25] * 4 and head["executed_precision"] == "fp16" and head["load_ms"] == pytest.approx(12.5)
    assert found["circumstances"]["versions"]["tensorrt"] == "10.3.0" and found["models"][0]["together_ms"] == [8.25] * 4
    assert len(head["layers"]) == 2 and found["models"][0]["peak_memory_bytes"] > 1 << 20
