"""Published weight files, made up: our model's names taken to the layout of its authors, with all that their files hold besides."""
from __future__ import annotations

import torch
from torch import Tensor

from edgekd import zoo
from edgekd.zoo import layouts

LAYOUT = {"sam": "meta"}
UNUSED: dict[str, dict[str, tuple[int, ...]]] = {
    "mobile_sam": {"image_encoder.norm_head.weight": (320,), "image_encoder.norm_head.bias": (320,), "image_encoder.head.weight": (1000, 320),
                   "image_encoder.head.bias": (1000,)},
    "edge_sam": {"fpn.lateral_convs.0.conv.weight": (256, 96, 1, 1), "rpn_head.rpn_cls.bias": (1,)},
}
"""family -> what its published files hold and nobody reads"""


def layout_of(name: str) -> layouts.Layout:
    family = zoo.spec(name).family
    return layouts.by_name(LAYOUT.get(family, family))


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published file."""
    layout = layout_of(name)
    wanted = {k: tuple(v) for k, v in zoo.shapes(name).items() if k not in layout.zeros and (k.startswith("encoder.") or not layout.encoder_only)}
    return {**{layout.table.right(k): v for k, v in wanted.items()}, **UNUSED.get(zoo.spec(name).family, {})}


def tensors(name: str, seed: int = 0) -> dict[str, Tensor]:
    """The file's tensors, seeded: the start of a training with noise on it, so that no layer is zero or a plain one."""
    torch.manual_seed(seed)
    layout, own = layout_of(name), zoo.build(name).state_dict()
    own = {k: v + 0.02 * torch.randn(v.shape) if v.is_floating_point() and "running_var" not in k else v for k, v in own.items()}
    state = {layout.table.right(k): v for k, v in own.items() if k not in layout.zeros and (k.startswith("encoder.") or not layout.encoder_only)}
    return {**state, **{k: torch.randn(v) for k, v in UNUSED.get(zoo.spec(name).family, {}).items()}}


def write(name: str, path, wrapper: str | None = None) -> dict[str, Tensor]:
    """A published file at `path`."""
    state = tensors(name)
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, path)
    return state
