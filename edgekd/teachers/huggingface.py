"""Teachers from Hugging Face: a folder or a hub id is brought here, its checksums are shown, and the reader for its kind takes over.

SAM runs on our own network with the weights renamed (`edgekd.zoo`); other kinds run on the library's classes (`edgekd.teachers.foreign`).
Only descriptions and safetensors are fetched, or the one file that is named: nothing that could hold code.
"""
from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import console
from edgekd.errors import EdgekdError, UsageError, first_line
from edgekd.workspace import sha256
from edgekd.zoo.files import SUFFIXES

if TYPE_CHECKING:
    from transformers import SamModel

    from edgekd.models.sam import Sam

HUB = re.compile(r"[\w][\w.-]*/[\w.-]+")
HUB_FILE = re.compile(rf"([\w][\w.-]*/[\w.-]+)/([\w./-]+(?:{'|'.join(re.escape(s) for s in SUFFIXES)}))")
WANTED = ["config.json", "preprocessor_config.json", "*.safetensors", "model.safetensors.index.json"]


def forbidden() -> bool:
    """Whether the user's environment forbids the network, as the library reads it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def is_hub(reference: str) -> bool:
    """Whether a reference looks like a hub id or a file on the hub."""
    return bool(HUB.fullmatch(reference) or HUB_FILE.fullmatch(reference))


def model_type(folder: Path) -> str:
    """What a Hugging Face folder says it holds.

    Raises:
        EdgekdError: its description cannot be read.
    """
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", "sam"))
    except (OSError, ValueError, AttributeError) as e:
        raise EdgekdError(f"the folder's description cannot be read: {first_line(e)}", where=folder / "config.json", hint="fetch the folder again") from e


def convert(model: SamModel, name: str) -> Sam:
    """Our Sam with the weights of a `transformers.SamModel` that is in memory.

    Raises:
        UsageError: its names or shapes are not SAM's.
    """
    from edgekd.zoo import loading

    return loading.adopt(model.state_dict(), name, config=model.config.to_dict())


def load(source: str, *, offline: bool = False) -> Any:
    """A teacher from a folder (`config.json`, `model.safetensors`), a hub id or a file on the hub.

    Raises:
        EdgekdError: nothing there, the network cannot be reached, or it is a kind of model that cannot be a teacher.
    """
    from edgekd import zoo
    from edgekd.zoo import loading

    path = locate(source, offline=offline)
    if path.is_file():
        return loading.load(path)
    kind = model_type(path)
    if kind == "sam":
        model = loading.load(path)
        if model.name not in zoo.SPECS:
            model.name = source.rstrip("/").split("/")[-1]
        return model
    from edgekd.teachers import foreign

    if kind not in foreign.MODEL_TYPES:
        raise UsageError(f"a model of type '{kind}' cannot be a teacher", where=source, hint=f"types that can: sam, {', '.join(sorted(foreign.MODEL_TYPES))}")
    return foreign.load(str(path), offline=offline, name=source.rstrip("/").split("/")[-1])


def locate(source: str, *, offline: bool = False) -> Path:
    """The folder or file of a source on this machine, brought from the hub where it is not here yet; what was brought is logged with its SHA-256.

    Raises:
        EdgekdError: it is neither here nor within reach.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    import huggingface_hub

    file = HUB_FILE.fullmatch(source)
    try:
        if file is not None:
            path = Path(huggingface_hub.hf_hub_download(file[1], file[2], local_files_only=offline))
        else:
            path = Path(huggingface_hub.snapshot_download(source, allow_patterns=WANTED, local_files_only=offline))
    except (OSError, ValueError) as e:  # the library's own errors are of these kinds
        raise EdgekdError(f"'{source}' is neither here nor a hub id that can be reached", where=first_line(e)[:200],
                          hint="a folder holds config.json and model.safetensors; hub ids look like facebook/sam-vit-base"
                          + ("; the network is switched off (offline)" if offline else "")) from e
    for part in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        console.log(f"{source}: {part.name}, {part.stat().st_size / 1e6:.1f} MB, sha256 {sha256(part)}")
    return path
