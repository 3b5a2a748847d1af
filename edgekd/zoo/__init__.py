"""The published models of the SAM family by their official names, and all that their files do not say.

A checkpoint holds weights. What input size they were trained at, whether photos are padded or stretched, in which square the
prompts are given: those facts are a `Spec` here. Reading files is in `edgekd.zoo.files`, telling what they are in
`edgekd.zoo.layouts`, filling a model in `edgekd.zoo.loading`.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial

import torch
from torch import nn

from edgekd import students
from edgekd.errors import UsageError, unknown
from edgekd.models import efficient_sam
from edgekd.models.sam import DecoderShape, Sam
from edgekd.models.sam_vit import CONFIGS as VIT
from edgekd.models.sam_vit import SamVit, VitShape
from edgekd.protocols import Preprocess


@dataclass(frozen=True)
class Spec:
    """One published model. `encoder()` builds its untrained encoder; `source` says where the authors publish the weights."""

    name: str
    family: str
    variant: str
    encoder: Callable[[], nn.Module]
    encoder_params: int
    """parameters of the encoder as the file stores it; a constant, so that lists need build nothing"""
    paper: str
    licence: str
    source: str
    preprocess: Preprocess = field(default_factory=lambda: Preprocess(1024))
    shape: DecoderShape = field(default_factory=DecoderShape)
    hub: str | None = None
    """hub id of the authors' Hugging Face files, or OWNER/NAME/FILE"""
    vit: VitShape | None = None
    """sizes of SAM's own encoder, whose parameters depend on the image size"""
    decoder_of: str | None = None
    """the published file is the encoder alone, distilled for this model's decoder"""

    @property
    def kind(self) -> str:
        """`teacher` for SAM itself, `student` for what was distilled from it."""
        return "teacher" if self.family == "sam" else "student"

    @property
    def params(self) -> int:
        """Parameters in all: SAM's prompt encoder and mask decoder are shared; EfficientSAM's have no mask branch."""
        return self.encoder_params + (4_064_560 if self.shape.mask_prompts else 4_059_620)


def sam_spec(vit: VitShape, name: str, variant: str, *, encoder_params: int = 0, source: str = "", hub: str | None = None,
             shape: DecoderShape | None = None) -> Spec:
    """A SAM of any sizes; the published three are in `SPECS`."""
    return Spec(name, "sam", variant, partial(SamVit, vit), encoder_params, "arXiv 2304.02643", "Apache-2.0, as Meta publishes SAM", source,
                Preprocess(vit.image_size), shape or DecoderShape(), hub, vit)


def _student(name: str, family: str, variant: str, encoder_params: int, paper: str, licence: str, source: str,
             preprocess: Preprocess = Preprocess(1024), shape: DecoderShape | None = None, decoder_of: str | None = None,
             hub: str | None = None) -> Spec:
    shape = shape or DecoderShape()
    return Spec(name, family, variant, partial(students.encoder, name, shape.embed_dim), encoder_params, paper, licence, source, preprocess, shape,
                hub, decoder_of=decoder_of)


_META = "dl.fbaipublicfiles.com/segment_anything"
_EFFICIENTVIT = ("arXiv 2402.05008", "Apache-2.0")
_EFFICIENTVIT_HUB = "mit-han-lab/efficientvit-sam"
_EFFICIENT_SAM = ("arXiv 2312.00863", "Apache-2.0")

_ALL = (
    *(sam_spec(VIT[f"sam_{v}"], f"sam_{v}", v, encoder_params=params, hub=hub, source=f"{_META}/{file}, or the hub id {hub}")
      for v, params, hub, file in (("vit_b", 89_670_912, "facebook/sam-vit-base", "sam_vit_b_01ec64.pth"),
                                   ("vit_l", 308_278_272, "facebook/sam-vit-large", "sam_vit_l_0b3195.pth"),
                                   ("vit_h", 637_026_048, "facebook/sam-vit-huge", "sam_vit_h_4b8939.pth"))),
    _student("mobile_sam", "mobile_sam", "tinyvit_5m", 5_743_892, "arXiv 2306.14289", "Apache-2.0", "weights/mobile_sam.pt of github.com/ChaoningZhang/MobileSAM"),
    _student("edge_sam", "edge_sam", "repvit_m1", 5_517_552, "arXiv 2312.06660", "NTU S-Lab 1.0 (non-commercial)", "github.com/chongzhou96/EdgeSAM"),
    _student("repvit_sam", "repvit_sam", "m2_3", 23_158_920, "arXiv 2312.05760", "Apache-2.0", "releases of github.com/THU-MIG/RepViT"),
    *(_student(f"efficientvit_sam_{v}", "efficientvit_sam", v, params, *_EFFICIENTVIT, f"the hub file {_EFFICIENTVIT_HUB}/efficientvit_sam_{v}.pt",
               Preprocess(512, prompt_size=1024) if v[0] == "l" else Preprocess(1024), hub=f"{_EFFICIENTVIT_HUB}/efficientvit_sam_{v}.pt")
      for v, params in (("l0", 30_728_224), ("l1", 43_585_568), ("l2", 57_264_032), ("xl0", 112_893_344), ("xl1", 199_281_568))),
    *(_student(f"efficient_sam_{v}", "efficient_sam", f"vit_{v}", params, *_EFFICIENT_SAM, f"weights/efficient_sam_vit{v[0]}.pt of github.com/yformer/EfficientSAM",
               Preprocess(1024, fit="stretch"), efficient_sam.DECODER)
      for v, params in (("ti", 6_163_840), ("s", 22_353_664))),
    _student("nanosam", "nanosam", "resnet18", 15_831_104, "no paper", "Apache-2.0", "github.com/NVIDIA-AI-IOT/nanosam", decoder_of="mobile_sam"),
)
SPECS: dict[str, Spec] = {spec.name: spec for spec in _ALL}
ALIASES = {"tinysam": "mobile_sam"}
"""other names of the same network: TinySAM (arXiv 2312.13789) is MobileSAM's class with other weights"""


def names() -> list[str]:
    """The official names."""
    return list(SPECS)


def families() -> list[str]:
    """The families of the published models."""
    return list(dict.fromkeys(s.family for s in SPECS.values()))


def spec(name: str) -> Spec:
    """What is known of a published model. Raises UsageError for another name, with the nearest."""
    name = ALIASES.get(name, name)
    if name not in SPECS:
        raise unknown("published model", name, [*SPECS, *ALIASES])
    return SPECS[name]


def resized(found: Spec, image_size: int) -> Spec:
    """The same model for another image size.

    Raises:
        UsageError: its size is a property of the network, or no multiple of 16.
    """
    if image_size == found.preprocess.image_size:
        return found
    if image_size < 64 or image_size % 16:
        raise UsageError(f"the image size of a SAM is a multiple of 16 from 64 on, not {image_size}", where=found.name, hint=f"nearest: {max(64, round(image_size / 16) * 16)}")
    if found.vit is None:
        raise UsageError(f"'{found.name}' runs at {found.preprocess.image_size} px, not at {image_size}", where=found.name,
                         hint="only the weights of SAM ViT-B, L and H are interpolated to other sizes; distil a student for the size instead")
    vit = replace(found.vit, image_size=image_size)
    return replace(found, vit=vit, encoder=partial(SamVit, vit), preprocess=replace(found.preprocess, image_size=image_size))


def assemble(found: Spec, *, device: str = "cpu") -> Sam:
    """The model that a spec describes, untrained; on device "meta" it costs neither time nor memory."""
    with torch.device(device):
        return Sam(found.name, found.encoder(), found.shape, found.preprocess).eval()


def build(name: str, *, device: str = "cpu", image_size: int | None = None) -> Sam:
    """A published model in its geometry, without weights. Raises UsageError for another name."""
    found = spec(name)
    return assemble(resized(found, image_size) if image_size else found, device=device)


@cache
def shapes(name: str) -> dict[str, torch.Size]:
    """Our parameter and buffer names of a published model with their shapes."""
    return {k: v.shape for k, v in build(name, device="meta").state_dict().items()}
