"""The child's side of `export/qnn.py`: onnxruntime with Qualcomm's provider, which prints to stdout, starts threads and keeps what it registers."""
from __future__ import annotations

import io
import json
import os
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

PROVIDER = "QNNExecutionProvider"
PLAIN = {0x508: "bool", 0x08: "i8", 0x16: "i16", 0x32: "i32", 0x64: "i64", 0x108: "u8", 0x116: "u16", 0x132: "u32", 0x164: "u64",
         0x216: "f16", 0x232: "f16", 0x308: "i8", 0x316: "i16", 0x332: "i32", 0x408: "u8", 0x416: "u16", 0x432: "u32"}
"""Qualcomm's types of tensors -> ours. The HTP computes what is float32 in its graph in fp16: `enable_htp_fp16_precision` is on by default, and the
simulator gives the same numbers when it is off."""


def build(graph: str, context: str, htp_arch: int, soc_model: int) -> dict[str, Any]:
    """Compile an ONNX file for the HTP ahead of time: write `context`, an ONNX file around the binaries that are written beside it.

    Returns:
        {"htp": nodes that the HTP took, "cpu": [[operator, name], ...] that it left, "partitions": of the HTP, "ops": {"Conv2d:u8": 7, ...} of the
        HTP's own graphs by the type of their output}. Nothing is written when the HTP took no node.
    """
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        entries = {"session.record_ep_graph_assignment_info": "1", "ep.context_enable": "1", "ep.context_file_path": context, "ep.context_embed_mode": "0"}
        session = _session(graph, entries, {"htp_arch": str(htp_arch), "soc_model": str(soc_model), "dump_json_qnn_graph": "1", "json_qnn_graph_dir": folder})
        given = session.get_provider_graph_assignment_info()
        ops: Counter[str] = Counter()
        for file in sorted(Path(folder).glob("*.json")):
            ops.update(_operators(json.loads(file.read_text(encoding="utf-8")).get("graph", {})))
    taken = [part for part in given if part.ep_name == PROVIDER]
    left = [[node.op_type, node.name] for part in given if part.ep_name != PROVIDER for node in part.get_nodes()]
    return {"htp": sum(len(part.get_nodes()) for part in taken), "cpu": left, "partitions": len(taken), "ops": dict(ops.most_common())}


def _operators(graph: dict[str, Any]) -> list[str]:
    tensors = graph.get("tensors", {})
    found = []
    for node in graph.get("nodes", {}).values():
        kind = tensors.get(node["output_names"][0], {}).get("data_type", 0)
        found.append(f"{node['type']}:{PLAIN.get(kind, hex(kind))}")
    return found


def load(context: str) -> dict[str, Any]:
    """Open a context binary, which is read whole and unpacked; its inputs as {name: [shape, type]}."""
    session = _session(context, {}, {})
    return {"inputs": {i.name: [list(i.shape), i.type] for i in session.get_inputs()}}


def serve(context: str) -> None:
    """Answer questions on stdin until it ends: arrays in, arrays out, each message its length (8 bytes) and an npz."""
    asked, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever the libraries print is no answer
    session = _session(context, {}, {})
    names = [o.name for o in session.get_outputs()]
    while (inputs := receive(asked)) is not None:
        send(answers, dict(zip(names, session.run(names, inputs), strict=True)))


def send(stream: BinaryIO, arrays: dict[str, Any]) -> None:
    """Write one message."""
    import numpy as np

    packed = io.BytesIO()
    np.savez(packed, **arrays)
    stream.write(struct.pack("<Q", packed.tell()) + packed.getvalue())
    stream.flush()


def receive(stream: BinaryIO) -> dict[str, Any] | None:
    """Read one message; None when the other side has gone."""
    import numpy as np

    head = stream.read(8)
    if len(head) < 8:
        return None
    with np.load(io.BytesIO(stream.read(struct.unpack("<Q", head)[0]))) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _session(path: str, entries: dict[str, str], settings: dict[str, str]) -> Any:
    """A file on the HTP; on a machine without one, on its simulator. A provider asked for by name would leave everything to the CPU."""
    import onnxruntime as ort
    import onnxruntime_qnn

    ort.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    devices = [d for d in ort.get_ep_devices() if d.ep_name == PROVIDER]
    if not devices:
        raise RuntimeError("onnxruntime finds no device of the QNN provider")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    options.add_provider_for_devices(devices[:1], {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), **settings})
    return ort.InferenceSession(path, options)
