"""From the text model's hidden states to the features that the connectors read.

Both generations normalise every hidden state, lay the L states of a token side by side (flat index ``d * L + l``) and
project that wide vector (ltx_core/text_encoders/gemma/feature_extractor.py). They differ in the norm: over all tokens
of a prompt at once in the first generation, per token in the second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

EPSILON = 1e-6
RANGE_SCALE = 8.0
# Weights of this many outputs are float32 at a time: 0.4 GB at the published width of 188,160.
ROWS_AT_ONCE = 512
PER_TOKEN_SETTINGS = {
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_proj_input_norm": False,
    "caption_projection_second_linear": False,
}


class TextFeatures(NamedTuple):
    """Features of each modality's connector.

    Attributes:
        video: float32, (B, S, video width).
        audio: float32, (B, S, audio width); the same array as ``video`` in the first generation.
    """

    video: mx.array
    audio: mx.array


@dataclass(frozen=True)
class FeatureConfig:
    """Sizes of the feature extractor.

    Attributes:
        hidden_size, hidden_states: width and number of the text model's hidden states.
        video_dim: width of the features (of the video features, with ``per_token``).
        audio_dim: width of the audio features; None if audio shares those of video.
        per_token: normalise each token by itself and project once per modality (second generation), or normalise over
            the prompt and project once (first).
    """

    hidden_size: int
    hidden_states: int
    video_dim: int
    audio_dim: int | None
    per_token: bool

    @classmethod
    def from_metadata(cls, config: dict[str, Any], hidden_size: int, hidden_states: int) -> FeatureConfig:
        """Read the checkpoint's config; the sizes of the text model come from its own.

        Raises:
            ValueError: a projection that neither generation has is asked for.
        """
        transformer = config["transformer"]
        given = {key: transformer[key] for key in PER_TOKEN_SETTINGS if key in transformer}
        if not given:
            return cls(hidden_size, hidden_states, hidden_size, None, False)
        for key, supported in PER_TOKEN_SETTINGS.items():
            if key not in given:
                raise ValueError(f"{key} is absent although {min(given)} is given")
            if given[key] is not supported:
                raise ValueError(f"{key} is {given[key]!r}; only {supported!r} is supported")
        return cls(
            hidden_size,
            hidden_states,
            transformer["num_attention_heads"] * transformer["attention_head_dim"],
            transformer["audio_num_attention_heads"] * transformer["audio_attention_head_dim"],
            True,
        )


class FeatureExtractor(nn.Module):
    """Normalise all hidden states and project them, in float32 whatever the weights are.

    Weights may stay bfloat16: a slice of rows at a time becomes float32, so that no float32 copy of them is ever whole
    (it would be 3 GB for video) and each is read once, contiguously: 0.5 GB beyond the weights for 100 tokens, 1.6 GB
    for 1024. The text model is no longer needed at this point and can be gone, which summing over layers while it runs
    would not allow.
    """

    def __init__(self, config: FeatureConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size * config.hidden_states
        if config.audio_dim is None:
            self.aggregate_embed = nn.Linear(width, config.video_dim, bias=False)
        else:
            self.video_aggregate_embed = nn.Linear(width, config.video_dim)
            self.audio_aggregate_embed = nn.Linear(width, config.audio_dim)

    def __call__(self, states: Sequence[mx.array], mask: mx.array) -> TextFeatures:
        """Project one or more prompts; evaluates as it goes, to bound memory.

        Args:
            states: ``config.hidden_states`` arrays (B, S, hidden_size).
            mask: (B, S), 1 for tokens and 0 for padding, whose states are replaced by zeros after the norm.

        Returns:
            float32 features, in the order of the tokens given.

        Raises:
            ValueError: the number of states or their width is not the configured one.
        """
        config = self.config
        shapes = {tuple(state.shape) for state in states}
        if len(states) != config.hidden_states or len(shapes) != 1 or states[0].shape[-1] != config.hidden_size:
            raise ValueError(
                f"{len(states)} hidden states of shape {sorted(shapes)} do not fit "
                f"{config.hidden_states} of width {config.hidden_size}"
            )
        B, S, _ = states[0].shape
        valid = mask.astype(mx.bool_)[..., None]
        normalise = normalise_per_token if config.per_token else normalise_over_prompt
        normalised = [mx.where(valid, normalise(state.astype(mx.float32), valid), 0.0) for state in states]
        wide = mx.stack(normalised, axis=-1).reshape(B, S, -1)
        mx.eval(wide)
        del normalised
        if config.audio_dim is None:
            features = _project(wide, self.aggregate_embed)
            return TextFeatures(features, features)
        # the rescaling of the inputs commutes with the product, so one wide array serves both modalities
        return TextFeatures(
            _project(wide, self.video_aggregate_embed, math.sqrt(config.video_dim / config.hidden_size)),
            _project(wide, self.audio_aggregate_embed, math.sqrt(config.audio_dim / config.hidden_size)),
        )


def normalise_over_prompt(state: mx.array, valid: mx.array) -> mx.array:
    """``8 * (x - mean) / (max - min)`` with statistics over all valid tokens and channels of each prompt.

    Args:
        state: float32, (B, S, D).
        valid: boolean, (B, S, 1).
    """
    count = valid.sum(axis=(1, 2), keepdims=True).astype(mx.float32) * state.shape[-1]
    mean = mx.where(valid, state, 0.0).sum(axis=(1, 2), keepdims=True) / (count + EPSILON)
    low = mx.where(valid, state, mx.inf).min(axis=(1, 2), keepdims=True)
    high = mx.where(valid, state, -mx.inf).max(axis=(1, 2), keepdims=True)
    return RANGE_SCALE * (state - mean) / (high - low + EPSILON)


def normalise_per_token(state: mx.array, valid: mx.array) -> mx.array:
    """``x / sqrt(mean(x ** 2))`` over the channels of each token; arguments as for the norm over the prompt."""
    return mx.fast.rms_norm(state, None, EPSILON)


def _project(wide: mx.array, layer: nn.Linear, scale: float = 1.0) -> mx.array:
    parts = []
    for start in range(0, layer.weight.shape[0], ROWS_AT_ONCE):
        part = wide @ layer.weight[start : start + ROWS_AT_ONCE].astype(mx.float32).T
        mx.eval(part)  # so that only one slice of weights is float32 at a time
        parts.append(part)
    result = mx.concatenate(parts, axis=-1) * scale
    return result + layer.bias.astype(mx.float32) if "bias" in layer else result
