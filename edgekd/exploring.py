"""The search of a run: `search.explore` with real students, real measurements and the run's ledger.

Every answer to the search goes through the ledger with the seconds that it took, so that the same command after `kill -9` asks nothing twice and
decides the same. Untrained and briefly trained files lie in `search/`, apart from those that may ship, and are removed once they have been asked.
"""
from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgekd import console, schemes, students, tasks, trial
from edgekd.checkpoint import weights_sha256
from edgekd.distillation import points, verbs
from edgekd.distillation.starting import check_rounding, in_form
from edgekd.ledger import Result
from edgekd.models.sam import Sam
from edgekd.recipe import Stage
from edgekd.report.schema import CandidateRow
from edgekd.search.declared import Pair, options
from edgekd.search.explore import Explorer, Facts, Outcome
from edgekd.search.space import Candidate
from edgekd.search.study import Study, library
from edgekd.workspace import fingerprint

if TYPE_CHECKING:
    from edgekd.pipeline import Run

FOLDER = "search"
SCORE = "diswot"
FACTS_AT = 256
"""Input sizes above are counted at this one and scaled by pixels: exact for convolutions and windows."""
Trained = Callable[[str, int, Sequence[Candidate]], list[CandidateRow]]


def shortened(stages: Sequence[Stage], share: float) -> list[Stage]:
    """The stages with a share of their steps, at least one each; the warm-up shrinks with them, so that the schedule keeps its shape."""
    return [s if share >= 1 else s.model_copy(update={"steps": max(1, round(s.steps * share)), "warmup": round(s.warmup * share)}) for s in stages]


def explore(run: Run, groups: Mapping[Pair, Sequence[Candidate]], train: Trained) -> Outcome:
    """Search the recipe's space, and leave every candidate that was looked at in `run.rows`.

    Args:
        groups: (student, size) -> its candidates, of the whole space.
        train: trains a student and measures its candidates.

    Raises:
        EdgekdError: Optuna is not installed.
    """
    library()
    r, ledger = run.recipe, run.bench.ledger
    listed = {str(students.parse(s.name)): s.image_sizes for s in r.students}
    small = r.budget.size_mb is not None or r.budget.memory_mb is not None
    study = Study(options(r.search.space, listed), sampler=r.search.sampler, seed=r.search.seed, costs=2 if small else 1, folder=run.options.output / FOLDER,
                  remember=lambda id, key, work: ledger.once("propose", id, fingerprint(key), work))
    explorer = Explorer(RunEvaluator(run, groups, train), r.budget, r.search, teacher_accuracy=run.target_value, teacher_ms=run.teacher_ms(), say=console.log)
    found = explorer.run(study)
    console.log(f"stop: {found.reason}")
    run.rows = {row.id: row for row in found.rows}
    summary = {"reason": found.reason, "correlations": found.correlations,
               "steps": [{"rung": s.rung, "student": f"{s.pair[0]}-{s.pair[1]}", "seconds": round(s.seconds, 2), "reason": s.reason} for s in found.steps]}
    ledger.once("search", run.options.output.name, fingerprint([summary["reason"], summary["steps"]]), lambda: summary)
    return found


@dataclass(frozen=True)
class RunEvaluator:
    """What the search asks of a run (`search.explore.Evaluator`)."""

    run: Run
    groups: Mapping[Pair, Sequence[Candidate]]
    trained: Trained

    @property
    def measures(self) -> bool:
        """Whether the device is within reach."""
        return self.run.options.target.reachable

    @property
    def bench(self) -> trial.Bench:
        """A bench whose files lie apart from those that may ship."""
        return replace(self.run.bench, folder=self.run.bench.folder / FOLDER)

    def facts(self, pair: Pair) -> Facts:
        """From the shapes alone."""
        name, size = pair
        side = min(size, FACTS_AT)
        about = students.describe(name, image_size=side)
        return Facts(about["family"], about["params_encoder"], about["gmacs"] * (size / side) ** 2)

    def rows(self, pair: Pair) -> list[CandidateRow]:
        """Candidates of which nothing is known."""
        return [CandidateRow(id=c.id, student=c.student, image_size=c.image_size, scheme=c.scheme, format=c.format, parent=c.parent) for c in self.groups[pair]]

    def predict(self, rows: Sequence[CandidateRow]) -> tuple[dict[str, float], float]:
        """Nothing: the predictor of `edgekd.latency` reads exported files, and a file that is here is measured at once."""
        return {}, 0.0

    def measure(self, rows: Sequence[CandidateRow]) -> tuple[list[CandidateRow], float]:
        """Export candidates of one student untrained, and profile them against each other."""
        student, bench, budget = self._untrained((rows[0].student, rows[0].image_size)), self.bench, self.run.recipe.budget
        source, memory = weights_sha256(student), budget.memory_mb is not None
        key = [source, [r.id for r in rows], bench.recipe.profile.model_dump(), bench.prompts, memory, budget.everything_ms is not None,
               bench.target.model_dump(mode="json"), [self._calibration(r) for r in rows]]

        def work() -> Result:
            built = [trial.export(bench, trial.build_row(_point(r), student, trained=False), student, source) for r in rows]
            measured, _ = trial.profile(bench, built, memory=memory)
            for row in rows:
                shutil.rmtree(bench.artifact(row.id), ignore_errors=True)
            return {"rows": [one.model_dump(mode="json") for one in measured]}

        result, seconds = self._once("measure", ", ".join(r.id for r in rows), key, work)
        return [CandidateRow.model_validate(one) for one in result["rows"]], seconds

    def score(self, pair: Pair) -> tuple[float | None, float]:
        """The recipe's proposer, or DisWOT's, asked about one student."""
        ref, data = self.run.recipe.proposer, self.run.data.sources[0].dataset
        name, given = (ref.name, ref.options) if ref is not None else (SCORE, {})
        task, teacher = tasks.get(self.run.recipe.task), self.run.bench.teacher

        def work() -> Result:
            ranked = points.build("proposer", name, given).propose([pair], lambda n, s: task.student(n, s, teacher)[0], teacher, data)
            return {"score": next(one.score for one in ranked if (one.student, one.image_size) == pair)}

        result, seconds = self._once("score", _label(pair), [name, given, pair, data.fingerprint(), weights_sha256(teacher)], work)
        return result["score"], seconds

    def train(self, pair: Pair, rows: Sequence[CandidateRow], share: float) -> tuple[list[CandidateRow], float]:
        """A share of the stages, judged in torch without any export; or all of it, judged on the files."""
        if share < 1:
            return self._short(pair, rows, share)
        began = time.monotonic()
        found = self.trained(*pair, self.groups[pair])
        seconds = time.monotonic() - began
        # A run that goes on only reads what it did: the seconds are those of the first time.
        key = fingerprint([pair, [row.model_dump(mode="json") for row in found]])
        return found, self.run.bench.ledger.once("full", _label(pair), key, lambda: {"seconds": round(seconds, 2)})["seconds"]

    def _short(self, pair: Pair, rows: Sequence[CandidateRow], share: float) -> tuple[list[CandidateRow], float]:
        run, stages = self.run, shortened(self.run.stages, share)
        student = in_form(self._untrained(pair), check_rounding(run.stages))
        training = verbs.training_key(stages, student, run.teachers, run.data)

        def work() -> Result:
            folder = run.options.output / FOLDER / "stages" / training
            verbs.train_student(student, run.teachers, stages, run.data, folder)
            shutil.rmtree(folder, ignore_errors=True)
            return {"accuracy": trial.accuracy(trial.measure(run.bench, student.eval())).model_dump(mode="json")}

        result, seconds = self._once("short", _label(pair), [training, run.bench.evaluation_key], work)
        row = next((r for r in rows if schemes.parse(r.scheme).scheme.name in schemes.FLOATS), rows[0])
        return [CandidateRow.model_validate(row.model_dump(mode="json") | {"accuracy": result["accuracy"]})], seconds

    def _untrained(self, pair: Pair) -> Sam:
        return verbs.new_student(*pair, self.run.bench.teacher)[0]

    def _calibration(self, row: CandidateRow) -> list[Any]:
        """What an export depends on besides the student."""
        bench = self.bench
        seen = [bench.calibration.fingerprint(), bench.recipe.quantization.calibration_images] if schemes.parse(row.scheme).looks_at_inputs else []
        return [bench.target.qdq(row.format), *seen]

    def _once(self, rung: str, id: str, key: Any, work: Callable[[], Result]) -> tuple[Result, float]:
        """The result and its seconds, of now or of the first time."""
        def timed() -> Result:
            began = time.monotonic()
            return {**work(), "seconds": round(time.monotonic() - began, 2)}

        result = self.run.bench.ledger.once(rung, id, fingerprint(key), timed)
        return result, result["seconds"]


def _label(pair: Pair) -> str:
    return f"{pair[0]}-{pair[1]}"


def _point(row: CandidateRow) -> Candidate:
    return Candidate(row.student, row.image_size, row.format, row.scheme)
