"""Promptable segmentation: a photo and a prompt in, a mask out. The task of the SAM family."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.protocols import PROMPTABLE

if TYPE_CHECKING:
    import numpy as np

    from edgekd.artifact import Manifest
    from edgekd.checkpoint import Meta
    from edgekd.protocols import Component, Dataset
    from edgekd.tasks.evaluation import Judge
    from edgekd.tasks.promptable.exported import ArtifactModel
    from edgekd.tasks.promptable.parity import Reference
    from edgekd.tasks.promptable.predict import Prediction


class PromptableSegmentation:
    """Teachers and students are `edgekd.models.sam.Sam`, or offer the same (`edgekd.protocols.Promptable`)."""

    name = PROMPTABLE
    summary = "a photo and a point or box in, a mask out"
    outputs = frozenset({"embedding", "masks", "iou", "tokens", "truth", "boxes", "instances", "feats", "attention", "images", "teachers"})
    parts = ("encoder", "decoder", "prompt_encoder", "proposer")
    photo_component = "encoder"
    compared_by = "miou"

    # --- models

    def listed(self, kind: str) -> list[dict[str, Any]]:
        """Every teacher and student of the SAM family."""
        from edgekd import students, teachers

        shelf: Any = teachers if kind == "teachers" else students
        return [{"name": name, **shelf.describe(name)} for name in shelf.names()]

    def knows(self, reference: str) -> bool:
        """Whether it is a teacher's name, weights of the SAM family, or a checkpoint of ours."""
        from edgekd import teachers

        return reference in teachers.names() or teachers.is_weights(reference)

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

    def student_name(self, name: str) -> str:
        """The canonical spelling of a student's name."""
        from edgekd import students

        return str(students.parse(name))

    def labelled(self, dataset: Dataset, teacher: Any) -> Dataset:
        """The data with instances: its own, or the teacher's masks of everything."""
        from edgekd.tasks.promptable.pseudo import pseudo_label

        return dataset if dataset.has_masks else pseudo_label(teacher, dataset)

    # --- checkpoints

    def header(self, model: Any) -> dict[str, Any]:
        """Sizes of the decoder, and of the proposer where there is one."""
        from edgekd.models.proposer import BoxProposer

        found = model.proposer
        sizes = {"embed_dim": found.embed_dim, "width": found.width, "depth": found.depth} if isinstance(found, BoxProposer) else None
        return {"shape": asdict(model.shape), "proposer": sizes}

    def build(self, meta: Meta) -> Any:
        """The untrained model that a header describes; its proposer is added when it is filled."""
        from edgekd.models.sam import DecoderShape

        if meta.kind == "teacher":
            from edgekd import teachers, zoo

            if meta.name in zoo.SPECS:
                return zoo.build(meta.name, device="meta", image_size=meta.image_size)
            return teachers.build(meta.name)
        from edgekd import students

        sizes: dict[str, Any] = dict(meta.shape)
        return students.build(meta.name, image_size=meta.image_size, shape=DecoderShape(**sizes), preprocess=meta.preprocess)

    # --- artifacts

    def components(self, model: Any, signature: str = "batched") -> dict[str, Component]:
        """Encoder, decoder, and the proposer where there is one."""
        from edgekd.models.embedded_decoder import embedded_component
        from edgekd.models.official_decoder import official_component
        from edgekd.models.sam import components

        others = {"sam": official_component, "embedded": embedded_component}
        return components(model) | ({"decoder": others[signature](model)} if signature in others else {})

    def answers(self, model: Any, images: Any) -> dict[str, Any]:
        """The embedding, and masks of two seeded prompts on the first image."""
        import numpy as np
        import torch

        from edgekd.probes import probe

        prompts = probe("points", 2, model.preprocess.side, np.random.default_rng(0))
        embedding = model.embed(images)
        return {"embedding": embedding, "masks": model.decode(embedding[:1], torch.from_numpy(prompts.points), torch.from_numpy(prompts.labels))[0]}

    def reference(self, model: Any, images: np.ndarray, signature: str = "batched") -> Reference:
        """The model's own embeddings and masks, of four images at most."""
        from edgekd.tasks.promptable.parity import Reference

        return Reference(model, images[:4], signature=signature)

    def open(self, folder: Path, manifest: Manifest, *, threads: int | None = None, stand_in: bool = False) -> ArtifactModel:
        """An exported promptable model."""
        from edgekd.tasks.promptable.exported import ArtifactModel

        return ArtifactModel(folder, manifest, threads=threads, stand_in=stand_in)

    # --- use

    def evaluate(self, model: Any, dataset: Dataset, *, teacher: Any = None, progress: Any = None, metrics: Sequence[str] | None = None,
                 max_instances: int | None = None, boxes: str | None = None, **options: Any) -> Any:
        """mIoU of boxes and clicks, or with `boxes` COCO's AP (`edgekd.tasks.promptable.scoring`, `.detection`); photos without masks are
        labelled by the teacher, when there is one, and their name says so."""
        from edgekd.errors import UsageError
        from edgekd.tasks.promptable import detection, scoring
        from edgekd.tasks.promptable.metrics import DEFAULT_GROUPS, check_groups

        groups = check_groups(DEFAULT_GROUPS if metrics is None else metrics)
        if boxes is not None and metrics is not None:
            raise UsageError("boxes give AP and nothing else", hint="leave out --metrics, or --boxes")
        dataset = dataset if teacher is None else self.labelled(dataset, teacher)
        if boxes is not None:
            return detection.detection_ap(model, dataset, boxes=None if boxes == "truth" else boxes, progress=progress)
        most = scoring.MAX_INSTANCES if max_instances is None else max_instances
        return scoring.evaluate(model, dataset, metrics=groups, teacher=teacher, max_instances=most, progress=progress, **options)

    def predict(self, model: Any, image: Path, output: Path | None, **prompt: Any) -> Prediction:
        """The mask that a prompt means, written to `output`."""
        from edgekd.errors import UsageError
        from edgekd.tasks.promptable.predict import predict_file

        if output is None:
            raise UsageError("there is no file to write the mask to", hint="give one with --output mask.png")
        return predict_file(model, image, output, **prompt)

    def judge(self, source: Any, dataset: Dataset) -> Judge:
        """mIoU of boxes and centre clicks, and the overlap with the source's own masks."""
        from edgekd.tasks.promptable.judging import judge

        return judge(source, dataset)


task = PromptableSegmentation()
