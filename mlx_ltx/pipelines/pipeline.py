"""What a pipeline is, and the table of those that exist."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_ltx.events import Event, Finished, Phase
from mlx_ltx.media.color import LogCurve
from mlx_ltx.pipelines.defaults import Defaults
from mlx_ltx.request import GUIDANCE_NAMES, Request

if TYPE_CHECKING:
    from mlx_ltx.pipelines.job import Job, Model
    from mlx_ltx.sampling.geometry import ClipShape

# Fields of a request that belong together. What a pipeline does not take must be left at its default.
EVERYWHERE = frozenset({"model", "pipeline", "dtype", "force"})
TRANSFORMER = frozenset({"weights", "quantize", "group_size"})
PICTURE = frozenset({"output", "contact_sheet", "vae_tiling"})
SOUND = frozenset({"output_audio"})
PROMPT = frozenset({"prompt", "prompts", "seed", "seeds", "text_encoder", "enhance_prompt", "original_prompt", "cache"})
PROMPT |= TRANSFORMER | {"quantize_text", "step_cache"}  # whoever reads a prompt denoises
SIZE = frozenset({"width", "height"})
LENGTH = frozenset({"num_frames", "duration", "fps"})
SEGMENTS = frozenset({"segments"})
IMAGES = frozenset({"images", "fit"})
LORAS = frozenset({"loras", "camera"})
VIDEO_GUIDANCE = frozenset(f"video_{name}" for name in GUIDANCE_NAMES)
AUDIO_GUIDANCE = frozenset(f"audio_{name}" for name in GUIDANCE_NAMES)
GUIDANCE = VIDEO_GUIDANCE | AUDIO_GUIDANCE
GUIDANCE |= {"negative_prompt", "steps", "cfg_rule", "apg_eta", "apg_norm_threshold", "apg_momentum"}
TWO_STAGES = frozenset({"spatial_upsampler", "token_tiles"})
HDR = frozenset({"hdr", "output_exr", "output_hdr"})
CLIP = PROMPT | SEGMENTS | SIZE | LENGTH | IMAGES | LORAS | HDR | {"audio"}  # what every way of making a new clip takes


@dataclass(frozen=True)
class Pipeline:
    """One way of making a clip.

    Attributes:
        name: what ``--pipeline`` takes.
        title: one line for people.
        takes: fields of the request that it uses besides those of ``accepts``.
        phases: what it will do for a job.
        run: the recipe.
        needs: fields that must be given.
        guided: several passes per step, with a negative prompt, for models that were not distilled; None where both
            kinds of model will do.
        two_stage: made at half size first, then enlarged and refined.
        distilled_lora: strengths of the distilled LoRA in both stages, with which a model that was not distilled
            refines; None where it is not needed.
        first_stage_loras: LoRAs are for the first stage unless they say otherwise.
        makes_picture, makes_sound: what there is to write.
        has_sound: whether a request's sources have sound, where that decides about the clip's.
        defaults: changes what the model's generation does unless asked otherwise.
        curve: how the networks' values stand for light, in HDR.
        clip: the clip's shape, where it is not simply asked for.
        check: anything else that can be known beforehand.
    """

    name: str
    title: str
    takes: frozenset[str]
    phases: Callable[[Job], list[Phase]]
    run: Callable[[Job], Generator[Event, None, Finished]]
    needs: tuple[str, ...] = ()
    guided: bool | None = None
    two_stage: bool = False
    distilled_lora: tuple[float, float] | None = None
    first_stage_loras: bool = False
    makes_picture: bool = True
    makes_sound: bool = True
    has_sound: Callable[[Request], bool] | None = None
    defaults: Callable[[Defaults], Defaults] | None = None
    curve: LogCurve = LogCurve.ACESCCT
    clip: Callable[[Request, Model], ClipShape] | None = None
    check: Callable[[Job], None] | None = None

    @property
    def accepts(self) -> frozenset[str]:
        """All fields of a request that it uses; giving another one is an error."""
        outputs = (PICTURE if self.makes_picture else frozenset()) | (SOUND if self.makes_sound else frozenset())
        return EVERYWHERE | outputs | self.takes


def pipelines() -> dict[str, Pipeline]:
    """All pipelines by name."""
    # The recipes import this module's neighbours, which ask for this table.
    from mlx_ltx.pipelines import (
        audio_to_video,
        distilled,
        dub_it,
        edit,
        hdr_ic_lora,
        hq,
        ic_lora,
        keyframes,
        one_stage,
        text_to_audio,
        two_stage,
        upscale,
    )

    found = (
        distilled.PIPELINE,
        one_stage.PIPELINE,
        two_stage.PIPELINE,
        hq.PIPELINE,
        keyframes.PIPELINE,
        audio_to_video.PIPELINE,
        text_to_audio.PIPELINE,
        edit.RETAKE,
        edit.EXTEND,
        ic_lora.PIPELINE,
        hdr_ic_lora.PIPELINE,
        dub_it.PIPELINE,
        upscale.PIPELINE,
    )
    return {pipeline.name: pipeline for pipeline in found}
