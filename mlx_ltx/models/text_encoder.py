"""From the tokens of one prompt to what the transformer attends to, step by step.

The hidden states of padding are never used: its features are replaced by registers. So only the tokens themselves go
through the text model, at their rotary positions. The numbers are those of the padded run (up to float32 rounding),
for a tenth of the work with a prompt of 100 tokens.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ltx.models.connectors import TextConnectors, TextEmbeddings
from mlx_ltx.models.gemma import Gemma, all_hidden_states
from mlx_ltx.models.text_features import FeatureExtractor


class EncodeStep(NamedTuple):
    """Progress: ``done`` of ``total`` evaluated steps of one part, ``"read"`` (the text model) or ``"embed"``."""

    part: str
    done: int
    total: int


class PromptStates(NamedTuple):
    """What the text model made of a prompt.

    Attributes:
        states: evaluated hidden states (1, tokens, hidden_size), without padding.
        length: the length that the embeddings will have, of tokens and padding together.
    """

    states: list[mx.array]
    length: int


def read_prompt(model: Gemma, input_ids: mx.array, mask: mx.array) -> Generator[EncodeStep, None, PromptStates]:
    """Run the text model over one prompt, evaluating layer by layer; the generator's return value is the result.

    Args:
        input_ids: (1, S), padded.
        mask: (1, S), 1 for the tokens and 0 for padding; the tokens are one run.

    Raises:
        ValueError: more than one prompt, no token, or padding between tokens.
    """
    valid = np.flatnonzero(np.array(mask)[0])
    if mask.shape[0] != 1 or input_ids.shape != mask.shape:
        raise ValueError(f"one prompt at a time: input_ids {input_ids.shape} and mask {mask.shape} are not (1, S)")
    if valid.size == 0 or valid[-1] - valid[0] + 1 != valid.size:
        raise ValueError("the tokens of a prompt must be one run without padding between them")
    first, end = int(valid[0]), int(valid[-1]) + 1
    states: list[mx.array] = []
    for state in all_hidden_states(model, input_ids[:, first:end], mask[:, first:end], first_position=first):
        mx.eval(state)
        states.append(state)
        yield EncodeStep("read", len(states), model.config.hidden_states)
    return PromptStates(states, mask.shape[1])


def embed_prompt(
    features: FeatureExtractor, connectors: TextConnectors, prompt: PromptStates
) -> Generator[EncodeStep, None, TextEmbeddings]:
    """Project and connect one prompt's hidden states; the text model is not needed any more.

    Returns:
        The evaluated embeddings (as the generator's return value).
    """
    total = 1 + len(connectors.video.transformer_1d_blocks) + len(connectors.audio.transformer_1d_blocks)
    tokens = prompt.states[0].shape[1]
    projected = features(prompt.states, mx.ones((1, tokens), dtype=mx.int32))
    mx.eval(projected)
    yield EncodeStep("embed", 1, total)
    # tokens first, then padding, as the connectors want it
    padding = [(0, 0), (0, prompt.length - tokens), (0, 0)]
    mask = (mx.arange(prompt.length) < tokens)[None]
    done = 1
    results = []
    for connector, values in ((connectors.video, projected.video), (connectors.audio, projected.audio)):
        result = mx.pad(values, padding)
        for x in connector.blocks(result, mask):
            mx.eval(x)
            result = x
            done += 1
            yield EncodeStep("embed", done, total)
        results.append(result)
    return TextEmbeddings(video=results[0], audio=results[1])


@dataclass
class TextEncoder:
    """The text model, the feature extractor and the connectors together, for one prompt at a time.

    To have the text model out of memory before the projections come in, use :func:`read_prompt` for every prompt, drop
    the model, and then use :func:`embed_prompt`.
    """

    gemma: Gemma
    features: FeatureExtractor
    connectors: TextConnectors

    def encode(self, input_ids: mx.array, mask: mx.array) -> Generator[EncodeStep, None, TextEmbeddings]:
        """Encode one padded prompt, (1, S) each; yields progress and returns the evaluated embeddings."""
        prompt = yield from read_prompt(self.gemma, input_ids, mask)
        return (yield from embed_prompt(self.features, self.connectors, prompt))
