"""NanoSAM students: a ResNet, which every runtime and accelerator takes."""
from __future__ import annotations

from edgekd.models.nanosam import CONFIGS, NanoSam
from edgekd.students import Family

family = Family(name="nanosam", paper="arXiv 1512.03385", configs=CONFIGS, encoder=NanoSam)
