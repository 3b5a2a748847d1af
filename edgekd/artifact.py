"""The artifact: a folder with the exported components and `manifest.json`, which says all that is needed to use them.

    artifacts/repvit_m0-256-onnx-fp32/
        encoder.onnx  decoder.onnx  manifest.json

The manifest is written last, so a folder without one is not an artifact; its hashes tell a damaged file by name.
"""
from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from edgekd.errors import EdgekdError
from edgekd.protocols import PROMPTABLE, Preprocess, State
from edgekd.workspace import sha256, write_json

SCHEMA: Final = "edgekd.artifact/1"
DecoderSignature = Literal["batched", "sam", "embedded"]
"""`batched`: P prompts of N points a call. `sam`: the six inputs of segment-anything's export script, one prompt a call. `embedded`: the same as
`batched`, with points that the caller has embedded, for NPUs."""
MANIFEST = "manifest.json"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class Tensor(_Model):
    """One input or output. A dynamic axis is a symbol (`P`), a fixed one a number."""

    name: str
    dtype: str
    shape: list[int | str]
    pad: float | None = None
    """What fills its rows up along an axis that the component's `fixed` gives a length, without changing the answer."""


class File(_Model):
    """A file of the artifact, by its path inside the folder."""

    path: str
    sha256: str
    size_bytes: int

    @field_validator("path")
    @classmethod
    def _inside(cls, path: str) -> str:
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise ValueError(f"{path!r} leaves the artifact's folder")
        return path


class ArtifactComponent(_Model):
    """An exported part. `scheme` is what was really applied, which `note` explains when it is not the artifact's scheme."""

    file: str
    files: list[str]
    inputs: list[Tensor]
    outputs: list[Tensor]
    scheme: str
    executed_precision: str
    executed_ops: dict[str, int]
    parity: dict[str, Any]
    note: str | None = None
    kept_fp32: dict[str, str] = {}
    """Layers of an fp16 component that stay in fp32 -> why."""
    tuning: dict[str, Any] = {}
    """How the scheme was done, where not by default (`edgekd.tuning.Tuning`); of trained ranges how many."""
    format: str | None = None
    """The format of this component where the artifact's own cannot take it."""
    fixed: dict[str, int] = {}
    """Symbol of an axis -> the one length that this file takes there. More rows of axis 0 are served in several calls; other axes are padded."""
    state: State = "ran"
    """Whether it `ran` where it was exported, was `built` by its vendor's compiler, or its contents were `checked`."""
    stand_in: str | None = None
    """What computed the file's contents for `parity`, where its runtime was not."""
    host: list[str] = []
    """Those of `files` that the caller computes inputs of this part from (`docs/decoder-signatures.md`)."""
    findings: dict[str, Any] = {}
    """What a compiler, simulator or reading of the file said, of one that did not run."""


class PreprocessSpec(_Model):
    """Photo -> input: long side to `image_size`, normalise (RGB in 0..255), pad right and bottom; or stretched to fill the square; or the middle
    square whose side is `crop` of the photo's short side, resized.

    Points, boxes and masks are in a square of `prompt_size`, which is `image_size` when it is null."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pad: Literal["right_bottom_zero", "stretch", "crop"] = "right_bottom_zero"
    prompt_size: int | None = None
    crop: float | None = None

    @classmethod
    def of(cls, spec: Preprocess) -> PreprocessSpec:
        """What the manifest says of a model's preprocessing."""
        return cls(image_size=spec.image_size, mean=spec.mean, std=spec.std, prompt_size=spec.prompt_size,
                   pad="right_bottom_zero" if spec.fit == "pad" else spec.fit, crop=spec.crop if spec.fit == "crop" else None)

    def to_preprocess(self) -> Preprocess:
        """The way back."""
        fit: Literal["pad", "stretch", "crop"] = "pad" if self.pad == "right_bottom_zero" else self.pad
        return Preprocess(self.image_size, self.mean, self.std, fit, self.prompt_size, Preprocess.crop if self.crop is None else self.crop)


class Manifest(_Model):
    """Everything about an artifact. Write it with `save`, read it with `load`, compare it with the files by `verify`."""

    schema_: Literal["edgekd.artifact/1"] = Field(default=SCHEMA, alias="schema")
    id: str
    student: str
    teacher: str | None = None
    task: str = PROMPTABLE
    labels: list[str] = []
    """Names of a classifier's classes in their order; none where they are not known."""
    image_size: int | None = None
    embed_dim: int | None = None
    """Both, and `preprocess`, of models that take photos."""
    format: str
    scheme: str
    decoder_signature: DecoderSignature = "batched"
    components: dict[str, ArtifactComponent]
    preprocess: PreprocessSpec | None = None
    files: list[File]
    versions: dict[str, str] = {}
    created: str
    source_sha256: str | None = None
    """SHA-256 of the weights it was exported from."""
    checked: str
    """What was verified before the artifact was handed over, and where."""

    @property
    def ran_here(self) -> bool:
        """Whether every component ran on its runtime when it was exported."""
        return all(part.state == "ran" for part in self.components.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together, without the manifest."""
        return sum(f.size_bytes for f in self.files)

    def save(self, folder: Path) -> Path:
        """Write `manifest.json` into `folder`, atomically."""
        return write_json(Path(folder) / MANIFEST, self.model_dump(mode="json", by_alias=True))

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest of an artifact folder (or a path to the manifest itself).

        Raises:
            EdgekdError: there is none, or it is not one.
        """
        path = manifest_path(folder)
        if not path.is_file():
            raise EdgekdError("this is not an artifact: it has no manifest.json", where=Path(folder),
                              hint="name a folder that `edgekd export` or `edgekd compress` wrote, e.g. runs/NAME/artifacts/ID")
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except (ValidationError, ValueError) as e:
            reason = e.errors()[0]["msg"] if isinstance(e, ValidationError) else e
            raise EdgekdError(f"the manifest cannot be read: {reason}", where=path, hint="export the model again") from e


def manifest_path(folder: Path) -> Path:
    """The manifest of an artifact folder; a path to the manifest itself is taken as it is."""
    folder = Path(folder)
    return folder if folder.name == MANIFEST else folder / MANIFEST


def is_artifact(path: Path) -> bool:
    """Whether `path` is an artifact folder or its manifest."""
    return manifest_path(path).is_file()


def describe_files(folder: Path, names: list[str]) -> list[File]:
    """Hash and size of files of `folder`, in the order given."""
    return [File(path=n, sha256=sha256(Path(folder) / n), size_bytes=(Path(folder) / n).stat().st_size) for n in names]


def verify(folder: Path) -> Manifest:
    """Compare every file with the manifest.

    Raises:
        EdgekdError: a file is missing, cut short or altered; it is named.
    """
    manifest = Manifest.load(folder)
    root = manifest_path(folder).parent
    for file in manifest.files:
        path = root / file.path
        if not path.is_file():
            raise EdgekdError(f"a file of the artifact is missing: {file.path}", where=root, hint="export the model again")
        if path.stat().st_size != file.size_bytes or sha256(path) != file.sha256:
            raise EdgekdError(f"a file of the artifact is damaged: {file.path} does not match its hash", where=root,
                              hint="export the model again, or copy the file anew")
    return manifest
