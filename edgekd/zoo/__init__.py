"""The published models of the SAM family by their official names, and all that their files do not say.

A checkpoint holds weights. What input size they were trained at, whether photos are padded or stretched, in which square the
prompts are given: those facts are a `Spec` here. Reading files is in `edgekd.zoo.files`, telling what they are in
`edgekd.zoo.layouts`, filling a model in `edgekd.zoo.loading`.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from edgekd import students
from edgekd.errors import unknown
from edgekd.models.sam import DecoderShape, Sam
from edgekd.models.sam_vit import CONFIGS as VIT
from edgekd.models.sam_vit import SamVit
from edgekd.protocols import Preprocess


@dataclass(frozen=True)
class Spec:
    """One published model. `encoder()` builds its untrained encoder; `source` says where the authors publish the weights."""

    name: str
    family: str
    variant: str
    encoder: Callable[[], nn.Module]
    paper: str
    licence: str
    source: str
    preprocess: Preprocess = field(default_factory=lambda: Preprocess(1024))
    shape: DecoderShape = field(default_factory=DecoderShape)


def _sam(variant: str, hub: str) -> Spec:
    name = f"sam_{variant}"
    return Spec(name, "sam", variant, lambda: SamVit(VIT[name]), "arXiv 2304.02643", "Apache-2.0", f"hub id facebook/{hub}, or Meta's {name}_*.pth")


def _student(name: str, family: str, variant: str, paper: str, licence: str, source: str, preprocess: Preprocess = Preprocess(1024),
             shape: DecoderShape | None = None) -> Spec:
    return Spec(name, family, variant, partial(students.encoder, name, 256), paper, licence, source, preprocess, shape or DecoderShape())


_EFFICIENTVIT = ("arXiv 2402.05008", "Apache-2.0", "hub id mit-han-lab/efficientvit-sam")
_EFFICIENT_SAM = ("arXiv 2312.00863", "Apache-2.0", "weights/ of github.com/yformer/EfficientSAM")

_ALL = (
    _sam("vit_b", "sam-vit-base"), _sam("vit_l", "sam-vit-large"), _sam("vit_h", "sam-vit-huge"),
    _student("mobile_sam", "mobile_sam", "tinyvit_5m", "arXiv 2306.14289", "Apache-2.0", "weights/mobile_sam.pt of github.com/ChaoningZhang/MobileSAM"),
    _student("edge_sam", "edge_sam", "repvit_m1", "arXiv 2312.06660", "NTU S-Lab 1.0 (non-commercial)", "github.com/chongzhou96/EdgeSAM"),
    _student("repvit_sam", "repvit_sam", "m2_3", "arXiv 2312.05760", "Apache-2.0", "releases of github.com/THU-MIG/RepViT"),
    *(_student(f"efficientvit_sam_{v}", "efficientvit_sam", v, *_EFFICIENTVIT, Preprocess(512, prompt_size=1024)) for v in ("l0", "l1", "l2")),
    *(_student(f"efficientvit_sam_{v}", "efficientvit_sam", v, *_EFFICIENTVIT) for v in ("xl0", "xl1")),
    *(_student(f"efficient_sam_{v}", "efficient_sam", f"vit{v[0]}", *_EFFICIENT_SAM, Preprocess(1024, fit="stretch")) for v in ("ti", "s")),
    _student("nanosam", "nanosam", "resnet18", "no paper", "Apache-2.0", "github.com/NVIDIA-AI-IOT/nanosam"),
)
SPECS: dict[str, Spec] = {spec.name: spec for spec in _ALL}


def names() -> list[str]:
    """The official names."""
    return list(SPECS)


def spec(name: str) -> Spec:
    """What is known of a published model. Raises UsageError for another name, with the nearest."""
    if name not in SPECS:
        raise unknown("published model", name, SPECS)
    return SPECS[name]


def build(name: str, *, device: str = "cpu") -> Sam:
    """The model in its published geometry, without weights; on device "meta" it costs neither time nor memory."""
    found = spec(name)
    with torch.device(device):
        return Sam(name, found.encoder(), found.shape, found.preprocess).eval()
