"""What every layer of a TensorRT engine takes, from trtexec; reviewed against recorded output, for no GPU is here. An engine's layers say which nodes of the
ONNX file they compute in their `Metadata`, or in their own name: `node_Conv_1 + PWN(node_gelu)`."""
from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekd.export._layers import Rows
from edgekd.export._trtexec import ON_JETSON, layers_of, profile_rows, read_json, time_command

from edgekd.errors import EdgekdError, UsageError

NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
MINUTES = 5
PRECISIONS = {"i8": "int8"}


def layers(path: Path, spec: Mapping[str, Any], engine: Path, lengths: Mapping[str, int]) -> Rows:
    """See `edgekd.protocols.Facts.layers`. trtexec draws the inputs; `lengths` are of the axes of any length.

    Raises:
        UsageError: there is no trtexec.
        EdgekdError: it fails, or writes what is not known.
    """
    tool = shutil.which("trtexec") or (ON_JETSON if Path(ON_JETSON).exists() else None)
    if tool is None:
        raise UsageError("trtexec, which times single layers, is not on this machine's PATH", where=path, hint="it comes with TensorRT's packages and with JetPack")
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        (Path(folder) / spec["engine"]).symlink_to(engine.resolve())
        command: Sequence[str] = time_command(spec, lengths=lengths, trtexec=tool, folder=folder, layers=True)
        done = subprocess.run(command, capture_output=True, text=True, timeout=MINUTES * 60, check=False)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise EdgekdError(f"trtexec fails: {said[-1] if said else f'exit code {done.returncode}'}", where=path)
        return rows(Path(folder) / f"{Path(spec['engine']).stem}.profile.json", engine.with_name("layers.json"))


def rows(profile: Path, info: Path) -> Rows:
    """Of what `--exportProfile` and `--exportLayerInfo` wrote; the latter with detailed verbosity.

    Raises:
        EdgekdError: they are no such files.
    """
    document = read_json(info, dict)
    about = {one.name: (one, row) for one, row in zip(layers_of(document, where=info), document["Layers"], strict=True)}
    found = []
    for name, ms in profile_rows(profile):
        layer, row = about.get(name, (None, {}))
        precision = None if layer is None or layer.precision == "?" else PRECISIONS.get(layer.precision, layer.precision)
        found.append({"name": name, "op": "?" if layer is None else layer.kind, "ms": ms, "precision": precision, "covers": NODE.findall(str(row.get("Metadata") or ""))})
    return found
