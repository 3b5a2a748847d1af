"""What a model is: one of a known name, without its weights, or a file of anybody's, held against the network it is for."""
from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import artifact, checkpoint, tasks, zoo
from edgekd.errors import EdgekdError, UsageError, unknown
from edgekd.protocols import PROMPTABLE
from edgekd.workspace import sha256
from edgekd.zoo import files, loading

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from edgekd.models.sam import Sam
    from edgekd.protocols import Task


def inspect(reference: str | Path, *, strict: bool = False) -> dict[str, Any]:
    """Family, variant, layout, sizes, preprocessing and what is wrong.

    Args:
        reference: the name of a teacher, student or published model, a weight file, a Hugging Face folder or an artifact.
        strict: refuse a file with any problem.

    Raises:
        UsageError: the name is unknown, the file cannot be read, or (`strict`) has a problem; the name of the tensor is said.
    """
    path = Path(reference).expanduser()
    if artifact.is_artifact(path):
        return _artifact(artifact.manifest_path(path).parent)
    if path.exists():
        found = _ours(path) if checkpoint.is_checkpoint(path) else _file(path)
        if strict and found["problems"]:
            raise UsageError(f"{len(found['problems'])} problem(s): {'; '.join(found['problems'][:4])}", where=path,
                             hint="the file is damaged, or of a changed model; without --strict all are listed")
        return found
    if path.suffix in files.SUFFIXES or str(reference).startswith((".", "/", "~")):
        raise UsageError("there is no such file", where=path, hint="name a weight file, or a model of `edgekd list models`")
    return _name(str(reference))


def _name(name: str) -> dict[str, Any]:
    """A model that is known by its name, in the form its weights are stored in."""
    import torch

    from edgekd import students, teachers

    if name in zoo.SPECS or name in zoo.ALIASES:
        return _published(zoo.spec(name))
    if name in teachers.names():
        with torch.device("meta"):
            model = teachers.build(name).eval()
        return {"name": name, **_facts(model), **{k: v for k, v in teachers.describe(name).items() if k in ("family", "weights")},
                "licence": teachers.licence(name), "problems": []}
    if (task := tasks.knowing(name)) is not None:
        return _of_task(task, name)
    try:
        parsed = students.parse(name)
    except UsageError as e:
        if e.what.startswith("unknown student"):
            raise unknown("model", name, {*teachers.names(), *students.names()}) from None
        raise
    with torch.device("meta"):
        model = students.build(str(parsed)).eval()
    about = students.describe(str(parsed))
    return {"name": str(parsed), "family": about["family"], **_facts(model), "paper": about["paper"], "problems": []}


def _of_task(task: Task, reference: str) -> dict[str, Any]:
    """A teacher of a task that has its models from elsewhere; it is loaded."""
    model = task.teacher(reference)
    return {"name": model.name, "family": task.name, **_parts(model), "problems": []}


def _published(spec: zoo.Spec) -> dict[str, Any]:
    return {"name": spec.name, "family": spec.family, "variant": spec.variant, **_facts(zoo.assemble(spec, device="meta")), "licence": spec.licence,
            "paper": spec.paper, "source": spec.source, "problems": []}


def _file(path: Path) -> dict[str, Any]:
    """Somebody else's file or folder."""
    config = _foreign(path)
    if config is not None:
        return config
    opened = loading.open_file(path)
    found, tensors = opened.found, opened.file.tensors
    about = _published(found.spec)
    if found.encoder_only:
        about["decoder"] = None
    return {"name": found.spec.name, "family": found.spec.family, "variant": found.spec.variant, "layout": found.layout.name,
            "file": _file_facts(path, opened.file.files), "wrapper": list(opened.file.wrapper), "prefix": opened.file.prefix,
            **{k: v for k, v in about.items() if k not in ("name", "family", "variant", "problems")},
            "tensors": len(tensors), "dtype": _dtypes(tensors), "dropped": [*opened.match.dropped, *opened.file.left], "note": found.layout.note,
            "problems": [*opened.match.problems, *_not_finite(opened.match.sources, tensors)]}


def _foreign(path: Path) -> dict[str, Any] | None:
    """A Hugging Face folder that another class than ours runs; its weights are not opened."""
    from edgekd.teachers import huggingface

    if not (path.is_dir() and (path / "config.json").is_file()):
        return None
    kind = huggingface.model_type(path)
    if kind == "sam":
        return None
    from edgekd.teachers import foreign

    task = tasks.knowing(str(path))
    known = kind in foreign.MODEL_TYPES or (task is not None and task.name != PROMPTABLE)
    parts = sorted(p for p in path.iterdir() if p.suffix in files.SUFFIXES)
    return {"name": path.name, "family": kind, "variant": None, "layout": "transformers", "file": _file_facts(path, parts),
            "problems": [] if known else [f"a model of type '{kind}' cannot be a teacher; types that can: sam, {', '.join(sorted(foreign.MODEL_TYPES))}"]}


def _ours(path: Path) -> dict[str, Any]:
    """A checkpoint of ours. One that is damaged is refused, as everywhere."""
    try:
        meta, tensors = checkpoint.read_meta(path), checkpoint.load_tensors(path)
        model = checkpoint.assemble(meta, tensors, path)
    except UsageError:
        raise
    except EdgekdError as e:
        raise UsageError(e.what, where=e.where, hint=e.hint) from e
    spec = zoo.SPECS.get(meta.name)
    return {"name": meta.name, "family": spec.family if spec else meta.kind, "variant": spec.variant if spec else None, "layout": "edgekd",
            "file": _file_facts(path, [path]), **(_facts(model) if meta.task == PROMPTABLE else _parts(model)), "task": meta.task,
            "form": meta.form, "quantized": meta.quantized and {"weight_bits": meta.quantized.weight_bits, "layers": len(meta.quantized.grids)}, "tensors": len(tensors), "dtype": _dtypes(tensors), "teacher": meta.teacher,
            "history": meta.history, "licence": spec.licence if spec else None, "problems": []}


def _artifact(folder: Path) -> dict[str, Any]:
    """An exported artifact, from its manifest."""
    manifest = artifact.Manifest.load(folder)
    return {"name": manifest.id, "family": "artifact", "variant": manifest.student, "layout": manifest.format, "scheme": manifest.scheme,
            "file": {"path": str(folder), "size_bytes": manifest.size_bytes, "sha256": None}, "preprocess": manifest.preprocess.model_dump() if manifest.preprocess else None,
            "components": {n: {"file": c.file, "scheme": c.scheme, "executed_precision": c.executed_precision} for n, c in manifest.components.items()},
            "teacher": manifest.teacher, "problems": []}


def _parts(model: Any) -> dict[str, Any]:
    """Parameters of each part, GMACs of the whole at batch 1, and preprocessing, for models whose only input are photos."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    side = model.preprocess.image_size
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        found = model.outputs(torch.zeros(1, 3, side, side))
    parts = getattr(model, "parts", {"encoder": model})
    return {**{name: {"params": sum(p.numel() for p in part.parameters())} for name, part in parts.items()}, "gmacs": round(counted.get_total_flops() / 2e9, 3),
            "outputs": {name: list(x.shape[1:]) for name, x in found.items()}, "preprocess": asdict(model.preprocess), "tensors": len(model.state_dict())}


def _facts(model: Sam) -> dict[str, Any]:
    """Parameters as stored, GMACs at batch 1, and preprocessing; a model on the meta device costs nothing to count."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    encoder = list(model.encoder.state_dict())
    whole = model.to("meta")  # nothing is computed: shapes are enough to count by
    p, side = model.preprocess, model.preprocess.image_size
    with torch.device("meta"), torch.no_grad():
        with FlopCounterMode(display=False) as first:
            embedding = whole.embed(torch.zeros(1, 3, side, side))
        with FlopCounterMode(display=False) as second:
            whole.decode(embedding, torch.zeros(1, 1, 2), torch.ones(1, 1))
    own = whole.state_dict()
    decoder = [k for k in own if k.startswith(("prompt_encoder.", "mask_decoder."))]
    parameters = dict(whole.named_parameters())
    return {
        "encoder": {"params": sum(v.numel() for k, v in parameters.items() if k.startswith("encoder.")), "gmacs": round(first.get_total_flops() / 2e9, 3),
                    "image_size": side, "tensors": len(encoder), "embedding": list(embedding.shape[1:])},
        "decoder": {"params": sum(v.numel() for k, v in parameters.items() if k in set(decoder)), "gmacs": round(second.get_total_flops() / 2e9, 3),
                    "tensors": len(decoder)},
        "proposer": model.proposer is not None,
        "preprocess": {**asdict(p), "prompt_size": p.side},
        "tensors": len(own),
    }


def _file_facts(path: Path, parts: Sequence[Path]) -> dict[str, Any]:
    """Size and checksum; of each part where there are several."""
    sums = {p.name: sha256(p) for p in parts}
    facts: dict[str, Any] = {"path": str(path), "size_bytes": sum(p.stat().st_size for p in parts), "sha256": next(iter(sums.values())) if len(sums) == 1 else None}
    return facts if len(sums) <= 1 else {**facts, "parts": sums}


def _dtypes(tensors: Mapping[str, Tensor]) -> str:
    """`float32`, or all that occur, the commonest first."""
    from collections import Counter

    return ", ".join(str(d).removeprefix("torch.") for d, _ in Counter(t.dtype for t in tensors.values()).most_common())


def _not_finite(sources: Mapping[str, str], tensors: Mapping[str, Tensor]) -> list[str]:
    """Tensors with NaN or infinity: no prompt gets an answer from those."""
    return [f"{name} holds NaN or infinity" for name in sources.values() if tensors[name].is_floating_point() and not bool(tensors[name].isfinite().all())]
