"""Text path: tokeniser, Gemma 3 hidden states, feature extractors, connectors.

Hidden states are compared at the tokens only: those of padding depend on how an attention kernel treats an empty row,
and nothing reads them. ``text_25`` has no runner: it runs on Gemma 4.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.checkpoints.gemma import load_gemma
from mlx_ltx.checkpoints.keymaps import CONNECTORS, TEXT_PROJECTION
from mlx_ltx.checkpoints.loading import load_weights
from mlx_ltx.models.connectors import TextConnectors, right_padded_order
from mlx_ltx.models.gemma import all_hidden_states
from mlx_ltx.models.text_encoder import TextEncoder
from mlx_ltx.models.text_features import FeatureConfig, FeatureExtractor
from parity import Comparison, GoldenSet, runner

GEMMA_FOLDER = "gemma3_tiny"
Result = TypeVar("Result")


def finish(steps: Generator[Any, None, Result]) -> Result:
    """The return value of a generator whose progress nobody watches."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def load_features(checkpoint: SafetensorsFile, projection: SafetensorsFile, size: int, states: int) -> FeatureExtractor:
    """The extractor that the checkpoint's config asks for, with weights from the file that holds the projection."""
    config = FeatureConfig.from_metadata(checkpoint.config, size, states)
    return load_weights(FeatureExtractor(config), projection, TEXT_PROJECTION)


def load_connectors(checkpoint: SafetensorsFile) -> TextConnectors:
    return load_weights(TextConnectors.from_metadata(checkpoint.config), checkpoint, CONNECTORS)


def tokens_only(case: str, name: str, actual: mx.array, expected: np.ndarray, mask: np.ndarray) -> Comparison:
    """Compare the places of tokens alone; ``expected`` may hold only the last places of the sequence."""
    places = mask[:, -expected.shape[1] :].astype(bool)
    given = np.array(actual.astype(mx.float32))[:, -expected.shape[1] :]
    return Comparison(case, name, given[places], expected[places])


@runner("text_19b*", "text_23*")
def run_text(golden: GoldenSet) -> Iterator[Comparison]:
    """From the prompt's text to both encodings, padded as the reference does it and without padding as we do it."""
    text = load_gemma(golden.folder / GEMMA_FOLDER, mx.float32)
    config = text.model.config
    checkpoint = golden.checkpoint()
    features = load_features(checkpoint, checkpoint, config.hidden_size, config.hidden_states)
    connectors = load_connectors(checkpoint)
    for index, prompt in enumerate(golden.cases["prompts"]):
        case = str(index)
        tokens = text.tokenizer(prompt)
        mask = golden.tensors[f"{case}.attention_mask"]
        yield Comparison(case, "input_ids", np.array(tokens.input_ids), golden.tensors["input_ids"][index : index + 1])
        yield golden.compare(case, "attention_mask", tokens.mask)
        # 1. padded
        states = list(all_hidden_states(text.model, tokens.input_ids, tokens.mask))
        for layer, state in enumerate(states):
            expected = golden.tensors[f"{case}.hidden.{layer}"]
            yield tokens_only(case, f"hidden.{layer}", state, expected, mask)
        padded = connectors(*features(states, tokens.mask), tokens.mask)
        yield golden.compare(case, "video_encoding", padded.video)
        yield golden.compare(case, "audio_encoding", padded.audio)
        yield golden.compare(case, "out_mask", mx.ones(padded.video.shape[:2]))  # registers leave no padding
        # 2. without padding
        embeddings = finish(TextEncoder(text.model, features, connectors).encode(tokens.input_ids, tokens.mask))
        for name, value in (("video_encoding", embeddings.video), ("audio_encoding", embeddings.audio)):
            expected = golden.tensors[f"{case}.{name}"]
            yield Comparison(case, f"{name} (without padding)", np.array(value), expected)


@runner("connectors_19b*", "connectors_23*", "connectors_25*")
def run_connectors(golden: GoldenSet) -> Iterator[Comparison]:
    """Feature extractor and connectors on recorded hidden states."""
    checkpoint = golden.checkpoint(golden.name.replace("connectors_", "text_"))
    states = [golden.mx(f"hidden.{layer}") for layer in range(sum(n.startswith("hidden.") for n in golden.names))]
    mask = golden.mx("attention_mask")
    projection = checkpoint
    if not TEXT_PROJECTION.select(checkpoint.tensors):  # LTX-2.5 keeps it in the text encoder's file
        projection = SafetensorsFile(golden.folder / "gemma4_tiny_te.safetensors")
    features = load_features(checkpoint, projection, states[0].shape[-1], len(states))(states, mask)
    yield golden.compare("", "video_features", features.video)
    yield golden.compare("", "audio_features", features.audio)
    order = right_padded_order(mask)
    yield golden.compare("", "right_pad_sort_idx", order)
    embeddings = load_connectors(checkpoint)(*features, mask)
    yield golden.compare("", "video_encoding", embeddings.video)
    yield golden.compare("", "audio_encoding", embeddings.audio)
    yield golden.compare("", "binary_mask", mx.ones(mask.shape))  # registers leave no padding
