"""An Android device by adb: a real adb server, with a device behind it that speaks the protocol and can be broken in every way that phones are."""
# ruff: noqa: F811  fixtures are imported
from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from fake_adbd import FakePhone, Faults
from phones import PACE, opened, phones, server  # noqa: F401  fixtures

from edgekd.errors import EdgekdError, UsageError
from edgekd.profiling.transport import Lost, _adb_wire, _android, _board, adb, reach
from edgekd.target import resolve

pytest.importorskip("adbutils", reason='pip install "edgekd[devices]"')
@pytest.fixture
def phone(phones: Callable[..., FakePhone]) -> FakePhone:
    return phones()


def left(phone: FakePhone) -> list[str]:
    """What is still on the device."""
    return sorted(str(p.relative_to(phone.root)) for p in phone.root.rglob("*") if p.name not in ("edgekd-root", f"edgekd-{os.environ.get('USER')}") and p.parent != phone.root)


def running(mark: str) -> list[int]:
    return [p.pid for p in psutil.process_iter(["cmdline"]) if mark in " ".join(p.info["cmdline"] or ()) and p.pid != os.getpid()]


# --- which device

def test_the_target_names_the_device(phone: FakePhone) -> None:
    target = resolve("pixel_8").at(f"adb://{phone.serial}")
    device = reach(target)
    assert device.name == "adb" and isinstance(device, adb.Adb)
    with device:
        assert device.run(["echo", "hello"], timeout_s=20).stdout == "hello\n"
    assert left(phone) == [] and phone.serial not in _adb_wire.devices(), "what we connected we disconnect"


def test_the_only_device_needs_no_name(phones: Callable[..., FakePhone]) -> None:
    with pytest.raises(EdgekdError, match="no Android device is attached") as e, adb.Adb():
        pass
    assert "USB debugging" in str(e.value.hint)
    first = phones()
    _adb_wire.ask(f"host:connect:{first.serial}")
    with adb.Adb(pace=PACE) as device:
        assert device.serial == first.serial
    assert _adb_wire.devices() == {first.serial: "device"}, "it was connected before us"
    second = phones()
    _adb_wire.ask(f"host:connect:{second.serial}")
    with pytest.raises(EdgekdError, match="2 Android devices") as e, adb.Adb():
        pass
    assert first.serial in str(e.value.where) and second.serial in str(e.value.where) and "--device" in str(e.value.hint)


def test_a_device_that_does_not_let_us_in_says_what_to_do(phones: Callable[..., FakePhone]) -> None:
    phone = phones(Faults(unauthorized=True))
    with pytest.raises(EdgekdError, match=r"unauthorized|authenticate") as e, opened(phone):
        pass
    assert "allow USB debugging" in str(e.value.hint)


def test_a_device_that_hangs_up_is_out_of_reach(phones: Callable[..., FakePhone]) -> None:
    phone = phones(Faults(hangs_up=True))
    with pytest.raises(EdgekdError) as e, opened(phone):
        pass
    assert e.value.hint and phone.serial in str(e.value)


def test_an_address_where_nothing_listens(server: int) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.raises(EdgekdError, match="cannot connect") as e, adb.Adb(f"127.0.0.1:{port}"):
        pass
    assert "Wireless debugging" in str(e.value.hint)
    with pytest.raises(EdgekdError, match="not attached"), adb.Adb("0123456789ABCDEF"):
        pass


@pytest.mark.parametrize("url", ["adb://a b", "adb://host:1/../x", "adb://x?y", "adb://a\nb"])
def test_what_cannot_be_an_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError):
        reach(resolve("pixel_8").at(url))


def test_a_server_that_we_start_is_stopped(phone: FakePhone, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(port))
    with opened(phone) as device:
        assert device.run(["true"], timeout_s=20).code == 0
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1)


# --- commands

def test_words_arrive_as_they_are(phone: FakePhone, tmp_path: Path) -> None:
    words = ["", " ", "a b", "'", '"', "$(touch gone)", "`id`", "\\", "*", "; rm -rf /", "-n", "ü", "a\nb", "$HOME"]
    with opened(phone) as device:
        done = device.run(["sh", "-c", 'for w in "$@"; do printf "<%s>" "$w"; done', "sh", *words], timeout_s=20)
        assert done.stdout == "".join(f"<{w}>" for w in words) and done.code == 0
        odd = device.run(["sh", "-c", "echo out; echo err >&2; exit 41"], timeout_s=20)
        assert (odd.code, odd.stdout, odd.stderr) == (41, "out\n", "err\n")
        big = device.run(["sh", "-c", "head -c 700000 /dev/zero | tr '\\0' x; cat"], timeout_s=20)  # nothing on its input, or it would hang
        assert big.stdout == "x" * 700000
        with pytest.raises(UsageError):
            device.run(["echo", "a\0b"], timeout_s=5)
        with pytest.raises(UsageError):
            device.run([], timeout_s=5)
        assert device.run(["no-such-program-anywhere"], timeout_s=20).code == 127


def test_a_program_that_hangs_is_killed_with_its_children(phone: FakePhone) -> None:
    mark = f"99{os.getpid()}"
    with opened(phone) as device:
        start = time.monotonic()
        with pytest.raises(EdgekdError, match="no answer within 2 s") as e:
            device.run(["sh", "-c", f"sleep {mark} & sh -c 'sleep {mark}; true'"], timeout_s=2)
        assert "ended there, with its children" in e.value.what and time.monotonic() - start < 15 and not running(mark)
        assert device.run(["echo", "still", "there"], timeout_s=20).stdout == "still there\n"
    assert left(phone) == []


def test_a_device_that_vanishes_in_a_command_is_waited_for_and_tidied(phone: FakePhone) -> None:
    mark = f"98{os.getpid()}"
    with opened(phone) as device:
        phone.faults.gone_in_shell = mark
        with pytest.raises(Lost) as e:
            device.run(["sleep", mark], timeout_s=60)
        assert "ended there" in e.value.what and not running(mark)
        assert device.run(["echo", "back"], timeout_s=20).stdout == "back\n"
    assert left(phone) == []


def test_a_device_that_stays_away_is_lost(phone: FakePhone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adb, "BACK_S", 1.0)
    with opened(phone) as device:
        phone.close()
        with pytest.raises(Lost, match=r"gone|offline") as e:
            device.run(["true"], timeout_s=5)
        assert e.value.hint
    device.close()  # twice, and without a device: never raises


def test_a_damaged_packet_is_no_answer(phone: FakePhone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adb, "SHORT_S", 5.0)
    phone.faults.damaged = True
    with pytest.raises(EdgekdError) as e, opened(phone):
        pass
    assert e.value.hint or e.value.where


def test_an_old_device_without_exit_codes(phones: Callable[..., FakePhone], tmp_path: Path) -> None:
    phone = phones(Faults(features="cmd"))
    (tmp_path / "file").write_bytes(os.urandom(5000))
    with opened(phone, folder=str(phone.root)) as device:
        odd = device.run(["sh", "-c", "printf out; echo err >&2; exit 41"], timeout_s=20)
        assert (odd.code, odd.stdout, odd.stderr) == (41, "out", "err\n")
        assert device.pull(device.push(tmp_path / "file"), tmp_path / "back").read_bytes() == (tmp_path / "file").read_bytes()
    assert not any("v2" in s.partition(":")[0] for s in phone.services) and left(phone) == []
    assert [p.name for p in phone.root.iterdir() if p.is_file()] == []


# --- files

def test_files_and_folders_go_there_and_back(phone: FakePhone, tmp_path: Path) -> None:
    folder = tmp_path / "a 'b' $c"
    (folder / "deep/er").mkdir(parents=True)
    big, empty = os.urandom(700_000), b""
    (folder / "big.bin").write_bytes(big)
    (folder / "deep/er/empty; x").write_bytes(empty)
    (folder / "deep/twin").write_bytes(big)
    with opened(phone) as device:
        there = device.push(folder)
        assert there.startswith(str(phone.root)) and Path(there, "big.bin").read_bytes() == big and Path(there, "deep/er/empty; x").read_bytes() == empty
        assert phone.came == len(big), "the same contents go there once"
        assert device.push(folder) == there and phone.came == len(big)
        assert device.pull(f"{there}/deep/twin", tmp_path / "new/back").read_bytes() == big
        with pytest.raises(EdgekdError, match="cannot be read"):
            device.pull(f"{there}/none", tmp_path / "none")
        with pytest.raises(EdgekdError, match="nothing to push"):
            device.push(tmp_path / "nowhere")
    assert left(phone) == [] and not (tmp_path / "none").exists()


def test_a_copy_that_breaks_off_is_gone_on_with(phone: FakePhone, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.bin").write_bytes(os.urandom(300_000))
    with opened(phone) as device:
        phone.faults.gone_after_bytes = 700_000
        there = device.push(folder)
        assert phone.faults.gone_after_bytes is None and {p.name for p in Path(there).iterdir()} == {f"{i}.bin" for i in range(4)}
        assert all((Path(there) / f"{i}.bin").read_bytes() == (folder / f"{i}.bin").read_bytes() for i in range(4))
        assert phone.came < 2 * 4 * 300_000, "what was there is not sent again"


def test_a_full_device_is_told_and_nothing_half_written_stays(phone: FakePhone, tmp_path: Path) -> None:
    (tmp_path / "big.bin").write_bytes(os.urandom(2_000_000))
    with opened(phone) as device:
        phone.faults.full_after_bytes = 500_000
        with pytest.raises(EdgekdError, match="No space left on device"):
            device.push(tmp_path / "big.bin")
        assert not list(phone.root.rglob("big.bin*"))
        phone.faults.full_after_bytes = None
        phone.program("df", "#!/bin/sh\necho Filesystem 1024-blocks Used Available Capacity Mounted\necho /dev/x 1000 900 100 90% /data\n")
        with pytest.raises(EdgekdError, match=r"no room: big\.bin needs 2\.0 MB and 0\.1 MB are free"):
            device.push(tmp_path / "big.bin")
        phone.program("df", "#!/bin/sh\necho Filesystem 1024-blocks Used Available Capacity Mounted\necho /dev/x 100000 900 99100 1% /data\n")
        assert Path(device.push(tmp_path / "big.bin")).is_file()


def test_sizes_are_compared(phone: FakePhone, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(os.urandom(100_000))
    with opened(phone) as device:
        phone.faults.lies = 3
        with pytest.raises(EdgekdError, match="100003 of 100000 bytes arrived"):
            device.push(tmp_path / "x.bin")
        phone.faults.lies = 0
        there = device.push(tmp_path / "x.bin")
        phone.faults.short_recv = 10
        with pytest.raises(EdgekdError, match="99990 of 100000 bytes came"):
            device.pull(there, tmp_path / "back.bin")
        phone.faults.short_recv, phone.faults.short_stat = 0, True
        with pytest.raises(EdgekdError):
            device.pull(there, tmp_path / "back.bin")
    assert not (tmp_path / "back.bin").exists() and not list(tmp_path.glob(".back*"))


def test_a_program_for_another_processor_is_refused_before_it_is_sent(phone: FakePhone, tmp_path: Path) -> None:
    program = tmp_path / "benchmark_model"
    program.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + (2).to_bytes(2, "little") + (183).to_bytes(2, "little") + bytes(100))
    program.chmod(0o755)
    with opened(phone) as device:
        with pytest.raises(EdgekdError, match="built for aarch64 and the board is x86_64"):
            device.push(program)
        assert phone.came == 0


# --- two users, and those who died

def test_a_device_is_measured_by_one_at_a_time(phone: FakePhone) -> None:
    with opened(phone), pytest.raises(EdgekdError, match="in use by") as e, opened(phone, wait_s=0.5):
        pass
    assert e.value.hint
    with opened(phone) as device:
        assert device.run(["true"], timeout_s=20).code == 0


def test_leftovers_of_a_session_that_died_are_removed(phone: FakePhone) -> None:
    mark = f"97{os.getpid()}"
    with opened(phone) as device:
        root, session = Path(device._root), Path(device._session)
    shutil.rmtree(session, ignore_errors=True)
    session.mkdir()
    _adb_wire.ask(f"host:connect:{phone.serial}")
    wire = _adb_wire.Wire(phone.serial)
    pending = wire.open(f"shell:EDGEKD_RUN={session.name}.1. exec sleep {mark}")
    (session / "files").mkdir()
    try:
        until = time.monotonic() + 10
        while not running(mark) and time.monotonic() < until:
            time.sleep(0.1)
        (session / "run-1").write_text(f"{running(mark)[0]}\n")
        with opened(phone):
            assert not session.exists() and not running(mark) and [p.name for p in root.glob("session-*")]
    finally:
        pending.close()


# --- what it is

def test_probe_tells_what_it_is(phone: FakePhone) -> None:
    with opened(phone) as device:
        found = device.probe()
    assert found["device"] == "Google Pixel 8" and found["soc"] == "Google Tensor G3" and str(found["os"]).startswith("Android 14 (API 34), Linux")
    assert found["abi"] == "x86_64" and found["python"] is None and found["battery_percent"] == 76 and found["free_bytes"] > 0 and found["clock_skew_s"] == 0.0  # type: ignore[operator]
    phone.program("date", "#!/bin/sh\necho 1000000000\n")
    with opened(phone) as device:
        assert abs(device.probe()["clock_skew_s"]) > 1e6  # type: ignore[arg-type]


LOOKED = """clock=100
ro.product.manufacturer=Google
ro.product.model=Pixel 8
ro.product.cpu.abilist=arm64-v8a
core=schedutil 1704000 1704000 1704000
core=sched_pixel 2367000 2367000 2914000
zone=56000 BIG
zone=45 soc
zone=-273000 off
zone=31000 skin
battery=305
saver=1
thermal=3
load=1.25
"""


def test_a_look_reads_clock_heat_and_what_limits() -> None:
    look = _android.Look(LOOKED)
    assert look.arch == ("aarch64", 64) and look.governor == "sched_pixel, schedutil" and look.clock_mhz == 2367.0 and look.temperature_c == 56.0
    assert look.limits() == ["Android's thermal status is severe (3)", "1 cores are limited, the fastest of them to 2367 of 2914 MHz", "battery saver is on"]
    told = _android.circumstances(look, _android.Look(LOOKED.replace("56000", "61000")), ["x", "x"], {"threads": 2}, {"benchmark_model": "sha256 1"})
    assert told["temperature_c"] == [56.0, 61.0] and told["throttled"][-2:] == ["battery saver is on", "x"] and told["threads"] == 2
    from edgekd.measurement import Circumstances

    assert Circumstances(**told).device == "Google Pixel 8"


@pytest.mark.parametrize("text", ["", "core=\nzone=x\nthermal=9999999999999999999999\nload=zz", "clock=\x1b[31m\nro.product.model=\x00\x07", "no line at all"])
def test_a_look_survives_any_answer(text: str) -> None:
    look = _android.Look(text)
    assert look.limits() == [] and isinstance(look.told((0.0, 1.0)), dict) and look.temperature_c is None and look.load is None


def test_scripts_are_plain_sh_and_mean_no_harm(phone: FakePhone) -> None:
    assert isinstance(_android.LOOK, _board.Script)
    with opened(phone) as device:
        (phone.root.parent / "thermal").write_text("2")
        assert device.look().limits() == ["Android's thermal status is moderate (2)"]


def test_without_adbutils_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "adbutils", None)
    with pytest.raises(EdgekdError, match="adbutils is missing") as e:
        reach(resolve("pixel_8").at("adb://x"))
    assert "edgekd[devices]" in str(e.value.hint)
