"""What a training is: a YAML file, read strictly; sections and names are those of Lightricks' trainer.

Whoever has a config for that trainer finds the same words here; what this package does otherwise or not at all is
refused by name, not ignored.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_ltx.checkpoints.catalogue import similar_names
from mlx_ltx.checkpoints.quantize import SETTINGS
from mlx_ltx.errors import UserError
from mlx_ltx.training.flow import NoiseLevels
from mlx_ltx.training.lora import LoraSettings
from mlx_ltx.training.optimizer import Optimization


@dataclass(frozen=True)
class ModelSettings:
    """What is trained.

    Attributes:
        model_path: the base, as ``--model`` takes it: a name of the catalogue, a file, a folder, or owner/name.
        text_encoder_path: as ``--text-encoder``; null for the model's own.
        training_mode: "lora", or "full" for small models.
    """

    model_path: str
    text_encoder_path: str | None = None
    training_mode: str = "lora"


@dataclass(frozen=True)
class Strategy:
    """What is learnt from a sample.

    Attributes:
        name: "text_to_video", "text_to_audio", or "video_to_video": an IC-LoRA, which follows a reference video.
        with_audio: of text_to_video, the sound as well.
        first_frame_conditioning_p: how often the first frame is given.
        sound_given_p, picture_given_p: how often the whole sound is given, or the whole picture, for the other to
            follow; of a training on both.
    """

    name: str = "text_to_video"
    with_audio: bool = False
    first_frame_conditioning_p: float = 0.1
    sound_given_p: float = 0.0
    picture_given_p: float = 0.0

    @property
    def video(self) -> bool:
        return self.name != "text_to_audio"

    @property
    def audio(self) -> bool:
        return self.name == "text_to_audio" or self.with_audio


@dataclass(frozen=True)
class Acceleration:
    """How the model computes.

    Attributes:
        mixed_precision_mode: "bf16": trained parameters are float32, everything else is bfloat16; "no": all float32.
        quantization: as ``--quantize``, of a LoRA's base; null leaves it as it is.
    """

    mixed_precision_mode: str = "bf16"
    quantization: str | None = None

    @property
    def dtype(self) -> mx.Dtype:
        """Of activations, and of what is not trained."""
        return mx.bfloat16 if self.mixed_precision_mode == "bf16" else mx.float32


@dataclass(frozen=True)
class Data:
    """What is learnt from.

    Attributes:
        preprocessed_data_root: the folder of what ``precompute`` makes, and training reads.
        dataset: for ``precompute``: a folder of media with captions, or a .json or .csv that lists them.
        resolution_buckets: for ``precompute``: sizes that clips are brought to, "WIDTHxHEIGHTxFRAMES".
        frame_rate: at which clips are read.
        audio_duration: seconds of each sound in text_to_audio.
        reference_downscale_factor: how many times smaller than the clip a reference video is.
    """

    preprocessed_data_root: str
    dataset: str | None = None
    resolution_buckets: tuple[str, ...] = ("768x512x49",)
    frame_rate: float = 24.0
    audio_duration: float = 5.0
    reference_downscale_factor: int = 1


@dataclass(frozen=True)
class ValidationSample:
    """A clip that shows how far the training is.

    Attributes:
        prompt: what it is to be.
        seed: its own, or null for that of all.
        image: its first frame.
        reference: the video that an IC-LoRA follows.
    """

    prompt: str
    seed: int | None = None
    image: str | None = None
    reference: str | None = None


@dataclass(frozen=True)
class Validation:
    """Clips that are made while training.

    Attributes:
        samples: which.
        interval: steps between them; null makes none.
        video_dims: width, height and frames.
        frame_rate: of them.
        seed: of all samples without their own.
        inference_steps: of guided models; null for the model's usual number.
    """

    samples: tuple[ValidationSample, ...] = ()
    interval: int | None = None
    video_dims: tuple[int, int, int] = (768, 512, 49)
    frame_rate: float = 24.0
    seed: int = 42
    inference_steps: int | None = None


@dataclass(frozen=True)
class Checkpoints:
    """What is saved while training.

    Attributes:
        interval: steps between saves; null saves at the end only.
        keep_last_n: older ones are deleted; -1 keeps all.
        precision: of the weights that come out, "bfloat16" or "float32". What resuming needs is always float32.
    """

    interval: int | None = 250
    keep_last_n: int = 3
    precision: str = "bfloat16"


@dataclass(frozen=True)
class FlowMatching:
    """How noise is drawn.

    Attributes:
        timestep_sampling_mode, timestep_sampling_params: see :class:`mlx_ltx.training.flow.NoiseLevels`.
        separate_sigmas: picture and sound have noise levels of their own.
    """

    timestep_sampling_mode: str = "shifted_logit_normal"
    timestep_sampling_params: Mapping[str, float] = field(default_factory=dict)
    separate_sigmas: bool = False

    @property
    def levels(self) -> NoiseLevels:
        return NoiseLevels(self.timestep_sampling_mode, **self.timestep_sampling_params)


@dataclass(frozen=True)
class TrainingConfig:
    """A whole training; :func:`read_config` makes one from a file, :func:`config_from` from plain data.

    Attributes:
        seed: everything random follows from it.
        output_dir: the folder of everything that comes out.
        plot_interval: steps between drawings of the loss; null draws one at the end only.
    """

    model: ModelSettings
    data: Data
    output_dir: str
    lora: LoraSettings = field(default_factory=LoraSettings)
    training_strategy: Strategy = Strategy()
    optimization: Optimization = field(default_factory=Optimization)
    acceleration: Acceleration = Acceleration()
    validation: Validation = Validation()
    checkpoints: Checkpoints = Checkpoints()
    flow_matching: FlowMatching = field(default_factory=FlowMatching)
    seed: int = 42
    plot_interval: int | None = 100

    @property
    def is_lora(self) -> bool:
        return self.model.training_mode == "lora"

    def identity(self) -> dict[str, Any]:
        """What must be the same for a training to go on: not how often it saves and shows, nor where."""
        values = asdict(self)
        for name in ("validation", "checkpoints", "data", "output_dir", "plot_interval"):
            del values[name]
        if not self.is_lora:
            del values["lora"]
        del values["optimization"]["enable_gradient_checkpointing"]  # the numbers are the same
        if self.optimization.scheduler_type == "constant":
            del values["optimization"]["steps"]  # it can be made longer
        return values


CHOICES = {
    "model.training_mode": ("lora", "full"),
    "training_strategy.name": ("text_to_video", "text_to_audio", "video_to_video"),
    "optimization.scheduler_type": ("constant", "linear", "cosine"),
    "acceleration.mixed_precision_mode": ("bf16", "no"),
    "acceleration.quantization": tuple(SETTINGS),
    "checkpoints.precision": ("bfloat16", "float32"),
    "flow_matching.timestep_sampling_mode": ("shifted_logit_normal", "uniform"),
}
# The least and the most that a number can be.
RANGES: dict[str, tuple[float, float]] = {
    "lora.rank": (1, 4096),
    "lora.alpha": (0, math.inf),
    "lora.dropout": (0, 0.99),
    "training_strategy.first_frame_conditioning_p": (0, 1),
    "training_strategy.sound_given_p": (0, 1),
    "training_strategy.picture_given_p": (0, 1),
    "optimization.learning_rate": (0, math.inf),
    "optimization.steps": (1, math.inf),
    "optimization.batch_size": (1, math.inf),
    "optimization.gradient_accumulation_steps": (1, math.inf),
    "optimization.max_grad_norm": (0, math.inf),
    "optimization.warmup_steps": (0, math.inf),
    "optimization.final_factor": (0, 1),
    "optimization.beta1": (0, 0.9999),
    "optimization.beta2": (0, 0.999999),
    "optimization.eps": (1e-16, 1),
    "optimization.weight_decay": (0, math.inf),
    "optimization.muon_learning_rate": (0, math.inf),
    "optimization.ema_decay": (0, 0.999999),
    "data.frame_rate": (0.01, 1000),
    "data.audio_duration": (0.1, math.inf),
    "data.reference_downscale_factor": (1, 16),
    "validation.interval": (1, math.inf),
    "validation.inference_steps": (1, math.inf),
    "checkpoints.interval": (1, math.inf),
    "checkpoints.keep_last_n": (-1, math.inf),
    "plot_interval": (1, math.inf),
    "seed": (0, 2**63 - 1),
}


def read_config(path: str | os.PathLike[str]) -> TrainingConfig:
    """The config in a YAML file.

    Raises:
        UserError: the file cannot be read, or a setting of it is unknown, missing or out of range; PyYAML is missing.
    """
    try:
        import yaml
    except ImportError:
        raise UserError('training needs PyYAML: python -m pip install "mlx-ltx[training]"') from None
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{path}: is not YAML{where}") from None
    try:
        return config_from(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def config_from(values: Any) -> TrainingConfig:
    """The config in plain data.

    Raises:
        UserError: a setting is unknown, missing or out of range; the line names it.
    """
    config = _section(TrainingConfig, {} if values is None else values, "")
    _check_together(config)
    return config


def _check_together(config: TrainingConfig) -> None:
    """What single settings do not tell."""
    try:
        _ = config.flow_matching.levels
    except TypeError:
        names = ", ".join(f.name for f in dataclasses.fields(NoiseLevels) if f.name != "mode")
        raise UserError(f"flow_matching.timestep_sampling_params: can hold {names}") from None
    strategy, optimization = config.training_strategy, config.optimization
    if strategy.with_audio and strategy.name != "text_to_video":
        raise UserError(f"training_strategy.with_audio: is of text_to_video, not of {strategy.name}")
    given = strategy.sound_given_p + strategy.picture_given_p
    if given and not (strategy.video and strategy.audio):
        raise UserError("training_strategy.sound_given_p and picture_given_p: are of a training with_audio")
    if given > 1:
        raise UserError(f"training_strategy.sound_given_p and picture_given_p: are more than 1 together, {given:g}")
    if config.is_lora and optimization.ema_decay:
        raise UserError("optimization.ema_decay: is for training_mode full; a LoRA has no moving average")
    if config.is_lora and optimization.muon_learning_rate:
        raise UserError("optimization.muon_learning_rate: is for training_mode full; a LoRA is trained with AdamW")
    if optimization.muon_within and not optimization.muon_learning_rate:
        raise UserError("optimization.muon_within: needs an optimization.muon_learning_rate")
    if not config.is_lora and config.acceleration.quantization:
        raise UserError("acceleration.quantization: is for training_mode lora; quantised weights cannot be trained")
    if optimization.warmup_steps >= optimization.steps:
        raise UserError(
            f"optimization.warmup_steps: {optimization.warmup_steps} must be fewer than optimization.steps, "
            f"{optimization.steps}"
        )
    if config.data.reference_downscale_factor != 1 and strategy.name != "video_to_video":
        raise UserError("data.reference_downscale_factor: is of video_to_video, which has references")
    if config.checkpoints.keep_last_n == 0:
        raise UserError("checkpoints.keep_last_n: must be -1 (all) or at least 1")


def _section(kind: type[Any], values: Any, path: str) -> Any:
    """A dataclass from a mapping; ``path`` is where it stands, with a dot at its end."""
    if not isinstance(values, Mapping):
        raise UserError(f"{path.removesuffix('.') or 'the config'}: must hold settings, not {_shown(values)}")
    known = {entry.name: entry for entry in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in known:
            similar = similar_names(str(name), list(known))
            hint = f"did you mean {' or '.join(similar)}?" if similar else f"it can be {', '.join(known)}"
            raise UserError(f"{path}{name}: no such setting; {hint}")
    for name, entry in known.items():
        missing = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if missing and name not in values:
            raise UserError(f"{path}{name}: is missing")
    return kind(**{name: _value(hints[name], value, f"{path}{name}") for name, value in values.items()})


def _value(kind: Any, value: Any, path: str) -> Any:
    """A setting of the type that its field has."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (kind,) = (each for each in arguments if each is not type(None))
        return _value(kind, value, path)
    if dataclasses.is_dataclass(kind):
        return _section(kind, value, f"{path}.")  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{path}: must be a list, not {_shown(value)}")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise UserError(f"{path}: must be a list of {len(arguments)}, not of {len(value)}")
        return tuple(_value(arguments[0], item, f"{path}[{place}]") for place, item in enumerate(value))
    if origin is not None:  # a mapping of numbers
        if not isinstance(value, Mapping):
            raise UserError(f"{path}: must hold settings, not {_shown(value)}")
        return {str(name): _value(float, item, f"{path}.{name}") for name, item in value.items()}
    return _checked(_plain(kind, value, path), path)


def _plain(kind: type[Any], value: Any, path: str) -> Any:
    if kind is str:
        if value is False and "no" in CHOICES.get(path, ()):
            return "no"  # YAML 1.1 reads the word as a truth value
        if isinstance(value, str):
            return value
        raise UserError(f"{path}: must be text, not {_shown(value)}")
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise UserError(f"{path}: must be true or false, not {_shown(value)}")
    number = value
    if isinstance(value, str):  # YAML 1.1 takes 5e-4 for text
        try:
            number = float(value)
        except ValueError:
            number = None
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise UserError(f"{path}: must be a number, not {_shown(value)}")
    if kind is int and number != int(number):
        raise UserError(f"{path}: must be a whole number, not {_shown(value)}")
    return kind(number)


def _checked(value: Any, path: str) -> Any:
    if path in CHOICES and value not in CHOICES[path]:
        raise UserError(f"{path}: must be {' or '.join(CHOICES[path])}, not {_shown(value)}")
    if path in RANGES:
        low, high = RANGES[path]
        if not low <= value <= high:
            allowed = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise UserError(f"{path}: must be {allowed}, not {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    return "nothing" if value is None else str(value)
