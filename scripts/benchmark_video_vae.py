"""``benchmark.py decode`` and ``encode``: the video autoencoder, streamed, in bands, in tiles and at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx

from benchmark import MIB, WHOLE, Measurement, Stopwatch, chosen_dtype, dtype_name, load_config, ready, size
from mlx_ltx.errors import UserError
from mlx_ltx.memory.video_vae import band_cost, decoding_work, encoding_work
from mlx_ltx.models.video_tiling import Tiling, decode_tiled
from mlx_ltx.models.video_vae import VideoDecoder, VideoEncoder, VideoVaeConfig

DECODE_MODES = ["streamed", "bands", "tiled", "whole"]
ENCODE_MODES = ["streamed", "whole"]
PREDICTED, WORK = "MiB predicted", "times the work"


def add_commands(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Register the sub-commands."""
    decode = commands.add_parser("decode", parents=parents, help="the video decoder")
    _add_clip(decode)
    decode.add_argument(
        "--modes",
        nargs="+",
        choices=DECODE_MODES,
        default=["streamed", "whole"],
        help="exact with little memory, the same in bands of the picture, the reference's tiles, exact at once "
        "(streamed whole)",
    )
    decode.add_argument("--bands", type=WHOLE, default=2, metavar="N", help="of the mode 'bands' (%(default)s)")
    decode.set_defaults(run=benchmark_decode)

    encode = commands.add_parser("encode", parents=parents, help="the video encoder")
    _add_clip(encode)
    encode.add_argument("--modes", nargs="+", choices=ENCODE_MODES, default=ENCODE_MODES, help="(both)")
    encode.set_defaults(run=benchmark_encode)


def _add_clip(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--size", type=size, default=(64, 64), metavar="WxH", help="pixels, rounded up to whole latents (64x64)"
    )
    command.add_argument("--frames", type=WHOLE, nargs="+", default=[9], metavar="N", help="(9)")


class _Clip(NamedTuple):
    """What the decoder makes and the encoder reads.

    Attributes:
        frames: of the picture.
        rows, columns: of latents that cover it.
        space: pixels of a latent's side.
        dtype: of the network.
    """

    frames: int
    rows: int
    columns: int
    space: int
    dtype: mx.Dtype

    @property
    def height(self) -> int:
        return self.rows * self.space

    @property
    def width(self) -> int:
        return self.columns * self.space

    @property
    def name(self) -> str:
        return f"{self.width}x{self.height}, {self.frames} frames, {dtype_name(self.dtype)}"


def _clips(arguments: argparse.Namespace, config: VideoVaeConfig) -> list[_Clip]:
    (width, height), scale, dtype = arguments.size, config.space_scale, chosen_dtype(arguments)
    for frames in arguments.frames:
        if (frames - 1) % config.time_scale:
            raise UserError(f"--frames {frames}: must be {config.time_scale}k + 1")
    return [_Clip(frames, -(-height // scale), -(-width // scale), scale, dtype) for frames in arguments.frames]


def benchmark_decode(arguments: argparse.Namespace) -> Iterator[Measurement]:
    """The video decoder; the prediction of its peak is, as the measured one, beside weights and latents."""
    config = load_config(arguments, VideoVaeConfig.from_metadata)
    clips = _clips(arguments, config)
    if "bands" in arguments.modes and arguments.bands > clips[0].rows:
        raise UserError(f"--bands {arguments.bands}: the picture has {clips[0].rows} rows of latents")
    decoder = ready(VideoDecoder(config), chosen_dtype(arguments))
    for clip in clips:
        yield from _decode(arguments, decoder, clip)


def _decode(arguments: argparse.Namespace, decoder: VideoDecoder, clip: _Clip) -> Iterator[Measurement]:
    config = decoder.config
    latent_frames = 1 + (clip.frames - 1) // config.time_scale
    latent = mx.random.normal((1, latent_frames, clip.rows, clip.columns, config.latent_channels)).astype(clip.dtype)
    mx.eval(latent)
    noise = mx.random.normal
    tiling = Tiling.automatic(clip.height, clip.width, clip.space)
    given = {
        "streamed": lambda: decoder.stream(latent, noise=noise),
        "bands": lambda: decoder.stream(latent, noise=noise, bands=arguments.bands, aside=_Nowhere),
        "tiled": lambda: decode_tiled(decoder, latent, tiling, noise=noise),
        # Without a limit to its pieces every layer runs once, over all frames.
        "whole": lambda: iter([mx.concatenate(list(decoder.stream(latent, noise=noise, elements=None)), axis=1)]),
    }
    watch = Stopwatch(arguments.repeats, arguments.limit)
    for mode in DECODE_MODES:
        if mode not in arguments.modes:
            continue
        figures: dict[str, float] = {}
        if mode in ("streamed", "bands"):
            bands = arguments.bands if mode == "bands" else 1
            work = decoding_work(config, clip.height, clip.width, clip.dtype, bands=bands, frames=clip.frames)
            figures[PREDICTED] = work / MIB
            if bands > 1:
                figures[WORK] = band_cost(config, clip.height, bands)
        name = f"{arguments.bands} bands" if mode == "bands" else mode
        measured = watch.measure(f"{name}, {clip.name}", _taking(given[mode]), clip.frames, "frames")
        yield replace(measured, figures=figures, series=name)


def benchmark_encode(arguments: argparse.Namespace) -> Iterator[Measurement]:
    """The video encoder, given a latent frame's worth of frames at a time, or all of them."""
    config = load_config(arguments, VideoVaeConfig.from_metadata)
    clips = _clips(arguments, config)
    encoder = ready(VideoEncoder(config), chosen_dtype(arguments))
    for clip in clips:
        yield from _encode(arguments, encoder, clip)


def _encode(arguments: argparse.Namespace, encoder: VideoEncoder, clip: _Clip) -> Iterator[Measurement]:
    config = encoder.config

    def video(count: int) -> mx.array:
        return mx.random.uniform(-1, 1, (1, count, clip.height, clip.width, config.image_channels)).astype(clip.dtype)

    def pieces() -> Iterator[mx.array]:
        yield video(1)
        for _ in range((clip.frames - 1) // config.time_scale):
            yield video(config.time_scale)

    given = {
        "streamed": lambda: encoder.stream(pieces()),
        "whole": lambda: encoder.stream([video(clip.frames)], elements=None),
    }
    watch = Stopwatch(arguments.repeats, arguments.limit)
    for mode in ENCODE_MODES:
        if mode in arguments.modes:
            measured = watch.measure(f"{mode}, {clip.name}", _taking(given[mode]), clip.frames, "frames")
            predicted = encoding_work(config, clip.height, clip.width, clip.dtype, frames=clip.frames)
            # The two pieces that the encoder reads from, and their patches, are this benchmark's.
            predicted += 4 * config.time_scale * clip.height * clip.width * config.image_channels * clip.dtype.size
            yield replace(measured, figures={PREDICTED: predicted / MIB} if mode == "streamed" else {}, series=mode)


def _taking(pieces: Callable[[], Iterator[mx.array]]) -> Callable[[], None]:
    """Something to measure: take all that comes, as a writer would."""

    def take() -> None:
        for piece in pieces():
            mx.eval(piece)
            del piece

    return take


class _Nowhere(list):
    """A queue of frames that are not kept, as if they went to a file."""

    def append(self, frame: mx.array) -> None:
        self.shape, self.dtype = frame.shape, frame.dtype

    def popleft(self) -> mx.array:
        return mx.zeros(self.shape, self.dtype)
