"""Gradient checkpointing: a block's inside is computed again when its gradient is due (https://arxiv.org/abs/1604.06174).

What stays in memory from the forward pass is what enters each block; beside it, one block at a time.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from mlx_ltx.models.attention import KeysValues
from mlx_ltx.models.passes import Perturbation
from mlx_ltx.models.transformer import Transformer
from mlx_ltx.models.transformer_block import Block, Modulation, StreamState

# What a gradient flows through into a block; everything else in a stream's state is a constant.
TRACED = ("x", "modulation", "context", "prompt_modulation", "cross_modulation", "cross_gate")


class CheckpointedBlock:
    """A block that keeps nothing of its inside for the gradient."""

    def __init__(self, block: Block):
        self.block = block

    def __call__(
        self,
        video: StreamState | None,
        audio: StreamState | None,
        index: int,
        perturbations: Sequence[Perturbation],
        texts: dict[Hashable, KeysValues] | None = None,
    ) -> tuple[StreamState | None, StreamState | None]:
        """As the block itself; arguments that are traced have to be the function's own, or lose their gradient."""
        states = (video, audio)

        def inside(parameters: dict[str, Any], arrays: list[dict[str, mx.array]]) -> list[mx.array]:
            self.block.update(parameters)
            after = self.block(_with(video, arrays[0]), _with(audio, arrays[1]), index, perturbations)
            return [state.x for state in after if state is not None]

        hidden = iter(mx.checkpoint(inside)(self.block.trainable_parameters(), list(map(_arrays, states))))
        after_video, after_audio = (None if state is None else state._replace(x=next(hidden)) for state in states)
        return after_video, after_audio


@contextmanager
def checkpointed_blocks(model: Transformer, enabled: bool = True) -> Iterator[None]:
    """Inside, the model's forward passes keep only what enters each block."""
    if enabled:
        model.take_blocks_from([CheckpointedBlock(block) for block in model.blocks])  # type: ignore[misc]
    try:
        yield
    finally:
        if enabled:
            model.take_blocks_from(model.blocks)


def _arrays(state: StreamState | None) -> dict[str, mx.array]:
    found = {}
    for name in TRACED if state is not None else ():
        value = getattr(state, name)
        if value is not None:
            found[name] = value.values if isinstance(value, Modulation) else value
    return found


def _with(state: StreamState | None, arrays: dict[str, mx.array]) -> StreamState | None:
    if state is None:
        return None
    changes: dict[str, Any] = {}
    for name, array in arrays.items():
        value = getattr(state, name)
        changes[name] = value._replace(values=array) if isinstance(value, Modulation) else array
    return state._replace(**changes)
