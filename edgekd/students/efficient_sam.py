"""EfficientSAM students: plain ViTs whose published weights come from masked pre-training on SAM's features."""
from __future__ import annotations

from edgekd.models.efficient_sam import CONFIGS, EfficientSam
from edgekd.students import Family

family = Family(name="efficient_sam", paper="arXiv 2312.00863", configs=CONFIGS, encoder=EfficientSam)
