"""Teachers by name: frozen promptable models with weights. `sam_nano` ships its own; the published models' weights are their authors'.

`load` takes a name of `names()`, a weight file in any known layout, a Hugging Face folder, a hub id (`facebook/sam-vit-base`) or a
file on the hub (`OWNER/NAME/FILE.pt`). It never runs code from a file.
"""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import checkpoint, plugins
from edgekd.errors import EdgekdError, UsageError, unknown

if TYPE_CHECKING:
    from edgekd.models.sam import Sam

WEIGHTS = Path(__file__).parent / "weights"


def names() -> list[str]:
    """Every teacher that can be named."""
    from edgekd import zoo

    return ["sam_nano", *zoo.names(), *plugins.entry_points("edgekd.teachers")]


def describe(name: str) -> dict[str, Any]:
    """What is known of a teacher without loading it: params, image size, where its weights are."""
    from edgekd import zoo

    if name in zoo.SPECS:
        spec = zoo.SPECS[name]
        return {"family": spec.family, "params_m": round(spec.params / 1e6, 1), "image_size": spec.preprocess.image_size,
                "weights": f"hub id {spec.hub}" if spec.family == "sam" else spec.source}
    if name == "sam_nano":
        from edgekd.teachers import sam_nano

        return {"family": "sam_nano", "params_m": 9.0, "image_size": sam_nano.IMAGE_SIZE, "weights": "shipped" if shipped(name) else "train it"}
    return {"family": "plug-in"}


def licence(name: str) -> str | None:
    """The licence of a teacher's weights, as far as it is known here."""
    from edgekd import zoo

    if name == "sam_nano":
        return "Apache-2.0; trained on procedural scenes and permissively licensed photos (see its model card)"
    return zoo.SPECS[name].licence if name in zoo.SPECS else None


def shipped(name: str) -> Path | None:
    """The weights that come with edgekd, if they do."""
    path = WEIGHTS / f"{name}{checkpoint.SUFFIX}"
    return path if path.is_file() else None


def build(name: str) -> Sam:
    """The untrained network of one of our own teachers or a published model.

    Raises:
        UsageError: no such teacher.
    """
    from edgekd import zoo

    if name in zoo.SPECS:
        return zoo.build(name)
    if name != "sam_nano":
        raise unknown("teacher", name, ["sam_nano", *zoo.names()])
    from edgekd.teachers import sam_nano

    return sam_nano.build()


def load(name: str, *, offline: bool = False) -> Sam:
    """A frozen teacher in eval mode.

    Raises:
        UsageError: nothing is known by that name, or its weights are not here; the hint names the file or hub id.
        EdgekdError: its weights are damaged.
    """
    from edgekd.teachers import huggingface

    found = _find(str(name), offline or huggingface.forbidden())
    return found.eval().requires_grad_(False)


def _find(name: str, offline: bool) -> Sam:
    from edgekd.teachers import huggingface

    path = Path(name).expanduser()
    if checkpoint.is_checkpoint(path):
        return checkpoint.load(path)
    if name in plugins.entry_points("edgekd.teachers"):
        return plugins.entry_points("edgekd.teachers")[name]()
    if is_weights(name):
        return from_files(name, offline=offline)
    if name in names():
        return _published(name, offline) if name != "sam_nano" else _nano()
    if not path.exists() and huggingface.is_hub(name):
        return huggingface.load(name, offline=offline)
    if path.exists():
        raise UsageError("this is no teacher", where=path, hint="a teacher is a name (edgekd list teachers), a weight file or a Hugging Face folder")
    raise unknown("teacher", name, names())


def is_weights(reference: str) -> bool:
    """Whether a reference is meant as weight files: `FILE`, `NAME=FILE`, `ENCODER_FILE+DECODER_FILE` or a Hugging Face folder."""
    from edgekd.zoo import files

    _, paths = _parts(reference)
    return all(files.is_weights(p) for p in paths)


def from_files(reference: str, *, offline: bool = False) -> Sam:
    """The model of weight files; `NAME=` before a file says what it must be, `+FILE` behind one where its decoder is.

    Raises:
        UsageError: a file cannot be read, does not fit, or is another model than said.
    """
    from edgekd.teachers import huggingface
    from edgekd.zoo import loading

    expect, paths = _parts(reference)
    if paths[0].is_dir() and huggingface.model_type(paths[0]) != "sam":
        return huggingface.load(str(paths[0]), offline=offline)
    return loading.load(paths[0], expect=expect, decoder=paths[1] if len(paths) > 1 else None)


def _parts(reference: str) -> tuple[str | None, list[Path]]:
    """The name said and the files of a reference."""
    if Path(reference).expanduser().exists():
        return None, [Path(reference).expanduser()]
    name, equals, rest = reference.partition("=")
    expect = name if equals and name.isidentifier() else None
    rest = rest if expect else reference
    pieces = rest.split("+") if not Path(rest).expanduser().exists() and rest.count("+") == 1 else [rest]
    return expect, [Path(p).expanduser() for p in pieces]


def _nano() -> Sam:
    weights = shipped("sam_nano")
    if weights is None:
        raise EdgekdError("the weights of 'sam_nano' are not here", where=WEIGHTS, hint="train them: edgekd train --recipe train_sam_nano")
    return checkpoint.load(weights)


def _published(name: str, offline: bool) -> Sam:
    """A published model by its name: from the hub, if its authors put it there, out of the local cache or (unless offline) the network."""
    from edgekd import zoo
    from edgekd.teachers import huggingface

    spec, reason = zoo.SPECS[name], "its authors publish them outside the hub"
    if spec.hub is not None:
        try:
            return huggingface.load(spec.hub, offline=offline)
        except EdgekdError as e:
            reason = e.what
    get = f"hf download {spec.hub}, or " if spec.hub and spec.hub.count("/") == 1 else ""
    raise UsageError(f"the weights of '{name}' are not here: {reason}",
                     hint=f"get them from {spec.source} ({get}the file itself) and give the file or folder in place of the name; "
                     f"`edgekd compress --teacher {name} ... --dry-run` plans without weights")
