"""A decoder that never sees coordinates, for NPUs: the caller embeds the points (`models/point_embedding.py`), the file does the rest.

Coordinates, their sine and cosine and the comparisons of labels are what NPUs lack operators for, and what 16 or 8 bits cannot hold. What is left is
convolutions, linear layers, attention, norms. Where the image's cells are is a constant, and a mask prompt goes through plain convolutions and is
added to the image: `Dense`, which saves work when many prompts share a call, mixes values of different range in one tensor, and NPUs answer one.
"""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.models.point_embedding import FILE, PointEmbedding
from edgekd.models.prompt_encoder import PromptEncoder
from edgekd.models.sam import POINTS, Sam
from edgekd.protocols import NOT_A_POINT, Component


class EmbeddedDecoder(nn.Module):
    """Embedding, tokens of P prompts and their mask prompts -> masks and IoU, as `edgekd.models.sam.Decoder` gives them for the points."""

    def __init__(self, model: Sam) -> None:
        super().__init__()
        encoder, cells = model.prompt_encoder, model.preprocess.side // 16
        self.mask_decoder, self.takes_masks = model.mask_decoder, encoder.has_mask_branch
        with torch.no_grad():
            self.register_buffer("image_code", encoder.pe_layer.grid(cells, cells).contiguous())
        if self.takes_masks:
            self.mask_downscaling, self.no_mask_embed = encoder.mask_downscaling, encoder.no_mask_embed

    def forward(self, image_embeddings: Tensor, point_tokens: Tensor, token_bias: Tensor, mask_input: Tensor, has_mask: Tensor) -> tuple[Tensor, Tensor]:
        """image_embeddings (1, E, s, s), point_tokens (P, T, E), token_bias (P, T), mask_input (P, 1, F/4, F/4), has_mask (P,) 0 or 1 ->
        masks (P, 4, F/4, F/4), iou (P, 4)."""
        image = image_embeddings
        if self.takes_masks:
            has = has_mask[:, None, None, None]
            image = image + (has * self.mask_downscaling(mask_input) + (1 - has) * self.no_mask_embed.weight[:, :, None, None])
        return self.mask_decoder(image, None, self.image_code, point_tokens, token_bias)


def point_embedding(encoder: PromptEncoder) -> PointEmbedding:
    """The part of a prompt encoder that the caller computes."""
    def array(tensor: Tensor) -> np.ndarray:
        return tensor.detach().cpu().float().numpy().copy()

    weights = [e.weight for e in encoder.point_embeddings if isinstance(e, nn.Embedding)]
    labels = dict(enumerate(weights)) | {NOT_A_POINT: encoder.not_a_point_embed.weight}
    return PointEmbedding(encoder.side, encoder.padded, encoder.absent_bias, array(encoder.pe_layer.positional_encoding_gaussian_matrix),
                          {label: array(weight)[0] for label, weight in labels.items()})


def embedded_component(model: Sam) -> Component:
    """The decoder with the signature `embedded`, in place of `components(model)["decoder"]`, and the file of what its caller computes (P = 2, N = 3)."""
    f, host = model.preprocess.side, point_embedding(model.prompt_encoder)
    points = torch.rand(2, 3, 2) * f
    tokens, bias = host(points.numpy(), np.array([[1.0, 0.0, 1.0], [2.0, 3.0, 1.0]]))
    example = {
        "image_embeddings": torch.randn(1, model.embed_dim, f // 16, f // 16),
        "point_tokens": torch.from_numpy(tokens),
        "token_bias": torch.from_numpy(bias),
        "mask_input": torch.randn(2, 1, f // 4, f // 4),
        "has_mask": torch.tensor([0.0, 1.0]),
    }
    dynamic = {"point_tokens": {0: "prompts", 1: "tokens"}, "token_bias": {0: "prompts", 1: "tokens"}, "mask_input": {0: "prompts"}, "has_mask": {0: "prompts"}}
    return Component("decoder", EmbeddedDecoder(model).eval(), example, ("masks", "iou"), dynamic, lengths={"prompts": 1, "tokens": POINTS + host.own},
                     padding={"token_bias": host.absent_bias}, host={FILE: host.encode()})
