"""EfficientViT-SAM students: convolutions and linear attention, strong at 512 px."""
from __future__ import annotations

from edgekd.models.efficientvit import CONFIGS, EfficientViT
from edgekd.students import Family

family = Family(name="efficientvit", paper="arXiv 2402.05008", configs=CONFIGS, encoder=EfficientViT)
