"""`edgekd export`: one model in several formats. A format that fails is a row with its reason, and the others go on."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import comparing, console, exporting, plugins, resolve, schemes
from edgekd.data import open_data
from edgekd.errors import EdgekdError, UsageError, unknown
from edgekd.own import data as own_data
from edgekd.own import models

if TYPE_CHECKING:
    from edgekd.artifact import DecoderSignature, Manifest
    from edgekd.protocols import Dataset

PHOTOS = 32
"""Photos, at most, that a static precision is shown."""


@dataclass(frozen=True)
class Request:
    """What `edgekd.api.export` is asked for. `qdq` is how a format's int8 is written for the device."""

    model: str
    formats: Sequence[str]
    output: Path
    scheme: str | None
    data: str | Path | None
    qdq: Callable[[str], str]
    threads: int | None
    decoder_signature: DecoderSignature
    lengths: Mapping[str, int]
    inputs: Sequence[str]
    mean: Sequence[float] | None
    std: Sequence[float] | None


@dataclass(frozen=True)
class _Shown:
    """The torch model, what static precisions are shown, and examples for its parity."""

    model: Any
    calibration: dict[str, Any] | None
    examples: Any = None


def export(asked: Request) -> dict[str, Any]:
    """`{"exports": [row, ...]}`, one row a format.

    Raises:
        UsageError: unknown names, or a model or data that cannot be used; of one format alone also what it refuses.
    """
    offered = {format: plugins.exporter(format).schemes for format in asked.formats}
    if asked.scheme is not None and not any(asked.scheme in known for known in offered.values()):
        raise unknown(f"{asked.formats[0]} scheme" if len(offered) == 1 else "scheme", asked.scheme, {s for known in offered.values() for s in known})
    wanted = {format: asked.scheme or known[0] for format, known in offered.items()}
    shown = _own(asked) if asked.inputs else _known(asked, wanted.values())
    size = shown.model.preprocess and shown.model.preprocess.image_size
    rows: list[dict[str, Any]] = []
    for format, scheme in wanted.items():
        name = exporting.candidate_id(shown.model.name, size, format, scheme)
        console.log(f"export {name}")
        try:
            manifest = exporting.export_model(shown.model, asked.output / name, format=format, scheme=scheme, teacher=resolve.teacher_of(asked.model),
                                              calibration=shown.calibration, examples=shown.examples, threads=asked.threads, qdq=asked.qdq(format),
                                              decoder_signature=asked.decoder_signature, lengths=asked.lengths)
        except (EdgekdError, OSError) as e:
            if len(offered) == 1 and isinstance(e, UsageError):
                raise
            rows.append({"format": format, "scheme": scheme, "status": "failed", "reason": e.what if isinstance(e, EdgekdError) else str(e),
                         "hint": getattr(e, "hint", None)})
            continue
        rows.append(_row(manifest, asked.output / name))
    return {"exports": rows}


def _own(asked: Request) -> _Shown:
    """A model of the user's own; its parity has inputs of its own."""
    model, calls = models.load(asked.model, asked.inputs, lengths=asked.lengths, shown=asked.data, photos=own_data.Photos.of(asked.mean, asked.std, None))
    return _Shown(model, {"model": calls.spread(own_data.CALIBRATION)} if calls is not None else None)


def _known(asked: Request, wanted: Iterable[str]) -> _Shown:
    """One of edgekd's models."""
    if asked.mean or asked.std:
        raise UsageError("--mean and --std of `export` are for a model of your own", where=asked.model, hint="leave them out, or name its inputs with --input")
    source = resolve.load_torch(asked.model)
    models.refuse_strangers(source, asked.model)
    photos = _calibration_data(wanted, asked.data, several=len(asked.formats) > 1)
    return _Shown(source, comparing.calibrate(source, photos, limit=PHOTOS) if photos is not None else None, comparing.examples(source, photos))


def _calibration_data(asked: Iterable[str], data: str | Path | None, *, several: bool) -> Dataset | None:
    """The photos that the precisions asked for are shown, where any of them looks at some."""
    known = [schemes.get(name) for name in asked]
    missing = [scheme.name for scheme in known if scheme.needs_calibration]
    if data is None and missing and not several:
        raise UsageError(f"{missing[0]} needs calibration images", hint="give a folder of images with --data")
    return open_data(data, masks=False) if data is not None and any(scheme.looks_at_inputs for scheme in known) else None


def _row(manifest: Manifest, folder: Path) -> dict[str, Any]:
    """The row of a format that was written."""
    last = manifest.components.get("decoder") or list(manifest.components.values())[-1]
    return {"format": manifest.format, "scheme": manifest.scheme, "status": "ok", "id": manifest.id, "path": str(folder), "ran_here": manifest.ran_here,
            "checked": manifest.checked, "decoder_signature": manifest.decoder_signature, "size_bytes": manifest.size_bytes, "parity": last.parity,
            "components": {n: {"format": c.format or manifest.format, "scheme": c.scheme, "state": c.state, "executed_precision": c.executed_precision,
                               "parity": c.parity, "stand_in": c.stand_in, "findings": c.findings, "note": c.note}
                           for n, c in manifest.components.items()}}
