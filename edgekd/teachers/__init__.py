"""Teachers by name: frozen promptable models with weights. `sam_nano` ships its own; SAM's come from Hugging Face files.

`load` takes a name of `names()`, a folder that `save_pretrained` wrote, or a hub id; it never runs code from a file.
"""
from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import checkpoint, plugins
from edgekd.errors import EdgekdError, UsageError, unknown

if TYPE_CHECKING:
    from edgekd.models.sam import Sam

WEIGHTS = Path(__file__).parent / "weights"
HUB = {
    "sam_vit_b": ("facebook/sam-vit-base", 93.7), "sam_vit_l": ("facebook/sam-vit-large", 312.3), "sam_vit_h": ("facebook/sam-vit-huge", 641.1),
}
"""name -> hub id and parameters in millions (counted on Meta's classes)"""


def names() -> list[str]:
    """Every teacher that can be named."""
    return ["sam_nano", *HUB, *plugins.entry_points("edgekd.teachers")]


def describe(name: str) -> dict[str, Any]:
    """What is known of a teacher without loading it: params, image size, whether its weights are here."""
    if name in HUB:
        return {"family": "sam", "params_m": HUB[name][1], "image_size": 1024, "weights": f"hub id {HUB[name][0]}"}
    if name == "sam_nano":
        from edgekd.teachers import sam_nano

        return {"family": "sam_nano", "params_m": 9.0, "image_size": sam_nano.IMAGE_SIZE, "weights": "shipped" if shipped(name) else "train it"}
    return {"family": "plug-in"}


def licence(name: str) -> str | None:
    """The licence of a teacher's weights, as far as it is known here."""
    if name == "sam_nano":
        return "Apache-2.0; trained on procedural scenes and permissively licensed photos (see its model card)"
    return "Apache-2.0, as Meta publishes SAM" if name in HUB or name.startswith("sam-vit-") else None


def shipped(name: str) -> Path | None:
    """The weights that come with edgekd, if they do."""
    path = WEIGHTS / f"{name}{checkpoint.SUFFIX}"
    return path if path.is_file() else None


def build(name: str) -> Sam:
    """The untrained network of one of our own teachers.

    Raises:
        UsageError: no such teacher of ours.
    """
    if name != "sam_nano":
        raise unknown("teacher", name, ["sam_nano"])
    from edgekd.teachers import sam_nano

    return sam_nano.build()


def load(name: str, *, offline: bool = False) -> Sam:
    """A frozen teacher in eval mode.

    Raises:
        UsageError: nothing is known by that name, or its weights are not here; the hint names the file or hub id.
        EdgekdError: its weights are damaged.
    """
    found = _find(name, offline or os.environ.get("HF_HUB_OFFLINE") == "1")
    return found.eval().requires_grad_(False)


def _find(name: str, offline: bool) -> Sam:
    path = Path(name).expanduser()
    if checkpoint.is_checkpoint(path):
        return checkpoint.load(path)
    if name in plugins.entry_points("edgekd.teachers"):
        return plugins.entry_points("edgekd.teachers")[name]()
    if (path / "config.json").is_file() or (name not in names() and name.count("/") == 1 and not path.exists()):
        from edgekd.teachers import huggingface

        return huggingface.load(name, offline=offline)
    if name in HUB:
        return _from_hub(name, offline)
    if name not in names():
        raise unknown("teacher", name, names())
    weights = shipped(name)
    if weights is None:
        raise EdgekdError(f"the weights of '{name}' are not here", where=WEIGHTS, hint=f"train them: edgekd train --recipe train_{name}")
    return checkpoint.load(weights)


def _from_hub(name: str, offline: bool) -> Sam:
    """A SAM by its short name: its hub id, from the local cache or (unless offline) the network."""
    from edgekd.teachers import huggingface

    hub_id = HUB[name][0]
    try:
        return huggingface.load(hub_id, offline=offline)
    except EdgekdError as e:
        raise UsageError(
            f"the weights of teacher '{name}' are not here: {e.what}",
            hint=f"download {hub_id} (huggingface-cli download {hub_id}) or give its folder as --teacher FOLDER; "
            f"`edgekd compress --teacher {name} ... --dry-run` plans without weights",
        ) from e
