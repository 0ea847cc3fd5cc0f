"""Clips that show how far a training is, made as a user would make them, with the weights as they are stored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mlx_ltx.errors import UserError
from mlx_ltx.pipelines.job import Model, prepare
from mlx_ltx.request import ImageInput, LoraInput, Request, VideoInput
from mlx_ltx.training.config import TrainingConfig, ValidationSample


def check_samples(config: TrainingConfig, model: Model) -> None:
    """Find out before the training whether its validation clips can be made.

    Raises:
        UserError: a sample's size, image or reference cannot be used.
    """
    if config.validation.interval is None:
        return
    for number, sample in enumerate(config.validation.samples):
        name = f"validation.samples[{number}]"
        needs = config.training_strategy.name == "video_to_video"
        if needs != (sample.reference is not None):
            what = "needs a reference, as its strategy is" if needs else "has a reference, which is of"
            raise UserError(f"{name}: {what} video_to_video")
        if sample.reference is not None:
            if not Path(sample.reference).is_file():
                raise UserError(f"{name}.reference: {sample.reference} does not exist")
            continue  # the pipeline asks for a LoRA that says how large references are; there is none yet
        try:
            prepare(_request(config, model, sample, None, _file(config, Path(config.output_dir), number)))
        except UserError as error:
            raise UserError(f"{name}: {error}") from None


def make_samples(config: TrainingConfig, model: Model, weights: Path, folder: Path) -> Iterator[Path]:
    """Make every sample, and give its file when it is there.

    Args:
        weights: the LoRA, or the whole model.
        folder: where the clips go.

    Raises:
        UserError: one cannot be made.
    """
    for number, sample in enumerate(config.validation.samples, 1):
        path = _file(config, folder, number)
        for _ in prepare(_request(config, model, sample, weights, path)).run():
            pass
        yield path


def _file(config: TrainingConfig, folder: Path, number: int) -> Path:
    return folder / f"{number:02}{'.mp4' if config.training_strategy.video else '.wav'}"


def _request(
    config: TrainingConfig, model: Model, sample: ValidationSample, weights: Path | None, output: Path
) -> Request:
    """The generation that shows a sample; ``weights`` None is the base alone."""
    validation, strategy, files = config.validation, config.training_strategy, model.files
    width, height, frames = validation.video_dims
    whole = weights is not None and not config.is_lora
    lora = (LoraInput(str(weights)),) if weights is not None and config.is_lora else ()
    upsampler = files.spatial_upsampler
    common = Request(
        prompt=sample.prompt,
        model=str(weights) if whole else config.model.model_path,
        text_encoder=str(files.text_encoder) if whole else config.model.text_encoder_path,
        loras=lora,
        seed=validation.seed if sample.seed is None else sample.seed,
        fps=validation.frame_rate,
        quantize=config.acceleration.quantization or "auto",
        force=True,
    )
    if not strategy.video:
        return common.with_changes(pipeline="t2a", duration=config.data.audio_duration, output_audio=output)
    picture = common.with_changes(width=width, height=height, num_frames=frames, output=output, audio=strategy.audio)
    if sample.image is not None:
        picture = picture.with_changes(images=(ImageInput(Path(sample.image)),))
    if sample.reference is not None:
        references = (VideoInput(Path(sample.reference)),)
        return picture.with_changes(pipeline="ic-lora", video_conditionings=references, skip_stage_2=True)
    if files.distilled:
        path = str(upsampler) if whole and upsampler is not None else None
        return picture.with_changes(pipeline="distilled", spatial_upsampler=path)
    return picture.with_changes(pipeline="one-stage", steps=validation.inference_steps)
