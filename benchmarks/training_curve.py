"""The curve of `sam_nano`'s training as an SVG, and the log thinned to one row in ten.

    python benchmarks/training_curve.py runs/sam_nano/log.jsonl docs/sam_nano
"""
from __future__ import annotations

import json
import sys
from pathlib import Path

from edgekd.workspace import write_atomic

WIDTH, HEIGHT, PAD = 720, 260, 42
SERIES = {"iou_first": "#2563eb", "iou_last": "#0f766e", "affinity": "#b45309"}


def read(path: Path) -> list[dict[str, float]]:
    """The rows in order of steps; a step that was trained again after a resume counts once, as it was last."""
    rows = {r["step"]: r for r in map(json.loads, path.read_text().splitlines()) if "loss" in r}
    return [rows[k] for k in sorted(rows)]


def smooth(values: list[float], window: int = 40) -> list[float]:
    """A running mean over the last `window` values."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def svg(rows: list[dict[str, float]]) -> str:
    """IoU on training batches after the first prompt and after the last click, and the affinity loss; all lie in 0..1."""
    last = rows[-1]["step"]
    def x(step: float) -> float:
        return PAD + (WIDTH - 2 * PAD) * step / last
    def y(value: float) -> float:
        return HEIGHT - PAD - (HEIGHT - 2 * PAD) * min(1.0, value)
    lines = [f'<line x1="{PAD}" x2="{WIDTH - PAD}" y1="{y(v)}" y2="{y(v)}" stroke="#e5e7eb"/><text x="8" y="{y(v) + 4}">{v:g}</text>' for v in (0, 0.25, 0.5, 0.75, 1)]
    lines += [f'<text x="{x(s) - 12}" y="{HEIGHT - 18}">{s}</text>' for s in range(0, int(last) + 1, 400)]
    for i, (name, colour) in enumerate(SERIES.items()):
        points = " ".join(f"{x(r['step']):.1f},{y(v):.1f}" for r, v in list(zip(rows, smooth([r[name] for r in rows]), strict=True))[::5])
        lines += [f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>',
                  f'<text x="{PAD + 10 + 120 * i}" y="24" fill="{colour}">{name}</text>']
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12" fill="#374151">'
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>{"".join(lines)}</svg>\n')


def main(log: Path, folder: Path) -> None:
    """Write curve.svg and log.jsonl."""
    rows = read(log)
    write_atomic(folder / "curve.svg", svg(rows))
    write_atomic(folder / "log.jsonl", "".join(json.dumps({k: round(v, 5) for k, v in r.items()}) + "\n" for r in rows[::10]))
    print(f"{len(rows)} steps, IoU of the first prompt {smooth([r['iou_first'] for r in rows])[-1]:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
