"""Meta's names of SAM's parameters and those of transformers' SamModel, both ways in one pass (its `convert_sam_to_hf.py`).

The tensors are the same, bit for bit; only one is stored twice in the library's layout (`COPIES`): 314 names become 315 for ViT-B.
"""
from __future__ import annotations

from edgekd.zoo.renaming import Table

_HEADS = ("mask_decoder.iou_prediction_head", "mask_decoder.output_hypernetworks_mlps.{n}")

META_HF = Table([
    ("image_encoder.patch_embed.proj.{p}", "vision_encoder.patch_embed.projection.{p}"),
    ("image_encoder.blocks.{n}.norm{k}.{p}", "vision_encoder.layers.{n}.layer_norm{k}.{p}"),
    ("image_encoder.blocks.{n}.{p}", "vision_encoder.layers.{n}.{p}"),
    *((f"image_encoder.neck.{i}.{{p}}", f"vision_encoder.neck.{name}.{{p}}") for i, name in enumerate(("conv1", "layer_norm1", "conv2", "layer_norm2"))),
    ("image_encoder.{p}", "vision_encoder.{p}"),
    ("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", "prompt_encoder.shared_embedding.positional_embedding"),
    ("prompt_encoder.point_embeddings.{n}.{p}", "prompt_encoder.point_embed.{n}.{p}"),
    *((f"prompt_encoder.mask_downscaling.{i}.{{p}}", f"prompt_encoder.mask_embed.{name}.{{p}}")
      for i, name in ((0, "conv1"), (1, "layer_norm1"), (3, "conv2"), (4, "layer_norm2"), (6, "conv3"))),
    *((f"mask_decoder.output_upscaling.{i}.{{p}}", f"mask_decoder.{name}.{{p}}")
      for i, name in ((0, "upscale_conv1"), (1, "upscale_layer_norm"), (3, "upscale_conv2"))),
    *((f"{head}.layers.{i}.{{p}}", f"{head}.{name}.{{p}}") for head in _HEADS for i, name in ((0, "proj_in"), (1, "layers.0"), (2, "proj_out"))),
    ("mask_decoder.transformer.layers.{n}.norm{k}.{p}", "mask_decoder.transformer.layers.{n}.layer_norm{k}.{p}"),
    ("mask_decoder.transformer.norm_final_attn.{p}", "mask_decoder.transformer.layer_norm_final_attn.{p}"),
])

COPIES = {"shared_image_embedding.positional_embedding": "prompt_encoder.shared_embedding.positional_embedding"}
"""library's name -> the library's name of the same tensor"""


def to_hf(name: str) -> str:
    """`image_encoder.blocks.0.norm1.weight` -> `vision_encoder.layers.0.layer_norm1.weight`."""
    return META_HF.right(name)


def to_meta(name: str) -> str:
    """`vision_encoder.layers.0.layer_norm1.weight` -> `image_encoder.blocks.0.norm1.weight`."""
    return META_HF.left(name)
