"""A whole training as a generator of events: load, train, save, show, and go on where it stopped."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_ltx.checkpoints.components import load_transformer
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.checkpoints.keymaps import TRANSFORMER
from mlx_ltx.checkpoints.loading import FP8
from mlx_ltx.checkpoints.quantize import Quantization
from mlx_ltx.checkpoints.writing import write_safetensors
from mlx_ltx.errors import UserError
from mlx_ltx.events import (
    Event,
    FileWritten,
    Phase,
    PhaseStarted,
    Planned,
    Progress,
    TrainingFinished,
    TrainingStep,
    Warned,
)
from mlx_ltx.media.atomic import atomic_output
from mlx_ltx.pipelines.job import open_model
from mlx_ltx.request import Request
from mlx_ltx.training.config import TrainingConfig
from mlx_ltx.training.dataset import DataSet, Shuffled
from mlx_ltx.training.flow import Batch, FlowLoss
from mlx_ltx.training.loop import Loss, Training
from mlx_ltx.training.lora import LoraTraining
from mlx_ltx.training.plot import draw_losses
from mlx_ltx.training.validation import check_samples, make_samples
from mlx_ltx.version import __version__

PRECISIONS = {"bfloat16": mx.bfloat16, "float32": mx.float32}
CHECKPOINTS, STATE = "checkpoints", "training_state_step_"
LOAD, TRAIN, VALIDATE = "load-model", "train", "validate"


def train(config: TrainingConfig, resume: bool = False) -> Iterator[Event]:
    """Train; the last event is :class:`mlx_ltx.events.TrainingFinished`.

    What is stored last is complete whatever happens: the training can be killed at any moment and resumed.

    Args:
        resume: go on after the newest stored state in ``output_dir``.

    Raises:
        UserError: before the first event for all that can be known then; later for a loss that is not a number, or a
            disk that is full.
    """
    return Trainer(config).run(resume)


@dataclass(frozen=True)
class Saved:
    """A stored step."""

    step: int
    state: Path


class Trainer:
    """Everything that one training needs; nothing of the weights is read before it runs.

    Raises:
        UserError: the model, the data set or a validation sample cannot be used.
    """

    def __init__(self, config: TrainingConfig):
        self.config = config
        self.output = Path(config.output_dir)
        self.model = open_model(Request(model=config.model.model_path, text_encoder=config.model.text_encoder_path))
        strategy = config.training_strategy
        self.data = DataSet(
            config.data.preprocessed_data_root, strategy.video, strategy.audio, strategy.name == "video_to_video"
        )
        self.batches = Shuffled(self.data, config.optimization.batch_size, config.seed)
        self.compute = config.acceleration.dtype
        self.identity = config.identity() | {"data set": self.data.identity()}
        if not config.is_lora:
            self._check_plain()
        self._check_widths()
        check_samples(config, self.model)
        self.training: Training | None = None
        self.lora: LoraTraining | None = None

    def _check_plain(self) -> None:
        checkpoint = self.model.checkpoint
        if checkpoint.quantization is not None or any(info.dtype == FP8 for info in checkpoint.tensors.values()):
            raise UserError(
                f"model.model_path: {checkpoint.path} is quantised, and quantised weights cannot be trained; give the "
                "bf16 checkpoint, or set model.training_mode to lora"
            )

    def _check_widths(self) -> None:
        """The data set's latents and texts are as wide as the model's."""
        sample, config = self.data.samples[0], self.model.transformer
        texts = SafetensorsFile(sample.text).tensors
        for name, stream in (("video", config.video), ("audio", config.audio)):
            if stream is None or name not in self.data.wanted:
                continue
            shape, text = sample.latents.tensors[name].shape, texts[name].shape[-1]
            channels = shape[-1] if name == "video" else shape[-1] * shape[-2]
            if (channels, text) != (stream.in_channels, stream.caption_channels or stream.context_dim):
                raise UserError(
                    f"data.preprocessed_data_root: {self.data.folder} was made with {self.data.description['model']}, "
                    f"whose {name} latents or texts have another width than those of {self.model.files.name}"
                )

    def saved(self) -> list[Saved]:
        """The stored steps in ``output_dir``, in order."""
        found = []
        for path in (self.output / CHECKPOINTS).glob(f"{STATE}*.safetensors"):
            if match := re.fullmatch(rf"{STATE}(\d+)", path.stem):
                found.append(Saved(int(match[1]), path))
        return sorted(found, key=lambda each: each.step)

    def describe(self) -> dict[str, Any]:
        """The training as plain data, for ``--dry-run``."""
        self._build()
        assert self.training is not None
        optimization, saved = self.config.optimization, self.saved()
        return {
            "model": self.model.files.name,
            "training_mode": self.config.model.training_mode,
            "strategy": self.config.training_strategy.name,
            "samples": len(self.data),
            "shapes": len(self.batches.groups),
            "steps": optimization.steps,
            "samples_per_step": optimization.batch_size * optimization.gradient_accumulation_steps,
            "epochs": round(optimization.steps * optimization.gradient_accumulation_steps / self.batches.per_epoch, 2),
            "trained_parameters": sum(array.size for array in self.training.parameters.values()),
            "trained_layers": len(self.lora.names) if self.lora is not None else None,
            "output_dir": str(self.output),
            "resumable_step": saved[-1].step if saved else None,
        }

    def run(self, resume: bool) -> Iterator[Event]:
        saved = self.saved()
        if resume and not saved:
            raise UserError(f"--resume: {self.output / CHECKPOINTS} holds no stored training to go on with")
        if saved and not resume:
            raise UserError(
                f"output_dir: {self.output} holds a training of {saved[-1].step} steps; go on with --resume, or give "
                "another folder"
            )
        if saved and saved[-1].step >= self.config.optimization.steps:
            raise UserError(
                f"--resume: the training has had its {saved[-1].step} steps (optimization.steps); nothing is left to do"
            )
        return self._run(saved[-1] if saved else None)

    def _run(self, last: Saved | None) -> Iterator[Event]:
        started = time.perf_counter()
        config, total = self.config, self.config.optimization.steps
        left = total - (last.step if last else 0)
        phases = (
            Phase(LOAD, f"Loading {self.model.files.name}", None),
            Phase(TRAIN, f"Training {left} steps on {len(self.data)} samples", total, "steps"),
        )
        yield Planned(phases)
        yield PhaseStarted(0, phases[0])
        self._build()
        training = self.training
        assert training is not None
        if last is not None:
            training.restore(last.state, self.identity)
        for left_behind in (self.output / CHECKPOINTS).glob(".*.partial.*"):
            left_behind.unlink()  # of a training that was killed while it saved
        self._write_config()
        yield PhaseStarted(1, phases[1])
        peak = 0
        weights: Path | None = None
        while training.step < total:
            event = self._step(training)
            peak = max(peak, event.peak_bytes)
            yield event
            done = training.step == total
            if done or _due(training.step, config.checkpoints.interval):
                weights = yield from self._save(training)
            if done or _due(training.step, config.plot_interval):
                yield self._plot(training)
            if config.validation.samples and _due(training.step, config.validation.interval):
                yield from self._validate(training, weights)
                if not done:
                    yield PhaseStarted(1, phases[1])
                    yield Progress(TRAIN, training.step, total)
        assert weights is not None
        tail = training.history[-max(total // 10, 1) :]
        yield TrainingFinished(weights, training.step, float(np.mean(tail)), time.perf_counter() - started, peak)

    def _step(self, training: Training) -> TrainingStep:
        try:
            return training.make_step(self._loss(), self.batches)
        except UserError as error:
            saved = self.saved()
            kept = f"step {saved[-1].step} is stored in {saved[-1].state}" if saved else "nothing was stored before it"
            raise UserError(f"{error}; {kept}") from None

    def _loss(self) -> Loss[Batch]:
        return self._flow if self.lora is None else self.lora.with_dropout(self._flow)

    def _build(self) -> None:
        """Load the model and make it ready; a training that is under way goes on with it."""
        config, strategy = self.config, self.config.training_strategy
        setting = config.acceleration.quantization
        model = load_transformer(
            self.model.checkpoint,
            self.compute if config.is_lora else mx.float32,
            strategy.video,
            strategy.audio,
            Quantization.parse(setting) if setting else None,
        )
        if config.is_lora:
            self.lora = LoraTraining(model, self.model.checkpoint, config.lora, config.seed)
        self._flow = FlowLoss(
            config.flow_matching.levels,
            strategy.first_frame_conditioning_p,
            config.flow_matching.separate_sigmas,
            strategy.sound_given_p,
            strategy.picture_given_p,
            config.optimization.enable_gradient_checkpointing,
        )
        if self.training is None:
            self.training = Training(model, config.optimization, config.seed, self.compute)
        else:
            self.training.module = model
            self.training.show(self.training.parameters)

    def _release(self, training: Training) -> None:
        """Free the model's memory; what has been learnt stays."""
        training.module = self.lora = None  # type: ignore[assignment]
        mx.clear_cache()

    def _save(self, training: Training) -> Generator[Event, None, Path]:
        """Store what has been learnt, then what resuming needs; the path of the former is returned."""
        folder = self.output / CHECKPOINTS
        weights = folder / f"{'lora' if self.config.is_lora else 'model'}_weights_step_{training.step:05}.safetensors"
        self._write_weights(training, weights)
        yield FileWritten(weights, "LoRA" if self.config.is_lora else "model")
        training.save(folder / f"{STATE}{training.step:05}.safetensors", self.identity)
        keep = self.config.checkpoints.keep_last_n
        for old in self.saved()[:-keep] if keep > 0 else []:
            for path in (old.state, weights.with_name(re.sub(r"\d+(?=\.)", f"{old.step:05}", weights.name))):
                with contextlib.suppress(OSError):
                    path.unlink()
        return weights

    def _write_weights(self, training: Training, path: Path) -> None:
        """What has been learnt as a LoRA or as a whole checkpoint, in the official layout."""
        precision = PRECISIONS[self.config.checkpoints.precision]
        software = {"trained_with": f"mlx_ltx {__version__}", "trained_steps": str(training.step)}
        if self.lora is not None:
            lora, strategy = self.config.lora, self.config.training_strategy
            metadata = {"base_model": self.model.checkpoint.path.name, "lora_rank": str(lora.rank)}
            metadata |= {"lora_alpha": f"{lora.alpha:g}", **software}
            if strategy.name == "video_to_video":
                metadata["reference_downscale_factor"] = str(self.config.data.reference_downscale_factor)
            self.lora.save(path, training.result, metadata, precision)
            return
        checkpoint = self.model.checkpoint
        keys = TRANSFORMER.select(checkpoint.tensors)
        tensors = dict(checkpoint.arrays)
        tensors |= {keys[name]: array.astype(precision) for name, array in training.result.items()}
        write_safetensors(path, tensors, {**checkpoint.metadata, **software}, force=True)

    def _write_config(self) -> None:
        """For people: with which settings this folder was made."""
        with atomic_output(self.output / "training_config.json", force=True) as partial:
            partial.write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")

    def _plot(self, training: Training) -> FileWritten:
        path = self.output / "loss.png"
        draw_losses(path, training.history, f"loss of {self.output.name}, {training.step} steps")
        return FileWritten(path, "loss plot")

    def _validate(self, training: Training, saved: Path | None) -> Iterator[Event]:
        """Make the validation clips with what has been learnt; the model makes room for theirs meanwhile."""
        count = len(self.config.validation.samples)
        phase = Phase(VALIDATE, f"Making {count} validation clip{'s' if count > 1 else ''}", count, "clips")
        yield PhaseStarted(2, phase)
        folder = self.output / "validation" / f"step_{training.step:05}"
        stored = saved is not None and saved.stem.endswith(f"_{training.step:05}")
        weights = saved if stored and saved is not None else folder / "weights.safetensors"
        try:
            if not stored:
                self._write_weights(training, weights)
            self._release(training)
            for done, made in enumerate(make_samples(self.config, self.model, weights, folder), 1):
                yield FileWritten(made, "validation clip")
                yield Progress(VALIDATE, done, count)
        except UserError as error:
            yield Warned(f"validation: {error}")
        finally:
            if not stored:
                weights.unlink(missing_ok=True)
        self._build()


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0
