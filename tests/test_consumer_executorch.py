"""The ExecuTorch example segments what `edgekd predict` does, without edgekd. Its Swift twin is read, not run."""
from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from edgekd.export.executorch import exporter
from PIL import Image
from tiny import tiny_sam

from edgekd import api
from edgekd.exporting import export_model

CONSUMERS = Path(__file__).resolve().parents[1] / "examples/consumers"
CLICKS = ((50, 40), (400, 800))
ALONE = 'import runpy, sys; sys.modules["edgekd"] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")'


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not exporter.availability().ok:
        pytest.skip(f"{exporter.availability().reason}: {exporter.availability().fix}")
    folder = tmp_path_factory.mktemp("artifact") / "tiny"
    export_model(tiny_sam(2), folder, format="executorch", scheme="fp32", threads=1)
    return folder


@pytest.mark.parametrize("click", CLICKS)
def test_it_segments_without_edgekd_what_edgekd_does(artifact: Path, photos: Path, tmp_path: Path, click: tuple[int, int]) -> None:
    photo, output = photos / "dogs_at_door.jpg", tmp_path / "mask.png"
    found = api.predict(model=artifact, image=photo, output=tmp_path / "expected.png", points=[click])
    assert 0.2 < found.mask.mean() < 0.8, "an empty or full mask would show little"
    done = subprocess.run([sys.executable, "-I", "-c", ALONE, str(CONSUMERS / "executorch_click.py"), str(artifact), str(photo), f"{click[0]},{click[1]}", str(output)],
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told, mask = json.loads(done.stdout), np.asarray(Image.open(output)) > 127
    assert told["iou"] == pytest.approx(float(found.score), abs=0.01) and told["share"] == pytest.approx(found.mask.mean(), abs=0.01)
    assert mask.shape == found.mask.shape and (mask & found.mask).sum() / (mask | found.mask).sum() >= 0.98


def test_the_files_are_the_student_for_every_kind_of_prompt(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    decoder = manifest["components"]["decoder"]
    assert decoder["state"] == "ran" and decoder["parity"]["passed"] and decoder["parity"]["counts"] == [1, 5, 16]
    assert set(decoder["parity"]["prompts"]) == {"point", "points", "box", "point_box", "mask"} and decoder["parity"]["max_relative"] < 1e-4
    assert decoder["executed_precision"] == "fp32" and decoder["fixed"] == {"prompts": 1, "points": 6}
    outside = sum(n for op, n in decoder["executed_ops"].items() if op.startswith("portable"))
    assert outside < 0.15 * sum(decoder["executed_ops"].values()), "XNNPACK is given nearly all of it"


def test_swift_names_what_the_files_have(artifact: Path) -> None:
    source = (CONSUMERS / "ExecutorchClick.swift").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 60 and "NOT RUN" in source.partition("import")[0]
    manifest = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    quoted = set(re.findall(r'"(\w+)"', source))
    assert {t["name"] for t in manifest["components"]["decoder"]["inputs"]} | {"encoder", "decoder", "points"} <= quoted
    for field in ("preprocess", "components", "image_size", "prompt_size", "pad", "mean", "std", "fixed", "file", "inputs"):
        assert re.search(rf"\b{field}\b", source), field
