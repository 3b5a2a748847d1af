"""`sam_nano`: our own small promptable teacher, SAM's architecture at 256 px, trained by `recipes/train_sam_nano.yaml`."""
from __future__ import annotations

from edgekd.models.sam import DecoderShape, Sam
from edgekd.models.sam_vit import HybridStem, SamVit, VitShape
from edgekd.protocols import Preprocess

IMAGE_SIZE, EMBED_DIM = 256, 128
DECODER = DecoderShape(embed_dim=EMBED_DIM, heads=4, mlp_dim=512)
PREPROCESS = Preprocess(IMAGE_SIZE, mean=(127.0, 127.0, 127.0), std=(128.0, 128.0, 128.0))  # as its pretrained stem expects


def build() -> Sam:
    """The untrained network: 6 ViT blocks (2 of them global) of width 256 on a convolutional stem, decoder of width 128."""
    shape = VitShape(image_size=IMAGE_SIZE, dim=256, depth=6, heads=8, window=8, global_blocks=(2, 5), out=EMBED_DIM)
    return Sam("sam_nano", SamVit(shape, HybridStem(shape.dim)), DECODER, PREPROCESS)
