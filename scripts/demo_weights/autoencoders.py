"""The demo's video and audio autoencoders and its latent upsampler.

Decoders enlarge linearly, with random mixtures of channels in between, so that a latent becomes soft colours and slow
tones instead of blocks.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from demo_weights.tensors import Tensors, interpolation

FACTORS = {"compress_time": (2, 1, 1), "compress_space": (1, 2, 2), "compress_all": (2, 2, 2)}
CUBE = (3, 3, 3)
SQUARE = (3, 3)
# Where log-mel values lie: silence is -11.5, full scale about 1.
MEL_MEAN, MEL_STD = -4.0, 1.5


def mixture(t: Tensors, name: str, inputs: int, outputs: int) -> np.ndarray:
    """A random matrix (outputs, inputs) that keeps the size of what it mixes."""
    return t.draw(name, outputs, inputs) / math.sqrt(inputs)


def put_video_vae(t: Tensors, config: dict[str, Any]) -> None:
    """Encoder, decoder and statistics for a config's ``vae`` section."""
    latent = config["latent_channels"]
    patch = config["patch_size"]
    # 1. encoder
    channels = latent
    t.conv("vae.encoder.conv_in.conv", 3 * patch**2, channels, CUBE, gain=2.0)
    for index, (kind, options) in enumerate(config["encoder_blocks"]):
        name = f"vae.encoder.down_blocks.{index}"
        if kind == "res_x":
            _put_resnets(t, name, channels, options["num_layers"], gain=0.5)
            continue
        wider = channels * options["multiplier"]
        t.conv(f"{name}.conv.conv", channels, wider // math.prod(FACTORS[kind.removesuffix("_res")]), CUBE)
        channels = wider
    t.conv("vae.encoder.conv_out.conv", channels, latent + 1, CUBE, gain=1.5)
    # 2. decoder, whose blocks are listed from the pixels' side
    blocks = config["decoder_blocks"][::-1]
    channels = config["decoder_base_channels"] * math.prod(options.get("multiplier", 1) for _, options in blocks)
    _put_enlarging(t, "vae.decoder.conv_in.conv", latent, channels, (1, 1, 1))
    for index, (kind, options) in enumerate(blocks):
        name = f"vae.decoder.up_blocks.{index}"
        if kind == "res_x":
            _put_resnets(t, name, channels, options["num_layers"], gain=0.7)
            continue
        narrower = channels // options["multiplier"]
        _put_enlarging(t, f"{name}.conv.conv", channels, narrower, FACTORS[kind])
        channels = narrower
    # Columns of a patch are slower than its rows.
    _put_enlarging(t, "vae.decoder.conv_out.conv", channels, 3, (1, patch, patch), gain=1.2, columns_first=True)
    # 3. statistics
    t.random("vae.per_channel_statistics.mean-of-means", latent, std=0.1)
    t.put("vae.per_channel_statistics.std-of-means", np.ones(latent))


def _put_resnets(t: Tensors, name: str, channels: int, layers: int, gain: float) -> None:
    for index in range(layers):
        block = f"{name}.res_blocks.{index}"
        t.conv(f"{block}.conv1.conv", channels, channels, CUBE, gain=2.0)
        t.conv(f"{block}.conv2.conv", channels, channels, CUBE, gain)


def _put_enlarging(
    t: Tensors,
    name: str,
    inputs: int,
    outputs: int,
    factors: tuple[int, int, int],
    gain: float = 1.0,
    columns_first: bool = False,
) -> None:
    """A convolution that mixes channels and enlarges linearly; of its output channels, the mixtures are the slowest."""
    kernels = interpolation(factors)
    if columns_first:
        kernels = kernels.reshape(*factors, *CUBE).swapaxes(1, 2).reshape(-1, *CUBE)
    mix = gain * mixture(t, f"{name}.weight", inputs, outputs)
    weight = np.einsum("oi,pabc->opiabc", mix, kernels).reshape(-1, inputs, *CUBE)
    t.put(f"{name}.weight", weight)
    t.put(f"{name}.bias", np.zeros(len(weight)))


def put_audio_vae(t: Tensors, config: dict[str, Any]) -> None:
    """Encoder, decoder and statistics for a config's ``audio_vae`` section."""
    network = config["model"]["params"]["ddconfig"]
    widths = [network["ch"] * multiplier for multiplier in network["ch_mult"]]
    z, channels, blocks = network["z_channels"], network["in_channels"], network["num_res_blocks"]
    levels = range(len(widths))
    # 1. encoder
    t.conv("audio_vae.encoder.conv_in.conv", channels, network["ch"], SQUARE, gain=0.3)
    before = network["ch"]
    for level, width in zip(levels, widths, strict=True):
        name = f"audio_vae.encoder.down.{level}"
        for index in range(blocks):
            _put_audio_resnet(t, f"{name}.block.{index}", before, width)
            before = width
        if level < levels[-1]:
            t.conv(f"{name}.downsample.conv", width, width, SQUARE)
    _put_middle(t, "audio_vae.encoder.mid", widths[-1])
    t.conv("audio_vae.encoder.conv_out.conv", widths[-1], 2 * z, SQUARE, gain=1.5)
    # 2. decoder
    t.conv("audio_vae.decoder.conv_in.conv", z, widths[-1], SQUARE)
    _put_middle(t, "audio_vae.decoder.mid", widths[-1])
    before = widths[-1]
    for level in reversed(levels):
        name = f"audio_vae.decoder.up.{level}"
        for index in range(blocks + 1):
            _put_audio_resnet(t, f"{name}.block.{index}", before, widths[level])
            before = widths[level]
        if level > 0:
            _put_smooth(t, f"{name}.upsample.conv.conv", before)
    name = "audio_vae.decoder.conv_out.conv"
    # What comes in has gone through SiLU after a norm: its mean square is about 1/3.
    t.random(f"{name}.weight", channels, widths[0], *SQUARE, std=MEL_STD / math.sqrt(3 * widths[0]))
    t.put(f"{name}.bias", np.full(channels, MEL_MEAN))
    # 3. statistics, of tokens: all bins of a channel, then of the next
    tokens = z * network["mel_bins"] // 4
    t.random("audio_vae.per_channel_statistics.mean-of-means", tokens, std=0.1)
    t.put("audio_vae.per_channel_statistics.std-of-means", np.ones(tokens))


def _put_audio_resnet(t: Tensors, name: str, inputs: int, outputs: int) -> None:
    t.conv(f"{name}.conv1.conv", inputs, outputs, SQUARE, gain=2.0)
    t.conv(f"{name}.conv2.conv", outputs, outputs, SQUARE, gain=0.5)
    if inputs != outputs:
        t.conv(f"{name}.nin_shortcut.conv", inputs, outputs, (1, 1))


def _put_middle(t: Tensors, name: str, width: int) -> None:
    for block in ("block_1", "block_2"):
        _put_audio_resnet(t, f"{name}.{block}", width, width)


def _put_smooth(t: Tensors, name: str, channels: int) -> None:
    """A convolution after every value was repeated: mixes channels and smooths the steps."""
    kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
    t.put(f"{name}.weight", mixture(t, f"{name}.weight", channels, channels)[:, :, None, None] * kernel)
    t.put(f"{name}.bias", np.zeros(channels))


def put_upsampler(t: Tensors, config: dict[str, Any]) -> None:
    """The latent upsampler for its whole (flat) config: it enlarges linearly and changes little else."""
    latent, channels = config["in_channels"], config["mid_channels"]
    t.conv("initial_conv", latent, channels, CUBE, gain=0.1)
    t.values["initial_conv.weight"][:, :, 1, 1, 1] += np.eye(channels, latent, dtype=np.float32)
    _put_group_norm(t, "initial_norm", channels, 1.0)
    for stage in ("res_blocks", "post_upsample_res_blocks"):
        for index in range(config["num_blocks_per_stage"]):
            block = f"{stage}.{index}"
            for part in ("1", "2"):
                t.conv(f"{block}.conv{part}", channels, channels, CUBE)
                _put_group_norm(t, f"{block}.norm{part}", channels, 0.1 if part == "2" else 1.0)
    kernels = interpolation((2, 2))
    weight = np.einsum("oi,pab->opiab", np.eye(channels), kernels).reshape(-1, channels, *SQUARE)
    t.put("upsampler.0.weight", weight)
    t.put("upsampler.0.bias", np.zeros(len(weight)))
    t.conv("final_conv", channels, latent, CUBE, gain=0.1)
    # Three SiLU have halved what was positive and taken away most of what was negative.
    t.values["final_conv.weight"][:, :, 1, 1, 1] += 3 * np.eye(latent, channels, dtype=np.float32)
    t.values["final_conv.bias"] -= 0.5


def _put_group_norm(t: Tensors, name: str, channels: int, weight: float) -> None:
    t.put(f"{name}.weight", np.full(channels, weight))
    t.put(f"{name}.bias", np.zeros(channels))
