"""From gradients to new parameters: AdamW with a schedule, clipping, and the moving average of full training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten

Parameters = dict[str, mx.array]  # by module path, flat


@dataclass(frozen=True)
class Optimization:
    """How parameters are moved; the names are those of Lightricks' trainer where it has them.

    Attributes:
        learning_rate: the highest, after the warm-up.
        steps: how many in all.
        batch_size: samples that go through the model at a time.
        gradient_accumulation_steps: batches whose gradients are averaged for one step.
        max_grad_norm: gradients of a greater norm, all taken together, are scaled down to it; 0 leaves them.
        scheduler_type: after the warm-up, "constant", "cosine" (to ``final_factor``) or "linear" (the same).
        warmup_steps: the rate grows linearly over so many steps.
        final_factor: of the learning rate, what is left at the last step.
        beta1, beta2, eps, weight_decay: AdamW's (https://arxiv.org/abs/1711.05101), with bias correction.
        ema_decay: of the moving average of parameters; 0 keeps none. It begins faster, at (1 + step) / (10 + step).
        enable_gradient_checkpointing: compute blocks twice to keep memory near one block.
    """

    learning_rate: float = 5e-4
    steps: int = 3000
    batch_size: int = 2
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    scheduler_type: str = "linear"
    warmup_steps: int = 0
    final_factor: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    ema_decay: float = 0.0
    enable_gradient_checkpointing: bool = False

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.scheduler_type == "constant":
            return self.learning_rate
        done = min((step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1), 1.0)
        left = (1 + math.cos(math.pi * done)) / 2 if self.scheduler_type == "cosine" else 1 - done
        return self.learning_rate * (self.final_factor + (1 - self.final_factor) * left)


class Optimizer:
    """AdamW over flat parameters, with its state as flat arrays that can be stored.

    Attributes:
        average: the moving average of the parameters, or None.
    """

    def __init__(self, settings: Optimization, parameters: Parameters):
        self.settings = settings
        self._adam = optim.AdamW(
            settings.learning_rate,
            [settings.beta1, settings.beta2],
            settings.eps,
            settings.weight_decay,
            bias_correction=True,
        )
        self._adam.init(parameters)
        # As they are, not the same arrays: the average must not change its source.
        self.average: Parameters | None = dict(parameters) if settings.ema_decay else None

    def apply(self, step: int, gradients: Parameters, parameters: Parameters) -> tuple[Parameters, mx.array]:
        """The new parameters, and the norm of all gradients before clipping; both lazy.

        Args:
            step: counted from 0.
            gradients: float32, averaged over the step's batches.
        """
        norm = mx.sqrt(mx.stack([mx.square(gradient).sum() for gradient in gradients.values()]).sum())
        if self.settings.max_grad_norm > 0:
            scale = mx.minimum(self.settings.max_grad_norm / (norm + 1e-6), 1.0)
            gradients = {path: gradient * scale for path, gradient in gradients.items()}
        self._adam.learning_rate = self.settings.rate(step)
        parameters = self._adam.apply_gradients(gradients, parameters)
        if self.average is not None:
            decay = min(self.settings.ema_decay, (1 + step) / (10 + step))
            self.average = {path: self.average[path] * decay + p * (1 - decay) for path, p in parameters.items()}
        return parameters, norm

    def arrays(self) -> Parameters:
        """Everything that a resumed optimizer needs, flat; evaluating it evaluates the optimizer's work."""
        moments = tree_flatten(self._adam.state)
        assert isinstance(moments, list)
        found = {f"optimizer/{path}": array for path, array in moments}
        if self.average is not None:
            found |= {f"average/{path}": array for path, array in self.average.items()}
        return found

    def restore(self, arrays: Mapping[str, mx.array]) -> None:
        """Become the optimizer whose :meth:`arrays` these were."""
        state: dict[str, Any] = {}
        for path, array in arrays.items():
            if path.startswith("optimizer/"):
                # Parameters are flat here: only the moments stand below them.
                parameter, _, name = path.removeprefix("optimizer/").rpartition(".")
                (state.setdefault(parameter, {}) if parameter else state)[name] = array
        self._adam.state = state
        if self.average is not None:
            self.average = {path: arrays[f"average/{path}"] for path in self.average}
