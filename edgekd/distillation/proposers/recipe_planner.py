"""Which recipe for these photos: what earlier runs here and the rerun claims say, and where they say nothing, what the papers do.

He, Shi, Mueller, Zha, Li, Karypis, "Distiller: A Systematic Study of Model Distillation Methods in Natural Language Processing" (arXiv 2109.11105): the
best pipeline differs from data set to data set, and one recommended from the results on others beats a fixed one. Its AutoDistiller trains
a predictor on hundreds of runs; a checkout has few, so that here every recommendation is an average or a rule, with its source.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd import recipe
from edgekd.distillation import points
from edgekd.distillation.points import Proposer, Suggestion
from edgekd.distillation.proposers import _history as history
from edgekd.errors import UsageError
from edgekd.protocols import Dataset

SMALL = 500
"""Photos; EdgeSAM's users with fewer saw its loss diverge (chongzhou96/EdgeSAM, issue 55)."""
FEWEST_STEPS, MOST_STEPS, BATCH = 60, 20_000, 8


@dataclass(frozen=True)
class Facts:
    """What a recommendation hangs on."""

    images: int
    task: str
    labelled: bool
    gap: float | None
    low_precision: bool


@dataclass(frozen=True)
class Rule:
    """Advice of a paper: `plug_ins` by point, of which those that exist are named; `epochs` of the photos; `recipe` as shipped."""

    when: Callable[[Facts], bool]
    plug_ins: tuple[tuple[str, str], ...]
    confidence: float
    why: str
    source: str
    recipe: str | None = None
    epochs: int = 10


RULES = (
    Rule(lambda f: f.task == "promptable_segmentation" and f.images <= SMALL, (("objective", "feature_mse"), ("objective", "prompt_masks")), 0.6,
         "few photos: start from a shipped student, few steps at a small rate, frozen batch norms, the teacher's soft masks and no labels",
         "EdgeSAM issue 55; arXiv 2312.06660", "default", 10),
    Rule(lambda f: f.task == "promptable_segmentation" and f.images > SMALL,
         (("objective", "feature_mse"), ("objective", "prompt_masks"), ("objective", "iou_head")), 0.6,
         "embeddings first, then prompts in the loop for encoder and decoder: +1.0 box, +2.9 centre over embeddings alone", "EdgeSAM, arXiv 2312.06660", "edge_sam", 10),
    Rule(lambda f: f.task == "promptable_segmentation", (("objective", "feature_mse"),), 0.4,
         "embeddings alone, under the teacher's own decoder: the cheapest start, and no prompts are drawn", "MobileSAM, arXiv 2306.14289", "mobile_sam", 8),
    Rule(lambda f: f.task == "classification" and not f.labelled, (("objective", "ssld"),), 0.6,
         "no labels are needed: matching the teacher's predictions alone took MobileNetV3-large from 75.2 to 79 %", "SSLD, arXiv 2103.05959", "ssld", 60),
    Rule(lambda f: f.task == "classification" and f.labelled and f.images <= SMALL, (("objective", "kd"),), 0.5,
         "few photos: let the teacher count and not the labels; the fewer the photos, the larger its best weight", "data pruning, arXiv 2403.07854, sec. 4", None, 60),
    Rule(lambda f: f.task == "classification" and f.labelled and f.images > SMALL,
         (("objective", "dkd"), ("objective", "dist"), ("objective", "cross_entropy")), 0.4,
         "labels beside the teacher's logits, target and other classes weighed apart, or ranked", "DKD, arXiv 2203.08679; DIST, arXiv 2205.10536", None, 60),
    Rule(lambda f: f.task == "dense_features", (("objective", "feature_cosine"), ("objective", "token_relations")), 0.4,
         "directions and relations of cells carry over where widths differ", "TRG, arXiv 2306.12442", None, 20),
    Rule(lambda f: f.images > SMALL and f.task == "classification", (("policy", "views"), ("policy", "mixup")), 0.4,
         "new crops and mixtures in every epoch, the same for teacher and student, and patience; the teacher is asked live", "arXiv 2106.05237; arXiv 2211.03946", None, 100),
    Rule(lambda f: f.gap is not None and f.gap > 10, (("controller", "assistants"),), 0.4,
         "the teacher is more than 10 times as large: an assistant between them", "AMD, arXiv 2407.04208", None, 10),
    Rule(lambda f: f.low_precision, (("controller", "fake_quant"), ("objective", "quant_gap")), 0.5,
         "a last stage in low precision against the student's own full precision", "arXiv 1802.05668; arXiv 2211.11014", None, 3),
)


def recommend(images: int, *, task: str = "promptable_segmentation", teacher: str = "sam_nano", student: str | None = None, metric: str = "box_miou",
              labelled: bool = False, gap: float | None = None, low_precision: bool = False, runs: str | Path = "runs",
              claims: str | Path = "benchmarks/results") -> list[dict[str, Any]]:
    """Recipes and objectives for a set of photos, the surest first.

    Args:
        images: photos to learn from.
        student: by name; None for any.
        metric: as reports call it, `box_miou`, `teacher_agreement.box`, `top1`.
        labelled: whether the photos have labels of their own.
        gap: parameters of the teacher over the student's, when known.
        low_precision: whether the student will ship in 8 bits or less.
        runs, claims: folders with earlier runs and with `claims*.json`.

    Returns:
        Rows with `recipe` (a shipped one's name or None), `plug_ins` (point -> names), `steps`, `confidence` (0..1: how much the source says about
        this case, no probability), `evidence` (`measured` here, or `quoted` from a paper), `why` and `source`.

    Raises:
        UsageError: fewer than one photo.
    """
    if images < 1:
        raise UsageError(f"there is no recipe for {images} photos")
    facts = Facts(images, task, labelled, gap, low_precision)
    found = [*_from_runs(history.runs(Path(runs), metric), facts, teacher, student, metric),
             *_from_claims(history.claims(Path(claims), metric), facts, metric),
             *(_from_rule(rule, facts, teacher) for rule in RULES if rule.when(facts))]
    return sorted((row for row in found if row["plug_ins"]), key=lambda row: -row["confidence"])


def _row(plug_ins: Sequence[tuple[str, str]], **facts: Any) -> dict[str, Any]:
    """A recommendation; plug-ins that this installation does not have are left out of it."""
    known = [(point, name) for point, name in plug_ins if name in points.registry(point)]
    return {"recipe": facts.pop("recipe", None), "plug_ins": {p: [n for q, n in known if q == p] for p in dict.fromkeys(q for q, _ in known)}, **facts}


def _from_runs(found: Sequence[history.Run], facts: Facts, teacher: str, student: str | None, metric: str) -> list[dict[str, Any]]:
    """One row for every recipe that earlier runs used, by the share of the teacher's accuracy that its students kept."""
    rows = []
    for name, objectives in dict.fromkeys((r.recipe, r.objectives) for r in found):
        mine = [r for r in found if (r.recipe, r.objectives) == (name, objectives)]
        same = [r for r in mine if r.teacher == teacher]
        near = [r for r in same if r.student == student] if student else same
        used = near or same or mine
        trust = len(used) / (len(used) + 2) * (1.0 if near else 0.7 if same else 0.4)
        kept = sum(r.kept for r in used) / len(used)
        rows.append(_row([("objective", o) for o in objectives], recipe=name if name in recipe.names() else None,
                         steps=used[0].steps or steps_for(facts.images, 10), confidence=round(min(1.0, kept) * trust, 3), evidence="measured", source=", ".join(sorted({f"runs/{r.folder}" for r in used})),
                         why=f"kept {kept:.1%} of the teacher's {metric}, mean of {len(used)} trained here"
                         + ("" if near else ", of other students" if same else ", from another teacher")))
    return rows


def _from_claims(found: Sequence[history.Claim], facts: Facts, metric: str) -> list[dict[str, Any]]:
    """The objectives that were better than the plain feature loss at equal steps, surely (their interval is above 0) or on average."""
    if facts.task != "promptable_segmentation":
        return []
    return [_row([("objective", o) for o in c.objectives], steps=steps_for(facts.images, 10),
                 confidence=round((0.7 if c.low > 0 else 0.35) * c.seeds / (c.seeds + 1), 3), evidence="measured", source=c.file,
                 why=f"{c.mean:+.1f} points of {metric} against feature_mse at equal steps ({c.low:+.1f} to {c.high:+.1f}, {c.seeds} seeds)")
            for c in found if c.mean > 0]


def _from_rule(rule: Rule, facts: Facts, teacher: str) -> dict[str, Any]:
    shipped = recipe.names()
    named = next((n for n in (f"{rule.recipe}_nano" if teacher == "sam_nano" else rule.recipe, rule.recipe) if n in shipped), None)
    return _row(rule.plug_ins, recipe=named, steps=steps_for(facts.images, rule.epochs), confidence=rule.confidence, evidence="quoted",
                source=rule.source, why=rule.why)


def steps_for(images: int, epochs: int) -> int:
    """Steps of 8 photos for so many epochs: never so few that nothing moves, nor more than a day's."""
    return int(min(MOST_STEPS, max(FEWEST_STEPS, images * epochs / BATCH)))


class RecipePlanner(Proposer):
    """Students by what earlier runs with this teacher measured: the mean share of the teacher's accuracy that a student kept; of one never run,
    that of its nearest relative, less a tenth; of one without relatives, nothing, and it keeps its place in the recipe after all others.

    The recipe itself is recommended by `recommend`.

    Args:
        runs: folder of earlier runs.
        metric: as reports call it.
    """

    name, family = "recipe_planner", "recipe_choice"
    paper = "Distiller: A Systematic Study of Model Distillation Methods in Natural Language Processing (arXiv 2109.11105)"

    def __init__(self, runs: str = "runs", metric: str = "box_miou") -> None:
        self.runs, self.metric = runs, metric

    def propose(self, candidates: Sequence[tuple[str, int]], build: Any, teacher: Any, data: Dataset) -> list[Suggestion]:
        """Best first. Nothing is built or looked at."""
        found = history.runs(Path(self.runs), self.metric)
        suggestions = []
        for name, size in candidates:
            used, words = history.students_of(found, name, size, teacher.name)
            kept = sum(r.kept for r in used) / len(used) if used else 0.0
            score = kept * (1.0 if words == "measured" else 0.9)
            where = ", ".join(sorted({f"runs/{r.folder}" for r in used}))
            why = f"kept {kept:.1%} of the teacher's {self.metric}, {words}: {where}" if used else f"{words} with this teacher"
            suggestions.append(Suggestion(name, size, score, why))
        return sorted(suggestions, key=lambda s: -s.score)


proposer = RecipePlanner
