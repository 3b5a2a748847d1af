"""The examples that use an artifact without edgekd: each must segment what `edgekd predict` does, on the runtime it is written for."""
from __future__ import annotations

import ast
import base64
import functools
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_sam

from edgekd import api
from edgekd.exporting import export_model
from edgekd.plugins import exporter

CONSUMERS = Path(__file__).resolve().parents[1] / "examples/consumers"
CLICKS = ((50, 40), (400, 800))
NPM = f"npm ci --prefix {CONSUMERS.relative_to(CONSUMERS.parents[1])}"

ALONE = """
import runpy, sys
sys.modules["edgekd"] = sys.modules["torch"] = None  # importing either now raises
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(sorted(m for m in sys.modules if m.startswith(("edgekd", "torch")) and sys.modules[m] is not None), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    return photos / "dogs_at_door.jpg"


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`artifacts(format)`: a folder, exported once. This seed's masks cover about half of the photo and follow the click."""
    folder = tmp_path_factory.mktemp("artifacts")

    @functools.cache
    def artifact(format: str) -> Path:
        available = exporter(format).availability()
        if not available.ok:
            pytest.skip(f"{available.reason}: {available.fix}")
        export_model(tiny_sam(2), folder / format, format=format, scheme="fp32", threads=1)
        return folder / format

    return artifact


def read(path: Path | io.BytesIO) -> np.ndarray:
    return np.asarray(Image.open(path).convert("L")) > 127


def iou(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float((a & b).sum() / (a | b).sum())


def wanted(artifact: Path, photo: Path, folder: Path) -> list[tuple[np.ndarray, float]]:
    """What `edgekd predict` says of each of `CLICKS`: mask and predicted IoU. The clicks mean different things, or comparing would show little."""
    found = [api.predict(model=artifact, image=photo, output=folder / "expected.png", points=[click]) for click in CLICKS]
    assert all(0.2 < f.mask.mean() < 0.8 for f in found) and iou(found[0].mask, found[1].mask) < 0.9  # type: ignore[union-attr]
    return [(f.mask, float(f.score)) for f in found]  # type: ignore[union-attr,arg-type]


def same(command: list[str], artifact: Path, photo: Path, folder: Path, at_least: float, **env: str) -> list[str]:
    """Run a consumer for every click and compare; what it wrote to stderr."""
    said = []
    for click, (mask, score) in zip(CLICKS, wanted(artifact, photo, folder), strict=True):
        output = folder / "mask.png"
        done = subprocess.run([*command, str(artifact), str(photo), f"{click[0]},{click[1]}", str(output)], capture_output=True, text=True, timeout=120,
                              cwd=folder, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert told["mask"] == str(output) and told["iou"] == pytest.approx(score, abs=0.01) and told["share"] == pytest.approx(mask.mean(), abs=0.01)
        assert iou(read(output), mask) >= at_least
        said.append(done.stderr)
    return said


@pytest.mark.parametrize("file", sorted(CONSUMERS.glob("*_click.*")), ids=lambda f: f.name)
def test_an_example_is_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 60


@pytest.mark.parametrize("file", sorted(CONSUMERS.glob("*.py")), ids=lambda f: f.name)
def test_no_example_imports_edgekd_or_torch(file: Path) -> None:
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names] + [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    needless = {"edgekd"} if "executorch.runtime" in names else {"edgekd", "torch"}  # ExecuTorch's Python runtime takes torch's tensors
    assert names and not needless & {n.split(".")[0] for n in names}


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_python_segments_without_edgekd_what_edgekd_does(format: str, artifacts: Any, photo: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-c", ALONE, str(CONSUMERS / f"{format}_click.py")]
    assert same(command, artifacts(format), photo, tmp_path, 0.98) == ["[]\n", "[]\n"]


def test_a_photo_in_portrait_by_its_exif_is_turned(artifacts: Any, photo: Path, tmp_path: Path) -> None:
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn clockwise
    with Image.open(photo) as original:
        original.transpose(Image.Transpose.ROTATE_90).save(turned, quality=95, exif=exif)
    same([sys.executable, str(CONSUMERS / "onnx_click.py")], artifacts("onnx"), turned, tmp_path, 0.98)


def test_a_photo_without_margin_to_spare(artifacts: Any, photo: Path, tmp_path: Path) -> None:
    """Wider than high, smaller than the square along one side, and in a file that is no JPEG."""
    small = tmp_path / "small.png"
    with Image.open(photo) as original:
        original.resize((61, 1000)).crop((0, 0, 61, 900)).save(small)
    found = api.predict(model=artifacts("onnx"), image=small, output=tmp_path / "expected.png", points=[(30, 400)])
    subprocess.run([sys.executable, str(CONSUMERS / "onnx_click.py"), str(artifacts("onnx")), str(small), "30,400", "mask.png"], check=True, timeout=120, cwd=tmp_path)
    assert read(tmp_path / "mask.png").shape == (900, 61) and iou(read(tmp_path / "mask.png"), found.mask) >= 0.98  # type: ignore[union-attr]


def needs_node() -> None:
    if shutil.which("node") is None:
        pytest.skip("Node is not installed: apt-get install nodejs npm")
    if not (CONSUMERS / "node_modules/onnxruntime-web").is_dir():
        pytest.skip(f"the examples' packages are not installed: {NPM}")


@pytest.mark.parametrize("runtime", ["onnxruntime-node", "onnxruntime-web"])
def test_node_segments_what_edgekd_does(runtime: str, artifacts: Any, photo: Path, tmp_path: Path) -> None:
    needs_node()
    same(["node", str(CONSUMERS / "onnx_click.mjs")], artifacts("onnx"), photo, tmp_path, 0.95, ORT=runtime)


def test_node_reads_png(artifacts: Any, photo: Path, tmp_path: Path) -> None:
    needs_node()
    with Image.open(photo) as original:
        original.save(tmp_path / "photo.png")
    same(["node", str(CONSUMERS / "onnx_click.mjs")], artifacts("onnx"), tmp_path / "photo.png", tmp_path, 0.99)


def test_versions_of_packages_are_pinned() -> None:
    asked = json.loads((CONSUMERS / "package.json").read_text(encoding="utf-8"))["dependencies"]
    locked = json.loads((CONSUMERS / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    assert asked and {f"node_modules/{name}": version for name, version in asked.items()}.items() <= {k: v.get("version") for k, v in locked.items()}.items()


FRAME = """<!doctype html><iframe id="page" src="{page}" width="900" height="1200"></iframe><script>
const timer = setInterval(() => {{
  const page = document.querySelector("#page").contentDocument, said = page.querySelector("#result")?.value ?? "";
  if (!said.startsWith("{{") && !said.startsWith("failed")) return;
  clearInterval(timer);
  fetch("/answer", {{method: "POST", body: JSON.stringify({{said, mask: page.querySelector("#mask").src}})}});
}}, 50);
</script>"""


class Site(http.server.SimpleHTTPRequestHandler):
    """A folder, the answers posted to it, and nothing on stderr."""

    answers: list[dict[str, str]] = []
    answered = threading.Event()

    def do_POST(self) -> None:
        self.answers.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()
        self.answered.set()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """(folder, address) of a folder that is served."""
    folder = tmp_path / "site"
    folder.mkdir()
    Site.answers, Site.answered = [], threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Site, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_browser_segments_what_edgekd_does(artifacts: Any, photo: Path, tmp_path: Path, site: tuple[Path, str]) -> None:
    chromium = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    if chromium is None:
        pytest.skip("no browser: apt-get install chromium")
    needs_node()
    folder, address = site
    for file in ("onnx_click.html", "onnx_click.js", "node_modules"):
        (folder / file).symlink_to(CONSUMERS / file)
    (folder / "artifact").symlink_to(artifacts("onnx"))
    shutil.copy(photo, folder / "photo.jpg")
    mask, score = wanted(artifacts("onnx"), photo, tmp_path)[0]
    (folder / "frame.html").write_text(FRAME.format(page=f"onnx_click.html?photo=photo.jpg&click={CLICKS[0][0]},{CLICKS[0][1]}"), encoding="utf-8")
    browser = subprocess.Popen([chromium, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", f"--user-data-dir={tmp_path / 'profile'}",
                                f"{address}/frame.html"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert Site.answered.wait(240), "the page gave no answer"
    finally:
        browser.terminate()
        browser.wait(20)
    assert not Site.answers[0]["said"].startswith("failed"), Site.answers[0]["said"]
    told = json.loads(Site.answers[0]["said"])
    assert told["iou"] == pytest.approx(score, abs=0.01) and told["share"] == pytest.approx(mask.mean(), abs=0.01)
    assert iou(read(io.BytesIO(base64.b64decode(Site.answers[0]["mask"].partition(",")[2]))), mask) >= 0.95
