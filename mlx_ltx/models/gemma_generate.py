"""Gemma 3 as a writer: reads a text once, then continues it token by token.

The head is the embedding itself (Gemma ties them). Keys and values of what was read are kept, so that a further token
costs one row; the numbers are those of reading everything again.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

import mlx.core as mx

from mlx_ltx.models.gemma import FULL, Gemma, KeyValues, causal_mask


class ReadStep(NamedTuple):
    """Progress: ``done`` of ``total`` layers have read the text."""

    done: int
    total: int


class ImageTokens(NamedTuple):
    """An image as the text model reads it.

    Attributes:
        features: (1, n, hidden_size), what the vision tower and its projector gave; they are not scaled as embeddings.
        first: place of the first of its n tokens in the text.
    """

    features: mx.array
    first: int


class Continuation:
    """One text that grows: read its beginning with :meth:`read`, then :meth:`step` with each further token.

    Args:
        model: the text model; a text encoder may go on using it.
        capacity: how many tokens the text will have at most.
    """

    def __init__(self, model: Gemma, capacity: int):
        self.model = model
        config = model.config
        self.past = [KeyValues(capacity, self._window(layer_type)) for layer_type in config.layer_types]
        self.length = 0

    def read(self, input_ids: mx.array, image: ImageTokens | None = None) -> Generator[ReadStep, None, mx.array]:
        """Read the beginning, evaluating layer by layer so that no GPU command buffer grows long.

        Args:
            input_ids: (1, S), without padding.
            image: what replaces the embeddings of its tokens. These see each other in both directions, as in training.

        Returns:
            The logits of the next token, (1, vocab_size) (as the generator's return value).

        Raises:
            ValueError: no token, more than one text, an image that sticks out of the text, or a second beginning.
        """
        B, S = input_ids.shape
        if B != 1 or S == 0 or self.length:
            raise ValueError(f"reading begins once, with one text that has tokens, not with {input_ids.shape}")
        model, config = self.model, self.model.config
        everything = mx.ones((1, S), dtype=mx.bool_)
        full, sliding = causal_mask(everything, None), causal_mask(everything, config.sliding_window)
        h = model.embed(input_ids)
        if image is not None:
            end = image.first + image.features.shape[1]
            if image.first < 0 or end > S:
                raise ValueError(f"the image's tokens {image.first} to {end} are not all among the text's {S}")
            h = mx.concatenate([h[:, : image.first], image.features.astype(h.dtype), h[:, end:]], axis=1)
            place = mx.arange(S)
            inside = (place >= image.first) & (place < end)
            both = inside[:, None] & inside[None, :]
            full, sliding = full | both, sliding | both
        for index, (layer, layer_type) in enumerate(zip(model.layers, config.layer_types, strict=True)):
            h = layer(h, full if layer_type == FULL else sliding, 0, self.past[index])
            mx.eval(h)
            yield ReadStep(index + 1, config.num_hidden_layers)
        self.length = S
        return self._logits(h)

    def step(self, token: mx.array) -> mx.array:
        """Add one token, (1,) integers; returns the logits of the next, (1, vocab_size), lazily.

        Raises:
            ValueError: nothing was read before, or the room is full.
        """
        if not self.length:
            raise ValueError("read the beginning first")
        h = self.model.embed(token[:, None])
        for layer, past in zip(self.model.layers, self.past, strict=True):
            h = layer(h, None, self.length, past)  # all that the past gives may be looked at
        self.length += 1
        return self._logits(h)

    def _window(self, layer_type: str) -> int | None:
        return None if layer_type == FULL else self.model.config.sliding_window

    def _logits(self, h: mx.array) -> mx.array:
        return self.model.embed_tokens.as_linear(self.model.norm(h[:, -1]))
