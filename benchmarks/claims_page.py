"""docs/claims.md and docs/claims.svg from a committed result of benchmarks/claims.py.

    python benchmarks/claims_page.py benchmarks/results/claims-2026-11-21.json
"""
from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path
from typing import Any

from edgekd.workspace import write_atomic

ROOT = Path(__file__).resolve().parents[1]
PAGE, PLOT = ROOT / "docs/claims.md", ROOT / "docs/claims.svg"
NAMES = {"box_miou": "box", "center_miou": "centre click", "center_plus1_miou": "centre + 1", "center_plus2_miou": "centre + 2",
         "box_iou_head_miou": "box, mask by IoU head", "center_iou_head_miou": "centre, mask by IoU head", "center_iou_head_gap": "gap to the best mask"}
SETS = {"difference": "scenes", "difference_photos": "photos"}
CLAIMS = {"prompt_loop_vs_encoder_only": "prompts in the loop, against the embedding alone", "one_loop_vs_none": "one corrective click in training, against none",
          "iou_head_distilled_vs_not": "IoU head distilled, against not"}
WIDTH, ROW, LEFT = 760, 20, 330


def verdict(paper: float | None, found: dict[str, Any]) -> str:
    """What a difference with its interval says of the paper's."""
    if found["low"] <= 0 <= found["high"]:
        return "no difference shown"
    if paper is None or abs(paper) < 0.5:
        return "better" if found["mean"] > 0 else "worse"
    return "reproduced" if found["mean"] * paper > 0 else "**did not reproduce**"


def claim_table(result: dict[str, Any], claim: dict[str, Any], paper: dict[str, Any]) -> list[str]:
    """Rows of one comparison."""
    lines = ["| measured on | prompt | difference, points | 95 % interval | each seed | paper | |", "| --- | --- | ---: | --- | --- | ---: | --- |"]
    for key, name in SETS.items():
        for metric, found in claim.get(key, {}).items():
            quoted = paper.get(metric)
            seeds = ", ".join(f"{v:+.1f}" for v in found["per_seed"])
            lines.append(f"| {name} | {NAMES[metric]} | {found['mean']:+.2f} | {found['low']:+.2f} to {found['high']:+.2f} | {seeds} | "
                         f"{'' if quoted is None else f'{quoted:+.1f}'} | {verdict(quoted, found)} |")
    return lines


def in_short(result: dict[str, Any], key: str, title: str) -> str:
    """One line a claim: how many of its differences stand clear of 0, and on which side."""
    found = [f for s in SETS for f in result[key].get(s, {}).values()]
    better, worse = sum(f["low"] > 0 for f in found), sum(f["high"] < 0 for f in found)
    return f"- {title}: {better} of {len(found)} better, {worse} worse, {len(found) - better - worse} not shown to differ"


def level_table(rows: list[dict[str, Any]]) -> list[str]:
    """The arms' own numbers."""
    sets = [s for s in SETS.values() if f"{s}.box_miou" in rows[0]]
    head = "| arm | seconds | " + " | ".join(f"{s}: box / centre / centre + 2" for s in sets) + " |"
    lines = [head, "| --- | ---: |" + " --- |" * len(sets)]
    for row in rows:
        cells = [" / ".join(f"{row[f'{s}.{m}']['mean']:.1f}" for m in ("box_miou", "center_miou", "center_plus2_miou")) for s in sets]
        lines.append(f"| `{row['arm']}` | {row['seconds']:.0f} | {' | '.join(cells)} |")
    return lines


def league_table(rows: list[dict[str, Any]]) -> list[str]:
    """The league, best first."""
    lines = ["| | objective | scenes: box | centre | against `feature_mse`, box | centre | seconds |", "| ---: | --- | ---: | ---: | --- | --- | ---: |"]
    for i, row in enumerate(rows, 1):
        against = row["against_feature_mse"]["difference"]
        cells = [f"{against[m]['mean']:+.2f} ({against[m]['low']:+.2f} to {against[m]['high']:+.2f})" if row["arm"] != "feature_mse" else "" for m in ("box_miou", "center_miou")]
        spread = [f"{row[f'scenes.{m}']['mean']:.1f} ({row[f'scenes.{m}']['low']:.1f} to {row[f'scenes.{m}']['high']:.1f})" for m in ("box_miou", "center_miou")]
        lines.append(f"| {i} | `{row['arm']}` | {spread[0]} | {spread[1]} | {cells[0]} | {cells[1]} | {row['seconds']:.0f} |")
    return lines


def page(result: dict[str, Any], source: str) -> str:
    """The Markdown."""
    about, scale = result["circumstances"], result["scale"]
    lines = ["# The claims, rerun", "", "<!-- made by benchmarks/claims_page.py; edit that -->", "",
             f"Teacher `{result['teacher']}`, student `{result['student']}` from random weights, {scale['images']} procedural scenes and the example photos, batch {result['batch']}, "
             f"{scale['seeds']} seeds. Start: {scale['base']} steps on the embedding; then {scale['more']} steps of what is compared. Measured on {scale['scenes']} scenes that were never "
             f"trained on and on people's regions of {scale['photos']} real photos. Intervals: photos drawn again, both arms together. A small student trained for minutes: the "
             "direction of a difference can be compared with a paper's, its size cannot.", "",
             f"Measured on {about['device']}, {about['date'][:10]}, torch {about['versions']['torch']}. From `{source}`.", "", "![differences with intervals](claims.svg)", ""]
    lines += ["In short, of the differences on both sets and all prompts:", "", *(in_short(result, key, title) for key, title in CLAIMS.items() if key in result), ""]
    for key, title in CLAIMS.items():
        if key in result:
            paper = result["paper"].get(key, {})
            lines += [f"## {title[0].upper()}{title[1:]}", "", *([f"Paper: {paper['source']}.", ""] if paper else []), *claim_table(result, result[key], paper), ""]
    if "loop" in result:
        lines += ["## The arms themselves", "", *level_table(result["loop"]), ""]
    for small in result.get("small_data", []):
        lines += [f"## Few images: {small['scenes']} scenes", "", *claim_table(result, small["prompt_loop_vs_encoder_only"], {}), "", *level_table(small["arms"]), ""]
    if "league" in result:
        lines += ["## League of objectives", "", f"{scale['league']} steps each from the same random weights. `feature_mse + X` weighs X so that both are equally large on the first batch; "
                  "nothing was tuned for any of them. In brackets the lowest and highest seed, or the interval of the difference.", "", *league_table(result["league"]), ""]
    return "\n".join(lines)


def plot(result: dict[str, Any]) -> str:
    """Dots with whiskers: every difference, those of the claims first."""
    rows: list[tuple[str, dict[str, float] | None, float | None]] = []
    for key, title in CLAIMS.items():
        if key in result:
            rows.append((title, None, None))
            rows += [(f"{SETS[s]}, {NAMES[m]}", found, result["paper"].get(key, {}).get(m) if s == "difference" else None)
                     for s in SETS for m, found in result[key].get(s, {}).items()]
    if "league" in result:
        rows.append(("objective, against feature_mse: box on scenes", None, None))
        rows += [(r["arm"], r["against_feature_mse"]["difference"]["box_miou"], None) for r in result["league"] if r["arm"] != "feature_mse"]
    values = [v for _, found, paper in rows if found for v in (found["low"], found["high"], *([paper] if paper is not None else []))] + [0.0]
    low, high = min(values), max(values)
    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - 20)
    height = ROW * len(rows) + 40
    parts = [f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="8" y2="{height - 28}" stroke="#9ca3af"/>']
    for i, (label, found, paper) in enumerate(rows):
        y = 20 + ROW * i
        if found is None:
            parts.append(f'<text x="8" y="{y + 4}" font-weight="600">{escape(label)}</text>')
            continue
        colour = "#9ca3af" if found["low"] <= 0 <= found["high"] else "#0f766e" if found["mean"] > 0 else "#b91c1c"
        parts.append(f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end">{escape(label)}</text>'
                     f'<line x1="{x(found["low"]):.1f}" x2="{x(found["high"]):.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>'
                     f'<circle cx="{x(found["mean"]):.1f}" cy="{y}" r="4" fill="{colour}"/>')
        if paper is not None:
            parts.append(f'<rect x="{x(paper) - 4:.1f}" y="{y - 4}" width="8" height="8" fill="none" stroke="#b45309" stroke-width="1.6"/>')
    ticks = range(int(low) - 1, int(high) + 2, max(1, round((high - low) / 8)))
    parts += [f'<text x="{x(t):.1f}" y="{height - 12}" text-anchor="middle">{t:+d}</text>' for t in ticks if low <= t <= high]
    parts.append(f'<text x="8" y="{height - 12}">points of mIoU; square: the paper\'s</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12" fill="#374151">'
            f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>\n')


def main(source: Path) -> None:
    """Write both."""
    result = json.loads(source.read_text())
    write_atomic(PAGE, page(result, source.resolve().relative_to(ROOT).as_posix()))
    write_atomic(PLOT, plot(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
