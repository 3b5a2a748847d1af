"""Artifact against the student it came from, on the runtime's own output: every kind of prompt, one and many at a time.

    encoder   embeddings, and the masks that the student's own decoder makes of them
    decoder   masks and predicted IoU for the student's own embeddings

Masks are compared as users see them (binary, IoU); differences are relative to the reference's range, since a logit has no unit.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekd.errors import EdgekdError
from edgekd.probes import COUNTS, KINDS, Probe, probe
from edgekd.protocols import Promptable, Session
from edgekd.runtime import as_array


@dataclass(frozen=True)
class Limits:
    """What still counts as the same model: largest difference as a share of the reference's range, and least mask IoU."""

    max_relative: float
    min_mask_iou: float


EXACT = Limits(max_relative=1e-3, min_mask_iou=0.999)
LOSSY = {
    # Below it is broken; whether it is good enough is for the accuracy of the artifact to say.
    "encoder": Limits(max_relative=float("inf"), min_mask_iou=0.5),
    # The decoder carries little of the arithmetic and has the last word on every pixel: at a larger loss fp32 is the better choice.
    "decoder": Limits(max_relative=float("inf"), min_mask_iou=0.9),
}
"""component -> limits of every scheme but fp32"""


class Reference:
    """The student's own embeddings and masks for a few images and seeded prompts, computed once per export.

    `images` (n, 3, S, S). One call of `COUNTS[-1]` prompts is made per kind and count on the first image.
    """

    def __init__(self, model: Promptable, images: np.ndarray, *, seed: int = 0) -> None:
        self.model, self.images = model, images
        rng = np.random.default_rng(seed)
        size = model.preprocess.side
        self.probes = [probe(kind, count, size, rng) for kind in KINDS for count in COUNTS]
        self.embeddings = np.concatenate([self.embed(image[None]) for image in images])
        self.answers = [self.decode(self.embeddings[:1], p) for p in self.probes]
        sound(model.name, "embedding", self.embeddings)
        for p, (masks, _) in zip(self.probes, self.answers, strict=True):
            sound(model.name, f"masks for '{p.kind}'", masks)

    def embed(self, images: np.ndarray) -> np.ndarray:
        """(1, 3, S, S) -> (1, E, s, s), by the student in torch."""
        import torch

        with torch.no_grad():
            return as_array(self.model.embed(torch.from_numpy(as_array(images))))

    def decode(self, embedding: np.ndarray, p: Probe) -> tuple[np.ndarray, np.ndarray]:
        """Masks (P, 4, S/4, S/4) and IoU (P, 4), by the student in torch."""
        import torch

        with torch.no_grad():
            masks, iou = self.model.decode(*(torch.from_numpy(a) for a in (embedding, p.points, p.labels, p.mask_input, p.has_mask)))
        return as_array(masks), as_array(iou)


def sound(model: str, what: str, output: np.ndarray) -> None:
    """Raises EdgekdError when an output is NaN, infinite or constant: anything or nothing would agree with it."""
    if not np.isfinite(output).all():
        raise EdgekdError(f"the model's {what} holds NaN or infinity", where=model, hint="its weights are damaged or training diverged")
    if output.std() < 1e-8:
        raise EdgekdError(f"the model's {what} is constant, so that any file would agree with it", where=model,
                          hint="its weights look uninitialised: load a checkpoint")


def encoder_parity(session: Session, reference: Reference) -> dict[str, Any]:
    """Embeddings of the reference's images, and one call of five prompts per kind through the student's own decoder."""
    embeddings = np.concatenate([session.run({"images": image[None]})["image_embeddings"] for image in reference.images])
    report: dict[str, Any] = difference(reference.embeddings, embeddings)
    report["prompts"] = {}
    for p, (masks, _) in zip(reference.probes, reference.answers, strict=True):
        if len(p.points) == COUNTS[1]:
            ours = reference.decode(embeddings[:1], p)[0] if report["finite"] else masks * np.nan
            report["prompts"][p.kind] = difference(masks, ours) | {"mask_iou": mask_iou([masks], [ours])}
    return _summed(report, len(reference.images))


def decoder_parity(session: Session, reference: Reference) -> dict[str, Any]:
    """Every kind of prompt in calls of 1, 5 and 16 prompts on the first image."""
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    theirs_all, ours_all, iou_gap = [], [], 0.0
    for p, (masks, iou) in zip(reference.probes, reference.answers, strict=True):
        out = session.run(p.inputs(reference.embeddings[:1]))
        if out["masks"].shape != masks.shape or out["iou"].shape != iou.shape:
            raise EdgekdError(f"the exported decoder answers {len(masks)} prompts of kind '{p.kind}' with masks {out['masks'].shape} and IoU "
                              f"{out['iou'].shape} instead of {masks.shape} and {iou.shape}", where="decoder")
        pairs.setdefault(p.kind, []).append((masks, out["masks"]))
        theirs_all.append(masks.ravel())
        ours_all.append(out["masks"].ravel())
        iou_gap = max(iou_gap, float(np.abs(iou - out["iou"]).max()))
    report: dict[str, Any] = difference(np.concatenate(theirs_all), np.concatenate(ours_all))
    report["iou_head_max_abs"], report["prompts"] = iou_gap, {}
    for kind, found in pairs.items():
        theirs, ours = [a for a, _ in found], [b for _, b in found]
        flat = difference(*(np.concatenate([x.ravel() for x in side]) for side in (theirs, ours)))
        report["prompts"][kind] = flat | {"mask_iou": mask_iou(theirs, ours)}
    report["counts"] = list(COUNTS)
    return _summed(report, 1)


def difference(reference: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """max_abs, max_relative (of the reference's largest value), relative_l2 and whether everything is finite."""
    finite = bool(np.isfinite(other).all())
    gap = np.abs(reference.astype(np.float64) - (other if finite else np.zeros_like(other)))
    largest, norm = float(np.abs(reference).max()), float(np.linalg.norm(reference))
    return {"max_abs": float(gap.max()), "max_relative": float(gap.max()) / max(largest, 1e-12),
            "relative_l2": float(np.linalg.norm(gap)) / max(norm, 1e-12), "finite": finite}


def mask_iou(reference: list[np.ndarray], other: list[np.ndarray]) -> float:
    """IoU of binary masks, pooled over all arrays. Logits are cut at 0, or at the reference's median where that leaves it empty
    or full (an untrained student), so that the figure always means something."""
    theirs, ours = (np.concatenate([a.ravel() for a in side]) for side in (reference, other))
    positive = float((theirs > 0).mean())
    threshold = 0.0 if 1e-3 < positive < 1 - 1e-3 else float(np.median(theirs))
    a, b = theirs > threshold, ours > threshold
    union = int((a | b).sum())
    return float((a & b).sum() / union) if union else 1.0


def failure(parity: Mapping[str, Any], limits: Limits) -> str | None:
    """Why a component is not the student any more, or None."""
    if not parity["finite"]:
        return "its output holds NaN or infinity"
    if parity["max_relative"] > limits.max_relative:
        return f"its output differs by up to {parity['max_relative']:.2g} of the range (limit {limits.max_relative:g})"
    kind = min(parity["prompts"], key=lambda k: parity["prompts"][k]["mask_iou"])
    if parity["mask_iou"] < limits.min_mask_iou:
        return f"its masks overlap only {parity['mask_iou']:.4f} with the student's for prompts of kind '{kind}' (limit {limits.min_mask_iou:g})"
    return None


def _summed(report: dict[str, Any], images: int) -> dict[str, Any]:
    """Add what spans the kinds: the worst mask IoU, and whether everything is finite."""
    kinds = report["prompts"].values()
    return report | {"mask_iou": min(k["mask_iou"] for k in kinds), "finite": report["finite"] and all(k["finite"] for k in kinds), "images": images}


CHECKS = {"encoder": encoder_parity, "decoder": decoder_parity}
"""component -> its parity check"""
