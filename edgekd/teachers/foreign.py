"""SAM 2 and 2.1, SAM 3 (its tracker, which takes clicks and boxes), SAM-HQ and EdgeTAM as teachers: the image path of `transformers`.

The library computes everything; this file gives it the shape of our contract (`edgekd.protocols.Promptable`). Their decoders read
more than the embedding: maps of strides 4 and 8, or features of an early block. These are folded into further channels, so that an
embedding stays one tensor that a cache can hold:

    SAM 2, SAM 3, EdgeTAM    E + E + 2E channels: the embedding, stride 8 (E/4 wide) and stride 4 (E/8 wide)
    SAM-HQ                   E + the width of the image encoder

Feature objectives compare the first `embed_dim` channels. There is no prompt encoder or mask decoder of ours to copy from: a student
of such a teacher starts with an untrained decoder of `shape`.

Photos are seen as the library's processors show them: stretched, but for SAM-HQ, which pads as SAM does. SAM 3 has 14-pixel patches,
72 x 72 of them on 1008 px; our prompts then live in a square of 1152, whose 1/16 and 1/4 are its embedding and masks.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.errors import EdgekdError, UsageError, first_line
from edgekd.models.sam import DecoderShape
from edgekd.protocols import ABSENT, BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, NOT_A_POINT, Preprocess
from edgekd.students import backbones

SAM_MEAN, SAM_STD = Preprocess.mean, Preprocess.std
HALF = (127.5, 127.5, 127.5)


@dataclass(frozen=True)
class Kind:
    """A class of the library, and what its files do not say about photos."""

    cls: str
    fit: Literal["pad", "stretch"] = "stretch"
    mean: tuple[float, float, float] = SAM_MEAN
    std: tuple[float, float, float] = SAM_STD
    fine: bool = True
    """Whether its decoder reads maps of strides 4 and 8; otherwise features of an early block."""


_SAM2, _SAM3 = Kind("Sam2Model"), Kind("Sam3TrackerModel", mean=HALF, std=HALF)
_HQ, _TAM = Kind("SamHQModel", fit="pad", fine=False), Kind("EdgeTamModel")
KINDS = {
    "sam2": _SAM2, "sam2_video": _SAM2, "sam3_tracker": _SAM3, "sam3_tracker_video": _SAM3, "sam3_video": _SAM3,
    "sam_hq": _HQ, "edgetam": _TAM, "edgetam_video": _TAM,
}
"""model_type of a config.json -> its kind. Published files often carry the video model's; the image model is a part of it."""
MODEL_TYPES = tuple(KINDS)


class Foreign(nn.Module):
    """A promptable model of the library behind our contract, frozen and in eval mode.

    Args:
        name: the teacher's name.
        model: an instance of `kind.cls`.
    """

    def __init__(self, name: str, model: nn.Module, kind: Kind) -> None:
        super().__init__()
        self.name, self.model, self.kind = name, model, kind
        prompt: Any = model.config.prompt_encoder_config  # type: ignore[union-attr]
        size, patch = _side(prompt.image_size), _side(prompt.patch_size)
        grid = size // patch
        self.embed_dim = int(prompt.hidden_size)
        self.shape = DecoderShape(self.embed_dim)
        self.preprocess = Preprocess(size, kind.mean, kind.std, kind.fit, None if 16 * grid == size else 16 * grid)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Foreign:
        """Stays in eval mode: it is a teacher."""
        return super().train(False)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) normalised -> (B, E + further channels, F/16, F/16)."""
        found: Any = self.model.get_image_embeddings(images)  # type: ignore[operator]
        if self.kind.fine:
            quarter, eighth, embedding = found
            return torch.cat([embedding, F.pixel_unshuffle(eighth, 2), F.pixel_unshuffle(quarter, 4)], dim=1)
        embedding, early = found
        return torch.cat([embedding, early[0].permute(0, 3, 1, 2)], dim=1)

    def unpack(self, packed: Tensor) -> dict[str, Any]:
        """What `embed` gave, as the library's arguments."""
        e = self.embed_dim
        if self.kind.fine:
            embedding, eighth, quarter = packed.split([e, e, 2 * e], dim=1)
            return {"image_embeddings": [F.pixel_shuffle(quarter, 4), F.pixel_shuffle(eighth, 2), embedding]}
        embedding, early = packed[:, :e], packed[:, e:]
        return {"image_embeddings": embedding, "intermediate_embeddings": [early.permute(0, 2, 3, 1)]}

    @torch.no_grad()
    def decode(
        self, embedding: Tensor, points: Tensor, labels: Tensor, mask_input: Tensor | None = None, has_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """embedding (B, E + ..., s, s), points (P, N, 2) xy in the F frame, labels (P, N), P a multiple of B (prompts of one image
        stand together), mask_input (P, 1, F/4, F/4) with has_mask (P,) -> mask logits (P, 4, F/4, F/4), IoU (P, 4).

        Mask 0 is the library's answer for one mask (SAM 2 replaces an unstable one by the best of the others), 1..3 its three.
        The library knows no absent points: prompts alike in their number of clicks, box and mask share a call.
        """
        images = embedding.shape[0]
        if images > 1:
            masks_of = [None] * images if mask_input is None else mask_input.chunk(images)
            has_of = [None] * images if has_mask is None else has_mask.chunk(images)
            per_image = zip(embedding.split(1), points.chunk(images), labels.chunk(images), masks_of, has_of, strict=True)
            parts = [self.decode(*given) for given in per_image]
            return torch.cat([masks for masks, _ in parts]), torch.cat([iou for _, iou in parts])
        points = points * (self.preprocess.image_size / self.preprocess.side)
        kinds = list(alike(points, labels.long(), mask_input, has_mask))
        answers = [self._ask(embedding, len(rows), given) for rows, given in kinds]
        order = torch.cat([rows for rows, _ in kinds]).argsort()
        return torch.cat([masks for masks, _ in answers])[order], torch.cat([iou for _, iou in answers])[order]

    def _ask(self, embedding: Tensor, count: int, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The library's answers to `count` prompts of one kind: masks (count, 4, F/4, F/4), IoU (count, 4)."""
        lead = (1, count)
        if "input_masks" in given:  # the library takes one mask an image, so every prompt gets an image of its own
            lead, embedding = (count, 1), embedding.expand(count, -1, -1, -1)
        arguments = self.unpack(embedding) | {k: v if k == "input_masks" else v.unflatten(0, lead) for k, v in given.items()}
        answers = [self.model(**arguments, multimask_output=several) for several in (False, True)]
        masks, iou = [a.pred_masks.flatten(0, 1) for a in answers], [a.iou_scores.flatten(0, 1) for a in answers]
        return torch.cat(masks, dim=1), torch.cat(iou, dim=1)


def alike(points: Tensor, labels: Tensor, mask_input: Tensor | None, has_mask: Tensor | None) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Prompts (P, N) sorted by their number of clicks, box and mask: the rows of each kind and the library's arguments for them.

    Raises:
        EdgekdError: a prompt has one corner of a box, or more than one box.
    """
    corner = (labels == BOX_TOP_LEFT) | (labels == BOX_BOTTOM_RIGHT)
    click = ~corner & (labels != ABSENT)
    if mask_input is None:
        masked = torch.zeros_like(click[:, 0])
    else:
        masked = torch.ones_like(click[:, 0]) if has_mask is None else has_mask > 0
    kinds = torch.stack([click.sum(1), corner.sum(1), masked.long()], dim=1)
    for kind in kinds.unique(dim=0):
        rows = (kinds == kind).all(dim=1).nonzero().squeeze(1)
        clicks, corners, mask = kind.tolist()
        if corners not in (0, 2):
            raise EdgekdError(f"a prompt has {corners} corners instead of a box's two", hint="this teacher takes at most one box a prompt")
        given: dict[str, Tensor] = {}
        if clicks:
            at = click[rows]
            given["input_points"] = points[rows][at].unflatten(0, (-1, clicks))
            given["input_labels"] = labels[rows][at].unflatten(0, (-1, clicks))
        elif not corners:
            given |= {"input_points": torch.zeros_like(points[rows, :1]), "input_labels": torch.full_like(labels[rows, :1], NOT_A_POINT)}
        if corners:
            first, second = ((labels[rows] == label).long().argmax(dim=1) for label in (BOX_TOP_LEFT, BOX_BOTTOM_RIGHT))
            every = torch.arange(len(rows), device=rows.device)
            given["input_boxes"] = torch.cat([points[rows][every, first], points[rows][every, second]], dim=1)
        if mask and mask_input is not None:
            given["input_masks"] = mask_input[rows]
        yield rows, given


def load(source: str | Path, *, offline: bool = False, name: str | None = None) -> Foreign:
    """A frozen teacher from a folder (`config.json`, `model.safetensors`) or a hub id, by the `model_type` of its config.

    It is called `name`, or by the last part of `source`.

    Raises:
        UsageError: the files are of a model that cannot be a teacher; the message lists what can. Or EdgeTAM without timm.
        EdgekdError: nothing there, the network cannot be reached, or weights are missing, unknown or of another shape.
    """
    backbones.mend_torchvision()
    import transformers

    try:
        config, _ = transformers.PretrainedConfig.get_config_dict(str(source), local_files_only=offline)
    except (OSError, ValueError) as e:
        raise _unreachable(source, e) from e
    found = str(config.get("model_type"))
    if found not in KINDS:
        raise UsageError(f"a model of type '{found}' cannot be a teacher here", where=source,
                         hint=f"supported types: sam, {', '.join(MODEL_TYPES)}")
    kind = KINDS[found]
    if kind is _TAM:
        backbones.import_timm()
    try:
        with _quiet():
            model, info = getattr(transformers, kind.cls).from_pretrained(str(source), local_files_only=offline, use_safetensors=True,
                                                                          dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as e:
        raise _unreachable(source, e) from e
    wrong = [f"missing {k}" for k in sorted(info["missing_keys"])] + [f"unknown {k}" for k in sorted(info["unexpected_keys"])]
    wrong += [f"misshapen {k}" for k in sorted(map(str, info["mismatched_keys"]))]
    if wrong:
        raise EdgekdError(f"the weights do not fit a {kind.cls}: {'; '.join(wrong[:4])}", where=source,
                          hint="the files are incomplete or of another model; download them again")
    return Foreign(name or str(source).rstrip("/").split("/")[-1], model, kind)


@contextmanager
def _quiet() -> Iterator[None]:
    """The library warns that a video model's file has more than the image model takes, which is what is wanted here."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _unreachable(source: str | Path, error: Exception) -> EdgekdError:
    return EdgekdError(f"no model can be read from '{source}'", where=first_line(error),
                       hint="a folder holds config.json and model.safetensors; hub ids look like facebook/sam2.1-hiera-tiny")


def _side(value: Any) -> int:
    """A size of the library's configs: one number, or height and width."""
    return int(value if isinstance(value, int) else value[0])
