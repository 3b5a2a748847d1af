"""SAM from Hugging Face files: `transformers` runs the image encoder, our decoder takes over the rest of the weights.

The decoder has Meta's parameter names (edgekd.models.sam); RENAME is the way from the library's names to those. Every key is
accounted for: one that is missing, unknown or misshapen refuses the file by its name.
"""
from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgekd.errors import EdgekdError
from edgekd.models.sam import DecoderShape, Sam
from edgekd.protocols import Preprocess

if TYPE_CHECKING:
    from transformers import SamModel

RENAME = (
    (r"^prompt_encoder\.shared_embedding\.positional_embedding$", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"^prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
    (r"^prompt_encoder\.mask_embed\.conv1\.", "prompt_encoder.mask_downscaling.0."),
    (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "prompt_encoder.mask_downscaling.1."),
    (r"^prompt_encoder\.mask_embed\.conv2\.", "prompt_encoder.mask_downscaling.3."),
    (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "prompt_encoder.mask_downscaling.4."),
    (r"^prompt_encoder\.mask_embed\.conv3\.", "prompt_encoder.mask_downscaling.6."),
    (r"^mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
    (r"^mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
    (r"^mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
    (r"^(mask_decoder\.transformer\.layers\.\d\.)layer_norm(\d)\.", r"\1norm\2."),
    (r"^mask_decoder\.transformer\.layer_norm_final_attn\.", "mask_decoder.transformer.norm_final_attn."),
    (r"^(mask_decoder\.(?:iou_prediction_head|output_hypernetworks_mlps\.\d)\.)layers\.0\.", r"\1layers.1."),
    (r"^(mask_decoder\.(?:iou_prediction_head|output_hypernetworks_mlps\.\d)\.)proj_in\.", r"\1layers.0."),
    (r"^(mask_decoder\.(?:iou_prediction_head|output_hypernetworks_mlps\.\d)\.)proj_out\.", r"\1layers.2."),
)


class Encoder(nn.Module):
    """The library's vision encoder behind the embedding contract."""

    def __init__(self, vision: nn.Module) -> None:
        super().__init__()
        self.vision = vision

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, E, S/16, S/16)."""
        return self.vision(images).last_hidden_state


def rename(key: str) -> str:
    """Our name of one of the library's decoder parameters. One rule at most applies, so nothing is renamed twice."""
    for pattern, replacement in RENAME:
        if re.match(pattern, key):
            return re.sub(pattern, replacement, key)
    return key


def convert(model: SamModel, name: str) -> Sam:
    """Our Sam with the weights of a loaded `transformers.SamModel`.

    Raises:
        EdgekdError: its keys or shapes are not SAM's.
    """
    config = model.config
    prompt, decoder = config.prompt_encoder_config, config.mask_decoder_config
    shape = DecoderShape(embed_dim=prompt.hidden_size, heads=decoder.num_attention_heads, mlp_dim=decoder.mlp_dim, mask_channels=prompt.mask_input_channels)
    sam = Sam(name, Encoder(model.vision_encoder), shape, Preprocess(config.vision_config.image_size))
    own = {k: v for k, v in sam.state_dict().items() if not k.startswith("encoder.")}
    state = {rename(k): v for k, v in model.state_dict().items() if not k.startswith(("vision_encoder.", "shared_image_embedding."))}
    state.setdefault("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", model.shared_image_embedding.positional_embedding.detach())
    wrong = [f"missing {k}" for k in own if k not in state] + [f"unknown {k}" for k in state if k not in own]
    wrong += [f"{k} is {tuple(state[k].shape)} instead of {tuple(v.shape)}" for k, v in own.items() if k in state and state[k].shape != v.shape]
    if wrong:
        raise EdgekdError(f"this is not a SAM: {'; '.join(wrong[:4])}", where=name)
    sam.load_state_dict(state, strict=False)
    return sam


def load(source: str, *, offline: bool = False) -> Sam:
    """SAM from a folder (`config.json`, `model.safetensors`) or a hub id.

    Raises:
        EdgekdError: nothing there, the network cannot be reached, or it is another kind of model.
    """
    from transformers import SamConfig, SamModel

    try:
        config: Any = SamConfig.from_pretrained(source, local_files_only=offline)
        if config.model_type != "sam":
            raise EdgekdError(f"a model of type '{config.model_type}' cannot be a teacher here yet", where=source, hint="SAM ViT-B, L and H can")
        model = SamModel.from_pretrained(source, config=config, local_files_only=offline, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError) as e:
        raise EdgekdError(f"'{source}' is neither a folder with SAM's files nor a hub id that can be reached", where=str(e).splitlines()[0][:200],
                          hint="a folder holds config.json and model.safetensors; hub ids look like facebook/sam-vit-base") from e
    return convert(model, source.rstrip("/").split("/")[-1])
