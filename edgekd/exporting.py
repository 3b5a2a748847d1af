"""Student -> artifact: fold, check the fold, export every component, compare the files' own output, write the manifest.

The artifact appears under its name only when everything is checked: it is made in a folder beside and renamed. A component that a
scheme cannot take (nothing to quantize, or broken at 8 bits) stays in fp32 and the manifest says why; when that leaves no component
changed, the scheme is refused.
"""
from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from edgekd import plugins, schemes
from edgekd.artifact import ArtifactComponent, DecoderSignature, Manifest, PreprocessSpec, Tensor, describe_files
from edgekd.checkpoint import weights_sha256
from edgekd.errors import CannotTake, EdgekdError, UsageError, unknown
from edgekd.measurement import cpu, installed
from edgekd.models.fold import fold
from edgekd.models.rounding import grids_of, layers
from edgekd.parity import sound
from edgekd.probes import pictures
from edgekd.protocols import Component, Exporter, Reference, Session, facts
from edgekd.runtime import Refitted, as_array, fitted, open_artifact
from edgekd.tuning import PLAIN, Tuning
from edgekd.workspace import write_atomic

__all__ = ["candidate_id", "export_model", "folded", "open_artifact"]

FOLD_COSINE = 0.999999
Calibration = Mapping[str, Iterable[Mapping[str, np.ndarray]]]


def candidate_id(student: str, image_size: int | None, format: str, scheme: str) -> str:
    """The name of a (student, size, format, scheme) point, which is also its folder's. A model that takes no photos has no size."""
    return "-".join([student, *([] if image_size is None else [str(image_size)]), format, schemes.parse(scheme).slug])


def export_model(
    model: Any, folder: Path, *, format: str, scheme: str, name: str | None = None, teacher: str | None = None,
    calibration: Calibration | None = None, examples: Any = None, threads: int | None = None, qdq: str = "u8s8", gate: bool = True,
    decoder_signature: DecoderSignature = "batched", lengths: Mapping[str, int] | None = None,
) -> Manifest:
    """Export a model into `folder`, replacing what was there, and return its manifest.

    Args:
        model: the student as trained; it is not changed.
        scheme: a text of the grammar in `edgekd.schemes`.
        name: the artifact's id; by default `candidate_id(...)`.
        calibration: component name -> re-iterable of inputs, for static schemes. A component without an entry stays in fp32.
            fp16 is searched for overflows on the same inputs, or on the examples.
        examples: (n, 3, S, S) normalised images for the parity check; by default seeded pictures. A model without `preprocess` has `samples` of its
            own, and none are taken.
        threads: of the sessions that parity runs on.
        qdq: the activation style of the target, `u8s8` or `s8s8_symmetric`.
        lengths: symbol of an axis -> its length, for formats whose axes cannot vary (`Component.lengths` says what is taken otherwise).
        decoder_signature: of a promptable model: `batched` (many prompts in a call), `sam` (the six inputs of segment-anything's export, one
            prompt a call) or `embedded` (points are embedded by the caller).
        gate: False records parity without failing on it (untrained students, exported for their latency).

    Raises:
        UsageError: unknown format, scheme or decoder signature, or no calibration for a static scheme.
        EdgekdError: the toolchain is missing or cannot take the model, or the exported file is not the student any more.
    """
    precision = schemes.parse(scheme)
    exporter = _ready(format, precision)
    if decoder_signature not in get_args(DecoderSignature):
        raise unknown("decoder signature", decoder_signature, get_args(DecoderSignature))
    if precision.needs_calibration and not calibration:
        raise UsageError(f"{scheme} needs calibration images", hint="give a folder of images with --data")
    task, spec = plugins.task_of(model), model.preprocess
    size, images = spec and spec.image_size, _images(model, examples)
    student = folded(model, images if isinstance(images, list) else images[:1])
    reference = task.reference(student, images, decoder_signature)
    components = [_with_lengths(part, lengths or {}) for part in task.components(student, decoder_signature).values()]
    named = precision.parts({part.name: list(layers(part.module)) for part in components})
    schemes.refuse_parts(exporter, named)
    job = _Job(exporter, named, calibration or {}, threads, qdq, gate, reference, photos=task.photo_component)
    folder = Path(folder)
    with _staged(folder) as staging:
        parts = {part.name: job.export(part, staging) for part in components}
        _refuse_unchanged(parts, exporter, precision.scheme.name)
        files = list(dict.fromkeys(file for part in parts.values() for file in part.files))
        manifest = Manifest(
            id=name or candidate_id(model.name, size, format, scheme), student=model.name, teacher=teacher, task=task.name, image_size=size,
            labels=list(getattr(model, "labels", ())), embed_dim=model.embed_dim, format=format, scheme=precision.text, decoder_signature=decoder_signature,
            components=parts, files=describe_files(staging, files), preprocess=spec and PreprocessSpec.of(spec), versions=installed(),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"), source_sha256=weights_sha256(model),
            checked=_checked(parts, exporter, reference))
        manifest.save(staging)
    return manifest


def _images(model: Any, examples: Any) -> Any:
    """What a model is looked at with."""
    if model.preprocess is None:
        return model.samples
    return as_array(examples) if examples is not None and len(examples) else pictures(2, model.preprocess.image_size, np.random.default_rng(0))


def folded(model: Any, images: Any) -> Any:
    """The deploy form of a model in eval mode, after checking that it computes the same for `images` (B, 3, S, S), or a list of what its task takes.

    Raises:
        EdgekdError: the folded form differs (cosine below 0.999999).
    """
    training, deploy, task = model.training, fold(model).eval(), plugins.task_of(model)
    model.eval()
    try:
        batch = images if isinstance(images, list) else torch.from_numpy(as_array(images))
        with torch.no_grad():
            before, after = task.answers(model, batch), task.answers(deploy, batch)
    finally:
        model.train(training)
    for what, a in before.items():
        sound(model.name, what, as_array(a))
        cosine = float(torch.nn.functional.cosine_similarity(a.double().flatten(), after[what].double().flatten(), dim=0))
        if not cosine >= FOLD_COSINE:
            raise EdgekdError(f"folding changes the model: cosine of the {what} is {cosine:.7f}, below {FOLD_COSINE}", where=model.name,
                              hint="a block's fold() does not compute what its forward() does in eval mode")
    return deploy


@dataclass(frozen=True)
class _Job:
    """What is the same for every component of one export."""

    exporter: Exporter
    parts: Mapping[str, schemes.Part]
    calibration: Calibration
    threads: int | None
    qdq: str
    gate: bool
    reference: Reference
    photos: str
    """The component without which the format is of no use: no other format takes its place."""

    def export(self, part: Component, staging: Path) -> ArtifactComponent:
        """One component in the scheme asked for; in the format's first scheme with the reason when the scheme does not take it; in another
        format with the reason when this one never can."""
        try:
            return self._in_scheme(part, staging)
        except CannotTake as e:
            other = facts(self.exporter).beside
            if other is None or part.name == self.photos:
                raise
            beside = replace(self, exporter=_ready(other, schemes.parse("fp32")), parts={part.name: schemes.Part("fp32", PLAIN)})
            return beside._in_scheme(part, staging).model_copy(update={"format": other, "note": f"in {other}: {self.exporter.format} cannot take it, {e.what}"})

    def _in_scheme(self, part: Component, staging: Path) -> ArtifactComponent:
        plain, wanted = plainest(self.exporter), self.parts[part.name]
        scheme = schemes.get(wanted.scheme)
        if scheme.name in ("fp32", plain):
            return self._in(part, staging, wanted, None)
        if scheme.ranges == "trained" and not (grids := grids_of(part.module)):
            return self._in(part, staging, schemes.Part(plain, PLAIN), f"kept in {plain}: no ranges were trained for the {part.name}")
        if scheme.ranges == "trained":
            wanted = schemes.Part(scheme.name, replace(wanted.tuning, grids=grids))
        if scheme.ranges == "static" and part.name not in self.calibration:
            return self._in(part, staging, schemes.Part(plain, PLAIN), f"kept in {plain}: no calibration was given for the {part.name}")
        try:
            return self._in(part, staging, wanted, None)
        except (UsageError, CannotTake):
            raise
        except EdgekdError as e:
            if plain.endswith("_static"):
                raise
            return self._in(part, staging, schemes.Part(plain, PLAIN), f"kept in {plain}: {e.what}")

    def _in(self, part: Component, staging: Path, asked: schemes.Part, note: str | None) -> ArtifactComponent:
        scheme, tuning = asked.scheme, asked.tuning
        known, path = facts(self.exporter), staging / f"{part.name}{self.exporter.suffix}"
        taken = part.fixed() if known.fixed_shapes else part
        inputs, outputs = signature(part)
        fixed = dict(part.lengths) if known.fixed_shapes and part.dynamic else {}
        samples = self._samples(part, scheme)
        tuned: Any = {"tuning": tuning} if known.tunes else {}
        files = self.exporter.export(taken, path, scheme=scheme, qdq=self.qdq, **tuned,
                                     calibration=Refitted(samples, inputs, fixed) if samples is not None and fixed else samples)
        files += [write_atomic(staging / name, contents) for name, contents in part.host.items()]
        about: dict[str, Any] = {"file": path.name, "files": [f.relative_to(staging).as_posix() for f in files], "host": list(part.host), "inputs": inputs,
                                 "outputs": outputs, "scheme": scheme, "fixed": fixed, "tuning": _told(tuning)}
        if self.exporter.availability().runs:
            session = self.exporter.open(path, scheme=scheme, threads=self.threads)
            parity = self._compare(part, fitted(session, inputs, outputs, fixed), scheme)
            if not _executes(scheme, session.executed_precision):
                note = f"{note + '; ' if note else ''}asked for {scheme}, and the runtime executes {session.executed_precision}"
            return ArtifactComponent(**about, parity=parity, note=note, executed_precision=session.executed_precision,
                                     executed_ops=session.executed_ops, kept_fp32=getattr(session, "kept_fp32", {}))
        found = known.check(taken, path, scheme=scheme)
        session = known.stand_in(path, scheme=scheme, threads=self.threads)
        parity = self._compare(part, fitted(session, inputs, outputs, fixed), scheme) if session is not None else {}
        return ArtifactComponent(**about, parity=parity, note=note, executed_precision=found.precision, executed_ops=dict(found.ops), state=found.state,
                                 stand_in=session.stand_in_for if session is not None else None, findings={"how": found.how, **found.details},
                                 kept_fp32=getattr(session, "kept_fp32", {}))

    def _samples(self, part: Component, scheme: str) -> Iterable[Mapping[str, np.ndarray]] | None:
        """What a component is shown before it is exported: calibration inputs, as its signature takes them."""
        given = self.calibration.get(part.name)
        if given is None:
            return self.reference.samples(part) if scheme == "fp16" or scheme.endswith("_weight_only") else None
        return self.reference.adapt(part, given)

    def _compare(self, part: Component, session: Session, scheme: str) -> dict[str, Any]:
        parity, reason = self.reference.compare(part, session, scheme)
        if reason and (self.gate or not parity["finite"]):
            raise EdgekdError(f"the exported {part.name} is not the student any more in {scheme}: {reason}", where=self.exporter.format,
                              hint="try another format or scheme; the file was not kept")
        return parity | {"passed": reason is None}


def _executes(scheme: str, precision: str) -> bool:
    """Whether the precision that a runtime executes is what a scheme asks for."""
    known, found = schemes.get(scheme), precision.split("+")
    if known.ranges != "float":
        return any(p.startswith(("int", "fp8")) for p in found)
    return not known.is_float or scheme in found


def _told(tuning: Tuning) -> dict[str, Any]:
    """What the manifest says of it."""
    changed = tuning.changed()
    return {**{k: dict(v) if isinstance(v, Mapping) else v for k, v in changed.items()}, **({"grids": len(tuning.grids)} if tuning.grids else {})}


def plainest(exporter: Exporter) -> str:
    """The precision of what a scheme does not take: the format's first one when that is a float, else fp32 where there is one."""
    first = exporter.schemes[0]
    return "fp32" if first not in ("fp32", "fp16") and "fp32" in exporter.schemes else first


def _with_lengths(part: Component, lengths: Mapping[str, int]) -> Component:
    """The component with lengths that the user asked for in place of its own."""
    return replace(part, lengths={**part.lengths, **{s: n for s, n in lengths.items() if s in part.lengths}})


def _checked(parts: Mapping[str, ArtifactComponent], exporter: Exporter, reference: Reference) -> str:
    """What was verified and where, in words."""
    version, said = exporter.availability().version, []
    ran = [name for name, part in parts.items() if part.state == "ran"]
    if ran:
        where = f"ran here ({cpu()[0]}, {version})" if len(ran) == len(parts) else f"{', '.join(ran)} ran here ({cpu()[0]})"
        said.append(f"{where}: {reference.checked()}")
    for name, part in parts.items():
        if part.state != "ran":
            compared = f"; {reference.checked()}, computed by {part.stand_in}" if part.stand_in else ""
            said.append(f"{name} {part.state}, not run ({version}): {part.findings['how']}{compared}")
    return "; ".join(said)


def signature(part: Component) -> tuple[list[Tensor], list[Tensor]]:
    """Names, types and shapes of a component's inputs and outputs. An output axis that follows a symbol is found by trying it."""
    def shapes(example: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        with torch.no_grad():
            out = part.module(*example.values())
        return list(out) if isinstance(out, tuple) else [out]

    base = shapes(part.example)
    outputs: list[list[int | str]] = [list(t.shape) for t in base]
    for symbol in dict.fromkeys(s for axes in part.dynamic.values() for s in axes.values()):
        longer = {name: _longer(t, [a for a, s in part.dynamic.get(name, {}).items() if s == symbol]) for name, t in part.example.items()}
        for described, before, after in zip(outputs, base, shapes(longer), strict=True):
            for axis, (a, b) in enumerate(zip(before.shape, after.shape, strict=True)):
                if a != b:
                    described[axis] = symbol
    if part.name == "decoder" and "orig_im_size" in part.example:
        outputs[0][2:] = ["height", "width"]  # these follow a value, not a length
    inputs = [Tensor(name=name, dtype=str(t.dtype).removeprefix("torch."), pad=part.padding.get(name),
                     shape=[part.dynamic.get(name, {}).get(axis, n) for axis, n in enumerate(t.shape)]) for name, t in part.example.items()]
    return inputs, [Tensor(name=name, dtype=str(t.dtype).removeprefix("torch."), shape=shape)
                    for name, t, shape in zip(part.outputs, base, outputs, strict=True)]


def _longer(tensor: torch.Tensor, axes: list[int]) -> torch.Tensor:
    for axis in axes:
        tensor = torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis)
    return tensor


def _ready(format: str, precision: schemes.Precision) -> Exporter:
    """The exporter of a format, if its toolchain works here and it takes the precision."""
    exporter = plugins.exporter(format)
    schemes.refuse(exporter, precision)
    available = exporter.availability()
    if not available.ok:
        raise EdgekdError(f"the format '{format}' cannot be exported here: {available.reason}", hint=available.fix)
    return exporter


def _refuse_unchanged(parts: Mapping[str, ArtifactComponent], exporter: Exporter, scheme: str) -> None:
    plain = plainest(exporter)
    if scheme not in ("fp32", plain) and all(p.scheme in ("fp32", plain) for p in parts.values()):
        reasons = "; ".join(f"{name} {p.note}" for name, p in parts.items())
        raise EdgekdError(f"{scheme} changes no component of this model: {reasons}", where=exporter.format, hint=f"use another scheme, or {plain}")


@contextlib.contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well, and vanishes otherwise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for stale in folder.parent.glob(f".{folder.name}.*.part"):  # of a process that was killed; a run folder has one writer
        shutil.rmtree(stale, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        yield staging
        os.chmod(staging, 0o755)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
            os.replace(folder, old / "old")
            os.replace(staging, folder)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
