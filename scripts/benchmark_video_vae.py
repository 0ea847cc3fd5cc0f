"""``benchmark.py decode`` and ``encode``: the video autoencoder, streamed, in bands, in tiles and at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx

from benchmark import MIB, WHOLE, Measurement, Stopwatch, chosen_dtype, dtype_name, load_config, size
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
    command.add_argument("--frames", type=WHOLE, default=9, metavar="N", help="(%(default)s)")


def _clip(arguments: argparse.Namespace, config: VideoVaeConfig) -> tuple[int, int, str]:
    """Rows and columns of latents that cover the picture, and what the clip is called."""
    (width, height), frames, scale = arguments.size, arguments.frames, config.space_scale
    if (frames - 1) % config.time_scale:
        raise UserError(f"--frames {frames}: must be {config.time_scale}k + 1")
    rows, columns = -(-height // scale), -(-width // scale)
    return rows, columns, f"{columns * scale}x{rows * scale}, {frames} frames, {dtype_name(chosen_dtype(arguments))}"


def benchmark_decode(arguments: argparse.Namespace) -> Iterator[Measurement]:
    """The video decoder; the prediction of its peak is, as the measured one, beside weights and latents."""
    config = load_config(arguments, VideoVaeConfig.from_metadata)
    rows, columns, clip = _clip(arguments, config)
    if "bands" in arguments.modes and arguments.bands > rows:
        raise UserError(f"--bands {arguments.bands}: the picture has {rows} rows of latents")
    dtype, space = chosen_dtype(arguments), config.space_scale
    decoder = VideoDecoder(config)
    decoder.set_dtype(dtype)
    mx.eval(decoder.parameters())
    latent = mx.random.normal(
        (1, 1 + (arguments.frames - 1) // config.time_scale, rows, columns, config.latent_channels)
    )
    latent = latent.astype(dtype)
    mx.eval(latent)
    noise = mx.random.normal
    tiling = Tiling.automatic(rows * space, columns * space, space)
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
            work = decoding_work(config, rows * space, columns * space, dtype, bands=bands, frames=arguments.frames)
            figures[PREDICTED] = work / MIB
            if bands > 1:
                figures[WORK] = band_cost(config, rows * space, bands)
        name = f"{arguments.bands} bands" if mode == "bands" else mode
        measured = watch.measure(f"{name}, {clip}", _taking(given[mode]), arguments.frames, "frames")
        yield replace(measured, figures=figures)


def benchmark_encode(arguments: argparse.Namespace) -> Iterator[Measurement]:
    """The video encoder, given a latent frame's worth of frames at a time, or all of them."""
    config = load_config(arguments, VideoVaeConfig.from_metadata)
    rows, columns, clip = _clip(arguments, config)
    dtype, space = chosen_dtype(arguments), config.space_scale
    encoder = VideoEncoder(config)
    encoder.set_dtype(dtype)
    mx.eval(encoder.parameters())
    height, width, frames = rows * space, columns * space, arguments.frames

    def video(count: int) -> mx.array:
        return mx.random.uniform(-1, 1, (1, count, height, width, config.image_channels)).astype(dtype)

    def pieces() -> Iterator[mx.array]:
        yield video(1)
        for _ in range((frames - 1) // config.time_scale):
            yield video(config.time_scale)

    given = {
        "streamed": lambda: encoder.stream(pieces()),
        "whole": lambda: encoder.stream([video(frames)], elements=None),
    }
    watch = Stopwatch(arguments.repeats, arguments.limit)
    for mode in ENCODE_MODES:
        if mode in arguments.modes:
            measured = watch.measure(f"{mode}, {clip}", _taking(given[mode]), frames, "frames")
            predicted = encoding_work(config, height, width, dtype, frames=frames)
            # The two pieces that the encoder reads from, and their patches, are this benchmark's.
            predicted += 4 * config.time_scale * height * width * config.image_channels * dtype.size
            yield replace(measured, figures={PREDICTED: predicted / MIB} if mode == "streamed" else {})


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
