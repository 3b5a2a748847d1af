"""The LiteRT example segments what `edgekd predict` does, on ai-edge-litert and without edgekd. Its Kotlin twin is read, not run."""
from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from edgekd.export.litert import exporter
from PIL import Image
from tiny import tiny_sam

from edgekd import api
from edgekd.exporting import export_model

CONSUMERS = Path(__file__).resolve().parents[1] / "examples/consumers"
CLICKS = ((50, 40), (400, 800))
ALONE = 'import runpy, sys; sys.modules["edgekd"] = sys.modules["torch"] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")'


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not exporter.availability().ok:
        pytest.skip(f"{exporter.availability().reason}: {exporter.availability().fix}")
    folder = tmp_path_factory.mktemp("artifact") / "tiny"
    export_model(tiny_sam(2), folder, format="litert", scheme="fp32", threads=1)
    return folder


@pytest.mark.parametrize("click", CLICKS)
def test_it_segments_without_edgekd_what_edgekd_does(artifact: Path, photos: Path, tmp_path: Path, click: tuple[int, int]) -> None:
    photo, output = photos / "dogs_at_door.jpg", tmp_path / "mask.png"
    found = api.predict(model=artifact, image=photo, output=tmp_path / "expected.png", points=[click])
    assert 0.2 < found.mask.mean() < 0.8, "an empty or full mask would show little"
    done = subprocess.run([sys.executable, "-I", "-c", ALONE, str(CONSUMERS / "litert_click.py"), str(artifact), str(photo), f"{click[0]},{click[1]}", str(output)],
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told, mask = json.loads(done.stdout), np.asarray(Image.open(output)) > 127
    assert told["iou"] == pytest.approx(float(found.score), abs=0.01) and told["share"] == pytest.approx(found.mask.mean(), abs=0.01)
    assert mask.shape == found.mask.shape and (mask & found.mask).sum() / (mask | found.mask).sum() >= 0.98


def test_kotlin_names_what_the_files_have(artifact: Path) -> None:
    source = (CONSUMERS / "LitertClick.kt").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 60 and "NOT RUN" in source.partition("import")[0]
    manifest = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    quoted = set(re.findall(r'"(\w+)"', source))
    for part in manifest["components"].values():
        assert {t["name"] for t in (*part["inputs"], *part["outputs"])} <= quoted
    assert {"components", "preprocess", "image_size", "prompt_size", "pad", "mean", "std", "fixed", "points", "file"} <= quoted
    assert manifest["preprocess"]["pad"] in quoted and "points" in manifest["components"]["decoder"]["fixed"]
