"""How much memory streamed video takes and how much work it is, from the bookkeeping of the autoencoder's stages.

Pure arithmetic: nothing is evaluated, and networks are built without their weights being made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_ltx.models.streaming import ELEMENTS_PER_PIECE, FRAMES_PER_PIECE, Rows, Stage
from mlx_ltx.models.video_tiling import Tiling, decoding_tiles
from mlx_ltx.models.video_vae import VideoDecoder, VideoEncoder, VideoVaeConfig
from mlx_ltx.models.video_vae_blocks import UNFOLDED_ELEMENTS

KERNEL = 27  # taps of a convolution of 3x3x3


class Level(NamedTuple):
    """What a stage meets: frames of ``rows`` by ``width`` pixels, in pieces of so many frames and rows.

    Attributes:
        frames: of the clip at this stage; infinite for a clip of any length.
    """

    stage: Stage
    channels: int
    rows: Rows
    width: int
    frames: float
    piece_frames: int
    piece_rows: int

    @property
    def height(self) -> int:
        """Rows that are worked on."""
        return self.rows.stop - self.rows.first


def decoding_work(
    config: VideoVaeConfig,
    height: int,
    width: int,
    dtype: mx.Dtype,
    *,
    bands: int = 1,
    frames: float = math.inf,
    elements: int = ELEMENTS_PER_PIECE,
) -> int:
    """What streaming a clip out of the decoder takes, in bytes, beside weights and latents.

    That is what the layers keep and the piece at work. Frames that wait for the other bands are not counted (they are
    outside MLX, or in the caller's hands), nor is what the caller makes of the frames that come out. With other dtypes
    than float32 MLX's CPU backend also copies a convolution's weights to float32 (0.4 GB for the largest of LTX-2.3);
    that is not counted, since nobody decodes large clips so: it is some 15 times slower there than float32.

    Args:
        height, width: of the picture in pixels; multiples of ``config.space_scale``.
        dtype: of weights and activations.
        bands, elements: see :meth:`mlx_ltx.models.video_vae.VideoDecoder.stream`.
        frames: of the clip; a short one never fills what is kept.
    """
    decoder = VideoDecoder(config)
    stages = list(itertools.chain.from_iterable(decoder.chains(decoder.no_conditions())))
    latent_frames = frames if math.isinf(frames) else 1 + (frames - 1) // config.time_scale
    rows, columns = height // config.space_scale, width // config.space_scale
    work = max(
        working_bytes(stages, config.latent_channels, read, columns, latent_frames, dtype, elements)
        for _, read in decoder.band_rows(rows, bands)
    )
    assembly = 0 if bands == 1 else config.image_channels * height * width  # a frame, beside the last band's part
    denormalised = 0 if math.isinf(frames) else int(latent_frames) * rows * columns * config.latent_channels
    return work + (assembly + denormalised) * dtype.size


def tiled_decoding_work(
    config: VideoVaeConfig, height: int, width: int, dtype: mx.Dtype, frames: int, tiling: Tiling | None = None
) -> int:
    """What decoding in blended tiles takes, in bytes, beside weights and latents; see :func:`decoding_work`.

    Args:
        tiling: of :func:`mlx_ltx.models.video_tiling.decode_tiled`; None is the reference's automatic one.
    """
    time, space = config.time_scale, config.space_scale
    tiling = Tiling.automatic(height, width, space) if tiling is None else tiling
    latents = 1 + (frames - 1) // time
    tiles = decoding_tiles(tiling, (latents, height // space, width // space), time, space)
    long, high, wide = (max(cut.pixels.stop - cut.pixels.start for cut in cuts) for cuts in zip(*tiles, strict=True))
    split = high < height or wide < width
    # Blending is in float32: the frames of all tiles that begin together, once more where only a part is written to.
    group = 4 * config.image_channels * long * height * width
    tile = config.image_channels * long * high * wide
    decoding = decoding_work(config, high, wide, dtype, frames=long) + tile * dtype.size * (long - time) // long
    blending = tile * (dtype.size + 4) + (group + tile * 4 // 3 if split else 0)
    return group + max(decoding, blending, group)


def encoding_work(
    config: VideoVaeConfig,
    height: int,
    width: int,
    dtype: mx.Dtype,
    *,
    frames: float = math.inf,
    elements: int = ELEMENTS_PER_PIECE,
) -> int:
    """What streaming a clip into the encoder takes, in bytes, beside weights, pixels and latents.

    The arguments are those of :func:`decoding_work`.
    """
    encoder = VideoEncoder(config)
    stages = list(itertools.chain.from_iterable(encoder.chains()))
    rows = height // config.patch_size
    channels = config.image_channels * config.patch_size**2
    return working_bytes(stages, channels, Rows(0, rows, rows), width // config.patch_size, frames, dtype, elements)


def band_cost(config: VideoVaeConfig, height: int, bands: int) -> float:
    """How many times the arithmetic of a single band's decode it is to decode ``height`` pixels in ``bands``."""
    decoder = VideoDecoder(config)
    stages = list(itertools.chain.from_iterable(decoder.chains(decoder.no_conditions())))
    rows = height // config.space_scale

    def cost(read: Rows) -> float:
        return sum(
            _multiplications(level) * float(level.frames)
            for level in levels(stages, config.latent_channels, read, 1, 1, ELEMENTS_PER_PIECE)
        )

    return sum(cost(read) for _, read in decoder.band_rows(rows, bands)) / cost(Rows(0, rows, rows))


def levels(
    stages: Sequence[Stage], channels: int, rows: Rows, width: int, frames: float, elements: int
) -> Iterator[Level]:
    """What each stage of a chain meets, the pieces as large as they can be."""
    for stage in stages:
        limit, height = max(1, int(elements / stage.growth)), rows.stop - rows.first
        piece_frames = int(min(frames, FRAMES_PER_PIECE, max(1, limit // (height * width * channels))))
        piece_rows = min(height, max(1, limit // (width * channels)))
        yield Level(stage, channels, rows, width, frames, piece_frames, piece_rows)
        for window in stage.windows():
            rows = window.output_rows(rows)
        time, down, along = stage.factors
        rows = rows.times(int(down * math.prod(window.row_step for window in stage.windows())))
        frames, width, channels = max(1, frames * time), int(width * along), stage.out_channels


def working_bytes(
    stages: Sequence[Stage],
    channels: int,
    rows: Rows,
    width: int,
    frames: float,
    dtype: mx.Dtype,
    elements: int = ELEMENTS_PER_PIECE,
) -> int:
    """What a chain takes beside weights and input: what all stages keep, what waits, the largest piece at work.

    Args:
        channels, rows, width, frames: of the input.
    """
    held = largest = 0.0
    for level in levels(stages, channels, rows, width, frames, elements):
        held += _kept(level)
        largest = max(largest, _at_work(level))
        if level.stage is stages[-1] and level.piece_rows < level.height:  # rows of the output wait to be a frame
            _, down, along = map(float, level.stage.factors)
            made = level.height * level.width * level.stage.out_channels * down * along
            held, largest = held + made, max(largest, made)
    return int((held + largest) * dtype.size)


def _kept(level: Level) -> float:
    """Elements that a stage holds between pieces."""
    stage, whole = level.stage, level.piece_rows == level.height
    held = 0.0
    for window in stage.windows():
        # The frames that the next output needs, and of the newest the rows that have no output yet.
        rows = min(level.frames, window.size - 1) * level.height + (0 if whole else 2)
        held += level.width * window.channels * rows
    time, down, along = map(float, stage.factors)
    if time > 1:  # the second of two frames waits for the first, whole pieces for those before them
        waiting = max(0, level.piece_frames * time - FRAMES_PER_PIECE) if whole else time - 1
        held += level.width * level.height * stage.out_channels * waiting * down * along
    if stage.whole_clip:  # the clip, and its shortcut
        held += level.frames * level.height * level.width * (level.channels + stage.out_channels)
    return held


def _at_work(level: Level) -> float:
    """Elements that a stage makes of a piece for a while; measured, since much of it depends on when MLX evaluates."""
    stage, work = level.stage, 0.0
    if stage.whole_clip:  # its norm
        work = 6 * level.frames * level.height * level.width * level.channels
    for window in stage.windows():
        line = level.width * window.channels
        # The last piece of whole frames gives one more, which sees a copy of the last frame.
        number = level.piece_frames
        if level.piece_rows == level.height:
            number = int(min(number + window.after, level.frames))
        patch = line * (window.step * (number - 1) + window.size) * min(level.height, level.piece_rows + 2)
        unfolded = KERNEL * line * level.piece_rows * number
        limit = max(UNFOLDED_ELEMENTS if mx.default_device() == mx.Device(mx.cpu) else 0, KERNEL * line)
        made = level.width * level.piece_rows * number * window.kernels
        prepared = (4 if stage.activates else 2) * patch
        if unfolded > limit:  # several bands, evaluated one after the other once the patch is activated
            work = max(work, prepared + limit, patch + 4 * made)
        else:  # all in one evaluation
            work = max(work, prepared + unfolded + 4 * made)
    return work


def _multiplications(level: Level) -> float:
    """Per frame of the input, for each tap of the kernels."""
    total, rows = 0.0, level.rows
    for window in level.stage.windows():
        rows = window.output_rows(rows)
        total += (rows.stop - rows.first) * level.width * window.channels * window.kernels
    return total
