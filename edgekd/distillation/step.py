"""One step as a module: photos in, the losses of every objective out, one a photo. All that trains beside the student lives here.

`forward` asks the student, takes the teacher's outputs from the cache or asks it, lets targets change them, and asks the objectives. What
is asked once a decode is in `prompting.PromptLoop`.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.distillation import points
from edgekd.distillation.batches import Batch
from edgekd.distillation.clicks import boxes
from edgekd.distillation.distributed import current
from edgekd.distillation.draws import Draws, Source
from edgekd.distillation.outputs import FEATURES, PER_PROMPT, Context, Outputs, Setup
from edgekd.distillation.points import Objective, Policy, Target
from edgekd.distillation.prompting import PromptLoop
from edgekd.distillation.taps import Taps, discover, outputs, resolve
from edgekd.distillation.weighing import objective_names
from edgekd.errors import UsageError
from edgekd.recipe import Stage

Pairs = Sequence[tuple[str, str]]


class Step(nn.Module):
    """The student and the plug-ins of a stage. Everything that is no part of the student is in `aux`, and only there: nothing of it is exported.

    Args:
        teachers: by name, the recipe's own first. They are held, not registered: their weights are not the step's.
    """

    def __init__(self, student: Any, teachers: Mapping[str, Any], stage: Stage) -> None:
        super().__init__()
        self.student, self.stage = student, stage
        self._teachers = dict(teachers)
        self.objectives: dict[str, Objective] = {}
        for key, ref in zip(objective_names(stage), stage.objectives, strict=True):
            self.objectives[key] = points.build("objective", ref.name, ref.options)
        self.refs = dict(zip(self.objectives, stage.objectives, strict=True))
        self.targets: list[Target] = [points.build("target", t.name, t.options) for t in stage.targets]
        self.controllers = [points.build("controller", c.name, c.options) for c in stage.controllers]
        self.policies: list[Policy] = [points.build("policy", p.name, p.options) for p in stage.policies]
        self.live = stage.teacher == "live" or (stage.teacher == "auto" and any(p.live for p in self.policies)) or bool(stage.teacher_from)
        self.pairs: dict[str, Pairs] = {}
        self.aux = nn.ModuleDict()
        self.images_total = 0
        self.given: tuple[Outputs, Outputs] = Outputs(), Outputs()
        """What the student and, after the targets, the teacher gave for the last batch, without graphs: for controllers and policies."""

    @property
    def teachers(self) -> Mapping[str, Any]:
        """By name, the recipe's own first."""
        return self._teachers

    @property
    def teacher(self) -> Any:
        """The recipe's own teacher."""
        return next(iter(self._teachers.values()))

    def bind(self, batch: Batch) -> None:
        """Tell the plug-ins what they will see, from a batch to try; shapes that cannot be matched are refused here.

        Raises:
            UsageError: an unknown tap, or an objective that cannot compare what it is given.
        """
        named = [(f"objective.{k}".replace(".", "_"), o) for k, o in self.objectives.items()]
        for kind, ones in (("target", self.targets), ("controller", self.controllers), ("policy", self.policies)):
            named += [(f"{kind}_{i}_{o.name}", o) for i, o in enumerate(ones)]  # type: ignore[arg-type]
        self._find_taps(batch.images[:1])
        loops = {k: o for k, o in self.objectives.items() if o.needs & PER_PROMPT}
        self.loop = PromptLoop(self.student, self.teacher, self.stage, loops) if loops else None
        training = self.student.training
        self.student.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.stage.seed)
            ours, theirs, context = self._look(batch, Draws(self.stage.seed))
            setup = Setup(self.student, self.teacher, self.stage, ours, theirs, context, self._teachers)
            for key, objective in self.objectives.items():
                mine = [p for p, _ in self.pairs.get(key, ())], [p for _, p in self.pairs.get(key, ())]
                objective.bind(replace(setup, ours=ours.paired(mine[0]), theirs=theirs.paired([n for n in mine[1] if n])))
            for target in self.targets:
                target.bind(setup)
            for controller in self.controllers:
                controller.begin(setup)
            for policy in self.policies:
                policy.bind(setup)
        self.student.train(training)
        for name, module in named:
            self.aux[name] = module

    def forward(self, batch: Batch, generator: Source, step: int = 0) -> dict[str, Tensor]:
        """Losses (B,) of every objective by its name, as they are added up: with the recipe's weights, and what controllers make of them.

        All that has parameters is asked in here, so that a wrapper of this module sees every gradient.
        """
        draws = Draws.of(generator)
        for policy in self.policies:
            batch = policy.mix(batch, draws.own)
        losses = self.compare(batch, draws, step)
        context = self.context(batch, step)
        weighted = {name: loss * self.refs[name].weight_at(context.progress) for name, loss in losses.items()}
        for controller in self.controllers:
            weighted = controller.weigh(weighted, context)
        if self.policies:
            self._observe(torch.stack(list(weighted.values())).sum(0), context)
        return weighted

    def compare(self, batch: Batch, generator: Source, step: int = 0) -> dict[str, Tensor]:
        """Losses (B,) of every objective by its name, without weights."""
        ours, theirs, context = self._look(batch, Draws.of(generator), step)
        for target in self.targets:
            theirs = target(ours, theirs, context)
        self.given = ours.detached(), theirs.detached()
        losses: dict[str, Tensor] = {}
        for key, objective in self.objectives.items():
            if not objective.needs & PER_PROMPT:
                mine = self.pairs.get(key, ())
                losses[key] = objective(ours.paired([p for p, _ in mine]), theirs.paired([p for _, p in mine if p]), context)
        return losses | self.loop(ours, theirs, batch, context) if self.loop else losses

    def context(self, batch: Batch, step: int) -> Context:
        """What controllers and policies are told of a step."""
        return Context(batch.valid, images=batch.images, classes=batch.classes, domains=batch.domains, places=batch.places, images_total=self.images_total,
                       step=step, steps=self.stage.steps, student=self.given[0], teacher=self.given[1])

    def _observe(self, total: Tensor, context: Context) -> None:
        """Policies see the photos of all processes, so that they decide alike in each."""
        group = current()
        if group.world > 1:
            rows: dict[str, Any] = {name: None if (t := getattr(context, name)) is None else group.cat(t) for name in ("valid", "classes", "domains", "places")}
            context = replace(context, images=None, student=None, teacher=None, **rows)
        for policy in self.policies:
            policy.observe(group.cat(total), context)

    # --- what the objectives see ----------------------------------------------------------------------------------------

    def _look(self, batch: Batch, draws: Draws, step: int = 0) -> tuple[Outputs, Outputs, Context]:
        needs = {n for o in self.objectives.values() for n in o.needs}
        ours = Outputs.of(self.student_taps.run(batch.images))
        boxed = "boxes" in needs
        if boxed and getattr(self.student, "proposer", None) is not None:
            ours = replace(ours, proposals=self.student.proposer(ours.embedding))
        asked = {name: Outputs.of(self._ask(name, teacher, batch)) for name, teacher in self._teachers.items()}
        context = Context(batch.valid, boxes=instance_boxes(batch.labels) if boxed else None, side=self.student.preprocess.side, generator=draws.own, draws=draws,
                          images=batch.images, classes=batch.classes, instances=batch.labels, domains=batch.domains, places=batch.places,
                          images_total=self.images_total, step=step, steps=self.stage.steps, teachers=asked)
        return ours, next(iter(asked.values())), context

    def _ask(self, name: str, teacher: Any, batch: Batch) -> Mapping[str, Tensor]:
        if not self.live:
            return batch.cached[name]
        assert batch.teacher_images is not None
        with torch.no_grad():
            taps = self.teacher_taps if teacher is self.teacher else None
            return taps.run(batch.teacher_images[name]) if taps else outputs(teacher, batch.teacher_images[name])

    # --- taps -----------------------------------------------------------------------------------------------------------

    def _find_taps(self, images: Tensor) -> None:
        """Settle which taps are compared by each objective, and where they are."""
        tapped = {k: o for k, o in self.objectives.items() if o.needs & {"feats", "attention"}}
        deep = any(self.refs[k].taps or o.default_taps != "embedding" for k, o in tapped.items())
        ours = discover(self.student, images) if deep else {}
        theirs = teacher_taps(self.teacher) if any(not o.default_taps.startswith("student") and (self.refs[k].taps or o.default_taps != "embedding")
                                                   for k, o in tapped.items()) else {}
        where = f"stage {self.stage.name}"
        for key, objective in tapped.items():
            self.pairs[key] = self.refs[key].taps or default_pairs(objective, ours, theirs, where)
        pairs = [pair for each in self.pairs.values() for pair in each]
        self.student_taps = Taps(self.student, {s: resolve(self.student, ours, s, "student", where) for s, _ in pairs})
        self.teacher_taps = Taps(self.teacher, {t: resolve(self.teacher, theirs, t, "teacher", where) for _, t in pairs if t})


def teacher_taps(teacher: Any) -> dict[str, str]:
    """Taps of a teacher, found with an empty picture of its own size."""
    side = teacher.preprocess.image_size
    return discover(teacher, torch.zeros(1, 3, side, side)) if isinstance(teacher, nn.Module) else {}


def default_pairs(objective: Objective, ours: Mapping[str, str], theirs: Mapping[str, str], where: str) -> Pairs:
    """What an objective compares when the recipe does not say.

    Raises:
        UsageError: student or teacher has no such taps.
    """
    kind = objective.default_taps
    if kind == "embedding":
        return [("embedding", "embedding")]
    prefix = "attention" if kind.endswith("attention") else "stage"
    a, b = ([n for n in names if n.startswith(prefix)] for names in (ours, theirs))
    if kind.startswith("student"):
        b = a
    if not a or not b:
        raise UsageError(f"objective '{objective.name}' needs {prefix} taps, and the {'student' if not a else 'teacher'} has none", where=where,
                         hint="name pairs of module paths under 'taps', or take another model")
    if kind == "attention":
        return [(a[-1], b[-1])]
    if kind == "student_attention":  # the probabilities, and what the attentions give
        return [(n, "") for n in (*a, *(ours[n] for n in a))]
    count = min(len(a), len(b))
    return [(s, "" if kind == "student" else t) for s, t in zip(a[-count:], b[-count:], strict=True)]


def wanted(stages: Sequence[Stage], teacher: Any) -> dict[str, str | None]:
    """What a cache must hold for these stages: output or tap name -> module path (None for an output of the teacher's own)."""
    names: dict[str, str | None] = {}
    taps: dict[str, str] | None = None
    for stage in stages:
        if stage.teacher_from:  # it learns from an assistant, which is asked live
            continue
        for ref in stage.objectives:
            objective = points.build("objective", ref.name, ref.options)
            for need in sorted(objective.needs & FEATURES):
                names[need] = None
            if objective.needs & PER_PROMPT:
                names["embedding"] = None
            if objective.needs & {"feats", "attention"} and not objective.default_taps.startswith("student"):
                if ref.taps or objective.default_taps != "embedding":
                    taps = teacher_taps(teacher) if taps is None else taps
                pairs = ref.taps or ([("embedding", "embedding")] if objective.default_taps == "embedding" else default_teacher(objective, taps or {}))
                for _, name in pairs:
                    names[name] = resolve(teacher, taps or {}, name, "teacher", f"stage {stage.name}")
        for point, refs in (("target", stage.targets), ("controller", stage.controllers), ("policy", stage.policies)):
            for other in refs:
                names |= {n: None for n in sorted(points.registry(point)[other.name].needs & FEATURES)}
    return names or {"embedding": None}


def default_teacher(objective: Objective, taps: Mapping[str, str]) -> Pairs:
    """The teacher's side of `default_pairs`, before there is a student: all that it could be paired with."""
    prefix = "attention" if objective.default_taps == "attention" else "stage"
    found = [n for n in taps if n.startswith(prefix)]
    return [("", n) for n in (found[-1:] if prefix == "attention" else found)]


def instance_boxes(labels: Tensor) -> list[Tensor]:
    """labels (B, F, F) of instances -> of each image (K, 4) float xyxy in the F frame; x1 and y1 are the edges behind the last pixel."""
    found = []
    for one in labels:
        ids = one[one > 0].unique()
        corners = boxes(one == ids[:, None, None]) + 0.5 if len(ids) else labels.new_zeros((0, 2, 2), dtype=torch.float32)
        found.append(corners.flatten(1))
    return found
