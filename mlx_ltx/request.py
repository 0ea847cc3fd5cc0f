"""What a job is: one validated dataclass that the command line, Python and servers share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mlx_ltx.errors import UserError
from mlx_ltx.version import __version__

DEFAULT_SEED = 10
DEFAULT_FPS = 24.0
MAX_SEED = 2**63 - 1
DTYPES = ("auto", "bfloat16", "float16", "float32")
WEIGHTS = ("auto", "resident", "streamed")
QUANTIZE = ("auto", "none", "q8", "q6", "q5", "q4", "mxfp8", "mxfp4", "nvfp4")
GROUP_SIZES = (32, 64, 128)
BANDS = {"bands-2": 2, "bands-3": 3, "bands-4": 4}
VAE_TILINGS = ("auto", "none", *BANDS, "reference")
TOKEN_TILES = {"2": 2, "4": 4, "9": 9, "16": 16}

FITS = ("crop", "contain", "stretch")
SAMPLERS = ("euler", "gradient-estimation")
CFG_RULES = ("plain", "star", "apg")
REGENERATE = ("both", "video", "audio")
UPSCALE = ("spatial", "temporal")
COLOUR_SPACES = ("SRGB_LINEAR", "ACESCG", "ACESCCT")

GUIDANCE_NAMES = ("cfg_scale", "stg_scale", "stg_blocks", "rescale", "modality_scale", "skip_step")
# What guides the sound, and the picture by it.
SOUND_GUIDANCE = (*(f"audio_{name}" for name in GUIDANCE_NAMES), "video_modality_scale")

# Where a setting is not the flag's own name with dashes.
FLAGS = {
    "images": "--image",
    "audio": "--no-audio",
    "cache": "--no-cache",
    "seeds": "--seed",
    "prompts": "--prompts-file",
    "loras": "--lora",
    "segments": "--segment",
    "video_conditionings": "--video-conditioning",
    "attention_mask": "--conditioning-attention-mask",
    "attention_strength": "--conditioning-attention-strength",
    "audio_start": "--audio-start-time",
    "audio_length": "--audio-max-duration",
    "video_cfg_scale": "--video-cfg-guidance-scale",
    "video_stg_scale": "--video-stg-guidance-scale",
    "video_rescale": "--video-rescale-scale",
    "video_modality_scale": "--a2v-guidance-scale",
    "audio_cfg_scale": "--audio-cfg-guidance-scale",
    "audio_stg_scale": "--audio-stg-guidance-scale",
    "audio_rescale": "--audio-rescale-scale",
    "audio_modality_scale": "--v2a-guidance-scale",
}


def flag(name: str) -> str:
    """The command-line flag of a field of :class:`Request`, for messages."""
    return FLAGS.get(name, "--" + name.replace("_", "-"))


@dataclass(frozen=True)
class ImageInput:
    """A given image.

    Attributes:
        path: the image file.
        frame: pixel frame of the clip that it shows, from 0.
        strength: 1 keeps it as it is, 0 ignores it.
        crf: how hard it is compressed before encoding, 0 (not at all) to 51; None is as the model was trained.
    """

    path: Path
    frame: int = 0
    strength: float = 1.0
    crf: int | None = None


@dataclass(frozen=True)
class VideoInput:
    """A reference video for an IC-LoRA; ``strength`` as of images."""

    path: Path
    strength: float = 1.0


@dataclass(frozen=True)
class LoraInput:
    """A LoRA.

    Attributes:
        source: a file, or ``owner/name`` or ``owner/name:file.safetensors`` on the hub.
        strength: factor of its change; may be negative.
        stage: 1 or 2 to use it in that stage only; None in all.
    """

    source: str
    strength: float = 1.0
    stage: int | None = None


@dataclass(frozen=True)
class Segment:
    """A part of a timed prompt: what happens for so many seconds."""

    text: str
    seconds: float


@dataclass(frozen=True)
class Request:
    """One generation, or several that share everything but prompt and seed. None leaves a choice to pipeline and model.

    What a pipeline does not use must be left at its default; which one takes what is told by ``--capabilities``.

    Attributes:
        prompt: what the clip shows and sounds like; ``prompts`` for several clips instead, ``segments`` for several
            parts of one clip, in order.
        output: the mp4 to write; None for none. With several clips, each name gets a number or a seed.
        model: catalogue name, path or hub id; None for the best one on disk.
        pipeline: see :func:`mlx_ltx.pipelines.pipeline.pipelines`; None for the model's own.
        negative_prompt: what to steer away from (guided denoising).
        guided: denoise with guidance (True) or as a distilled model does (False); None as the model was made.
        width, height: pixels.
        num_frames: frames, 8k + 1; or ``duration`` in seconds, which is rounded to such a count.
        fps: frames per second.
        seed: of the noise; ``seeds`` for several clips.
        steps, sampler: of guided denoising; the sampler is "euler" or "gradient-estimation".
        cfg_rule: how it steers away from the negative prompt: "plain", "star" or "apg"; ``apg_eta``,
            ``apg_norm_threshold`` and ``apg_momentum`` are of the last one, see :class:`mlx_ltx.sampling.guidance.Apg`.
        video_cfg_scale ... audio_skip_step: guidance, see :class:`mlx_ltx.sampling.guidance.GuidanceParams`.
        images: given frames; ``fit`` is how they fill the picture: "crop", "contain" or "stretch".
        audio: whether to make sound.
        audio_path, audio_start, audio_length: a sound file to make the picture for, from a second on, for some seconds.
        video_path: the clip to change, lengthen or enlarge.
        start_time, end_time: the part to make anew, in seconds.
        regenerate: "both", "video" or "audio" of that part.
        whole_decode: take all frames from the decoder, also those that did not change.
        extend_before, extend_after: seconds to add.
        upscale: "spatial" or "temporal".
        video_conditionings: reference videos for an IC-LoRA.
        attention_strength, attention_mask: how strongly the clip follows them, everywhere or by a mask video.
        skip_stage_2: make the clip in one stage, at its full size.
        reference_video, reference_strength: whom to dub.
        loras: low-rank changes of the transformer; ``camera`` names one of the catalogue's camera moves.
        distilled_lora: what lets a model that was not distilled refine in few steps.
        hdr: colour space of linear pictures in and out.
        enhance_prompt: let the text model rewrite the prompt first; ``original_prompt`` is what it was given.
        output_audio: a wav or flac file for the sound; contact_sheet: a PNG of some frames.
        output_exr, output_hdr: a folder of half-float EXR frames, and a BT.2020 HLG clip.
        force: overwrite files.
        cache: use embeddings of prompts that were kept from before, and keep new ones.
        text_encoder, spatial_upsampler, temporal_upsampler: path or hub id, instead of what belongs to the model.
        dtype: of weights and activations; "auto" is bfloat16 on the GPU and float32 on the CPU backend.
        weights: of the transformer: "resident" keeps them in memory, "streamed" reads them anew for every evaluation
            and holds two blocks at a time. The numbers are the same. "auto" is what fits.
        quantize, quantize_text: bits and kind of number in which the transformer's and the text model's large layers
            are held (:data:`mlx_ltx.checkpoints.quantize.SETTINGS`). "none" is as the files have them, "auto" fits.
        group_size: how many numbers share a scale, for q8 to q4; None is 64.
        vae_tiling: how the picture is decoded: "none" whole; "bands-2" to "bands-4" in parts with the same result, less
            memory and more work; "reference" in the reference's blended tiles. "auto" is whole, or the bands that fit.
        token_tiles: into how many overlapping tiles the second stage splits the picture, with less memory and another
            result ("2" to "16"); "none" is whole, and so is "auto" unless nothing else fits.
        step_cache: leave out steps while what enters the transformer changes by less than this in sum; None and 0 none.
    """

    prompt: str = ""
    output: Path | None = None
    model: str | None = None
    pipeline: str | None = None
    negative_prompt: str | None = None
    guided: bool | None = None
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    duration: float | None = None
    fps: float = DEFAULT_FPS
    seed: int = DEFAULT_SEED
    prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    segments: tuple[Segment, ...] = ()
    steps: int | None = None
    sampler: str | None = None
    cfg_rule: str | None = None
    apg_eta: float | None = None
    apg_norm_threshold: float | None = None
    apg_momentum: float | None = None
    video_cfg_scale: float | None = None
    video_stg_scale: float | None = None
    video_stg_blocks: tuple[int, ...] | None = None
    video_rescale: float | None = None
    video_modality_scale: float | None = None
    video_skip_step: int | None = None
    audio_cfg_scale: float | None = None
    audio_stg_scale: float | None = None
    audio_stg_blocks: tuple[int, ...] | None = None
    audio_rescale: float | None = None
    audio_modality_scale: float | None = None
    audio_skip_step: int | None = None
    images: tuple[ImageInput, ...] = ()
    fit: str | None = None
    audio: bool = True
    audio_path: Path | None = None
    audio_start: float | None = None
    audio_length: float | None = None
    video_path: Path | None = None
    start_time: float | None = None
    end_time: float | None = None
    regenerate: str | None = None
    whole_decode: bool = False
    extend_before: float | None = None
    extend_after: float | None = None
    upscale: str | None = None
    video_conditionings: tuple[VideoInput, ...] = ()
    attention_strength: float | None = None
    attention_mask: Path | None = None
    skip_stage_2: bool = False
    reference_video: Path | None = None
    reference_strength: float | None = None
    loras: tuple[LoraInput, ...] = ()
    camera: str | None = None
    distilled_lora: LoraInput | None = None
    hdr: str | None = None
    enhance_prompt: bool = False
    original_prompt: str | None = None
    output_audio: Path | None = None
    contact_sheet: Path | None = None
    output_exr: Path | None = None
    output_hdr: Path | None = None
    force: bool = False
    cache: bool = True
    text_encoder: str | None = None
    spatial_upsampler: str | None = None
    temporal_upsampler: str | None = None
    dtype: str = "auto"
    weights: str = "auto"
    quantize: str = "auto"
    quantize_text: str = "auto"
    group_size: int | None = None
    vae_tiling: str = "auto"
    token_tiles: str = "auto"
    step_cache: float | None = None

    def __post_init__(self) -> None:
        for name in PATHS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, Path):
                object.__setattr__(self, name, Path(value))

    def validate(self) -> None:
        """Check what can be checked without a model.

        Raises:
            UserError: a value is out of range; the message names its flag.
        """
        for name in ("width", "height", "num_frames", "steps"):
            _check(name, getattr(self, name), lambda v: v >= 1, "a positive whole number")
        for name in ("duration", "fps", "audio_length", "end_time", "extend_before", "extend_after"):
            _check(name, getattr(self, name), lambda v: v > 0, "a positive number")
        for name in ("audio_start", "start_time"):
            _check(name, getattr(self, name), lambda v: v >= 0, "0 or more")
        if self.num_frames is not None and self.duration is not None:
            raise UserError("--num-frames and --duration say the same thing; give one of them")
        if self.segments and (self.prompt or self.prompts):
            raise UserError("--segment takes the place of --prompt; give one of them")
        if self.segments and (self.num_frames is not None or self.duration is not None):
            raise UserError("--segment says how long the clip is; leave out --num-frames and --duration")
        if self.enhance_prompt and self.segments:
            raise UserError("--enhance-prompt rewrites one whole prompt; it does not go with --segment")
        if self.enhance_prompt and not (self.prompt or self.prompts):
            raise UserError("--enhance-prompt needs a prompt; give --prompt TEXT")
        for segment in self.segments:
            if not (math.isfinite(segment.seconds) and segment.seconds > 0):
                raise UserError(f"--segment {segment.text!r}: {segment.seconds:g} seconds is not a positive number")
        _check("fps", self.fps, lambda v: v <= 240, "at most 240")
        for seed in (self.seed, *self.seeds):
            _check("seed", seed, lambda v: 0 <= v <= MAX_SEED, f"a whole number from 0 to {MAX_SEED}")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError("--seed: two seeds are the same, and would make the same clip")
        for stream in ("video", "audio"):
            for name in ("cfg_scale", "stg_scale", "modality_scale"):
                _check(f"{stream}_{name}", getattr(self, f"{stream}_{name}"), lambda v: v >= 0, "0 or more")
            _check(f"{stream}_rescale", getattr(self, f"{stream}_rescale"), lambda v: 0 <= v <= 1, "from 0 to 1")
            _check(f"{stream}_skip_step", getattr(self, f"{stream}_skip_step"), lambda v: v >= 0, "0 or more")
        _check("step_cache", self.step_cache, lambda v: v >= 0, "0 or more")
        _check("apg_eta", self.apg_eta, lambda v: 0 <= v <= 1, "from 0 to 1")
        _check("apg_norm_threshold", self.apg_norm_threshold, lambda v: v >= 0, "0 or more")
        _check("apg_momentum", self.apg_momentum, lambda v: -1 < v < 1, "between -1 and 1")
        for name in ("apg_eta", "apg_norm_threshold", "apg_momentum"):
            if getattr(self, name) is not None and self.cfg_rule != "apg":
                raise UserError(f"{flag(name)} is for --cfg-rule apg")
        for name in ("attention_strength", "reference_strength"):
            _check(name, getattr(self, name), lambda v: 0 <= v <= 1, "from 0 to 1")
        for image in self.images:
            if not 0 <= image.strength <= 1:
                raise UserError(f"--image {image.path}: strength {image.strength:g} is not from 0 to 1")
            if image.frame < 0:
                raise UserError(f"--image {image.path}: frame {image.frame} is negative; frames count from 0")
            if image.crf is not None and not 0 <= image.crf <= 51:
                raise UserError(f"--image {image.path}: crf {image.crf} is not from 0 to 51")
        frames = [image.frame for image in self.images]
        for image in self.images:
            if frames.count(image.frame) > 1:
                raise UserError(f"--image {image.path}: another image is given for frame {image.frame} too")
        for video in self.video_conditionings:
            if not 0 <= video.strength <= 1:
                raise UserError(f"--video-conditioning {video.path}: strength {video.strength:g} is not from 0 to 1")
        for lora in (*self.loras, *([self.distilled_lora] if self.distilled_lora else [])):
            if not math.isfinite(lora.strength):
                raise UserError(f"--lora {lora.source}: strength {lora.strength} is not a number")
            if lora.stage not in (None, 1, 2):
                raise UserError(f"--lora {lora.source}: stage {lora.stage} is not 1 or 2")
        if self.fit is not None and not (self.images or self.video_conditionings or self.reference_video):
            raise UserError(f"--fit {self.fit}: there is no image or reference video to fit")
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise UserError(f"{flag(name)} {value}: must be one of {', '.join(map(str, allowed))}")
        kinds = [kind for kind in (self.quantize, self.quantize_text) if kind not in ("auto", "none")]
        if self.group_size is not None and not any(kind.startswith("q") for kind in kinds):
            raise UserError(f"--group-size {self.group_size}: is for --quantize q8, q6, q5 and q4")
        if self.end_time is not None and self.end_time <= (self.start_time or 0):
            raise UserError(f"--end-time {self.end_time:g}: must be after --start-time {self.start_time or 0:g}")
        if not self.audio:
            given = [name for name in SOUND_GUIDANCE if getattr(self, name) is not None]
            given += ["output_audio"] if self.output_audio is not None else []
            if given:
                raise UserError(f"{', '.join(map(flag, given))}: there is no sound with --no-audio")
        _check_suffix("output", self.output, (".mp4",))
        _check_suffix("output_audio", self.output_audio, (".wav", ".flac"))
        _check_suffix("contact_sheet", self.contact_sheet, (".png",))
        _check_suffix("output_hdr", self.output_hdr, (".mp4",))
        outputs = [path.absolute() for path in self.outputs]
        if not outputs:
            raise UserError("nothing to write: give --output")
        if len(set(outputs)) < len(outputs):
            raise UserError("two outputs have the same name")

    @property
    def outputs(self) -> list[Path]:
        """Everything that is to be written."""
        paths = (getattr(self, name) for name in OUTPUTS)
        return [path for path in paths if path is not None]

    def shots(self) -> list[Request]:
        """The single clips that this request asks for, each with its own prompt, seed and names, prompts first."""
        prompts, seeds = self.prompts or (self.prompt,), self.seeds or (self.seed,)
        shots = []
        for number, prompt in enumerate(prompts, 1):
            for seed in seeds:
                marks = [f"{number:02d}"] * (len(prompts) > 1) + [f"seed-{seed}"] * (len(seeds) > 1)
                names = {
                    name: path.with_stem("-".join([path.stem, *marks]))
                    for name in OUTPUTS
                    if name != "contact_sheet" and (path := getattr(self, name)) is not None
                }
                sheet = self.contact_sheet if not marks else None
                shot = {"prompt": prompt, "seed": seed, "prompts": (), "seeds": (), "contact_sheet": sheet}
                shots.append(replace(self, **{**names, **shot}))
        return shots

    def settings(self) -> dict[str, Any]:
        """What makes the clip again, as plain JSON data; where it was written is not part of that."""
        defaults = {entry.name: entry.default for entry in fields(self)}
        data = {}
        for name, value in asdict(self).items():
            if name in (*OUTPUTS, "force", "cache") or (value == defaults[name] and name not in ALWAYS):
                continue
            data[name] = _plain(value)
        return {"mlx_ltx": __version__, **data}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Request:
        """The request that :meth:`settings` came from, without outputs.

        Raises:
            UserError: the settings are of another kind or of a newer version.
        """
        values = {key: value for key, value in settings.items() if key != "mlx_ltx"}
        unknown = sorted(values.keys() - {entry.name for entry in fields(cls)})
        if "prompt" not in values or unknown:
            detail = f"unknown settings {', '.join(unknown)}" if unknown else "no prompt"
            raise UserError(f"cannot replay settings of mlx_ltx {settings.get('mlx_ltx', '?')}: {detail}")
        try:
            for name, kind in LISTS.items():
                if name in values:
                    values[name] = tuple(_parsed(kind, item) for item in values[name])
            if "distilled_lora" in values:
                values["distilled_lora"] = _parsed(LoraInput, values["distilled_lora"])
        except TypeError:
            raise UserError("cannot replay these settings: some of them have an unknown form") from None
        return cls(**values)

    def with_changes(self, **changes: Any) -> Request:
        """A copy with some fields replaced; a new frame count displaces a duration, and the other way round."""
        if "num_frames" in changes:
            changes.setdefault("duration", None)
        elif "duration" in changes:
            changes.setdefault("num_frames", None)
        return replace(self, **changes)


OUTPUTS = ("output", "output_audio", "contact_sheet", "output_exr", "output_hdr")
PATHS = (*OUTPUTS, "audio_path", "video_path", "attention_mask", "reference_video")
ALWAYS = ("prompt", "seed", "fps")  # settings that are worth telling even where they are the default
LISTS: dict[str, type] = {
    "images": ImageInput,
    "video_conditionings": VideoInput,
    "loras": LoraInput,
    "segments": Segment,
    "video_stg_blocks": int,
    "audio_stg_blocks": int,
    "prompts": str,
    "seeds": int,
}
CHOICES = {
    "dtype": DTYPES,
    "weights": WEIGHTS,
    "quantize": QUANTIZE,
    "quantize_text": QUANTIZE,
    "group_size": GROUP_SIZES,
    "vae_tiling": VAE_TILINGS,
    "token_tiles": ("auto", "none", *TOKEN_TILES),
    "fit": FITS,
    "sampler": SAMPLERS,
    "cfg_rule": CFG_RULES,
    "regenerate": REGENERATE,
    "upscale": UPSCALE,
    "hdr": COLOUR_SPACES,
}


def _plain(value: Any) -> Any:
    """As JSON has it; paths are made absolute, so that a clip can be made again from any folder."""
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _parsed(kind: type, item: Any) -> Any:
    if not isinstance(item, dict):
        if not isinstance(item, kind):
            raise TypeError
        return item
    return kind(**{key: Path(value) if key == "path" else value for key, value in item.items()})


def _check(name: str, value: Any, accepts: Any, wanted: str) -> None:
    if value is not None and not (math.isfinite(value) and accepts(value)):
        raise UserError(f"{flag(name)} {value}: must be {wanted}")


def _check_suffix(name: str, path: Path | None, suffixes: tuple[str, ...]) -> None:
    if path is not None and path.suffix.lower() not in suffixes:
        raise UserError(f"{flag(name)} {path}: the name must end in {' or '.join(suffixes)}")
