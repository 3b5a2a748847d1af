"""SAM's published decoder signature around our prompt encoder and mask decoder, for applications that were written for it.

Six inputs, three outputs, one prompt of N points a call; the caller appends the point (0, 0) with label -1 to a prompt without a
box. Names, order and numbers as in segment-anything's `scripts/export_onnx_model.py` with its defaults (all four masks).
"""
from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.models.sam import Sam
from edgekd.protocols import ABSENT, NOT_A_POINT, Component

OUTPUTS = ("masks", "iou_predictions", "low_res_masks")


class OfficialDecoder(nn.Module):
    """Embedding, one prompt and the photo's size -> masks at the photo's size, their predicted IoU, and masks of F/4."""

    def __init__(self, model: Sam) -> None:
        super().__init__()
        self.prompt_encoder, self.mask_decoder = model.prompt_encoder, model.mask_decoder
        self.side, self.stretch = model.preprocess.side, model.preprocess.fit == "stretch"

    def forward(
        self, image_embeddings: Tensor, point_coords: Tensor, point_labels: Tensor, mask_input: Tensor, has_mask_input: Tensor, orig_im_size: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """image_embeddings (1, E, s, s), point_coords (1, N, 2) xy in the F frame, point_labels (1, N), mask_input (1, 1, F/4, F/4),
        has_mask_input (1,), orig_im_size (2,) height and width -> masks (1, 4, H, W), iou_predictions (1, 4), low_res_masks (1, 4, F/4, F/4)."""
        if self.prompt_encoder.padded:  # fills every prompt up by itself, so that the caller's point is in excess
            tokens, bias = self.prompt_encoder.points(point_coords, torch.where(point_labels == NOT_A_POINT, ABSENT, point_labels))
        else:  # without the token that ours adds: here the caller did
            tokens, bias = (t[:, : point_coords.shape[1]] for t in self.prompt_encoder.points(point_coords, point_labels))
        dense = self.prompt_encoder.dense(mask_input, has_mask_input)
        code = self.prompt_encoder.pe_layer.grid(*image_embeddings.shape[-2:])
        low, iou = self.mask_decoder(image_embeddings, dense, code, tokens, bias)
        return self._to_photo(low, orig_im_size), iou, low

    def _to_photo(self, low: Tensor, size: Tensor) -> Tensor:
        """(1, 4, F/4, F/4), (2,) -> (1, 4, H, W): up to the square, padding cropped, then to the photo."""
        square = F.interpolate(low, size=(self.side, self.side), mode="bilinear", align_corners=False)
        height, width = (_length(n, None) for n in size.to(torch.int64))
        if not self.stretch:
            inside = torch.floor(size * (self.side / size.max()) + 0.5).to(torch.int64)
            rows, columns = (_length(n, self.side) for n in inside)
            square = square[..., :rows, :columns]
        return F.interpolate(square, size=(height, width), mode="bilinear", align_corners=False)


def _length(value: Tensor, most: int | None) -> int:
    """A length that a tensor holds, with what torch.export must know of it."""
    length = value.item()
    torch._check(length > 0)
    if most is not None:
        torch._check(length <= most)
    return cast(int, length)


def official_component(model: Sam) -> Component:
    """The decoder with SAM's own signature, in place of `components(model)["decoder"]`."""
    f = model.preprocess.side
    example = {
        "image_embeddings": torch.randn(1, model.embed_dim, f // 16, f // 16),
        "point_coords": torch.rand(1, 5, 2) * f,
        "point_labels": torch.tensor([[1.0, 0.0, 2.0, 3.0, -1.0]]),
        "mask_input": torch.randn(1, 1, f // 4, f // 4),
        "has_mask_input": torch.ones(1),
        "orig_im_size": torch.tensor([f * 0.75, f * 0.5]).floor(),
    }
    dynamic = {"point_coords": {1: "num_points"}, "point_labels": {1: "num_points"}}
    return Component("decoder", OfficialDecoder(model).eval(), example, OUTPUTS, dynamic)
