"""The sizes of a SAM from the shapes of its tensors: one of the published three, or any other that is built the same way."""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from edgekd import zoo
from edgekd.models.sam import DecoderShape
from edgekd.models.sam_vit import CONFIGS, VitShape

Shapes = Mapping[str, tuple[int, ...]]


def spec_of(ours: Shapes) -> zoo.Spec:
    """The SAM with these names (ours) and shapes. A damaged tensor does not mislead: sizes that several tensors tell are put to the vote."""
    vit, decoder = _vit(ours), _decoder(ours)
    for name, published in CONFIGS.items():
        same_size = replace(vit, image_size=published.image_size) == published
        if same_size and decoder == DecoderShape():
            return zoo.resized(zoo.SPECS[name], vit.image_size)
    return zoo.sam_spec(vit, "sam_vit", f"vit_{vit.dim}x{vit.depth}", shape=decoder, source="not published: told from the file")


def _vit(ours: Shapes) -> VitShape:
    found = {k.removeprefix("encoder."): v for k, v in ours.items() if k.startswith("encoder.")}
    blocks: dict[int, dict[str, tuple[int, ...]]] = {}
    for key, shape in found.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
        if match:
            blocks.setdefault(int(match[1]), {})[match[2]] = shape
    depth = max(blocks, default=-1) + 1
    dim = _vote([b[k][0] for b in blocks.values() for k in ("norm1.weight", "norm2.weight") if k in b], 768)
    positions = found.get("pos_embed", ())
    published = next((c for c in CONFIGS.values() if (c.dim, c.depth) == (dim, depth)), None)
    side = positions[1] if len(positions) == 4 and positions[1] == positions[2] else 64
    if published is not None:
        return replace(published, image_size=16 * side)
    rows = {i: b["attn.rel_pos_h"][0] for i, b in blocks.items() if len(b.get("attn.rel_pos_h", ())) == 2}
    head = _vote([b["attn.rel_pos_w"][1] for b in blocks.values() if len(b.get("attn.rel_pos_w", ())) == 2], 64)
    windowed = [r for r in rows.values() if r != 2 * side - 1]
    window = (_vote(windowed, 27) + 1) // 2 if windowed else 0
    hidden = _vote([b["mlp.lin1.weight"][0] for b in blocks.values() if "mlp.lin1.weight" in b], 4 * dim)
    out = found.get("neck.0.weight", (256,))[0]
    return VitShape(16 * side, dim, depth, max(1, dim // head), window, tuple(i for i in sorted(rows) if rows[i] == 2 * side - 1), out, hidden / dim)


def _decoder(ours: Shapes) -> DecoderShape:
    """Heads leave no trace in shapes: 8 at SAM's width of 256, else one for every 32 channels."""
    dim = _vote([v[1] for k, v in ours.items() if re.fullmatch(r"mask_decoder\.(?:iou_token|mask_tokens)\.weight|prompt_encoder\.\w+_embed\.weight", k)], 256)
    mlp = _vote([v[0] for k, v in ours.items() if re.fullmatch(r"mask_decoder\.transformer\.layers\.\d+\.mlp\.lin1\.weight", k)], 2048)
    mask = _vote([v[0] for k, v in ours.items() if re.fullmatch(r"prompt_encoder\.mask_downscaling\.[34]\.(?:weight|bias)", k)], 16)
    return DecoderShape(dim, heads=8 if dim == 256 else max(1, dim // 32), mlp_dim=mlp, mask_channels=mask)


def _vote(values: list[int], default: int) -> int:
    return Counter(values).most_common(1)[0][0] if values else default
