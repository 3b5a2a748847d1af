"""Region labels for the photos of the training pool, by graph-based segmentation (Felzenszwalb and Huttenlocher, 2004).

    python benchmarks/photo_regions.py pool/photos pool/regions      # needs scikit-image

Regions of like colour and texture are not objects, but they are what a click on a real photo often means, and no person's
labels are needed. Writes a pack (index.json, splits.json, images/, masks/) that `edgekd` opens as data. Two maps a photo: fine, coarse.
"""
from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from skimage.color import rgb2lab
from skimage.segmentation import felzenszwalb

SIDE = 320
SCALES = {"fine": (150, 0.006), "coarse": (600, 0.02)}  # scale of the method, smallest region as a share of the image


def regions(image: np.ndarray, scale: float, smallest: float) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W) uint8 labels from 1."""
    labels = felzenszwalb(rgb2lab(image) / 100, scale=scale, sigma=0.9, min_size=int(smallest * image.shape[0] * image.shape[1]))
    return (np.unique(labels, return_inverse=True)[1].reshape(labels.shape) + 1).clip(max=255).astype(np.uint8)


def main(source: Path, output: Path) -> None:
    """Label every photo of `source` into the pack `output`."""
    (output / "images").mkdir(parents=True, exist_ok=True)
    (output / "masks").mkdir(exist_ok=True)
    items = []
    for path in sorted(source.glob("*.jpg")):
        photo = Image.open(path).convert("RGB")
        photo.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        for name, (scale, smallest) in SCALES.items():
            found = regions(np.asarray(photo), scale, smallest)
            if found.max() < 2:
                continue
            item = f"{path.stem}-{name}"
            photo.save(output / "images" / f"{item}.jpg", quality=92)
            Image.fromarray(found).save(output / "masks" / f"{item}.png")
            items.append({"id": item, "split": "train", "image": f"images/{item}.jpg", "width": photo.width, "height": photo.height,
                          "masks": [{"file": f"masks/{item}.png", "annotator": "felzenszwalb", "n_regions": int(found.max())}], "primary": 0})
    (output / "index.json").write_text(json.dumps({"format": 1, "name": "pool-regions", "kind": "regions", "items": items}))
    (output / "splits.json").write_text(json.dumps({"train": [i["id"] for i in items]}))
    print(f"{len(items)} region maps of {len(list(source.glob('*.jpg')))} photos, median {np.median([i['masks'][0]['n_regions'] for i in items]):.0f} regions")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
