"""Flow matching: noise, noise levels, targets and the loss (ltx_trainer/{timestep_samplers,training_strategies}).

A clean latent x and noise e are mixed to ``(1 - sigma) x + sigma e``; the transformer learns the velocity ``e - x``.
https://arxiv.org/abs/2210.02747
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ltx.models.passes import StreamInput, StreamRope
from mlx_ltx.models.transformer import Transformer
from mlx_ltx.sampling.conditioning import Reference
from mlx_ltx.sampling.denoise import TextContext
from mlx_ltx.sampling.geometry import AudioGrid, VideoGrid
from mlx_ltx.sampling.state import LatentState, audio_state, video_state
from mlx_ltx.training.forward import checkpointed_blocks

# The shift of the logit-normal distribution at two lengths, and on the line through them at others.
SHIFTS = ((1024, 0.95), (4096, 2.05))
# Quantiles of the normal distribution (0.5% and 99.9%) that are stretched to 0 and 1.
LOWEST, HIGHEST = -2.5758, 3.0902


@dataclass(frozen=True)
class NoiseLevels:
    """How noise levels are drawn.

    Attributes:
        mode: "shifted_logit_normal", more noise for more tokens, or "uniform".
        std: of the normal distribution under the logit-normal.
        eps: smaller levels are reflected at it.
        uniform_prob: so many levels are uniform instead, so that no level is left out.
        min_value, max_value: of the mode "uniform".
    """

    mode: str = "shifted_logit_normal"
    std: float = 1.0
    eps: float = 1e-3
    uniform_prob: float = 0.1
    min_value: float = 0.0
    max_value: float = 1.0

    def draw(self, key: mx.array, count: int, tokens: int) -> mx.array:
        """``count`` levels in [0, 1], float32, for clips of so many tokens."""
        first, second, third = mx.random.split(key, 3)
        if self.mode == "uniform":
            return self.min_value + (self.max_value - self.min_value) * mx.random.uniform(shape=(count,), key=first)
        shift = shift_for_tokens(tokens)
        drawn = mx.sigmoid(mx.random.normal((count,), key=first) * self.std + shift)
        lowest, highest = (1 / (1 + np.exp(-(shift + end * self.std))) for end in (LOWEST, HIGHEST))
        stretched = (drawn - float(lowest)) / float(highest - lowest)
        stretched = mx.where(stretched >= self.eps, stretched, 2 * self.eps - stretched)
        uniform = self.eps + (1 - self.eps) * mx.random.uniform(shape=(count,), key=second)
        chosen = mx.random.uniform(shape=(count,), key=third) > self.uniform_prob
        return mx.where(chosen, mx.clip(stretched, 0, 1), uniform)


def shift_for_tokens(tokens: int) -> float:
    """The mean of the normal distribution under the logit-normal, for clips of so many tokens."""
    (short, low), (long, high) = SHIFTS
    return low + (high - low) * (tokens - short) / (long - short)


@dataclass(frozen=True)
class Batch:
    """Samples of one shape, clean.

    Attributes:
        text: embeddings as the transformer reads them, (B, S, dim) per stream.
        video: (B, F, H, W, C) normalised latents, or None to train without picture.
        audio: (B, T, M, C) normalised latents, or None to train without sound.
        video_grid, audio_grid: their grids.
        reference: (B, F, H, W, C) latents of the videos that an IC-LoRA follows, or None.
        downscale: how many times smaller than the clip the reference is.
    """

    text: TextContext
    video: mx.array | None = None
    audio: mx.array | None = None
    video_grid: VideoGrid | None = None
    audio_grid: AudioGrid | None = None
    reference: mx.array | None = None
    downscale: int = 1

    @property
    def samples(self) -> int:
        return self.text.video.shape[0]


class Noised(NamedTuple):
    """One stream's input, and what is to be predicted from it.

    Attributes:
        target: float32 (B, T, C), the velocity; tokens of a reference come after the last one and have none.
        weight: float32 (B, T), 0 for tokens that are given, 1 for others.
    """

    given: StreamInput
    target: mx.array
    weight: mx.array


class FlowLoss:
    """The loss of a batch; made once per training, whose position tables it keeps.

    Args:
        levels: how noise levels are drawn.
        first_frame_probability: so often, sample by sample, a clip's first latent frame is given, as in image to video.
        separate_sigmas: picture and sound have noise levels of their own, instead of the same.
        sound_given_probability: so often, sample by sample, the sound is given whole, as in audio to video.
        picture_given_probability: so often the picture is, for a sound that belongs to it; never both.
        checkpointing: keep only what enters the blocks for the gradient, and compute each block again for it.
    """

    def __init__(
        self,
        levels: NoiseLevels = NoiseLevels(),
        first_frame_probability: float = 0.0,
        separate_sigmas: bool = False,
        sound_given_probability: float = 0.0,
        picture_given_probability: float = 0.0,
        checkpointing: bool = False,
    ):
        self.levels = levels
        self.first_frame_probability = first_frame_probability
        self.separate_sigmas = separate_sigmas
        self.sound_given_probability = sound_given_probability
        self.picture_given_probability = picture_given_probability
        self.checkpointing = checkpointing
        self._tables: dict[Hashable, tuple[LatentState, StreamRope]] = {}

    def __call__(self, model: nn.Module, batch: Batch, key: mx.array) -> dict[str, mx.array]:
        """One float32 scalar per stream: the mean squared error of the velocity over tokens that are not given."""
        assert isinstance(model, Transformer)
        video, audio = self.noise(model, batch, key)
        with checkpointed_blocks(model, self.checkpointing):
            velocities = model(None if video is None else video.given, None if audio is None else audio.given)
        losses = {}
        for name, noised, velocity in (("video", video, velocities.video), ("audio", audio, velocities.audio)):
            if noised is not None and velocity is not None:
                losses[name] = velocity_loss(velocity, noised)
        return losses

    def noise(self, model: Transformer, batch: Batch, key: mx.array) -> tuple[Noised | None, Noised | None]:
        """Draw noise and noise levels for a batch."""
        video_level, audio_level, video_noise, audio_noise = mx.random.split(key, 4)
        video = audio = None
        sigma = None
        noised_video, noised_audio = self._noised(batch, mx.random.split(audio_level)[1])
        if batch.video is not None:
            assert batch.video_grid is not None
            tokens = batch.video_grid.patchify(batch.video).astype(mx.float32)
            sigma = self.levels.draw(video_level, batch.samples, tokens.shape[1])
            state, rope = self._table(model, batch, batch.video_grid)
            video = self._video(batch, batch.video_grid, tokens, sigma * noised_video, state, rope, video_noise)
            video = video._replace(weight=video.weight * noised_video[:, None])
        if batch.audio is not None:
            assert batch.audio_grid is not None
            tokens = batch.audio_grid.patchify(batch.audio).astype(mx.float32)
            if sigma is None or self.separate_sigmas:
                sigma = self.levels.draw(audio_level, batch.samples, tokens.shape[1])
            sigma = sigma * noised_audio
            _, rope = self._table(model, batch, batch.audio_grid)
            noise = mx.random.normal(tokens.shape, key=audio_noise)
            given = StreamInput(mix(tokens, noise, sigma), sigma, sigma[:, None], batch.text.audio, rope)
            audio = Noised(given, noise - tokens, mx.ones(tokens.shape[:2]) * noised_audio[:, None])
        return video, audio

    def _noised(self, batch: Batch, key: mx.array) -> tuple[mx.array, mx.array]:
        """Of picture and sound, float32 (B,): 1 for samples in which it is noised, 0 where it is given whole."""
        sound, picture = self.sound_given_probability, self.picture_given_probability
        drawn = mx.random.uniform(shape=(batch.samples,), key=key)
        if batch.video is None or batch.audio is None or not sound + picture:
            return mx.ones_like(drawn), mx.ones_like(drawn)
        picture_given = (drawn >= sound) & (drawn < sound + picture)
        return 1 - picture_given.astype(mx.float32), 1 - (drawn < sound).astype(mx.float32)

    def _video(
        self,
        batch: Batch,
        grid: VideoGrid,
        tokens: mx.array,
        sigma: mx.array,
        state: LatentState,
        rope: StreamRope,
        key: mx.array,
    ) -> Noised:
        noise_key, frame_key = mx.random.split(key)
        noise = mx.random.normal(tokens.shape, key=noise_key)
        B, T, _ = tokens.shape
        given = mx.zeros((B, T), mx.bool_)
        if self.first_frame_probability > 0 and grid.frames > 1:
            chosen = mx.random.uniform(shape=(B, 1), key=frame_key) < self.first_frame_probability
            given = chosen & (mx.arange(T) < grid.tokens_per_frame)
        mixed = mx.where(given[..., None], tokens, mix(tokens, noise, sigma))
        level = given
        if batch.reference is not None:
            reference = grid.patchify(batch.reference).astype(mx.float32)
            mixed = mx.concatenate([mixed, reference], axis=1)
            level = mx.concatenate([given, mx.ones(reference.shape[:2], mx.bool_)], axis=1)
        two = batch.reference is not None or self.first_frame_probability > 0
        levels = mx.stack([sigma, mx.zeros_like(sigma)], axis=1) if two else sigma[:, None]
        keyframes = None if state.keyframes is None else mx.array(state.keyframes)[None]
        stream = StreamInput(
            mixed,
            sigma,
            levels,
            batch.text.video,
            rope,
            level_of_token=level.astype(mx.int32) if two else None,
            keyframes_mask=keyframes,
        )
        return Noised(stream, noise - tokens, 1 - given.astype(mx.float32))

    def _table(self, model: Transformer, batch: Batch, grid: VideoGrid | AudioGrid) -> tuple[LatentState, StreamRope]:
        """Positions of a grid and their rotary tables, made once."""
        reference = batch.reference.shape[1:] if batch.reference is not None else None
        key = (grid, reference, batch.downscale)
        if key not in self._tables:
            if isinstance(grid, VideoGrid):
                items = []
                if reference is not None:
                    items.append(Reference(mx.zeros((1, *reference)), downscale=batch.downscale))
                state = video_state(grid, items)
                rope, _ = model.rope(state.positions, None)
            else:
                state = audio_state(grid)
                _, rope = model.rope(None, state.positions)
            assert rope is not None
            mx.eval(rope.own, rope.cross)
            # Only positions and marks are wanted.
            self._tables[key] = replace(state, latent=mx.zeros((1, 0, 1)), clean=mx.zeros((1, 0, 1))), rope
        return self._tables[key]


def mix(clean: mx.array, noise: mx.array, sigma: mx.array) -> mx.array:
    """Tokens (B, T, C) at noise levels (B,)."""
    level = sigma[:, None, None]
    return (1 - level) * clean + level * noise


def velocity_loss(velocity: mx.array, noised: Noised) -> mx.array:
    """The mean over samples of each sample's mean squared error over the tokens that count, float32."""
    error = mx.square(velocity[:, : noised.target.shape[1]].astype(mx.float32) - noised.target).mean(axis=-1)
    counted = mx.maximum(noised.weight.sum(axis=1), 1e-8)
    return ((error * noised.weight).sum(axis=1) / counted).mean()
