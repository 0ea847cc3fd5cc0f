"""One part's training from its checkpoint on, with its losses in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_ltx.checkpoints.writing import write_safetensors
from mlx_ltx.training.loop import Training
from mlx_ltx.training.optimizer import Optimization
from mlx_ltx.training.plot import draw_losses

SEED = 1
LOG_EVERY, SAVE_EVERY = 20, 100


def optimization(
    steps: int, rate: float, average: float = 0.0, muon: float = 0.0, batches: int = 1, within: str = ""
) -> Optimization:
    """How every part learns: how long, how fast, by which rule and where, averaged or not, from how many batches."""
    return Optimization(
        learning_rate=rate, muon_learning_rate=muon, muon_within=within, steps=steps, scheduler_type="cosine",
        warmup_steps=50, final_factor=0.05, beta2=0.99, ema_decay=average, batch_size=1,
        gradient_accumulation_steps=batches,
    )  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A part and how it is trained.

    Attributes:
        loss: of the module, a batch and a random key: the parts of what is minimised.
        batches: from a number to the batch that has it, always the same.
    """

    name: str
    module: nn.Module
    loss: Callable[[Any, Any, mx.array], dict[str, mx.array]]
    batches: Callable[[int], Any]
    optimization: Optimization


def train(stage: Stage, folder: Path, until: int | None = None) -> None:
    """Train up to the end, or up to a step, from the last checkpoint on; the weights follow when all steps are done.

    Written to ``folder/name``: ``state.safetensors`` to go on from, ``losses.jsonl``, their picture ``loss.png``, and
    ``weights.safetensors``.
    """
    place = folder / stage.name
    place.mkdir(parents=True, exist_ok=True)
    state = place / "state.safetensors"
    training = Training(stage.module, stage.optimization, SEED)
    if state.exists():
        training.restore(state)
    total = stage.optimization.steps
    sums: dict[str, float] = {}
    seen = 0
    for event in training.run(stage.loss, stage.batches):
        seen += 1
        for name, value in {**event.losses, "norm": event.gradient_norm, "seconds": event.seconds}.items():
            sums[name] = sums.get(name, 0.0) + value
        last = event.step in (total, until)
        if event.step % LOG_EVERY == 0 or last:
            line = {"step": event.step, **{name: round(value / seen, 5) for name, value in sums.items()}}
            with (place / "losses.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(stage.name, line, flush=True)
            sums, seen = {}, 0
        if event.step % SAVE_EVERY == 0 or last:
            training.save(state)
            keep_weights(training, place)
            draw_losses(place / "loss.png", training.history, f"demo: {stage.name}")
        if last:
            break


def keep_weights(training: Training, place: Path) -> None:
    """What has been learnt so far (averaged weights if they are averaged), by module path."""
    write_safetensors(place / "weights.safetensors", training.result, {"step": str(training.step)}, force=True)


def use_weights(module: nn.Module, folder: Path, name: str) -> int:
    """Put a part's trained weights into its module; returns the steps behind them.

    Raises:
        FileNotFoundError: the part has not been trained.
    """
    path = folder / name / "weights.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path}: train {name} first")
    weights, metadata = mx.load(str(path), return_metadata=True)
    module.load_weights(list(weights.items()), strict=False)
    mx.eval(module.parameters())
    return int(metadata["step"])
