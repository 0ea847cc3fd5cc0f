"""The steps of a training, for any network and any loss; its state can be stored and resumed exactly."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.checkpoints.writing import write_safetensors
from mlx_ltx.errors import UserError
from mlx_ltx.events import TrainingStep
from mlx_ltx.training.optimizer import Optimization, Optimizer, Parameters

Data = TypeVar("Data")
# From the model, a batch and a random key to the parts of the loss, scalars whose sum is minimised.
Loss = Callable[[nn.Module, Data, mx.array], dict[str, mx.array]]
# From a number to the batch that has it, always the same: batches count on through all epochs.
Batches = Callable[[int], Data]
FORMAT = "mlx_ltx training state 1"


class Training:
    """What a training changes: the trainable parameters of a module, the optimizer, and the number of steps done.

    Parameters and moments are float32, whatever the module computes in. Between steps the module has the current
    parameters, in ``compute``.

    Args:
        module: what is trained; only what is not frozen changes.
        optimization: how.
        seed: everything random in a step follows from it and the step's number.
        compute: the dtype in which trainable parameters meet activations. Frozen ones stay as they are.

    Attributes:
        step: how many steps have been made.
        parameters: by module path.
        history: the loss of every step so far.
    """

    def __init__(
        self, module: nn.Module, optimization: Optimization, seed: int = 0, compute: mx.Dtype = mx.float32
    ) -> None:
        flat = tree_flatten(module.trainable_parameters())
        assert isinstance(flat, list)
        if not flat:
            raise ValueError("nothing of the module is trainable")
        self.module, self.optimization, self.seed, self.compute = module, optimization, seed, compute
        self.step = 0
        self.history: list[float] = []
        module.train()
        self.parameters: Parameters = {path: array.astype(mx.float32) for path, array in flat}
        self.optimizer = Optimizer(optimization, self.parameters)
        self.show(self.parameters)

    @property
    def result(self) -> Parameters:
        """What has been learnt: the moving average, or the parameters without one."""
        return self.parameters if self.optimizer.average is None else self.optimizer.average

    def show(self, parameters: Mapping[str, mx.array]) -> None:
        """Have the module compute with ``parameters``; :meth:`make_step` goes back to the trained ones."""
        tree = tree_unflatten([(path, array.astype(self.compute)) for path, array in parameters.items()])
        assert isinstance(tree, dict)
        self.module.update(tree)

    def make_step(self, loss: Loss[Data], batches: Batches[Data]) -> TrainingStep:
        """One step over ``gradient_accumulation_steps`` batches.

        Raises:
            UserError: the loss or the gradient is not finite; nothing has been changed.
        """
        started = time.perf_counter()
        mx.reset_peak_memory()
        count = self.optimization.gradient_accumulation_steps

        def total(parameters: Parameters, number: int) -> tuple[mx.array, dict[str, mx.array]]:
            self.show(parameters)
            parts = loss(self.module, batches(number), random_key(self.seed, number))
            return sum(parts.values(), mx.array(0.0)), parts

        gradient_of = mx.value_and_grad(total)
        gradients: Parameters = {}
        losses: dict[str, mx.array] = {}
        for number in range(self.step * count, (self.step + 1) * count):
            (_, parts), found = gradient_of(self.parameters, number)
            gradients = _added(gradients, found, 1 / count)
            losses = _added(losses, parts, 1 / count)
            mx.eval(gradients, losses)
        parameters, norm = self.optimizer.apply(self.step, gradients, self.parameters)
        values = {name: float(value.item()) for name, value in losses.items()}  # type: ignore[arg-type]
        gradient_norm = float(norm.item())  # type: ignore[arg-type]
        if not math.isfinite(sum(values.values()) + gradient_norm):
            self.show(self.parameters)
            what = "the loss" if not math.isfinite(sum(values.values())) else "the gradient"
            raise UserError(
                f"step {self.step + 1}: {what} is not a finite number; try a lower optimization.learning_rate"
            )
        del gradients, found
        mx.eval(parameters, list(self.optimizer.arrays().values()))
        self.parameters = parameters
        self.show(parameters)
        rate = self.optimization.rate(self.step)
        self.step += 1
        self.history.append(sum(values.values()))
        return TrainingStep(
            self.step,
            self.optimization.steps,
            values,
            rate,
            gradient_norm,
            time.perf_counter() - started,
            count * self.optimization.batch_size,
            mx.get_peak_memory(),
        )

    def run(self, loss: Loss[Data], batches: Batches[Data]) -> Iterator[TrainingStep]:
        """Make all steps that are left; raises as :meth:`make_step`."""
        while self.step < self.optimization.steps:
            yield self.make_step(loss, batches)

    def save(self, path: str | os.PathLike[str], settings: Mapping[str, Any] | None = None) -> None:
        """Store everything that resuming needs, in one file that appears complete or not at all.

        Args:
            settings: what the training was made with, as JSON can hold it, for :meth:`restore` to compare.

        Raises:
            UserError: the file cannot be written, or the disk is full.
        """
        tensors = {f"parameters/{name}": array for name, array in self.parameters.items()}
        tensors |= self.optimizer.arrays()
        tensors["history"] = mx.array(np.array(self.history, np.float32))
        metadata = {"training": FORMAT, "step": str(self.step), "seed": str(self.seed)}
        metadata["settings"] = json.dumps(settings or {}, sort_keys=True)
        write_safetensors(path, tensors, metadata, force=True)

    def restore(self, path: str | os.PathLike[str], settings: Mapping[str, Any] | None = None) -> None:
        """Go on exactly where :meth:`save` was called.

        Raises:
            UserError: the file is no state of a training, or of another one.
        """
        file = SafetensorsFile(path)
        if file.metadata.get("training") != FORMAT:
            raise UserError(f"{path}: is not the state of a training")
        different = _difference(json.loads(file.metadata["settings"]), json.loads(json.dumps(settings or {})))
        if int(file.metadata["seed"]) != self.seed:
            different = f"seed was {file.metadata['seed']} and is {self.seed}"
        if different:
            raise UserError(
                f"{path}: belongs to a training with another config: {different}; restore the config, or begin anew in "
                "another output_dir"
            )
        arrays = dict(file.arrays)
        names = {f"parameters/{name}": array.shape for name, array in self.parameters.items()}
        stored = {key: info.shape for key, info in file.tensors.items() if key.startswith("parameters/")}
        if {key: tuple(shape) for key, shape in names.items()} != stored:
            raise UserError(f"{path}: belongs to the training of another model; its parameters are others")
        if (self.optimizer.average is not None) != any(key.startswith("average/") for key in arrays):
            raise UserError(f"{path}: was made with another ema_decay")
        mx.eval(arrays)
        self.parameters = {name: arrays[f"parameters/{name}"] for name in self.parameters}
        self.optimizer.restore(arrays)
        self.history = np.array(arrays["history"]).astype(float).tolist()
        self.step = int(file.metadata["step"])
        self.show(self.parameters)


def random_key(seed: int, number: int) -> mx.array:
    """The random key of the batch with this number."""
    return mx.random.key(int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0]))


def _added(sums: dict[str, mx.array], values: Mapping[str, mx.array], weight: float) -> dict[str, mx.array]:
    weighted = {name: value * weight for name, value in values.items()} if weight != 1 else dict(values)
    return {name: sums[name] + value for name, value in weighted.items()} if sums else weighted


def _difference(stored: Mapping[str, Any], current: Mapping[str, Any], below: str = "") -> str:
    """The first setting that differs, in words; empty if none does."""
    for key in sorted(stored.keys() | current.keys()):
        old, new = stored.get(key), current.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            if found := _difference(old, new, f"{below}{key}."):
                return found
        elif old != new:
            return f"{below}{key} was {json.dumps(old)} and is {json.dumps(new)}"
    return ""
