"""The loop as a whole, small but real: one student, two formats, real photos; then again, damaged, killed, infeasible."""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekd import api
from edgekd.errors import EdgekdError, UsageError
from edgekd.ledger import Ledger
from edgekd.report.schema import Report
from edgekd.workspace import run_lock

SMALL = ["stages.0.steps=2", "stages.1.steps=1", "evaluation.max_instances=2", "profile.repeats=10", "profile.warmup=1", "data.limit=4",
         "quantization.calibration_images=2"]


def compress(folder: Path, photos: Path, *sets: str, **more: object) -> Report:
    return api.compress(teacher="sam_nano", target="host", data=photos, recipe="smoke", sets=[*SMALL, *sets], output=folder, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def some_photos(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four of the shipped photos and one that is broken."""
    folder = tmp_path_factory.mktemp("photos")
    for path in sorted(photos.glob("*.jpg"))[:4]:
        shutil.copy(path, folder)
    (folder / "a_broken.jpg").write_bytes(b"\xff\xd8\xff" + os.urandom(300))
    return folder


@pytest.fixture(scope="module")
def finished(some_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("run") / "run"
    return folder, compress(folder, some_photos)


def works(folder: Path) -> list[str]:
    """What the ledger says was done, in order."""
    return [json.loads(line)["what"] for line in (folder / "ledger.jsonl").read_text().splitlines()]


def test_compress__measures_every_candidate_and_chooses_one(finished: tuple[Path, Report]) -> None:
    report = finished[1]
    assert report.verdict == "met" and report.best is not None and report.best.status == "accepted"
    measured = [c for c in report.candidates if c.status != "failed"]
    assert {c.format for c in measured} == {"onnx", "openvino"} and {"fp32", "w8a8_static"} <= {c.scheme for c in measured}
    for row in measured:
        assert row.trained and row.latency_ms and row.latency_ms.provenance == "measured" and row.latency_ms.n >= 10
        assert set(row.components) == {"encoder", "decoder", "proposer"} and all(c.parity and c.executed_precision for c in row.components.values())
        assert row.accuracy and row.accuracy.box_miou is not None and row.accuracy.teacher_agreement and row.accuracy.teacher_agreement.box is not None
    assert all(c.reason for c in report.candidates if c.status != "accepted")
    assert report.speedup and report.speedup.provenance == "measured" and report.speedup.encoder


def test_compress__a_broken_photo_is_skipped_and_named(finished: tuple[Path, Report]) -> None:
    assert any("a_broken.jpg" in s for s in finished[1].protocol.skipped)


def test_compress__writes_everything_a_run_has(finished: tuple[Path, Report]) -> None:
    folder, report = finished
    for name in ("report.html", "report.json", "MODEL_CARD.md", "recipe.resolved.yaml", "target.resolved.yaml", "environment.json", "ledger.jsonl"):
        assert (folder / name).stat().st_size > 0, name
    assert json.loads((folder / "report.json").read_text())["chosen"] == report.chosen
    assert (folder / "artifacts" / str(report.chosen) / "manifest.json").is_file()
    assert list((folder / "report").glob("*.jpg")), "overlays of teacher and student"
    assert not list(folder.rglob("*.part")) and not list((folder / "checkpoints").rglob("*.pt")), "nothing half-done is left"


def test_compress__again_does_no_finished_work(finished: tuple[Path, Report], some_photos: Path) -> None:
    folder, report = finished
    before = works(folder)
    again = compress(folder, some_photos)
    assert works(folder) == before and again.chosen == report.chosen
    assert [c.latency_ms for c in again.candidates] == [c.latency_ms for c in report.candidates]


@pytest.fixture
def copied(finished: tuple[Path, Report], tmp_path: Path) -> tuple[Path, Report]:
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run", finished[1]


def test_compress__a_damaged_artifact_is_made_again(copied: tuple[Path, Report], some_photos: Path) -> None:
    folder, report = copied
    file = folder / "artifacts" / str(report.chosen) / "manifest.json"
    encoder = next(f for f in file.parent.iterdir() if f.stem == "encoder" and f.suffix in (".onnx", ".bin"))
    data = bytearray(encoder.read_bytes())
    data[len(data) // 2] ^= 1
    encoder.write_bytes(data)
    before = len(works(folder))
    compress(folder, some_photos)
    assert "export" in works(folder)[before:] and "train" not in works(folder)[before:]
    from edgekd.artifact import verify

    verify(file.parent)


def test_compress__a_damaged_checkpoint_is_trained_again(copied: tuple[Path, Report], some_photos: Path) -> None:
    folder, _ = copied
    path = next((folder / "checkpoints").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-50])
    before = len(works(folder))
    compress(folder, some_photos)
    assert works(folder)[before:].count("train") == 1


def test_compress__an_infeasible_budget_trains_nothing(some_photos: Path, tmp_path: Path) -> None:
    report = compress(tmp_path / "never", some_photos, "formats=[onnx]", "quantization.schemes=[fp32]", budget_ms=0.001)
    assert report.verdict == "missed" and report.chosen is None
    assert report.nearest and report.nearest.gap_ms and report.nearest.gap_ms > 0
    assert "train" not in works(tmp_path / "never") and all(c.stage == "plan" for c in report.candidates)


def test_compress__a_folder_in_use_is_refused(some_photos: Path, tmp_path: Path) -> None:
    with run_lock(tmp_path), pytest.raises(EdgekdError, match="at work in this folder"):
        compress(tmp_path, some_photos)


def test_compress__killed_then_continues(some_photos: Path, tmp_path: Path, edgekd: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    folder = tmp_path / "run"
    sets = [word for s in [*SMALL, "formats=[onnx]", "quantization.schemes=[fp32]", "stages.0.steps=6"] for word in ("--set", s)]
    command = ["compress", "--teacher", "sam_nano", "--target", "host", "--data", str(some_photos), "--recipe", "smoke", "--output", str(folder), *sets, "--json"]
    process = subprocess.Popen([sys.executable, "-m", "edgekd", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not list(folder.glob("cache/*/index.json")):
        time.sleep(0.05)  # killed as soon as the cache is there: before or within training
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = edgekd(*command)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verdict"] == "met"
    assert Ledger(folder / "ledger.jsonl").path.read_text().count('"what": "train"') == 1


def test_compress__an_unreachable_target_is_built_but_unverified_until_its_board_has_measured(some_photos: Path, tmp_path: Path) -> None:
    run, board = tmp_path / "j", tmp_path / "a board's folder"
    report = api.compress(teacher="sam_nano", target="jetson", data=some_photos, recipe="smoke", output=run, sets=[*SMALL, "formats=[onnx]", "quantization.schemes=[fp32]"])
    assert report.verdict == "unverified"
    assert all(c.latency_ms is None or c.latency_ms.provenance == "predicted" for c in report.candidates)
    board.mkdir()
    shutil.copy(run / "run_on_device.sh", board)
    shutil.copytree(run / "board", board / "board")
    done = subprocess.run(["sh", str(board / "run_on_device.sh")], capture_output=True, text=True, env={**os.environ, "EDGEKD_PYTHON": sys.executable}, timeout=300)
    assert done.returncode == 0, done.stderr
    found = api.merge(run=run, measured=board / "measured.json")
    chosen = found.best
    assert found.verdict == "met" and chosen is not None and chosen.latency_ms is not None and chosen.latency_ms.provenance == "measured"
    assert chosen.components["decoder"].latency_ms is not None and found.environment["device"]
    assert api.merge(run=run, measured=board / "measured.json").document() == found.document()  # twice is once
    other = json.loads((board / "measured.json").read_text())
    other["models"][0]["id"] = "another-256-onnx-fp32"
    (board / "other.json").write_text(json.dumps(other))
    with pytest.raises(EdgekdError, match="another-256-onnx-fp32"):
        api.merge(run=run, measured=board / "other.json")
    (board / "cut.json").write_text((board / "measured.json").read_text()[:100])
    with pytest.raises(EdgekdError, match="not what a board measured"):
        api.merge(run=run, measured=board / "cut.json")
    assert api.merge(run=run, measured=board / "measured.json").verdict == "met"


@pytest.mark.parametrize("sets", [["students=[{name: repvit_xz}]"], ["formats=[onxx]"], ["quantization.schemes=[w8a8_statik]"]])
def test_compress__wrong_names_start_nothing(some_photos: Path, tmp_path: Path, sets: list[str]) -> None:
    with pytest.raises(UsageError, match="did you mean"):
        compress(tmp_path / "run", some_photos, *sets)
    assert not (tmp_path / "run" / "ledger.jsonl").exists()


def test_plan__needs_neither_weights_nor_device(some_photos: Path) -> None:
    plan = api.plan(teacher="sam_vit_h", target="jetson", data=some_photos, budget_ms=30)
    text = plan.render()
    assert "sam_vit_h -> jetson" in text and "unverified" in text and "facebook/sam-vit-huge" in text and "predicted" in text
    assert plan.to_dict()["estimate"]["total_seconds"] > 0


@pytest.mark.parametrize(("name", "id"), [("edge_sam", "edge_sam-1024-onnx-fp32"), ("efficientvit_sam_l0", "efficientvit_sam_l0-512-onnx-fp32"),
                                          ("nanosam", "nanosam-1024-onnx-fp32")])
def test_plan__of_a_published_recipe(some_photos: Path, name: str, id: str) -> None:
    plan = api.plan(target="jetson", data=some_photos, recipe=name)
    assert id in [c.id for c in plan.points] and "students trained at most: 1" in plan.render()
    assert any("weights are not here" in note for note in plan.notes)


def test_plan__counts_the_batches_of_a_step_and_what_is_trained(some_photos: Path) -> None:
    def train(*sets: str) -> float:
        return api.plan(target="jetson", data=some_photos, recipe="edge_sam", sets=sets).seconds["train"]

    whole = train()
    assert train("stages.0.accumulate=4") < whole < train("stages.2.trainable=[encoder, proposer]")
    assert whole < train("stages.1.instances=32")
