"""When lazily built work is computed: the one place that decides it for denoising."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationPolicy:
    """Evaluation points of the transformer.

    The macOS watchdog kills command buffers that keep the GPU busy for seconds; a block of the full model is far below.
    Progress, cancelling and the memory of streamed weights follow the same points.

    Attributes:
        blocks: how many blocks are computed at a time; more are fewer, larger command buffers.
        ahead: of streamed weights, how many blocks are read before they are needed. 1 is enough to read and compute at
            the same time; ``blocks + ahead`` blocks are in memory.

    Raises:
        ValueError: a number is out of range.
    """

    blocks: int = 1
    ahead: int = 1

    def __post_init__(self) -> None:
        if self.blocks < 1 or self.ahead < 0:
            raise ValueError(f"an evaluation policy of {self.blocks} blocks, {self.ahead} ahead")

    def due(self, done: int, total: int) -> bool:
        """Whether to evaluate after ``done`` of ``total`` block evaluations; always after the last."""
        return done % self.blocks == 0 or done == total
