"""RepViT students: convolutions only, the fastest family on CPUs and NPUs."""
from __future__ import annotations

from edgekd.models.repvit import CONFIGS, RepViT
from edgekd.students import Family

family = Family(name="repvit", paper="arXiv 2307.09283", configs=CONFIGS, encoder=RepViT)
