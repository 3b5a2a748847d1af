"""Reading weight files that others wrote: torch pickles, safetensors and Hugging Face folders. No code from a file ever runs.

What people really have at hand is told apart before a reader chokes on it: an empty file, a web page saved as `.pth`, a git-lfs
pointer, a file cut short, a pickled module. Each is one `UsageError` that says what it is and what to do.
"""
from __future__ import annotations

import io
import json
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgekd.errors import UsageError, first_line

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
"""Where training scripts put the state dict (EfficientSAM, EdgeSAM and NanoSAM: `model`; EfficientViT: `state_dict`)."""
PREFIXES = ("module.", "_orig_mod.", "model.", "sam.")
"""What wrappers put before every name: DistributedDataParallel, torch.compile, Lightning."""
INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE = ("model.safetensors", "pytorch_model.bin")
# Torch's own ways to store tensors; any other name in a pickle is code.
HARMLESS_NAMES = re.compile(r"torch\._utils\._rebuild_\w+|torch\.\w*Storage|torch\.\w+|collections\.OrderedDict|yacs\.config\.CfgNode")
PICKLES = 5
"""so many stand one after the other in a file of torch before 1.6"""
# A yacs config is a dict with attributes; read as one it needs no yacs, and nothing of yacs runs (EdgeSAM's training checkpoints).
HARMLESS = [(OrderedDict, "yacs.config.CfgNode")]


@dataclass
class WeightFile:
    """The tensors of a file under the names they have there, wrapper and common prefix taken off."""

    path: Path
    tensors: dict[str, Tensor]
    wrapper: tuple[str, ...] = ()
    """keys that led to the state dict, outermost first"""
    prefix: str = ""
    """what stood before every name"""
    left: tuple[str, ...] = ()
    """what else was in the file: `optimizer`, `epoch`, ..."""
    metadata: dict[str, str] = field(default_factory=dict)
    """the header of a safetensors file"""
    config: dict[str, Any] | None = None
    """`config.json` of a Hugging Face folder"""
    files: tuple[Path, ...] = ()
    """the files that hold the tensors"""


def is_weights(path: Path) -> bool:
    """Whether a path is meant as weights, by its name alone: a file with one of `SUFFIXES`, or a folder with a `config.json`."""
    path = Path(path)
    return (path.is_file() and path.suffix in SUFFIXES) or (path.is_dir() and (path / "config.json").is_file())


def read(path: Path | str) -> WeightFile:
    """The tensors of a file or Hugging Face folder; large files are mapped, not read.

    Raises:
        UsageError: there is nothing, or it is no weight file, damaged, or holds code.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise UsageError("there is no such file", where=path, hint="give the path of a .pth, .pt, .bin or .safetensors file, or of a Hugging Face folder")
    kind = _sniff(path)
    found = _safetensors(path) if kind == "safetensors" else _unwrap(path, _torch(path))
    return _unprefixed(found)


def _sniff(path: Path) -> str:
    """`safetensors` or `torch`, from the first bytes and not the name. Raises UsageError for what is neither."""
    size = path.stat().st_size
    if size == 0:
        raise UsageError("the file is empty", where=path, hint="the download failed: fetch it again")
    with open(path, "rb") as f:
        head = f.read(512)
    start = head.lstrip()[:64].lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise UsageError("this is a web page saved under a weight file's name", where=path,
                         hint="download the file itself: the link's 'raw' or 'resolve' address, not the page that shows it")
    if head.startswith(b"version https://git-lfs"):
        raise UsageError("this is a git-lfs pointer, not the weights it points to", where=path, hint="run `git lfs pull` in that repository")
    if head.startswith(b"PK\x03\x04"):
        _check_zip(path)
        return "torch"
    if 2 <= int.from_bytes(head[:8], "little") <= 100_000_000 and head[8:9] == b"{":
        return "safetensors"
    if head[:1] == b"\x80":
        return "torch"
    raise UsageError("this is no weight file", where=path, hint="torch's .pth, .pt and .bin files, .safetensors files and Hugging Face folders can be read")


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as z:
            names = z.namelist()
    except zipfile.BadZipFile as e:
        raise _cut_short(path) from e
    if any(re.fullmatch(r"[^/]+/constants\.pkl", n) for n in names):
        raise UsageError("this is a TorchScript program, not a state dict", where=path, hint="give the state dict that it was made from")
    if not any(re.fullmatch(r"[^/]+/data\.pkl", n) for n in names):
        raise UsageError("this is an archive, but not one that torch wrote", where=path, hint="unpack it and give the weight file inside")


def _cut_short(path: Path) -> UsageError:
    return UsageError("the file is cut short or damaged", where=path, hint="fetch it again and compare its size or checksum with the publisher's")


def _torch(path: Path) -> Any:
    """What a torch file holds, read with `weights_only` and on the CPU wherever it was saved."""
    try:
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():  # type: ignore[arg-type]
            warnings.simplefilter("ignore")  # of a pickle protocol that torch does not write
            if zipfile.is_zipfile(path) and path.suffix != ".safetensors":
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            with open(path, "rb") as f:  # not by its name, which torch takes for the kind of file
                return torch.load(f, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, OSError, ValueError, LookupError, AttributeError, TypeError, AssertionError) as e:
        code = _code_in(path)
        if code is None:
            raise _cut_short(path) from e
        raise UsageError(
            f"pickled modules are refused: the file names {code}, and reading it would run code", where=path,
            hint="only where you trust the file and have its package: torch.save(torch.load(FILE, weights_only=False).state_dict(), NEW) keeps the "
            "tensors alone (for a training checkpoint: [\"model\"] instead of .state_dict())") from e


def _code_in(path: Path) -> str | None:
    """The first function or class in a file's pickles that is none of torch's own ways to store tensors. They are listed, not run."""
    strings: list[str] = []
    try:
        stream = io.BytesIO(_pickle_bytes(path))
        for _ in range(PICKLES):
            for op, arg, _at in pickletools.genops(stream):
                if op.name in ("GLOBAL", "STACK_GLOBAL"):
                    name = str(arg).replace(" ", ".") if op.name == "GLOBAL" else ".".join(strings[-2:])
                    if not HARMLESS_NAMES.fullmatch(name):
                        return name
                elif isinstance(arg, str):
                    strings.append(arg)
    except (ValueError, OSError, LookupError, StopIteration, zipfile.BadZipFile, NotImplementedError):
        pass  # no further whole pickle
    return None


def _pickle_bytes(path: Path) -> bytes:
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as z:
        return z.read(next(n for n in z.namelist() if n.endswith("/data.pkl")))


def _unwrap(path: Path, found: Any) -> WeightFile:
    """The state dict inside what a torch file holds."""
    wrapper: tuple[str, ...] = ()
    left: list[str] = []
    while isinstance(found, dict):
        inner = next((k for k in WRAPPERS if isinstance(found.get(k), dict)), None)
        if inner is None:
            break
        left += [str(k) for k in found if k != inner]
        wrapper, found = (*wrapper, inner), found[inner]
    if isinstance(found, dict):
        tensors = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
        left += [str(k) for k in found if not isinstance(found[k], Tensor)]
        if tensors:
            return WeightFile(path, tensors, wrapper, left=tuple(left), files=(path,))
    inside = f"a dict of {', '.join(map(str, list(found)[:5])) or 'nothing'}" if isinstance(found, dict) else f"a {type(found).__name__}"
    raise UsageError(f"the file holds no state dict but {inside}", where=path, hint="a state dict maps parameter names to tensors")


def _safetensors(path: Path) -> WeightFile:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as f:
            return WeightFile(path, {k: f.get_tensor(k) for k in f.keys()}, metadata=f.metadata() or {}, files=(path,))  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as e:
        raise _cut_short(path) from e


def _folder(path: Path) -> WeightFile:
    """A Hugging Face folder: `config.json` and the weights in one file or several with an index."""
    config = _json(path / "config.json") if (path / "config.json").is_file() else None
    tensors: dict[str, Tensor] = {}
    used: list[Path] = []
    index = next((path / n for n in INDEX if (path / n).is_file()), None)
    whole = next((path / n for n in WHOLE if (path / n).is_file()), None)
    if whole is not None:
        used = [whole]
    elif index is not None:
        used = [path / name for name in sorted(set(_json(index).get("weight_map", {}).values()))]
        absent = [p.name for p in used if not p.is_file()]
        if absent or not used:
            raise UsageError(f"the folder's index names files that are not there: {', '.join(absent) or 'none at all'}", where=path, hint="fetch the whole folder")
    else:
        raise UsageError("there are no weights in this folder", where=path, hint=f"a Hugging Face folder holds config.json and {WHOLE[0]}; else name the file itself")
    for part in used:
        tensors |= read(part).tensors
    found = WeightFile(path, tensors, config=config, files=tuple(used))
    return _unprefixed(found)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UsageError(f"the file cannot be read: {first_line(e)}", where=path, hint="fetch the folder again") from e
    if not isinstance(found, dict):
        raise UsageError("this is no JSON object", where=path, hint="fetch the folder again")
    return found


def _unprefixed(found: WeightFile) -> WeightFile:
    """Without a prefix that every name shares."""
    for prefix in (*PREFIXES, *PREFIXES):  # twice: `module.model.` and `model.module.`
        if found.tensors and all(k.startswith(prefix) for k in found.tensors):
            found.tensors = {k.removeprefix(prefix): v for k, v in found.tensors.items()}
            found.prefix += prefix
    return found
