"""The steps of a training: what a step does, and that a resumed training is the same training."""

import dataclasses
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_ltx.checkpoints import writing
from mlx_ltx.checkpoints.components import load_transformer
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.errors import UserError
from mlx_ltx.training.flow import FlowLoss
from mlx_ltx.training.loop import Training
from mlx_ltx.training.optimizer import Optimization, Optimizer


class Line(nn.Module):
    def __init__(self, slope=0.0):
        super().__init__()
        self.slope = mx.array([slope])


def squared(model, batch, key):
    return {"square": mx.square(model.slope - batch).mean()}


def batches(number):
    return mx.array(np.random.default_rng(number).normal(3.0, 1.0, 4).astype(np.float32))


def test_the_schedule():
    settings = Optimization(learning_rate=1.0, steps=110, warmup_steps=10, scheduler_type="cosine", final_factor=0.0)
    assert [settings.rate(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert settings.rate(60) == pytest.approx(0.5)
    assert settings.rate(109) == pytest.approx((1 + math.cos(math.pi * 0.99)) / 2)
    linear = Optimization(learning_rate=1.0, steps=100)
    assert [linear.rate(step) for step in (0, 50, 100)] == pytest.approx([1.0, 0.55, 0.1])
    assert Optimization(learning_rate=1.0, scheduler_type="constant").rate(2999) == 1.0


def test_adamw_as_its_paper_has_it():
    settings = Optimization(learning_rate=0.1, scheduler_type="constant", max_grad_norm=0, weight_decay=0.5)
    parameters = {"p": mx.array([2.0])}
    optimizer = Optimizer(settings, parameters)
    value, first, second = 2.0, 0.0, 0.0
    for step, gradient in enumerate((1.0, -3.0, 0.5)):
        parameters, norm = optimizer.apply(step, {"p": mx.array([gradient])}, parameters)
        assert norm.item() == pytest.approx(abs(gradient))
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        value = value * (1 - 0.1 * 0.5) - 0.1 * unbiased[0] / (math.sqrt(unbiased[1]) + 1e-8)
        assert parameters["p"].item() == pytest.approx(value, rel=1e-5)


def test_muon_moves_weights_by_orthogonal_steps_and_leaves_the_rest_to_adamw():
    settings = Optimization(learning_rate=0.5, muon_learning_rate=0.1, scheduler_type="constant", max_grad_norm=0)
    weight = mx.random.normal((6, 8), key=mx.random.key(1))
    parameters = {"table": mx.ones((2, 3)), "a.bias": mx.zeros(6), "a.weight": weight}
    gradients = {name: mx.random.normal(p.shape, key=mx.random.key(2)) for name, p in parameters.items()}
    moved, _ = Optimizer(settings, parameters).apply(0, gradients, parameters)
    assert list(moved) == list(parameters)
    sizes = np.linalg.svd(np.array(moved["a.weight"] - weight), compute_uv=False)
    assert sizes == pytest.approx(np.full(6, 0.1), rel=0.35)  # as exact as five Newton-Schulz steps are
    alone, _ = Optimizer(dataclasses.replace(settings, muon_learning_rate=0.0), parameters).apply(
        0, gradients, parameters
    )
    for name in ("table", "a.bias"):
        assert mx.array_equal(moved[name], alone[name])


def test_muon_can_be_kept_within_some_modules():
    settings = Optimization(muon_learning_rate=0.1, muon_within="blocks.", max_grad_norm=0)
    parameters = {name: mx.random.normal((6, 8), key=mx.random.key(1)) for name in ("blocks.a.weight", "ends.a.weight")}
    gradients = {name: mx.random.normal((6, 8), key=mx.random.key(2)) for name in parameters}
    moved, alone, everywhere = (
        Optimizer(dataclasses.replace(settings, **changes), parameters).apply(0, gradients, parameters)[0]
        for changes in ({}, {"muon_learning_rate": 0.0}, {"muon_within": ""})
    )
    assert mx.array_equal(moved["blocks.a.weight"], everywhere["blocks.a.weight"])
    assert mx.array_equal(moved["ends.a.weight"], alone["ends.a.weight"])
    assert not mx.array_equal(moved["ends.a.weight"], everywhere["ends.a.weight"])


def test_gradients_are_clipped_together():
    seen = {}
    parameters = {"a": mx.zeros(2), "b": mx.zeros(1)}
    optimizer = Optimizer(Optimization(max_grad_norm=1.0), parameters)
    optimizer._parts[0].optimizer.apply_gradients = lambda gradients, parameters: seen.update(gradients) or parameters
    _, norm = optimizer.apply(
        0, {"a": mx.array([3.0, 0.0]), "b": mx.array([4.0])}, {"a": mx.zeros(2), "b": mx.zeros(1)}
    )
    assert norm.item() == pytest.approx(5.0)
    assert seen["a"].tolist() == pytest.approx([0.6, 0.0], rel=1e-5)
    assert seen["b"].tolist() == pytest.approx([0.8], rel=1e-5)


def test_accumulated_batches_are_one_large_batch():
    steps = Optimization(learning_rate=0.1, steps=5)
    large = Training(Line(), steps)
    small = Training(Line(), Optimization(learning_rate=0.1, steps=5, gradient_accumulation_steps=3))
    together = lambda number: mx.concatenate([batches(3 * number + each) for each in range(3)])  # noqa: E731
    whole = list(large.run(squared, together))
    pieces = list(small.run(squared, batches))
    for one, other in zip(whole, pieces, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
    assert small.parameters["slope"].item() == pytest.approx(large.parameters["slope"].item(), rel=1e-5)
    assert [each.samples for each in pieces] == [6] * 5


def test_the_average_follows_behind():
    training = Training(Line(), Optimization(learning_rate=0.1, steps=4, ema_decay=0.9))
    average = 0.0
    for step, _ in enumerate(training.run(squared, batches)):
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * training.parameters["slope"].item()
    assert training.result["slope"].item() == pytest.approx(average, rel=1e-5)
    assert training.module.slope.item() == training.parameters["slope"].item()
    training.show(training.result)
    assert training.module.slope.item() == training.result["slope"].item()


def test_mixed_precision_keeps_parameters_in_float32():
    dtypes = set()

    def loss(model, batch, key):
        dtypes.add(model.slope.dtype)
        return {"square": mx.square(model.slope.astype(mx.float32) - batch).mean()}

    # Each step is far below what bfloat16 tells apart near 3.
    training = Training(Line(3.0), Optimization(learning_rate=1e-4, steps=20), compute=mx.bfloat16)
    list(training.run(loss, lambda number: mx.array([5.0])))
    assert dtypes == {mx.bfloat16}
    assert 3.0005 < training.parameters["slope"].item() < 3.002


def test_frozen_parameters_stay(transformer, make_batch):
    transformer.freeze()
    transformer.blocks[1].video.attn1.unfreeze()
    frozen = mx.array(transformer.blocks[0].video.attn1.to_q.weight)
    training = Training(transformer, Optimization(steps=2))
    assert all(path.startswith("blocks.1.video.attn1.") for path in training.parameters)
    before = dict(training.parameters)
    list(training.run(FlowLoss(), make_batch))
    assert mx.array_equal(transformer.blocks[0].video.attn1.to_q.weight, frozen)
    changed = [path for path in before if not mx.array_equal(before[path], training.parameters[path])]
    assert "blocks.1.video.attn1.to_q.weight" in changed


def test_a_transformer_learns(transformer, make_batch):
    batch = make_batch()
    training = Training(transformer, Optimization(learning_rate=3e-3, steps=12, scheduler_type="constant"))
    steps = list(training.run(FlowLoss(), lambda number: batch))
    assert steps[-1].loss < 0.9 * steps[0].loss
    assert set(steps[0].losses) == {"video", "audio"}
    assert training.history == [step.loss for step in steps]


SETTINGS = Optimization(learning_rate=1e-3, steps=6, warmup_steps=2, ema_decay=0.99, gradient_accumulation_steps=2)


@pytest.mark.parametrize("muon", [0.0, 1e-3])
def test_a_resumed_training_is_the_same(golden, make_batch, tmp_path, muon):
    def begin():
        model = load_transformer(SafetensorsFile(golden / "transformer_23.ckpt.safetensors"), mx.float32)
        return Training(model, dataclasses.replace(SETTINGS, muon_learning_rate=muon), seed=5)

    loss = FlowLoss(first_frame_probability=0.5)
    whole = begin()
    list(whole.run(loss, make_batch))
    first = begin()
    for _ in range(4):
        first.make_step(loss, make_batch)
    first.save(tmp_path / "state.safetensors", {"a": 1})
    second = begin()
    second.restore(tmp_path / "state.safetensors", {"a": 1})
    assert second.step == 4
    list(second.run(FlowLoss(first_frame_probability=0.5), make_batch))
    assert second.history == pytest.approx(whole.history, rel=1e-6)
    for path, expected in whole.result.items():
        assert mx.allclose(second.result[path], expected, rtol=1e-5, atol=1e-7), path


def test_what_cannot_be_resumed(tmp_path):
    path = tmp_path / "state.safetensors"
    training = Training(Line(), SETTINGS)
    training.save(path, {"optimization": {"learning_rate": 0.1}, "seed": 1})
    with pytest.raises(UserError, match=r"another config: optimization.learning_rate was 0.1 and is 0.2;"):
        training.restore(path, {"optimization": {"learning_rate": 0.2}, "seed": 1})
    with pytest.raises(UserError, match="seed was 0 and is 1"):
        Training(Line(), SETTINGS, seed=1).restore(path, {"optimization": {"learning_rate": 0.1}, "seed": 1})
    with pytest.raises(UserError, match="another model"):
        Training(nn.Linear(2, 2), SETTINGS).restore(path, {"optimization": {"learning_rate": 0.1}, "seed": 1})
    writing.write_safetensors(tmp_path / "other.safetensors", {"a": mx.zeros(1)})
    with pytest.raises(UserError, match="not the state of a training"):
        training.restore(tmp_path / "other.safetensors")


def test_a_loss_that_is_no_number_stops_before_anything_changes(tmp_path):
    training = Training(Line(), Optimization(learning_rate=0.1, steps=5))
    given = lambda number: mx.array([math.nan if number == 2 else 1.0])  # noqa: E731
    steps = training.run(squared, given)
    next(steps), next(steps)
    before = training.parameters["slope"].item()
    with pytest.raises(UserError, match="step 3: the loss is not a finite number"):
        next(steps)
    assert training.step == 2
    assert training.parameters["slope"].item() == training.module.slope.item() == before


def test_a_full_disk_keeps_the_state_before(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    training = Training(Line(), Optimization(learning_rate=0.1, steps=5))
    training.save(path)
    before = path.read_bytes()
    training.make_step(squared, batches)

    def full(file, array):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "write_array", full)
    with pytest.raises(UserError, match=r"state.safetensors: cannot be written, the disk is full; nothing was kept"):
        training.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
