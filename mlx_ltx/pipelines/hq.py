"""Two stages with the second-order res_2s sampler, for the best picture (ltx_pipelines/ti2vid_two_stages_hq.py).

As the two-stage pipeline, but: every step asks the model twice; 15 steps whose schedule follows the number of tokens;
no perturbed pass; and the distilled LoRA helps in both stages, by a quarter and by half of its strength.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlx_ltx.pipelines import pipeline as fields
from mlx_ltx.pipelines.defaults import hq
from mlx_ltx.pipelines.job import Job
from mlx_ltx.pipelines.run import Shot
from mlx_ltx.pipelines.two_stage import TAKES
from mlx_ltx.pipelines.two_stages import TwoStages
from mlx_ltx.sampling.res2s import Res2s
from mlx_ltx.sampling.samplers import Sampler
from mlx_ltx.sampling.schedules import ltx2_schedule


def schedule(job: Job) -> Sequence[float]:
    grid = job.grids(job.clip.halved()).video
    assert grid is not None
    assert job.request.steps is not None
    return ltx2_schedule(job.request.steps, grid.tokens).tolist()


def sampler(shot: Shot) -> Sampler:
    # As in the reference, the sampler's own noise is the same for every seed.
    return Res2s.seeded()


RECIPE = TwoStages(schedule=schedule, sampler=sampler, keep_first_sound=True)

PIPELINE = fields.Pipeline(
    name="hq",
    title="two-stage with a second-order sampler: slower, finer; for dev models",
    takes=TAKES - {"step_cache"},  # its steps ask twice, at different noise levels
    guided=True,
    two_stage=True,
    distilled_lora=(0.25, 0.5),
    defaults=hq,
    phases=RECIPE.phases,
    run=RECIPE.run,
)
