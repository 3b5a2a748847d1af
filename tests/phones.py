"""Fixtures: a real adb server of the test's own, and fake phones behind it (fake_adbd.py)."""
from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_adbd import FakePhone, Faults

from edgekd.profiling.transport import _adb_wire, adb, lock

PACE = lock.Pace(beat_s=0.5, orphan_s=6, stale_s=3, poll_s=0.2)


def opened(phone: FakePhone, **more: Any) -> adb.Adb:
    """A session with a fake phone, not begun yet."""
    return adb.Adb(phone.serial, pace=PACE, **more)


GETPROP = """#!/bin/sh
case $1 in
  ro.product.manufacturer) echo Google;; ro.product.model) echo 'Pixel 8';; ro.soc.manufacturer) echo Google;; ro.soc.model) echo 'Tensor G3';;
  ro.build.version.release) echo 14;; ro.build.version.sdk) echo 34;; ro.product.cpu.abilist) echo x86_64,x86;; ro.product.cpu.abi) echo x86_64;;
esac
"""
DUMPSYS = """#!/bin/sh
case $1 in
  battery) printf 'Current Battery Service state:\\n  AC powered: false\\n  level: 76\\n  temperature: 253\\n';;
  thermalservice) printf 'IsStatusOverride: false\\nThermal Status: %s\\nCached temperatures:\\n' "$(cat {state} 2>/dev/null || echo 0)";;
esac
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A real adb server on a port of its own, with keys of its own."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    before = {n: os.environ.get(n) for n in ("ANDROID_ADB_SERVER_PORT", "HOME", "ADB_MDNS")}
    os.environ.update(ANDROID_ADB_SERVER_PORT=str(port), HOME=str(tmp_path_factory.mktemp("home")), ADB_MDNS="0")
    try:
        assert _adb_wire.start_server() and not _adb_wire.start_server()
        yield port
    finally:
        _adb_wire.stop_server()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@pytest.fixture
def phones(server: int, tmp_path: Path) -> Iterator[Callable[..., FakePhone]]:
    """`phones(Faults(...))` makes a device."""
    made: list[FakePhone] = []

    def make(faults: Faults | None = None) -> FakePhone:
        phone = FakePhone(tmp_path / f"phone{len(made)}", faults)
        made.append(phone)
        phone.program("getprop", GETPROP)
        phone.program("dumpsys", DUMPSYS.format(state=phone.root.parent / "thermal"))
        phone.program("settings", "#!/bin/sh\necho 0\n")
        return phone

    yield make
    for phone in made:
        _adb_wire.ask(f"host:disconnect:{phone.serial}") if phone.serial in _adb_wire.devices() else None
        phone.close()
