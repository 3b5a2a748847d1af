"""Shared class vectors: student and teacher are compared by their similarities with the same frozen text embeddings (PromptKD, arXiv 2403.02781)."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.softmax import exact, soft_kl
from edgekd.distillation.vectors import class_vectors


class ClassVectors(Objective):
    """KL of the similarities with frozen class vectors (text embeddings), the student's through a projector.

    T^2 KL(softmax(scale cos(teacher, w) / T) || softmax(scale cos(projector(student), w) / T)) with `pooled` features and class vectors w.

    No labels are read. In the paper the student's prompts learn too; a plain vision student has none, so its backbone and the projector do.

    Args:
        vectors: file (C, D) .npy or .safetensors, one row a class; without one the teacher's own (its `class_vectors`, or its last linear layer).
        scale: CLIP's, 100.
    """

    name, family, paper = "class_vectors", "vlm_teacher", "PromptKD: Unsupervised Prompt Distillation for Vision-Language Models (arXiv 2403.02781)"
    needs = frozenset({"pooled"})
    least_at_teacher = False

    vectors: Tensor

    def __init__(self, vectors: str = "", scale: float = 100.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.path, self.scale, self.temperature = vectors, scale, temperature

    def bind(self, setup: Setup) -> None:
        """Reads the vectors and makes the projector into their space."""
        self.register_buffer("vectors", class_vectors(setup, self.name, self.path))
        self.projector = nn.Linear(setup.ours["pooled"].shape[1], self.vectors.shape[1])

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """pooled (B, D) -> (B,)."""
        ours, theirs = self.similarities(self.projector(student["pooled"])), self.similarities(teacher["pooled"])
        return soft_kl(ours, theirs, self.temperature)

    def similarities(self, pooled: Tensor) -> Tensor:
        """(B, D) -> logits (B, C)."""
        with exact(pooled):
            return self.scale * F.normalize(pooled.float(), dim=1) @ self.vectors.T


objective = ClassVectors
