"""Forward passes and losses for training the convolutional autoencoders.

The networks of ``mlx_ltx.models`` run piece by piece and evaluate as they go. Here the same layers see a clip at once,
lazily, with convolutions as matrix products, whose gradients are fast on the CPU backend: forwards and backwards take
about a third of the time there.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_ltx.models.attention import rms_norm
from mlx_ltx.models.audio_vae import AudioEncoder
from mlx_ltx.models.video_vae import VideoDecoder, VideoEncoder
from mlx_ltx.models.video_vae_blocks import (
    Downsample,
    PaddedConv,
    ResnetBlock,
    ResnetGroup,
    Upsample,
    activate,
    depth_to_space,
    patchify,
    space_to_depth,
    unpatchify,
)


class Moments(NamedTuple):
    """The distribution of latents that an encoder predicts, not normalised: mean and logarithm of the variance."""

    mean: mx.array
    log_variance: mx.array

    def sample(self, key: mx.array) -> mx.array:
        noise = mx.random.normal(self.mean.shape, key=key)
        return self.mean + mx.exp(0.5 * self.log_variance) * noise

    def divergence(self) -> mx.array:
        """Mean Kullback-Leibler divergence from the standard normal distribution, per value."""
        variance = mx.exp(self.log_variance)
        return 0.5 * mx.mean(mx.square(self.mean) + variance - 1 - self.log_variance)


def convolve_whole(x: mx.array, conv: nn.Conv3d) -> mx.array:
    """A 3x3x3 convolution without stride of an array (B, T + 2, H, W, C) that has its context in time, zeros in space.

    One matrix product per tap, summed.
    """
    _, T, H, W, _ = x.shape
    x = mx.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)])
    result = conv.bias
    for t, row, column in product(range(3), repeat=3):
        piece = x[:, t : t + T - 2, row : row + H, column : column + W]
        result = result + piece @ conv.weight[:, t, row, column].T
    return result


def _check(conv: PaddedConv) -> None:
    if conv.padding != "zeros" or conv.conv.stride != (1, 1, 1):
        raise ValueError("only convolutions with zero padding and without stride can be trained")


def causal(x: mx.array, conv: PaddedConv) -> mx.array:
    """The convolution as encoders do it: nothing later is seen, the first frame stands before the clip."""
    _check(conv)
    return convolve_whole(mx.concatenate([x[:, :1], x[:, :1], x], axis=1), conv.conv)


def centred(x: mx.array, conv: PaddedConv) -> mx.array:
    """The convolution as decoders do it: the first and the last frame stand around the clip."""
    _check(conv)
    return convolve_whole(mx.concatenate([x[:, :1], x, x[:, -1:]], axis=1), conv.conv)


def _blocks(group: ResnetGroup | ResnetBlock) -> Iterator[ResnetBlock]:
    for block in group.res_blocks if isinstance(group, ResnetGroup) else [group]:
        if {"norm3", "per_channel_scale1", "scale_shift_table"} & set(block):
            raise ValueError("only residual blocks without noise, timestep and change of width can be trained")
        yield block


def encode_video(encoder: VideoEncoder, video: mx.array) -> Moments:
    """Moments of latents, (B, 1 + k, H / space_scale, W / space_scale, C), not normalised.

    Args:
        video: (B, 1 + k * time_scale, H, W, 3) in [-1, 1].

    Raises:
        ValueError: a layer is of a kind that is not trained here.
    """
    x = causal(patchify(video, encoder.config.patch_size), encoder.conv_in)
    for layer in encoder.down_blocks:
        if isinstance(layer, Downsample):
            if layer.factors[0] == 2:
                x = mx.concatenate([x[:, :1], x], axis=1)
            grouped = space_to_depth(x, layer.factors)
            kept = grouped.reshape(*grouped.shape[:-1], layer.out_channels, -1).mean(axis=-1)
            x = space_to_depth(causal(x, layer.conv), layer.factors) + kept
        elif isinstance(layer, ResnetGroup | ResnetBlock):
            for block in _blocks(layer):
                x = x + causal(activate(causal(activate(x), block.conv1)), block.conv2)
        else:
            raise ValueError("strided convolutions cannot be trained")
    x = causal(activate(x), encoder.conv_out)
    channels = encoder.config.latent_channels
    return Moments(x[..., :channels], mx.clip(x[..., channels:], -30, 20))


def decode_video(decoder: VideoDecoder, latent: mx.array) -> mx.array:
    """Frames (B, 1 + k * time_scale, H, W, 3) of latents that are not normalised.

    Raises:
        ValueError: a layer is of a kind that is not trained here, or the decoder is causal or takes noise.
    """
    config = decoder.config
    if config.causal_decoder or config.timestep_conditioning:
        raise ValueError("causal decoders and decoders with timestep conditioning cannot be trained")
    x = centred(latent, decoder.conv_in)
    for layer in decoder.up_blocks:
        if isinstance(layer, Upsample):
            if layer.residual:
                raise ValueError("upsampling with a residual cannot be trained")
            x = depth_to_space(centred(x, layer.conv), layer.factors)
            x = x[:, 1:] if layer.factors[0] == 2 else x
        else:
            for block in _blocks(layer):
                x = x + centred(activate(centred(activate(x), block.conv1)), block.conv2)
    return unpatchify(centred(activate(x), decoder.conv_out), config.patch_size)


def picture_loss(made: mx.array, wanted: mx.array, weight: mx.array | float = 1.0) -> mx.array:
    """Mean absolute and squared error of frames (B, F, H, W, 3), and the absolute error of their slopes in space.

    The slopes stand for the perceptual loss of larger models: edges of the right sharpness in the right place.

    Args:
        weight: of pixels, for the first two; broadcastable to the frames.
    """
    error = made - wanted
    slopes = mx.mean(mx.abs(mx.diff(error, axis=2))) + mx.mean(mx.abs(mx.diff(error, axis=3)))
    return mx.mean(weight * (mx.abs(error) + 2 * mx.square(error))) + slopes


def encode_sound(encoder: AudioEncoder, mel: mx.array) -> Moments:
    """Moments of latents (B, ceil(T / 4), latent bins, z_channels), not normalised, of (B, T, bins, channels)."""
    x = encoder.conv_in(mel)
    for level in encoder.down:
        x = level(x)
    mean, log_variance = mx.split(encoder.conv_out(nn.silu(rms_norm(encoder.mid(x)))), 2, axis=-1)
    return Moments(mean, mx.clip(log_variance, -30, 20))
