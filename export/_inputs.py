"""Calibration inputs, looked at while a toolchain is shown them: what they cannot be is told before it makes a file of it."""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from edgekd.errors import UsageError
from edgekd.protocols import Component

if TYPE_CHECKING:
    import numpy as np

HINT = "give a folder of images with --data"


def looked_at(component: Component, calibration: Iterable[Mapping[str, np.ndarray]] | None) -> Iterator[Mapping[str, np.ndarray]]:
    """The inputs one by one.

    Raises:
        UsageError: there are none; one lacks an input of the component, or holds NaN or infinity; or none of them has two different numbers in it
            (photos of one colour), from which no range follows.
    """
    import numpy as np

    count, varied = 0, False
    for sample in calibration or ():
        for name in component.example:
            if name not in sample:
                raise UsageError(f"a calibration input lacks '{name}'", where=component.name, hint=f"the component takes {', '.join(component.example)}")
            value = np.asarray(sample[name])
            if not np.isfinite(value).all():
                raise UsageError(f"the calibration input '{name}' holds NaN or infinity", where=component.name, hint="look at the images, or at how they are normalised")
            varied = varied or bool(value.size and value.min() != value.max())
        count += 1
        yield sample
    if not count:
        raise UsageError("the calibration inputs are empty", where=component.name, hint=HINT)
    if not varied:
        raise UsageError("the calibration inputs are constant: every one of them is one number throughout", where=component.name, hint=HINT)
