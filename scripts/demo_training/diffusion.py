"""The demo's latent upsampler and transformer, trained on encoded scenes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from demo_training.latents import SIZES, EncodedScenes, Encoders, grids, pools, training_scene
from demo_training.layout import CONFIG, UPSAMPLER_CONFIG
from demo_training.stage import Stage, optimization
from mlx_ltx.models.statistics import ChannelStatistics
from mlx_ltx.models.transformer import Transformer, TransformerConfig
from mlx_ltx.models.upsampler import LatentUpsampler, UpsamplerConfig
from mlx_ltx.sampling.denoise import TextContext
from mlx_ltx.sampling.schedules import REFINEMENT
from mlx_ltx.training.flow import Batch, FlowLoss, Noised, NoiseLevels

GRIDS = {size: grids(clip) for size, clip in SIZES.items()}
UPSAMPLER_BATCH = 4
# Half-size clips are cheap and say all about content; full-size ones are for outlines, which take the longest to learn.
# A batch of either takes the same time.
HALF_BATCH, FULL_BATCH = 12, 3
HALF_EVERY = 3
# So many are taken from the scenes that all bounce, and from those that all rotate.
ONE_MOTION = {"bounce": 0.2, "rotate": 0.4}
OFTEN = {"circle": 0.6, "square": 1.0, "triangle": 1.0, "star": 1.8}  # the more corners, the longer it takes
NO_CAPTION, NEGATIVE = 0.08, 0.04  # how often a caption is left out, or replaced by the pipelines' negative prompt
FIRST_FRAME = 0.1
# In so many batches picture and sound have noise levels of their own; there, so often one of them is whole.
SEPARATE = {"half": 0.65, "full": 0.25}
SOUND_GIVEN, PICTURE_GIVEN = 0.25, 0.5
# In so many, outlines are to be mended, at the noise levels of the distilled pipeline's second stage.
FEW_STEPS = {"half": 0.15, "full": 0.45}
DISTORTION = (-0.4, 0.8)  # there, shapes are so far on their way to another one; below 0 they are as they are


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

    return Stage("upsampler", Upsampler(folder), upsampler_loss, batch, optimization(12000, 1e-3, muon=1.2e-2))


def make_transformer(seed: int = 1) -> Transformer:
    """The transformer as it begins: as MLX draws layers, but every branch adds nothing yet, and nothing is predicted.

    The gates of attention stay open, untrained: a branch that only disturbs at first is otherwise shut by its gates for
    good, before it has learnt anything. That cut off the text for the most part, and picture and sound from each other.
    """
    mx.random.seed(seed)
    model = Transformer(TransformerConfig.from_metadata(CONFIG))
    for ends in (model.video, model.audio):
        modulations = (ends.adaln_single, ends.prompt_adaln_single, ends.cross_adaln, ends.cross_gate_adaln)
        for linear in (ends.proj_out, *(modulation.linear for modulation in modulations)):
            _make_zero(linear)
    for block in model.blocks:
        for stream in (block.video, block.audio):
            for attention in (stream.attn1, stream.attn2, stream.cross_attn):
                _make_zero(attention.to_out)
                _make_zero(attention.to_gate_logits)
                attention.to_gate_logits.freeze()
            _make_zero(stream.ff.down)
            # Rows are shift, scale, gate, three times; the fifth row between the streams is a gate.
            table = np.zeros(stream.scale_shift_table.shape, np.float32)
            table[2::3] = 0.5
            stream.scale_shift_table = mx.array(table)
            cross = np.zeros(stream.cross_scale_shift_table.shape, np.float32)
            cross[4] = 0.5
            stream.cross_scale_shift_table = mx.array(cross)
    return model


def _make_zero(linear: nn.Linear) -> None:
    linear.weight, linear.bias = mx.zeros_like(linear.weight), mx.zeros_like(linear.bias)


@dataclass(frozen=True, kw_only=True)
class SceneBatch(Batch):
    """Scenes of one size, and the latents of the same ones with other shapes in them."""

    other: mx.array


def chances(scenes: int) -> np.ndarray:
    """How likely each of so many scenes is to be the next one."""
    found = {name: numbers for name, numbers in pools(scenes).items() if numbers}
    shares = {name: ONE_MOTION[name] for name in found if name != "varied"}
    shares["varied"] = 1 - sum(shares.values())
    often = {name: np.array([OFTEN[training_scene(index).shape] for index in each]) for name, each in found.items()}
    return np.concatenate([shares[name] * each / each.sum() for name, each in often.items()])


class SceneBatches:
    """Batches of encoded scenes by number, at both sizes."""

    def __init__(self, scenes: EncodedScenes):
        self.scenes = scenes
        self.chances = chances(len(scenes))

    def __call__(self, number: int) -> SceneBatch:
        size, count = ("half", HALF_BATCH) if number % HALF_EVERY == 0 else ("full", FULL_BATCH)
        rng = np.random.default_rng([number, 82])
        chosen = rng.choice(len(self.scenes), size=count, p=self.chances)
        video_grid, audio_grid = GRIDS[size]
        left_out = rng.random(len(chosen))
        texts = [self._text(f"text.{stream}", chosen, left_out) for stream in ("video", "audio")]
        return SceneBatch(
            TextContext(*texts),
            self.scenes.take(size, chosen),
            self.scenes.take("audio", chosen),
            video_grid,
            audio_grid,
            other=self.scenes.take(f"other.{size}", chosen),
        )

    def _text(self, name: str, chosen: np.ndarray, left_out: np.ndarray) -> mx.array:
        texts = self.scenes.arrays[name][chosen].astype(np.float32)
        empty, negative = self.scenes.no_caption[name]
        texts[left_out < NO_CAPTION] = empty
        texts[(left_out >= NO_CAPTION) & (left_out < NO_CAPTION + NEGATIVE)] = negative
        return mx.array(texts)


class StepLevels(NoiseLevels):
    """Noise levels of the distilled pipeline's second stage, which has no later step to mend what one gets wrong."""

    def draw(self, key: mx.array, count: int, tokens: int) -> mx.array:
        return mx.array(REFINEMENT[:-1])[mx.random.randint(0, len(REFINEMENT) - 1, (count,), key=key)]


class FewSteps(FlowLoss):
    """The loss of steps that mend outlines.

    Drafts are blunter than scenes, and so is what a step makes of them; from a scene's own latents under noise a model
    only learns to trust what it sees. Here the noise is over something between the scene and the same with a circle in
    it (with corners, if it has a circle itself), and the caption alone says what it should be.
    """

    def noise(self, model: Transformer, batch: SceneBatch, key: mx.array) -> tuple[Noised, Noised]:
        key, distortion_key = mx.random.split(key)
        distortion = mx.maximum(
            0, mx.random.uniform(*DISTORTION, shape=(batch.samples, 1, 1, 1, 1), key=distortion_key)
        )
        seen = batch.video + distortion * (batch.other - batch.video)
        video, audio = super().noise(model, replace(batch, video=seen), key)
        clean = batch.video_grid.patchify(batch.video)
        latent = mx.where(video.weight[..., None] > 0, video.given.latent, clean)
        target = (latent - clean) / video.given.sigma[:, None, None]
        return video._replace(given=replace(video.given, latent=latent), target=target), audio


class BothLosses:
    """One noise level for picture and sound, as when both are made, anywhere or where a few steps start; or one for
    each, and one of them may be given.

    With one level, each shows through its own noise most of what the other could tell.
    """

    def __init__(self) -> None:
        levels = NoiseLevels(std=1.5, uniform_prob=0.2)  # wide: few-step schedules are decided near 1
        noisy = NoiseLevels("uniform", min_value=0.5)
        self.joint = FlowLoss(levels, FIRST_FRAME)
        self.separate = FlowLoss(noisy, FIRST_FRAME, True, SOUND_GIVEN, PICTURE_GIVEN)
        self.few_steps = FewSteps(StepLevels(), FIRST_FRAME)

    def __call__(self, model: nn.Module, batch: SceneBatch, key: mx.array) -> dict[str, mx.array]:
        # The key is the batch's, so this choice is too.
        drawn = mx.random.uniform(key=key).item()
        size = "half" if batch.video_grid == GRIDS["half"][0] else "full"
        if drawn < SEPARATE[size]:
            return self.separate(model, batch, key)
        return (self.few_steps if drawn < SEPARATE[size] + FEW_STEPS[size] else self.joint)(model, batch, key)


def transformer_stage(folder: Path) -> Stage:
    batches = SceneBatches(EncodedScenes(folder))
    settings = optimization(6000, 1e-3, 0.995, muon=1e-2, batches=2, within="blocks.")
    return Stage("transformer", make_transformer(), BothLosses(), batches, settings)
