"""From prompts on a photo to masks on that photo: the one path by which every model is evaluated and used.

A `Predictor` works in photo coordinates and pixels. `predictor(model)` makes one of any `Promptable` (torch model or
exported artifact); the baselines are predictors themselves, since they look at the photo and have no embedding.
"""
from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from edgekd.data.images import Frame, preprocess
from edgekd.data.prompts import Prompts
from edgekd.errors import UsageError
from edgekd.protocols import ABSENT, Promptable

Rule = Literal["iou", "first"]
DEFAULT_RULE: Rule = "first"
"""Measured with `sam_nano`: on one click mask 0 is 1 to 3 points of mIoU better than the best of 1..3 by predicted IoU."""
THRESHOLD = 0.0
"""Mask logits above this are mask."""


@dataclass(frozen=True)
class Masks:
    """Answers to P prompts: `masks` (P, H, W) bool on the photo, `scores` (P,) predicted IoU (NaN where there is none),
    `logits` (P, F/4, F/4) of the chosen masks, or None for models without."""

    masks: np.ndarray
    scores: np.ndarray
    logits: np.ndarray | None = None


@runtime_checkable
class Predictor(Protocol):
    """Anything that answers prompts on a photo."""

    name: str

    def start(self, image: np.ndarray) -> Any:
        """(H, W, 3) uint8 RGB -> whatever `masks` needs; the costly part, done once a photo."""
        ...

    def masks(self, state: Any, prompts: Prompts, mask_input: np.ndarray | None = None) -> Masks:
        """Answer P prompts on that photo; `mask_input` (P, F/4, F/4) are logits of an earlier answer."""
        ...


def select(iou: np.ndarray, single_click: np.ndarray, rule: Rule = "iou") -> np.ndarray:
    """Which of the four masks to take: predicted IoU (P, 4), `single_click` (P,) bool -> (P,) 0..3.

    Mask 0 is trained for prompts with one meaning, masks 1..3 for one click, which may mean a part, an object or a group.
    Rule `iou`: for one click the best of 1..3 by predicted IoU, as SAM does. Rule `first`: always mask 0, as EdgeSAM's
    evaluation does. Anything more than one click takes mask 0 under both.
    """
    if rule not in ("iou", "first"):
        raise ValueError(f"unknown rule '{rule}'")
    return np.where(single_click & (rule == "iou"), 1 + np.argmax(iou[:, 1:], axis=1), 0)


class ModelPredictor:
    """A `Promptable` behind the `Predictor` interface: preprocess, embed once, decode all prompts in one call, upsample."""

    def __init__(self, model: Promptable, *, rule: Rule = DEFAULT_RULE) -> None:
        self.model, self.rule, self.name = model, rule, model.name
        self.image_size = model.preprocess.image_size

    def start(self, image: np.ndarray) -> tuple[Any, Frame]:
        """(H, W, 3) uint8 -> the embedding and the photo's frame."""
        return self.embed(*preprocess(image, self.model.preprocess))

    def embed(self, pixels: np.ndarray, frame: Frame) -> tuple[Any, Frame]:
        """The same from what preprocessing gives: (3, S, S) float32 and the photo's frame."""
        with inference(self.model):
            return self.model.embed(as_input(self.model, pixels[None])), frame

    def decode(self, state: tuple[Any, Frame], prompts: Prompts, mask_input: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """All four masks: logits (P, 4, F/4, F/4) and predicted IoU (P, 4), float32, at the model's own resolution.

        Raises:
            UsageError: more points than the model takes.
        """
        embedding, frame = state
        _check_points(self.model, prompts)
        feed: tuple[Any, ...] = ()
        if mask_input is not None:
            feed = (as_input(self.model, mask_input[:, None]), as_input(self.model, np.ones(len(prompts))))
        with inference(self.model):
            points, labels = as_input(self.model, frame.to_model(prompts.points)), as_input(self.model, prompts.labels)
            logits, iou = self.model.decode(embedding, points, labels, *feed)
        return as_array(logits), as_array(iou)

    def masks(self, state: tuple[Any, Frame], prompts: Prompts, mask_input: np.ndarray | None = None) -> Masks:
        """Answer P prompts with the mask that `select` takes, thresholded after upsampling to the photo."""
        logits, iou = self.decode(state, prompts, mask_input)
        every, chosen = np.arange(len(prompts)), select(iou, prompts.single_click, self.rule)
        best = logits[every, chosen]
        return Masks(state[1].mask_to_image(best) > THRESHOLD, iou[every, chosen], best)


def max_points(model: Any) -> int | None:
    """The most points that a model takes in a prompt, a box counting for two (EfficientSAM: 6), or None when it takes any number."""
    asked = model.model if isinstance(model, ModelPredictor) else model
    return getattr(asked, "max_points", None)


def _check_points(model: Promptable, prompts: Prompts) -> None:
    """EfficientSAM's own code drops what is too much in silence."""
    most = max_points(model)
    given = int((prompts.labels != ABSENT).sum(axis=1).max(initial=0))
    if most is not None and given > most:
        raise UsageError(f"'{model.name}' takes at most {most} points in a prompt, a box counting for two, and was given {given}",
                         hint="give fewer clicks, or take a model without this limit")


class Remembered:
    """A predictor that answers a question only once: for a teacher asked the same by the evaluation of every candidate.

    Embeds a photo only when an answer is missing. Keeps one bit a mask pixel in memory and no logits.
    """

    def __init__(self, model: Promptable | Predictor, *, rule: Rule = DEFAULT_RULE) -> None:
        self._inner = predictor(model, rule=rule)
        self.name = self._inner.name
        self._answers: dict[bytes, tuple[np.ndarray, tuple[int, ...], np.ndarray]] = {}

    def start(self, image: np.ndarray) -> dict[str, Any]:
        """(H, W, 3) uint8 -> the photo and its hash; nothing is computed yet."""
        return {"image": image, "key": hashlib.sha1(image.tobytes() + str(image.shape).encode()).digest()}

    def masks(self, state: dict[str, Any], prompts: Prompts, mask_input: np.ndarray | None = None) -> Masks:
        """As the model answers, from memory when the same was asked before."""
        if mask_input is not None:
            raise ValueError("answers to fed-back masks are not remembered")
        key = hashlib.sha1(state["key"] + prompts.points.tobytes() + prompts.labels.astype(np.int8).tobytes()).digest()
        if key not in self._answers:
            if "state" not in state:
                state["state"] = self._inner.start(state["image"])
            answer = self._inner.masks(state["state"], prompts)
            self._answers[key] = (np.packbits(answer.masks), answer.masks.shape, answer.scores)
        bits, shape, scores = self._answers[key]
        return Masks(np.unpackbits(bits, count=int(np.prod(shape))).reshape(shape).astype(bool), scores)


def predictor(model: Promptable | Predictor, *, rule: Rule = DEFAULT_RULE) -> Predictor:
    """Any model as a `Predictor`; one that is a predictor already stays what it is."""
    if isinstance(model, Predictor):
        return model
    return ModelPredictor(model, rule=rule)


def _module(model: Any) -> Any:
    """The torch module behind a model, or None; without importing torch for those who have no torch model."""
    torch = sys.modules.get("torch")
    return model if torch is not None and isinstance(model, torch.nn.Module) else None


@contextmanager
def inference(model: Any) -> Iterator[None]:
    """No gradients and eval mode for a torch model, left as it was afterwards; nothing for others."""
    module = _module(model)
    if module is None:
        yield
        return
    import torch

    training = module.training
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        module.train(training)


def as_input(model: Any, array: np.ndarray) -> Any:
    """A float32 array as the model takes it: a tensor on its device for torch models, the array for artifacts."""
    array = np.ascontiguousarray(array, dtype=np.float32)
    module = _module(model)
    if module is None:
        return array
    import torch

    parameter = next(module.parameters(), None)
    return torch.from_numpy(array).to(parameter.device if parameter is not None else "cpu")


def as_array(value: Any) -> np.ndarray:
    """A tensor (any float type or device) or array as float32 numpy."""
    if hasattr(value, "detach"):
        value = value.detach().float().cpu().numpy()
    return np.asarray(value, dtype=np.float32)
