"""Two heads for few labels: one follows the labels, the other the vision-language teacher, on a shared backbone (DHO, arXiv 2505.07675)."""
from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective
from edgekd.distillation.softmax import label_loss, same_classes, soft_kl


class DHO(Objective):
    """Cross-entropy with the labels on one head, KL to the teacher on another.

    (1 - mix) x cross-entropy of the labels' head (0 for a photo without a label) + mix x T^2 KL(teacher || teacher's head).

    One of the heads is the student's own, which is exported; the other is a linear one on `pooled` that ends with the training. At inference the
    paper adds up both heads' probabilities (`combined`): that is for evaluation while training, an exported student has its own head alone.

    Args:
        own: what the student's own head follows, "labels" or "teacher"; with one label in a hundred the teacher's is the better one.
        mix: weight of the teacher's head.
    """

    name, family, paper = "dho", "vlm_teacher", "Semi-supervised Distillation from VLMs via Dual-Head Optimization (arXiv 2505.07675)"
    needs = frozenset({"logits", "pooled", "classes"})
    least_at_teacher = False

    def __init__(self, own: Literal["labels", "teacher"] = "labels", mix: float = 0.5, temperature: float = 2.0) -> None:
        super().__init__()
        self.own, self.mix, self.temperature = own, mix, temperature

    def bind(self, setup: Setup) -> None:
        """Makes the second head."""
        self.head = nn.Linear(setup.ours["pooled"].shape[1], same_classes(setup, self.name))

    def heads(self, student: Outputs) -> tuple[Tensor, Tensor]:
        """Logits (B, C) of the head of the labels and of the teacher's."""
        own, other = student["logits"].float(), self.head(student["pooled"]).float()
        return (own, other) if self.own == "labels" else (other, own)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """logits (B, C), pooled (B, D) -> (B,)."""
        labels, distilled = self.heads(student)
        return (1 - self.mix) * label_loss(labels, context) + self.mix * soft_kl(distilled, teacher["logits"], self.temperature)

    def combined(self, student: Outputs, share: float = 0.5, temperature: float = 1.0) -> Tensor:
        """Probabilities (B, C) of both heads together, `share` of them the teacher's head's, softened by `temperature`."""
        labels, distilled = self.heads(student)
        return (1 - share) * labels.softmax(1) + share * (distilled / temperature).softmax(1)


objective = DHO
