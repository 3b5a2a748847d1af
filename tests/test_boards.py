from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from board_fakes import Board, fake_job, fake_onnxruntime, fake_trtexec
from edgekd.export.onnx import exporter
from tiny import fake_artifact, tiny_sam

from edgekd.errors import EdgekdError
from edgekd.exporting import export_model
from edgekd.measurement import Circumstances
from edgekd.profiling import Profile, boards, drivers
from edgekd.profiling.bare import model_file
from edgekd.profiling.boards import Asked
from edgekd.profiling.drivers import python as driver
from edgekd.profiling.profile import profile_many
from edgekd.profiling.transport import Completed, Lost
from edgekd.runtime import open_artifact
from edgekd.target import Device, Support, Target

QUICK = Asked(warmup=1, repeats=5, threads=1, max_seconds=0.5, memory=False)


def target(**device: Any) -> Target:
    return Target(name="my_board", description="a test", device=Device(transport="ssh", how="a test", url="ssh://me@board", **device),
                  formats={"onnx": Support(schemes=["fp32"])})


@pytest.fixture(scope="module")
def art(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("art") / "art"
    export_model(tiny_sam(), folder, format="onnx", scheme="fp32")
    return folder


# The runner as one file ------------------------------------------------------------------------------------------------------------------------------


def test_bundle__is_one_file_of_the_same_bytes_every_time(tmp_path):
    one, two = boards.bundle(tmp_path / "a.pyz"), boards.bundle(tmp_path / "b.pyz")
    assert hashlib.sha256(one.read_bytes()).digest() == hashlib.sha256(two.read_bytes()).digest() and one.stat().st_size < 200_000
    names = zipfile.ZipFile(one).namelist()
    assert "__main__.py" in names and "board/runtimes/tensorrt.py" in names and not any("pyc" in n for n in names)
    assert subprocess.run([sys.executable, str(one), "--help"], capture_output=True, check=False, cwd=tmp_path).returncode == 0


# Staging ---------------------------------------------------------------------------------------------------------------------------------------------


def test_stage__feeds_what_the_model_is_fed_here(art, tmp_path):
    job = boards.stage([art], Asked(threads=1, prompts=3), target(tools={"trtexec": "/opt/trtexec"}), tmp_path / "s")
    assert json.loads((tmp_path / "s" / "job.json").read_text()) == job and job["tools"] == {"trtexec": "/opt/trtexec"}
    model = job["models"][0]
    assert model["id"] == "tiny-64-onnx-fp32" and model["together"] == ["encoder", "decoder"]
    shapes = {i["name"]: (i["shape"], i["dynamic"]) for i in model["components"]["decoder"]["inputs"]}
    assert shapes["point_coords"] == ([3, 1, 2], True) and shapes["image_embeddings"] == ([1, 32, 4, 4], False)
    given = {name: {i["name"]: np.fromfile(tmp_path / "s" / i["file"], i["dtype"]).reshape(i["shape"]) for i in part["inputs"]}
             for name, part in model["components"].items()}
    opened = open_artifact(art, threads=1)
    embedding = opened.session("encoder").run(given["encoder"])["image_embeddings"]
    np.testing.assert_array_equal(given["decoder"]["image_embeddings"], embedding)
    assert (tmp_path / "s" / "m0" / "encoder.onnx").read_bytes() == (art / "encoder.onnx").read_bytes()


def test_stage__a_signature_of_one_prompt_is_called_for_each(tmp_path):
    export_model(tiny_sam(), tmp_path / "sam", format="onnx", scheme="fp32", decoder_signature="sam")
    job = boards.stage([tmp_path / "sam"], Asked(threads=1, prompts=4), "host", tmp_path / "s")
    decoder = job["models"][0]["components"]["decoder"]
    assert decoder["calls"] == 4 and {i["name"] for i in decoder["inputs"]} >= {"point_coords", "orig_im_size"}
    assert boards._prompts(job["models"][0]) == 4


def test_stage__without_the_runtime_answers_are_seeded(art, tmp_path, monkeypatch):
    from edgekd.profiling import jobs

    monkeypatch.setattr(jobs, "_session", lambda model, part: None)
    found = [boards.stage([art], Asked(threads=1, prompts=2), "host", tmp_path / name) for name in "ab"]
    assert found[0] == found[1] and found[0]["models"][0]["components"]["decoder"]["inputs"][0]["shape"] == [1, 32, 4, 4]
    name = found[0]["models"][0]["components"]["decoder"]["inputs"][0]["file"]
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_stage__two_models_of_one_name_are_kept_apart(art, tmp_path):
    job = boards.stage([art, art], QUICK, "host", tmp_path)
    assert [m["id"] for m in job["models"]] == ["tiny-64-onnx-fp32", "tiny-64-onnx-fp32 (2)"]
    assert job["models"][1]["components"]["encoder"]["file"] == "m1/encoder.onnx"


def test_stage__a_damaged_artifact_is_refused(tmp_path):
    fake_artifact(tmp_path / "a")
    (tmp_path / "a" / "encoder.onnx").write_bytes(b"x")
    with pytest.raises(EdgekdError, match=r"encoder\.onnx"):
        boards.stage([tmp_path / "a"], QUICK, "host", tmp_path / "s")


# On a board ------------------------------------------------------------------------------------------------------------------------------------------


def test_profile_many__on_a_board_gives_the_document_of_the_host(art, tmp_path):
    device = Board(tmp_path / "board")
    found = profile_many([art, art], target(), transport=device, warmup=1, repeats=6, threads=1, max_seconds=0.5, memory=True, layers=True)
    assert len(found) == 2 and device.asked == [["onnxruntime", "numpy"]]
    here = profile_many([art], "host", repeats=3, threads=1, max_seconds=0.5, memory=False)[0]
    for one in found:
        assert (one.id, one.target, one.transport, one.prompts) == (here.id, "my_board", "ssh", 1)
        assert one.latency_ms.n == 6 and one.latency_ms.provenance == "measured" and one.size_bytes == here.size_bytes
        assert one.executed_precision == "fp32" == one.circumstances.precision_executed and one.circumstances.threads == 1
        for name, part in one.components.items():
            assert part.executed_ops == here.components[name].executed_ops and part.size_bytes == here.components[name].size_bytes
        assert one.answers is not None and max(one.answers.values()) < 1e-5 and set(one.answers) == {"encoder", "decoder"}
        assert one.peak_memory_bytes is not None and one.layers is not None and len(one.layers) > 10 and one.fell_back == {}
        assert sum(x.share for x in one.layers if x.component == "encoder") == pytest.approx(1)
    assert Profile.load(found[0].save(tmp_path / "p.json")) == found[0]


def test_profile_many__a_model_file_alone(art, tmp_path):
    found = profile_many([model_file(art / "encoder.onnx")], target(), transport=Board(tmp_path / "board"), repeats=5, threads=1, max_seconds=0.5, memory=False)[0]
    assert found.id == "encoder.onnx" and found.inputs == {"images": "1x3x64x64:float32"} and found.components["model"].latency_ms.n == 5


def test_profile_many__a_jetson_by_trtexec(tmp_path):
    """The fake trtexec computes with onnxruntime, and so does what stands in for TensorRT here: the answers are compared."""
    export_model(tiny_sam(), tmp_path / "art", format="tensorrt", scheme="fp32")
    program, log = fake_trtexec(tmp_path / "bin")
    found = profile_many([tmp_path / "art"], target(tools={"trtexec": str(program)}), transport=Board(tmp_path / "board"), repeats=12, memory=False)[0]
    assert found.latency_ms.p50 == pytest.approx(5.5) and found.components["encoder"].latency_ms.p50 == pytest.approx(2.75)
    assert found.load_ms == pytest.approx(25.0) and found.circumstances.versions["tensorrt"] == "10.3.0"
    assert found.answers is not None and max(found.answers.values()) < 1e-5 and "--stronglyTyped" in log.read_text()


def test_a_board_that_computes_something_else__is_an_error(art, tmp_path):
    job = boards.stage([art], QUICK, "host", tmp_path)
    drawn = np.random.default_rng(0).standard_normal((1, 32, 4, 4)).astype(np.float32)
    (tmp_path / "wrong.bin").write_bytes(drawn.tobytes())
    told = {"executed_precision": "fp32", "answers": {"image_embeddings": "wrong.bin"}}
    result = {"models": [{"id": job["models"][0]["id"], "components": {"encoder": told}, "error": None}]}
    with pytest.raises(EdgekdError, match="the board computes something else: its encoder"):
        boards.compared(job, result, tmp_path)
    ours = open_artifact(art, threads=1).session("encoder").run({"images": np.fromfile(tmp_path / job["models"][0]["components"]["encoder"]["inputs"][0]["file"],
                                                                                      np.float32).reshape(1, 3, 64, 64)})["image_embeddings"]
    for wrong in (ours * np.nan, ours[..., :2], ours * 1.02):
        (tmp_path / "wrong.bin").write_bytes(np.ascontiguousarray(wrong).tobytes())
        with pytest.raises(EdgekdError, match="something else"):
            boards.compared(job, result, tmp_path)
    (tmp_path / "wrong.bin").write_bytes((ours * 1.002).astype(np.float32).tobytes())
    assert boards.compared(job, result, tmp_path)[job["models"][0]["id"]]["encoder"] == pytest.approx(0.002, rel=0.05)
    told["executed_precision"] = "int8+fp32"
    (tmp_path / "wrong.bin").write_bytes((ours * 1.1).astype(np.float32).tobytes())
    assert boards.compared(job, result, tmp_path)[job["models"][0]["id"]]["encoder"] == pytest.approx(0.1, rel=0.05)


# Faults ----------------------------------------------------------------------------------------------------------------------------------------------


def staged(folder: Path, *does: str) -> dict[str, Any]:
    job: dict[str, Any] = json.loads(fake_job(folder, *does).read_text())
    return job


def lost() -> None:
    raise Lost("the connection broke", where="board", hint="look at the network")


class Breaking(Board):
    """The connection breaks after a program has run: its result is on the board, and its end was not heard."""

    def run(self, command, *, timeout_s):
        done = super().run(command, timeout_s=timeout_s)
        if len(self.runs) == 2:
            lost()
        return done


def test_a_lost_connection__goes_on_from_what_is_finished(tmp_path):
    job = staged(tmp_path / "s", "fine", "fine", "fine")
    device = Breaking(tmp_path / "board", env=fake_onnxruntime(tmp_path), faults=[None, None, lost])
    result = drivers.measure(device, job, tmp_path / "s", target())
    assert result["complete"] and [m["error"] for m in result["models"]] == [None] * 3
    opened = (tmp_path / "opened.log").read_text().split()
    assert opened.count("m1") == opened.count("m0") == opened.count("m2"), "the one whose end was not heard is not measured again"
    assert np.frombuffer((tmp_path / "s" / result["models"][2]["components"]["model"]["answers"]["y"]).read_bytes(), "<f4")[-1] == 10


def test_a_connection_lost_for_good__keeps_what_is_finished(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    job = staged(tmp_path / "s", "fine", "fine")
    device = Board(tmp_path / "board", env=fake_onnxruntime(tmp_path), faults=[None, *[lost] * 10])
    with pytest.raises(driver.Interrupted, match="1 of 2 models are finished, and kept in") as e:
        drivers.measure(device, job, tmp_path / "s", target())
    assert e.value.hint == "look at the network" and len(device.runs) == 1 + 1 + driver.TRIES
    kept = json.loads(next((tmp_path / "cache/edgekd/partial").iterdir()).read_text())
    assert [m["id"] for m in kept["models"]] == ["model0"] and kept["complete"] is False and e.value.partial == kept
    assert str(tmp_path / "cache") in e.value.what


def test_a_connection_lost_for_good__gives_the_profiles_there_are(art, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    device = Board(tmp_path / "board", faults=[None, *[lost] * 10])
    with pytest.raises(boards.Partly, match="connection broke") as e:
        boards.profile_many(device, [art, art], target(), QUICK)
    assert [p.id for p in e.value.profiles] == ["tiny-64-onnx-fp32"] and e.value.profiles[0].answers


def test_nothing_at_all__is_the_connection_s_own_error(art, tmp_path):
    with pytest.raises(EdgekdError, match="connection broke") as e:
        boards.profile_many(Board(tmp_path / "board", faults=[lost] * 10), [art], target(), QUICK)
    assert not isinstance(e.value, boards.Partly)


def test_a_runner_that_ends_without_a_word__is_started_again(tmp_path):
    class Silent(Board):
        def run(self, command, *, timeout_s):
            if len(self.runs) < 2:
                self.runs.append(list(command))
                return Completed(-9, "", "Killed")
            return super().run(command, timeout_s=timeout_s)

    job = staged(tmp_path / "s", "fine")
    device = Silent(tmp_path / "board", env=fake_onnxruntime(tmp_path))
    assert drivers.measure(device, job, tmp_path / "s", target())["complete"] and len(device.runs) == 3


def test_a_refused_job__is_not_tried_again(tmp_path):
    job = staged(tmp_path / "s", "fine")
    (tmp_path / "s" / "job.json").write_text('{"schema": "edgekd.job/9"}')
    device = Board(tmp_path / "board", env=fake_onnxruntime(tmp_path))
    with pytest.raises(driver.Refused, match=r"edgekd\.job/9"):
        drivers.measure(device, job, tmp_path / "s", target())
    assert len(device.runs) == 1


def test_a_model_that_fails__is_told_with_its_reason_and_the_others_are_kept(art, tmp_path):
    broken = tmp_path / "broken"
    export_model(tiny_sam(), broken, format="onnx", scheme="fp32")
    stage = boards.stage

    def spoil(*a: Any) -> Any:
        job = stage(*a)
        (a[3] / job["models"][1]["components"]["decoder"]["file"]).unlink()  # a link to the artifact's own
        (a[3] / job["models"][1]["components"]["decoder"]["file"]).write_bytes(b"no model")
        return job

    with pytest.MonkeyPatch.context() as m, pytest.raises(boards.Partly, match="does not run on 'my_board': decoder: onnxruntime cannot open the file") as e:
        m.setattr(boards, "stage", spoil)
        boards.profile_many(Board(tmp_path / "board"), [art, broken], target(), QUICK)
    assert e.value.where == broken and len(e.value.profiles) == 1 and "1 of 2 were measured" in str(e.value)


def test_results__that_are_not_complete_or_of_another_job(art, tmp_path):
    job = boards.stage([art], QUICK, "host", tmp_path)
    id = job["models"][0]["id"]
    told = {"schema": boards.RESULT, "circumstances": Circumstances.capture().model_dump(mode="json")}
    assert boards.profiles(job, told | {"models": []}, [art], "host", "by hand") == []
    assert boards.profiles(job, told | {"models": [{"id": id, "components": {}, "error": {"what": "x", "hint": None}}]}, [art], "host", "by hand") == []
    with pytest.raises(EdgekdError, match="not complete"):
        boards.profiles(job, told | {"models": [{"id": id, "components": {"encoder": {}}, "error": None}]}, [art], "host", "by hand")


def test_what_to_know_of_the_numbers__is_said(capsys):
    boards._say({"notes": ["a: energy is that above idle"], "circumstances": {"throttled": ["too hot"]},
                 "models": [{"id": "a", "components": {"encoder": {"steady": False}, "decoder": {"steady": True}}}]})
    said = capsys.readouterr().err
    assert "above idle" in said and "slowed down while it was measured: too hot" in said and "runs of its encoder did not become steady" in said


def test_profiles__take_from_the_manifest_what_a_runtime_does_not_tell(art, tmp_path):
    job = boards.stage([art], QUICK, "host", tmp_path)
    part = {"samples_ms": [1.0, 2.0], "load_ms": 3.0, "executed_precision": None, "executed_ops": {}, "fell_back": ["Gelu on CPU"]}
    one = {"id": job["models"][0]["id"], "components": {"encoder": part, "decoder": part}, "together_ms": [2.0, 4.0], "peak_memory_bytes": 7, "energy_mj": 1.5, "error": None}
    told = {"models": [one], "circumstances": Circumstances.capture().model_dump(mode="json") | {"throttled": ["hot"], "clock_mhz": [1.0, 2.0]}}
    found = boards.profiles(job, told, [art], target(), "by hand")[0]
    manifest = open_artifact(art).manifest
    assert found.executed_precision == "fp32" and found.components["encoder"].executed_ops == manifest.components["encoder"].executed_ops
    assert (found.energy_mj, found.peak_memory_bytes, found.transport) == (1.5, 7, "by hand") and found.fell_back["decoder"] == ["Gelu on CPU"]
    assert found.circumstances.throttled == ["hot"] and found.answers is None and found.layers is None


# Which Python ----------------------------------------------------------------------------------------------------------------------------------------


class Pythons:
    """A board whose Pythons have some of what is needed."""

    name = "ssh"

    def __init__(self, *has: str) -> None:
        self.has, self.asked = set(has), []

    def python(self, needs):
        self.asked.append(list(needs))
        if set(needs) - self.has:
            raise EdgekdError("no Python there has " + ", ".join(needs))
        return "/opt/python"


def job_of(*formats: str, **tools: str) -> dict[str, Any]:
    return {"models": [{"id": f, "components": {"model": {"format": f}}} for f in formats], "tools": tools}


def test_python__alternatives_of_a_runtime_are_asked_for_in_turn():
    board = Pythons("tflite_runtime.interpreter", "numpy")
    assert driver.choose(board, job_of("litert"), target()) == "/opt/python"
    assert board.asked == [["ai_edge_litert.interpreter", "numpy"], ["tflite_runtime.interpreter", "numpy"]]


def test_python__one_that_has_some_is_better_than_none():
    assert driver.choose(Pythons("onnxruntime", "numpy"), job_of("onnx", "openvino"), target()) == "/opt/python"
    with pytest.raises(EdgekdError, match="onnxruntime, openvino"):
        driver.choose(Pythons("numpy"), job_of("onnx", "openvino"), target())


def test_python__programs_need_none_of_its_modules():
    board = Pythons()
    assert driver.choose(board, job_of("tensorrt"), target()) == driver.choose(board, job_of("executorch", executor_runner="/x"), target()) == "/opt/python"
    assert board.asked == [[], []]


def test_limit__leaves_time_for_engines():
    assert driver.limit(job_of("tensorrt")) > driver.limit(job_of("onnx")) + 3600


def test_a_file_of_the_host__is_not_changed_by_staging(tmp_path):
    """Staged files may be second names of the artifact's own: the board's folder is a copy, and nothing here writes into them."""
    export_model(tiny_sam(), tmp_path / "art", format="onnx", scheme="fp32")
    before = (tmp_path / "art" / "encoder.onnx").read_bytes()
    boards.profile_many(Board(tmp_path / "board"), [tmp_path / "art"], target(), QUICK)
    assert (tmp_path / "art" / "encoder.onnx").read_bytes() == before and exporter.files(tmp_path / "art" / "encoder.onnx")
