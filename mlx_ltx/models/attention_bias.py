"""Which tokens attend to which, and how strongly, without tables of tokens by tokens.

At 4K a clip has 130,000 tokens: a table of them all would be 34 GB. So what is added to attention logits is described
by a few numbers per token, and attention asks for some rows of it at a time.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np


class AttentionBias(Protocol):
    """What is added to the logits of attention from T queries to S keys."""

    def rows(self, first: int, last: int) -> mx.array:
        """Of the queries from ``first`` to before ``last``; broadcastable to (B, heads, last - first, S)."""
        ...


def logits_of(strengths: mx.array, dtype: mx.Dtype) -> mx.array:
    """What makes attention weaker by factors in [0, 1]: their logarithm, and the lowest number of ``dtype`` for 0."""
    smallest = float(np.finfo(np.float32).tiny)
    logits = mx.log(mx.maximum(strengths.astype(mx.float32), smallest))
    return mx.where(strengths > 0, logits, mx.finfo(dtype).min).astype(dtype)


class GroupBias(NamedTuple):
    """Attention by groups of tokens.

    Within a group tokens attend to each other fully. Group 0 and every other group attend to each other with the
    strength of the other group's token. Groups other than 0 do not see each other.

    Attributes:
        query_group, key_group: int32, (T,) and (S,).
        query_logits, key_logits: (T,) and (S,) in the dtype of activations: :func:`logits_of` the strengths, of which
            those of group 0 are 1.
    """

    query_group: mx.array
    query_logits: mx.array
    key_group: mx.array
    key_logits: mx.array

    @classmethod
    def among(cls, group: mx.array, strength: mx.array, dtype: mx.Dtype) -> GroupBias:
        """Of tokens with themselves, by group and strength (T,)."""
        logits = logits_of(strength, dtype)
        return cls(group, logits, group, logits)

    @classmethod
    def own_parts(cls, query_part: mx.array, key_part: mx.array, dtype: mx.Dtype) -> GroupBias:
        """Of queries that see only the keys of their own part; parts (T,) and (S,) count from 1."""
        none = (mx.zeros(part.shape, dtype) for part in (query_part, key_part))
        return cls(query_part, next(none), key_part, next(none))

    def rows(self, first: int, last: int) -> mx.array:
        """(1, 1, last - first, S)."""
        query, logits = self.query_group[first:last, None], self.query_logits[first:last, None]
        lowest = mx.array(mx.finfo(logits.dtype).min, logits.dtype)
        met = mx.where((query == 0) | (self.key_group == 0), logits + self.key_logits, lowest)
        return mx.where(query == self.key_group, mx.zeros_like(lowest), met)[None, None]
