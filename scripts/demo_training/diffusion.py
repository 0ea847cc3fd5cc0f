"""The demo's latent upsampler and transformer, trained on encoded scenes."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from demo_training.latents import FULL, EncodedScenes, Encoders, grids
from demo_training.layout import CONFIG, UPSAMPLER_CONFIG
from demo_training.stage import Stage, optimization
from mlx_ltx.models.statistics import ChannelStatistics
from mlx_ltx.models.transformer import Transformer, TransformerConfig
from mlx_ltx.models.upsampler import LatentUpsampler, UpsamplerConfig
from mlx_ltx.sampling.denoise import TextContext
from mlx_ltx.training.flow import Batch, FlowLoss, NoiseLevels

UPSAMPLER_BATCH = 4
# A step has a batch of half-size clips, which are cheap and say all about content, and one for the second stage and for
# one stage alone; they take the same time.
HALF_BATCH, FULL_BATCH = 12, 3
NO_CAPTION, NEGATIVE = 0.08, 0.04  # how often a caption is left out, or replaced by the pipelines' negative prompt
FIRST_FRAME = 0.1
SEPARATE_EVERY = 7  # batches in which picture and sound have noise levels of their own


class Upsampler(nn.Module):
    """The network with the statistics that it works between."""

    def __init__(self, folder: Path, seed: int = 1):
        super().__init__()
        mx.random.seed(seed)
        self.network = LatentUpsampler(UpsamplerConfig.from_metadata(UPSAMPLER_CONFIG))
        self.statistics: ChannelStatistics = Encoders(folder).video.encoder.statistics
        self.statistics.freeze()


def upsampler_loss(module: Upsampler, pair: tuple[mx.array, mx.array], key: mx.array) -> dict[str, mx.array]:
    """Of normalised latents (B, F, H, W, C) at half and at full size; drafts have errors, so noise is added."""
    half, full = pair
    noisy = half + 0.1 * mx.random.normal(half.shape, key=key)
    made = module.statistics.normalize(module.network(module.statistics.denormalize(noisy)))
    return {"latent": mx.mean(mx.square(made - full))}


def upsampler_stage(folder: Path) -> Stage:
    scenes = EncodedScenes(folder)

    def batch(number: int) -> tuple[mx.array, mx.array]:
        chosen = np.random.default_rng([number, 81]).integers(len(scenes), size=UPSAMPLER_BATCH)
        return scenes.take("half", chosen), scenes.take("full", chosen)

    return Stage("upsampler", Upsampler(folder), upsampler_loss, batch, optimization(400, 1e-3, muon=5e-3))


def make_transformer(seed: int = 1) -> Transformer:
    """The transformer as it begins: as MLX draws layers, but predicting nothing, with gates between nothing and all."""
    mx.random.seed(seed)
    model = Transformer(TransformerConfig.from_metadata(CONFIG))
    for stream in (model.video, model.audio):
        stream.proj_out.weight = mx.zeros_like(stream.proj_out.weight)
        stream.proj_out.bias = mx.zeros_like(stream.proj_out.bias)
    for block in model.blocks:
        for stream in (block.video, block.audio):
            # Rows are shift, scale, gate, three times; the fifth row between the streams is a gate.
            table = np.zeros(stream.scale_shift_table.shape, np.float32)
            table[2::3] = 0.5
            stream.scale_shift_table = mx.array(table)
            cross = np.zeros(stream.cross_scale_shift_table.shape, np.float32)
            cross[4] = 0.5
            stream.cross_scale_shift_table = mx.array(cross)
    return model


class SceneBatches:
    """Batches of encoded scenes by number, at both sizes."""

    def __init__(self, scenes: EncodedScenes):
        self.scenes = scenes
        self.grids = {"half": grids(FULL.halved()), "full": grids(FULL)}

    def __call__(self, number: int) -> Batch:
        size, count = (("half", HALF_BATCH), ("full", FULL_BATCH))[number % 2]
        rng = np.random.default_rng([number, 82])
        chosen = rng.integers(len(self.scenes), size=count)
        video_grid, audio_grid = self.grids[size]
        left_out = rng.random(len(chosen))
        texts = [self._text(f"text.{stream}", chosen, left_out) for stream in ("video", "audio")]
        return Batch(
            TextContext(*texts),
            self.scenes.take(size, chosen),
            self.scenes.take("audio", chosen),
            video_grid,
            audio_grid,
        )

    def _text(self, name: str, chosen: np.ndarray, left_out: np.ndarray) -> mx.array:
        texts = self.scenes.arrays[name][chosen].astype(np.float32)
        empty, negative = self.scenes.no_caption[name]
        texts[left_out < NO_CAPTION] = empty
        texts[(left_out >= NO_CAPTION) & (left_out < NO_CAPTION + NEGATIVE)] = negative
        return mx.array(texts)


class BothLosses:
    """Mostly one noise level for picture and sound; now and then one for each, for sound that is given."""

    def __init__(self) -> None:
        levels = NoiseLevels(std=1.5, uniform_prob=0.2)  # wide: few-step schedules are decided near 1
        self.joint = FlowLoss(levels, FIRST_FRAME)
        self.separate = FlowLoss(levels, FIRST_FRAME, separate_sigmas=True)

    def __call__(self, model: nn.Module, batch: Batch, key: mx.array) -> dict[str, mx.array]:
        # The key is the batch's, so this choice is too.
        drawn = mx.random.randint(0, SEPARATE_EVERY, key=key).item()
        return (self.separate if drawn == 0 else self.joint)(model, batch, key)


def transformer_stage(folder: Path) -> Stage:
    batches = SceneBatches(EncodedScenes(folder))
    settings = optimization(6000, 1e-3, 0.995, muon=3e-2, batches=2)
    return Stage("transformer", make_transformer(), BothLosses(), batches, settings)
