"""What one evaluation of the transformer leaves for a later one, which then need not go through the blocks."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_ltx.models.passes import PassInput
from mlx_ltx.models.transformer_block import Block, StreamState

Streams = tuple[StreamState | None, StreamState | None]


class StepMemory:
    """What the blocks added to each stream in each of the passes that were made together.

    Attributes:
        table: the first block's scales and shifts of self-attention, (2, dim) of the first stream that there is; None
            before the first evaluation.
        residuals: per pass and stream, (B, T, dim); None for a stream that is not there.
    """

    def __init__(self) -> None:
        self.table: mx.array | None = None
        self.residuals: list[list[mx.array | None]] = []

    def see_first(self, block: Block, given: PassInput) -> None:
        """Remember the first block's table: later evaluations may have no weights of it."""
        stream = block.video if given.video is not None else block.audio
        self.table = stream.scale_shift_table[:2]

    def see_passes(self, before: Sequence[Streams], after: Sequence[Streams]) -> None:
        """Remember what the blocks made of each pass."""
        self.residuals = [
            [None if old is None or new is None else new.x - old.x for old, new in zip(entering, leaving, strict=True)]
            for entering, leaving in zip(before, after, strict=True)
        ]

    def after(self, passes: Sequence[Streams]) -> list[Streams]:
        """Other inputs of the same passes as the blocks would leave them, had they added the same."""
        results: list[Streams] = []
        for streams, residuals in zip(passes, self.residuals, strict=True):
            video, audio = (
                state if state is None or residual is None else state._replace(x=state.x + residual)
                for state, residual in zip(streams, residuals, strict=True)
            )
            results.append((video, audio))
        return results
