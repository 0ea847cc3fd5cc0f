"""From a request to a job: every open choice made, every file found, every mistake reported before any work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_ltx.checkpoints.components import read_config
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.checkpoints.gemma import check_text_width, read_gemma_config
from mlx_ltx.checkpoints.resolve import ModelFiles, resolve_model
from mlx_ltx.errors import UserError
from mlx_ltx.events import Event, Phase
from mlx_ltx.media.atomic import check_output
from mlx_ltx.media.images import load_image
from mlx_ltx.models.audio_vae import DOWNSAMPLING, AudioVaeConfig
from mlx_ltx.models.transformer import TransformerConfig
from mlx_ltx.models.upsampler import UpsamplerConfig
from mlx_ltx.models.video_vae import VideoVaeConfig
from mlx_ltx.models.vocoder import VocoderConfig
from mlx_ltx.pipelines.defaults import NEGATIVE_PROMPT, Defaults, defaults_for
from mlx_ltx.pipelines.pipeline import Pipeline, pipelines
from mlx_ltx.request import Request, flag
from mlx_ltx.sampling.denoise import Grids
from mlx_ltx.sampling.geometry import (
    AudioGrid,
    ClipShape,
    VideoGrid,
    frames_for_duration,
    nearest_frame_counts,
    nearest_multiples,
)
from mlx_ltx.sampling.guidance import Guidance, GuidanceParams

NOT_YET = (2, 4)  # from here on prompts are read by Gemma 4 and frames decoded by diffusion
DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}


@dataclass(frozen=True)
class Job:
    """A request with nothing left open.

    Attributes:
        request: what was asked for, with every open field filled in, so that its settings make the clip again.
        files, checkpoint: where the model lies.
        pipeline: what will run.
        clip: the finished clip's shape.
        steps: denoising steps of a guided run.
        guidance, negative_prompt: of a guided run.
        image_crf: compression of given images.
        dtype: of weights and activations.
        transformer, video_vae, audio_vae, vocoder: the checkpoint's configs.
    """

    request: Request
    files: ModelFiles
    checkpoint: SafetensorsFile
    pipeline: Pipeline
    clip: ClipShape
    steps: int | None
    guidance: Guidance
    negative_prompt: str | None
    image_crf: int
    dtype: mx.Dtype
    transformer: TransformerConfig
    video_vae: VideoVaeConfig
    audio_vae: AudioVaeConfig
    vocoder: VocoderConfig

    def grids(self, clip: ClipShape) -> Grids:
        """The latent grids of a clip made with this job's model."""
        vae, audio = self.video_vae, self.audio_vae
        video_grid = VideoGrid.of_clip(clip, vae.latent_channels, vae.time_scale, vae.space_scale)
        audio_grid = AudioGrid.of_clip(
            clip, audio.latent_bins, audio.z_channels, audio.sampling_rate, audio.hop_length, DOWNSAMPLING
        )
        return Grids(video_grid, audio_grid if self.request.audio else None)

    def phases(self) -> list[Phase]:
        return self.pipeline.phases(self)

    def run(self) -> Iterator[Event]:
        """Make the clip; the last event is :class:`Finished`."""
        yield (yield from self.pipeline.run(self))

    def describe(self) -> dict[str, Any]:
        """The job as plain data, for ``--dry-run``."""
        grids = self.grids(self.clip)
        return {
            "model": self.files.name,
            "checkpoint": str(self.files.checkpoint),
            "text_encoder": str(self.files.text_encoder),
            "spatial_upsampler": str(self.files.spatial_upsampler) if self.pipeline.two_stage else None,
            "pipeline": self.pipeline.name,
            "dtype": str(self.dtype).removeprefix("mlx.core."),
            "width": self.clip.width,
            "height": self.clip.height,
            "num_frames": self.clip.frames,
            "fps": self.clip.fps,
            "duration": round(self.clip.duration, 3),
            "video_tokens": grids.video.tokens if grids.video else 0,
            "audio_tokens": grids.audio.tokens if grids.audio else 0,
            "sample_rate": self.vocoder.sample_rate if self.request.audio else None,
            "seed": self.request.seed,
            "phases": [{"name": p.name, "title": p.title, "total": p.total, "unit": p.unit} for p in self.phases()],
            "settings": self.request.settings(),
        }


def prepare(request: Request) -> Job:
    """Decide everything that a request leaves open, and check what can be checked before the work begins.

    Raises:
        MissingFiles: the model has to be downloaded first.
        UserError: anything that is wrong with the request, the files or the outputs.
    """
    request.validate()
    for path in (request.output, request.output_audio, request.contact_sheet):
        if path is not None:
            check_output(path, request.force)
    files = resolve_model(request.model, request.text_encoder, request.spatial_upsampler)
    checkpoint = SafetensorsFile(files.checkpoint)
    if checkpoint.version >= NOT_YET:
        raise UserError(
            f"{files.checkpoint}: is of model version {'.'.join(map(str, checkpoint.version))}, whose text model and "
            "video decoder are not supported yet; LTX-2 and LTX-2.3 are"
        )
    transformer = read_config(checkpoint, TransformerConfig.from_metadata)
    video_vae = read_config(checkpoint, VideoVaeConfig.from_metadata)
    gemma, _ = read_gemma_config(files.text_encoder)
    check_text_width(gemma, checkpoint)
    pipeline = _choose_pipeline(request, files, video_vae)
    defaults = defaults_for(checkpoint.version, transformer.layers)
    clip = _clip_shape(request, files, pipeline, video_vae, defaults)
    for image in request.images:
        if image.frame >= clip.frames:
            raise UserError(f"--image {image.path}: frame {image.frame} is beyond the clip's last, {clip.frames - 1}")
        load_image(image.path)
    guidance = _guidance(request, pipeline, defaults, transformer.layers)
    steps = (request.steps or defaults.steps) if pipeline.guided else None
    if steps == 1:
        raise UserError("--steps 1: the guided schedule needs at least 2 steps")
    negative = None
    if pipeline.guided:
        negative = NEGATIVE_PROMPT if request.negative_prompt is None else request.negative_prompt
    return Job(
        request=replace(
            request,
            model=request.model or files.name,
            pipeline=pipeline.name,
            width=clip.width,
            height=clip.height,
            num_frames=clip.frames,
            duration=None,
            steps=steps,
            negative_prompt=negative,
            **(_guidance_fields(guidance) if pipeline.guided else {}),
        ),
        files=files,
        checkpoint=checkpoint,
        pipeline=pipeline,
        clip=clip,
        steps=steps,
        guidance=guidance,
        negative_prompt=negative,
        image_crf=defaults.image_crf,
        dtype=_dtype(request.dtype),
        transformer=transformer,
        video_vae=video_vae,
        audio_vae=read_config(checkpoint, AudioVaeConfig.from_metadata),
        vocoder=read_config(checkpoint, VocoderConfig.from_metadata),
    )


def _choose_pipeline(request: Request, files: ModelFiles, video_vae: VideoVaeConfig) -> Pipeline:
    available = pipelines()
    name = request.pipeline or ("distilled" if files.distilled else "one-stage")
    if name not in available:
        raise UserError(f"--pipeline {name}: must be one of {', '.join(available)}")
    pipeline = available[name]
    given = [flag(field) for field in pipeline.unused if getattr(request, field) is not None]
    if given:
        raise UserError(f"the {name} pipeline does not use {', '.join(given)}")
    if pipeline.two_stage:
        if files.spatial_upsampler is None:
            raise UserError(
                f"the {name} pipeline needs a spatial x2 upsampler: put it beside {files.checkpoint.name}, "
                "or pass --spatial-upsampler FILE"
            )
        upsampler = read_config(SafetensorsFile(files.spatial_upsampler), UpsamplerConfig.from_metadata)
        if (upsampler.spatial_factor, upsampler.temporal_factor) != (2, 1):
            raise UserError(f"{files.spatial_upsampler}: the {name} pipeline needs an upsampler of x2 in space only")
        if upsampler.in_channels != video_vae.latent_channels:
            raise UserError(
                f"{files.spatial_upsampler}: made for latents of {upsampler.in_channels} channels, "
                f"but {files.checkpoint.name} has {video_vae.latent_channels}"
            )
    return pipeline


def _clip_shape(
    request: Request, files: ModelFiles, pipeline: Pipeline, vae: VideoVaeConfig, defaults: Defaults
) -> ClipShape:
    scale = 2 if pipeline.two_stage else 1
    entry = files.entry
    size = entry.default_size if entry and entry.default_size else (defaults.width * scale, defaults.height * scale)
    multiple = vae.space_scale * scale
    width, height = request.width or size[0], request.height or size[1]
    for name, value in (("width", width), ("height", height)):
        nearest = nearest_multiples(value, multiple)
        if nearest != (value,):
            raise UserError(
                f"{flag(name)} {value}: the {pipeline.name} pipeline makes multiples of {multiple}; "
                f"the nearest are {' and '.join(map(str, nearest))}"
            )
    if request.duration is not None:
        frames = frames_for_duration(request.duration, request.fps, vae.time_scale)
    else:
        frames = request.num_frames or (entry.default_frames if entry else None) or defaults.num_frames
    nearest = nearest_frame_counts(frames, vae.time_scale)
    if nearest != (frames,):
        raise UserError(
            f"--num-frames {frames}: must be {vae.time_scale}k + 1; the nearest are {' and '.join(map(str, nearest))}"
        )
    return ClipShape(frames, height, width, request.fps)


def _guidance(request: Request, pipeline: Pipeline, defaults: Defaults, layers: int) -> Guidance:
    """The generation's guidance with what the request changes; a silent clip has nothing to be isolated from."""
    if not pipeline.guided:
        return Guidance()

    def params(stream: str, default: GuidanceParams) -> GuidanceParams:
        names = ("cfg_scale", "stg_scale", "stg_blocks", "rescale", "modality_scale", "skip_step")
        given = {name: getattr(request, f"{stream}_{name}") for name in names}
        chosen = replace(default, **{name: value for name, value in given.items() if value is not None})
        outside = [block for block in chosen.stg_blocks if not 0 <= block < layers]
        if outside:
            raise UserError(f"{flag(f'{stream}_stg_blocks')} {outside[0]}: the model has blocks 0 to {layers - 1}")
        if chosen.perturbed and not chosen.stg_blocks:
            raise UserError(f"{flag(f'{stream}_stg_scale')} needs at least one block in {flag(f'{stream}_stg_blocks')}")
        return chosen

    video, audio = params("video", defaults.guidance.video), params("audio", defaults.guidance.audio)
    if not request.audio:
        return Guidance(replace(video, modality_scale=1.0), GuidanceParams())
    return Guidance(video, audio)


def _guidance_fields(guidance: Guidance) -> dict[str, Any]:
    return {
        f"{stream}_{name}": getattr(getattr(guidance, stream), name)
        for stream in ("video", "audio")
        for name in ("cfg_scale", "stg_scale", "stg_blocks", "rescale", "modality_scale", "skip_step")
    }


def _dtype(name: str) -> mx.Dtype:
    """bfloat16 unless asked otherwise; on MLX's CPU backend float32, because bfloat16 is slow there."""
    if name != "auto":
        return DTYPES[name]
    return mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16
