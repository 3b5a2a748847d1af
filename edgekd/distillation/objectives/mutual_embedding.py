"""Two networks learn together, each from the other's embedding: Deep Mutual Learning (arXiv 1706.00384) where there are no logits."""
from __future__ import annotations

from torch import Tensor

from edgekd.distillation.copies import Peer, map_error
from edgekd.distillation.outputs import Context, Outputs, Setup
from edgekd.distillation.points import Objective


class MutualEmbedding(Objective):
    """MSE(student, peer) + MSE(peer, student) + taught x MSE(peer, teacher) of the embeddings over the photo, the second of each without
    gradient. The peer has the student's shape and other random weights, and is thrown away. The paper compares logits.

    Args:
        taught: weight of the teacher for the peer.
        reset: start the peer from other random weights than the student's.
    """

    name, family, paper = "mutual_embedding", "mutual", "Deep Mutual Learning (arXiv 1706.00384), on embeddings"
    needs = frozenset({"embedding", "images"})
    least_at_teacher = False

    def __init__(self, taught: float = 1.0, reset: bool = True) -> None:
        super().__init__()
        self.taught, self.reset = taught, reset

    def bind(self, setup: Setup) -> None:
        """Make the peer."""
        self.peer = Peer(setup.student, reset=self.reset)

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """embeddings (B, E, s, s) -> (B,)."""
        assert context.images is not None
        ours, theirs = student["embedding"], self.peer(context.images)["embedding"]
        both = map_error(ours, theirs, context.valid) + map_error(theirs, ours, context.valid)
        return both + self.taught * map_error(theirs, teacher["embedding"], context.valid)


objective = MutualEmbedding
