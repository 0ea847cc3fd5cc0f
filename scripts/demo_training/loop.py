"""The training loop of one part: seeded by step, resumable at any moment, its losses in a file."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

Losses = dict[str, mx.array]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a part learns.

    Attributes:
        rate: the highest learning rate, after ``warm_up`` steps; it falls to a twentieth along a cosine.
        average: the decay of the moving average of weights, which is what is used; 0 uses the last weights.
    """

    steps: int
    rate: float
    warm_up: int = 50
    decay: float = 0.01
    average: float = 0.0
    clip: float = 1.0
    seed: int = 1

    def rate_at(self, step: int) -> float:
        part = min(1.0, step / self.steps)
        return self.rate * min(1.0, (step + 1) / self.warm_up) * (0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * part)))


class Part:
    """A part in training, whose state lies in ``folder/name``.

    Args:
        loss: of the module, a batch and a random key, to named terms; ``"loss"`` is what is minimised.
        batch: of a step's number.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        module: nn.Module,
        loss: Callable[[Any, mx.array], Losses],
        batch: Callable[[int], Any],
        schedule: Schedule,
    ):
        self.name, self.module, self.batch, self.schedule = name, module, batch, schedule
        self.state_file = folder / name / "state.safetensors"
        self.log_file = folder / name / "losses.jsonl"
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        self.optimizer = optim.AdamW(schedule.rate, betas=[0.9, 0.98], weight_decay=schedule.decay)
        self.optimizer.init(module.trainable_parameters())
        self.average = module.trainable_parameters()
        self.step = 0

        def total(batch: Any, key: mx.array) -> tuple[mx.array, Losses]:
            terms = loss(batch, key)
            return terms["loss"], terms

        self.gradients = nn.value_and_grad(module, total)

    def restore(self) -> None:
        """Go on from the last checkpoint, if there is one."""
        if not self.state_file.exists():
            return
        arrays, metadata = mx.load(str(self.state_file), return_metadata=True)
        groups: dict[str, list[tuple[str, mx.array]]] = {"weights": [], "average": [], "optimizer": []}
        for name, array in arrays.items():
            group, _, path = name.partition("/")
            groups[group].append((path, array))
        self.module.load_weights(groups["weights"], strict=False)
        self.average = tree_unflatten(groups["average"])
        self.optimizer.state = tree_unflatten(groups["optimizer"])
        self.step = int(metadata["step"])

    def save(self) -> None:
        arrays = {}
        trees = {
            "weights": self.module.trainable_parameters(),
            "average": self.average,
            "optimizer": self.optimizer.state,
        }
        for group, tree in trees.items():
            arrays |= {f"{group}/{path}": array for path, array in tree_flatten(tree)}
        partial = self.state_file.with_name("partial.safetensors")
        mx.save_safetensors(str(partial), arrays, {"step": str(self.step)})
        partial.replace(self.state_file)

    def learn(self) -> Losses:
        """One step."""
        self.optimizer.learning_rate = self.schedule.rate_at(self.step)
        key = mx.random.key(self.schedule.seed * 1_000_003 + self.step)
        (_, terms), gradients = self.gradients(self.batch(self.step), key)
        gradients, norm = optim.clip_grad_norm(gradients, self.schedule.clip)
        self.optimizer.update(self.module, gradients)
        decay = min(self.schedule.average, (1 + self.step) / (10 + self.step))
        if self.schedule.average:
            latest = self.module.trainable_parameters()
            self.average = tree_map(lambda a, b: decay * a + (1 - decay) * b, self.average, latest)
        else:
            self.average = self.module.trainable_parameters()
        mx.eval(self.module.parameters(), self.optimizer.state, self.average, terms, norm)
        self.step += 1
        return terms | {"norm": norm}

    def run(self, until: int | None = None, every: int = 20, save_every: int = 100) -> None:
        """Learn up to the end (or a step before), with a line in the log now and then and checkpoints.

        Raises:
            FloatingPointError: the loss is not a number; the last checkpoint stays.
        """
        self.restore()
        end = self.schedule.steps if until is None else min(until, self.schedule.steps)
        sums: dict[str, float] = {}
        count, started = 0, time.perf_counter()
        while self.step < end:
            for name, value in self.learn().items():
                sums[name] = sums.get(name, 0.0) + float(value)
            count += 1
            if not math.isfinite(sums["loss"]):
                raise FloatingPointError(f"{self.name}: the loss is not a number at step {self.step}")
            if self.step % every == 0 or self.step == end:
                line = {"step": self.step, **{name: round(value / count, 5) for name, value in sums.items()}}
                line["seconds"] = round((time.perf_counter() - started) / count, 3)
                with self.log_file.open("a") as log:
                    log.write(json.dumps(line) + "\n")
                print(self.name, line, flush=True)
                sums, count, started = {}, 0, time.perf_counter()
            if self.step % save_every == 0 or self.step == end:
                self.save()

    def use_average(self) -> None:
        """Put the averaged weights into the module."""
        self.module.load_weights(tree_flatten(self.average), strict=False)
