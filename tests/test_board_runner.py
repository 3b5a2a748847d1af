from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from board_fakes import fake_job, fake_onnxruntime

RUNNER = "edgekd_runner.pyz"


def run(job: Path, env: dict[str, str], *more: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the line on stdout, stderr."""
    done = subprocess.run([sys.executable, str(job.parent / RUNNER), str(job), *more], capture_output=True, text=True, check=False, env=env, timeout=300)
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[0]) if len(lines) == 1 else {"stdout": done.stdout}, done.stderr


def result(job: Path) -> dict[str, Any]:
    return json.loads((job.parent / "result.json").read_text())


def wait_for(what, seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    """Whether a process is no more, or a zombie that nobody has waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_job__is_measured_and_told_in_one_line(tmp_path):
    job = fake_job(tmp_path, "fine", layers=True, memory=True)
    code, said, _ = run(job, fake_onnxruntime(tmp_path))
    assert (code, said["complete"], said["failed"], said["finished"]) == (0, True, [], 1)
    found = result(job)
    model = found["models"][0]
    part = model["components"]["model"]
    assert len(part["samples_ms"]) == len(model["together_ms"]) == 5 and min(part["samples_ms"]) > 0
    assert part["executed_precision"] == "fp32" and part["executed_ops"] == {"Conv": 1, "Gelu": 1} and part["fell_back"] == []
    assert [(r["name"], r["op"], r["precision"]) for r in part["layers"]] == [("conv", "Conv", "fp32"), ("act", "Gelu", "fp32")]
    assert [r["ms"] for r in part["layers"]] == pytest.approx([0.1, 0.2])
    assert np.frombuffer((tmp_path / part["answers"]["y"]).read_bytes(), "<f4").tolist() == [0, 2, 4, 6, 8, 10]
    assert 5 << 20 < model["peak_memory_bytes"] < 1 << 30 and model["energy_mj"] is None
    assert found["circumstances"]["threads"] == 1 and found["circumstances"]["python"].count(".") == 2
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("edgekd-") or p.name.endswith(".part")]


def test_models__that_fail_do_not_stop_the_others(tmp_path):
    job = fake_job(tmp_path, "refuse", "crash", "late", "hang", "fine", hang_seconds=8)
    env = fake_onnxruntime(tmp_path)
    code, said, _ = run(job, env)
    assert (code, said["complete"], said["failed"]) == (0, True, ["model0", "model1", "model2", "model3"])
    errors = [m["error"] and m["error"]["what"] for m in result(job)["models"]]
    assert "cannot open the file: no kernel for Foo" in errors[0]
    assert "SIGSEGV while first run of the model: about to crash" in errors[1]
    assert "out of memory in run 9" in errors[2] and errors[2].startswith("model:")
    assert "hangs" in errors[3] and "first run" in errors[3] and errors[4] is None
    assert gone(int((tmp_path / "hanging.pid").read_text()))


def test_finished_models__are_not_measured_again(tmp_path):
    job = fake_job(tmp_path, "fine", "fine", "fine")
    env = fake_onnxruntime(tmp_path)
    code, said, _ = run(job, env, "--most", "2")
    assert (code, said["complete"], said["finished"]) == (0, False, 2) and result(job)["complete"] is False
    kept = result(job)["models"]
    before = (tmp_path / "opened.log").read_text()
    code, said, _ = run(job, env)
    assert said["complete"] and result(job)["models"][:2] == kept
    assert set((tmp_path / "opened.log").read_text()[len(before):].split()) == {"m2"}


def test_sigterm__leaves_what_is_finished_and_nothing_running(tmp_path):
    job = fake_job(tmp_path, "fine", "hang", "fine")
    env = fake_onnxruntime(tmp_path)
    process = subprocess.Popen([sys.executable, str(tmp_path / RUNNER), str(job)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for((tmp_path / "hanging.pid").exists)
    wait_for(lambda: (tmp_path / "hanging.pid").read_text())
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and not out and "stopped" in err
    assert gone(int((tmp_path / "hanging.pid").read_text()))
    lines = [json.loads(line) for line in (tmp_path / "result.partial.jsonl").read_text().splitlines()]
    assert [line["finished"]["id"] for line in lines if "finished" in line] == ["model0"] and lines[-1]["stopped"] == "model1"
    (tmp_path / "m1" / "model.onnx").write_text("fine")
    _, said, _ = run(job, env)
    assert said["complete"] and said["failed"] == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ends a process with its parent")
def test_kill__of_the_runner_ends_what_it_started(tmp_path):
    job = fake_job(tmp_path, "hang")
    process = subprocess.Popen([sys.executable, str(tmp_path / RUNNER), str(job)], env=fake_onnxruntime(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for((tmp_path / "hanging.pid").exists)
    wait_for(lambda: (tmp_path / "hanging.pid").read_text())
    process.kill()
    process.wait()
    wait_for(lambda: gone(int((tmp_path / "hanging.pid").read_text())), 30)


def test_a_model__that_takes_the_board_down_is_given_up(tmp_path):
    job = fake_job(tmp_path, "fine", "fine")
    env = fake_onnxruntime(tmp_path)
    run(job, env, "--most", "1")
    key = json.loads((tmp_path / "result.partial.jsonl").read_text().splitlines()[0])["job"]
    with open(tmp_path / "result.partial.jsonl", "a") as f:
        f.write(f'{{"job": "{key}", "started": "model1"}}\n' * 3)
    _, said, _ = run(job, env)
    assert said["complete"] and said["failed"] == ["model1"] and "stopped answering" in result(job)["models"][1]["error"]["what"]


def test_energy__is_that_above_idle(tmp_path):
    """A tegrastats that tells 2 W until a model is opened and 5 W from then on."""
    job, env = fake_job(tmp_path, "fine"), fake_onnxruntime(tmp_path)
    program = tmp_path / "bin" / "tegrastats"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nwhile :; do if [ -e {env['FAKE_LOG']} ]; then echo 'VDD_IN 5000mW/4000mW'; else echo 'VDD_IN 2000mW/2000mW'; fi; sleep 0.05; done\n")
    program.chmod(0o755)
    run(job, {**env, "PATH": f"{program.parent}:{env['PATH']}"})
    found = result(job)
    assert found["models"][0]["error"] is None and found["models"][0]["energy_mj"] > 0
    assert any("tegrastats told 5000 mW on average" in note and "2000 mW idle" in note for note in found["notes"])
    assert subprocess.run(["pgrep", "-f", str(program)], capture_output=True, check=False).returncode == 1


def test_a_gpu__nodes_left_to_the_cpu_are_named(tmp_path):
    job = fake_job(tmp_path, "half")
    env = {**fake_onnxruntime(tmp_path), "FAKE_PROVIDERS": "TensorrtExecutionProvider,CUDAExecutionProvider,CPUExecutionProvider"}
    run(job, env)
    found = result(job)
    part = found["models"][0]["components"]["model"]
    assert part["fell_back"] == ["act (Gelu) on CPUExecutionProvider"] and part["executed_precision"] == "fp16"
    assert "CUDAExecutionProvider: times include the copies" in found["notes"][0]


def test_a_gpu__that_onnxruntime_silently_leaves_out_is_an_error(tmp_path):
    job = fake_job(tmp_path, "silently")
    run(job, {**fake_onnxruntime(tmp_path), "FAKE_PROVIDERS": "CUDAExecutionProvider,CPUExecutionProvider"})
    assert "took CPUExecutionProvider where CUDAExecutionProvider was asked for" in result(job)["models"][0]["error"]["what"]


def test_several_calls__make_one_use(tmp_path):
    job = fake_job(tmp_path, "late")
    text = json.loads(job.read_text())
    text["models"][0]["components"]["model"]["calls"] = 9
    job.write_text(json.dumps(text))
    run(job, fake_onnxruntime(tmp_path))
    assert "model: it cannot be run: out of memory in run 9" in result(job)["models"][0]["error"]["what"]


@pytest.mark.parametrize("text", ["{", '{"schema": "edgekd.job/9"}'])
def test_a_wrong_job__is_a_clear_error(tmp_path, text):
    job = fake_job(tmp_path, "fine")
    job.write_text(text)
    code, said, err = run(job, fake_onnxruntime(tmp_path))
    assert code == 1 and said["error"]["hint"] and "hint:" in err and "Traceback" not in err


def test_no_job__is_a_clear_error(tmp_path):
    fake_job(tmp_path, "fine")
    done = subprocess.run([sys.executable, str(tmp_path / RUNNER)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "no job was given" in done.stderr


def test_results__that_cannot_be_written_are_a_clear_error(tmp_path):
    if os.geteuid() == 0:
        job = fake_job(tmp_path, "fine")
        (tmp_path / "result.partial.jsonl").mkdir()
    else:
        job = fake_job(tmp_path, "fine")
        tmp_path.chmod(0o500)
    code, said, _ = run(job, fake_onnxruntime(tmp_path / "m0") if os.geteuid() == 0 else {"PATH": "/usr/bin:/bin"})
    tmp_path.chmod(0o700)
    assert code == 1 and "cannot keep results" in said["error"]["what"]


def test_can__says_what_runs_here_and_why_not(tmp_path):
    fake_job(tmp_path, "fine")
    env = fake_onnxruntime(tmp_path)
    done = subprocess.run([sys.executable, str(tmp_path / RUNNER), "--can", "onnx"], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0 and json.loads(done.stdout)["formats"] == {"onnx": None}
    done = subprocess.run([sys.executable, str(tmp_path / RUNNER), "--can", "onnx", "magic", "tensorrt"], capture_output=True, text=True, check=False, env=env)
    told = json.loads(done.stdout)["formats"]
    assert done.returncode == 1 and told["onnx"] is None and "magic" in told["magic"] and "trtexec is not on the board" in told["tensorrt"]
