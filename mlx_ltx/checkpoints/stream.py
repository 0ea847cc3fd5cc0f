"""A transformer whose blocks are read from disk while it runs: each is there when it is needed, and gone afterwards.

Every forward pass gets its blocks from a transformer that has been loaded anew: its weights are lazy, so the loading
costs headers and no data, and whatever the loading does (casts, quantising, LoRAs, packs of other layouts) is done to
the same numbers in the same way as when weights stay in memory. That is why both give the same bits.

The next blocks are read on a stream of their own (MLX reads files on threads of its own there), at the same time as the
present one computes.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_ltx.models.transformer import Transformer
from mlx_ltx.models.transformer_block import Block


class BlockStream:
    """The blocks of one forward pass after another.

    It gives no block twice within a pass; the user drops each before it asks for the next, as
    :meth:`mlx_ltx.models.transformer.Transformer.take_blocks_from` says. Then ``1 + ahead`` blocks are in memory.

    Args:
        load: gives a transformer of which nothing has been evaluated, anew at every call.
        ahead: how many blocks are read while another one computes; 0 reads only what is needed at once.
    """

    def __init__(self, load: Callable[[], Transformer], ahead: int = 1):
        self.load = load
        self.ahead = ahead

    def __iter__(self) -> Iterator[Block]:
        stream = _reading_stream()
        with mx.stream(stream):
            waiting = deque(_without_drawing(self.load).blocks)
        read: deque[Block] = deque()
        while waiting or read:
            while waiting and len(read) <= self.ahead:
                block = waiting.popleft()
                mx.async_eval(block.parameters())
                read.append(block)
                del block
            yield read.popleft()


@functools.cache
def _reading_stream() -> mx.ThreadLocalStream:
    """One for the whole process; in each thread that uses it, a stream of that thread."""
    return mx.new_thread_local_stream(mx.default_device())


def _without_drawing(load: Callable[[], Transformer]) -> Transformer:
    """Load, and leave MLX's global random numbers as they were.

    New layers draw first weights, lazily, which the checkpoint's replace: each loading would make the chain of keys
    that has yet to be computed longer by thousands.
    """
    state: Any = mx.random.state
    high, low = state[0].tolist()
    try:
        return load()
    finally:
        mx.random.seed(high << 32 | low)


def evaluate_ends(model: Transformer) -> None:
    """Read everything of a model but its blocks."""
    parameters = tree_flatten(model.parameters())
    assert isinstance(parameters, list)
    mx.eval([value for path, value in parameters if not path.startswith("blocks.")])
