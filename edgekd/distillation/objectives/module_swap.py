"""A block of the student in the teacher's place: it is given the teacher's map before that block, and is to give the one after it
(m2mKD, arXiv 2402.16918). The controller `m2mkd` makes a stage of it for each block.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillation.copies import map_error
from edgekd.distillation.outputs import FEATURES, Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.taps import Taps, as_map, discover, outputs, resolve, tensor_of
from edgekd.errors import UsageError


class ModuleSwap(Objective):
    """Mean over modules i of MSE(out_i(student_i(in_i(T_{i-1}))), T_i) over the photo: T_i is the teacher's map at its i-th tap, student_i all that the student
    runs between its taps i-1 and i, in_i and out_i 1x1 convolutions. The first module is given the photo.

    Simplified from the paper: the frozen teacher itself is the common surrounding of both modules, where the paper trains a small meta model for
    that; and the maps behind the module are compared, where the paper goes on to the logits. The student's blocks before the module
    run too, and what they give is put aside: a step costs two passes.

    Args:
        module: which of the taps' modules, from 1; 0: all of them.
    """

    name, family, paper = "module_swap", "multi_step", "m2mKD (arXiv 2402.16918)"
    needs = frozenset({"feats", "images"})
    default_taps = "stages"
    least_at_teacher = False

    def __init__(self, module: int = 0) -> None:
        super().__init__()
        self.module = module

    def bind(self, setup: Setup) -> None:
        """Find the modules' ends in the student, and make the stitches."""
        assert setup.context.images is not None
        student, count, images = setup.student, len(setup.ours.feats), setup.context.images
        known = discover(student, images[:1])
        inside = {n: t for n, t in setup.ours.taps.items() if n not in FEATURES}  # the last stage's map may be the embedding itself
        names = [next((n for n, t in inside.items() if t is f), "") for f in setup.ours.feats]
        if not setup.ours.taps:
            names = [n for n in known if n.startswith("stage")][-count:]
        self.paths = [resolve(student, known, n, "student", setup.where) for n in names if n]
        if len(self.paths) != count:
            raise UsageError("module_swap needs taps inside the student, such as stage1 and stage2", where=setup.where, hint="embedding is no end of a module")
        if not 0 <= self.module <= count:
            raise UsageError(f"module_swap: there are {count} modules, and module is {self.module}", where=setup.where, hint=f"0 to {count}")
        seen = Taps(student, {str(p): p for p in self.paths}).run(images[:1])
        ours, theirs = [seen[str(p)] for p in self.paths], setup.theirs.feats
        for t in (*ours, *theirs):
            if t.ndim != 4:
                raise UsageError(f"module_swap compares maps, and a tap gives {list(t.shape)}", where=setup.where, hint="take taps such as stage1")
        chosen = range(count) if self.module == 0 else [self.module - 1]
        self.into = nn.ModuleDict({str(i): nn.Conv2d(theirs[i - 1].shape[1], ours[i - 1].shape[1], 1) for i in chosen if i})
        self.out = nn.ModuleDict({str(i): nn.Conv2d(ours[i].shape[1], theirs[i].shape[1], 1) for i in chosen})
        self._held = (student,)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """feats: maps (B, C, h, w) of student and teacher in pairs -> (B,)."""
        losses = []
        for key, out in self.out.items():
            i = int(key)
            found = student.feats[0] if i == 0 else self.swapped(i, self.into[key](teacher.feats[i - 1].detach().float()), context)
            losses.append(map_error(out(found.float()), teacher.feats[i], context.valid))
        return torch.stack(losses).mean(0)

    def swapped(self, i: int, given: Tensor, context: Context) -> Tensor:
        """What the student's module `i` makes of the map `given` (B, C, h, w)."""
        assert context.images is not None
        modules = dict(self._held[0].named_modules())
        return run_between(self._held[0], modules[str(self.paths[i - 1])], modules[str(self.paths[i])], given, context.images)


class _Done(Exception):
    """Ends a forward pass whose rest is not wanted."""

    def __init__(self, found: Tensor) -> None:
        super().__init__()
        self.found = found


def run_between(model: Any, first: nn.Module, last: nn.Module, given: Tensor, images: Tensor) -> Tensor:
    """What `last` gives, as a map, when `first` is made to give `given` (B, C, h, w) in place of what it finds in `images`."""

    def replace(module: nn.Module, _: Any, out: Any) -> Any:
        own = tensor_of(out)
        assert own is not None
        put = like_own(given, own, getattr(module, "layout", None))
        return put if isinstance(out, Tensor) else type(out)((put, *out[1:]))

    def stop(module: nn.Module, _: Any, out: Any) -> None:
        found = tensor_of(out)
        assert found is not None
        raise _Done(as_map(found, getattr(module, "layout", None)))

    handles = [first.register_forward_hook(replace), last.register_forward_hook(stop)]
    try:
        outputs(model, images)
    except _Done as done:
        return done.found
    finally:
        for handle in handles:
            handle.remove()
    raise UsageError("module_swap: the second tap is not run after the first", hint="name taps in the order in which the student runs")


def like_own(given: Tensor, own: Tensor, layout: str | None) -> Tensor:
    """A map (B, C, h, w) in the layout and on the grid of a block's own output `own`: the inverse of `taps.as_map`. Tokens before the picture's
    stay the block's own."""
    shape = as_map(own, layout).shape
    if given.shape[-2:] != shape[-2:]:
        given = F.interpolate(given, shape[-2:], mode="bilinear", align_corners=False, antialias=True)
    given = given.to(own.dtype)
    if own.ndim == 3:
        tokens = given.flatten(2).transpose(1, 2)
        return torch.cat([own[:, : own.shape[1] - tokens.shape[1]], tokens], dim=1)
    return given if own.shape == shape and as_map(own, layout) is own else given.permute(0, 2, 3, 1)


objective = ModuleSwap
