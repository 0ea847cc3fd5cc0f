"""Small video autoencoders with random weights, and what tests of them need."""

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_ltx.models.video_vae import VideoVaeConfig

# As long and as large as what the encoder blocks of small_config make smaller.
THREE_TIMES = [["compress_time", {}], ["compress_time", {}], ["compress_all", {}]]


def error(actual: mx.array, expected: mx.array) -> float:
    assert actual.shape == expected.shape
    return float(mx.linalg.norm((actual - expected).flatten()) / mx.linalg.norm(expected.flatten()))


def together(pieces) -> mx.array:
    return mx.concatenate(list(pieces), axis=1)


def filled(module, seed=0, dtype=mx.float32):
    """The module with every parameter random, tables and statistics too (they start as zeros and ones)."""
    mx.random.seed(seed)
    values = [
        (path, (0.3 * mx.random.normal(value.shape) + (1.0 if path.endswith("std") else 0.0)).astype(dtype))
        for path, value in tree_flatten(module.parameters())
        if not path.endswith("timestep_scale_multiplier")
    ]
    module.update(tree_unflatten(values))
    mx.eval(module.parameters())
    return module


def normal(shape, seed=1):
    return mx.random.normal(shape, key=mx.random.key(seed))


class CountedNoise:
    """Draws that depend only on how many were made before."""

    def __init__(self):
        self.shapes = []

    def __call__(self, shape):
        self.shapes.append(shape)
        return normal(shape, seed=100 + len(self.shapes))


def small_config(**changes) -> VideoVaeConfig:
    """All kinds of decoder block with a norm per pixel: twice as large, four times as long."""
    vae = {
        "latent_channels": 4,
        "encoder_blocks": [["compress_all_res", {}], ["compress_time_res", {}], ["res_x", 1]],
        "decoder_blocks": [
            ["res_x", {"num_layers": 1, "inject_noise": True}],
            ["compress_time", {"multiplier": 2}],
            ["res_x", {"num_layers": 2}],
            ["compress_all", {"residual": True, "multiplier": 2}],
            ["res_x", {"num_layers": 1, "inject_noise": True}],
        ],
        "decoder_base_channels": 4,
        "timestep_conditioning": False,
        "patch_size": 2,
    }
    return VideoVaeConfig.from_metadata({"vae": {**vae, **changes}})
