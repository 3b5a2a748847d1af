"""Segment everything: many prompts on one photo, and of all their masks the sure ones, each once.

    grid           a click at every node of a grid, three masks a click (SAM, arXiv 2304.02643, App. B)
    hierarchical   every second row and column of it first, then only the nodes that no mask covers (after TinySAM, arXiv 2312.13789), then
                   the boxes of what was found
    proposals      boxes that the model's own `proposer` finds in the embedding (MobileSAMv2, arXiv 2312.09579)

Everything is filtered on the model's mask grid, decoder call by decoder call; only what is kept is brought to the photo's resolution, a
few masks at a time. `pseudo_label` uses the same code.
"""
from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from edgekd.data.prompts import Prompts, boxes_from_masks, grid_points
from edgekd.errors import UsageError, unknown
from edgekd.protocols import Promptable
from edgekd.tasks.promptable import rle
from edgekd.tasks.promptable.metrics import iou
from edgekd.tasks.promptable.predictor import THRESHOLD, ModelPredictor
from edgekd.tasks.promptable.proposing import has_proposer, propose

Mode = Literal["auto", "grid", "hierarchical", "proposals"]
BATCH = 16
"""Prompts a decoder call: on a CPU larger ones fall out of its caches (measured with `sam_nano`: 64 cost a tenth more a prompt)."""
NMS_SIDE = 64
"""Duplicates are looked for on a mask grid at most this wide: twice as wide costs four times as much and finds the same."""
UPSAMPLED_BYTES = 64_000_000
"""Of float logits at the photo's resolution that are held at once."""


@dataclass(frozen=True)
class Settings:
    """What to ask and what to keep. SAM's own filters (predicted IoU 0.88, stability 0.95) suit a ViT-H; these keep a small model's masks too."""

    points_per_side: int = 32
    pred_iou: float = 0.4
    stability: float = 0.6
    nms: float = 0.7
    max_masks: int = 100
    area: tuple[float, float] = (0.0005, 0.95)
    """smallest and largest share of the photo"""
    batch: int = BATCH
    proposals: int = 56
    """boxes asked for in the mode `proposals`"""
    proposal_nms: float = 0.65


@dataclass(frozen=True)
class Segment:
    """One mask: run lengths (see `edgekd.tasks.promptable.rle`), [x, y, w, h] in pixels, and the prompt it came from (a click or a box)."""

    rle: dict[str, Any]
    bbox: list[float]
    area: int
    predicted_iou: float
    stability_score: float
    click: tuple[float, float] | None = None
    box: tuple[float, float, float, float] | None = None

    @property
    def mask(self) -> np.ndarray:
        """(H, W) bool."""
        return rle.decode([self.rle], *self.rle["size"])[0]


@dataclass
class Work:
    """What a photo cost: seconds of each part, decoder calls and prompts."""

    seconds: dict[str, float] = field(default_factory=lambda: {"encoder": 0.0, "proposer": 0.0, "decoder": 0.0, "rest": 0.0})
    calls: int = 0
    prompts: int = 0


@dataclass(frozen=True)
class Everything:
    """The masks of one photo, best first, how they were asked for, and what it cost."""

    segments: list[Segment]
    height: int
    width: int
    mode: str
    work: Work

    def __len__(self) -> int:
        return len(self.segments)

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments)

    @property
    def masks(self) -> np.ndarray:
        """(K, H, W) bool."""
        return rle.decode([s.rle for s in self.segments], self.height, self.width)


@dataclass
class _Pool:
    """Candidates that passed: logits (N, s, s) float16 on the whole mask grid, of which `rows` x `columns` are photo; quality (N, 2) predicted
    IoU and stability; prompt (N, 4): a click (x, y, nan, nan) or a box. `spare` is the best that did not pass."""

    rows: int = 1
    columns: int = 1
    logits: list[np.ndarray] = field(default_factory=list)
    quality: list[np.ndarray] = field(default_factory=list)
    prompt: list[np.ndarray] = field(default_factory=list)
    spare: tuple[float, np.ndarray, np.ndarray, np.ndarray] | None = None

    def take(self, logits: np.ndarray, quality: np.ndarray, prompt: np.ndarray, settings: Settings) -> np.ndarray:
        """Add what passes the filters; returns which (N,) bool."""
        share = (logits[:, :self.rows, :self.columns] > THRESHOLD).mean(axis=(1, 2))
        usable = (share > 0) & (share >= settings.area[0]) & (share <= settings.area[1])
        good = usable & (quality >= (settings.pred_iou, settings.stability)).all(axis=1)
        if good.any():
            self.logits.append(logits[good].astype(np.float16))
            self.quality.append(quality[good])
            self.prompt.append(prompt[good])
        elif usable.any() and not self.logits:
            best = np.flatnonzero(usable)[np.argmax(quality[usable].prod(axis=1))]
            worth = float(quality[best].prod())
            if self.spare is None or worth > self.spare[0]:
                self.spare = (worth, logits[best], quality[best], prompt[best])
        return good

    def ranked(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Logits, quality and prompts, best first; a photo where the model is sure of nothing still has its best guess."""
        if not self.logits:
            return None if self.spare is None else (self.spare[1][None], self.spare[2][None], self.spare[3][None])
        logits, quality, prompt = (np.concatenate(x) for x in (self.logits, self.quality, self.prompt))
        order = np.argsort(-quality.prod(axis=1), kind="stable")
        return logits[order], quality[order], prompt[order]


class Asker:
    """One photo's embedding, asked in batches; every answer goes through the filters at once, and its cost is counted."""

    def __init__(self, predictor: ModelPredictor, image: np.ndarray, settings: Settings) -> None:
        self.predictor, self.settings, self.work, self.pool = predictor, settings, Work(), _Pool()
        self.height, self.width = image.shape[:2]
        start = time.perf_counter()
        self.state = predictor.start(image)
        self.work.seconds["encoder"] = time.perf_counter() - start

    def ask(self, prompts: Prompts, alternatives: slice) -> Iterator[np.ndarray]:
        """Decode all prompts and keep what passes; yields the logits (n, h, w) inside the photo of each call's masks that passed."""
        frame = self.state[1]
        for first in range(0, len(prompts), self.settings.batch):
            asked = prompts[first:first + self.settings.batch]
            start = time.perf_counter()
            logits, predicted = self.predictor.decode(self.state, asked)
            self.work.seconds["decoder"] += time.perf_counter() - start
            self.work.calls += 1
            self.work.prompts += len(asked)
            self.pool.rows, self.pool.columns = rows, columns = [max(1, round(side * logits.shape[-1] / frame.side)) for side in frame.resized]
            several = logits[:, alternatives]
            masks = several.reshape(-1, *logits.shape[-2:])
            quality = np.stack([predicted[:, alternatives].ravel(), stability(masks[:, :rows, :columns])], axis=1)
            flat = asked.points.reshape(len(asked), -1)
            where = np.full((len(asked), 4), np.nan)
            where[:, :flat.shape[1]] = flat
            good = self.pool.take(masks, quality, where.repeat(several.shape[1], axis=0), self.settings)
            yield masks[good, :rows, :columns]

    def found_boxes(self) -> np.ndarray:
        """(K, 4) xyxy in pixels of the photo: of what would be kept by now, on the mask grid."""
        found = self.pool.ranked()
        if found is None:
            return np.zeros((0, 4))
        masks = found[0][:, :self.pool.rows, :self.pool.columns] > THRESHOLD
        boxes = boxes_from_masks(masks[suppress(masks, self.settings.nms, self.settings.max_masks)])
        return boxes * np.tile([self.width / self.pool.columns, self.height / self.pool.rows], 2)

    def finish(self, mode: str, began: float) -> Everything:
        """Suppress duplicates and bring what is left to the photo."""
        found = self.pool.ranked()
        segments = [] if found is None else self._segments(*found)
        seconds = self.work.seconds
        seconds["rest"] = max(0.0, time.perf_counter() - began - seconds["encoder"] - seconds["proposer"] - seconds["decoder"])
        return Everything(segments, self.height, self.width, mode, self.work)

    def _segments(self, logits: np.ndarray, quality: np.ndarray, prompt: np.ndarray) -> list[Segment]:
        kept = suppress(logits[:, :self.pool.rows, :self.pool.columns] > THRESHOLD, self.settings.nms, self.settings.max_masks)
        few = max(1, UPSAMPLED_BYTES // (4 * self.height * self.width))
        runs = []
        for first in range(0, len(kept), few):
            full = self.state[1].mask_to_image(logits[kept[first:first + few]]) > THRESHOLD
            runs += rle.encode(full)
        segments = [_segment(run, quality[i], prompt[i]) for run, i in zip(runs, kept, strict=True)]
        return [s for s in segments if s.area]


def everything(model: Promptable | ModelPredictor, image: np.ndarray, *, mode: Mode = "auto", settings: Settings | None = None) -> Everything:
    """All masks of a photo that a model is sure of, best (predicted IoU x stability) first. Deterministic.

    Args:
        model: torch or artifact.
        image: (H, W, 3) uint8 RGB.
        mode: `auto` takes proposals where the model has a proposer, else the hierarchical grid.

    Raises:
        UsageError: an unknown mode, proposals of a model without a proposer, or settings that ask for nothing.
    """
    settings, asked = settings or Settings(), model if isinstance(model, ModelPredictor) else ModelPredictor(model)
    chosen = resolve_mode(asked.model, mode)
    _check(settings)
    began = time.perf_counter()
    asker = Asker(asked, image, settings)
    if chosen == "proposals":
        _ask_proposals(asker)
    elif chosen == "hierarchical":
        _ask_hierarchical(asker)
    else:
        _ask_grid(asker)
    return asker.finish(chosen, began)


def resolve_mode(model: Promptable, mode: str) -> str:
    """What `auto` means for a model.

    Raises:
        UsageError: see `everything`.
    """
    if mode not in get_args(Mode):
        raise unknown("mode", mode, get_args(Mode))
    if mode == "auto":
        return "proposals" if has_proposer(model) else "hierarchical"
    if mode == "proposals" and not has_proposer(model):
        raise UsageError(f"'{model.name}' has no proposer", hint="use --mode hierarchical, or train one (edgekd.distillation.proposals)")
    return mode


def _check(settings: Settings) -> None:
    for name in ("points_per_side", "max_masks", "batch", "proposals"):
        if getattr(settings, name) < 1:
            raise UsageError(f"{name} is {getattr(settings, name)}, and must be 1 or more")


ALTERNATIVES = slice(1, 4)
"""Of the four masks, those for a click that may mean a part, an object or a group."""
EVERY = slice(0, 4)
"""A proposed box is only roughly right, so that its alternatives are worth keeping as well: one point of recall with `sam_nano`, for nothing."""


def _ask_grid(asker: Asker) -> None:
    points = grid_points(asker.settings.points_per_side, asker.height, asker.width)
    for _ in asker.ask(Prompts.clicks(points), ALTERNATIVES):
        pass


COARSE = 2
"""Of the grid's rows and columns every second is asked first. TinySAM asks an 8 x 8 grid before 32 x 32, which costs less; with `sam_nano` that
lost one to two points of recall (and here the nodes that were asked first are not asked again)."""
COVERING_AREA = 0.3
"""A mask larger than this share of the photo covers nothing: it may hold objects that no coarse click met."""


def _ask_hierarchical(asker: Asker) -> None:
    side = asker.settings.points_per_side
    points, (row, column) = grid_points(side, asker.height, asker.width), np.divmod(np.arange(side * side), side)
    first = (row % COARSE == 0) & (column % COARSE == 0)
    covered: np.ndarray | None = None
    for logits in asker.ask(Prompts.clicks(points[first]), ALTERNATIVES):
        masks = logits > THRESHOLD
        own = masks[masks.mean(axis=(1, 2)) <= COVERING_AREA].any(axis=0) if len(masks) else np.zeros(masks.shape[1:], bool)
        covered = own if covered is None else covered | own
    assert covered is not None
    rows, columns = covered.shape
    at = (points / (asker.width, asker.height) * (columns, rows)).astype(int)
    left = points[~first & ~covered[at[:, 1].clip(0, rows - 1), at[:, 0].clip(0, columns - 1)]]
    for _ in asker.ask(Prompts.clicks(left), ALTERNATIVES):
        pass
    # many clicks on one object also mean many tries at its mask; asking for the box of what was found makes up for the fewer clicks
    for _ in asker.ask(Prompts.boxes(asker.found_boxes()), EVERY):
        pass


def _ask_proposals(asker: Asker) -> None:
    start = time.perf_counter()
    boxes, scores = propose(asker.predictor.model, asker.state)
    kept = suppress_boxes(boxes, scores, asker.settings.proposal_nms, asker.settings.proposals)
    asker.work.seconds["proposer"] = time.perf_counter() - start
    for _ in asker.ask(Prompts.boxes(boxes[kept]), EVERY):
        pass


def stability(logits: np.ndarray, offset: float = 1.0) -> np.ndarray:
    """(N, h, w) logits -> (N,) IoU of the masks thresholded `offset` above and below 0: how sharp the borders are."""
    return iou(logits > THRESHOLD + offset, logits > THRESHOLD - offset)


def suppress(masks: np.ndarray, threshold: float, most: int) -> list[int]:
    """(N, h, w) bool masks, best first -> the indices of at most `most` that overlap no better one by IoU > `threshold`."""
    step = max(1, -(-max(masks.shape[1:]) // NMS_SIDE))
    small = masks[:, ::step, ::step]
    flat = small.reshape(len(masks), small.shape[1] * small.shape[2]).astype(np.float32)
    areas = flat.sum(axis=1)
    alive, kept = np.ones(len(masks), dtype=bool), list[int]()
    for i in range(len(masks)):
        if len(kept) == most:
            break
        if alive[i]:
            kept.append(i)
            rest = np.flatnonzero(alive[i + 1:]) + i + 1
            both = flat[rest] @ flat[i]
            alive[rest] = both <= threshold * np.maximum(areas[rest] + areas[i] - both, 1)
    return kept


def suppress_boxes(boxes: np.ndarray, scores: np.ndarray, threshold: float, most: int) -> np.ndarray:
    """(N, 4) xyxy and (N,) scores -> the indices of at most `most` boxes, best first, that overlap no better one by IoU > `threshold`."""
    order, kept = np.argsort(-scores, kind="stable"), list[int]()
    areas = np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)
    while len(order) and len(kept) < most:
        i, order = order[0], order[1:]
        kept.append(int(i))
        sides = np.minimum(boxes[order, 2:], boxes[i, 2:]) - np.maximum(boxes[order, :2], boxes[i, :2])
        both = np.prod(np.maximum(sides, 0), axis=1)
        order = order[both <= threshold * np.maximum(areas[order] + areas[i] - both, 1e-9)]
    return np.array(kept, dtype=int)


def _segment(run: dict[str, Any], quality: np.ndarray, prompt: np.ndarray) -> Segment:
    x0, y0, x1, y1 = (float(v) for v in prompt)
    click = np.isnan(x1)
    return Segment(run, rle.bbox(run), rle.area(run), float(quality[0]), float(quality[1]), click=(x0, y0) if click else None,
                   box=None if click else (x0, y0, x1, y1))
