"""The demo's text side: tokeniser, Gemma 3, text projection and connectors.

They learn to tell what a caption says: small classifiers read the scene's colour, shape, motion, background and size
from the embeddings that the transformer will see, while Gemma also learns to continue captions. The classifiers are
thrown away; what is left gives embeddings in which these things are easy to find, also for sentences it has not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tokenizers import Tokenizer

import demo_scenes
from demo_scenes import BACKGROUNDS, COLOURS, MOTIONS, RADII, SHAPES, Scene
from demo_training.layout import CONFIG, GEMMA, TEXT_LENGTH
from demo_weights.text import SENTENCES, gemma_config, make_tokenizer
from mlx_ltx.models.attention import rms_norm
from mlx_ltx.models.connectors import TextConnectors, TextEmbeddings
from mlx_ltx.models.gemma import Gemma, GemmaConfig, all_hidden_states
from mlx_ltx.models.text_features import FeatureConfig, FeatureExtractor
from mlx_ltx.pipelines.defaults import NEGATIVE_PROMPT

BATCH = 16
LEARNED_SENTENCES = 4000

# What is read from an embedding, with its possible values.
ATTRIBUTES: dict[str, tuple[str | None, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "motion": MOTIONS,
    "background": tuple(BACKGROUNDS),
    "end": (None, *BACKGROUNDS),
    "size": tuple(RADII),
}


@cache
def tokenizer() -> Tokenizer:
    captions = [demo_scenes.make_scene(4_000_000 + seed).caption for seed in range(LEARNED_SENTENCES)]
    return make_tokenizer([*SENTENCES.strip().splitlines(), NEGATIVE_PROMPT, *captions])


def tokens(captions: Sequence[str]) -> tuple[mx.array, mx.array]:
    """Token ids and a mask, (B, S) each, S as long as the longest caption, padding last."""
    ids = [tokenizer().encode(caption).ids[:TEXT_LENGTH] for caption in captions]
    longest = max(map(len, ids))
    mask = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in ids], np.int32)
    return mx.array(np.array([row + [0] * (longest - len(row)) for row in ids], np.int32)), mx.array(mask)


class Text(NamedTuple):
    """A batch of captions, with what they say: each attribute's index among its values, (B,)."""

    input_ids: mx.array
    mask: mx.array
    says: dict[str, mx.array]


class Reader(nn.Module):
    """Finds the attributes in embeddings: one question per attribute, answered by attention over all places."""

    def __init__(self, dim: int):
        super().__init__()
        self.questions = 0.1 * mx.random.normal((len(ATTRIBUTES), dim))
        self.answers = [nn.Linear(dim, len(values)) for values in ATTRIBUTES.values()]

    def __call__(self, embedding: mx.array) -> list[mx.array]:
        places = mx.softmax(embedding @ self.questions.T, axis=1)
        found = places.swapaxes(1, 2) @ embedding
        return [answer(found[:, index]) for index, answer in enumerate(self.answers)]


class TextSide(nn.Module):
    def __init__(self, seed: int = 1):
        super().__init__()
        mx.random.seed(seed)
        config = GemmaConfig.from_metadata(gemma_config(GEMMA))
        self.gemma = Gemma(config)
        self.gemma.embed_tokens.weight = mx.random.normal(self.gemma.embed_tokens.weight.shape) * 0.1
        self.features = FeatureExtractor(FeatureConfig.from_metadata(CONFIG, config.hidden_size, config.hidden_states))
        self.connectors = TextConnectors.from_metadata(CONFIG)
        for connector in (self.connectors.video, self.connectors.audio):
            connector.learnable_registers = 0.5 * mx.random.normal(connector.learnable_registers.shape)
        self.readers = [Reader(self.features.config.video_dim), Reader(self.features.config.audio_dim)]

    def states(self, input_ids: mx.array, mask: mx.array) -> list[mx.array]:
        return list(all_hidden_states(self.gemma, input_ids, mask))

    def embed(self, input_ids: mx.array, mask: mx.array, states: list[mx.array] | None = None) -> TextEmbeddings:
        """(B, TEXT_LENGTH, dim) for both streams."""
        states = self.states(input_ids, mask) if states is None else states
        features = self.features(states, mask)
        padding = [(0, 0), (0, TEXT_LENGTH - mask.shape[1])]
        wide = [mx.pad(each, [*padding, (0, 0)]) for each in features]
        return self.connectors(*wide, mx.pad(mask, padding))


def loss(module: TextSide, text: Text, key: mx.array) -> dict[str, mx.array]:
    states = module.states(text.input_ids, text.mask)
    # 1. the next token, from the last state
    logits = states[-1][:, :-1] @ module.gemma.embed_tokens.weight.T
    unlike = nn.losses.cross_entropy(logits, text.input_ids[:, 1:], reduction="none")
    counted = text.mask[:, 1:].astype(mx.float32)
    language = (unlike * counted).sum() / counted.sum()
    # 2. what the caption says, from the embeddings
    says = mx.array(0.0)
    embeddings = module.embed(text.input_ids, text.mask, states)
    for embedding, reader in zip(embeddings, module.readers, strict=True):
        noisy = embedding + 0.3 * mx.random.normal(embedding.shape, key=key)
        for name, answer in zip(ATTRIBUTES, reader(rms_norm(noisy)), strict=True):
            says = says + nn.losses.cross_entropy(answer, text.says[name], reduction="mean")
    return {"says": says, "language": 0.3 * language}


def said(scene: Scene) -> dict[str, Any]:
    """The attributes as far as the caption tells them: a size that is not named is the medium one."""
    values = {name: getattr(scene, name) for name in ATTRIBUTES}
    return values | ({"size": "medium"} if scene.motion in ("grow", "shrink") else {})


def batch(number: int) -> Text:
    scenes = [demo_scenes.make_scene(4_000_000 + BATCH * number + index) for index in range(BATCH)]
    says = {
        name: mx.array([values.index(said(scene)[name]) for scene in scenes]) for name, values in ATTRIBUTES.items()
    }
    return Text(*tokens([scene.caption for scene in scenes]), says)


def embed_captions(side: TextSide, captions: Sequence[str], at_once: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """float16 embeddings (N, TEXT_LENGTH, dim) for both streams."""
    found = []
    for first in range(0, len(captions), at_once):
        embeddings = side.embed(*tokens(captions[first : first + at_once]))
        found.append([np.array(each.astype(mx.float16)) for each in embeddings])
    video, audio = zip(*found, strict=True)
    return np.concatenate(video), np.concatenate(audio)
