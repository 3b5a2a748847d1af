"""Segment what one click on a photo means, with a QNN artifact and without edgekd: numpy, pillow, onnxruntime and onnxruntime-qnn.

    python qnn_click.py ARTIFACT PHOTO X,Y [MASK.png]            on a Snapdragon; on Linux x86-64 in the vendor's simulator, for small models
"""
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import onnxruntime_qnn as qnn
from PIL import Image, ImageOps


def size_in(side, photo, spec):
    """(width, height) that the photo has in a square, at the top left; the rest is padding."""
    return [side if spec["pad"] == "stretch" else max(1, int(n * side / max(photo.size) + 0.5)) for n in photo.size]


def to_images(photo, spec):
    """Photo -> (1, 3, S, S), normalised."""
    width, height = size_in(spec["image_size"], photo, spec)
    pixels = (np.asarray(photo.resize((width, height), Image.Resampling.BILINEAR), np.float32) - np.float32(spec["mean"])) / np.float32(spec["std"])
    return np.pad(pixels.transpose(2, 0, 1), ((0, 0), (0, spec["image_size"] - height), (0, spec["image_size"] - width)))[None]


def to_prompt(click, photo, side, spec, points):
    """A click in pixels of the photo -> points (1, N, 2) in the square and labels (1, N). SAM counts pixel centres from 0."""
    coords, labels = np.zeros((1, points, 2), np.float32), np.full((1, points), -2, np.float32)  # -2: no such point
    coords[0, 0], labels[0, 0] = [c * inside / n - 0.5 for c, inside, n in zip(click, size_in(side, photo, spec), photo.size, strict=True)], 1
    unused = np.zeros((1, 1, side // 4, side // 4), np.float32)
    return {"point_coords": coords, "point_labels": labels, "mask_input": unused, "has_mask": np.zeros(1, np.float32)}


def to_mask(logits, photo, side, spec):
    """Logits (F/4, F/4) over the square -> (H, W) bool on the photo."""
    square = Image.fromarray(logits).resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(square.crop((0, 0, *size_in(side, photo, spec))).resize(photo.size, Image.Resampling.BILINEAR)) > 0


def main(artifact, photo, click, output="mask.png"):
    manifest = json.loads(Path(artifact, "manifest.json").read_text(encoding="utf-8"))
    spec, parts = manifest["preprocess"], manifest["components"]
    side = spec.get("prompt_size") or spec["image_size"]  # of the square of points and masks
    ort.register_execution_provider_library(qnn.get_ep_name(), qnn.get_library_path())
    options, devices = ort.SessionOptions(), [d for d in ort.get_ep_devices() if d.ep_name == qnn.get_ep_name()]
    options.add_provider_for_devices(devices[:1], {"backend_path": qnn.get_qnn_htp_path()})  # `providers=[name]` would leave all to the CPU
    files = (next(f for f in parts[n]["files"] if ".htp" in f and f.endswith(".onnx")) for n in ("encoder", "decoder"))
    encoder, decoder = (ort.InferenceSession(Path(artifact, file), options) for file in files)
    photo = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
    prompt = to_prompt([float(n) for n in click.split(",")], photo, side, spec, parts["decoder"]["fixed"]["points"])
    prompt["image_embeddings"] = encoder.run(["image_embeddings"], {"images": to_images(photo, spec)})[0]
    masks, iou = decoder.run(["masks", "iou"], prompt)
    mask = to_mask(masks[0, 0], photo, side, spec)  # masks 1 to 3 are other readings of a click; `iou` says which is likeliest
    Image.fromarray(mask.astype(np.uint8) * 255).save(output)
    print(json.dumps({"mask": output, "iou": round(float(iou[0, 0]), 4), "share": round(float(mask.mean()), 4)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
