"""The loop: plan, train what can meet the budget, export, profile, evaluate, decide; until the budget is met or proven out of reach.

A run is a folder. Whatever finished is in its ledger with a fingerprint of what it was made from, so the same command after
`kill -9` continues, and after a finished run only reports.
"""
from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edgekd import __version__, checkpoint, console, exploring, plugins, recipe, report, students, target, teachers, trial
from edgekd import budget as budgets
from edgekd.checkpoint import weights_sha256
from edgekd.data import Subset, open_data
from edgekd.data.joined import Joined
from edgekd.decision import Decision, choose, judge, next_action, plan_verdicts
from edgekd.distillation import verbs
from edgekd.distillation.checks import check_data, check_recipe
from edgekd.distillation.material import TrainingData, load_teachers, open_training_data
from edgekd.distillation.starting import check_rounding, in_form
from edgekd.errors import EdgekdError
from edgekd.ledger import Ledger
from edgekd.measurement import Circumstances
from edgekd.models.sam import Sam
from edgekd.plan import Plan, make_plan
from edgekd.profiling.profile import Profile
from edgekd.profiling.transport import reach
from edgekd.protocols import Dataset
from edgekd.recipe import REFERENCE_SCHEME, Recipe, Stage
from edgekd.report import schema
from edgekd.report.figures import Curve
from edgekd.report.schema import Accuracy, CandidateRow, Report
from edgekd.search.declared import everyone
from edgekd.search.declared import options as declared_options
from edgekd.search.space import Candidate, candidates
from edgekd.showing import overlays
from edgekd.target import Target
from edgekd.tasks.promptable.predictor import Remembered
from edgekd.tasks.promptable.pseudo import pseudo_label
from edgekd.trial import Bench
from edgekd.workspace import fingerprint, run_lock, usable_folder, write_atomic, write_json

TEACHER = "teacher"


@dataclass(frozen=True)
class CompressOptions:
    """Everything that one `compress` is told."""

    recipe: Recipe
    target: Target
    data: str
    output: Path
    resume: bool = True
    command: str = "edgekd compress"


@dataclass
class Run:
    """What is known so far: candidate rows by id, the students trained, their curves."""

    options: CompressOptions
    bench: Bench
    teachers: Mapping[str, Any]
    stages: list[Stage]
    data: TrainingData
    teacher_accuracy: Accuracy
    protocol: schema.Protocol
    rows: dict[str, CandidateRow] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)
    profiles: dict[str, Profile] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        return self.options.recipe

    @property
    def target_value(self) -> float | None:
        """The teacher's own value of the budget's metric."""
        return self.teacher_accuracy.value(self.recipe.budget.metric)

    def teacher_ms(self) -> float | None:
        """The teacher's latency on the target, when measured."""
        return self.profiles[TEACHER].latency_ms.p50 if TEACHER in self.profiles else None


def compress(options: CompressOptions) -> Report:
    """Run the loop to its end and write the report.

    Raises:
        UsageError: the options cannot be used; nothing was started.
        EdgekdError: the run failed; what it finished is kept.
    """
    started, clock = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.monotonic()
    chosen = with_formats(options)
    points = space(chosen)
    open_data(chosen.data, limit=1, masks=False)  # a wrong path is told before the teacher is loaded
    stages = check_recipe(chosen.recipe)
    taught = load_teachers(chosen.recipe, chosen.data, usable_folder(chosen.output / "teacher"))
    usable_folder(chosen.output)
    look_at_device(chosen.target)
    with run_lock(chosen.output):
        if not chosen.resume:
            clear(chosen.output)
        describe(chosen)
        run = prepare(chosen, taught, stages)
        plan_students(run, points)
        train_and_measure(run, points)
        decision = decide(run)
        found = assemble(run, decision, started, time.monotonic() - clock)
        report.write(chosen.output, found, overlays(run.bench, decision.chosen, run.data.held_out), run.curves)
        console.log(f"report: {chosen.output / 'report.html'}")
        hand_over(run)
    return found


def look_at_device(device: Target) -> None:
    """A board that is out of reach is told before any work, and so is what it is."""
    if not device.reachable or device.device.transport == "local":
        return
    with reach(device) as board:
        about = board.probe()
        console.log(f"{device.name}: {', '.join(str(about[k]) for k in ('device', 'os', 'arch') if about.get(k))} by {board.name}")


def hand_over(run: Run) -> None:
    """For a device out of reach: what its owner carries there."""
    if run.options.target.reachable:
        return
    from edgekd import handover
    from edgekd.profiling import boards

    settings, bench = run.recipe.profile, run.bench
    asked = boards.Asked(warmup=settings.warmup, repeats=settings.repeats, threads=bench.threads, prompts=bench.prompts)
    script = handover.write(run.options.output, list(run.rows.values()), asked, run.options.target)
    if script is not None:
        console.log(f"nothing was measured on {run.options.target.name}: run {script} there (it says how), then edgekd report {run.options.output} --merge {handover.RESULT}")


def plan(options: CompressOptions) -> Plan:
    """What `compress` would do and what it would cost; loads no weights and reaches for no device."""
    chosen = with_formats(options)
    return make_plan(chosen.recipe, chosen.target, chosen.data, space(chosen))


def with_formats(options: CompressOptions) -> CompressOptions:
    """The options with `auto` formats and schemes filled in: of the target's formats, those whose toolchain is installed."""
    able = plugins.writers()
    if options.recipe.formats == "auto":
        tried = [f for f, support in options.target.formats.items() if support.auto and f in plugins.exporters()]
        able, left_out = {f: able[f] for f in tried if f in able}, [f for f in tried if f not in able]
        for missing in left_out:
            found = plugins.exporter(missing).availability()
            console.warn(f"{options.target.name} also runs {missing}, which is left out: {found.reason}" + (f" ({found.fix})" if found.fix else ""))
    exports = {name: e.schemes for name, e in able.items()}
    filled = recipe.with_auto(options.recipe, runs=options.target.runs, exports=exports)
    return CompressOptions(filled, options.target, options.data, Path(options.output), options.resume, options.command)


def space(options: CompressOptions) -> list[Candidate]:
    """Every candidate of the recipe that the target can run; unknown students and refused schemes and formats are usage errors."""
    r = options.recipe
    named = {str(students.parse(s.name)): s.image_sizes for s in r.students}
    if r.search.strategy == "explore":
        named = everyone(declared_options(r.search.space, named))
    return candidates(named, list(r.formats), list(r.quantization.schemes), runs=options.target.runs,
                      exports={name: e.schemes for name, e in plugins.exporters().items()}, target=options.target.name)


def clear(folder: Path) -> None:
    """Forget an earlier run; only what a run writes is removed."""
    for name in ("ledger.jsonl", "cache", "checkpoints", "artifacts", "profiles", "report", "search", "board", "run_on_device.sh"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def describe(options: CompressOptions) -> None:
    """Write what the run was told and where it runs."""
    folder = options.output
    write_atomic(folder / "recipe.resolved.yaml", recipe.dump(options.recipe))
    write_atomic(folder / "target.resolved.yaml", target.dump(options.target))
    write_json(folder / "environment.json", Circumstances.capture().model_dump(mode="json"))


# --- before training -------------------------------------------------------------------------------------------------


def prepare(options: CompressOptions, taught: Mapping[str, Any], stages: list[Stage]) -> Run:
    """Cache the teacher, set up the evaluation, and measure the teacher as the candidates will be."""
    r, folder, teacher = options.recipe, options.output, next(iter(taught.values()))
    data = open_training_data(r, options.data, taught, usable_folder(folder / "cache"), stages)
    check_data(stages, data)
    evaluation, labelled = evaluation_set(r, teacher, data.held_out)
    bench = Bench(folder, Ledger(folder / "ledger.jsonl"), r, options.target, teacher, Remembered(teacher), evaluation, labelled,
                  calibration=data.sources[0].dataset)
    console.log(f"evaluate the teacher on {len(evaluation)} images")
    result = bench.ledger.once("evaluate", TEACHER, fingerprint([TEACHER, bench.evaluation_key]), lambda: trial.measure(bench, teacher))
    found = trial.accuracy(result)
    protocol = schema.Protocol(prompts=result["protocol"]["prompts"], dataset=evaluation.name, images=result["images"], instances=result["instances"],
                               labels=result["protocol"]["labels"], skipped=data.skipped)
    return Run(options, bench, taught, stages, data, found, protocol)


def evaluation_set(r: Recipe, teacher: Sam, held_out: Dataset) -> tuple[Dataset, frozenset[str]]:
    """The held-out photos and the recipe's evaluation data, and the ids of those whose masks are not the teacher's.

    Photos without labels are asked with the teacher's own masks as the source of prompts, which measures agreement, not truth."""
    most = r.evaluation.max_images
    photos: Dataset = held_out if len(held_out) <= most else Subset(held_out, range(most), name=f"{held_out.name}[:{most}]")
    own = photos.has_masks
    parts = [photos if own else pseudo_label(teacher, photos)]
    if r.evaluation.data is not None:
        parts.append(open_data(r.evaluation.data, limit=most))
    joined = Joined(parts)
    return joined, frozenset(joined[i].id for i, (part, _) in enumerate(joined.places) if own or part > 0)


def plan_students(run: Run, points: Sequence[Candidate]) -> None:
    """Measure untrained float candidates, since latency needs no weights, and reject what no training can bring within the budget.

    With a budget every scheme is measured untrained. Without one only the float reference is, and only where it decides which
    students are trained. A search that explores measures whom it comes to (`edgekd.exploring`), the teacher beforehand.
    """
    if run.recipe.search.strategy == "explore":
        with_teacher(run)
        run.profiles.update(trial.profile(run.bench, [], [TEACHER] if teacher_built(run) else [])[1])
        return
    budget, groups = run.recipe.budget, by_student(points)
    limited = budgets.limited(budget)
    undecided = len(groups) > run.recipe.search.max_trained
    untrained = []
    for (name, size), group in groups.items():
        student, _ = verbs.new_student(name, size, run.bench.teacher)
        rows = [trial.build_row(c, student, trained=False) for c in group]
        if run.options.target.reachable:
            source = weights_sha256(student)
            rows = [trial.export(run.bench, row, student, source) if limited or (undecided and first_float(row, group)) else row for row in rows]
        untrained += rows
    built = [row for row in untrained if row.components]
    with_teacher(run)
    measured, profiles = trial.profile(run.bench, built, [TEACHER] if built and teacher_built(run) else [], memory=bool(budget.memory_mb))
    run.profiles.update(profiles)
    known = {row.id: row for row in measured}
    rows = plan_verdicts([known.get(row.id, row) for row in untrained], budget)
    run.rows = {row.id: row for row in rows}


def first_float(row: CandidateRow, group: Sequence[Candidate]) -> bool:
    """Whether this is the float candidate in the first format of its student."""
    return row.scheme == REFERENCE_SCHEME and row.format == group[0].format


def by_student(points: Sequence[Candidate]) -> dict[tuple[str, int], list[Candidate]]:
    """(student, size) -> its candidates, in order."""
    groups: dict[tuple[str, int], list[Candidate]] = {}
    for point in points:
        groups.setdefault((point.student, point.image_size), []).append(point)
    return groups


def teacher_built(run: Run) -> bool:
    """Whether the teacher's artifact is there to be profiled beside the candidates."""
    return (run.bench.artifact(TEACHER) / "manifest.json").is_file()


def with_teacher(run: Run) -> None:
    """Export the teacher in float, so that it is measured on the same runtime; one that cannot be exported only costs the speed-up."""
    if not run.options.target.reachable:
        return
    teacher = run.bench.teacher
    if not isinstance(teacher, Sam):
        console.warn(f"the teacher {teacher.name} runs in its own library and is not exported, so there is no speed-up to tell")
        return
    row = CandidateRow(id=TEACHER, student=teacher.name, image_size=teacher.preprocess.image_size, scheme=REFERENCE_SCHEME,
                       format=run.recipe.formats[0], trained=True)
    done = trial.export(run.bench, row, teacher, weights_sha256(teacher))
    if done.status == "failed":
        console.warn(f"the teacher could not be exported, so there is no speed-up to tell: {done.reason}")


# --- training and measuring --------------------------------------------------------------------------------------------


def train_and_measure(run: Run, points: Sequence[Candidate]) -> None:
    """Train the student that the decision asks for next, measure its candidates, and ask again."""
    groups = by_student(points)
    if run.recipe.search.strategy == "explore":
        exploring.explore(run, groups, lambda name, size, group: train_one(run, name, size, group))
        return
    while True:
        action = next_action(list(run.rows.values()), run.recipe.budget, run.target_value, max_students=run.recipe.search.max_trained)
        console.log(f"{action.kind}: {action.reason}")
        if action.kind == "stop" or action.student is None or action.image_size is None:
            return
        dropped = {id for id, row in run.rows.items() if row.stage == "plan"}
        rows = train_one(run, action.student, action.image_size, [c for c in groups[action.student, action.image_size] if c.id not in dropped])
        run.rows.update({row.id: row for row in rows})


def train_one(run: Run, name: str, size: int, group: Sequence[Candidate]) -> list[CandidateRow]:
    """Train a student, export its candidates, measure and evaluate them."""
    student = trained_student(run, name, size)
    source = weights_sha256(student)
    rows = [trial.export(run.bench, trial.build_row(c, student, trained=True), student, source) for c in group]
    rows, profiles = trial.profile(run.bench, rows, [TEACHER] if teacher_built(run) else [])
    run.profiles.update(profiles)
    rows = [trial.evaluate(run.bench, row) for row in rows]
    if all(row.status == "failed" for row in rows):
        console.warn(f"no candidate of {name} at {size} could be built: {rows[0].reason if rows else 'none was left'}")
    return rows


def trained_student(run: Run, name: str, size: int) -> Sam:
    """The student after the recipe's stages; from its checkpoint when they were finished earlier."""
    teacher, folder = run.bench.teacher, run.options.output / "checkpoints"
    student, start = verbs.new_student(name, size, teacher)
    student = in_form(student, check_rounding(run.stages))
    key = verbs.training_key(run.stages, student, run.teachers, run.data)
    label = f"{student.name}-{size}"
    path = folder / f"{label}{checkpoint.SUFFIX}"
    known = run.bench.ledger.known("train", key)
    if known is not None:
        try:
            checkpoint.load_into(student, path)
            run.bench.ledger.reused += 1
        except EdgekdError as e:
            console.warn(f"{e.what} ({path.name}): training it again")
            known = None
    if known is None:
        console.log(f"distil {label} from {start}")
        results = verbs.train_student(student, run.teachers, run.stages, run.data, folder / "stages" / key)
        checkpoint.save(student, path, teacher=teacher.name, history={"recipe": run.recipe.name, "start": start, "data": run.options.data})
        known = run.bench.ledger.record("train", label, key, {
            "start": start, "curves": {r.name: [None if row["loss"] is None else round(row["loss"], 6) for row in r.curve] for r in results}, **verbs.curve_summary(results)})
        shutil.rmtree(folder / "stages" / key, ignore_errors=True)
    for stage, losses in known["curves"].items():
        finite = [(i + 1, v) for i, v in enumerate(losses) if v is not None]
        run.curves.append(Curve(label, stage, tuple(i for i, _ in finite), tuple(v for _, v in finite)))
    return student.eval()


# --- the end -------------------------------------------------------------------------------------------------------------


def decide(run: Run) -> Decision:
    """Judge every candidate and choose; the rows then carry status and reason."""
    r = run.recipe
    judged = judge(list(run.rows.values()), r.budget, run.target_value, teacher_ms=run.teacher_ms())
    run.rows = {row.id: row for row in judged}
    return choose(judged, r.budget, run.target_value)


def assemble(run: Run, decision: Decision, started: str, seconds: float) -> Report:
    """The report's document."""
    o, teacher = run.options, run.bench.teacher
    profile = run.profiles.get(TEACHER)
    parts = {n: schema.ComponentRow(latency_ms=c.latency_ms, size_bytes=c.size_bytes, executed_precision=c.executed_precision)
             for n, c in profile.components.items()} if profile else {}
    about = schema.Teacher(name=teacher.name, params=sum(p.numel() for p in teacher.parameters()), image_size=teacher.preprocess.image_size,
                           size_bytes=profile.size_bytes if profile else None, accuracy=run.teacher_accuracy,
                           latency_ms=profile.latency_ms if profile else None, components=parts, licence=teachers.licence(teacher.name))
    circumstances = next(iter(run.profiles.values())).circumstances if run.profiles else Circumstances.capture()
    return Report(
        run=schema.Run(name=o.output.name, command=o.command, started=started, seconds=round(seconds, 1), version=__version__, recipe=o.recipe.name,
                       data=o.data),
        environment=circumstances.model_dump(mode="json", exclude_none=True),
        target=schema.Target(name=o.target.name, device=o.target.description, transport=o.target.device.transport, threads=circumstances.threads or os.cpu_count()),
        budget=o.recipe.budget, protocol=run.protocol, teacher=about, candidates=list(run.rows.values()),
        chosen=decision.chosen, verdict=decision.verdict, reason=decision.reason, nearest=decision.nearest, speedup=speedup(run, decision.chosen))


def speedup(run: Run, chosen: str | None) -> schema.Speedup | None:
    """How many times faster the chosen artifact is than the teacher on the same machine; None when either was not measured."""
    teacher, best = run.profiles.get(TEACHER), run.profiles.get(chosen or "")
    if teacher is None or best is None or chosen == TEACHER:
        return None
    return schema.Speedup(
        value=teacher.latency_ms.p50 / best.latency_ms.p50, provenance="measured",
        encoder=teacher.components["encoder"].latency_ms.p50 / best.components["encoder"].latency_ms.p50,
        baseline=f"{run.bench.teacher.name} ({run.recipe.formats[0]} {REFERENCE_SCHEME}, {'this machine' if run.options.target.device.transport == 'local' else run.options.target.name})")

