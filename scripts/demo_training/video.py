"""The demo's video autoencoder: trained on pieces of scenes at both sizes of the two-stage pipeline."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

import demo_scenes
from demo_training.layout import CONFIG
from demo_training.loop import Losses
from mlx_ltx.models.video_vae import VideoDecoder, VideoEncoder, VideoVaeConfig
from mlx_ltx.training.autoencoders import decode_video, encode_video, picture_loss

PIECE = 17  # frames of a training clip
BATCH = 4
DIVERGENCE = 1e-4
FIRST_LOG_VARIANCE = -5.0


class VideoAutoencoder(nn.Module):
    def __init__(self, seed: int = 1):
        super().__init__()
        mx.random.seed(seed)
        config = VideoVaeConfig.from_metadata(CONFIG)
        self.encoder, self.decoder = VideoEncoder(config), VideoDecoder(config)
        for side in (self.encoder, self.decoder):
            side.statistics.freeze()
        # Little noise on latents at first, or there is nothing to learn from.
        self.encoder.conv_out.conv.bias = mx.zeros(config.latent_channels + 1).at[-1].add(FIRST_LOG_VARIANCE)

    def loss(self, video: mx.array, key: mx.array) -> Losses:
        """Of frames (B, F, H, W, 3) in [-1, 1]."""
        moments = encode_video(self.encoder, video)
        picture = picture_loss(decode_video(self.decoder, moments.sample(key)), video)
        divergence = moments.divergence()
        return {"loss": picture + DIVERGENCE * divergence, "picture": picture, "divergence": divergence}


def pixels(frames: np.ndarray) -> mx.array:
    """uint8 to [-1, 1]."""
    return mx.array(frames.astype(np.float32) / 127.5 - 1)


def piece(seed: int, whole: bool) -> np.ndarray:
    """Some consecutive frames of a scene, uint8 (F, H, W, 3): the whole picture at half its size, or a quarter of it."""
    scene, rng = demo_scenes.make_scene(seed), np.random.default_rng([seed, 72])
    start = int(rng.integers(scene.frames - PIECE + 1))
    shown, height, width = range(start, start + PIECE), demo_scenes.HEIGHT // 2, demo_scenes.WIDTH // 2
    if whole:
        return demo_scenes.draw(scene, width, height, shown)
    top, left = int(rng.integers(height + 1)), int(rng.integers(width + 1))
    return demo_scenes.draw(scene, shown=shown)[:, top : top + height, left : left + width]


def batch(step: int) -> mx.array:
    """Pieces of both kinds, so that the autoencoder serves both stages of the two-stage pipeline."""
    first = 1_000_000 + BATCH * step
    return pixels(np.stack([piece(seed, seed % 2 == 0) for seed in range(first, first + BATCH)]))
