"""Gradient checkpointing: the same gradients, and less memory."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_ltx.models.transformer import Transformer
from mlx_ltx.models.transformer_config import TransformerConfig
from mlx_ltx.sampling.denoise import TextContext
from mlx_ltx.sampling.geometry import VideoGrid
from mlx_ltx.training.flow import Batch, FlowLoss
from mlx_ltx.training.loop import Training
from mlx_ltx.training.optimizer import Optimization


def gradients(model, batch, checkpointing):
    loss = FlowLoss(first_frame_probability=0.5, checkpointing=checkpointing)

    def total(parameters):
        model.update(parameters)
        return sum(loss(model, batch, mx.random.key(7)).values())

    found = mx.grad(total)(model.trainable_parameters())
    mx.eval(found)
    return dict(tree_flatten(found))


def test_the_same_gradients(transformer, make_batch):
    plain = gradients(transformer, make_batch(), False)
    again = gradients(transformer, make_batch(), True)
    assert plain.keys() == again.keys()
    for path, expected in plain.items():
        assert mx.allclose(again[path], expected, rtol=1e-4, atol=1e-6), path


def test_nothing_of_it_is_left_on_the_model(transformer, make_batch):
    gradients(transformer, make_batch(), True)
    assert all(block is own for block, own in zip(transformer._source, transformer.blocks, strict=True))


def memory(layers: int, checkpointing: bool) -> int:
    """The peak of a step over what lies there anyway, with activations far larger than weights."""
    shape = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 8, "out_channels": 8}
    config = {"num_layers": layers, "cross_attention_dim": 32, "caption_proj_before_connector": True, **shape}
    model = Transformer(TransformerConfig.from_metadata({"transformer": config}, audio=False))
    grid = VideoGrid(4, 8, 8, 8, 8, 32, 24.0)
    video = mx.random.normal((4, 4, 8, 8, 8), key=mx.random.key(0))
    text = mx.random.normal((4, 4, 32), key=mx.random.key(1))
    batch = Batch(TextContext(text, text), video, video_grid=grid)
    training = Training(model, Optimization(steps=2, batch_size=4))
    mx.eval(model.parameters())
    loss = FlowLoss(checkpointing=checkpointing)
    training.make_step(loss, lambda number: batch)  # tables are made once
    mx.clear_cache()
    before = mx.get_active_memory()
    return training.make_step(loss, lambda number: batch).peak_bytes - before


def test_memory_stays_near_one_block():
    one, eight = memory(1, False), memory(8, False)
    checkpointed = memory(8, True)
    assert eight > 4 * one
    # What enters each of the eight blocks is little beside a block's inside.
    assert checkpointed < 2 * one
    assert checkpointed < eight / 3


@pytest.mark.parametrize("stream", ["video", "audio"])
def test_one_stream_alone(transformer, make_batch, stream):
    other = "audio" if stream == "video" else "video"
    batch = make_batch(**{other: None})
    plain, again = gradients(transformer, batch, False), gradients(transformer, batch, True)
    for path, expected in plain.items():
        assert mx.allclose(again[path], expected, rtol=1e-4, atol=1e-6), path
