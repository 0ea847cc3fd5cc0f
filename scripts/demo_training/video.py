"""The demo's video autoencoder: trained on pieces of scenes at both sizes of the two-stage pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
import mlx.nn as nn
import numpy as np

import demo_scenes
from demo_training.layout import CONFIG
from demo_weights.autoencoders import put_video_vae
from demo_weights.tensors import Tensors, save
from mlx_ltx.checkpoints.components import load_video_decoder, load_video_encoder
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.training.autoencoders import decode_video, encode_video, picture_loss

PIECES = (9, 9, 9, 17)  # frames of training clips, in turn
BATCH = 4
BOUNCING = 0.5  # so many of the clips, and some others, bounce: what is fast is smeared the longest
NOISE = 0.1  # on latents, whose standard deviation is near 1
SMALLNESS = 1e-3
SHAPE_WEIGHT = 4.0
BRIGHTNESS = 1.5  # how much of what norms see at first does not depend on the picture


class VideoAutoencoder(nn.Module):
    """Encoder and decoder, beginning as those of the untrained demo, which already enlarge smoothly."""

    def __init__(self, seed: int = 1):
        super().__init__()
        named = Tensors(seed)
        put_video_vae(named, CONFIG["vae"])
        with TemporaryDirectory() as folder:
            path = Path(folder) / "initial.safetensors"
            save(path, named.values, {"config": json.dumps(CONFIG)}, lambda name: True)
            file = SafetensorsFile(path)
            self.encoder, self.decoder = load_video_encoder(file, mx.float32), load_video_decoder(file, mx.float32)
            mx.eval(self.parameters())
        mx.random.seed(seed)
        channels = self.encoder.config.latent_channels
        for side in (self.encoder, self.decoder):
            side.statistics.mean, side.statistics.std = mx.zeros(channels), mx.ones(channels)
            side.statistics.freeze()
            # Without biases, norms would make all greys the same: most of what is to be told apart at first.
            side.conv_in.conv.bias = BRIGHTNESS * mx.random.normal(side.conv_in.conv.bias.shape)


def loss(module: VideoAutoencoder, video: mx.array, key: mx.array) -> dict[str, mx.array]:
    """Of frames (B, F, H, W, 3) in [-1, 1].

    Latents get a fixed little noise, and are kept from growing out of it: with a learnt amount the autoencoder ends up
    with nothing but noise before it has learnt anything.
    """
    latent = encode_video(module.encoder, video).mean
    noisy = latent + NOISE * mx.random.normal(latent.shape, key=key)
    picture = picture_loss(decode_video(module.decoder, noisy), video, 1 + SHAPE_WEIGHT * shape_mask(video))
    return {"picture": picture, "size": SMALLNESS * mx.mean(mx.square(latent))}


def shape_mask(video: mx.array) -> mx.array:
    """Where frames (B, F, H, W, 3) differ much from their clip's mean colour: about 1 on a shape, 0 on the background.

    Shapes are a tenth of the picture; without more weight the background is learnt first, and they come late.
    """
    different = mx.abs(video - video.mean(axis=(1, 2, 3), keepdims=True)).max(axis=-1, keepdims=True)
    return mx.clip(2 * different - 0.8, 0, 1)


def pixels(frames: np.ndarray) -> mx.array:
    """uint8 to [-1, 1]."""
    return mx.array(frames.astype(np.float32) / 127.5 - 1)


def training_scene(seed: int) -> demo_scenes.Scene:
    """The scene of a seed, which bounces more often than others do."""
    bounces = np.random.default_rng([seed, 75]).random() < BOUNCING
    return demo_scenes.make_scene(seed, motion="bounce" if bounces else None)


def piece(seed: int, frames: int, whole: bool) -> np.ndarray:
    """Consecutive frames of a scene, uint8 (F, H, W, 3): the whole picture at half its size, or a quarter of it."""
    scene, rng = training_scene(seed), np.random.default_rng([seed, 72])
    start = int(rng.integers(scene.frames - frames + 1))
    shown, height, width = range(start, start + frames), demo_scenes.HEIGHT // 2, demo_scenes.WIDTH // 2
    if whole:
        return demo_scenes.draw(scene, width, height, shown)
    top, left = int(rng.integers(height + 1)), int(rng.integers(width + 1))
    return demo_scenes.draw(scene, shown=shown)[:, top : top + height, left : left + width]


def batch(number: int) -> mx.array:
    """Pieces of both kinds, so that the autoencoder serves both stages of the two-stage pipeline."""
    first, frames = 1_000_000 + BATCH * number, PIECES[number % len(PIECES)]
    return pixels(np.stack([piece(seed, frames, seed % 2 == 0) for seed in range(first, first + BATCH)]))
