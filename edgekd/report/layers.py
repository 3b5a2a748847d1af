"""What every operator of a model takes, as a page that stands alone: advice, the costliest layers, kinds of operators, and the network's tree."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup

from edgekd.profiling.advice import Advice
from edgekd.profiling.profile import Layer, Profile
from edgekd.report.sensitivity import STYLE
from edgekd.workspace import write_atomic

WIDTH, ROW, NAME = 900, 18, 380
TOP = 25
DEPTH, LEAST = 5, 0.005
"""How deep the tree goes, and the share from which a branch is shown."""
MORE = """ table { border-collapse: collapse; width: 100%; font-size: 13px } td { padding: 2px 8px 2px 0; vertical-align: top } td.n { text-align: right; white-space: nowrap }
li { line-height: 1.45; margin-bottom: .5rem } code { font-size: 12px } details { margin-left: 1.1rem } summary, .leaf { font-size: 13px; line-height: 1.5 }
.leaf { margin-left: 1.1rem } .share { display: inline-block; min-width: 4.2rem; color: #6b7280 }"""


@dataclass
class Branch:
    """A module with what is in it: milliseconds of all, and its children by name."""

    ms: float = 0.0
    children: dict[str, Branch] = field(default_factory=dict)


def tree(layers: Sequence[Layer]) -> Branch:
    """The layers of one component by the path of their module. What a kernel computes of several modules counts for the one that contains them."""
    root = Branch()
    for layer in layers:
        root.ms += layer.ms
        at = root
        for part in [p for p in layer.name.split("{")[0].split(".") if p]:
            at = at.children.setdefault(part, Branch())
            at.ms += layer.ms
    return root


def by(layers: Sequence[Layer], key: Callable[[Layer], str]) -> list[tuple[str, float, int]]:
    """(what, milliseconds, how many) of layers put together, the most costly first."""
    found: dict[str, list[float]] = {}
    for layer in layers:
        found.setdefault(key(layer), []).append(layer.ms)
    return sorted(((name, sum(ms), len(ms)) for name, ms in found.items()), key=lambda row: -row[1])


def page(path: Path, found: Profile, advice: Sequence[Advice]) -> Path:
    """Write the page of a profile with layers at `path`, atomically."""
    layers = found.layers or []
    parts = dict.fromkeys(layer.component for layer in layers)
    where = found.circumstances
    body = Markup("""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{id}: layers</title><style>{style}{more}</style>
<h1>{id}: what its layers take</h1><p>{target}, {transport}; {hardware}; {threads} threads. Times are the runtime's own count of single operators, which slows it a little; shares are of
their sum. Without counting {clocked}.</p><h2>Advice</h2>{advice}{parts}</html>
""").format(id=found.id, style=Markup(STYLE), more=Markup(MORE), target=found.target, transport=found.transport, hardware=where.device,
            threads=where.threads or "the runtime's own choice of", clocked=_clocked(found), advice=_advice(advice),
            parts=Markup("").join(_part(name, [one for one in layers if one.component == name]) for name in parts))
    return write_atomic(path, body)


def _clocked(found: Profile) -> str:
    sums = {name: sum(one.ms for one in found.layers or [] if one.component == name) for name in found.components}
    return ", ".join(f"the {name} takes {part.latency_ms.p50:.3g} ms (the sum here is {sums[name]:.3g} ms)" for name, part in found.components.items())


def _advice(advice: Sequence[Advice]) -> Markup:
    if not advice:
        return Markup("<p>Nothing stands out: the time is spread over what carries the arithmetic.</p>")
    rows = (Markup("<li><b>{what}</b>: {share:.0f} % of the {component}, {ms:.3g} ms (<code>{layers}</code>). {do}. Why: <code>{see}</code></li>").format(
        what=a.what, share=100 * a.share, component=a.component if a.rule != "decoder" else "whole", ms=a.ms, layers=", ".join(a.layers) or a.component,
        do=a.do[0].upper() + a.do[1:], see=a.see) for a in advice)
    return Markup("<ul>{}</ul>").format(Markup("").join(rows))


def _part(name: str, layers: Sequence[Layer]) -> Markup:
    total = sum(one.ms for one in layers) or 1e-12
    top = sorted(layers, key=lambda one: -one.ms)[:TOP]
    kinds = by(layers, lambda one: f"{one.op}, {one.precision}" if one.precision else one.op)
    rest = Markup("<p>{} further layers take {:.3g} ms together.</p>").format(len(layers) - len(top), total - sum(o.ms for o in top)) if len(layers) > len(top) else ""
    return Markup("<h2>The costliest layers of the {name}</h2>{top}{rest}<h2>Its kinds of operators</h2>{kinds}<h2>Its modules</h2>{tree}").format(
        name=name, top=_bars([(one.name, one.ms, f"{one.op}, {one.precision or '?'}") for one in top], total), rest=rest,
        kinds=_bars([(kind, ms, f"{count}") for kind, ms, count in kinds], total), tree=_branches(tree(layers), total, 0))


def _bars(rows: Sequence[tuple[str, float, str]], total: float) -> Markup:
    """(name, milliseconds, note) as bars whose length is their share of the largest."""
    most = max([ms for _, ms, _ in rows] + [1e-12])
    parts = []
    for i, (name, ms, note) in enumerate(rows):
        y, length = i * ROW, ms / most * (WIDTH - NAME - 320)
        parts.append(Markup('<text x="{}" y="{}" text-anchor="end">{}<title>{}</title></text><rect class="bar" x="{}" y="{}" width="{:.1f}" height="{}"/>'
                            '<text x="{:.1f}" y="{}">{:.3g} ms, {:.1f} %</text><text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(
            NAME - 8, y + 13, _short(name), name, NAME, y + 3, max(length, 1.0), ROW - 6, NAME + max(length, 1.0) + 6, y + 13, ms, 100 * ms / total, WIDTH - 4, y + 13, note))
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="milliseconds">{}</svg>').format(WIDTH, len(rows) * ROW + 4, Markup("").join(parts))


def _short(name: str, most: int = 56) -> str:
    """A path with its end kept, which tells more."""
    return name if len(name) <= most else f"…{name[-most + 1:]}"


def _branches(branch: Branch, total: float, depth: int) -> Markup:
    shown = sorted(((n, c) for n, c in branch.children.items() if c.ms >= LEAST * total), key=lambda item: -item[1].ms)
    return Markup("").join(_branch(name, child, total, depth) for name, child in shown)


def _branch(name: str, branch: Branch, total: float, depth: int) -> Markup:
    label = Markup('<span class="share">{:.1f} %</span>{} <span class="tick">{:.3g} ms</span>').format(100 * branch.ms / total, name, branch.ms)
    inner = _branches(branch, total, depth + 1) if depth + 1 < DEPTH else Markup("")
    if not inner:
        return Markup('<div class="leaf">{}</div>').format(label)
    return Markup("<details{}><summary>{}</summary>{}</details>").format(Markup(" open") if depth < 2 else "", label, inner)


def document(found: Profile, advice: Sequence[Advice]) -> Mapping[str, object]:
    """What a profile with layers says besides: milliseconds of all layers of a component, how much more that is than a call without counting, and the advice."""
    sums = {name: sum(one.ms for one in found.layers or [] if one.component == name) for name in found.components}
    return {"layers_sum_ms": sums, "layers_overhead": {name: sums[name] / part.latency_ms.p50 - 1 for name, part in found.components.items()},
            "advice": [one.model_dump(mode="json") for one in advice]}
