"""`edgekd distill` with a recipe that rounds: the trained student is exported, and the integer file held against what was trained."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import checkpoint, console, exporting, plugins
from edgekd.data import Subset, open_data
from edgekd.errors import UsageError
from edgekd.models.rounding import simulated
from edgekd.runtime import open_artifact

if TYPE_CHECKING:
    from edgekd.protocols import Dataset
    from edgekd.recipe import Recipe

PHOTOS = 16
"""Photos, at most, that file and model are compared on."""
SAME = 0.995
"""Mask IoU from which on the file is what was trained."""


def export(trained: Path, output: Path, *, recipe: Recipe, scheme: str, data: str) -> dict[str, Any]:
    """Export the quantized student of a checkpoint into `output`/artifact, in the first of the recipe's formats that writes the scheme (`auto`: onnx),
    and compare: `artifact`, `artifact_parity`.

    Raises:
        EdgekdError: the export fails.
    """
    model = checkpoint.load(trained)
    wanted = ["onnx"] if recipe.formats == "auto" else recipe.formats
    format = next((f for f in wanted if scheme in plugins.exporter(f).schemes), None)
    if format is None:
        console.warn(f"{', '.join(wanted)} do not write {scheme}: the student is trained, and not exported")
        return {}
    folder = Path(output) / "artifact"
    console.log(f"export {model.name} as {format} {scheme}")
    exporting.export_model(model, folder, format=format, scheme=scheme, teacher=checkpoint.read_meta(trained).teacher)
    teacher = plugins.task_of(model).teacher(recipe.teacher)
    photos = plugins.task_of(model).labelled(open_data(data, limit=recipe.data.limit), teacher)
    return {"artifact": str(folder), "artifact_parity": {"format": format, "scheme": scheme, **parity(model, open_artifact(folder), photos)}}


def parity(model: Any, artifact: Any, photos: Dataset) -> dict[str, Any]:
    """How far a file is the model that was trained, rounding included: overlap of their masks for boxes and clicks on the instances of the photos, mean over
    prompts (`mask_iou`) and of the worst photo; and how far the model without rounded activations is from both, to compare with. Of a task
    without masks, the agreement that it is judged by."""
    task, rows = plugins.task_of(model), []
    some = range(0, len(photos), max(1, len(photos) // PHOTOS))
    for i in some:
        try:
            with simulated(model):
                judge = task.judge(model, Subset(photos, [i]))
                same = judge.agreement(artifact)
        except UsageError:  # a photo on which there is nothing to ask for
            continue
        rows.append((judge.instances, same, judge.agreement(model)))
    if not rows:
        raise UsageError("nothing to compare the artifact on: no photo has an instance that is large enough", where=photos.name, hint="give other photos")
    count = sum(n for n, _, _ in rows)
    file, plain = (sum(row[0] * row[k] for row in rows) / count for k in (1, 2))
    return {"mask_iou": file, "min_mask_iou": min(row[1] for row in rows), "float_mask_iou": plain, "passed": file >= SAME, "images": len(rows),
            "prompts": 2 * count, "what": "masks of the artifact and of the trained model with its rounding, boxes and centre clicks"}
