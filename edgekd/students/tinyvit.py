"""TinyViT students: window attention, the family of MobileSAM."""
from __future__ import annotations

from edgekd.models.tinyvit import CONFIGS, TinyViT
from edgekd.students import Family

family = Family(name="tinyvit", paper="arXiv 2207.10666", configs=CONFIGS, encoder=TinyViT)
