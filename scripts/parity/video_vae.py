"""The convolutional video autoencoder beside the reference: encode, decode, and the output of every block."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_ltx.checkpoints.keymaps import VIDEO_DECODER, VIDEO_ENCODER
from mlx_ltx.checkpoints.loading import load_weights
from mlx_ltx.models.streaming import Stage, run
from mlx_ltx.models.video_tiling import (
    ByCount,
    BySize,
    Tiling,
    complementary,
    decode_tiled,
    decoding_tiles,
    encode_tiled,
    encoding_tiles,
)
from mlx_ltx.models.video_vae import VideoDecoder, VideoEncoder, VideoVaeConfig
from mlx_ltx.models.video_vae_blocks import patchify
from parity import Comparison, GoldenSet, NotCovered, runner


def channels_last(x: mx.array) -> mx.array:
    """(B, C, F, H, W) to (B, F, H, W, C)."""
    return x.transpose(0, 2, 3, 4, 1)


def channels_first(x: mx.array) -> mx.array:
    """(B, F, H, W, C) to (B, C, F, H, W)."""
    return x.transpose(0, 4, 1, 2, 3)


class RecordedNoise:
    """Gives the draws ``CASE.noise.0``, ``CASE.noise.1``, … in order, and insists on their shapes."""

    def __init__(self, golden: GoldenSet, case: str):
        self.golden, self.case, self.count = golden, case, 0

    def __call__(self, shape: tuple[int, ...]) -> mx.array:
        draw = self.golden.mx(f"{self.case}.noise.{self.count}")
        draw = channels_last(draw) if draw.ndim == 5 else draw
        if tuple(draw.shape) != tuple(shape):
            raise ValueError(f"draw {self.count} of {self.case} has shape {draw.shape}, not {shape}")
        self.count += 1
        return draw


def compare_blocks(
    golden: GoldenSet, case: str, kind: str, chains: Sequence[Sequence[Stage]], x: mx.array
) -> Iterator[Comparison]:
    """The output of every block that was recorded as ``CASE.KIND.N``, perhaps without its right and lower part."""
    for index, chain in enumerate(chains[:-1]):
        x = mx.concatenate(list(run(chain, [x], elements=None)), axis=1)
        name = f"{kind}.{index - 1}"
        if f"{case}.{name}" in golden.tensors:
            height, width = golden.tensors[f"{case}.{name}"].shape[-2:]
            yield golden.compare(case, name, channels_first(x)[..., :height, :width])


@runner("video_vae_*[!d]", "video_vae_*[!e]d", "video_vae_*[!l]ed")  # not video_vae_*_tiled
def video_vae(golden: GoldenSet) -> Iterator[Comparison | NotCovered]:
    file = golden.checkpoint()
    config = VideoVaeConfig.from_metadata(file.config)
    encoder = load_weights(VideoEncoder(config), file, VIDEO_ENCODER, mx.float32)
    decoder = load_weights(VideoDecoder(config), file, VIDEO_DECODER, mx.float32)
    others = {name.split(".")[0] for name in golden.names}

    for name in golden.names:
        case, _, tensor = name.rpartition(".")
        if case.startswith("encode") and tensor == "latent":
            others.discard(case.split(".")[0])
            video = channels_last(golden.mx(f"{case}.video"))
            video = video[:, : 1 + (video.shape[1] - 1) // config.time_scale * config.time_scale]  # the reference crops
            yield golden.compare(case, "latent", channels_first(encoder(video)))
            yield from compare_blocks(golden, case, "down_blocks", encoder.chains(), patchify(video, config.patch_size))
        if case.startswith("decode") and tensor == "video":
            others.discard(case.split(".")[0])
            given = f"{case}.latent" if f"{case}.latent" in golden.tensors else "decode.latent"
            latent = channels_last(golden.mx(given))
            timestep = float(case.partition("_t")[2]) if "_t" in case else None
            for elements, way in ((None, "whole"), (1, "frame by frame")):
                noise = RecordedNoise(golden, case)
                video = mx.concatenate(list(decoder.stream(latent, timestep, noise, elements=elements)), axis=1)
                comparison = golden.compare(case, "video", channels_first(video))
                yield Comparison(case, f"video, {way}", comparison.actual, comparison.expected)
            x, conditions = decoder.prepare(latent, timestep, RecordedNoise(golden, case))
            yield from compare_blocks(golden, case, "up_blocks", decoder.chains(conditions), x)
    yield from (NotCovered(case) for case in sorted(others))


@runner("video_vae_*_tiled")
def video_vae_tiled(golden: GoldenSet) -> Iterator[Comparison | NotCovered]:
    """Tiles and their weights, what every piece of the output is, and the blended whole."""
    file = golden.checkpoint(golden.name.removesuffix("_tiled"))
    config = VideoVaeConfig.from_metadata(file.config)
    encoder = load_weights(VideoEncoder(config), file, VIDEO_ENCODER, mx.float32)
    decoder = load_weights(VideoDecoder(config), file, VIDEO_DECODER, mx.float32)
    scales = config.time_scale, config.space_scale
    for case, facts in golden.cases.items():
        if not case.startswith(("dec", "enc")):
            yield NotCovered(case)
            continue
        decoding, tiling = case.startswith("dec"), read_tiling(facts["conf"])
        latents = golden.tensors[f"{case}.latent"].shape[2:]
        tiles = (decoding_tiles if decoding else encoding_tiles)(tiling, latents, *scales)
        expected = np.array([_corners(tile, decoding, latents, scales) for tile in facts["tiles"]])
        ours = np.array(
            [[[(c.latents.start, c.latents.stop), (c.pixels.start, c.pixels.stop)] for c in t] for t in tiles]
        )
        yield Comparison(case, "tiles", ours, expected)
        for index, tile in enumerate(tiles[: len(facts["tiles"])]):
            for axis, cut in enumerate(tile, start=2):
                yield golden.compare(case, f"tile{index}.mask{axis}", cut.weights)
        if not decoding:
            video = channels_last(golden.mx(f"{case}.video"))
            yield golden.compare(case, "latent", channels_first(encode_tiled(encoder, video, tiling)))
            continue
        chunks = list(decode_tiled(decoder, channels_last(golden.mx(f"{case}.latent")), tiling))
        lengths = np.array([chunk.shape[1] for chunk in chunks])
        yield Comparison(case, "chunk_frames", lengths, np.array([n for n in facts["chunk_frames"] if n]))
        whole = np.array([complementary(tiles, pixels=True)])
        yield Comparison(case, "complementary", whole, np.array([facts["complementary"]]))
        yield golden.compare(case, "video", channels_first(mx.concatenate(chunks, axis=1)))


def read_tiling(text: str) -> Tiling:
    """What the reference's printed configuration says."""
    axes: dict[str, BySize | ByCount | None] = {}
    for axis, kind, first, overlap in re.findall(r"(\w+)=(\w+)\(\w+=(\d+), overlap=(\d+)\)", text):
        way = BySize if kind == "DimensionSizeConfig" else ByCount
        axes[axis] = way(int(first), int(overlap)) if int(first) > (0 if way is BySize else 1) else None
    if sorted(axes) != ["frames", "height", "width"]:
        raise ValueError(f"{text} is no configuration of tiles")
    return Tiling(**axes)


def _corners(
    tile: dict[str, list[list[int | None]]], decoding: bool, latents: Sequence[int], scales: tuple[int, int]
) -> list[list[list[int]]]:
    """Per axis the first and last position in latents, then in pixels; an axis that is whole has no end recorded."""
    inner, outer = (tile["in"], tile["out"]) if decoding else (tile["out"], tile["in"])
    lengths = [1 + (latents[0] - 1) * scales[0], *(length * scales[1] for length in latents[1:])]
    filled = [
        [start, length if stop is None else stop] for (start, stop), length in zip(outer[2:], lengths, strict=True)
    ]
    return [[list(map(int, cut)), pixels] for cut, pixels in zip(inner[2:], filled, strict=True)]  # type: ignore[arg-type]
