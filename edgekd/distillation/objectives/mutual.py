"""Two networks learn together, each from the other's logits (Deep Mutual Learning, arXiv 1706.00384)."""
from __future__ import annotations

from torch import Tensor

from edgekd.distillation.copies import Peer, towards
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective


class Mutual(Objective):
    """KL(peer || student) + KL(student || peer) + taught x KL(teacher || peer), times T^2, the target of each without gradient. The peer has the
    student's shape and other random weights, and is thrown away. In the paper both learn from labels besides; here the student does from
    the stage's other objectives and the peer from the teacher.

    Args:
        temperature: of all softmaxes.
        taught: weight of the teacher for the peer.
        reset: start the peer from other random weights than the student's.
    """

    name, family, paper = "mutual", "mutual", "Deep Mutual Learning (arXiv 1706.00384)"
    needs = frozenset({"logits", "images"})
    least_at_teacher = False

    def __init__(self, temperature: float = 1.0, taught: float = 1.0, reset: bool = True) -> None:
        super().__init__()
        self.temperature, self.taught, self.reset = temperature, taught, reset

    def bind(self, setup: Setup) -> None:
        """Make the peer."""
        self.peer = Peer(setup.student, reset=self.reset)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """logits (B, C) -> (B,)."""
        assert context.images is not None
        ours, theirs = student["logits"], self.peer(context.images)["logits"]
        both = towards(ours, theirs, self.temperature) + towards(theirs, ours, self.temperature)
        return both + self.taught * towards(theirs, teacher["logits"], self.temperature)


objective = Mutual
