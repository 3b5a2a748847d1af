"""Image and text embeddings of a vision-language teacher, both as targets of the student's features (VL2V-ADiP, arXiv 2310.08255)."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.softmax import exact, target_class
from edgekd.distillation.vectors import class_vectors


class VL2V(Objective):
    """Cosine distance to the teacher's image embedding and to the text vector of the photo's class.

    1 - image x cos(projector(student), teacher) - (1 - image) x cos(projector(student), w_y), with `pooled` features and the class vector w
    of the photo's class y: the data's where it says one, else the vector nearest to the teacher's feature.

    The paper trains the projector first and the backbone after it: two stages, the first with `trainable: [head]`; here one objective.

    Args:
        vectors: file (C, D) .npy or .safetensors, one row a class; without one the teacher's own (its `class_vectors`, or its last linear layer).
        image: weight of the teacher's image embedding.
    """

    name, family, paper = "vl2v", "vlm_teacher", "Distilling from Vision-Language Models for Improved OOD Generalization (arXiv 2310.08255)"
    needs = frozenset({"pooled"})
    least_at_teacher = False

    vectors: Tensor

    def __init__(self, vectors: str = "", image: float = 0.5, labels: bool = True) -> None:
        super().__init__()
        self.path, self.image, self.labels = vectors, image, labels

    def bind(self, setup: Setup) -> None:
        """Reads the vectors and makes the projector into their space."""
        self.register_buffer("vectors", class_vectors(setup, self.name, self.path))
        self.projector = nn.Linear(setup.ours["pooled"].shape[1], self.vectors.shape[1])

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """pooled (B, D) -> (B,)."""
        ours, theirs = self.projector(student["pooled"]).float(), teacher["pooled"].float()
        with exact(theirs):
            near = theirs @ self.vectors.T
        text = self.vectors[target_class(context, near, self.labels)]
        return 1 - self.image * F.cosine_similarity(ours, theirs) - (1 - self.image) * F.cosine_similarity(ours, text)


objective = VL2V
