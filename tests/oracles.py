"""Models whose answers are known, for the tests of tasks: they read the truth from the photo's own colours.

`painted` writes instance k + 1 into the red channel of a photo, so a model that sees only the photo can know everything.
"""
from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from edgekd.protocols import BOX_TOP_LEFT, POSITIVE, Preprocess, Sample
from edgekd.tasks.promptable import rle

STEP = 25


def painted(masks: np.ndarray) -> np.ndarray:
    """(K, H, W) bool -> (H, W, 3) uint8, red = 25 (k + 1) on instance k."""
    image = np.zeros((*masks.shape[1:], 3), np.uint8)
    for k, mask in enumerate(masks):
        image[mask, 0] = STEP * (k + 1)
    return image


class Painted:
    """A dataset of `count` photos with rectangles on a 4-pixel grid, so that they survive the S/4 mask grid."""

    name, skipped, has_masks = "painted", list[str](), True

    def __init__(self, count: int = 3, size: int = 64, instances: int = 3) -> None:
        self.samples = []
        for i in range(count):
            masks = np.zeros((instances, size, size), bool)
            for k in range(instances):
                x0, y0 = 4 * (i % 3), 20 * k
                masks[k, y0:y0 + 12, x0:x0 + 16 + 4 * k] = True
            self.samples.append(Sample(f"p{i}", painted(masks), masks))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def fingerprint(self) -> str:
        return "painted"


def answer(red: np.ndarray, points: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """red (S, S) 0..255, one prompt -> (S/4, S/4) logits of the instance under its first click or box centre."""
    size = red.shape[0]
    if (labels == BOX_TOP_LEFT).any():
        x, y = points[:2].mean(axis=0)
    else:
        x, y = points[np.flatnonzero(labels == POSITIVE)[0]]
    at = red[int(np.clip(y + 0.5, 0, size - 1)), int(np.clip(x + 0.5, 0, size - 1))]
    return np.where(np.abs(red[2::4, 2::4] - at) < STEP / 2, 8.0, -8.0) if at > STEP / 2 else np.full((size // 4, size // 4), -8.0)


class Oracle:
    """A numpy `Promptable` that always gives the right mask, in slot 2 and slot 0; counts its calls."""

    embed_dim = 1

    def __init__(self, name: str = "oracle", size: int = 64) -> None:
        self.name, self.preprocess = name, Preprocess(size, mean=(0, 0, 0), std=(1, 1, 1))
        self.embeds = self.decodes = 0
        self.fed: list[bool] = []

    def embed(self, images: Any) -> np.ndarray:
        assert isinstance(images, np.ndarray) and images.dtype == np.float32
        self.embeds += 1
        return images

    def decode(self, embedding: Any, points: Any, labels: Any, mask_input: Any = None, has_mask: Any = None) -> tuple[np.ndarray, np.ndarray]:
        assert points.dtype == labels.dtype == np.float32 and points.shape[:2] == labels.shape
        self.decodes += 1
        self.fed.append(mask_input is not None)
        if mask_input is not None:
            assert mask_input.shape == (len(points), 1, *([self.preprocess.image_size // 4] * 2)) and has_mask.tolist() == [1.0] * len(points)
        right = np.stack([answer(embedding[0, 0], p, k) for p, k in zip(points, labels, strict=True)])
        masks = np.stack([right, -right, right, -right], axis=1).astype(np.float32)
        return masks, np.tile(np.float32([0.1, 0.2, 0.9, 0.3]), (len(points), 1))


class Empty(Oracle):
    """Finds nothing, ever."""

    def decode(self, embedding: Any, points: Any, labels: Any, mask_input: Any = None, has_mask: Any = None) -> tuple[np.ndarray, np.ndarray]:
        masks, iou = super().decode(embedding, points, labels, mask_input, has_mask)
        return np.full_like(masks, -1), iou


class TorchOracle(nn.Module):
    """The oracle as a torch module, to check that gradients are off and the mode is given back."""

    embed_dim, name = 1, "torch-oracle"

    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.preprocess = Preprocess(size, mean=(0, 0, 0), std=(1, 1, 1))
        self._oracle = Oracle(size=size)

    def embed(self, images: Tensor) -> Tensor:
        assert not self.training and torch.is_inference_mode_enabled()
        return images * self.scale

    def decode(self, embedding: Tensor, points: Tensor, labels: Tensor, mask_input: Any = None, has_mask: Any = None) -> tuple[Tensor, Tensor]:
        assert not self.training and torch.is_inference_mode_enabled()
        masks, iou = self._oracle.decode(embedding.numpy(), points.numpy(), labels.numpy())
        return torch.from_numpy(masks) * self.scale, torch.from_numpy(iou)


def rectangle(x: int, y: int, w: int, h: int, side: int = 64) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    mask[y:y + h, x:x + w] = True
    return mask


def write_coco(tmp_path: Path, photos: list[list[dict[str, Any]]], *, categories: tuple[int, ...] = (1, 18), side: int = 64, **record: Any) -> Path:
    """A COCO json; each instance: `box` (x, y, w, h) filled, `category_id`, more."""
    images, annotations = [], []
    for i, rows in enumerate(photos):
        masks = [rectangle(*r["box"], side=side) for r in rows]
        shown = np.stack([m for m, r in zip(masks, rows, strict=True) if not r.get("iscrowd")] or [np.zeros((side, side), bool)])
        Image.fromarray(painted(shown)).save(tmp_path / f"{i}.png")
        images.append({"id": 70 + i, "file_name": f"{i}.png", "height": side, "width": side, **record})
        for r, m in zip(rows, masks, strict=True):
            annotations.append({"category_id": categories[0], "iscrowd": 0, **r, "id": len(annotations), "image_id": 70 + i, "area": int(m.sum()),
                                "bbox": list(r["box"]), "segmentation": rle.encode(m[None])[0]})
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": c, "name": str(c)} for c in categories]}))
    return path


def coco_scene(rng: np.random.Generator, photos: int, categories: tuple[int, ...]) -> tuple[list[Any], list[Any]]:
    """Random instances, crowds among them, and random masks found, many of them near an instance. No two scores are the same."""
    scores = iter(rng.permutation(4000) / 4000)
    truth, found = [], []
    for _ in range(photos):
        own, its = [], []
        for _ in range(rng.integers(0, 5)):
            x, y = rng.integers(0, 100, 2)
            w, h = rng.integers(8, 100, 2)
            mask = rectangle(x, y, w, h, 200)
            category, crowd = int(rng.choice(categories)), int(rng.random() < 0.15)
            own.append({"segmentation": rle.encode(mask[None])[0], "area": int(mask.sum()), "iscrowd": crowd, "category_id": category})
            for _ in range(rng.integers(0, 4)):
                near = rectangle(max(0, x + rng.integers(-6, 7)), max(0, y + rng.integers(-6, 7)), w, h, 200)
                its.append({"segmentation": rle.encode(near[None])[0], "area": int(near.sum()), "score": float(next(scores)),
                            "category_id": category if rng.random() < 0.8 else int(rng.choice(categories))})
        truth.append(own)
        found.append(its)
    return truth, found


def by_pycocotools(truth: list[Any], found: list[Any], *, use_cats: int = 1) -> np.ndarray:
    """The twelve numbers of COCOeval, run as its manual says."""
    def flat(photos: list[Any]) -> list[dict[str, Any]]:
        rows = [{**copy.deepcopy(r), "image_id": i + 1} for i, own in enumerate(photos) for r in own]
        return [{"iscrowd": 0, **r, "id": n + 1} for n, r in enumerate(rows)]

    with contextlib.redirect_stdout(io.StringIO()):
        index = COCO()
        index.dataset = {"images": [{"id": i + 1, "height": 200, "width": 200} for i in range(len(truth))], "annotations": flat(truth),
                         "categories": [{"id": c} for c in sorted({r["category_id"] for own in truth for r in own})]}
        index.createIndex()
        run = COCOeval(index, index.loadRes(flat(found)), "segm")
        run.params.useCats = use_cats
        run.evaluate()
        run.accumulate()
        run.summarize()
    return np.asarray(run.stats)
