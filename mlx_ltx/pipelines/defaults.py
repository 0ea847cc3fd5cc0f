"""What the pipelines do when the request leaves it open, per model generation (ltx_pipelines/utils/constants.py)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlx_ltx.sampling.guidance import Guidance, GuidanceParams

# Our own words: what to steer away from in picture, motion, overlays and sound.
NEGATIVE_PROMPT = (
    "burnt-in subtitles, captions, watermark, logo, interface elements, blurred boxes, letterbox bars, "
    "fade from black, out of focus, noisy, blocky compression, oversaturated, washed-out colours, banding, flicker, "
    "jitter, ghosting, frozen or stuttering motion, morphing objects, warped faces, extra fingers or limbs, "
    "distorted hands, wrong anatomy, inconsistent lighting, plastic skin, distorted or robotic speech, "
    "lips out of sync, echo, clipping, hiss, hum, muffled sound, artefacts of generated video"
)
FULL_DEPTH = 48  # blocks of the published transformers, which the perturbed block is chosen for


@dataclass(frozen=True)
class Defaults:
    """Defaults of the guided pipelines for one generation.

    Attributes:
        width, height, num_frames: of a one-stage clip; two-stage clips are twice as wide and high.
        image_crf: how hard given images are compressed before encoding, as the training videos were.
    """

    steps: int
    guidance: Guidance
    image_crf: int
    width: int = 768
    height: int = 512
    num_frames: int = 121


def _generation(steps: int, stg_block: int, image_crf: int) -> Defaults:
    video = GuidanceParams(cfg_scale=3.0, stg_scale=1.0, stg_blocks=(stg_block,), rescale=0.7, modality_scale=3.0)
    return Defaults(steps, Guidance(video, replace(video, cfg_scale=7.0)), image_crf)


def hq(defaults: Defaults) -> Defaults:
    """What the HQ pipeline does instead: fewer, dearer steps without the perturbed pass, at a larger size."""
    video = GuidanceParams(cfg_scale=3.0, rescale=0.45, modality_scale=3.0)
    guidance = Guidance(video, replace(video, cfg_scale=7.0, rescale=1.0))
    return replace(defaults, steps=15, guidance=guidance, width=960, height=544)


# From the first version on that they hold for.
GENERATIONS: tuple[tuple[tuple[int, ...], Defaults], ...] = (
    ((2, 4), _generation(30, 28, 18)),
    ((2, 3), _generation(30, 28, 33)),
    ((0,), _generation(40, 29, 33)),
)


def defaults_for(version: tuple[int, ...], layers: int) -> Defaults:
    """The defaults of a model version; the perturbed block of a shallower model lies at the same relative depth."""
    found = next(defaults for first, defaults in GENERATIONS if version >= first)

    def scaled(params: GuidanceParams) -> GuidanceParams:
        return replace(params, stg_blocks=tuple(block * layers // FULL_DEPTH for block in params.stg_blocks))

    return replace(found, guidance=Guidance(scaled(found.guidance.video), scaled(found.guidance.audio)))
