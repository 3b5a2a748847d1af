"""Segment what one click on a photo means, with an ncnn artifact and without edgekd: numpy, pillow, ncnn, and onnxruntime for the decoder.

    python ncnn_click.py ARTIFACT PHOTO X,Y [MASK.png]
"""
import json
import sys
from pathlib import Path

import ncnn
import numpy as np
import onnxruntime as ort
from PIL import Image, ImageOps


def size_in(side, photo, spec):
    """(width, height) that the photo has in a square, at the top left; the rest is padding."""
    return [side if spec["pad"] == "stretch" else max(1, int(n * side / max(photo.size) + 0.5)) for n in photo.size]


def to_images(photo, spec):
    """Photo -> (3, S, S), normalised: ncnn has no batch axis."""
    width, height = size_in(spec["image_size"], photo, spec)
    pixels = np.asarray(photo.resize((width, height), Image.Resampling.BILINEAR), np.float32)
    images = np.zeros((3, spec["image_size"], spec["image_size"]), np.float32)
    images[:, :height, :width] = ((pixels - np.float32(spec["mean"])) / np.float32(spec["std"])).transpose(2, 0, 1)
    return images


def embed(artifact, part, images):
    """(3, S, S) -> (1, E, F/16, F/16). ncnn reports failures by numbers, and computes in 16 bits on CPUs that can unless told not to."""
    net = ncnn.Net()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = part["scheme"] == "fp16"
    net.opt.use_bf16_storage = part["scheme"] == "bf16"
    param, weights = (str(Path(artifact, file)) for file in part["files"])
    if net.load_param(param) or net.load_model(weights):
        sys.exit(f"ncnn cannot load {param}")
    extractor = net.create_extractor()
    extractor.input("images", ncnn.Mat(images).clone())  # a Mat of an array only borrows it
    code, embedding = extractor.extract("image_embeddings")
    return np.array(embedding)[None] if code == 0 else sys.exit(f"ncnn gave code {code}")


def main(artifact, photo, click, output="mask.png"):
    manifest = json.loads(Path(artifact, "manifest.json").read_text(encoding="utf-8"))
    spec, parts, photo = manifest["preprocess"], manifest["components"], ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
    side = spec.get("prompt_size") or spec["image_size"]  # of the square that points and masks are in
    point = [float(c) * inside / n - 0.5 for c, inside, n in zip(click.split(","), size_in(side, photo, spec), photo.size, strict=True)]
    masks, iou = ort.InferenceSession(Path(artifact, parts["decoder"]["file"]), providers=["CPUExecutionProvider"]).run(["masks", "iou"], {
        "image_embeddings": embed(artifact, parts["encoder"], to_images(photo, spec)), "point_coords": np.float32([[point]]),
        "point_labels": np.ones((1, 1), np.float32), "mask_input": np.zeros((1, 1, side // 4, side // 4), np.float32), "has_mask": np.zeros(1, np.float32)})
    logits = Image.fromarray(masks[0, 0]).resize((side, side), Image.Resampling.BILINEAR)  # masks 1 to 3 are other readings of a click
    mask = np.asarray(logits.crop((0, 0, *size_in(side, photo, spec))).resize(photo.size, Image.Resampling.BILINEAR)) > 0
    Image.fromarray(mask.astype(np.uint8) * 255).save(output)
    print(json.dumps({"mask": output, "iou": round(float(iou[0, 0]), 4), "share": round(float(mask.mean()), 4)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
