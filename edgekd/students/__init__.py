"""Students by name: an encoder of some family under SAM's prompt encoder and mask decoder.

A family is one file here with a module-level `family`, or an entry point of the group `edgekd.students` that names a `Family`.
A student is a configuration of a family, changed if wanted:

    repvit_s                          as shipped
    repvit_s:width=0.75,depth=0.5     widths and depths multiplied (0.25 to 4); act=gelu|gelu_tanh|hardswish|relu replaces the activation
    repvit_s-width0.75-depth0.5       the same, in the spelling that file names and candidate ids use
    timm/NAME, module:factory         any backbone with feature maps (`edgekd.students.backbones`)

Both spellings are accepted everywhere; models carry the second.
"""
from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edgekd import plugins
from edgekd.errors import UsageError, unknown
from edgekd.models.blocks import ACTIVATIONS
from edgekd.models.fold import fold
from edgekd.models.sam import DecoderShape, Sam
from edgekd.protocols import Preprocess

SIZES = (192, 224, 256, 320)
"""Image sizes worth searching on small devices; any multiple of 32 builds."""
LIMITS = (0.25, 4.0)
WEIGHTS = Path(__file__).parent / "weights"


class Config(Protocol):
    """The geometry of one student."""

    @property
    def act(self) -> str: ...

    def scaled(self, *, width: float = 1.0, depth: float = 1.0, act: str | None = None) -> Any:
        """The same shape with other widths, depths or activation."""
        ...


@dataclass(frozen=True)
class Family:
    """Students of one architecture. `encoder(config, embed_dim)` maps (B, 3, S, S) to (B, embed_dim, S/16, S/16); a config with an
    attribute `stride` (EfficientViT-L: 8) to S/stride, and its prompts are then in a square of 16 S / stride."""

    name: str
    paper: str
    configs: Mapping[str, Any]
    encoder: Callable[[Any, int], nn.Module]


@dataclass(frozen=True)
class StudentName:
    """A parsed name; `str()` is the canonical spelling, safe in file names and ids."""

    base: str
    width: float = 1.0
    depth: float = 1.0
    act: str | None = None

    def __str__(self) -> str:
        parts = [f"{key}{getattr(self, key):g}" for key in ("width", "depth") if getattr(self, key) != 1.0]
        return "-".join([self.base, *parts, *([f"act{self.act}"] if self.act else [])])


@cache
def families() -> dict[str, Family]:
    """name -> family, ours first; an entry point cannot replace one of ours."""
    modules = (importlib.import_module(f"{__name__}.{name}") for name in plugins.submodules(__name__))
    found: dict[str, Family] = {m.family.name: m.family for m in modules if hasattr(m, "family")}
    for family in plugins.entry_points("edgekd.students").values():
        found.setdefault(family.name, family)
    return found


def _owners() -> dict[str, Family]:
    """student -> its family."""
    return {name: family for family in reversed(families().values()) for name in family.configs}


def names() -> list[str]:
    """The students as shipped, family by family, small to large."""
    return [name for family in families().values() for name in family.configs]


def parse(name: str) -> StudentName:
    """A student's name in either spelling.

    Raises:
        UsageError: no such student or setting (with the nearest one), or a value out of range.
    """
    owners = _owners()
    base = base_of(name, owners)
    if base not in owners:
        from edgekd.students import backbones

        if (backbone := backbones.canonical(name)) is not None:
            return StudentName(backbone)
        raise unknown("student", base, owners)
    return with_settings(name, base, owners[base].configs[base].act)


def base_of(name: str, known: Container[str]) -> str:
    """The part of a name before its settings, in either spelling; a name that is known as it stands has none."""
    return name if name in known else name.partition(":" if ":" in name else "-")[0]


def with_settings(name: str, base: str, act: str) -> StudentName:
    """`base` with the settings that follow it in a name; its own activation `act` is left out.

    Raises:
        UsageError: no such setting, or a value out of range.
    """
    parsed, rest = StudentName(base), name[len(base):]
    for part in rest[1:].split("," if rest[:1] == ":" else "-") if rest else []:
        parsed = _apply(parsed, part.strip(), name, colon=rest[0] == ":")
    return replace(parsed, act=None) if parsed.act == act else parsed


def _apply(parsed: StudentName, part: str, name: str, *, colon: bool) -> StudentName:
    """`parsed` with one setting, `key=value` or `keyvalue`."""
    match = re.fullmatch(r"(\w+?)\s*=\s*(\S+)" if colon else r"(width|depth|act)(\S+)", part)
    if match is None:
        raise UsageError(f"'{part}' is no setting of a student", where=name, hint="write NAME:width=0.75,depth=0.5,act=relu")
    key, text = match.groups()
    if key == "act":
        if text not in ACTIVATIONS:
            raise unknown("activation", text, ACTIVATIONS)
        return replace(parsed, act=text)
    if key not in ("width", "depth"):
        raise unknown("student setting", key, ("width", "depth", "act"))
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not LIMITS[0] <= value <= LIMITS[1]:
        raise UsageError(f"{key} of a student is a number from {LIMITS[0]:g} to {LIMITS[1]:g}, not '{text}'", where=name)
    return replace(parsed, **{key: value})  # type: ignore[arg-type]


def _config(name: str) -> tuple[StudentName, Family, Any]:
    from edgekd.students import backbones

    parsed = parse(name)
    family = _owners().get(parsed.base) or backbones.family_of(parsed.base)
    return parsed, family, family.configs[parsed.base].scaled(width=parsed.width, depth=parsed.depth, act=parsed.act)


def encoder(name: str, embed_dim: int = 128) -> nn.Module:
    """The untrained encoder alone, (B, 3, S, S) -> (B, embed_dim, S/16, S/16) or at its own stride, drawn from torch's global generator."""
    _, family, config = _config(name)
    return family.encoder(config, embed_dim)


def decoder_shape(embed_dim: int) -> DecoderShape:
    """SAM's own decoder at 256; at other widths heads of 32 channels and an MLP four times as wide, which is `sam_nano`'s at 128."""
    return DecoderShape() if embed_dim == 256 else DecoderShape(embed_dim, heads=embed_dim // 32, mlp_dim=4 * embed_dim)


def build(name: str, *, image_size: int = 256, embed_dim: int = 128, seed: int = 0, shape: DecoderShape | None = None,
          preprocess: Preprocess | None = None) -> Sam:
    """An untrained student, the same for the same seed whatever ran before.

    Args:
        name: a student, see the module's docstring.
        image_size: S in pixels, a multiple of 32.
        embed_dim: E, a multiple of 32; ignored when `shape` is given.
        seed: of every weight.
        shape: sizes of the decoder; the teacher's when its decoder is to be copied.
        preprocess: the teacher's, so that both see the same pixels; its size is replaced by `image_size`. Without one: SAM's.

    Raises:
        UsageError: unknown name or a size that cannot be built.
    """
    shape = shape or decoder_shape(embed_dim)
    for what, value in (("image size", image_size), ("embedding width", shape.embed_dim)):
        if value < 32 or value % 32:
            raise UsageError(f"the {what} of a student is a multiple of 32, not {value}", where=name,
                             hint=f"nearest: {max(32, round(value / 32) * 32)}")
    parsed, _, config = _config(name)
    canonical, stride = str(parsed), getattr(config, "stride", 16)
    preprocess = replace(preprocess or Preprocess(image_size), image_size=image_size, prompt_size=None if stride == 16 else image_size * 16 // stride)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Sam(canonical, encoder(name, shape.embed_dim), shape, preprocess)


@cache
def _measure(name: str, embed_dim: int, image_size: int) -> tuple[int, int]:
    """(parameters, multiply-adds) of the folded encoder at batch 1, ours on torch's meta device: no weight is drawn, however large the model."""
    device = "meta" if parse(name).base in _owners() else "cpu"  # somebody else's code may need real tensors
    with torch.device(device), torch.random.fork_rng(devices=[]):
        model = encoder(name, embed_dim).eval()
    with torch.no_grad():
        model = fold(model)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, image_size, image_size, device=device))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def describe(name: str, *, embed_dim: int = 128, image_size: int = 256) -> dict[str, Any]:
    """Facts of a student for lists and reports; parameters and GMACs are those of the folded encoder, the form that ships.

    Raises:
        UsageError: unknown name.
    """
    parsed, family, config = _config(name)
    params, macs = _measure(str(parsed), embed_dim, image_size)
    return {
        "name": str(parsed), "family": family.name, "paper": family.paper, "activation": config.act, "params_encoder": params,
        "gmacs": round(macs / 1e9, 4), "embed_dim": embed_dim, "image_size": image_size, "sizes": list(SIZES),
        "weights": weights_path(str(parsed), image_size) is not None,
    }


def weights_path(name: str, image_size: int) -> Path | None:
    """The shipped starting checkpoint, or None: one trained at `image_size` if there is one, else the student's at any size
    (no parameter of these encoders depends on it)."""
    canonical = str(parse(name))
    for stem in (f"{canonical}-{image_size}", canonical):
        path = WEIGHTS / f"{stem}.safetensors"
        if path.is_file():
            return path
    return None
