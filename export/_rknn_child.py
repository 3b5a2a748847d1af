"""What runs in the environment of rknn-toolkit2: builds a file for a Rockchip NPU, and is its simulator. Needs nothing of edgekd.

The toolkit talks on stdout and tells failures by -1, None or an exception, the reason among its coloured log lines. Its simulator runs what was
built in the same process only, never a .rknn file: so what a file was built from is kept (`material`), and built again from that.
"""
from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAME = "model"
ROW = re.compile(r"^D RKNN: \[[\d:.]+\] \d+ +(?P<kind>\w+) +(?P<type>[A-Z]+\d+) +(?P<target>[A-Z]+) .* \d+/\d+/\d+ ")
COLOUR = re.compile(r"\x1b?\[[\d;]*m")


def convert(material: str, output: str, platform: str, dataset: str | None) -> dict[str, Any]:
    """Build `material`/model.onnx (opset 18 at most, fixed shapes) into the file `output`.

    Args:
        material: a folder; of a quantized model what the quantizer found is left in it.
        platform: `rk3588`.
        dataset: a text file, a line per sample: a .npy file per input, in their order. None: fp16.

    Returns:
        {"version": of the toolkit, "layers": [{"kind", "type", "target"}]}, as its compiler lists what it built.
    """
    folder = Path(material)
    os.chdir(folder)
    log = folder / "log.txt"
    if dataset is not None:
        with _logged(log), _toolkit(platform) as rknn:
            _did(rknn.load_onnx(model=f"{NAME}.onnx"), "load_onnx", log)
            _did(rknn.hybrid_quantization_step1(dataset=dataset), "quantization", log)
        (folder / f"{NAME}.onnx").unlink()
    with _logged(log), _toolkit(platform, verbose=True) as rknn:
        _build(rknn, folder, log)
        _did(rknn.export_rknn(output), "export_rknn", log)
    layers = [found.groupdict() for line in _lines(log) if (found := ROW.match(line))]
    log.unlink()
    from importlib import metadata

    return {"version": metadata.version("rknn-toolkit2"), "layers": layers}


def serve(material: str, platform: str) -> None:
    """Simulate: for each line {"inputs": npz, "outputs": npz} on stdin one line on stdout, {"ready"|"done": true} or {"error": reason}.

    Inputs are named arr_0, arr_1, ... in the order of the model's, and so are the outputs.
    """
    import numpy as np

    answers, folder = os.fdopen(os.dup(1), "w", encoding="utf-8"), Path(material)
    os.dup2(2, 1)  # whatever is printed from here on is log
    log = Path(os.environ["EDGEKD_RKNN_LOG"])

    def answer(**said: object) -> None:
        answers.write(json.dumps(said) + "\n")
        answers.flush()

    try:
        with _logged(log), _toolkit(platform) as rknn:
            os.chdir(folder)
            _build(rknn, folder, log)
            _did(rknn.init_runtime(), "init_runtime", log)
            answer(ready=True)
            for line in sys.stdin:
                asked = json.loads(line)
                with np.load(asked["inputs"]) as given:
                    # "nchw" is taken for single inputs only: what has four axes is handed over as nhwc, which is the default
                    feeds = [np.ascontiguousarray(a.transpose(0, 2, 3, 1)) if (a := given[f"arr_{i}"]).ndim == 4 else a for i in range(len(given.files))]
                found = rknn.inference(inputs=feeds)
                _did(0 if found is not None else -1, "inference", log)
                np.savez(asked["outputs"], *found)
                answer(done=True)
    except Exception as e:  # the toolkit raises anything
        answer(error=str(e)[:500])


def _build(rknn: Any, folder: Path, log: Path) -> None:
    if (folder / f"{NAME}.onnx").exists():
        _did(rknn.load_onnx(model=f"{NAME}.onnx"), "load_onnx", log)
        _did(rknn.build(do_quantization=False), "build", log)
    else:
        parts = {"model_input": f"{NAME}.model", "data_input": f"{NAME}.data", "model_quantization_cfg": f"{NAME}.quantization.cfg"}
        _did(rknn.hybrid_quantization_step2(**parts), "build", log)


@contextmanager
def _toolkit(platform: str, *, verbose: bool = False) -> Iterator[Any]:
    from rknn.api import RKNN

    rknn = RKNN(verbose=verbose)
    try:
        if rknn.config(target_platform=platform, quantized_dtype="w8a8") != 0:
            raise RuntimeError(f"the toolkit does not know the chip {platform}")
        yield rknn
    finally:
        rknn.release()


def _did(code: int, step: str, log: Path) -> None:
    """Raises RuntimeError with the toolkit's own reason."""
    if code != 0:
        raise RuntimeError(f"{step}: {_reason(log)}")


def _reason(log: Path) -> str:
    """The last line of the log that tells an error."""
    lines = _lines(log)
    errors = [line for line in lines if re.match(r"(E |\w*(Error|Exception)\b)", line) and "toolkit2 version" not in line and "Traceback" not in line]
    return (errors or lines or ["it said nothing"])[-1][:300]


def _lines(log: Path) -> list[str]:
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    return [line for raw in text.splitlines() if (line := COLOUR.sub("", raw).strip())]


@contextmanager
def _logged(log: Path) -> Iterator[None]:
    """Everything that is printed, by C++ too, goes to the file; an exception becomes the toolkit's own reason."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    except Exception as e:
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        raise RuntimeError(lines[-1][:300] if lines else _reason(log)) from e
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in enumerate(kept, 1):
            os.dup2(copy, number)
            os.close(copy)


if __name__ == "__main__":
    serve(*sys.argv[1:])
