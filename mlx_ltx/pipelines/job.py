"""From a request to a job: every open choice made, every file found, every mistake reported before any work."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_ltx.checkpoints.chat import check_chat
from mlx_ltx.checkpoints.components import read_config
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.checkpoints.gemma import check_text_width, gemma_quantization, read_gemma_config
from mlx_ltx.checkpoints.packs import open_checkpoint
from mlx_ltx.checkpoints.quantize import GEMMA_RULES, Quantization, choose_formats, transformer_rules
from mlx_ltx.checkpoints.resolve import ModelFiles, resolve_model
from mlx_ltx.errors import UserError
from mlx_ltx.events import Event, Phase, Warned
from mlx_ltx.media.atomic import check_output, check_output_folder
from mlx_ltx.media.color import LogCurve
from mlx_ltx.media.exr import is_exr, openexr, read_exr
from mlx_ltx.media.images import load_image
from mlx_ltx.memory.limits import memory_limits
from mlx_ltx.memory.plan import Plan
from mlx_ltx.models.audio_vae import DOWNSAMPLING, AudioVaeConfig
from mlx_ltx.models.gemma import Gemma
from mlx_ltx.models.transformer import Transformer
from mlx_ltx.models.transformer_config import TransformerConfig
from mlx_ltx.models.upsampler import UpsamplerConfig
from mlx_ltx.models.video_vae import VideoVaeConfig
from mlx_ltx.models.vocoder import VocoderConfig
from mlx_ltx.pipelines.defaults import NEGATIVE_PROMPT, Defaults, defaults_for
from mlx_ltx.pipelines.loras import StageLoras, choose_loras
from mlx_ltx.pipelines.pipeline import GUIDANCE, Pipeline, pipelines
from mlx_ltx.pipelines.prompt_cache import Embedded, PromptCache, file_identity
from mlx_ltx.request import BANDS, GUIDANCE_NAMES, SOUND_GUIDANCE, TOKEN_TILES, Request, flag
from mlx_ltx.sampling.denoise import Grids
from mlx_ltx.sampling.geometry import (
    AudioGrid,
    ClipShape,
    VideoGrid,
    frames_for_duration,
    nearest_frame_counts,
    nearest_multiples,
)
from mlx_ltx.sampling.guidance import Apg, CfgStar, Guidance, GuidanceParams, PlainCfg

NOT_YET = (2, 4)  # from here on prompts are read by Gemma 4 and frames decoded by diffusion
DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}


@dataclass(frozen=True)
class Model:
    """A model's files and what its checkpoint says of itself; nothing of the weights has been read.

    Attributes:
        files: where it lies.
        checkpoint: the opened file.
        transformer, video_vae, audio_vae, vocoder: its configs.
        defaults: what its generation does unless asked otherwise.
    """

    files: ModelFiles
    checkpoint: SafetensorsFile
    transformer: TransformerConfig
    video_vae: VideoVaeConfig
    audio_vae: AudioVaeConfig
    vocoder: VocoderConfig
    defaults: Defaults


@dataclass(frozen=True)
class Job:
    """A request with nothing left open.

    Attributes:
        request: what was asked for, with every open field filled in, so that its settings make the clip again.
        shots: the single clips of it.
        model: what makes them.
        pipeline: how.
        clip: each finished clip's shape.
        guidance: of guided denoising; None without.
        loras: what changes the transformer.
        sound: whether the clips have sound.
        dtype: of weights and activations.
        cache: where embedded texts are kept; None keeps none.
        embedded: the texts that need no text model, because their embeddings were kept.
    """

    request: Request
    shots: list[Request]
    model: Model
    pipeline: Pipeline
    clip: ClipShape
    guidance: Guidance | None
    loras: StageLoras
    sound: bool
    dtype: mx.Dtype
    cache: PromptCache | None = None
    embedded: Mapping[str, Embedded] = field(default_factory=dict)

    @property
    def quantization(self) -> Quantization | None:
        """What the transformer's layers become while they are read; None leaves them as the checkpoint has them."""
        return _quantization(self.request.quantize, self.request.group_size)

    @property
    def text_quantization(self) -> Quantization | None:
        """Likewise of the text model."""
        return _quantization(self.request.quantize_text, self.request.group_size)

    @property
    def bands(self) -> int:
        """Into how many parts, one above the other, the picture is split while it is decoded."""
        return BANDS.get(self.request.vae_tiling, 1)

    @property
    def token_tiles(self) -> tuple[int, int] | None:
        """Rows and columns of tiles in which the picture is refined; None is whole."""
        count = TOKEN_TILES.get(self.request.token_tiles)
        if count == 2:
            return (1, 2) if self.clip.width >= self.clip.height else (2, 1)
        return None if count is None else (math.isqrt(count), math.isqrt(count))

    @property
    def curve(self) -> LogCurve:
        """How the networks' values stand for light, in HDR."""
        return self.pipeline.curve

    @property
    def prompts(self) -> list[str]:
        """What the text model is to read, each text once: prompts or segments, then the negative prompt."""
        texts = [segment.text for segment in self.request.segments] or [shot.prompt for shot in self.shots]
        if self.guidance is not None and self.request.negative_prompt is not None:
            texts.append(self.request.negative_prompt)
        return list(dict.fromkeys(texts))

    @property
    def unread(self) -> list[str]:
        """Those that are not there as embeddings already."""
        return [text for text in self.prompts if text not in self.embedded]

    def grids(self, clip: ClipShape) -> Grids:
        """The latent grids of a clip made with this job's model."""
        vae, audio = self.model.video_vae, self.model.audio_vae
        video_grid = VideoGrid.of_clip(clip, vae.latent_channels, vae.time_scale, vae.space_scale)
        audio_grid = AudioGrid.of_clip(
            clip, audio.latent_bins, audio.z_channels, audio.sampling_rate, audio.hop_length, DOWNSAMPLING
        )
        picture = self.pipeline.makes_picture
        return Grids(video_grid if picture else None, audio_grid if self.sound else None)

    def phases(self) -> list[Phase]:
        return self.pipeline.phases(self)

    def run(self) -> Iterator[Event]:
        """Make the clips; the last event is :class:`mlx_ltx.events.Finished`.

        Raises:
            UserError: before the first event, if the job needs more memory than the machine has.
        """
        from mlx_ltx.pipelines.predict import make_fit  # which knows all parts of recipes, and they know jobs

        job, plan, choices = make_fit(self)
        plan.check()
        return job._run(plan, choices)

    def _run(self, plan: Plan, choices: str) -> Iterator[Event]:
        with memory_limits(plan):
            events = self.pipeline.run(self)
            yield next(events)  # the phases come first
            if choices:
                yield Warned(f"the memory of this machine asks for {choices}")
            if not plan.fits:
                yield Warned(plan.complaint)
            yield (yield from events)

    def with_changes(self, **changes: Any) -> Job:
        """The job with other settings of what it holds in memory."""
        request = self.request.with_changes(**changes)
        shots = [shot.with_changes(**changes) for shot in self.shots]
        job = replace(self, request=request, shots=shots, cache=None, embedded={})
        return job if self.cache is None else _with_kept_texts(job)

    def describe(self) -> dict[str, Any]:
        """The job as plain data, for ``--dry-run``."""
        grids, files = self.grids(self.clip), self.model.files
        return {
            "model": files.name,
            "checkpoint": str(files.checkpoint),
            "text_encoder": str(files.text_encoder),
            "spatial_upsampler": str(files.spatial_upsampler) if self.pipeline.two_stage else None,
            "pipeline": self.pipeline.name,
            "guided": self.guidance is not None,
            "dtype": str(self.dtype).removeprefix("mlx.core."),
            "width": self.clip.width,
            "height": self.clip.height,
            "num_frames": self.clip.frames,
            "fps": self.clip.fps,
            "duration": round(self.clip.duration, 3),
            "video_tokens": grids.video.tokens if grids.video else 0,
            "audio_tokens": grids.audio.tokens if grids.audio else 0,
            "sample_rate": self.model.vocoder.sample_rate if self.sound else None,
            "clips": len(self.shots),
            "seeds": [shot.seed for shot in self.shots],
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
    for shot in request.shots():
        for path in shot.outputs:
            if path == shot.output_exr:
                check_output_folder(path, ".exr", request.force)
            else:
                check_output(path, request.force)
    if request.pipeline is not None:
        _check_fields(request, _known_pipeline(request.pipeline))
    model = open_model(request)
    pipeline = _known_pipeline(request.pipeline or ("distilled" if model.files.distilled else "one-stage"))
    _check_fields(request, pipeline)
    _check_upsampler(pipeline, model)
    if pipeline.defaults is not None:
        model = replace(model, defaults=pipeline.defaults(model.defaults))
    if request.enhance_prompt:
        check_chat(model.files.text_encoder)
    clip = pipeline.clip(request, model) if pipeline.clip else clip_shape(request, model, pipeline)
    for image in request.images:
        if image.frame >= clip.frames:
            raise UserError(f"--image {image.path}: frame {image.frame} is beyond the clip's last, {clip.frames - 1}")
        if not is_exr(image.path):
            load_image(image.path)
        elif request.hdr is None:
            raise UserError(f"--image {image.path}: EXR images need --hdr, which says what their values mean")
        elif image.crf is not None:
            raise UserError(f"--image {image.path}: crf {image.crf} is for pictures of 8 bits, not for EXR")
        else:
            read_exr(image.path)
    guided = _is_guided(request, pipeline, model)
    sound = request.audio and pipeline.makes_sound and (pipeline.has_sound is None or pipeline.has_sound(request))
    if request.output_audio is not None and not sound:
        raise UserError(f"--output-audio {request.output_audio}: the source has no sound, so there is none to write")
    guidance = _guidance(request, pipeline, model, sound) if guided else None
    steps = (request.steps or model.defaults.steps) if guided else None
    if steps == 1:
        raise UserError("--steps 1: the guided schedule needs at least 2 steps")
    negative = None
    if guided:
        negative = NEGATIVE_PROMPT if request.negative_prompt is None else request.negative_prompt
    decisions = {
        "model": _lasting_name(request.model) or model.files.name,
        "pipeline": pipeline.name,
        "guided": guided if pipeline.guided is None else None,
        "width": clip.width,
        "height": clip.height,
        "num_frames": None if request.segments else clip.frames,
        "duration": None,
        "fps": clip.fps,
        "steps": steps,
        "negative_prompt": negative,
        **(_guidance_fields(guidance, request.audio) if guidance is not None else {}),
    }
    decided = replace(request, **{k: v for k, v in decisions.items() if k in pipeline.accepts})
    later = [lora.source for lora in request.loras if lora.stage == 2]
    if later and (not pipeline.two_stage or request.skip_stage_2):
        raise UserError(f"--lora {later[0]}: is for stage 2, and there is only one stage")
    loras = choose_loras(
        request,
        model.checkpoint.version,
        model.transformer,
        pipeline.distilled_lora if guided else None,
        pipeline.first_stage_loras,
    )
    if (request.output_exr or request.output_hdr) and request.hdr is None:
        raise UserError("--output-exr and --output-hdr need --hdr, which says in which colour space")
    if request.output_exr is not None:
        openexr()
    job = Job(decided, decided.shots(), model, pipeline, clip, guidance, loras, sound, _dtype(request.dtype))
    check_quantization(job)
    check_tiling(job)
    if pipeline.check is not None:
        pipeline.check(job)
    return _with_kept_texts(job) if request.cache and "prompt" in pipeline.takes else job


def _with_kept_texts(job: Job) -> Job:
    """The job with what the cache holds of its texts; a prompt that is yet to be rewritten is not there."""
    folder, checkpoint = job.model.files.text_encoder, job.model.checkpoint.path
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".json")]
    weights = list(checkpoint.glob("*.safetensors")) if checkpoint.is_dir() else [checkpoint]
    quantized = repr(job.text_quantization)
    cache = PromptCache([file_identity(files), file_identity(weights), str(job.dtype), quantized])
    if job.request.enhance_prompt:
        return replace(job, cache=cache)
    found = {text: cache.get(text) for text in job.prompts}
    return replace(job, cache=cache, embedded={text: kept for text, kept in found.items() if kept is not None})


def open_model(request: Request) -> Model:
    """The model that a request names, and what its files say.

    Raises:
        UserError: as :func:`prepare`.
    """
    files = resolve_model(request.model, request.text_encoder, request.spatial_upsampler)
    checkpoint = open_checkpoint(files.checkpoint)
    if checkpoint.version >= NOT_YET:
        raise UserError(
            f"{files.checkpoint}: is of model version {'.'.join(map(str, checkpoint.version))}, whose text model and "
            "video decoder are not supported yet; LTX-2 and LTX-2.3 are"
        )
    transformer = read_config(checkpoint, TransformerConfig.from_metadata)
    gemma, _ = read_gemma_config(files.text_encoder)
    check_text_width(gemma, checkpoint)
    return Model(
        files,
        checkpoint,
        transformer,
        read_config(checkpoint, VideoVaeConfig.from_metadata),
        read_config(checkpoint, AudioVaeConfig.from_metadata),
        read_config(checkpoint, VocoderConfig.from_metadata),
        defaults_for(checkpoint.version, transformer.layers),
    )


def _known_pipeline(name: str) -> Pipeline:
    available = pipelines()
    if name not in available:
        raise UserError(f"--pipeline {name}: must be one of {', '.join(available)}")
    return available[name]


def _check_fields(request: Request, pipeline: Pipeline) -> None:
    """Everything given is used, and everything needed is given."""
    given = {entry.name for entry in fields(request) if getattr(request, entry.name) != entry.default}
    unused = sorted(
        "--no-guided" if (name, request.guided) == ("guided", False) else flag(name)
        for name in given - pipeline.accepts
    )
    if unused:
        raise UserError(f"the {pipeline.name} pipeline does not use {', '.join(dict.fromkeys(unused))}")
    missing = [flag(name) for name in pipeline.needs if name not in given]
    if missing:
        raise UserError(f"the {pipeline.name} pipeline needs {' and '.join(missing)}")


def _is_guided(request: Request, pipeline: Pipeline, model: Model) -> bool:
    if pipeline.guided is not None:
        return pipeline.guided
    guided = (not model.files.distilled) if request.guided is None else request.guided
    if not guided:
        given = [flag(name) for name in sorted(GUIDANCE | {"distilled_lora"}) if getattr(request, name) is not None]
        if given:
            raise UserError(f"denoising without guidance does not use {', '.join(given)}; --guided turns it on")
    return guided


def _check_upsampler(pipeline: Pipeline, model: Model) -> None:
    if not pipeline.two_stage:
        return
    path = model.files.spatial_upsampler
    if path is None:
        raise UserError(
            f"the {pipeline.name} pipeline needs a spatial x2 upsampler: put it beside {model.files.checkpoint.name}, "
            "or pass --spatial-upsampler FILE"
        )
    upsampler = read_config(SafetensorsFile(path), UpsamplerConfig.from_metadata)
    if (upsampler.spatial_factor, upsampler.temporal_factor) != (2, 1):
        raise UserError(f"{path}: the {pipeline.name} pipeline needs an upsampler of x2 in space only")
    if upsampler.in_channels != model.video_vae.latent_channels:
        raise UserError(
            f"{path}: made for latents of {upsampler.in_channels} channels, "
            f"but {model.files.checkpoint.name} has {model.video_vae.latent_channels}"
        )


def clip_shape(request: Request, model: Model, pipeline: Pipeline) -> ClipShape:
    """The shape that the request asks for, or else the model's default.

    Raises:
        UserError: it is not on the model's grid; the message names the nearest shapes that are.
    """
    width, height = clip_size(request, model, pipeline)
    time_scale, entry = model.video_vae.time_scale, model.files.entry
    if request.segments:
        frames = frames_for_duration(sum(segment.seconds for segment in request.segments), request.fps, time_scale)
    elif request.duration is not None:
        frames = frames_for_duration(request.duration, request.fps, time_scale)
    else:
        default = entry.default_frames if entry and entry.default_frames else model.defaults.num_frames
        frames = request.num_frames or default
    check_frame_count(frames, time_scale)
    return ClipShape(frames, height, width, request.fps)


def check_frame_count(frames: int, time_scale: int) -> None:
    nearest = nearest_frame_counts(frames, time_scale)
    if nearest != (frames,):
        raise UserError(
            f"--num-frames {frames}: must be {time_scale}k + 1; the nearest are {' and '.join(map(str, nearest))}"
        )


def clip_size(request: Request, model: Model, pipeline: Pipeline) -> tuple[int, int]:
    """Width and height in pixels; raises as :func:`clip_shape`."""
    scale = 2 if pipeline.two_stage else 1
    entry, defaults = model.files.entry, model.defaults
    size = entry.default_size if entry and entry.default_size else (defaults.width * scale, defaults.height * scale)
    multiple = model.video_vae.space_scale * scale
    width, height = request.width or size[0], request.height or size[1]
    for name, value in (("width", width), ("height", height)):
        nearest = nearest_multiples(value, multiple)
        if nearest != (value,):
            raise UserError(
                f"{flag(name)} {value}: the {pipeline.name} pipeline makes multiples of {multiple}; "
                f"the nearest are {' and '.join(map(str, nearest))}"
            )
    return width, height


def _guidance(request: Request, pipeline: Pipeline, model: Model, sound: bool) -> Guidance:
    """The generation's guidance with what the request changes; one modality alone has nothing to be isolated from."""
    defaults, layers = model.defaults.guidance, model.transformer.layers

    def params(stream: str, default: GuidanceParams) -> GuidanceParams:
        given = {name: getattr(request, f"{stream}_{name}") for name in GUIDANCE_NAMES}
        chosen = replace(default, **{name: value for name, value in given.items() if value is not None})
        outside = [block for block in chosen.stg_blocks if not 0 <= block < layers]
        if outside:
            raise UserError(f"{flag(f'{stream}_stg_blocks')} {outside[0]}: the model has blocks 0 to {layers - 1}")
        if chosen.perturbed and not chosen.stg_blocks:
            raise UserError(f"{flag(f'{stream}_stg_scale')} needs at least one block in {flag(f'{stream}_stg_blocks')}")
        return chosen

    rule = _cfg_rule(request)
    video = replace(params("video", defaults.video), cfg_rule=rule)
    audio = replace(params("audio", defaults.audio), cfg_rule=rule)
    if not pipeline.makes_picture:
        return Guidance(GuidanceParams(), replace(audio, modality_scale=1.0))
    if not sound:
        return Guidance(replace(video, modality_scale=1.0), GuidanceParams())
    return Guidance(video, audio)


def _cfg_rule(request: Request) -> PlainCfg | CfgStar | Apg:
    if request.cfg_rule == "star":
        return CfgStar()
    if request.cfg_rule == "apg":
        eta = 1.0 if request.apg_eta is None else request.apg_eta
        return Apg(eta, request.apg_norm_threshold or 0.0, request.apg_momentum or 0.0)
    return PlainCfg()


def _guidance_fields(guidance: Guidance, sound: bool) -> dict[str, Any]:
    """The guidance as a request says it; without sound, nothing of what guides it."""
    values = {
        f"{stream}_{name}": getattr(getattr(guidance, stream), name)
        for stream in ("video", "audio")
        for name in GUIDANCE_NAMES
    }
    return values if sound else {**values, **dict.fromkeys(SOUND_GUIDANCE)}


def _lasting_name(model: str | None) -> str | None:
    """A path that holds from any folder; anything else as it is."""
    return str(Path(model).absolute()) if model is not None and Path(model).exists() else model


def _quantization(name: str, group_size: int | None) -> Quantization | None:
    """The setting of that name; the group size is only for the kinds that have a choice of it."""
    if name in ("auto", "none"):
        return None
    return Quantization.parse(name, group_size if name.startswith("q") else None)


def check_quantization(job: Job) -> None:
    """Nothing is quantised twice, and there is something to quantise."""
    request, files = job.request, job.model.files
    if job.quantization is not None:
        if job.model.checkpoint.quantization is not None:
            raise UserError(f"--quantize {request.quantize}: {files.name} is quantised already; leave it out")
        transformer = Transformer(job.model.transformer)
        choose_formats(transformer, transformer_rules(job.model.transformer.layers), job.quantization)
    if job.text_quantization is not None:
        gemma, metadata = read_gemma_config(files.text_encoder)
        if gemma_quantization(metadata) is not None:
            raise UserError(
                f"--quantize-text {request.quantize_text}: {files.text_encoder.name} is quantised already; leave it out"
            )
        choose_formats(Gemma(gemma), GEMMA_RULES, job.text_quantization, "--quantize-text")


def check_tiling(job: Job) -> None:
    """Raise UserError if the job's picture cannot be split for decoding or refining as is asked for."""
    tiling, vae = job.request.vae_tiling, job.model.video_vae
    rows = -(-job.clip.height // vae.space_scale)
    if job.bands > rows:
        raise UserError(f"--vae-tiling {tiling}: the picture has only {rows} rows of latents to split")
    if job.bands > 1 and not vae.local_decoder:
        raise UserError(
            f"--vae-tiling {tiling}: this model's decoder has a norm over the whole clip, which bands would change; "
            "use none or reference"
        )
    if job.token_tiles is not None:
        if job.request.skip_stage_2:
            raise UserError(f"--token-tiles {job.request.token_tiles}: there is no second stage with --skip-stage-2")
        columns = -(-job.clip.width // vae.space_scale)
        if job.token_tiles[0] > rows or job.token_tiles[1] > columns:
            raise UserError(
                f"--token-tiles {job.request.token_tiles}: the picture has only {rows} rows and {columns} columns of "
                "latents to split"
            )


def _dtype(name: str) -> mx.Dtype:
    """bfloat16 unless asked otherwise; on MLX's CPU backend float32, because bfloat16 is slow there."""
    if name != "auto":
        return DTYPES[name]
    return mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16
