"""What every operator of a component takes, under the names of the network's modules.

Runtimes call their kernels as they like; files of ours say which module an operator came from (`edgekd.protocols.Facts.modules`). `named` joins the two,
here and for rows that a board measured; `names_of` reads the names on this side.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import plugins
from edgekd.artifact import Manifest
from edgekd.errors import UsageError
from edgekd.export._layers import mentioned
from edgekd.profiling.bare import PART, ModelFile, OpenedFile
from edgekd.profiling.profile import Layer
from edgekd.protocols import Facts, facts
from edgekd.runtime import Fitted, Opened

if TYPE_CHECKING:
    import numpy as np

TAILS = 3
"""Modules below a common one that a kernel's name spells out, at most."""


def named(component: str, raw_rows: Iterable[Mapping[str, Any]], names: Mapping[str, str]) -> list[Layer]:
    """Rows of a runtime as layers, in their order.

    A kernel that computes several modules is called after what their paths have in common, `blocks.0.{conv1,act}`. One whose name says nothing (a
    GELU that the runtime put together itself) is called after what its neighbours have in common. What has no module keeps the runtime's name.

    Args:
        raw_rows: `{"name", "op", "ms"}` of one run, `name` as the runtime calls it; where known `"precision"`, and `"covers"`, the operators of the file
            that it computes.
        names: of an operator in the file -> the path of its module in the component (`names_of`), "" for what is in none.
    """
    rows = list(raw_rows)
    order = {module: i for i, module in enumerate(dict.fromkeys(names.values()))}
    found: list[list[str]] = []
    for row in rows:
        own = row.get("covers") or mentioned(str(row["name"]), names)
        found.append(sorted({names[o] for o in own if o in names}, key=order.__getitem__))
    total = sum(float(r["ms"]) for r in rows)
    return [Layer(component=component, name=joined(found[i]) or ("" if found[i] else _between(found, i)) or str(row["name"]), op=str(row["op"]), ms=float(row["ms"]),
                  share=float(row["ms"]) / total if total else 0.0, precision=row.get("precision")) for i, row in enumerate(rows)]


def joined(modules: Sequence[str]) -> str:
    """One name for several modules: what their paths have in common, and behind it in braces what differs where that is short. Those that contain
    another are left out: a sum of the block belongs to the convolution it is computed with."""
    found = [m for m in dict.fromkeys(modules) if m and not any(other.startswith(f"{m}.") for other in modules)]
    if len(found) < 2:
        return found[0] if found else ""
    base = common(found)
    tails = [m[len(base) + 1:] if base else m for m in found]
    return f"{base}{'.' if base else ''}{{{','.join(tails)}}}" if len(tails) <= TAILS else base


def common(modules: Sequence[str]) -> str:
    """The path that all of these begin with."""
    parts = [m.split(".") for m in modules]
    base = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        base.append(level[0])
    return ".".join(base)


def _between(found: Sequence[Sequence[str]], i: int) -> str:
    """What the nearest named rows before and after have in common; nothing at either end."""
    before = next((rows[-1] for rows in reversed(found[:i]) if rows), None)
    after = next((rows[0] for rows in found[i + 1:] if rows), None)
    return common([before, after]) if before and after else ""


def names_of(format: str, file: Path) -> Mapping[str, str]:
    """What a file of a format says of its operators: name -> module. Empty where it says nothing."""
    found: Mapping[str, str] = facts(plugins.exporter(format)).modules(Path(file))
    return found


def sums(layers: Iterable[Layer]) -> dict[str, float]:
    """Component -> milliseconds of all its layers."""
    found: dict[str, float] = {}
    for layer in layers:
        found[layer.component] = found.get(layer.component, 0.0) + layer.ms
    return found


def parts_of(subject: Path | ModelFile) -> dict[str, tuple[str, str, Path]]:
    """Component -> (format, scheme, file)."""
    if isinstance(subject, ModelFile):
        return {PART: (subject.format, subject.scheme, subject.path)}
    manifest = Manifest.load(subject)
    folder = Path(subject) if Path(subject).is_dir() else Path(subject).parent
    return {name: (part.format or manifest.format, part.scheme, folder / part.file) for name, part in manifest.components.items()}


def require(subject: Path | ModelFile) -> None:
    """Raises UsageError when a format's runtime does not tell what single operators take."""
    for name, (format, _, file) in parts_of(subject).items():
        exporter = facts(plugins.exporter(format))
        if getattr(exporter.layers, "__func__", None) is Facts.layers:
            able = [f for f, e in plugins.exporters().items() if getattr(facts(e).layers, "__func__", None) is not Facts.layers]
            raise UsageError(f"the runtime of '{format}' does not tell what single operators take ({name})", where=file,
                             hint=f"leave --layers out, or export the same model to one of {', '.join(sorted(able))}")


def measured(subject: Path | ModelFile, model: Opened | OpenedFile, *, threads: int | None, prompts: int, repeats: int) -> list[Layer]:
    """The layers of every component of an opened artifact or file, on the inputs that the clock gives them."""
    given, found = inputs_of(model, prompts), list[Layer]()
    for part, (format, scheme, file) in parts_of(subject).items():
        if part in given:
            rows = facts(plugins.exporter(format)).layers(file, scheme=scheme, inputs=given[part], threads=threads, repeats=repeats)
            found += named(part, rows, names_of(format, file))
    return found


class _Heard:
    """A session that tells what it is given."""

    def __init__(self, session: Any, tell: Callable[[Mapping[str, np.ndarray]], None]) -> None:
        self._session, self._tell = session, tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, inputs: Mapping[str, np.ndarray]) -> Any:
        """See `edgekd.protocols.Session`."""
        self._tell(inputs)
        return self._session.run(inputs)


def inputs_of(model: Opened | OpenedFile, prompts: int) -> dict[str, dict[str, np.ndarray]]:
    """Component -> the inputs of its file in the first of the calls that are timed, padded to the file's axes where those are fixed."""
    heard: dict[str, dict[str, np.ndarray]] = {}
    opened = model.session

    def session(part: str) -> Any:
        inner = opened(part)

        def tell(inputs: Mapping[str, np.ndarray]) -> None:
            heard.setdefault(part, dict(inputs))

        return _within(inner, tell) if isinstance(inner, Fitted) else _Heard(inner, tell)

    model.session = session  # type: ignore[method-assign]
    try:
        for call in model.calls(prompts).values():
            call()
    finally:
        model.session = opened  # type: ignore[method-assign]
    return heard


def _within(fitted: Fitted, tell: Callable[[Mapping[str, np.ndarray]], None]) -> Fitted:
    """The same padding around a session that tells."""
    found = Fitted.__new__(Fitted)
    vars(found).update(vars(fitted) | {"session": _Heard(fitted.session, tell)})
    return found
