"""A model of ours from anybody's weight file: recognised, every name accounted for, filled without building it twice."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgekd import zoo
from edgekd.errors import UsageError, unknown
from edgekd.models.sam import Sam
from edgekd.models.sam_vit import resize_positions
from edgekd.zoo import files, layouts
from edgekd.zoo.files import WeightFile
from edgekd.zoo.layouts import Found, Match


@dataclass
class Opened:
    """A file, what it is, and how its names go with ours."""

    file: WeightFile
    found: Found
    match: Match

    def ours(self) -> dict[str, Tensor]:
        """The tensors under our names, as they are stored.

        Raises:
            UsageError: a name is missing, unknown or misshapen; it is said.
        """
        layouts.check(self.found, self.match, self.file.path)
        for copy, original in self.found.layout.copies.items():
            both = self.file.tensors.get(copy), self.file.tensors.get(original)
            if both[0] is not None and both[1] is not None and not torch.equal(both[0], both[1]):
                raise UsageError(f"{copy} and {original} differ, and are one tensor in a SAM", where=self.file.path, hint="the file is damaged")
        return {ours: self.file.tensors[name] for ours, name in self.match.sources.items()}


def open_file(path: Path | str) -> Opened:
    """Read a file or folder and tell what it is; nothing is refused for a name that does not fit yet.

    Raises:
        UsageError: it cannot be read, or is no model that is known.
    """
    return _recognised(files.read(path))


def adopt(tensors: Mapping[str, Tensor], name: str, *, config: dict[str, Any] | None = None) -> Sam:
    """Our model with weights that are in memory, in any known layout. Raises UsageError as `load` does."""
    opened = _recognised(WeightFile(Path(name), dict(tensors), config=config))
    model = _filled(opened.found.spec, opened.ours(), opened.found.layout.zeros)
    model.name = name
    return model


def _recognised(file: WeightFile) -> Opened:
    path = file.path
    kind = (file.config or {}).get("model_type", "sam")
    if kind != "sam":
        raise UsageError(f"this folder holds a model of type '{kind}'", where=path, hint="give it as a teacher: transformers' own class runs it")
    shapes = {k: tuple(v.shape) for k, v in file.tensors.items()}
    try:
        found = layouts.detect(shapes)
    except UsageError as e:
        raise UsageError(e.what, where=path, hint=e.hint) from None
    found = _told_by_config(found, file.config)
    return Opened(file, found, layouts.match(found, shapes))


def load(path: Path | str, *, expect: str | None = None, image_size: int | None = None, decoder: Path | str | None = None) -> Sam:
    """The model of a weight file, in float32 and eval mode.

    Args:
        path: a file of any known layout, or a Hugging Face folder.
        expect: the name or family that the user said it is.
        image_size: for SAM ViT: another size, to which its positions are interpolated.
        decoder: for a file that holds an encoder alone: where prompt encoder and mask decoder come from.

    Raises:
        UsageError: the file cannot be read, is another model than said, or a name in it is missing, unknown or misshapen.
    """
    opened = open_file(path)
    found = opened.found
    _expected(found, expect, path)
    ours = opened.ours()
    if found.encoder_only:
        ours |= _decoder(found, path, decoder)
    spec = found.spec
    if image_size is not None and image_size != spec.preprocess.image_size:
        resized = zoo.resized(spec, image_size)
        assert spec.vit is not None and resized.vit is not None
        ours |= {f"encoder.{k}": v for k, v in resize_positions(_of_encoder(ours), spec.vit, resized.vit).items()}
        spec = resized
    return _filled(spec, ours, found.layout.zeros)


def _filled(spec: zoo.Spec, ours: dict[str, Tensor], zeros: tuple[str, ...]) -> Sam:
    """The model with these tensors as its parameters. Built on the meta device, so that a ViT-H is in memory once."""
    model = zoo.assemble(spec, device="meta")
    own = model.state_dict()
    if any(name not in own for name, _ in model.named_buffers()):  # made by the constructor, not stored (TinyViT's index)
        model = zoo.assemble(spec)
    ours = {**ours, **{k: torch.zeros(own[k].shape) for k in zeros}}
    # Copies: a mapped file that is changed or cut short later must not reach into the model.
    state = {k: v.to(torch.float32, copy=True) if v.is_floating_point() else v.clone() for k, v in ours.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _of_encoder(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("encoder."): v for k, v in ours.items() if k.startswith("encoder.")}


def _decoder(found: Found, path: Path | str, decoder: Path | str | None) -> dict[str, Tensor]:
    """Prompt encoder and mask decoder from another file."""
    name = found.spec.decoder_of or "the SAM it was distilled from"
    if decoder is None:
        raise UsageError(f"this file holds the encoder of '{found.spec.name}' alone", where=path,
                         hint=f"say where prompt encoder and mask decoder are ({name}): {path}+DECODER_FILE")
    opened = open_file(decoder)
    if opened.found.encoder_only or opened.found.spec.shape != found.spec.shape:
        raise UsageError(f"there is no decoder for '{found.spec.name}' in this file", where=decoder, hint=f"give the weights of {name}")
    return {k: v for k, v in opened.ours().items() if not k.startswith("encoder.")}


def _expected(found: Found, expect: str | None, path: Path | str) -> None:
    """Raises UsageError when the file is not what the user said."""
    if expect is None:
        return
    wanted = zoo.ALIASES.get(expect, expect)
    if wanted not in zoo.SPECS and wanted not in zoo.families():
        raise unknown("published model", expect, [*zoo.SPECS, *zoo.ALIASES, *zoo.families()])
    if wanted not in (found.spec.name, found.spec.family):
        raise UsageError(f"this file is '{found.spec.name}' (layout {found.layout.name}), not '{expect}'", where=path,
                         hint="leave the name out: what a file is is told from its tensors")


def _told_by_config(found: Found, config: dict[str, Any] | None) -> Found:
    """With the number of attention heads that a Hugging Face folder says; shapes do not tell it."""
    heads = ((config or {}).get("mask_decoder_config") or {}).get("num_attention_heads")
    if not isinstance(heads, int) or heads == found.spec.shape.heads:
        return found
    return replace(found, spec=replace(found.spec, shape=replace(found.spec.shape, heads=heads)))
