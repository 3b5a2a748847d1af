"""A whole measurement over a real ssh connection to this machine, and one whose connection breaks in the middle."""
from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import sshd
from tiny import tiny_sam

from edgekd.exporting import export_model
from edgekd.profiling import boards, profile_many
from edgekd.profiling.boards import Asked

pytest.importorskip("paramiko", reason='boards need paramiko (pip install "edgekd[devices]")')


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    with sshd.running(tmp_path_factory.mktemp("ssh")) as running:
        yield running


@pytest.fixture(scope="module")
def art(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("art") / "art"
    export_model(tiny_sam(), folder, format="onnx", scheme="fp32")
    return folder


def test_profile__over_ssh(board, art, tmp_path):
    found = profile_many([art], board.target(folder=str(tmp_path)), repeats=6, threads=1, max_seconds=0.5)[0]
    assert found.transport == "ssh" and found.latency_ms.n == 6 and found.latency_ms.provenance == "measured"
    assert found.answers is not None and max(found.answers.values()) < 1e-5 and found.peak_memory_bytes is not None
    assert found.circumstances.versions["onnxruntime"] and found.circumstances.threads == 1
    assert not list(tmp_path.rglob("session-*")) and not list(tmp_path.rglob("*.pyz")), "nothing is left there"


def test_profile__goes_on_after_the_connection_broke(board, art, tmp_path):
    proxy = sshd.Proxy(board.port)
    board.trust(proxy.port)
    cuts = []

    def cut_once_one_is_finished() -> None:
        until = time.monotonic() + 240
        while time.monotonic() < until:
            for partial in tmp_path.rglob("result.partial.jsonl"):
                text = partial.read_text()
                if text.count('"started"') == 2:
                    proxy.cut()
                    cuts.append(text)
                    return
            time.sleep(0.02)

    watcher = threading.Thread(target=cut_once_one_is_finished, daemon=True)
    watcher.start()
    with board.connect(proxy.port, folder=str(tmp_path)) as device:
        found = boards.profile_many(device, [art, art, art], board.target(proxy.port, folder=str(tmp_path)), Asked(repeats=5, threads=1, max_seconds=0.5, memory=False))
    watcher.join(5)
    proxy.close()
    assert len(found) == 3 and len(cuts) == 1 and '"finished"' in cuts[0] and proxy.connections >= 2
    assert not list(tmp_path.rglob("session-*"))
