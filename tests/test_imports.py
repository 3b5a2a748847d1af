"""The architecture, enforced: imports go one way, files and functions stay small, public functions are typed."""
from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIDE = ("export", "profiles", "recipes")

# Left may be imported by right, never the other way round; parts of one layer do not import each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("protocols", "workspace", "measurement", "console", "tuning"),
    ("plugins",),
    ("config", "artifact", "ledger"),
    ("recipe", "search_section", "target", "probes", "schemes"),
    ("export",),
    ("models", "data"),
    ("students",),
    ("zoo",),
    ("teachers",),
    ("checkpoint",),
    ("runtime", "parity"),  # what all tasks share; they find a task by its name (plugins.task), so that a new task is a folder and no more
    ("tasks",),
    ("distillation", "quantization", "exporting", "profiling"),
    ("latency",),
    ("report.schema", "search", "budget", "decision"),
    ("report",),
    ("resolve", "doctor", "catalogue", "plan", "inspecting", "converting"),
    ("trial", "showing", "handover"),
    ("comparing", "exploring", "pipeline"),
    ("mixing", "pruning", "qat"),
    ("own", "measuring"),
    ("exports",),
    ("api",),
    ("cli",),
)
SIBLINGS = {"distillation", "quantization", "exporting", "profiling"}
EXPORT_MAY = {"errors", "protocols", "artifact", "workspace", "tuning", "export"}
# A teacher is read from a checkpoint, and a checkpoint builds the teacher it names: one of the two is imported inside a function.
KNOWN_KNOTS = {("teachers", "checkpoint")}


def modules() -> Iterator[tuple[str, Path]]:
    """Dotted name below edgekd -> file, side folders included."""
    for folder, prefix in ((ROOT / "edgekd", ""), *((ROOT / s, s) for s in SIDE)):
        for path in sorted(folder.rglob("*.py")):
            parts = [*filter(None, [prefix]), *path.relative_to(folder).with_suffix("").parts]
            yield ".".join(p for p in parts if p != "__init__"), path


MODULES = list(modules())


def part_of(name: str) -> str:
    """The unit of the layering that a module belongs to."""
    return name if name == "report.schema" else name.split(".")[0]


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """(module below edgekd, whether only for typing) for every import of ours anywhere in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
                   for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{a.name}" for a in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "edgekd":
                yield name.removeprefix("edgekd").removeprefix("."), id(node) in typing_only


def layer(part: str) -> int:
    return next((i for i, parts in enumerate(LAYERS) if part in parts), -1)


def test_layers__name_every_part() -> None:
    known = {p for parts in LAYERS for p in parts}
    parts = {part_of(name) for name, _ in MODULES} - {"", "__main__", "profiles", "recipes"}
    assert not parts - known, "add the new part to LAYERS, below everything that imports it"


@pytest.mark.parametrize(("name", "path"), MODULES, ids=[n or "edgekd" for n, _ in MODULES])
def test_imports__go_one_way(name: str, path: Path) -> None:
    own = part_of(name)
    if own in ("", "__main__", "profiles", "recipes"):
        return
    wrong = []
    for target, typing_only in imported(path):
        if not target or typing_only or (own, target.split(".")[0]) in KNOWN_KNOTS:
            continue
        other = "report.schema" if target.startswith("report.schema") else target.split(".")[0]
        if other == own or layer(other) == -1 or {own, other} == {"report", "report.schema"}:
            continue
        if layer(other) > layer(own) or (own in SIBLINGS and other in SIBLINGS):
            wrong.append(target)
    assert not wrong, f"{name} may not import {wrong}"


@pytest.mark.parametrize(("name", "path"), [(n, p) for n, p in MODULES if n.startswith("export.")], ids=lambda v: str(v).rsplit("/")[-1])
def test_exporters__import_only_the_contract(name: str, path: Path) -> None:
    wrong = [t for t, typing_only in imported(path) if not typing_only and t.split(".")[0] not in EXPORT_MAY]
    assert not wrong


LIGHT = ("edgekd", "edgekd.cli", "edgekd.errors", "edgekd.protocols", "edgekd.workspace", "edgekd.measurement", "edgekd.recipe", "edgekd.target",
         "edgekd.artifact", "edgekd.report.schema", "edgekd.decision", "edgekd.api", "edgekd.catalogue", "edgekd.doctor", "edgekd.runtime")
HEAVY = ("torch", "onnx", "onnxruntime", "openvino", "nncf", "transformers", "plotly")
PROBE = """
import importlib, json, sys
seen = {}
for name in %r:
    importlib.import_module(name)
    seen[name] = [m for m in %r if m in sys.modules]
    if name == "edgekd.cli":
        seen["help"] = [m for m in ("pydantic", "numpy", "yaml", "rich.table", "edgekd.api", "psutil") if m in sys.modules]
from edgekd import plugins
plugins.exporters()
seen["exporters"] = [m for m in %r if m in sys.modules]
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """Heavy libraries that are loaded after importing each light module in turn, in one fresh process."""
    done = subprocess.run([sys.executable, "-c", PROBE % (LIGHT, HEAVY, HEAVY)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules__load_no_heavy_library(loaded: dict[str, list[str]], module: str) -> None:
    assert loaded[module] == []


def test_exporters__are_listed_without_their_toolchains(loaded: dict[str, list[str]]) -> None:
    assert loaded["exporters"] == []


def test_cli__imports_only_what_help_needs(loaded: dict[str, list[str]]) -> None:
    assert loaded["help"] == []


@pytest.mark.parametrize(("name", "path"), MODULES, ids=[n or "edgekd" for n, _ in MODULES])
def test_house_limits(name: str, path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400, "no file over 400 lines"
    tree = ast.parse(text)
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = [f.name for f in functions if (f.end_lineno or 0) - f.lineno + 1 > 60]
    untyped = [f.name for f in functions if f.returns is None]
    assert not long, f"over 60 lines: {long}"
    assert not untyped, f"without a return type: {untyped}"
    assert not text.strip() or ast.get_docstring(tree), "every module says what it is for"
