"""`edgekd compress` that explores: small, but with real students, real files and real measurements; killed and gone on with."""
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
from typing import Any

import pytest
import yaml

from edgekd import api
from edgekd.errors import UsageError
from edgekd.exploring import shortened
from edgekd.recipe import Stage
from edgekd.report.schema import Report

pytest.importorskip("optuna", reason="pip install 'edgekd[search]'")
RECIPE: dict[str, Any] = {
    "extends": "smoke", "name": "tiny_search", "students": [], "formats": ["onnx"],
    "stages": [{"name": "encoder", "objectives": [{"name": "feature_mse"}], "trainable": ["encoder"], "steps": 4, "batch_size": 2, "lr": 1e-3, "warmup": 1}],
    "quantization": {"schemes": ["fp32"], "calibration_images": 2}, "data": {"extra": [], "limit": 4},
    "evaluation": {"data": "scenes:seed=90001,count=1,size=96", "max_images": 1, "max_instances": 2}, "profile": {"warmup": 1, "repeats": 10},
    "search": {"strategy": "explore", "trials": 3, "max_short": 2, "max_trained": 1, "share": 0.25,
               "space": {"students": ["repvit_xs"], "width": [0.25, 0.5], "depth": [0.5, 1.0], "image_sizes": [64]}}}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny_search.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture(scope="module")
def some_photos(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for path in sorted(photos.glob("*.jpg"))[:4]:
        shutil.copy(path, folder)
    return folder


def compress(folder: Path, photos: Path, recipe: Path, **more: Any) -> Report:
    return api.compress(teacher="sam_nano", target="host", data=photos, recipe=recipe, output=folder, **{"budget_ms": 1000.0, **more})


@pytest.fixture(scope="module")
def finished(some_photos: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("run") / "run"
    return folder, compress(folder, some_photos, recipe)


def works(folder: Path) -> list[tuple[str, str]]:
    return [(row["what"], row["id"]) for row in map(json.loads, (folder / "ledger.jsonl").read_text().splitlines())]


def test_compress__explores_and_chooses(finished: tuple[Path, Report]) -> None:
    folder, report = finished
    assert report.verdict == "met" and report.chosen is not None and report.chosen.startswith("repvit_xs-width")
    assert len(report.candidates) == 3, "as many students as trials"
    trained = [c for c in report.candidates if c.trained]
    assert len(trained) == 1 and trained[0].latency_ms is not None and trained[0].latency_ms.provenance == "measured" and trained[0].accuracy
    for row in report.candidates:
        assert row.trained or (row.status == "rejected" and row.reason)
    assert (folder / "artifacts" / report.chosen / "manifest.json").is_file()


def test_compress__writes_every_rung_into_the_ledger(finished: tuple[Path, Report]) -> None:
    folder, _ = finished
    done = [what for what, _ in works(folder)]
    assert {"propose", "measure", "score", "short", "full", "search"} <= set(done) and done.count("short") <= 2 and done.count("full") == 1
    summary = next(row["result"] for row in map(json.loads, (folder / "ledger.jsonl").read_text().splitlines()) if row["what"] == "search")
    assert all(step["seconds"] >= 0 and step["reason"] for step in summary["steps"]) and "score -> short" in summary["correlations"]
    assert (folder / "search" / "study.journal").stat().st_size > 0


def test_compress__leaves_no_untrained_files(finished: tuple[Path, Report]) -> None:
    folder, report = finished
    trained = {c.id for c in report.candidates if c.trained}
    assert {p.name for p in (folder / "artifacts").iterdir()} <= trained | {"teacher"}
    assert not list((folder / "search").rglob("*.onnx")) and not list((folder / "search").rglob("*.pt"))


def test_compress__again_does_nothing_twice(finished: tuple[Path, Report], some_photos: Path, recipe: Path, tmp_path: Path) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    again = compress(tmp_path / "run", some_photos, recipe)
    assert works(tmp_path / "run") == works(finished[0])
    assert again.candidates == finished[1].candidates and again.chosen == finished[1].chosen


def test_compress__an_infeasible_budget_trains_nothing(some_photos: Path, recipe: Path, tmp_path: Path) -> None:
    report = compress(tmp_path / "never", some_photos, recipe, budget_ms=0.001)
    done = {what for what, _ in works(tmp_path / "never")}
    assert report.verdict == "missed" and report.nearest is not None and not done & {"score", "short", "full", "train"}
    nearest = next(c for c in report.candidates if c.id == report.nearest.id)
    assert nearest.latency_ms is not None and nearest.latency_ms.provenance == "measured"


@pytest.mark.parametrize("rung", ["measure", "short"])
def test_compress__killed_at_a_rung_goes_on_to_the_same_choice(rung: str, finished: tuple[Path, Report], some_photos: Path, recipe: Path, tmp_path: Path,
                                                              edgekd: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    folder = tmp_path / "run"
    command = ["compress", "--teacher", "sam_nano", "--target", "host", "--data", str(some_photos), "--recipe", str(recipe), "--budget-ms", "1000",
               "--output", str(folder), "--json"]
    process = subprocess.Popen([sys.executable, "-m", "edgekd", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    ledger, deadline = folder / "ledger.jsonl", time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline and not (ledger.exists() and f'"what": "{rung}"' in ledger.read_text(errors="replace")):
        time.sleep(0.02)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = works(folder)
    assert "search" not in [what for what, _ in before], "it was killed before its end"
    done = edgekd(*command)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert works(folder)[: len(before)] == before and len(set(works(folder))) == len(works(folder)), "nothing is done twice"
    assert {c["student"] for c in report["candidates"]} == {c.student for c in finished[1].candidates}


@pytest.mark.parametrize(("space", "said"), [({"students": ["repvit_xz"]}, "did you mean 'repvit_xs'"), ({"families": ["repvitt"]}, "did you mean 'repvit'")])
def test_compress__wrong_names_start_nothing(space: dict[str, Any], said: str, some_photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "search": {"strategy": "explore", "space": space}}))
    with pytest.raises(UsageError) as error:
        compress(tmp_path / "run", some_photos, path)
    assert said in str(error.value) and not (tmp_path / "run" / "ledger.jsonl").exists()


def test_plan__of_a_large_space_counts_and_does_not_list_it(some_photos: Path) -> None:
    found = api.plan(teacher="sam_nano", target="host", data=some_photos, recipe="search", budget_ms=8)
    text = found.render()
    assert len(found.points) > 500 and len(text.splitlines()) < 60 and "students trained at most: 3" in text and "48 of them are looked at" in text
    assert found.seconds["train"] > 0


def test_shortened__keeps_the_shape_of_a_schedule() -> None:
    stage = Stage(name="a", objectives=[{"name": "feature_mse"}], steps=80, warmup=8)  # type: ignore[list-item]
    short = shortened([stage, stage.model_copy(update={"steps": 2, "warmup": 1})], 0.125)
    assert [(s.steps, s.warmup) for s in short] == [(10, 1), (1, 0)] and shortened([stage], 1.0) == [stage]
