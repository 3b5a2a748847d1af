"""An exported model of arrays on its runtime, numpy in and numpy out. No torch."""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgekd.errors import EdgekdError
from edgekd.runtime import TOGETHER, Call, Opened
from edgekd.tasks.tensors.inputs import Input, draw, rows_of


class ArtifactArrays(Opened):
    """Arrays in, arrays out, by the names in the manifest."""

    @property
    def inputs(self) -> list[Input]:
        """What it takes."""
        return [Input(i.name, tuple(i.shape), i.dtype) for i in self.manifest.components["model"].inputs]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Inputs by name -> outputs by name.

        Raises:
            EdgekdError: an input is missing, or an axis has another length than the file takes: nobody knows what padding would do to the answer.
        """
        rows = rows_of(self.inputs)
        fixed = {s: n for s, n in self.manifest.components["model"].fixed.items() if s != rows}
        for one in self.inputs:
            if one.name not in inputs:
                raise EdgekdError(f"the input '{one.name}' is missing", where=self.name, hint=f"it takes {', '.join(i.words() for i in self.inputs)}")
            shape = np.shape(inputs[one.name])
            wanted = [fixed.get(n, n) if isinstance(n, str) else n for n in one.shape]
            if len(shape) != len(wanted) or any(isinstance(n, int) and n != m for n, m in zip(wanted, shape, strict=True)):
                varies = next((s for s in one.symbols if s in fixed), None)
                raise EdgekdError(f"the input '{one.name}' has the shape {shape}, and the file takes {'x'.join(map(str, wanted))}", where=self.name,
                                  hint=f"export it again with --length {varies}=N" if varies else f"it takes {one.words()}")
        return self.session("model").run(inputs)

    def calls(self, prompts: int) -> dict[str, Call]:
        """One call on seeded arrays; an axis of any length is 1, or what the file takes."""
        part = self.manifest.components["model"]
        session = self.session("model")
        sample = draw(self.inputs, {s: part.fixed.get(s, 1) for i in self.inputs for s in i.symbols}, seed=0)
        return {"model": lambda: session.run(sample), TOGETHER: lambda: session.run(sample)}
