"""A promptable artifact against the student it came from, on the runtime's own output: every kind of prompt, one and many at a time.

    encoder   embeddings, and the masks that the student's own decoder makes of them
    decoder   masks and predicted IoU for the student's own embeddings
    proposer  boxes and scores for the student's own embeddings

Masks are compared as users see them (binary, IoU). How far a reduced precision may go is stated once, in `LOSSY`.
"""
from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np

from edgekd.data.images import Frame
from edgekd.errors import EdgekdError
from edgekd.models.point_embedding import FILE, PointEmbedding
from edgekd.parity import EXACT, Limits, difference, sound, too_far
from edgekd.probes import COUNTS, KINDS, Probe, probe
from edgekd.protocols import Component, Promptable, Session
from edgekd.runtime import as_array, fingerprint_of
from edgekd.tasks.promptable.exported import official_inputs

LOSSY = {
    # Below it is broken; whether it is good enough is for the accuracy of the artifact to say.
    "encoder": Limits(max_relative=float("inf"), min_mask_iou=0.5),
    # The decoder carries little of the arithmetic and has the last word on every pixel: at a larger loss fp32 is the better choice.
    "decoder": Limits(max_relative=float("inf"), min_mask_iou=0.9),
    "proposer": Limits(max_relative=float("inf"), min_mask_iou=0.9),
}
"""component -> limits of every scheme but fp32"""


class Reference:
    """The student's own embeddings and masks for a few images and seeded prompts, computed once per export.

    `images` (n, 3, S, S). One call of `COUNTS[-1]` prompts is made per kind and count on the first image.
    """

    def __init__(self, model: Promptable, images: np.ndarray, *, signature: str = "batched", seed: int = 0) -> None:
        self.model, self.images, self.signature = model, images, signature
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

    def samples(self, part: Component) -> list[dict[str, np.ndarray]]:
        """Inputs of a component made of the reference's images and probes, for what must be seen at work before it is exported."""
        if part.name == "encoder":
            return [{"images": image[None]} for image in self.images]
        if part.name == "decoder" and "orig_im_size" in part.example:
            return [one for p in self.probes if len(p.points) == COUNTS[1] for one in self.official(p)]
        if part.name == "decoder":
            return [dict(one) for one in self.adapt(part, [p.inputs(self.embeddings[:1]) for p in self.probes])]
        return [{"image_embeddings": e[None]} for e in self.embeddings]

    def official(self, p: Probe) -> list[dict[str, np.ndarray]]:
        """The prompts of a probe one by one, as inputs of SAM's own decoder signature."""
        return list(official_inputs(self.embeddings[:1], p.points, p.labels, p.mask_input, p.has_mask))

    def adapt(self, part: Component, samples: Iterable[Mapping[str, np.ndarray]]) -> Iterable[Mapping[str, np.ndarray]]:
        """Calibration inputs of the batched decoder as the component's signature takes them: one prompt each, or points embedded."""
        if "orig_im_size" in part.example:
            return _OnePromptEach(samples)
        return _Embedded(samples, embedding) if (embedding := embedding_of(part)) else samples

    def compare(self, part: Component, session: Session, scheme: str) -> tuple[dict[str, Any], str | None]:
        """The parity report of a component and why it is not the student any more."""
        limits = EXACT if scheme == "fp32" else LOSSY[part.name]
        if embedding := embedding_of(part):
            session = cast(Session, BehindEmbedding(session, embedding))
        parity = (OFFICIAL if self.signature == "sam" else CHECKS)[part.name](session, self)
        exact = scheme == "fp32"
        stated = {"max_relative": limits.max_relative if exact else None, "max_abs": limits.max_abs if exact else None, "min_mask_iou": limits.min_mask_iou}
        return parity | {"limits": stated}, failure(parity, limits)

    def checked(self) -> str:
        """What was compared."""
        return f"parity on {', '.join(KINDS)} prompts, {', '.join(map(str, COUNTS))} at a time"


class _OnePromptEach:
    """Calibration inputs of the batched decoder, as SAM's own signature takes them: one prompt a sample. Re-iterable."""

    def __init__(self, samples: Iterable[Mapping[str, np.ndarray]]) -> None:
        self._samples = samples

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for s in self._samples:
            yield from official_inputs(s["image_embeddings"], s["point_coords"], s["point_labels"], s["mask_input"], s["has_mask"])

    def fingerprint(self) -> str | None:
        """See `edgekd.runtime.fingerprint_of`."""
        return fingerprint_of(self._samples, "one prompt each")


class _Embedded:
    """Calibration inputs of the batched decoder, their points embedded. Re-iterable."""

    def __init__(self, samples: Iterable[Mapping[str, np.ndarray]], embedding: PointEmbedding) -> None:
        self._samples, self._embedding = samples, embedding

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self._embedding.inputs(s) for s in self._samples)

    def fingerprint(self) -> str | None:
        """See `edgekd.runtime.fingerprint_of`."""
        return fingerprint_of(self._samples, self._embedding.encode().decode())


class BehindEmbedding:
    """A decoder with the signature `embedded` that takes the inputs of the batched one, through the host's part: both are in the comparison."""

    def __init__(self, session: Session, embedding: PointEmbedding) -> None:
        self._session, self._embedding = session, embedding

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `edgekd.protocols.Session`."""
        return self._session.run(self._embedding.inputs(inputs))


def embedding_of(part: Component) -> PointEmbedding | None:
    """What embeds points for a component, read from the contents of its file; None for one that takes points."""
    return PointEmbedding.decode(part.host[FILE]) if FILE in part.host else None


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
    kinds: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    iou_gap = 0.0
    for p, (masks, iou) in zip(reference.probes, reference.answers, strict=True):
        out = session.run(p.inputs(reference.embeddings[:1]))
        if out["masks"].shape != masks.shape or out["iou"].shape != iou.shape:
            raise EdgekdError(f"the exported decoder answers {len(masks)} prompts of kind '{p.kind}' with masks {out['masks'].shape} and IoU "
                              f"{out['iou'].shape} instead of {masks.shape} and {iou.shape}", where="decoder")
        kinds.setdefault(p.kind, []).append((masks, out["masks"]))
        iou_gap = max(iou_gap, float(np.abs(iou - out["iou"]).max()))
    return _by_kind(kinds, iou_gap, COUNTS)


def _by_kind(kinds: Mapping[str, list[tuple[np.ndarray, np.ndarray]]], iou_gap: float, counts: tuple[int, ...]) -> dict[str, Any]:
    """The report on a decoder from (reference, other) masks of every kind of prompt."""
    prompts: dict[str, Any] = {}
    for kind, found in kinds.items():
        theirs, ours = [a for a, _ in found], [b for _, b in found]
        prompts[kind] = difference(_flat(theirs), _flat(ours)) | {"mask_iou": mask_iou(theirs, ours)}
    everything = [pair for found in kinds.values() for pair in found]
    report = difference(_flat([a for a, _ in everything]), _flat([b for _, b in everything]))
    return _summed(report | {"iou_head_max_abs": iou_gap, "prompts": prompts, "counts": list(counts)}, 1)


def _flat(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([a.ravel() for a in arrays])


def official_parity(session: Session, reference: Reference) -> dict[str, Any]:
    """A decoder with SAM's own signature: every kind of prompt, one call a prompt, on photos of several shapes.

    What the caller of that signature sees is compared: masks at the photo's size, predicted IoU, low-resolution masks.
    """
    spec = reference.model.preprocess
    shapes = [(spec.side * 3 // 4, spec.side), (spec.side, spec.side // 2 + 1), (53, 37), (spec.side * 2 // 3, spec.side * 2 // 3)]
    kinds: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    iou_gap = 0.0
    for p, (masks, iou) in zip(reference.probes, reference.answers, strict=True):
        if len(p.points) == COUNTS[-1]:
            continue  # a call takes one prompt: more of them show nothing new
        for i, (asked, (height, width)) in enumerate(zip(reference.official(p), itertools.cycle(shapes))):
            out = session.run(asked | {"orig_im_size": as_array((height, width))})
            photo = Frame(height, width, spec.side, spec.fit == "stretch").mask_to_image(masks[i:i + 1])
            if out["masks"].shape != photo.shape or out["low_res_masks"].shape != masks[:1].shape:
                raise EdgekdError(f"the exported decoder answers a photo of {height} x {width} with masks {out['masks'].shape} and "
                                  f"{out['low_res_masks'].shape} instead of {photo.shape} and {masks[:1].shape}", where="decoder")
            kinds.setdefault(p.kind, []).extend([(photo, out["masks"]), (masks[i:i + 1], out["low_res_masks"])])
            iou_gap = max(iou_gap, float(np.abs(iou[i] - out["iou_predictions"][0]).max()))
    return _by_kind(kinds, iou_gap, COUNTS[:1])


def proposer_parity(session: Session, reference: Reference) -> dict[str, Any]:
    """Boxes and scores of every reference image. Boxes have no masks: `mask_iou` is the mean overlap of each box with the student's own."""
    import torch

    module: Any = reference.model
    theirs, ours = [], []
    for embedding in reference.embeddings:
        with torch.no_grad():
            boxes, scores = (as_array(x)[None] for x in module.propose(torch.from_numpy(embedding[None])))
        out = session.run({"image_embeddings": embedding[None]})
        theirs.append(np.concatenate([boxes / module.preprocess.side, scores[..., None]], axis=-1))
        ours.append(np.concatenate([out["boxes"] / module.preprocess.side, out["scores"][..., None]], axis=-1))
    expected, found = np.concatenate(theirs), np.concatenate(ours)
    report: dict[str, Any] = difference(expected, found)
    report["prompts"] = {"proposals": {"mask_iou": box_overlap(expected[..., :4], found[..., :4]), "finite": report["finite"]}}
    return _summed(report, len(reference.images))


def box_overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Mean IoU of pairs of boxes (..., 4) xyxy; a pair without area agrees."""
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    both = np.prod(np.maximum(sides, 0), axis=-1)
    either = np.prod(a[..., 2:] - a[..., :2], axis=-1) + np.prod(b[..., 2:] - b[..., :2], axis=-1) - both
    return float(np.where(either > 1e-9, both / np.maximum(either, 1e-9), 1.0).mean())


def mask_iou(reference: list[np.ndarray], other: list[np.ndarray]) -> float:
    """IoU of binary masks, pooled over all arrays. Logits are cut at 0, or at the reference's median where that leaves it empty
    or full (an untrained student), so that the figure always means something."""
    theirs, ours = _flat(reference), _flat(other)
    positive = float((theirs > 0).mean())
    threshold = 0.0 if 1e-3 < positive < 1 - 1e-3 else float(np.median(theirs))
    a, b = theirs > threshold, ours > threshold
    union = int((a | b).sum())
    return float((a & b).sum() / union) if union else 1.0


def failure(parity: Mapping[str, Any], limits: Limits) -> str | None:
    """Why a component is not the student any more, or None."""
    if reason := too_far(parity, limits):
        return reason
    kind = min(parity["prompts"], key=lambda k: parity["prompts"][k]["mask_iou"])
    if parity["mask_iou"] < limits.min_mask_iou:
        return f"its masks overlap only {parity['mask_iou']:.4f} with the student's for prompts of kind '{kind}' (limit {limits.min_mask_iou:g})"
    return None


def _summed(report: dict[str, Any], images: int) -> dict[str, Any]:
    """Add what spans the kinds: the worst mask IoU, and whether everything is finite."""
    kinds = report["prompts"].values()
    return report | {"mask_iou": min(k["mask_iou"] for k in kinds), "finite": report["finite"] and all(k["finite"] for k in kinds), "images": images}


CHECKS: dict[str, Callable[[Session, Reference], dict[str, Any]]] = {"encoder": encoder_parity, "decoder": decoder_parity, "proposer": proposer_parity}
"""component -> its parity check"""

OFFICIAL = CHECKS | {"decoder": official_parity}
"""the same for an artifact with SAM's own decoder signature"""
