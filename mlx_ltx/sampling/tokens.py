"""Choosing tokens: text drawn from a language model, the same for the same seed on the same MLX backend."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import mlx.core as mx

from mlx_ltx.models.gemma import Gemma
from mlx_ltx.models.gemma_generate import Continuation, ImageTokens, ReadStep


@dataclass(frozen=True)
class TokenSampling:
    """How a token is drawn; the defaults are the reference's temperature and Gemma 3's own ``generation_config.json``.

    Attributes:
        temperature: of the softmax; 0 takes the likeliest token always.
        top_k: only so many of the likeliest tokens can be drawn.
        top_p: of these, only the likeliest that make up this probability together.
    """

    temperature: float = 0.7
    top_k: int = 64
    top_p: float = 0.95


def draw_token(logits: mx.array, sampling: TokenSampling, key: mx.array) -> mx.array:
    """One token from logits (1, vocab_size), as (1,): temperature first, then top-k, then top-p of what is left."""
    logits = logits.astype(mx.float32)
    if sampling.temperature == 0:
        return mx.argmax(logits, axis=-1)
    kept = min(sampling.top_k, logits.shape[-1])
    likeliest = mx.argpartition(-logits, kept - 1, axis=-1)[:, :kept]
    scores = mx.take_along_axis(logits, likeliest, axis=-1) / sampling.temperature
    order = mx.argsort(-scores, axis=-1)
    likeliest, scores = mx.take_along_axis(likeliest, order, -1), mx.take_along_axis(scores, order, -1)
    probabilities = mx.softmax(scores, axis=-1)
    likelier = mx.cumsum(probabilities, axis=-1) - probabilities
    scores = mx.where((likelier < sampling.top_p) | (likelier == 0), scores, -mx.inf)  # the first one always stays
    choice = mx.random.categorical(scores, key=key)
    return mx.take_along_axis(likeliest, choice[:, None], axis=-1)[:, 0]


def write_tokens(
    model: Gemma,
    input_ids: list[int],
    *,
    stop: Collection[int],
    limit: int,
    seed: int,
    sampling: TokenSampling = TokenSampling(),
    image: ImageTokens | None = None,
) -> Iterator[ReadStep | int]:
    """Continue a text: yields the progress of reading it, then each new token's id.

    Args:
        input_ids: the text so far.
        stop: tokens that end it; they are not given out.
        limit: the most tokens that are written.
        seed: the same seed writes the same text.
    """
    text = Continuation(model, len(input_ids) + limit)
    logits = yield from text.read(mx.array([input_ids]), image)
    key = mx.random.key(seed)

    def draw(logits: mx.array) -> mx.array:
        nonlocal key
        key, own = mx.random.split(key)
        token = draw_token(logits, sampling, own)
        mx.async_eval(token)
        return token

    token = draw(logits)
    for written in range(1, limit + 1):
        # the GPU works on the token after this one while this one is looked at
        following = draw(text.step(token)) if written < limit else None
        identity = token.item()
        assert isinstance(identity, int)
        if identity in stop:
            return
        yield identity
        if following is not None:
            token = following
