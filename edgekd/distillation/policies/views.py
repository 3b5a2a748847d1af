"""Random views of a photo with its masks: a crop, a mirror image, other light. The teacher is asked about the same view.

Beyer et al., "Knowledge distillation: A good teacher is patient and consistent" (arXiv 2106.05237): student and teacher must see the same
crop of the same photo ("function matching"), and many different ones.
"""
from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgekd.distillation.outputs import Setup
from edgekd.distillation.points import Policy
from edgekd.distillation.policies._shared import refuse_cached
from edgekd.errors import UsageError
from edgekd.protocols import Sample

ASPECT = 4 / 3
LEAST_SIDE = 32
TRIES = 5
GREY = np.array([0.299, 0.587, 0.114], np.float32)


class Views(Policy):
    """A crop of `crop`..1 of the area with a side ratio of 3/4..4/3 of the photo's, mirrored in half of the cases, its brightness, contrast
    and saturation each changed by a factor from 1 - colour to 1 + colour.

    A crop that would leave no instance of a labelled photo is drawn again, at last not at all.

    Args:
        crop: least share of the area; 1 leaves photos whole.
        flip: how often the photo is mirrored.
        colour: strength of the change of light; 0 for none.
    """

    name, family, paper = "views", "data", "Knowledge distillation: A good teacher is patient and consistent (arXiv 2106.05237)"
    live = True

    def __init__(self, crop: float = 0.5, flip: float = 0.5, colour: float = 0.2) -> None:
        super().__init__()
        if not 0 < crop <= 1 or not 0 <= flip <= 1 or not 0 <= colour < 1:
            raise UsageError(f"views takes 0 < crop <= 1, 0 <= flip <= 1 and 0 <= colour < 1, not crop={crop:g}, flip={flip:g}, colour={colour:g}")
        self.crop, self.flip, self.colour = crop, flip, colour

    def bind(self, setup: Setup) -> None:
        """Raises UsageError when the stage's teacher is a cache."""
        refuse_cached(self, setup)

    def view(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Another view; masks that the crop leaves empty are dropped."""
        image, masks = sample.image, sample.masks
        y, x, h, w = self._window(sample, rng)
        image, masks = image[y : y + h, x : x + w], None if masks is None else masks[:, y : y + h, x : x + w]
        if rng.random() < self.flip:
            image, masks = image[:, ::-1], None if masks is None else masks[:, :, ::-1]
        if self.colour:
            image = lit(image, *rng.uniform(1 - self.colour, 1 + self.colour, 3))
        if masks is not None:
            masks = np.ascontiguousarray(masks[masks.any((1, 2))])
        return replace(sample, image=np.ascontiguousarray(image), masks=masks)

    def _window(self, sample: Sample, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """y, x, height and width of the crop."""
        height, width = sample.image.shape[:2]
        for _ in range(TRIES):
            area, ratio = rng.uniform(self.crop, 1), np.exp(rng.uniform(-np.log(ASPECT), np.log(ASPECT)) * (self.crop < 1) / 2)
            h, w = (min(most, max(LEAST_SIDE, round(most * np.sqrt(area) * f))) for most, f in ((height, ratio), (width, 1 / ratio)))
            y, x = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            if sample.masks is None or not len(sample.masks) or sample.masks[:, y : y + h, x : x + w].any():
                return y, x, h, w
        return 0, 0, height, width


def lit(image: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """An (H, W, 3) uint8 image with brightness, contrast and saturation multiplied (1: as it is), in this order."""
    x = image.astype(np.float32) * brightness
    x = (x - x.mean()) * contrast + x.mean()
    grey = (x @ GREY)[..., None]
    return ((x - grey) * saturation + grey).round().clip(0, 255).astype(np.uint8)


policy = Views
