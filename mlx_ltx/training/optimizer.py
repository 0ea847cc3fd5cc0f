"""From gradients to new parameters: AdamW or Muon with a schedule, clipping, and full training's moving average."""

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
        muon_learning_rate: if it is not 0, weights of linear layers and convolutions are moved by Muon
            (https://kellerjordan.github.io/posts/muon/) at this rate, with the same schedule, and the rest by AdamW. It
            needs fewer steps where everything is learnt from the start.
        muon_within: only weights of modules whose path begins so are Muon's, such as "blocks."; its steps are as long
            for a weight that hardly matters, so what makes modulations of noise levels is better AdamW's.
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
    muon_learning_rate: float = 0.0
    muon_within: str = ""
    ema_decay: float = 0.0
    enable_gradient_checkpointing: bool = False

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.learning_rate * self.schedule(step)

    def schedule(self, step: int) -> float:
        """The part of the highest learning rate that a step has, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.scheduler_type == "constant":
            return 1.0
        done = min((step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1), 1.0)
        left = (1 + math.cos(math.pi * done)) / 2 if self.scheduler_type == "cosine" else 1 - done
        return self.final_factor + (1 - self.final_factor) * left


@dataclass(frozen=True)
class _Part:
    """An optimizer of MLX with the parameters that it moves, and its highest learning rate."""

    prefix: str  # of its state's names
    optimizer: optim.Optimizer
    rate: float
    paths: set[str]

    def of(self, arrays: Parameters) -> Parameters:
        return {path: arrays[path] for path in arrays if path in self.paths}


class Optimizer:
    """AdamW, and Muon for weights if it is asked for, over flat parameters; its state is flat arrays to be stored.

    Attributes:
        average: the moving average of the parameters, or None.
    """

    def __init__(self, settings: Optimization, parameters: Parameters):
        self.settings = settings
        adam = optim.AdamW(
            settings.learning_rate,
            [settings.beta1, settings.beta2],
            settings.eps,
            settings.weight_decay,
            bias_correction=True,
        )
        weights: set[str] = set()
        if settings.muon_learning_rate:
            weights = {
                path
                for path, p in parameters.items()
                if path.startswith(settings.muon_within) and path.endswith(".weight") and p.ndim > 1
            }
        # Sets, not views: a view would keep the first parameters in memory.
        self._parts = [_Part("optimizer/", adam, settings.learning_rate, parameters.keys() - weights)]
        if weights:
            muon = optim.Muon(settings.muon_learning_rate, weight_decay=0.0)
            self._parts.append(_Part("muon/", muon, settings.muon_learning_rate, weights))
        for part in self._parts:
            part.optimizer.init(part.of(parameters))
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
        moved: Parameters = {}
        for part in self._parts:
            part.optimizer.learning_rate = part.rate * self.settings.schedule(step)
            moved |= part.optimizer.apply_gradients(part.of(gradients), part.of(parameters))
        parameters = {path: moved[path] for path in parameters}
        if self.average is not None:
            decay = min(self.settings.ema_decay, (1 + step) / (10 + step))
            self.average = {path: self.average[path] * decay + p * (1 - decay) for path, p in parameters.items()}
        return parameters, norm

    def arrays(self) -> Parameters:
        """Everything that a resumed optimizer needs, flat; evaluating it evaluates the optimizer's work."""
        found: Parameters = {}
        for part in self._parts:
            moments = tree_flatten(part.optimizer.state)
            assert isinstance(moments, list)
            found |= {part.prefix + path: array for path, array in moments}
        if self.average is not None:
            found |= {f"average/{path}": array for path, array in self.average.items()}
        return found

    def restore(self, arrays: Mapping[str, mx.array]) -> None:
        """Become the optimizer whose :meth:`arrays` these were."""
        for part in self._parts:
            state: dict[str, Any] = {}
            for path, array in arrays.items():
                if path.startswith(part.prefix):
                    # Parameters are flat here: only the moments stand below them.
                    parameter, _, name = path.removeprefix(part.prefix).rpartition(".")
                    (state.setdefault(parameter, {}) if parameter else state)[name] = array
            part.optimizer.state = state
        if self.average is not None:
            self.average = {path: arrays[f"average/{path}"] for path in self.average}
