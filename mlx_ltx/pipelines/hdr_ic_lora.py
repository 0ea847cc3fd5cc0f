"""SDR video to HDR with the HDR IC-LoRA, for distilled models (ltx_pipelines/hdr_ic_lora.py).

1. Encode the prompt (an empty one will do) and the reference videos at both sizes.
2. Denoise the picture at half the size in 8 steps with the LoRA, which makes LogC3 codes of light.
3. Enlarge the video latent x2 and refine it in 2 steps at full size, still with the LoRA.
4. Decode in float32 to linear light: EXR frames, a BT.2020 HLG clip, an SDR preview.

The reference refines in overlapping tiles, each a clip of its own with its own noise; here the second stage is done in
one piece, or with ``--token-tiles`` in tiles that are blended after every prediction.
"""

from __future__ import annotations

from collections.abc import Generator

from mlx_ltx.errors import UserError
from mlx_ltx.events import Event, Phase
from mlx_ltx.media.color import LogCurve
from mlx_ltx.media.fit import fit_mode
from mlx_ltx.pipelines import pipeline as fields
from mlx_ltx.pipelines.job import Job
from mlx_ltx.pipelines.references import check_references, encode_references, reference_phase, reference_scale
from mlx_ltx.pipelines.run import Run
from mlx_ltx.pipelines.two_stages import Material, TwoStages
from mlx_ltx.sampling.schedules import REFINEMENT

HDR_REFINEMENT = (*REFINEMENT[:2], 0.0)


def encode_phases(job: Job) -> list[Phase]:
    return [reference_phase(job, 2 * len(job.request.video_conditionings))]


def encode(run: Run) -> Generator[Event, None, Material]:
    job, request = run.job, run.job.request
    stages = [job.clip.halved(), job.clip]
    first, second = yield from encode_references(
        run, list(request.video_conditionings), stages, reference_scale(job), fit_mode(request.fit, "reflect")
    )
    return Material(first, second)


def check(job: Job) -> None:
    if job.request.hdr is None:
        raise UserError("the hdr-ic-lora pipeline needs --hdr SRGB_LINEAR, ACESCG or ACESCCT")
    if not any(lora.file.info.hdr_transform for lora in job.loras.first):
        raise UserError("the hdr-ic-lora pipeline needs an HDR LoRA: none of those given says that it makes HDR")
    if any(lora.file.info.hdr_transform not in (None, "logc3") for lora in job.loras.first):
        raise UserError("the hdr-ic-lora pipeline does LogC3 LoRAs only")
    check_references(job, [video.path for video in job.request.video_conditionings], job.clip.halved())


RECIPE = TwoStages(encode=encode, encode_phases=encode_phases, refinement=HDR_REFINEMENT)

PIPELINE = fields.Pipeline(
    name="hdr-ic-lora",
    title="SDR video to HDR with the HDR IC-LoRA; for distilled models",
    takes=fields.PROMPT
    | fields.SIZE
    | fields.LENGTH
    | fields.LORAS
    | fields.TWO_STAGES
    | fields.HDR
    | {"video_conditionings", "fit"},
    needs=("video_conditionings", "loras", "hdr"),
    makes_sound=False,
    guided=False,
    two_stage=True,
    curve=LogCurve.LOGC3,
    check=check,
    phases=RECIPE.phases,
    run=RECIPE.run,
)
