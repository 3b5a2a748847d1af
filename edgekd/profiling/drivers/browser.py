"""A job carried out by a page in a browser, with onnxruntime-web: on WebAssembly, or on WebGPU where the target's tools say `provider: webgpu`.

Times are those of `session.run` as a page sees them: inputs from JavaScript, outputs back in it. The loop is that of `board/loop.py`, in JavaScript and
with its constants. What was executed is read from onnxruntime's own profile. A model that takes the page down is left out of the next page; one that
throws has its error, and the others go on.
"""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgekd.errors import EdgekdError, UsageError
from edgekd.profiling.board import loop
from edgekd.profiling.board.circumstances import Board, Watch
from edgekd.profiling.board.job import RESULT
from edgekd.profiling.drivers._ort_nodes import Node, facts, layers_of
from edgekd.workspace import write_json

if TYPE_CHECKING:
    from edgekd.profiling.transport import Transport
    from edgekd.profiling.transport.browser import Browser
    from edgekd.target import Target

PROVIDERS = {"wasm": "CPUExecutionProvider", "webgpu": "WebGpuExecutionProvider"}
"""A page's name of what runs operators -> that in onnxruntime's profile."""
COARSE = 0.02
"""Share of a time that the page's clock may step by before it is told."""


def measure(device: Transport, job: dict[str, Any], folder: Path, target: str | Target) -> dict[str, Any]:
    """See `edgekd.profiling.drivers`.

    Raises:
        UsageError: the target names a provider that there is none of.
        EdgekdError: onnxruntime-web does not start, or nothing was heard within the time that the job may take.
    """
    browser = cast("Browser", device)
    provider = "wasm" if isinstance(target, str) else target.device.tools.get("provider", "wasm")
    if provider not in PROVIDERS:
        raise UsageError(f"a browser has no provider '{provider}'", hint=f"tools.provider of the target is one of {', '.join(PROVIDERS)}")
    page, watch = Page(errors={m["id"]: e for m in job["models"] if (e := _refused(m)) is not None}), Watch(Board())
    try:
        while models := [m for m in job["models"] if m["id"] not in page.errors and m["id"] not in page.models]:
            if not _one_page(browser, {**job, "models": models, "browser": {"provider": provider, "rule": rule(job)}}, folder, page):
                break
    except EdgekdError as e:
        e.partial = result(job, page, _circumstances(browser, job, watch), browser.unguarded)  # type: ignore[attr-defined]
        raise
    return result(job, page, _circumstances(browser, job, watch), browser.unguarded)


def rule(job: Mapping[str, Any]) -> dict[str, Any]:
    """The constants of the loop and what the job asks of it, under the names of page/loop.js."""
    told = loop.warm_up.__kwdefaults__ or {}
    return {"window": loop.WINDOW, "minSamples": loop.MIN_SAMPLES, "mostSamples": loop.MOST_SAMPLES, "burst": loop.BURST, "cv": told["cv"], "most": told["most"],
            "warmup": job.get("warmup", 3), "repeats": job.get("repeats", 30), "maxSeconds": job.get("max_seconds", 8.0), "mode": job.get("mode", "count")}


@dataclass
class Page:
    """What pages said: of models that were timed, of what failed, and of the runtime."""

    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, dict[str, Any]] = field(default_factory=dict)
    memory: dict[str, int | None] = field(default_factory=dict)
    runtime: dict[str, Any] = field(default_factory=dict)

    def hear(self, said: Sequence[Mapping[str, Any]]) -> None:
        """Take in what one page said."""
        for one in said:
            if one["kind"] == "started":
                self.runtime = {**one}
            elif one["kind"] == "model":
                self.models[one["model"]] = {**one}
            elif one["kind"] == "failed":
                self.errors[one["model"]] = {"what": f"onnxruntime-web: {one['what']}", "hint": "try the model in onnxruntime here: edgekd profile --target host"}
            elif one["kind"] == "memory":
                self.memory[one["model"]] = one["bytes"]


def _one_page(browser: Browser, asked: dict[str, Any], folder: Path, page: Page) -> bool:
    """A page for the models that are left. Whether another one is needed: because this one died, and the model that it was at is out."""
    write_json(folder / "browser.json", asked)
    where = browser.push(folder)
    calls = sum(len(m["components"]) + 1 for m in asked["models"])
    done = browser.run(["measure", f"{where}/browser.json"], timeout_s=120 + 10 * asked.get("max_seconds", 8.0) * calls + 60 * len(asked["models"]))
    said = [json.loads(line) for line in done.stdout.splitlines()]
    known = len(page.models) + len(page.errors)
    page.hear(said)
    for model in page.models.values():
        for part in model["components"].values():
            for file in (part["answers"] or {}).values():
                if not (folder / file).exists():
                    browser.pull(f"{where}/{file}", folder / file)
    last: Mapping[str, Any] = next((one for one in reversed(said) if one["kind"] == "stage"), {})
    if done.code == 1:
        raise EdgekdError(f"the measuring page failed: {said[-1].get('what')}", where=browser.name, hint=done.stderr.strip() or "is onnxruntime-web whole?")
    if done.code == 0 or (len(page.models) + len(page.errors) > known and last.get("doing") == "memory"):
        return False
    culprit = last.get("model") or (asked["models"][0]["id"] if len(asked["models"]) == 1 else None)
    if culprit is None:
        raise EdgekdError(f"the page died while {last.get('doing', 'starting')}{': ' + done.stderr if done.stderr else ''}", where=browser.name,
                          hint="the models together take more memory than a page has: profile them one at a time")
    if culprit not in page.models:
        page.errors[culprit] = {"what": f"the page died while {last.get('doing', 'starting')}: {done.stderr.strip() or 'the browser said nothing'}",
                                "hint": "a page has at most 4 GB for WebAssembly: try a smaller model"}
    return True


def _refused(model: Mapping[str, Any]) -> dict[str, Any] | None:
    """Why a browser cannot take a model at all."""
    other = sorted({p["format"] for p in model["components"].values()} - {"onnx"})
    return {"what": f"a browser runs ONNX files, and this is {', '.join(other)}", "hint": "export it with --to onnx"} if other else None


def _circumstances(browser: Browser, job: Mapping[str, Any], watch: Watch) -> dict[str, Any]:
    versions = cast("dict[str, str]", browser.probe()["versions"])
    told = watch.told(threads=job.get("threads"), warmup=job.get("warmup", 3), repeats=job.get("repeats", 30), versions=versions)
    return {**told, "python": "none: a browser"}


def result(job: Mapping[str, Any], page: Page, circumstances: dict[str, Any], unguarded: str | None) -> dict[str, Any]:
    """The document of schema `edgekd.measured/1`."""
    runtime = page.runtime
    rows = [_model(m, page, bool(job.get("layers"))) if m["id"] in page.models else
            {"id": m["id"], "components": {}, "together_ms": [], "peak_memory_bytes": None, "energy_mj": None,
             "error": page.errors.get(m["id"], {"what": "it was not measured", "hint": None})} for m in job["models"]]
    if runtime:
        circumstances = {**circumstances, "threads": runtime["threads"], "versions": {**circumstances["versions"], "onnxruntime-web": runtime["version"]}}
    return {"schema": RESULT, "complete": all(m["id"] in page.models for m in job["models"]), "models": rows, "circumstances": circumstances,
            "notes": [*_notes(page, job), *([unguarded] if unguarded else [])]}


def _model(model: Mapping[str, Any], page: Page, with_layers: bool) -> dict[str, Any]:
    told = page.models[model["id"]]
    return {"id": model["id"], "components": {name: _component(part, page.runtime, with_layers) for name, part in told["components"].items()},
            "together_ms": told["together"], "peak_memory_bytes": page.memory.get(model["id"]), "energy_mj": None, "error": None}


def _component(part: Mapping[str, Any], runtime: Mapping[str, Any], with_layers: bool) -> dict[str, Any]:
    samples = loop.Samples(part["values"], part["warmup"], part["steady"])
    found: dict[str, Any] = {"samples_ms": samples.values, "warmup": samples.warmup, "steady": samples.steady and samples.drift is None,
                             "outliers": samples.outliers, "load_ms": part["load_ms"]}
    nodes = [Node(n["name"], n["op"], n["provider"], tuple(n["types"]), n["ms"]) for n in part["nodes"]] if isinstance(part["nodes"], list) else []
    found |= facts(nodes, PROVIDERS[runtime["provider"]]) if nodes else {"executed_precision": "", "executed_ops": {}, "fell_back": []}
    if runtime["provider"] != runtime["wanted"]:
        found["fell_back"] = [f"all operators on {runtime['provider']}: the browser has no WebGPU adapter"]
    if with_layers and nodes and runtime["provider"] == "wasm":  # the profile knows the CPU's times only
        found["layers"] = layers_of(nodes)
    if part["answers"]:
        found["answers"] = part["answers"]
    return found


def _notes(page: Page, job: Mapping[str, Any]) -> list[str]:
    runtime, said = page.runtime, list[str]()
    if not runtime:
        return said
    said.append(f"{runtime['agent']}; {runtime['provider']}{' on ' + runtime['adapter'] if runtime.get('adapter') else ''}, {runtime['threads']} threads of "
                f"{runtime['cores']} cores")
    if runtime["provider"] != runtime["wanted"]:
        said.append(f"{runtime['wanted']} was asked for, and the browser has no adapter for it: everything ran on {runtime['provider']}")
    if not runtime["isolated"]:
        said.append("the page was not isolated from others, so that WebAssembly had one thread")
    step = runtime.get("resolution")
    if step is not None:
        said.append(f"the page's clock steps by {step * 1e3:.0f} us")
        shortest = min((min(p["values"]) for m in page.models.values() for p in m["components"].values() if p["values"]), default=None)
        if shortest is not None and step > COARSE * shortest:
            said.append(f"the shortest run of {shortest:.3f} ms is few steps of that clock: its quantiles are coarse")
    if any(not isinstance(p["nodes"], list) or not p["nodes"] for m in page.models.values() for p in m["components"].values()):
        said.append("onnxruntime-web did not say what it executed in some component: precision and operators are those of the file")
    if job.get("memory") and page.models:
        said.append("memory is that of a page of its own after one run of the model: WebAssembly never gives any back, so this is the most it had")
    return said
