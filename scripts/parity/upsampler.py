"""The latent upsamplers beside the reference, with and without the statistics of the video encoder."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from mlx_ltx.checkpoints.keymaps import UPSAMPLER
from mlx_ltx.checkpoints.loading import load_weights
from mlx_ltx.models.statistics import ChannelStatistics
from mlx_ltx.models.upsampler import LatentUpsampler, UpsamplerConfig, upsample_latent
from parity import Comparison, GoldenSet, runner
from parity.video_vae import channels_first, channels_last


@runner("upsampler_*")
def upsampler(golden: GoldenSet) -> Iterator[Comparison]:
    file = golden.checkpoint()
    model = load_weights(LatentUpsampler(UpsamplerConfig.from_metadata(file.config)), file, UPSAMPLER, mx.float32)
    latent = channels_last(golden.mx("latent"))
    if "out" in golden.tensors:
        yield golden.compare("", "out", channels_first(model(latent)))
    if "normalised_out" in golden.tensors:
        statistics = ChannelStatistics(latent.shape[-1])
        statistics.mean, statistics.std = golden.mx("stats.mean-of-means"), golden.mx("stats.std-of-means")
        result = upsample_latent(model, latent, statistics)
        yield golden.compare("", "normalised_out", channels_first(result))
