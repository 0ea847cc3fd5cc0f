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

# Where a setting is not the flag's own name with dashes.
FLAGS = {
    "images": "--image",
    "audio": "--no-audio",
    "num_frames": "--num-frames",
    "output": "--output",
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
    """

    path: Path
    frame: int = 0
    strength: float = 1.0


@dataclass(frozen=True)
class Request:
    """One generation. What is None is decided by the pipeline and the model.

    Attributes:
        prompt: what the clip shows and sounds like.
        output: the mp4 to write; None for none.
        model: catalogue name, path or hub id; None for the best one on disk.
        pipeline: "distilled" or "one-stage"; None for the model's own.
        negative_prompt: what to steer away from (guided pipelines).
        width, height: pixels.
        num_frames: frames, 8k + 1; or ``duration`` in seconds, which is rounded to such a count.
        fps: frames per second.
        seed: of the noise.
        steps: denoising steps (guided pipelines).
        video_cfg_scale ... audio_skip_step: guidance, see :class:`mlx_ltx.sampling.guidance.GuidanceParams`.
        images: given frames.
        audio: whether to make sound.
        output_audio: a wav or flac file for the sound; contact_sheet: a PNG of some frames.
        force: overwrite files.
        text_encoder, spatial_upsampler: path or hub id, instead of what belongs to the model.
        dtype: of weights and activations; "auto" is bfloat16 on the GPU and float32 on the CPU backend.
    """

    prompt: str
    output: Path | None = None
    model: str | None = None
    pipeline: str | None = None
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    duration: float | None = None
    fps: float = DEFAULT_FPS
    seed: int = DEFAULT_SEED
    steps: int | None = None
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
    audio: bool = True
    output_audio: Path | None = None
    contact_sheet: Path | None = None
    force: bool = False
    text_encoder: str | None = None
    spatial_upsampler: str | None = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name in ("output", "output_audio", "contact_sheet"):
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
        for name in ("duration", "fps"):
            _check(name, getattr(self, name), lambda v: v > 0, "a positive number")
        if self.num_frames is not None and self.duration is not None:
            raise UserError("--num-frames and --duration say the same thing; give one of them")
        _check("fps", self.fps, lambda v: v <= 240, "at most 240")
        _check("seed", self.seed, lambda v: 0 <= v <= MAX_SEED, f"a whole number from 0 to {MAX_SEED}")
        for stream in ("video", "audio"):
            for name in ("cfg_scale", "stg_scale", "modality_scale"):
                _check(f"{stream}_{name}", getattr(self, f"{stream}_{name}"), lambda v: v >= 0, "0 or more")
            _check(f"{stream}_rescale", getattr(self, f"{stream}_rescale"), lambda v: 0 <= v <= 1, "from 0 to 1")
            _check(f"{stream}_skip_step", getattr(self, f"{stream}_skip_step"), lambda v: v >= 0, "0 or more")
        for image in self.images:
            if not 0 <= image.strength <= 1:
                raise UserError(f"--image {image.path}: strength {image.strength:g} is not from 0 to 1")
            if image.frame < 0:
                raise UserError(f"--image {image.path}: frame {image.frame} is negative; frames count from 0")
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype {self.dtype}: must be one of {', '.join(DTYPES)}")
        if not self.audio and self.output_audio is not None:
            raise UserError("--output-audio needs sound; leave out --no-audio")
        _check_suffix("output", self.output, (".mp4",))
        _check_suffix("output_audio", self.output_audio, (".wav", ".flac"))
        _check_suffix("contact_sheet", self.contact_sheet, (".png",))
        outputs = [path.absolute() for path in (self.output, self.output_audio, self.contact_sheet) if path]
        if not outputs:
            raise UserError("nothing to write: give --output")
        if len(set(outputs)) < len(outputs):
            raise UserError("two outputs have the same name")

    def settings(self) -> dict[str, Any]:
        """What makes the clip again, as plain JSON data; where it was written is not part of that."""
        data = asdict(self)
        for name in ("output", "output_audio", "contact_sheet", "force"):
            del data[name]
        data["images"] = [{**image, "path": str(Path(image["path"]).absolute())} for image in data["images"]]
        return {"mlx_ltx": __version__, **{key: value for key, value in data.items() if value is not None}}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Request:
        """The request that :meth:`settings` came from, without outputs.

        Raises:
            UserError: the settings are of another kind or of a newer version.
        """
        values = {key: value for key, value in settings.items() if key != "mlx_ltx"}
        known = {entry.name for entry in fields(cls)}
        unknown = sorted(values.keys() - known)
        if "prompt" not in values or unknown:
            detail = f"unknown settings {', '.join(unknown)}" if unknown else "no prompt"
            raise UserError(f"cannot replay settings of mlx_ltx {settings.get('mlx_ltx', '?')}: {detail}")
        try:
            values["images"] = tuple(
                ImageInput(Path(image["path"]), image["frame"], image["strength"]) for image in values.get("images", ())
            )
        except (KeyError, TypeError):
            raise UserError("cannot replay these settings: their images have an unknown form") from None
        for name in ("video_stg_blocks", "audio_stg_blocks"):
            if name in values:
                values[name] = tuple(values[name])
        return cls(**values)

    def with_changes(self, **changes: Any) -> Request:
        """A copy with some fields replaced; a new frame count displaces a duration, and the other way round."""
        if "num_frames" in changes:
            changes.setdefault("duration", None)
        elif "duration" in changes:
            changes.setdefault("num_frames", None)
        return replace(self, **changes)


def _check(name: str, value: Any, accepts: Any, wanted: str) -> None:
    if value is not None and not (math.isfinite(value) and accepts(value)):
        raise UserError(f"{flag(name)} {value}: must be {wanted}")


def _check_suffix(name: str, path: Path | None, suffixes: tuple[str, ...]) -> None:
    if path is not None and path.suffix.lower() not in suffixes:
        raise UserError(f"{flag(name)} {path}: the name must end in {' or '.join(suffixes)}")
