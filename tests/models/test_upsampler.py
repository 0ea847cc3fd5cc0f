import json
from fractions import Fraction
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

import parity.upsampler
from mlx_ltx.checkpoints.keymaps import UPSAMPLER
from mlx_ltx.checkpoints.loading import load_weights, published_shapes
from mlx_ltx.models.statistics import ChannelStatistics
from mlx_ltx.models.upsampler import BlurDown, LatentUpsampler, UpsamplerConfig, upsample_latent
from parity import GoldenSet, runner_for

GOLDEN = Path(__file__).parents[1] / "golden"
REAL = json.loads((GOLDEN / "real_configs.json").read_text())["upsamplers"]
SETS = ["upsampler_spatial_x2", "upsampler_spatial_x1.5", "upsampler_temporal_x2", "upsampler_spatiotemporal"]
SMALL = {"in_channels": 4, "mid_channels": 32, "num_blocks_per_stage": 1}


def load(name: str) -> LatentUpsampler:
    file = GoldenSet(GOLDEN, name).checkpoint()
    return load_weights(LatentUpsampler(UpsamplerConfig.from_metadata(file.config)), file, UPSAMPLER)


@pytest.mark.parametrize("name", SETS)
def test_every_recorded_output_is_reproduced(name):
    results = list(runner_for(name)(GoldenSet(GOLDEN, name)))
    assert [result.tensor for result in results] == ["out", "normalised_out"]
    for result in results:
        assert result.error < 1e-5, (result.tensor, result.error)


def test_the_comparison_notices_frames_normalised_one_by_one(monkeypatch):
    def frame_by_frame(norm, x):
        flat = x.flatten(0, 1)[:, None]
        return original(norm, flat).reshape(x.shape)

    norm_type = type(load(SETS[0]).initial_norm)
    original = norm_type.__call__
    monkeypatch.setattr(norm_type, "__call__", frame_by_frame)
    for result in runner_for(SETS[0])(GoldenSet(GOLDEN, SETS[0])):
        assert result.error > 1e-2


def test_a_rational_factor_of_two_is_the_plain_one_with_its_weights_elsewhere():
    """19B's upsampler; its blur, with steps of one, does nothing."""
    plain = load("upsampler_spatial_x2")
    rational = LatentUpsampler(UpsamplerConfig.from_metadata({**SMALL, "in_channels": 8, "rational_resampler": True}))
    assert rational.config.spatial_factor == 2
    weights = {path.replace("upsampler.0.", "upsampler.conv."): p for path, p in tree_flatten(plain.parameters())}
    shared = {path for path in weights if not path.startswith(("res_blocks.1", "post_upsample_res_blocks.1"))}
    del plain.res_blocks[1:], plain.post_upsample_res_blocks[1:]
    weights["upsampler.blur_down.kernel"] = mx.random.normal((1, 1, 5, 5))
    rational.load_weights([(path, weights[path]) for path in (*shared, "upsampler.blur_down.kernel")])
    latent = mx.random.normal((2, 2, 3, 5, 8), key=mx.random.key(0))
    assert mx.array_equal(rational(latent), plain(latent))


@pytest.mark.parametrize("name", REAL)
def test_real_config_gives_the_published_keys_and_shapes(name):
    published = {}
    for line in (GOLDEN / "keys" / f"upsampler_{name}.txt").read_text().splitlines():
        if not line.startswith("#"):
            key, shape = line.split("\t")
            published[key] = tuple(json.loads(shape))
    config = UpsamplerConfig.from_metadata(REAL[name])
    selected = UPSAMPLER.select(published)
    assert published_shapes(LatentUpsampler(config)) == {path: published[key] for path, key in selected.items()}
    assert set(selected.values()) == set(published)
    expected = {"temporal": (1, 2), "spatial_x2": (2, 1), "spatial_x1.5": (Fraction(3, 2), 1)}
    factors = next(value for part, value in expected.items() if part in name)
    assert (config.spatial_factor, config.temporal_factor) == factors


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        ({"spatial_scale": 0.75, "rational_resampler": True}, (1, 2, 3, 6, 4)),
        ({"spatial_scale": 1.5, "rational_resampler": True}, (1, 2, 5, 11, 4)),
        ({"spatial_scale": 4.0, "rational_resampler": True}, (1, 2, 12, 28, 4)),
        ({"spatial_upsample": False, "temporal_upsample": True, "spatial_scale": 1.0}, (1, 3, 3, 7, 4)),
        ({"temporal_upsample": True, "rational_resampler": True}, (1, 3, 6, 14, 4)),
    ],
)
def test_sizes(change, shape):
    model = LatentUpsampler(UpsamplerConfig.from_metadata({**SMALL, **change}))
    assert model(mx.zeros((1, 2, 3, 7, 4))).shape == shape
    one = model(mx.zeros((1, 1, 3, 7, 4)))
    assert one.shape == (1, 1, *shape[2:])


def test_blur_is_the_strided_depthwise_convolution():
    blur = BlurDown(2)
    blur.kernel = mx.random.normal((1, 1, 5, 5), key=mx.random.key(1))
    for H, W in ((6, 9), (1, 1), (5, 4)):
        x = mx.random.normal((2, H, W, 3), key=mx.random.key(2))
        weight = mx.broadcast_to(blur.kernel.reshape(1, 5, 5, 1), (3, 5, 5, 1))
        expected = mx.conv2d(x, weight, stride=2, padding=2, groups=3)
        assert np.allclose(np.array(blur(x)), np.array(expected), atol=1e-5)


def test_bfloat16_weights_give_bfloat16_between_latents_of_any_type():
    model = LatentUpsampler(UpsamplerConfig.from_metadata({**SMALL, "spatial_scale": 1.5, "rational_resampler": True}))
    model.update(tree_map(lambda p: p.astype(mx.bfloat16), model.parameters()))
    norms = [(path, p.astype(mx.float32)) for path, p in tree_flatten(model.parameters()) if "norm" in path]
    for changes in ([], norms, [("upsampler.blur_down.kernel", mx.ones((1, 1, 5, 5)))]):
        model.update(tree_unflatten(changes))
        latent = mx.random.normal((1, 2, 3, 4, 4))
        assert model(latent).dtype == mx.bfloat16
        assert upsample_latent(model, latent, ChannelStatistics(4)).dtype == mx.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": 2}, "dims = 2"),
        ({"spatial_upsample": False}, "spatial_upsample = False with temporal_upsample = False"),
        ({"spatial_scale": 1.5}, "spatial_scale = 1.5 is not supported without"),
        ({"spatial_scale": 3.0, "rational_resampler": True}, "spatial_scale = 3.0 is not supported with a"),
        ({"temporal_upsample": True, "spatial_scale": 1.5, "rational_resampler": True}, "spatial_scale = 1.5"),
        ({"mid_channels": 40}, "mid_channels = 40"),
    ],
)
def test_unsupported_configs_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        UpsamplerConfig.from_metadata({**SMALL, **change})


assert parity.upsampler  # registers the runner
