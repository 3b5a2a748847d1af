"""A click and the box it probably means: EdgeSAM's answer to the one click that may be a part, an object or a group.

Of the proposals that contain the click take the K whose centres are nearest, and of these the one with the highest score, as an added box
prompt (arXiv 2312.06660, sec. 3.2.3, K = 5; of its merged box and its released best box, the latter).
"""
from __future__ import annotations

from typing import Any

import numpy as np

from edgekd.data.images import Frame
from edgekd.data.prompts import Prompts
from edgekd.errors import UsageError
from edgekd.protocols import ABSENT, BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, POSITIVE, Promptable
from edgekd.tasks.promptable.everything import suppress_boxes
from edgekd.tasks.promptable.predictor import DEFAULT_RULE, Masks, ModelPredictor, Rule
from edgekd.tasks.promptable.proposing import has_proposer, propose

NEAREST = 5
LEAST_SCORE = 0.7
"""A proposal that expects less overlap than this is not added: a click alone is then the better prompt. (With `sam_nano`, whose click is
nearly as good as its box, lower scores only cost; a model with a larger gap between the two gains earlier.)"""
PROPOSALS, NMS = 100, 0.7


def refine_click(model: Promptable, state: tuple[Any, Frame], prompts: Prompts, *, nearest: int = NEAREST, least_score: float = LEAST_SCORE) -> Prompts:
    """P prompts with the best proposal's corners added to those that have none and hold a positive click; ABSENT corners to the others.

    Args:
        state: of the photo, from `ModelPredictor.start`.
        nearest: K, how many proposals around the first positive click compete.
    """
    boxes, scores = propose(model, state)
    kept = suppress_boxes(boxes, scores, NMS, PROPOSALS)
    return add_boxes(prompts, boxes[kept], scores[kept], nearest=nearest, least_score=least_score)


def add_boxes(prompts: Prompts, boxes: np.ndarray, scores: np.ndarray, *, nearest: int = NEAREST, least_score: float = LEAST_SCORE) -> Prompts:
    """The choice itself: `boxes` (Q, 4) xyxy in pixels of the photo with `scores` (Q,)."""
    corners, labels = np.zeros((len(prompts), 2, 2)), np.full((len(prompts), 2), ABSENT)
    for i, (points, signs) in enumerate(zip(prompts.points, prompts.labels, strict=True)):
        clicks = np.flatnonzero(signs == POSITIVE)
        if not len(clicks) or np.isin(signs, (BOX_TOP_LEFT, BOX_BOTTOM_RIGHT)).any():
            continue
        click = points[clicks[0]]
        around = np.flatnonzero((boxes[:, :2] <= click).all(axis=1) & (click <= boxes[:, 2:]).all(axis=1) & (scores >= least_score))
        if len(around):
            far = np.linalg.norm((boxes[around, :2] + boxes[around, 2:]) / 2 - click, axis=1)
            close = around[np.argsort(far, kind="stable")[:nearest]]
            corners[i] = boxes[close[np.argmax(scores[close])]].reshape(2, 2)
            labels[i] = BOX_TOP_LEFT, BOX_BOTTOM_RIGHT
    return prompts.join(Prompts(corners, labels))


class BoxedClicks(ModelPredictor):
    """A predictor that adds the best proposal to every click: evaluated and used like any other.

    Raises:
        UsageError: the model has no proposer.
    """

    def __init__(self, model: Promptable, *, rule: Rule = DEFAULT_RULE, nearest: int = NEAREST, least_score: float = LEAST_SCORE) -> None:
        super().__init__(model, rule=rule)
        if not has_proposer(model):
            raise UsageError(f"'{model.name}' has no proposer to find a click's box", hint="train one with edgekd.distillation.proposals")
        self.name, self._nearest, self._least = f"{model.name} with proposals", nearest, least_score

    def masks(self, state: tuple[Any, Frame], prompts: Prompts, mask_input: np.ndarray | None = None) -> Masks:
        """As the model answers the prompts with their boxes."""
        return super().masks(state, refine_click(self.model, state, prompts, nearest=self._nearest, least_score=self._least), mask_input)
