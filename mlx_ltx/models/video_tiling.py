"""Overlapping tiles, blended where they meet, as the reference decodes and encodes large clips (ltx_core/tiling).

An approximation: at its inner edges a tile sees padding instead of its neighbours. Streaming, see
:meth:`mlx_ltx.models.video_vae.VideoDecoder.stream`, is exact and needs less memory; tiles are for results that must be
those of the reference, and for layers that are not local.

The clip is split on the grid of its latents. Tiles overlap by a ramp, over which one fades out while the next fades in.
In time, every tile but the first begins a latent frame early, because the first latent frame of whatever is decoded
stands for a single frame.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ltx.models.video_vae import VideoDecoder, VideoEncoder
from mlx_ltx.models.video_vae_blocks import Noise

SMALLEST_WEIGHT = 1e-8
COMPLEMENTARY = 1e-5  # how far the weights may be from 1 in sum, to be taken as 1
ENCODING_OVERLAP_FRAMES, ENCODING_OVERLAP_PIXELS = 16, 64  # less leaves seams


class Span(NamedTuple):
    """A part of one axis.

    Attributes:
        start, stop: positions.
        fade_in, fade_out: lengths of the ramps at both ends.
    """

    start: int
    stop: int
    fade_in: int
    fade_out: int


@dataclass(frozen=True)
class BySize:
    """Tiles of a size, the last one perhaps smaller.

    Attributes:
        size, overlap: in frames or pixels; multiples of a latent's, the size at least two.
    """

    size: int
    overlap: int

    def spans(self, length: int, scale: int) -> list[Span]:
        """Of an axis of ``length`` latents that stand for ``scale`` frames or pixels each.

        Raises:
            ValueError: the sizes do not fit the scale.
        """
        if self.size < 2 * scale or self.size % scale:
            raise ValueError(f"tiles of {self.size} are not supported, only multiples of {scale} from {2 * scale} on")
        if not 0 <= self.overlap < self.size or self.overlap % scale:
            raise ValueError(f"an overlap of {self.overlap} is not a multiple of {scale} below {self.size}")
        size, overlap = self.size // scale, self.overlap // scale
        return _spans_by_size(length, max(size, overlap + 1), overlap)


@dataclass(frozen=True)
class ByCount:
    """A number of tiles of nearly the same size.

    Attributes:
        count: how many.
        overlap: in latents.
    """

    count: int
    overlap: int = 0

    def spans(self, length: int, scale: int) -> list[Span]:
        """As :meth:`BySize.spans`."""
        if not 1 <= self.count <= length:
            raise ValueError(f"{length} latents cannot be split into {self.count} tiles")
        if self.count == 1:
            return [Span(0, length, 0, 0)]
        size, more = divmod(length + self.overlap * (self.count - 1), self.count)
        if not 0 <= self.overlap < size:
            raise ValueError(f"{self.count} tiles of {length} latents cannot overlap by {self.overlap}")
        spans = _spans_by_size(length - more, size, self.overlap)
        return [
            span._replace(start=span.start + min(index, more), stop=span.stop + min(index + 1, more))
            for index, span in enumerate(spans)
        ]


def _spans_by_size(length: int, size: int, overlap: int) -> list[Span]:
    if length <= size:
        return [Span(0, length, 0, 0)]
    step = size - overlap
    count = -(-(length - overlap) // step)
    spans = [Span(index * step, index * step + size, overlap, overlap) for index in range(count)]
    spans[0] = spans[0]._replace(fade_in=0)
    spans[-1] = spans[-1]._replace(stop=length, fade_out=0)
    return spans


@dataclass(frozen=True)
class Tiling:
    """How each axis is split; None leaves it whole."""

    frames: BySize | ByCount | None = None
    height: BySize | ByCount | None = None
    width: BySize | ByCount | None = None

    @classmethod
    def default(cls) -> Tiling:
        """80 frames with 24 shared, 768 pixels with 64 shared in both directions."""
        return cls(BySize(80, 24), BySize(768, 64), BySize(768, 64))

    @classmethod
    def automatic(cls, height: int, width: int, scale: int) -> Tiling:
        """What the reference's pipelines decode with: tiles of the picture's shape, 768 pixels on the longer side.

        Args:
            height, width: of the picture, multiples of ``scale``, the pixels of a latent's side.
        """
        side, overlap, longer = 768 // scale, 64 // scale, max(height, width) // scale

        def axis(pixels: int) -> BySize:
            size = round(side * (pixels // scale) / longer)
            return BySize(scale * max(2, overlap + 1, size), 64)

        return replace(cls.default(), height=axis(height), width=axis(width))


class Cut(NamedTuple):
    """One tile's part of one axis, on both sides of the network.

    Attributes:
        latents: positions on the grid of latents.
        pixels: positions in the clip, in frames or pixels.
        weights: float32, of the side that is made; one for each position, or a single one for an axis that is whole.
    """

    latents: slice
    pixels: slice
    weights: np.ndarray


class Tile(NamedTuple):
    frames: Cut
    height: Cut
    width: Cut


def weights(length: int, fade_in: int, fade_out: int, from_zero: bool) -> np.ndarray:
    """A trapezoid: ramps at both ends, 1 between, float32.

    Args:
        from_zero: the first weight is 0, else it is a step above.
    """
    fade_in, fade_out = (max(0, min(ramp, length)) for ramp in (fade_in, fade_out))
    result = np.ones(length, np.float32)
    if fade_in:
        rising = np.linspace(0, 1, fade_in + (1 if from_zero else 2), dtype=np.float32)
        result[:fade_in] *= rising[:-1] if from_zero else rising[1:-1]
    if fade_out:
        result[-fade_out:] *= np.linspace(1, 0, fade_out + 2, dtype=np.float32)[1:-1]
    return result


def decoding_tiles(tiling: Tiling, latents: Sequence[int], time_scale: int, space_scale: int) -> list[Tile]:
    """The tiles of latents (F, H, W), those of the same frames next to each other; weights are those of pixels."""
    axes = _axes(tiling, latents, time_scale, space_scale)
    return _tiles(
        [_cut(span, scale, time, decoding=True) for span in spans] if tiled else [_uncut(spans[0], scale, time)]
        for spans, scale, time, tiled in axes
    )


def encoding_tiles(tiling: Tiling, latents: Sequence[int], time_scale: int, space_scale: int) -> list[Tile]:
    """The tiles of a clip of latents (F, H, W); weights are those of latents.

    Raises:
        ValueError: tiles of a given size overlap by less than 16 frames or 64 pixels.
    """
    for name, way, least in (
        ("frames", tiling.frames, ENCODING_OVERLAP_FRAMES),
        ("height", tiling.height, ENCODING_OVERLAP_PIXELS),
        ("width", tiling.width, ENCODING_OVERLAP_PIXELS),
    ):
        if isinstance(way, BySize) and way.overlap < least:
            raise ValueError(f"{name}: an overlap of {way.overlap} is too small to encode with, {least} is the least")
    axes = _axes(tiling, latents, time_scale, space_scale)
    return _tiles([_cut(span, scale, time, decoding=False) for span in spans] for spans, scale, time, _ in axes)


def _axes(
    tiling: Tiling, latents: Sequence[int], time_scale: int, space_scale: int
) -> list[tuple[list[Span], int, bool, bool]]:
    """Of each axis: its spans, its scale, whether it is time, whether it is to be tiled."""
    axes = []
    ways = (tiling.frames, tiling.height, tiling.width)
    for way, length, scale, time in zip(
        ways, latents, (time_scale, space_scale, space_scale), (True, False, False), strict=True
    ):
        spans = [Span(0, length, 0, 0)] if way is None else way.spans(length, scale)
        if time:
            spans[1:] = [span._replace(start=span.start - 1, fade_in=span.fade_in + 1) for span in spans[1:]]
        axes.append((spans, scale, time, way is not None))
    return axes


def _cut(span: Span, scale: int, time: bool, decoding: bool) -> Cut:
    start, stop, fade_in, fade_out = span
    if time:
        pixels = slice(scale * start, 1 + scale * (stop - 1))
        ramps = 1 + scale * (fade_in - 1), scale * fade_out
    else:
        pixels = slice(scale * start, scale * stop)
        ramps = scale * fade_in, scale * fade_out
    length, ramps = (pixels.stop - pixels.start, ramps) if decoding else (stop - start, (fade_in, fade_out))
    return Cut(slice(start, stop), pixels, weights(length, *ramps, from_zero=time))


def _uncut(span: Span, scale: int, time: bool) -> Cut:
    return _cut(span, scale, time, decoding=True)._replace(weights=np.ones(1, np.float32))


def _tiles(cuts: Iterator[list[Cut]]) -> list[Tile]:
    return [Tile(*each) for each in itertools.product(*cuts)]


def complementary(tiles: Sequence[Tile], pixels: bool) -> bool:
    """Whether the weights add up to 1 along every axis, so that blended tiles need no division.

    Args:
        pixels: the weights are those of pixels, else of latents.
    """
    for cuts in zip(*tiles, strict=True):
        # Each part of the axis once, although many tiles share it.
        parts = {(cut.latents.start, cut.latents.stop): cut for cut in cuts}
        sides = [(cut.pixels if pixels else cut.latents, cut.weights) for cut in parts.values()]
        total = np.zeros(max(side.stop for side, _ in sides), np.float32)
        for side, values in sides:
            total[side] += values
        if np.abs(total - 1).max() > COMPLEMENTARY:
            return False
    return True


def decode_tiled(
    decoder: VideoDecoder,
    latent: mx.array,
    tiling: Tiling,
    timestep: mx.array | float | None = None,
    noise: Noise | None = None,
) -> Iterator[mx.array]:
    """Decode a clip in overlapping tiles, with the reference's result.

    Blending is done in float32, on the frames of the tiles that begin together and of those before them.

    Args:
        latent, timestep, noise: see :meth:`VideoDecoder.stream`; noise is drawn for each tile.

    Yields:
        the next frames, (B, n, H * space_scale, W * space_scale, 3), as many as no later tile adds to, evaluated, in
        the dtype of the weights.

    Raises:
        ValueError: the tiling does not fit, or as :meth:`VideoDecoder.stream`.
    """
    config = decoder.config
    B, F, H, W, _ = latent.shape
    tiles = decoding_tiles(tiling, (F, H, W), config.time_scale, config.space_scale)
    divide = not complementary(tiles, pixels=True)
    size = (H * config.space_scale, W * config.space_scale, config.image_channels)
    carried: mx.array | None = None  # frames of earlier tiles that this group adds to, and their summed weights
    carried_weights: mx.array | None = None
    groups = [list(group) for _, group in itertools.groupby(tiles, lambda tile: tile.frames.pixels)]
    for group, following in zip(groups, [*groups[1:], None], strict=True):
        span = group[0].frames.pixels
        shape = (B, span.stop - span.start, *size)
        total = _continued(carried, shape)
        summed = _continued(carried_weights, (1, *shape[1:4], 1)) if divide else None
        mx.eval(total, summed)
        carried = carried_weights = None
        for tile in group:
            part = latent[:, tile.frames.latents, tile.height.latents, tile.width.latents]
            weight = _weight(tile)
            place = (slice(None), slice(None), tile.height.pixels, tile.width.pixels)
            decoded = decoder(part, timestep, noise)
            dtype = decoded.dtype
            total[place] = total[place] + decoded.astype(mx.float32) * weight
            del decoded
            if summed is not None:
                # Weights of whole axes have a single element, so the sum is told the tile's shape.
                summed[place] = summed[place] + mx.broadcast_to(weight, summed[place].shape)
            mx.eval(total, summed)
        count = shape[1] if following is None else following[0].frames.pixels.start - span.start
        done = total[:, :count]
        if summed is not None:
            done = done / mx.maximum(summed[:, :count], SMALLEST_WEIGHT)
            carried_weights = mx.contiguous(summed[:, count:])
        carried = mx.contiguous(total[:, count:])
        frames = mx.contiguous(done.astype(dtype))
        mx.eval(frames, carried, carried_weights)
        del total, summed, done
        if count:
            yield frames
        del frames


def encode_tiled(encoder: VideoEncoder, video: mx.array, tiling: Tiling) -> mx.array:
    """Encode a clip in overlapping tiles, with the reference's result.

    Args:
        video: see :meth:`VideoEncoder.__call__`.

    Returns:
        normalised latents, (B, 1 + k, H / space_scale, W / space_scale, latent_channels), in the dtype of the weights.

    Raises:
        ValueError: the tiling does not fit, or the clip has another size or number of frames.
    """
    time, space = encoder.config.time_scale, encoder.config.space_scale
    B, frames, height, width, _ = video.shape
    encoder.check_size(height, width)
    encoder.check_frames(frames)
    shape = (1 + (frames - 1) // time, height // space, width // space)
    tiles = encoding_tiles(tiling, shape, time, space)
    total = mx.zeros((B, *shape, encoder.config.latent_channels))
    summed = mx.zeros((1, *shape, 1))
    for tile in tiles:
        latent = encoder(video[:, tile.frames.pixels, tile.height.pixels, tile.width.pixels])
        weight, place = _weight(tile), (slice(None), *(cut.latents for cut in tile))
        total[place] = total[place] + latent.astype(mx.float32) * weight
        summed[place] = summed[place] + weight
        mx.eval(total, summed)
    if not complementary(tiles, pixels=False):
        total = total / mx.maximum(summed, SMALLEST_WEIGHT)
    return total.astype(latent.dtype)


def _continued(carried: mx.array | None, shape: tuple[int, ...]) -> mx.array:
    """What earlier tiles gave, then zeros: float32 of ``shape``, frames being the second axis."""
    if carried is None:
        return mx.zeros(shape)
    return mx.pad(carried, [(0, 0), (0, shape[1] - carried.shape[1]), (0, 0), (0, 0), (0, 0)])


def _weight(tile: Tile) -> mx.array:
    """(1, F, H, W, 1), with single elements for axes that are whole."""
    time, height, width = (mx.array(cut.weights) for cut in tile)
    return time[None, :, None, None, None] * height[None, None, :, None, None] * width[None, None, None, :, None]
