"""The convolutional video autoencoder beside the reference: encode, decode, and the output of every block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx

from mlx_ltx.checkpoints.keymaps import VIDEO_DECODER, VIDEO_ENCODER
from mlx_ltx.checkpoints.loading import load_weights
from mlx_ltx.models.streaming import Stage, run
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
