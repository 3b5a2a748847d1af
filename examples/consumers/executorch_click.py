"""Segment what one click on a photo means, with an ExecuTorch artifact and without edgekd: numpy, pillow, torch and executorch.

    python executorch_click.py ARTIFACT PHOTO X,Y [MASK.png]
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
from executorch.runtime import Runtime
from PIL import Image, ImageOps

ABSENT = -2  # label of a point that is not there: the file takes one number of points, and the others are filled up with it


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


def to_prompt(click, photo, side, spec, points):
    """A click in pixels of the photo -> points (1, N, 2) in the square and labels (1, N). SAM counts pixel centres from 0."""
    coords, labels = np.zeros((1, points, 2), np.float32), np.full((1, points), ABSENT, np.float32)
    coords[0, 0], labels[0, 0] = [c * inside / n - 0.5 for c, inside, n in zip(click, size_in(side, photo, spec), photo.size, strict=True)], 1
    return {"point_coords": coords, "point_labels": labels, "has_mask": np.zeros(1, np.float32),
            "mask_input": np.zeros((1, 1, side // 4, side // 4), np.float32)}


def main(artifact, photo, click, output="mask.png"):
    manifest = json.loads(Path(artifact, "manifest.json").read_text(encoding="utf-8"))
    spec, parts = manifest["preprocess"], manifest["components"]
    side = spec.get("prompt_size") or spec["image_size"]  # of the square that points and masks are in
    programs = [Runtime.get().load_program(Path(artifact, parts[n]["file"])) for n in ("encoder", "decoder")]
    encoder, decoder = (program.load_method("forward") for program in programs)
    photo = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
    prompt = to_prompt([float(n) for n in click.split(",")], photo, side, spec, parts["decoder"]["fixed"]["points"])
    prompt["image_embeddings"] = encoder.execute([torch.from_numpy(to_images(photo, spec))])[0].numpy()
    # a .pte knows its inputs and outputs by their order alone: that of the manifest
    found = decoder.execute([torch.from_numpy(prompt[i["name"]]) for i in parts["decoder"]["inputs"]])
    masks, iou = (o.numpy() for o in found)
    logits = Image.fromarray(masks[0, 0]).resize((side, side), Image.Resampling.BILINEAR)  # masks 1 to 3 are other readings of a click
    mask = np.asarray(logits.crop((0, 0, *size_in(side, photo, spec))).resize(photo.size, Image.Resampling.BILINEAR)) > 0
    Image.fromarray(mask.astype(np.uint8) * 255).save(output)
    print(json.dumps({"mask": output, "iou": round(float(iou[0, 0]), 4), "share": round(float(mask.mean()), 4)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
