"""The search against the exhaustive best: 21 students of 4 families, each in 4 files, at budgets spread over what they take; JSON out.

    python benchmarks/search.py --work build/search                 # the table (about an hour and a half of one core, kept a row a student), then the searches
    python benchmarks/search.py --work build/search --train-only    # the table's slow half, which is not timing-critical
    python benchmarks/search.py --replay benchmarks/results/search-2026-11-22.json        # the searches again from a committed table, seconds

Phase 1 distils every student from random weights at the full length and at a share of it (`SHORT`), from one cache of `sam_nano`; exports every
candidate; asks the files for their agreement with the teacher (box prompts, scenes that no training sees); scores every untrained student (DisWOT);
and measures all latencies in turns, in one process. What each of these cost is kept as processor seconds (own and children's), which do not
depend on what else the machine does. Phase 2 lets the search of `edgekd.search.explore` look all that up, and counts the costs of what it asks for.

Every budget is searched with the same settings, those of recipe `search`. One number was chosen by this table's outcomes: what is believed of the input size
before anything is seen (`explore.CLUES`) was 0.3 at first, and one budget of six then missed the best by 2.1 %.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from edgekd.export.onnx import float_file
from search_samplers import samplers

from edgekd import exporting, students, tasks, teachers
from edgekd.artifact import Manifest
from edgekd.budget import accuracy
from edgekd.data import open_data
from edgekd.decision import choose, judge
from edgekd.distillation import verbs
from edgekd.distillation.material import TrainingData, open_training_data
from edgekd.errors import EdgekdError
from edgekd.exploring import shortened
from edgekd.measurement import Latency
from edgekd.profiling import profile_many
from edgekd.quantization.calibration import calibrate
from edgekd.recipe import Budget, resolve
from edgekd.report.schema import Accuracy, Agreement, CandidateRow, ComponentRow
from edgekd.runtime import open_artifact
from edgekd.search.declared import Option, Pair
from edgekd.search.estimate import rank_correlation
from edgekd.search.explore import Explorer, Facts
from edgekd.search.space import Candidate
from edgekd.search.study import Study
from edgekd.search_section import SearchSection
from edgekd.tasks.promptable import scoring
from edgekd.tasks.promptable.predictor import Remembered
from edgekd.workspace import write_json

ROOT = Path(__file__).resolve().parents[1]
TEACHER, TEST = "sam_nano", "scenes:seed=90001,count=48,size=192"
SIZES = (128, 192, 256)
STUDENTS = {"repvit_xs": (1.0,), "repvit_m": (0.5, 1.0), "tinyvit_s": (0.5,), "nanosam": (0.25, 0.5), "efficient_sam_ti": (0.5,)}
KINDS = (("onnx", "fp32"), ("onnx", "w8a8_static"), ("openvino", "fp32"), ("openvino", "bf16"))
SHORT = 0.2
SECTION: dict[str, Any] = {"share": SHORT, "max_short": 8, "max_trained": 3}
FEW = 12
RECIPE = """
name: search_benchmark
teacher: sam_nano
students: [{name: repvit_xs, image_sizes: [128]}]
data: {extra: ["scenes:seed=700,count=1600,size=192"], val_fraction: 0.05}
stages:
  - {name: encoder, objectives: [{name: feature_mse}], trainable: [encoder], steps: 300, batch_size: 8, lr: 2.0e-3, min_lr: 1.0e-5, warmup: 15, weight_decay: 0.01, clip: 5.0}
  - {name: prompts, objectives: [{name: prompt_masks}], trainable: [encoder, decoder], steps: 64, batch_size: 8, lr: 1.0e-3, min_lr: 1.0e-5, warmup: 5, instances: 6}
"""


def pairs() -> list[tuple[str, int]]:
    """(student, size) of the whole space."""
    return [(str(students.parse(f"{base}:width={width}")), size) for base, widths in STUDENTS.items() for width in widths for size in SIZES]


# --- phase 1: the table -------------------------------------------------------------------------------------------------


def cpu() -> float:
    """Processor seconds of this process and its finished children."""
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` gives, and the processor seconds that it took."""
    began = cpu()
    found = work()
    return found, round(cpu() - began, 3)


class Maker:
    """What all rows of the table share: the teacher, the cached photos, the questions."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        self.folder, self.recipe = folder, resolve(folder / "recipe.yaml")
        self.teacher, self.test = teachers.load(TEACHER), open_data(TEST)
        self.oracle = Remembered(self.teacher)
        (folder / "cache").mkdir(exist_ok=True)
        self.data: TrainingData = open_training_data(self.recipe, str(ROOT / "examples/photos"), {TEACHER: self.teacher}, folder / "cache")
        # The teacher's answers are remembered from here on, and toolchains loaded, at nobody's expense.
        self.agreement(self.teacher)
        first, size = pairs()[0]
        self.score(first, size)
        student = tasks.get(self.recipe.task).student(first, size, self.teacher)[0].eval()
        for kind in KINDS:
            self.candidate(student, Candidate(first, size, *kind), folder / "first")

    def agreement(self, model: Any) -> float:
        """Mean IoU with the teacher's masks on the same boxes."""
        found = scoring.evaluate(model, self.test, teacher=self.oracle, metrics=("box",), max_instances=6)
        return round((found.teacher_agreement or {})["box"], 5)

    def trained(self, name: str, size: int, share: float) -> Any:
        """A student after a share of the stages' steps, from random weights under the teacher's decoder."""
        student, start = tasks.get(self.recipe.task).student(name, size, self.teacher)
        assert start.startswith("random"), f"{name} starts from {start}"
        with tempfile.TemporaryDirectory() as folder:
            verbs.train_student(student, {TEACHER: self.teacher}, shortened(self.recipe.stages, share), self.data, Path(folder))
        return student.eval()

    def candidate(self, student: Any, point: Candidate, folder: Path) -> dict[str, Any]:
        """One candidate's files: what they weigh, whether they equal the student, what they answer, and what these steps cost."""
        def export() -> Any:
            static = calibrate(student, self.data.sources[0].dataset, limit=32, choose=True) if point.scheme == "w8a8_static" else None
            return exporting.export_model(student, folder, format=point.format, scheme=point.scheme, name=point.id, teacher=TEACHER, calibration=static, threads=1)

        try:
            _, seconds = timed(export)
        except EdgekdError as e:
            return {"status": "failed", "reason": e.what}
        manifest = Manifest.load(folder)
        value, asking = timed(lambda: self.agreement(open_artifact(folder, threads=1)))
        return {"status": "ok", "size_bytes": manifest.size_bytes, "executed": {n: c.executed_precision for n, c in manifest.components.items()},
                "passed": all((c.parity or {}).get("passed") is not False for c in manifest.components.values()), "accuracy": value,
                "export_s": seconds, "evaluate_s": asking}

    def row(self, name: str, size: int) -> dict[str, Any]:
        """Everything about one student but latencies."""
        about = students.describe(name, image_size=size)
        found: dict[str, Any] = {"student": name, "image_size": size, "family": about["family"], "gmacs": about["gmacs"]}
        (found["score"], found["score_s"]), found["score_once_s"] = self.score(name, size)
        quick, found["short_train_s"] = timed(lambda: self.trained(name, size, SHORT))
        found["short"], found["short_evaluate_s"] = timed(lambda: self.agreement(quick))
        student, found["full_train_s"] = timed(lambda: self.trained(name, size, 1.0))
        found["params"] = sum(p.numel() for p in (*student.encoder.parameters(), *student.mask_decoder.parameters()))
        found["full"], _ = timed(lambda: self.agreement(student))
        points = [Candidate(name, size, *kind) for kind in KINDS]
        found["candidates"] = {p.id: self.candidate(student, p, self.folder / "artifacts" / p.id) for p in points}
        return found

    def score(self, name: str, size: int) -> tuple[tuple[float, float], float]:
        """(DisWOT's score, its seconds for this student), and the seconds that the teacher costs once."""
        from edgekd.distillation.proposers._looking import frames, photos
        from edgekd.distillation.proposers.diswot import Diswot
        from edgekd.distillation.taps import outputs

        task, data, diswot = tasks.get(self.recipe.task), self.data.sources[0].dataset, Diswot(images=12)
        _, once = timed(lambda: outputs(self.teacher, frames(photos(data, diswot.images), self.teacher.preprocess)))
        best, seconds = timed(lambda: diswot.propose([(name, size)], lambda n, s: task.student(n, s, self.teacher)[0], self.teacher, data)[0])
        return (best.score, max(0.0, round(seconds - once, 3))), once


def make_table(folder: Path) -> list[dict[str, Any]]:
    """The rows of all students, made or read."""
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    maker: Maker | None = None
    rows = []
    for name, size in pairs():
        file = folder / "rows" / f"{name}-{size}.json"
        if not file.is_file():
            maker = maker or Maker(folder)
            write_json(file, maker.row(name, size))
        rows.append(json.loads(file.read_text()))
        r = rows[-1]
        print(f"{name}-{size}: score {r['score']:.4g}, short {r['short']:.3f} ({r['short_train_s']:.0f} s), full {r['full']:.3f} ({r['full_train_s']:.0f} s)", file=sys.stderr, flush=True)
    return rows


def untrained(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the first export of every untrained student costs: {"students": its encoder's capture, "decoder": the decoder's, by input size}."""
    file = folder / "untrained.json"
    if not file.is_file():
        teacher, task = teachers.load(TEACHER), tasks.get("promptable_segmentation")
        found: dict[str, dict[str, float]] = {"students": {}, "decoder": {}}
        exporting.export_model(task.student("repvit_xs", 96, teacher)[0].eval(), folder / "first", format="onnx", scheme="fp32", name="first", teacher=TEACHER, gate=False)
        for r in rows:
            student, size = task.student(r["student"], r["image_size"], teacher)[0].eval(), str(r["image_size"])
            decoder = tasks.get("promptable_segmentation").components(student)["decoder"]
            if size not in found["decoder"]:
                found["decoder"][size] = timed(lambda decoder=decoder: float_file(decoder))[1]
            found["students"][f"{r['student']}-{size}"] = timed(lambda student=student: exporting.export_model(
                student, folder / "first", format="onnx", scheme="fp32", name="first", teacher=TEACHER, gate=False))[1]
        write_json(file, found)
    return json.loads(file.read_text())


def add_latencies(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Measure every candidate's files in turns, in one process, and what measuring costs; the table with its circumstances."""
    file = folder / "latencies.json"
    ids = [i for r in rows for i, c in r["candidates"].items() if c["status"] == "ok"]
    first = untrained(folder, rows)
    for r in rows:
        r["untrained_s"] = first["students"][f"{r['student']}-{r['image_size']}"]
    if not file.is_file():
        places = [folder / "artifacts" / i for i in ids]
        found, seconds = timed(lambda: profile_many(places, "host", threads=1, memory=False, repeats=40, warmup=5, max_seconds=4.0))
        _, alone = timed(lambda: profile_many(places[:1], "host", threads=1, memory=False, repeats=40, warmup=5, max_seconds=4.0))
        each = (seconds - alone) / (len(ids) - 1)
        facts = timed(lambda: [students.describe(f"repvit_xs:width={w}", image_size=128) for w in (0.61, 0.62, 0.63, 0.64, 0.65)])[1] / 5
        write_json(file, {"ms": {p.id: p.latency_ms.p50 for p in found}, "start_s": round(alone - each, 3), "each_s": round(each, 3), "facts_s": round(facts, 3), "decoder_s": first["decoder"],
                          "circumstances": found[0].circumstances.model_dump(mode="json", exclude_none=True)})
    return json.loads(file.read_text())


# --- phase 2: the searches ------------------------------------------------------------------------------------------------


class Table:
    """Answers of the table (`edgekd.search.explore.Evaluator`), at what they cost when it was made."""

    measures = True

    def __init__(self, rows: list[dict[str, Any]], costs: dict[str, Any]) -> None:
        self.found, self.costs = {(r["student"], r["image_size"]): r for r in rows}, costs
        self.ms, self.captured = costs["ms"], set[str]()

    def facts(self, pair: Pair) -> Facts:
        r = self.found[pair]
        return Facts(r["family"], r["params"], r["gmacs"])

    def rows(self, pair: Pair) -> list[CandidateRow]:
        points = [Candidate(*pair, *kind) for kind in KINDS]
        return [CandidateRow(id=c.id, student=c.student, image_size=c.image_size, scheme=c.scheme, format=c.format, parent=c.parent) for c in points]

    def predict(self, rows: Sequence[CandidateRow]) -> tuple[dict[str, float], float]:
        return {}, self.costs["facts_s"]

    def built(self, row: CandidateRow) -> CandidateRow:
        """As exported and measured; latencies do not depend on weights."""
        known = self.found[row.student, row.image_size]["candidates"][row.id]
        if known["status"] == "failed":
            return row.turned("failed", known["reason"], "export")
        ms = self.ms[row.id]
        parts = {name: ComponentRow(executed_precision=precision) for name, precision in known["executed"].items()}
        return row.model_copy(update={"latency_ms": Latency(p50=ms, p90=ms, p99=ms, mean=ms, min=ms, n=40), "size_bytes": known["size_bytes"], "components": parts})

    def measure(self, rows: Sequence[CandidateRow]) -> tuple[list[CandidateRow], float]:
        """An untrained student's first export is the capture of its encoder; its decoder is the teacher's, captured once for every input size. What each
        further format adds is charged as for trained files, which are compared with the student besides."""
        r, size = self.found[rows[0].student, rows[0].image_size], str(rows[0].image_size)
        first = next(iter(r["candidates"]))
        seconds = self.costs["start_s"] + self.costs["each_s"] * len(rows) + r["untrained_s"]
        seconds += sum(r["candidates"][row.id].get("export_s", 0.0) for row in rows if row.id != first)
        if size not in self.captured:
            self.captured.add(size)
            seconds += self.costs["decoder_s"][size]
        return [self.built(r) for r in rows], seconds

    def score(self, pair: Pair) -> tuple[float | None, float]:
        r = self.found[pair]
        return r["score"], r["score_s"] + r["score_once_s"]

    def train(self, pair: Pair, rows: Sequence[CandidateRow], share: float) -> tuple[list[CandidateRow], float]:
        r = self.found[pair]
        if share < 1:
            return [_reached(rows[0], r["short"])], r["short_train_s"] + r["short_evaluate_s"]
        return [self.trained(row) for row in rows], self.whole(pair)

    def trained(self, row: CandidateRow) -> CandidateRow:
        """After all steps, as its files were judged."""
        known, built = self.found[row.student, row.image_size]["candidates"][row.id], self.built(row).model_copy(update={"trained": True})
        if known["status"] == "failed":
            return built
        return _reached(built if known["passed"] else built.turned("failed", "it does not match the student it came from", "export"), known["accuracy"])

    def whole(self, pair: Pair) -> float:
        """Seconds of training one student and exporting, measuring and evaluating all its candidates."""
        r = self.found[pair]
        each = sum(c.get("export_s", 0.0) + c.get("evaluate_s", 0.0) + self.costs["each_s"] for c in r["candidates"].values())
        return float(r["full_train_s"] + each + self.costs["start_s"])

    def best(self, budget_ms: float, pairs: Sequence[Pair] | None = None) -> tuple[float, str | None]:
        """The best accuracy of all candidates within a latency, whatever the rules of the decision would say of them."""
        able = [(c["accuracy"], i) for pair in pairs or list(self.found) for i, c in self.found[pair]["candidates"].items()
                if c["status"] == "ok" and c["passed"] and self.ms[i] <= budget_ms]
        return max(able, default=(0.0, None))


def _reached(row: CandidateRow, value: float) -> CandidateRow:
    return row.model_copy(update={"accuracy": Accuracy(teacher_agreement=Agreement(box=value))})


def budgets(table: Table, count: int = 6) -> list[float]:
    """Latencies at which the best candidate changes, spread evenly over those changes, and 2 % above them."""
    steps, best = [], 0.0
    for ms in sorted(table.ms.values()):
        if table.best(ms)[0] > best:
            best = table.best(ms)[0]
            steps.append(ms)
    places = sorted({round(i * (len(steps) - 1) / (count - 1)) for i in range(count)})
    return [round(steps[i] * 1.02, 3) for i in places]


def searched(table: Table, budget_ms: float, *, seed: int = 0, trials: int = 48) -> dict[str, Any]:
    """One search: what it picked, how far that is from the best there is, and what share of the exhaustive cost it took."""
    section = SearchSection(strategy="explore", trials=trials, seed=seed, **SECTION)
    table.captured.clear()
    budget = Budget(latency_ms=budget_ms)
    space = [Option(base, widths, sizes=SIZES) for base, widths in STUDENTS.items()]
    own = cpu()
    outcome = Explorer(table, budget, section, teacher_accuracy=1.0).run(Study(space, seed=seed))
    decision = choose(judge(outcome.rows, budget, 1.0), budget, 1.0)
    own = cpu() - own
    best, which = table.best(budget_ms)
    picked = next((accuracy(r, budget.metric) for r in outcome.rows if r.id == decision.chosen), 0.0) or 0.0
    total = sum(table.whole(p) for p in table.found)
    seconds = {rung: round(sum(s.seconds for s in outcome.steps if s.rung == rung), 2) for rung in ("predict", "measure", "score", "short", "full")}
    return {"budget_ms": budget_ms, "pick": decision.chosen, "pick_accuracy": picked, "best": which, "best_accuracy": best, "regret": round(max(0.0, best - picked) / best, 5),
            "cost_fraction": round((outcome.seconds + own) / total, 4), "seconds": {**seconds, "search_itself": round(own, 2)},
            "students": {rung: len(outcome.climbed(rung)) for rung in ("measure", "score", "short", "full")},  # type: ignore[arg-type]
            "feasible_students": sum(table.best(budget_ms, [p])[1] is not None for p in table.found), "rank_correlations_seen": outcome.correlations, "stopped": outcome.reason}


def at_random(table: Table, budget_ms: float, seconds: float, seeds: int) -> dict[str, float]:
    """Students trained in random order for as many seconds, but at least one. It is told for nothing which can keep to the budget, and trains no other."""
    able = [p for p in table.found if table.best(budget_ms, [p])[1] is not None]
    best, found = table.best(budget_ms)[0], []
    for seed in range(seeds):
        order = [able[i] for i in np.random.default_rng(seed).permutation(len(able))]
        spent, trained = 0.0, list[Pair]()
        for pair in order:
            if trained and spent + table.whole(pair) > seconds:
                break
            spent += table.whole(pair)
            trained.append(pair)
        found.append((best - table.best(budget_ms, trained)[0]) / best)
    return {"random_regret_mean": round(float(np.mean(found)), 5), "random_regret_p90": round(float(np.quantile(found, 0.9)), 5),
            "random_within_2_percent": round(float(np.mean(np.array(found) <= 0.02)), 3), "random_seeds": seeds}


def orders(table: Table) -> dict[str, float | None]:
    """How well each cheap figure orders all students by the accuracy of full training: Spearman's."""
    rows = list(table.found.values())
    cheap = {"diswot": [r["score"] for r in rows], "parameters": [r["params"] for r in rows], "work": [r["gmacs"] for r in rows], "size": [r["image_size"] for r in rows],
             "short": [r["short"] for r in rows]}
    full = [r["full"] for r in rows]
    rounded = {f"{name} -> full": rank_correlation(values, full) for name, values in cheap.items()}
    rounded |= {f"{name} -> short": rank_correlation(values, cheap["short"]) for name, values in cheap.items() if name != "short"}
    return {name: None if rho is None else round(rho, 3) for name, rho in rounded.items()}


def replay(table: Table, seeds: int = 20) -> dict[str, Any]:
    """All budgets; again with no more than `FEW` of the students proposed, which leaves the choice of those to the sampler's seed; and once with a budget
    that everything meets (`without_pressure`)."""
    found = []
    for budget_ms in budgets(table):
        one = searched(table, budget_ms)
        few = [searched(table, budget_ms, seed=s, trials=FEW) for s in range(seeds)]
        total = sum(table.whole(p) for p in table.found)
        spread = {f"{name}_{what}": round(float(f([x[name] for x in few])), 5) for name in ("regret", "cost_fraction") for what, f in (("median", np.median), ("worst", np.max))}
        found.append({**one, **at_random(table, budget_ms, one["cost_fraction"] * total, 500), f"proposing_{FEW}_of_{len(table.found)}": {"seeds": seeds, **spread}})
        print(f"{budget_ms:.2f} ms: {one['pick']} {one['pick_accuracy']:.3f}, best {one['best']} {one['best_accuracy']:.3f}: regret {one['regret']:.3%} at {one['cost_fraction']:.1%}; "
              f"random {found[-1]['random_regret_mean']:.3%}", file=sys.stderr, flush=True)
    loose = searched(table, round(1.05 * max(table.ms.values()), 3))
    return {"without_pressure": loose, "candidates": sum(len(r["candidates"]) for r in table.found.values()), "students": len(table.found), "exhaustive_seconds": round(sum(table.whole(p) for p in table.found), 1),
            "settings": SECTION, "budgets": found, "rank_correlations": orders(table), "winners": len({b["best"] for b in found})}


def main() -> int:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", type=Path, default=Path("build/search"), help="where the table is kept, a row a student")
    p.add_argument("--train-only", action="store_true", help="make the table's slow half and stop")
    p.add_argument("--replay", type=Path, help="search again in the table of this result")
    p.add_argument("--json", action="store_true", help="to stdout instead of benchmarks/results")
    a = p.parse_args()
    if a.replay:
        known = json.loads(a.replay.read_text())["table"]
        rows, costs = known["students"], known["costs"]
    else:
        rows = make_table(a.work)
        if a.train_only:
            return 0
        costs = add_latencies(a.work, rows)
    found = replay(Table(rows, costs))
    document = {"benchmark": "search", "date": str(date.today()), **found, "samplers": samplers(rows, costs["ms"]), "circumstances": {
        **costs["circumstances"], "threads": 1, "seconds": "of the processor, own and children's"}, "recipe": RECIPE, "table": {"students": rows, "costs": costs}}
    if a.json:
        print(json.dumps(document))
    else:
        print(write_json(ROOT / f"benchmarks/results/search-{date.today()}.json", document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
