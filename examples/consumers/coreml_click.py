"""Segment what one click on a photo means, with a Core ML artifact and without edgekd: numpy, pillow and coremltools, on a Mac.

    python coreml_click.py ARTIFACT PHOTO X,Y [MASK.png]
"""
import json
import sys
from pathlib import Path

import coremltools as ct
import numpy as np
from PIL import Image, ImageOps


def size_in(side, photo, spec):
    """(width, height) that the photo has in a square, at the top left; the rest is padding."""
    return [side if spec["pad"] == "stretch" else max(1, int(n * side / max(photo.size) + 0.5)) for n in photo.size]


def to_images(photo, spec):
    """Photo -> (1, 3, S, S), normalised."""
    width, height = size_in(spec["image_size"], photo, spec)
    pixels = np.asarray(photo.resize((width, height), Image.Resampling.BILINEAR), np.float32)
    images = np.zeros((1, 3, spec["image_size"], spec["image_size"]), np.float32)
    images[0, :, :height, :width] = ((pixels - np.float32(spec["mean"])) / np.float32(spec["std"])).transpose(2, 0, 1)
    return images


def to_prompt(click, photo, side, spec):
    """A click in pixels of the photo -> one prompt of one point, in the square. SAM counts pixel centres from 0."""
    point = [c * inside / n - 0.5 for c, inside, n in zip(click, size_in(side, photo, spec), photo.size, strict=True)]
    return {"point_coords": np.float32([[point]]), "point_labels": np.ones((1, 1), np.float32), "has_mask": np.zeros(1, np.float32),
            "mask_input": np.zeros((1, 1, side // 4, side // 4), np.float32)}


def to_mask(logits, photo, side, spec):
    """Logits (F/4, F/4) over the square -> (H, W) bool on the photo."""
    square = Image.fromarray(logits).resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(square.crop((0, 0, *size_in(side, photo, spec))).resize(photo.size, Image.Resampling.BILINEAR)) > 0


def main(artifact, photo, click, output="mask.png"):
    manifest = json.loads(Path(artifact, "manifest.json").read_text(encoding="utf-8"))
    spec, parts = manifest["preprocess"], manifest["components"]
    side = spec.get("prompt_size") or spec["image_size"]  # of the square that points and masks are in
    encoder, decoder = (ct.models.MLModel(str(Path(artifact, parts[n]["file"]))) for n in ("encoder", "decoder"))
    photo = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
    prompt = to_prompt([float(n) for n in click.split(",")], photo, side, spec)
    embedding = encoder.predict({"images": to_images(photo, spec)})["image_embeddings"]
    found = decoder.predict({"image_embeddings": embedding} | prompt)
    mask = to_mask(found["masks"][0, 0].astype(np.float32), photo, side, spec)  # masks 1 to 3 are other readings of a click; `iou` says which is likeliest
    Image.fromarray(mask.astype(np.uint8) * 255).save(output)
    print(json.dumps({"mask": output, "iou": round(float(found["iou"][0, 0]), 4), "share": round(float(mask.mean()), 4)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
