"""Segment what one click on a photo means, with a TensorRT artifact and without edgekd: numpy, pillow, tensorrt and cuda-python.

    sh ARTIFACT/encoder.build_engine.sh; sh ARTIFACT/decoder.build_engine.sh   # without engines onnxruntime computes the same graph
    python tensorrt_click.py ARTIFACT PHOTO X,Y [MASK.png]
"""
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


def load(file):
    """A function from inputs to outputs, both by name: float32 in and out in every precision."""
    if not file.with_suffix(".engine").exists():
        import onnxruntime as ort
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # optimised, fp16 scales and fp8 give wrong answers
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return lambda feed: dict(zip([o.name for o in session.get_outputs()], session.run(None, feed), strict=True))
    import tensorrt as trt
    from cuda.bindings import runtime as cuda
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(file.with_suffix(".engine").read_bytes())
    context, names = engine.create_execution_context(), [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    def run(feed):
        taken = {n: np.ascontiguousarray(feed[n]) for n in names if n in feed}
        assert all(context.set_input_shape(n, a.shape) for n, a in taken.items()), "the engine was built for other shapes"
        arrays = taken | {n: np.empty(tuple(context.get_tensor_shape(n)), np.float32) for n in names if n not in feed}
        on_gpu = {n: int(cuda.cudaMalloc(a.nbytes)[1]) for n, a in arrays.items()}
        for n, a in arrays.items():
            cuda.cudaMemcpy(on_gpu[n], a.ctypes.data, a.nbytes, cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)
            context.set_tensor_address(n, on_gpu[n])
        assert context.execute_async_v3(0) and int(cuda.cudaStreamSynchronize(0)[0]) == 0
        for n, a in arrays.items():
            cuda.cudaMemcpy(a.ctypes.data, on_gpu[n], a.nbytes, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost)
            cuda.cudaFree(on_gpu[n])
        return arrays
    return run


def main(artifact, photo, click, output="mask.png"):
    manifest = json.loads(Path(artifact, "manifest.json").read_text(encoding="utf-8"))
    spec, photo = manifest["preprocess"], ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
    encoder, decoder = (load(Path(artifact, manifest["components"][n]["file"])) for n in ("encoder", "decoder"))
    size, side = spec["image_size"], spec.get("prompt_size") or spec["image_size"]  # of the photo's square, and of the one for points and masks
    (w, h), (fw, fh) = ([s if spec["pad"] == "stretch" else max(1, int(n * s / max(photo.size) + 0.5)) for n in photo.size] for s in (size, side))
    images = np.zeros((1, 3, size, size), np.float32)
    images[0, :, :h, :w] = ((np.float32(photo.resize((w, h), Image.Resampling.BILINEAR)) - np.float32(spec["mean"])) / np.float32(spec["std"])).transpose(2, 0, 1)
    point = [float(c) * inside / n - 0.5 for c, inside, n in zip(click.split(","), (fw, fh), photo.size, strict=True)]  # SAM counts pixel centres from 0
    found = decoder({"image_embeddings": encoder({"images": images})["image_embeddings"], "point_coords": np.float32([[point]]),
                     "point_labels": np.ones((1, 1), np.float32), "mask_input": np.zeros((1, 1, side // 4, side // 4), np.float32), "has_mask": np.zeros(1, np.float32)})
    square = Image.fromarray(found["masks"][0, 0]).resize((side, side), Image.Resampling.BILINEAR).crop((0, 0, fw, fh))
    mask = np.asarray(square.resize(photo.size, Image.Resampling.BILINEAR)) > 0
    Image.fromarray(mask.astype(np.uint8) * 255).save(output)
    print(json.dumps({"mask": output, "iou": round(float(found["iou"][0, 0]), 4), "share": round(float(mask.mean()), 4)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
