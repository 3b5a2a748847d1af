from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from PIL import Image
from tiny import fake_artifact, tiny_sam

from edgekd.errors import EdgekdError, UsageError
from edgekd.exporting import export_model
from edgekd.profiling import Profile, everything, latency, profile_many, runner
from edgekd.profiling.eager import profile_torch
from edgekd.profiling.everything import profile_everything
from edgekd.profiling.footprint import folder_bytes, peak_memory_bytes
from edgekd.profiling.transport import Completed, reach
from edgekd.profiling.transport.local import Local
from edgekd.tasks.promptable.everything import BATCH


class FakeClock:
    """Time that passes only when a call says so."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, *seconds: float):
        """A call that takes the given times in turn, the last one from then on."""
        left = list(seconds)

        def run() -> None:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]
        return run


def test_samples_are_milliseconds_of_the_call():
    clock = FakeClock()
    samples = latency.measure(clock.call("a", 0.010), repeats=12, clock=clock)
    assert samples.values == pytest.approx([10.0] * 12)
    assert samples.steady and samples.warmup == latency.WINDOW


def test_warm_up_goes_on_until_steady():
    clock = FakeClock()
    samples = latency.warm_up(clock.call("a", 1.0, 0.5, 0.2, 0.1, 0.1, 0.01), clock=clock)
    assert samples.steady and samples.warmup == 5 + latency.WINDOW


def test_warm_up_is_bounded_when_nothing_ever_settles():
    clock = FakeClock()
    wild = [0.01, 0.05] * 50
    samples = latency.warm_up(clock.call("a", *wild), most=20, clock=clock)
    assert samples.warmup == 20 and not samples.steady


def test_warm_up_is_bounded_in_time_but_not_below_its_least():
    clock = FakeClock()
    samples = latency.warm_up(clock.call("a", 100.0), least=3, max_seconds=1.0, clock=clock)
    assert samples.warmup == 3


def test_no_cold_run_is_counted():
    clock = FakeClock()
    samples = latency.measure(clock.call("a", 9.0, 0.001), repeats=15, clock=clock)
    assert max(samples.values) == pytest.approx(1.0)


def test_turns_alternate_so_that_drift_hits_all_alike():
    clock = FakeClock()
    calls = {name: clock.call(name, 0.001) for name in "AB"}
    found = latency.interleave(calls, repeats=2 * latency.BURST, clock=clock)
    order = "".join(clock.log[-4 * (latency.BURST + 1):])
    turn = latency.BURST + 1
    assert order == "A" * turn + "B" * turn + "B" * turn + "A" * turn
    assert {len(s.values) for s in found.values()} == {2 * latency.BURST}


def test_under_linear_drift_the_ratio_stays_right():
    clock = FakeClock()

    def drifting(cost: float):
        def run() -> None:
            clock.now += cost * (1 + clock.now / 50)
        return run

    found = latency.interleave({"A": drifting(0.01), "B": drifting(0.02)}, repeats=60, clock=clock)
    ratio = sum(found["B"].values) / sum(found["A"].values)
    assert ratio == pytest.approx(2.0, rel=0.02)


def test_a_slow_call_stops_early_with_enough_samples():
    clock = FakeClock()
    found = latency.interleave({"slow": clock.call("s", 5.0), "fast": clock.call("f", 0.001)}, repeats=30, max_seconds=8.0, clock=clock)
    assert len(found["slow"].values) == latency.MIN_SAMPLES
    assert len(found["fast"].values) == 30


@pytest.mark.parametrize("repeats", [1, 2, 4, 10, 31])
def test_exactly_as_many_samples_as_asked(repeats):
    clock = FakeClock()
    assert len(latency.measure(clock.call("a", 0.002), repeats=repeats, clock=clock).values) == repeats


def test_peak_memory_is_the_high_water_mark(tmp_path):
    (tmp_path / "status").write_text("Name:\tx\nVmPeak:\t  99 kB\nVmHWM:\t  1234 kB\n")
    assert peak_memory_bytes(tmp_path / "status") == 1234 * 1024
    assert peak_memory_bytes(tmp_path / "missing") > 1 << 20


def test_peak_memory_of_a_fresh_process_is_its_own():
    ballast = bytearray(300 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    child = "from edgekd.profiling.footprint import peak_memory_bytes as p; print(p())"
    own = int(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True).stdout)
    assert own < 250 << 20 < peak_memory_bytes()


def test_folder_bytes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"123")
    (tmp_path / "y").write_bytes(b"12")
    assert folder_bytes(tmp_path) == 5


class Scripted:
    """A device that answers what a real runner would, and remembers what it was asked."""

    name = "local"

    def __init__(self, *answers: Completed) -> None:
        self.answers, self.asked = list(answers), []

    def probe(self) -> dict[str, object]:
        return {}

    def push(self, folder):
        return f"/device/{folder.name}"

    def run(self, command, *, timeout_s):
        assert command[1:3] == ["-m", "edgekd.profiling.runner"] and timeout_s > 0
        self.asked.append(list(command[3:]))
        return self.answers.pop(0)

    def pull(self, path, local):
        return local

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def answer(count: int) -> Completed:
    part = {"samples_ms": [1.0, 2.0, 3.0], "warmup": 5, "steady": True, "load_ms": 4.0, "executed_precision": "fp32", "executed_ops": {"Conv": 1}}
    one = {"id": "tiny", "components": {"encoder": part, "decoder": part | {"executed_precision": "int8"}}, "together_ms": [2.0, 4.0, 6.0]}
    return Completed(0, json.dumps({"artifacts": [one] * count, "circumstances": Local().probe()}), "noise on stderr")


def test_profile_many_asks_one_process_for_all_latencies_and_one_each_for_memory(tmp_path):
    for name in "ab":
        fake_artifact(tmp_path / name)
    device = Scripted(answer(2), *[Completed(0, '{"peak_memory_bytes": 7}', "")] * 2)
    found = profile_many([tmp_path / "a", tmp_path / "b"], transport=device, threads=2, prompts=5)
    assert [len(a) > 2 and a[:2] for a in device.asked[:1]] == [["/device/a", "/device/b"]]
    assert [a[:2] for a in device.asked[1:]] == [["/device/a", "--footprint"], ["/device/b", "--footprint"]]
    assert all("--threads" in a and "--prompts" in a for a in device.asked)
    p = found[0]
    assert (p.latency_ms.p50, p.components["encoder"].latency_ms.p50, p.load_ms, p.peak_memory_bytes, p.prompts) == (4, 2, 8, 7, 5)
    assert p.executed_precision == "fp32 / int8" == p.circumstances.precision_executed
    assert p.components["encoder"].size_bytes == 700 and p.size_bytes > 770


def test_profile_round_trips(tmp_path):
    fake_artifact(tmp_path / "a")
    p = profile_many([tmp_path / "a"], transport=Scripted(answer(1)), memory=False)[0]
    assert p.peak_memory_bytes is None
    assert Profile.load(p.save(tmp_path / "p.json")) == p
    assert json.loads((tmp_path / "p.json").read_text())["schema"] == "edgekd.profile/1"
    (tmp_path / "p.json").write_text("{}")
    with pytest.raises(EdgekdError, match="not a profile"):
        Profile.load(tmp_path / "p.json")


def test_a_crash_on_the_device_is_told_in_its_own_words(tmp_path):
    fake_artifact(tmp_path / "a")
    with pytest.raises(EdgekdError, match="no kernel for Foo"):
        profile_many([tmp_path / "a"], transport=Scripted(Completed(1, "", "warning\nno kernel for Foo\n")))
    with pytest.raises(EdgekdError, match="exit code -11"):
        profile_many([tmp_path / "a"], transport=Scripted(Completed(-11, "", "")))


def test_a_target_out_of_reach_is_refused_with_its_own_hint():
    board = SimpleNamespace(name="board", reachable=False, device=SimpleNamespace(transport="none", how="copy the artifact by hand"))
    with pytest.raises(UsageError, match="board") as e:
        reach(board)
    assert e.value.hint == "copy the artifact by hand"
    assert reach("host").name == "local"


def test_a_damaged_artifact_is_refused_by_the_runner(tmp_path, capsys):
    fake_artifact(tmp_path)
    (tmp_path / "encoder.onnx").write_bytes(b"x")
    assert runner.main([str(tmp_path)]) == 1
    assert "encoder.onnx" in capsys.readouterr().err


def test_the_runner_loads_no_torch():
    code = "import sys, edgekd.profiling.runner, edgekd.export.onnx, edgekd.export.openvino; print([m for m in ('torch', 'onnx', 'openvino') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_local_transport(tmp_path):
    local = Local()
    assert local.push(tmp_path) == str(tmp_path.resolve())
    with pytest.raises(EdgekdError, match="nothing to push"):
        local.push(tmp_path / "missing")
    assert local.run([local.python, "-m", "json.tool", "--help"], timeout_s=60).code == 0
    assert local.run([local.python, "-m", "edgekd.profiling.runner"], timeout_s=60).code == 2
    (tmp_path / "f").write_text("x")
    assert local.pull(str(tmp_path / "f"), tmp_path / "g").read_text() == "x"
    with pytest.raises(EdgekdError, match="no answer within"):
        local.run([local.python, "-m", "timeit", "-n", "1", "-r", "1", "import time; time.sleep(30)"], timeout_s=0.3)


def test_profile_torch_measures_apart_and_together():
    p = profile_torch(tiny_sam(), repeats=3, prompts=2)
    assert p.latency_ms.n == p.components["encoder"].latency_ms.n == 3 and p.prompts == 2
    assert p.size_bytes == sum(c.size_bytes for c in p.components.values())
    assert p.peak_memory_bytes is None


class Answering(Scripted):
    """A device that is asked for segment-everything."""

    def run(self, command, *, timeout_s):
        assert command[1:3] == ["-m", "edgekd.profiling.everything"] and timeout_s > 0
        self.asked.append(list(command[3:]))
        return self.answers.pop(0)


def test_segment_everything_is_profiled_with_its_parts_apart(tmp_path):
    row = {"id": "tiny", "mode": "grid", "total_ms": [9.0, 11.0], "prompts": 1024, "calls": 16, "masks": 3,
           "parts_ms": {"encoder": [1.0, 1.0], "decoder": [7.0, 9.0], "rest": [1.0, 1.0]}}
    device = Answering(Completed(0, json.dumps({"photo": "x.jpg", "rows": [row], "circumstances": Local().probe()}), ""))
    (tmp_path / "a").mkdir()
    found = profile_everything([tmp_path / "a"], transport=device, modes=["grid"], threads=2)
    assert device.asked[0][0] == "/device/a" and "--mode grid" in " ".join(device.asked[0]) and "--threads 2" in " ".join(device.asked[0])
    assert found[0].parts_ms["decoder"].p50 == 8 and found[0].latency_ms.p50 == 10 and "proposer" not in found[0].parts_ms
    assert (found[0].prompts, found[0].decoder_calls, found[0].masks, found[0].photo) == (1024, 16, 3, "x.jpg")


def test_segment_everything_is_measured_on_a_real_artifact(tmp_path):
    export_model(tiny_sam(), tmp_path / "art", format="onnx", scheme="fp32")
    Image.new("RGB", (64, 48), (90, 20, 200)).save(tmp_path / "photo.png")
    out = everything.measure([str(tmp_path / "art")], modes=[], photo=str(tmp_path / "photo.png"), threads=1, warmup=1, repeats=2, max_seconds=0.2)
    assert [r["mode"] for r in out["rows"]] == ["grid", "hierarchical"] and out["photo"] == "photo.png"
    grid, coarse = out["rows"]
    assert grid["prompts"] == 1024 and grid["calls"] == 1024 / BATCH and coarse["prompts"] >= 64 and len(grid["total_ms"]) == 2
    assert set(grid["parts_ms"]) == {"encoder", "decoder", "rest"} and min(grid["parts_ms"]["decoder"]) > 0
    assert everything.main([str(tmp_path / "none")]) == 1
