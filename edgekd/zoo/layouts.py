"""What a weight file is, told from the names and shapes of its tensors alone, and the way from its names to ours.

Our names are Meta's with `encoder.` for `image_encoder.`. A layout is a table of templates between ours and the file's; the names
that a model needs are taken through it, so every name of a file is either needed, known to be unused and dropped by name, or refused.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from edgekd import zoo
from edgekd.errors import UsageError
from edgekd.zoo import sam_sizes
from edgekd.zoo.meta_hf import COPIES, META_HF
from edgekd.zoo.renaming import Table

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
ENCODER = "image_encoder."


@dataclass(frozen=True)
class Layout:
    """The names that one publisher uses."""

    name: str
    family: str
    marker: str
    """regular expression of a name that only this layout has"""
    table: Table = field(default_factory=lambda: Table([("encoder.{p}", ENCODER + "{p}")]))
    """ours on the left, the file's on the right"""
    unused: str = r"(?!)"
    """names that are known, not needed, and dropped"""
    zeros: tuple[str, ...] = ()
    """our names that the file has no tensor for: zeros"""
    copies: Mapping[str, str] = field(default_factory=dict)
    """file's name -> the file's name of the same tensor; either may be missing"""
    encoder_only: bool = False
    note: str | None = None


class _Hf(Table):
    """Ours -> Meta's -> transformers'."""

    def __init__(self) -> None:
        super().__init__([("encoder.{p}", ENCODER + "{p}")])

    def right(self, name: str) -> str:
        return META_HF.right(super().right(name))

    def left(self, name: str) -> str:
        return super().left(META_HF.left(name))


_MLP = ("mask_decoder.output_hypernetworks_mlps.{n}", "mask_decoder.iou_prediction_head")
_EFFICIENT_SAM = Table([
    ("encoder.{p}", ENCODER + "{p}"),
    ("prompt_encoder.not_a_point_embed.weight", "prompt_encoder.invalid_points.weight"),
    ("prompt_encoder.point_embeddings.1.weight", "prompt_encoder.point_embeddings.weight"),
    ("prompt_encoder.point_embeddings.2.weight", "prompt_encoder.bbox_top_left_embeddings.weight"),
    ("prompt_encoder.point_embeddings.3.weight", "prompt_encoder.bbox_bottom_right_embeddings.weight"),
    ("mask_decoder.transformer.layers.{n}.mlp.lin1.{p}", "mask_decoder.transformer.layers.{n}.mlp.layers.0.0.{p}"),
    ("mask_decoder.transformer.layers.{n}.mlp.lin2.{p}", "mask_decoder.transformer.layers.{n}.mlp.fc.{p}"),
    *((f"mask_decoder.output_upscaling.{i}.{{p}}", f"mask_decoder.final_output_upscaling_layers.{name}.{{p}}") for i, name in ((0, "0.0"), (1, "0.1"), (3, "1.0"))),
    *((f"{head}.layers.{i}.{{p}}", f"{head}.{name}.{{p}}") for head in _MLP for i, name in ((0, "layers.0.0"), (1, "layers.1.0"), (2, "fc"))),
])
_PREFIX = r"(?:image_encoder\.)?"

LAYOUTS = (
    Layout("hf", "sam", r"vision_encoder\.layers\.\d+\.attn\.rel_pos_[hw]", _Hf(), copies=COPIES),
    Layout("efficient_sam", "efficient_sam", r"prompt_encoder\.(?:invalid_points|bbox_top_left_embeddings)\.weight", _EFFICIENT_SAM,
           zeros=("prompt_encoder.point_embeddings.0.weight",)),
    Layout("mobile_sam", "mobile_sam", _PREFIX + r"patch_embed\.seq\.\d\.c\.weight", unused=_PREFIX + r"(?:norm_head|head)\.(?:weight|bias)",
           note="TinySAM's files have the same names and shapes: which of the two this is cannot be told from weights"),
    Layout("edge_sam", "edge_sam", _PREFIX + r"fuse_stage[23]\..+",
           Table([("encoder.fuse_stage3.weight", ENCODER + "fuse_stage3.op_list.0.weight"), ("encoder.{p}", ENCODER + "{p}")]),
           unused=r"(?:image_encoder\.)?(?:fpn|rpn_head)\..+"),
    Layout("repvit_sam", "repvit_sam", _PREFIX + r"features\.\d+\.token_mixer\.0\.bn\.weight"),
    Layout("efficientvit_sam", "efficientvit_sam", _PREFIX + r"backbone\.stages\.\d+\.op_list\..+"),
    Layout("nanosam", "nanosam", r"up_1\.\d\.weight|backbone\.layer\d\.\d\.conv1\.weight", Table([("encoder.{p}", "{p}")]), encoder_only=True,
           note="the encoder alone; its decoder is MobileSAM's"),
    Layout("meta", "sam", _PREFIX + r"blocks\.\d+\.attn\.rel_pos_[hw]", unused=r"pixel_(?:mean|std)"),
)

# Recognised and sent elsewhere: their decoders need more than one embedding, and transformers' own classes run them.
FOREIGN: tuple[tuple[str, str], ...] = (
    ("SAM-HQ", r"mask_decoder\.(?:hf_token|hq_token)\.weight"),
    ("EdgeTAM", r"spatial_perceiver\..+"),
    ("SAM 3", r"(?:detector(?:_model)?|tracker(?:_model)?|backbone\.vision_backbone)\..+"),
    ("SAM 2", r"sam_mask_decoder\..+|image_encoder\.trunk\..+|vision_encoder\.backbone\..+|memory_attention\..+"),
)


@dataclass(frozen=True)
class Found:
    """What a file is."""

    layout: Layout
    spec: zoo.Spec
    encoder_only: bool = False
    bare: bool = False
    """the encoder's names lack their `image_encoder.`"""

    def file_name(self, ours: str) -> str:
        """The name that the file gives to one of our parameters."""
        name = self.layout.table.right(ours)
        return name.removeprefix(ENCODER) if self.bare else name


@dataclass(frozen=True)
class Match:
    """A file held against the model that it is for."""

    sources: dict[str, str]
    """our name -> the file's name"""
    problems: list[str]
    """`missing X`, `unknown X`, `X is (..) instead of (..)`, under the file's names"""
    dropped: list[str]
    """known, not needed"""


def by_name(name: str) -> Layout:
    """A layout. Raises KeyError for another name."""
    return {one.name: one for one in LAYOUTS}[name]


def detect(tensors: Shapes) -> Found:
    """Layout, family and variant of a file's names and shapes.

    Raises:
        UsageError: it is a model that cannot be read here, or none that is known.
    """
    foreign = next((name for name, pattern in FOREIGN if _has(tensors, pattern)), None)
    if foreign is not None:
        raise UsageError(f"these are {foreign}'s weights, which transformers' own class runs", hint="give its Hugging Face folder or hub id as the teacher")
    layout = next((one for one in LAYOUTS if _has(tensors, one.marker)), None)
    if layout is None:
        raise UsageError(f"no known model has these {len(tensors)} parameters (the first: {', '.join(list(tensors)[:3])})",
                         hint=f"known are the files of {', '.join(zoo.families())}, and SAM's Hugging Face layout")
    decoder = any(k.startswith("mask_decoder.") for k in tensors)
    bare = not layout.encoder_only and layout.name != "hf" and not any(k.startswith(ENCODER) for k in tensors)
    found = Found(layout, zoo.SPECS["sam_vit_b"], encoder_only=layout.encoder_only or not decoder, bare=bare)
    ours = {layout.table.left(ENCODER + k if bare else k): shape for k, shape in tensors.items()}
    return replace(found, spec=sam_sizes.spec_of(ours) if layout.family == "sam" else _variant(found, ours))


def _has(tensors: Shapes, pattern: str) -> bool:
    match = re.compile(pattern).fullmatch
    return any(match(k) for k in tensors)


def _variant(found: Found, ours: Shapes) -> zoo.Spec:
    """The member of a family whose encoder differs least."""
    members = [s for s in zoo.SPECS.values() if s.family == found.layout.family]

    def difference(member: zoo.Spec) -> int:
        needed = {k: tuple(v) for k, v in zoo.shapes(member.name).items() if k.startswith("encoder.")}
        return sum(ours.get(k) != v for k, v in needed.items()) + sum(k not in needed for k in ours if k.startswith("encoder."))

    return min(members, key=difference) if len(members) > 1 else members[0]


def needed(found: Found) -> dict[str, Shape]:
    """Our names and shapes of all that a file of this kind must hold."""
    published = zoo.SPECS.get(found.spec.name) is found.spec
    own = zoo.shapes(found.spec.name) if published else {k: v.shape for k, v in zoo.assemble(found.spec, device="meta").state_dict().items()}
    return {k: tuple(v) for k, v in own.items() if k not in found.layout.zeros and (k.startswith("encoder.") or not found.encoder_only)}


def match(found: Found, tensors: Shapes) -> Match:
    """Every name of the file accounted for."""
    sources, problems = {}, []
    taken: set[str] = set()
    twin = {original: copy for copy, original in found.layout.copies.items()}
    for ours, shape in needed(found).items():
        name = found.file_name(ours)
        if name not in tensors and twin.get(name) in tensors:
            name = twin[name]
        taken.add(name)
        if name not in tensors:
            problems.append(f"missing {name}")
        elif tensors[name] != shape:
            problems.append(f"{name} is {tensors[name]} instead of {shape}")
        else:
            sources[ours] = name
    rest = [k for k in tensors if k not in taken]
    known = re.compile(found.layout.unused).fullmatch
    dropped = [k for k in rest if known(k)]
    copies = [k for k in rest if k in found.layout.copies]
    problems += [f"unknown {k}" for k in rest if k not in dropped and k not in copies]
    for copy in copies:
        original = tensors[found.layout.copies[copy]]
        if tensors[copy] != original:
            problems.append(f"{copy} is {tensors[copy]} instead of {original}")
    return Match(sources, problems, dropped)


def check(found: Found, matched: Match, where: object) -> None:
    """Raises UsageError with the names of what is missing, unknown or misshapen."""
    if matched.problems:
        more = f" and {len(matched.problems) - 4} more" if len(matched.problems) > 4 else ""
        raise UsageError(f"the weights do not fit {found.spec.name}: {'; '.join(matched.problems[:4])}{more}", where=where,
                         hint="edgekd inspect FILE lists all; the file is damaged, or of a changed model")
