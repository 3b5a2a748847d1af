from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from board_fakes import fake_job

from edgekd.measurement import Circumstances
from edgekd.profiling import board
from edgekd.profiling.board import circumstances, partial, power
from edgekd.profiling.board.job import Trouble, read

ROOT = Path(board.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_runner__is_python_3_8_and_imports_nothing_of_ours(path):
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    typing_only = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) for inner in ast.walk(node)}
    runtimes = {"numpy", "torch", "executorch"}
    inside = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [a.name.partition(".")[0] for a in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [(node.module or "").partition(".")[0]]
        else:
            continue
        assert all(n in sys.stdlib_module_names or (n in runtimes and id(node) in inside) for n in names), names
    for node in ast.walk(tree):  # dicts are not joined by | before 3.9, nor types at run time before 3.10
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr) and id(node) not in typing_only:
            assert not isinstance(node.left, ast.Dict) and not isinstance(node.right, ast.Dict), ast.unparse(node)
    # what runs at once must not use what is only there for types
    assert any(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in tree.body) or not tree.body[1:]


def oldest() -> str | None:
    """A Python older than ours that works, the oldest that the runner takes first."""
    for path in filter(None, map(shutil.which, ("python3.8", "python3.9", "python3.10"))):
        if subprocess.run([path, "-c", "pass"], capture_output=True, check=False).returncode == 0:
            return path
    return None


def test_the_runner__runs_in_an_old_python(tmp_path):
    python = oldest()
    if python is None:
        pytest.skip("no older Python here (apt-get install python3.9, or pyenv install 3.8)")
    job = fake_job(tmp_path, "fine")
    done = subprocess.run([python, str(tmp_path / "edgekd_runner.pyz"), str(job)], capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"})
    assert json.loads(done.stdout)["failed"] == ["model0"], done.stderr
    assert "is missing on the board" in json.loads((tmp_path / "result.json").read_text())["models"][0]["error"]["what"]


# The job ---------------------------------------------------------------------------------------------------------------------------------------------


def changed(path: Path, change) -> str:
    job = json.loads(path.read_text())
    change(job)
    path.write_text(json.dumps(job))
    return str(path)


def test_a_job__is_read_whole(tmp_path):
    job = read(str(fake_job(tmp_path, "fine", "fine", threads=2, mode="time", tools={"trtexec": "/x"})))
    part = job.models[1].parts["model"]
    assert (job.threads, job.mode, job.repeats, job.tools) == (2, "time", 5, {"trtexec": "/x"})
    assert part.arrays()["x"].tolist() == [[0, 1, 2], [3, 4, 5]] and Path(part.file).is_absolute()
    assert job.key != read(changed(tmp_path / "job.json", lambda j: j.update(repeats=6))).key


@pytest.mark.parametrize(("change", "words"), [
    (lambda j: j.update(schema="edgekd.job/2"), "edgekd.job/2"),
    (lambda j: j.pop("models"), "models"),
    (lambda j: j.update(mode="forever"), "forever"),
    (lambda j: j["models"][0].update(together=["nothing"]), "nothing"),
    (lambda j: j["models"][0]["components"]["model"].update(file="../../etc/passwd"), "not in the job's folder"),
    (lambda j: j["models"][0]["components"]["model"].update(file="/etc/passwd"), "not in the job's folder"),
    (lambda j: j["models"][0]["components"]["model"]["inputs"][0].update(shape=[2, 4]), "24 bytes instead of 32"),
    (lambda j: j["models"][0]["components"]["model"]["inputs"][0].update(dtype="complex64"), "complex64"),
    (lambda j: j["models"][0]["components"]["model"]["inputs"][0].update(file="m0/gone.bin"), "gone.bin"),
    (lambda j: j.update(threads="two"), "two"),
])
def test_a_wrong_job__is_refused_with_what_is_wrong(tmp_path, change, words):
    with pytest.raises(Trouble, match=re.escape(words)) as e:
        read(changed(fake_job(tmp_path, "fine"), change))
    assert e.value.hint


def test_a_job__that_is_none_is_refused(tmp_path):
    (tmp_path / "job.json").write_text("{")
    for path in (tmp_path / "job.json", tmp_path / "gone.json"):
        with pytest.raises(Trouble, match="job"):
            read(str(path))
    (tmp_path / "job.json").write_text("[]")
    with pytest.raises(Trouble, match="no job that this runner knows"):
        read(str(tmp_path / "job.json"))


# Partial results -------------------------------------------------------------------------------------------------------------------------------------


def test_partial__keeps_what_is_finished_of_its_own_job(tmp_path):
    first = partial.Partial(str(tmp_path), "key")
    assert first.begin({"clock_mhz": 1}) == {"clock_mhz": 1}
    first.start("a")
    first.finish({"id": "a", "error": None})
    again = partial.Partial(str(tmp_path), "key")
    assert again.finished == {"a": {"id": "a", "error": None}} and again.begin({"clock_mhz": 2}) == {"clock_mhz": 1}
    assert partial.Partial(str(tmp_path), "other").finished == {}


def test_partial__a_line_cut_short_costs_that_line_only(tmp_path):
    found = partial.Partial(str(tmp_path), "key")
    found.finish({"id": "a", "error": None})
    with open(found.path, "a") as f:
        f.write('{"job": "key", "finished": {"id": "b", "err')
    again = partial.Partial(str(tmp_path), "key")
    assert set(again.finished) == {"a"}
    again.finish({"id": "c", "error": None})
    assert set(partial.Partial(str(tmp_path), "key").finished) == {"a", "c"}


def test_partial__what_takes_the_board_down_is_not_begun_for_ever(tmp_path):
    for _ in range(partial.TRIES):
        partial.Partial(str(tmp_path), "key").start("a")
    with pytest.raises(Trouble, match="stopped answering"):
        partial.Partial(str(tmp_path), "key").start("a")
    partial.Partial(str(tmp_path), "key").stop("a")
    partial.Partial(str(tmp_path), "key").start("a")


def test_partial__a_full_disk_is_told(tmp_path):
    with pytest.raises(Trouble, match="cannot keep results"):
        partial.Partial(str(tmp_path / "gone"), "key").start("a")


# Circumstances ---------------------------------------------------------------------------------------------------------------------------------------


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


JETSON = {
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: ARMv8 Processor rev 1 (v8l)\nFeatures\t: fp asimd asimddp\n\nprocessor\t: 1\n",
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0", "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005\0nvidia,p3767-0005\0nvidia,tegra234\0",
    "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 22.04.4 LTS"\n', "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1510400\n", "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "729600\n",
    "sys/class/thermal/thermal_zone0/temp": "48906\n", "sys/class/thermal/thermal_zone1/temp": "-256000\n", "sys/class/thermal/thermal_zone2/temp": "51250\n",
    "sys/class/hwmon/hwmon3/oc1_event_cnt": "2\n", "sys/class/thermal/cooling_device0/type": "pwm-fan\n", "sys/class/thermal/cooling_device0/cur_state": "3\n",
    "sys/class/thermal/cooling_device1/type": "cpufreq-cpu0\n", "sys/class/thermal/cooling_device1/cur_state": "0\n", "sys/class/thermal/cooling_device1/max_state": "29\n"}


def says(answers: dict[str, str]):
    return lambda command: answers.get(command[0])


def test_circumstances__of_a_jetson(tmp_path):
    here = circumstances.Board(str(tree(tmp_path, JETSON)), says({"nvpmodel": "NV Power Mode: 15W\n0\n"}))
    watch = circumstances.Watch(here)
    tree(tmp_path, {"sys/class/thermal/thermal_zone2/temp": "63500\n"})
    told = Circumstances(**watch.told(threads=2, warmup=3, repeats=30, versions={"numpy": "2"}))
    assert told.device == "ARMv8 Processor rev 1 (v8l) (2 cores)" and told.cpu_flags == ["asimd", "asimddp"]
    assert told.soc == "NVIDIA Jetson Orin Nano Developer Kit (nvidia,tegra234)" and told.os.startswith("Ubuntu 22.04.4 LTS, Linux")
    assert (told.governor, told.clock_mhz, told.power_mode, told.temperature_c, told.throttled) == ("schedutil", (1510.4, 1510.4), "15W", (51.2, 63.5), [])


def test_circumstances__throttling_is_told_by_what_is_seen_of_it(tmp_path):
    here = circumstances.Board(str(tree(tmp_path, JETSON)), says({}))
    watch = circumstances.Watch(here)
    watch.look(load=True)
    tree(tmp_path, {"sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1036800\n", "sys/class/thermal/cooling_device1/cur_state": "12\n"})
    watch.look(load=True)
    tree(tmp_path, {"sys/class/thermal/cooling_device1/cur_state": "0\n", "sys/class/hwmon/hwmon3/oc1_event_cnt": "7\n"})
    assert watch.throttled() == ["cpufreq-cpu0 limits the clock (12 of 29)", "the clock fell from 1510 to 1037 MHz under load", "5 over-current events"]


def test_circumstances__an_idle_clock_is_no_throttling(tmp_path):
    here = circumstances.Board(str(tree(tmp_path, JETSON)), says({}))
    watch = circumstances.Watch(here)
    watch.look(load=True)
    tree(tmp_path, {"sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "729600\n"})
    watch.look(load=False)
    assert watch.throttled() == []


def test_circumstances__x86_counts_for_itself(tmp_path):
    counter = "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count"
    watch = circumstances.Watch(circumstances.Board(str(tree(tmp_path, {counter: "4\n"})), says({})))
    assert watch.throttled() == []
    tree(tmp_path, {counter: "9\n"})
    assert watch.throttled() == ["the CPU counted 5 times that it throttled itself for heat"]


def test_circumstances__a_raspberry_pi_says_what_ails_it(tmp_path):
    bits = {"vcgencmd": "throttled=0x0\n"}
    watch = circumstances.Watch(circumstances.Board(str(tree(tmp_path, {"proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0"})), says(bits)))
    assert watch.throttled() == []
    bits["vcgencmd"] = "throttled=0x50005\n"
    assert watch.throttled() == ["the Raspberry Pi is throttled", "the Raspberry Pi is under-voltage", "since it began, the Raspberry Pi was once under-voltage",
                                 "since it began, the Raspberry Pi was once throttled"]
    assert circumstances.Watch(circumstances.Board(str(tmp_path), says({"vcgencmd": "throttled=0x50000\n"}))).throttled() == []


def test_circumstances__nothing_known_is_none_and_fits_the_document(tmp_path):
    told = Circumstances(**circumstances.Watch(circumstances.Board(str(tmp_path), says({}))).told(threads=None, warmup=1, repeats=2, versions={}))
    assert (told.soc, told.governor, told.clock_mhz, told.power_mode, told.temperature_c, told.throttled) == (None, None, None, None, None, [])


# Power -----------------------------------------------------------------------------------------------------------------------------------------------

# As boards printed them: Orin Nano (JetPack 6), AGX Orin (JetPack 5 and 6, the second with --readall), Xavier NX and Nano (JetPack 4).
LINES = {
    ("01-27-2026 11:15:02 RAM 2250/7620MB (lfb 3x4MB) SWAP 0/3810MB (cached 0MB) CPU [66%@1728,16%@1728,18%@1728,9%@1728,9%@729,16%@729] GR3D_FREQ 0% cpu@45.968C "
     "soc2@45.156C soc0@45.468C gpu@45.437C tj@45.968C soc1@44.281C VDD_IN 4046mW/4236mW VDD_CPU_GPU_CV 720mW/786mW VDD_SOC 1201mW/1261mW"): 4046,
    ("11-21-2025 08:49:48 RAM 13983/62780MB (lfb 424x4MB) SWAP 126/31390MB (cached 0MB) CPU [90%@2201,100%@2201] EMC_FREQ 1%@2133 GR3D_FREQ 14%@[407,407] VIC_FREQ 115 "
     "NVDLA0_FREQ @1600 APE 174 CV0@73.625C CPU@77.281C Tboard@62C SOC2@70C Tdiode@62.25C SOC0@69.531C CV1@72.5C GPU@69.125C tj@77.281C SOC1@68.968C CV2@67.25C "
     "VDD_GPU_SOC 3150mW/2971mW VDD_CPU_CV 14312mW/12415mW VIN_SYS_5V0 4968mW/5048mW VDDQ_VDD2_1V8AO 1091mW/1091mW"): 3150 + 14312 + 4968,
    ("cpu@47.906C/48.343C soc2@45.375C/45.406C tj@47.906C/48.343C soc1@47.093C/47.25C VDD_GPU_SOC 3034mW/3049mW/3412mW VDD_CPU_CV 1137mW/1296mW/2273mW "
     "VIN_SYS_5V0 4939mW/4924mW/5040mW"): 3034 + 1137 + 4939,
    ("03-17-2024 18:54:10 RAM 10239/62841MB (lfb 442x4MB) CPU [0%@1728,off,off] GR3D_FREQ 0% cpu@37.5C tboard@27C VDD_GPU_SOC 1592mW/1592mW VDD_CPU_CV -398mW/-398mW "
     "VIN_SYS_5V0 2624mW/2624mW VDDQ_VDD2_1V8AO 403mW/403mW"): 1592 - 398 + 2624,
    ("RAM 2673/7765MB (lfb 118x4MB) SWAP 0/3883MB (cached 0MB) CPU [12%@1190,8%@1190,4%@1190,off,off,off] EMC_FREQ 7% GR3D_FREQ 33% AO@35C GPU@33C PMIC@100C AUX@33.5C "
     "CPU@35C thermal@33.9C VDD_IN 3902/3611 VDD_CPU_GPU_CV 1331/1180 VDD_SOC 997/941"): 3902,
    ("RAM 613/3964MB (lfb 634x4MB) SWAP 0/1982MB (cached 0MB) CPU [2%@102,1%@102,0%@102,0%@102] EMC_FREQ 0% GR3D_FREQ 0% PLL@39C CPU@40.5C PMIC@100C GPU@41C AO@46C "
     "thermal@41C POM_5V_IN 900/943 POM_5V_GPU 0/0 POM_5V_CPU 123/123"): 900,
    "tegrastats: command needs root": None, "": None, "RAM 10/20MB SWAP 0/1982MB CPU [2%@102] GPU@41C": None}


@pytest.mark.parametrize(("line", "expected"), LINES.items(), ids=range(len(LINES)))
def test_tegrastats__lines_give_the_power_of_the_module(line, expected):
    assert power.whole(power.rails(line)) == expected


def test_sensors__volts_times_amperes_of_every_labelled_channel(tmp_path):
    base = "bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon4"
    tree(tmp_path, {f"{base}/in1_label": "VDD_IN\n", f"{base}/in1_input": "19656\n", f"{base}/curr1_input": "240\n",
                    f"{base}/in2_label": "VDD_CPU_GPU_CV\n", f"{base}/in2_input": "19640\n", f"{base}/curr2_input": "24\n", f"{base}/in3_label": "NC\n"})
    assert power.sensors(str(tmp_path)) == {"VDD_IN": pytest.approx(4717.44), "VDD_CPU_GPU_CV": pytest.approx(471.36)}
    assert power.sensors(str(tmp_path / "none")) == {}


def test_energy__is_power_above_idle_integrated_over_the_stretch():
    readings = [(t / 10, 2000.0 if t < 20 else 5000.0) for t in range(61)]
    assert power.integrate(readings, 2.0, 6.0) == pytest.approx(20000)
    assert power.integrate(readings, 5.5, 7.0) == pytest.approx(7500), "beyond the last reading it counts on"
    assert power.energy_mj(readings, [(2.0, 6.0, 100)], 2000.0) == pytest.approx(4 * 3000 / 100)
    assert power.energy_mj(readings, [(2.0, 4.0, 10), (4.0, 6.0, 40)], 2000.0) == pytest.approx(6000 / 10 + 6000 / 40)


def test_energy__too_few_readings_make_none():
    readings = [(float(t), 3000.0) for t in range(10)]
    assert power.energy_mj(readings, [(2.0, 3.0, 5)], 1000.0) is None
    assert power.energy_mj(readings, [], 1000.0) is None and power.energy_mj([], [(0.0, 1.0, 1)], 0.0) is None


def test_energy__a_ramp_is_followed_between_readings():
    readings = [(0.0, 0.0), *((float(t), t * 100.0) for t in range(1, 11))]
    assert power.integrate(readings, 0.5, 9.5) == pytest.approx(100 * (9.5 ** 2 - 0.5 ** 2) / 2)


def test_meter__reads_tegrastats_beside_the_measurement(tmp_path):
    line = next(iter(LINES))
    program = tmp_path / "tegrastats"
    program.write_text(f"#!/bin/sh\n[ \"$1 $2\" = '--interval 100' ] || exit 3\nwhile :; do echo '{line}'; sleep 0.02; done\n")
    program.chmod(0o755)
    found = power.meter(find=lambda name: str(program))
    assert isinstance(found, power.Tegrastats)
    try:
        until = time.monotonic() + 30
        while len(found.readings) < 20 and time.monotonic() < until:
            time.sleep(0.02)
        found.settle(sleep=lambda seconds: None)
        assert found.idle_mw == 4046 and found.readings[0][0] < found.readings[-1][0]
        found.idle_mw = 1046.0
        energy, words = found.energy([(found.readings[2][0], found.readings[17][0], 2)])
        assert energy == pytest.approx(3000 * (found.readings[17][0] - found.readings[2][0]) / 2)
        assert "1046 mW idle" in words and "4046 mW on average" in words
    finally:
        found.close()
    assert found._process.poll() is not None


def test_meter__nothing_tells_power_here(tmp_path):
    assert power.meter(sys=str(tmp_path), find=lambda name: None) is None
    silent = power.Meter("tegrastats")
    silent.settle(sleep=lambda seconds: None)
    assert silent.energy([(0.0, 1.0, 1)])[0] is None
