"""Promptable segmentation: a photo and a prompt in, a mask out. The task of the SAM family."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgekd.protocols import Dataset


class PromptableSegmentation:
    """Teachers and students are `edgekd.models.sam.Sam`, or offer the same (`edgekd.protocols.Promptable`)."""

    name = "promptable_segmentation"
    summary = "a photo and a point or box in, a mask out"
    outputs = frozenset({"embedding", "masks", "iou", "tokens", "truth", "boxes", "instances", "feats", "attention", "images", "teachers"})

    parts = ("encoder", "decoder", "prompt_encoder", "proposer")

    def teacher(self, name: str) -> Any:
        """A frozen teacher."""
        from edgekd import teachers

        return teachers.load(name)

    def student(self, name: str, image_size: int, teacher: Any) -> tuple[Any, str]:
        """A student for this teacher and where its weights come from: the shipped checkpoint when it was distilled from a teacher of the
        same shape, else random; the prompt encoder and mask decoder are the teacher's unless the checkpoint has its own.

        A teacher whose decoder is not SAM's (SAM 2 and others) has none to lend: the student's then starts from random weights too."""
        from edgekd import checkpoint, students
        from edgekd.models.sam import Sam

        shape = getattr(teacher, "shape", None)
        student = students.build(name, image_size=image_size, embed_dim=teacher.embed_dim, shape=shape, preprocess=teacher.preprocess)
        if not isinstance(teacher, Sam):
            return student, f"random weights, the decoder's too: that of {teacher.name} is of another kind, so train it in a stage with prompts"
        student.prompt_encoder.load_state_dict(teacher.prompt_encoder.state_dict())
        student.mask_decoder.load_state_dict(teacher.mask_decoder.state_dict())
        path = students.weights_path(name, image_size)
        if path is None or checkpoint.read_meta(path).teacher != teacher.name:
            return student, "random weights under the teacher's own decoder"
        checkpoint.load_into(student, path)
        return student, f"shipped checkpoint {path.name}"

    def labelled(self, dataset: Dataset, teacher: Any) -> Dataset:
        """The data with instances: its own, or the teacher's masks of everything."""
        from edgekd.tasks.promptable.pseudo import pseudo_label

        return dataset if dataset.has_masks else pseudo_label(teacher, dataset)


task = PromptableSegmentation()
