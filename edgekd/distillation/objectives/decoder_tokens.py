"""The decoder's output tokens, absolute error: what the masks are made from, before they are made (TinySAM, arXiv 2312.13789)."""
from __future__ import annotations

from torch import Tensor

from edgekd.distillation.outputs import Context, Outputs
from edgekd.distillation.points import Objective


class DecoderTokens(Objective):
    """|ours - theirs| of the IoU token and the four mask tokens after the two-way transformer; the alternatives count for one click alone."""

    name, family, paper = "decoder_tokens", "prompt_in_the_loop", "TinySAM (arXiv 2312.13789)"
    needs = frozenset({"tokens"})

    def forward(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """tokens (P, 5, E): IoU, mask 0, three alternatives -> (P,)."""
        assert student.tokens is not None and teacher.tokens is not None and context.single is not None
        each = (student.tokens.float() - teacher.tokens.float()).abs().mean(2)
        several = context.single.to(each)
        return (each[:, :2].sum(1) + several * each[:, 2:].sum(1)) / (2 + 3 * several)


objective = DecoderTokens
