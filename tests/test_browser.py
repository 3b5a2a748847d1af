"""The browser as a device: real Chromium and onnxruntime-web against onnxruntime here, and everything that can be wrong with either."""
from __future__ import annotations

import http.client
import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
from staged import answers_of, inputs_of, stage
from tiny import tiny_sam

from edgekd.errors import EdgekdError, UsageError
from edgekd.exporting import export_model
from edgekd.profiling import drivers, profile_many
from edgekd.profiling.board import loop
from edgekd.profiling.drivers import _ort_nodes
from edgekd.profiling.drivers.browser import rule
from edgekd.profiling.transport import _chromium, _ort_web, browser, reach
from edgekd.profiling.transport._site import Site
from edgekd.target import resolve
from edgekd.workspace import write_json

TARGET = resolve("browser")
MEASURED = {"samples_ms", "warmup", "steady", "outliers", "load_ms", "executed_precision", "executed_ops", "fell_back"}


@pytest.fixture(scope="module")
def real() -> None:
    """Skips where there is no browser or no onnxruntime-web."""
    try:
        _chromium.find()
    except EdgekdError:
        pytest.skip("no browser: apt-get install chromium")
    if _ort_web.find() is None:
        pytest.skip("onnxruntime-web is missing: npm ci --prefix examples/consumers")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """scheme -> a tiny artifact."""
    folder, model = tmp_path_factory.mktemp("artifacts"), tiny_sam(2)
    rng = np.random.default_rng(0)
    calibration = {"encoder": [{"images": rng.standard_normal((1, 3, 64, 64)).astype(np.float32)} for _ in range(4)]}  # the decoder stays in fp32
    for scheme in ("fp32", "w8a8_static"):
        export_model(model, folder / scheme, format="onnx", scheme=scheme, threads=1, calibration=None if scheme == "fp32" else calibration)
    return {s: folder / s for s in ("fp32", "w8a8_static")}


def ours() -> list[str]:
    """Command lines of browsers that edgekd started."""
    return [c for p in psutil.process_iter(["cmdline"]) if "edgekd-chromium-" in (c := " ".join(p.info["cmdline"] or ()))]


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_a_page_measures_what_onnxruntime_computes_here(real: None, artifacts: dict[str, Path], tmp_path: Path) -> None:
    job = stage(tmp_path, artifacts["fp32"], artifacts["w8a8_static"], memory=True, layers=True)
    with reach(TARGET) as device:
        assert device.name == "browser" and "chromium" in device.probe()["versions"]  # type: ignore[operator]
        found = drivers.measure(device, job, tmp_path, TARGET)
    assert not ours() and found["schema"] == "edgekd.measured/1" and found["complete"]
    for model, (scheme, artifact) in zip(found["models"], artifacts.items(), strict=True):
        wanted = answers_of(artifact, inputs_of(artifact))
        assert model["error"] is None and len(model["together_ms"]) == 12 and 1e6 < model["peak_memory_bytes"] < 1e9
        for name, part in model["components"].items():
            assert set(part) >= MEASURED and len(part["samples_ms"]) == 12 and min(part["samples_ms"]) > 0 and part["load_ms"] > 0 and part["fell_back"] == []
            assert {"name", "op", "ms", "precision"} <= set(part["layers"][0]) and len(part["layers"]) == sum(part["executed_ops"].values())
            for output, file in part["answers"].items():
                assert relative(np.fromfile(tmp_path / file, np.float32), wanted[name][output].ravel()) < (1e-3 if scheme == "fp32" else 0.05), (name, output)
        assert statistics.median(model["together_ms"]) > 0.7 * sum(statistics.median(p["samples_ms"]) for p in model["components"].values())
    fp32, int8 = (m["components"]["encoder"] for m in found["models"])
    assert fp32["executed_precision"] == "fp32" and "int8" in int8["executed_precision"] and "QLinearConv" in int8["executed_ops"]
    assert found["circumstances"]["threads"] == 1 and found["circumstances"]["versions"]["onnxruntime-web"] == "1.30.0"
    assert any("HeadlessChrome" in n or "Chrome/" in n for n in found["notes"]) and any("steps by 5 us" in n for n in found["notes"])
    assert any("sandbox" in n for n in found["notes"]) == (os.geteuid() == 0)


def test_profiles_come_out_of_the_whole_way(real: None, artifacts: dict[str, Path]) -> None:
    found = profile_many([artifacts["fp32"], artifacts["w8a8_static"]], TARGET, repeats=5, max_seconds=2.0, layers=True)
    assert [p.transport for p in found] == ["browser", "browser"] and all(p.latency_ms.p50 > 0 and p.latency_ms.n == 5 and p.peak_memory_bytes for p in found)
    assert found[0].answers is not None and max(found[0].answers.values()) < 1e-3 and len(found[0].layers or []) >= 10
    assert any("." in row.name or row.name == "norm" for row in found[0].layers or [] if row.op == "Conv" or "Norm" in row.op), "layers have their modules' names"


def test_a_model_that_fails_is_told_and_the_others_go_on(real: None, artifacts: dict[str, Path], tmp_path: Path) -> None:
    job = stage(tmp_path, artifacts["fp32"], artifacts["fp32"], artifacts["fp32"], artifacts["fp32"], repeats=3)
    (tmp_path / "m0/encoder.onnx").write_bytes(b"no model at all")
    job["models"][1]["components"]["decoder"]["inputs"][0]["shape"] = [1, 16, 4, 8]  # runs nowhere
    job["models"][2]["components"]["encoder"]["format"] = "litert"
    with reach(TARGET) as device:
        found = drivers.measure(device, job, tmp_path, TARGET)
    assert not found["complete"] and [m["error"] is None for m in found["models"]] == [False, False, False, True]
    assert all(m["error"]["what"] and m["error"]["hint"] for m in found["models"][:3]) and len(found["models"][3]["together_ms"]) == 3
    assert "litert" in found["models"][2]["error"]["what"]


def test_a_component_that_is_called_several_times_is_timed_as_one(real: None, artifacts: dict[str, Path], tmp_path: Path) -> None:
    job = stage(tmp_path, artifacts["fp32"], artifacts["fp32"], answers=False)
    job["models"][1]["components"]["decoder"]["calls"] = 20
    with reach(TARGET) as device:
        found = drivers.measure(device, job, tmp_path, TARGET)
    once, often = (statistics.median(m["components"]["decoder"]["samples_ms"]) for m in found["models"])
    assert often > 5 * once and all("answers" not in p for m in found["models"] for p in m["components"].values())


def test_webgpu_where_there_is_none_is_told_as_fallen_back(real: None, artifacts: dict[str, Path], tmp_path: Path) -> None:
    target = TARGET.at(tools={"provider": "webgpu", "flags": "--disable-gpu --disable-features=WebGPU"})
    job = stage(tmp_path, artifacts["fp32"], repeats=3)
    with reach(target) as device:
        found = drivers.measure(device, job, tmp_path, target)
    part = found["models"][0]["components"]["encoder"]
    assert "wasm" in part["fell_back"][0] and part["executed_precision"] == "fp32" and any("webgpu was asked for" in n for n in found["notes"])
    with pytest.raises(UsageError, match="cuda"), reach(target.at(tools={"provider": "cuda"})) as device:
        drivers.measure(device, job, tmp_path, target.at(tools={"provider": "cuda"}))


def test_webgpu_runs_on_an_adapter(real: None, artifacts: dict[str, Path], tmp_path: Path) -> None:
    target = TARGET.at(tools={"provider": "webgpu", "flags": "--enable-unsafe-webgpu --use-webgpu-adapter=swiftshader --enable-features=Vulkan"})
    job = stage(tmp_path, artifacts["fp32"], repeats=3, layers=True)
    with reach(target) as device:
        found = drivers.measure(device, job, tmp_path, target)
    if any("was asked for" in n for n in found["notes"]):
        pytest.skip("this Chromium has no SwiftShader: apt-get install chromium")
    wanted = answers_of(artifacts["fp32"], inputs_of(artifacts["fp32"]))["encoder"]["image_embeddings"]
    part = found["models"][0]["components"]["encoder"]
    assert found["models"][0]["error"] is None, found["models"][0]["error"]
    assert relative(np.fromfile(tmp_path / part["answers"]["image_embeddings"], np.float32), wanted.ravel()) < 1e-3 and "layers" not in part
    assert any("webgpu on" in n for n in found["notes"]) and part["executed_ops"]


def test_a_page_that_hangs_is_killed_with_its_browser(real: None, tmp_path: Path) -> None:
    write_json(tmp_path / "job.json", {"models": [], "memory": False})
    with reach(TARGET) as device:
        where = device.push(tmp_path)
        assert device._site is not None  # type: ignore[attr-defined]
        device._site.folders["page"] = fake_page(tmp_path, "console.error('I am stuck'); new Worker('beat.js'); setInterval(() => {}, 1000)")  # type: ignore[attr-defined]
        with pytest.raises(EdgekdError, match="no answer within 6 s") as e:
            device.run(["measure", f"{where}/job.json"], timeout_s=6)
        assert "I am stuck" in e.value.what and e.value.hint and not ours()


def test_a_page_that_dies_is_noticed(real: None, artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser, "SILENT_S", 4.0)
    job = stage(tmp_path / "job", artifacts["fp32"], artifacts["fp32"], repeats=3)
    measuring = (_ort_web.PAGE / "measure.js").read_text()
    dies = "if (model.id.startsWith('0-')) location.href = 'about:blank';\n    "
    with reach(TARGET) as device:
        marker = "const { session, loadMs } = await open(ort, options, part)"
        assert marker in measuring
        device._site.folders["page"] = fake_page(tmp_path, measuring.replace(marker, dies + marker))  # type: ignore[attr-defined]
        found = drivers.measure(device, job, tmp_path / "job", TARGET)
    assert "died while opening m0/encoder.onnx" in found["models"][0]["error"]["what"] and len(found["models"][1]["together_ms"]) == 3


def fake_page(folder: Path, script: str) -> Path:
    page = folder / "page"
    shutil.copytree(_ort_web.PAGE, page)
    (page / "measure.js").write_text(script)
    return page.resolve()


def test_nothing_is_left_when_edgekd_is_done(real: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser.tempfile, "tempdir", str(tmp_path))
    write_json(tmp_path / "job.json", {})
    device = reach(TARGET)
    with device:
        where = device.push(tmp_path / "job.json")
        address = device._site.address  # type: ignore[attr-defined]
        assert device.run(["measure", where], timeout_s=60).code == 1  # a job without models
        assert device.pull(where, tmp_path / "back.json") and (tmp_path / "back.json").read_text() == (tmp_path / "job.json").read_text()
    device.close()
    assert not ours() and sorted(p.name for p in tmp_path.iterdir()) == ["back.json", "job.json"]
    with pytest.raises(OSError):
        http.client.HTTPConnection(urlsplit(address).netloc, timeout=5).request("GET", "/")
    with pytest.raises(EdgekdError, match="not open"):
        device.push(tmp_path / "job.json")


# --- without a browser

@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "files/own").mkdir(parents=True)
    (tmp_path / "files/own/a b.txt").write_text("here")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "files/link").symlink_to(tmp_path / "secret.txt")
    found = Site({"files": tmp_path / "files"})
    yield found
    found.close()


def ask(site: Site, path: str, *, token: str | None = None, body: bytes | None = None, method: str | None = None, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection(urlsplit(site.address).netloc, timeout=10)
    connection.request(method or ("GET" if body is None else "POST"), f"/{site.token if token is None else token}/{path}", body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read(), dict(answer.getheaders())


def test_a_site_serves_its_folders_isolated(site: Site) -> None:
    status, body, headers = ask(site, "files/own/a%20b.txt?job=x")
    assert (status, body) == (200, b"here") and site.address.startswith("http://127.0.0.1:")
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin" and headers["Cross-Origin-Embedder-Policy"] == "require-corp"


@pytest.mark.parametrize("token", ["", "wrong", "files"])
def test_a_site_refuses_who_does_not_know_the_token(site: Site, token: str) -> None:
    assert ask(site, "files/own/a%20b.txt", token=token)[0] == 403
    assert ask(site, "said", token=token, body=b"{}")[0] == 403 and site.said.empty()
    assert ask(site, "files/own/new.bin", token=token, body=b"x")[0] == 403 and not (site.folders["files"] / "own/new.bin").exists()


@pytest.mark.parametrize("path", ["files/../secret.txt", "files/%2e%2e/secret.txt", "files/..%2fsecret.txt", "files//etc/passwd", "files/own/../../secret.txt",
                                  "files/link", "files/", "files", "", "page/index.html", "files/own", "files/a%00b"])
def test_a_site_gives_nothing_outside_of_its_folders(site: Site, path: str) -> None:
    assert ask(site, path)[0] == 404


@pytest.mark.parametrize("path", ["files/../out.bin", "files/%2e%2e/out.bin", "files/none/out.bin", "files/link", "page/x", "other"])
def test_a_site_takes_outputs_nowhere_else(site: Site, path: str) -> None:
    assert ask(site, path, body=b"x")[0] == 404 and not (site.folders["files"].parent / "out.bin").exists()
    assert (site.folders["files"].parent / "secret.txt").read_text() == "secret"


def test_a_site_hears_what_is_said(site: Site) -> None:
    before = site.heard
    time.sleep(0.02)
    assert ask(site, "said", body=b'{"kind": "done"}')[0] == 204 and site.said.get(timeout=1) == {"kind": "done"} and site.heard > before
    assert ask(site, "beat", body=b"")[0] == 204 and ask(site, "files/own/out.bin", body=b"\0\1")[0] == 204
    assert (site.folders["files"] / "own/out.bin").read_bytes() == b"\0\1"
    assert ask(site, "said", body=b"[1]")[0] == 400 and ask(site, "said", body=b"{")[0] == 400
    assert ask(site, "said", method="POST", body=None, **{"Content-Length": "99999999999"})[0] == 413


class Clock:
    """Times that pass only when a call says so, ms; the same list for both loops."""

    def __init__(self, times: list[float]) -> None:
        self.times, self.at, self.now = times, 0, 0.0

    def call(self) -> None:
        self.now += self.times[self.at % len(self.times)] / 1e3
        self.at += 1

    def __call__(self) -> float:
        return self.now


PORTED = """
import { interleave } from %s;
const { times, rule } = JSON.parse(process.argv[1]);
let now = 0;
const log = [], calls = Object.fromEntries(Object.entries(times).map(([name, list]) => { let at = 0; return [name, async () => { log.push(name); now += list[at++ %% list.length]; }]; }));
console.log(JSON.stringify({ found: await interleave(calls, rule, () => now), log }));
"""


@pytest.mark.parametrize("job", [{"repeats": 30}, {"repeats": 4}, {"repeats": 30, "max_seconds": 0.2}, {"mode": "time", "max_seconds": 0.5}, {"warmup": 9, "repeats": 7}])
def test_the_loop_of_the_page_is_that_of_boards(job: dict[str, Any]) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node: apt-get install nodejs")
    times = {"a": [10.0, 11.0, 9.0, 10.0], "b": [50.0, 20.0, 8.0, 3.0, 3.0, 3.0, 4.0, 3.0, 3.0], "c": [1.0, 40.0, 2.0, 30.0]}
    log: list[str] = []
    shared = Clock([])
    lists = {name: Clock(list_) for name, list_ in times.items()}

    def call(name: str) -> Any:
        def run() -> None:
            log.append(name)
            before = lists[name].now
            lists[name].call()
            shared.now += lists[name].now - before
        return run

    asked = {"warmup": 3, "repeats": 30, "max_seconds": 8.0, "mode": "count"} | job
    wanted = loop.interleave({n: call(n) for n in times}, clock=shared, **asked)  # type: ignore[arg-type]
    script = PORTED % json.dumps((_ort_web.PAGE / "loop.js").as_uri())
    done = subprocess.run([node, "--input-type=module", "-e", script, json.dumps({"times": times, "rule": rule(asked)})], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["log"] == log
    for name, one in wanted.items():
        assert found["found"][name]["values"] == pytest.approx(one.values) and (found["found"][name]["warmup"], found["found"][name]["steady"]) == (one.warmup, one.steady)


def test_profiler_events_tell_precision_operators_and_what_fell_back() -> None:
    def event(name: str, op: str, provider: str, dur: int, *types: str, index: int = 0) -> dict[str, Any]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": dur,
                "args": {"op_name": op, "provider": provider, "node_index": str(index), "input_type_shape": [{t: [1]} for t in types]}}

    run = [event("conv", "Conv", "G", 900, "float16", "float16"), event("q", "QLinearConv", "G", 50, "uint8"), event("odd", "Resize", "CPUExecutionProvider", 7, "float")]
    later = [{**e, "dur": 100} for e in run]
    nodes = _ort_nodes.nodes_of([{"cat": "Session", "name": "model_run", "dur": 1}, *run, {"cat": "Node", "name": "conv_fence_before", "dur": 3, "args": {}}, *later, *later])
    assert _ort_nodes.facts(nodes, "G") == {"executed_precision": "int8+fp16", "executed_ops": {"Conv": 1, "QLinearConv": 1, "Resize": 1},
                                            "fell_back": ["odd (Resize) on CPUExecutionProvider"]}
    assert [(r["name"], r["ms"], r["precision"]) for r in _ort_nodes.layers_of(nodes)] == [("conv", 0.1, "fp16"), ("q", 0.1, "int8"), ("odd", 0.1, "fp32")]


def test_a_missing_browser_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("EDGEKD_CHROME", raising=False)
    with pytest.raises(EdgekdError, match="no Chromium") as e, reach(TARGET):
        pass
    assert "apt-get install chromium" in str(e.value.hint)
    monkeypatch.setenv("EDGEKD_CHROME", "/nowhere/chrome")
    with pytest.raises(EdgekdError, match="/nowhere/chrome"), reach(TARGET):
        pass


def test_a_browser_that_ends_at_once_tells_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "chrome"
    program.write_text("#!/bin/sh\necho 'missing X server' >&2\nexit 7\n")
    program.chmod(0o755)
    monkeypatch.setattr(_ort_web, "require", lambda **_: tmp_path)
    device = browser.connect(TARGET.at(tools={"chrome": str(program)}))
    write_json(tmp_path / "job.json", {})
    with device, pytest.raises(EdgekdError, match=r"(?s)ended with code 7.*missing X server"):
        device.run(["measure", device.push(tmp_path / "job.json")], timeout_s=30)
    with device, pytest.raises(UsageError, match="one program"):
        device.run(["sh", "-c", "true"], timeout_s=1)


def package(folder: Path, version: str) -> Path:
    """Something that looks like onnxruntime-web."""
    (folder / "dist").mkdir(parents=True)
    for name in _ort_web.NEEDED:
        (folder / "dist" / name).write_text("")
    write_json(folder / "package.json", {"name": "onnxruntime-web", "version": version})
    return folder


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No onnxruntime-web but in the cache, which is empty."""
    page = tmp_path / "site-packages/edgekd/profiling/page"
    shutil.copytree(_ort_web.PAGE, page)
    monkeypatch.setattr(_ort_web, "PAGE", page)
    monkeypatch.setenv("EDGEKD_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("EDGEKD_ORT_WEB", raising=False)
    return tmp_path


def test_onnxruntime_web_is_one_version_everywhere(root: Path) -> None:
    locked = json.loads((_ort_web.PAGE / "package-lock.json").read_text())["packages"]
    assert locked["node_modules/onnxruntime-web"]["version"] == _ort_web.version() == "1.30.0"
    assert all(p.get("integrity", "").startswith("sha512-") and "resolved" not in p for name, p in locked.items() if name)
    assert json.loads((root / "examples/consumers/package.json").read_text())["dependencies"]["onnxruntime-web"] == _ort_web.version()


def test_onnxruntime_web_is_found_where_it_lies(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _ort_web.find() is None
    cached = package(_ort_web.cache() / "node_modules/onnxruntime-web", "1.30.0")
    assert _ort_web.find() == cached / "dist"
    package(nowhere / "node_modules/onnxruntime-web", "1.29.0")  # another version is not taken
    assert _ort_web.find() == cached / "dist"
    beside = package(nowhere / "site-packages/examples/consumers/node_modules/onnxruntime-web", "1.30.0")
    assert _ort_web.find() == beside / "dist"
    own = package(nowhere / "own/node_modules/onnxruntime-web", "1.30.0")
    monkeypatch.setenv("EDGEKD_ORT_WEB", str(nowhere / "own"))
    assert _ort_web.find() == own / "dist"
    monkeypatch.setenv("EDGEKD_ORT_WEB", str(nowhere / "node_modules/onnxruntime-web"))
    with pytest.raises(EdgekdError, match=r"1\.29\.0"):
        _ort_web.find()
    monkeypatch.setenv("EDGEKD_ORT_WEB", str(nowhere / "home"))
    with pytest.raises(EdgekdError, match="no folder of onnxruntime-web"):
        _ort_web.find()


def npm(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (folder / "bin").mkdir()
    (folder / "bin/npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin/npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


def test_onnxruntime_web_is_installed_whole_or_not_at_all(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EdgekdError, match="offline") as e:
        _ort_web.require(offline=True)
    assert "edgekd doctor --install browser" in str(e.value.hint)
    made = package(nowhere / "made/node_modules/onnxruntime-web", "1.30.0").parents[1]
    npm(nowhere, monkeypatch, f'[ "$1" = ci ] && [ -f package-lock.json ] || exit 9\ncp -r {made}/node_modules .')
    said: list[str] = []
    found = _ort_web.require(offline=False, progress=said.append)
    assert found == _ort_web.cache() / "node_modules/onnxruntime-web/dist" == _ort_web.find() and said
    assert _ort_web.install(said.append) == found and [p.name for p in (nowhere / "home").iterdir()] == ["browser-1.30.0"]


@pytest.mark.parametrize(("script", "words"), [("echo 'no such host' >&2; exit 1", "no such host"), ("exit 0", "did not bring")])
def test_a_failing_npm_leaves_nothing(nowhere: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str) -> None:
    npm(nowhere, monkeypatch, script)
    with pytest.raises(EdgekdError, match=words) as e:
        _ort_web.require(offline=False, progress=lambda _: None)
    assert e.value.hint and list((nowhere / "home").iterdir()) == []


def test_without_npm_it_says_so(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(nowhere))
    with pytest.raises(EdgekdError, match="npm is missing"):
        _ort_web.install(lambda _: None)
