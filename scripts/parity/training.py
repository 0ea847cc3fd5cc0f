"""Gradients of a training step against the reference's, parameter by parameter."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_ltx.checkpoints.components import load_transformer
from mlx_ltx.checkpoints.keymaps import TRANSFORMER
from mlx_ltx.training.flow import Noised, velocity_loss
from parity import Comparison, GoldenSet, runner
from parity.transformer import stream_inputs

CASE = "batch2"


@runner("training_gradients_*")
def run_gradients(golden: GoldenSet) -> Iterator[Comparison]:
    """Every parameter: the norm of its gradient, and the entries of it that were recorded."""
    name = golden.name.replace("training_gradients", "transformer")
    checkpoint = golden.checkpoint(name)
    model = load_transformer(checkpoint, mx.float32)
    keys = TRANSFORMER.select(checkpoint.tensors)
    given = stream_inputs(model, golden, CASE)
    noised = {
        stream: Noised(inputs, golden.mx(f"{CASE}.{stream}.target"), golden.mx(f"{CASE}.{stream}.weight"))
        for stream, inputs in zip(("video", "audio"), given, strict=True)
    }

    def total(parameters) -> tuple[mx.array, dict[str, mx.array]]:
        model.update(parameters)
        velocities = model(*given)._asdict()
        losses = {stream: velocity_loss(velocities[stream], each) for stream, each in noised.items()}
        return sum(losses.values(), mx.array(0.0)), losses

    (_, losses), gradients = mx.value_and_grad(total)(model.parameters())
    for stream, loss in losses.items():
        yield golden.compare("", f"{stream}.loss", loss)
    for path, gradient in tree_flatten(gradients):
        official = keys[path].removeprefix(TRANSFORMER.roots[0])
        flat = np.array(gradient).reshape(-1)
        step = -(-flat.size // int(golden.metadata["entries"]))
        yield golden.compare("", f"gradient.{official}", flat[::step])
        yield golden.compare("", f"norm.{official}", np.float32(np.linalg.norm(flat)))
