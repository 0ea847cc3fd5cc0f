"""What a pipeline is, and the table of those that exist."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_ltx.events import Event, Finished, Phase

if TYPE_CHECKING:
    from mlx_ltx.pipelines.job import Job

GUIDANCE_FIELDS = tuple(
    f"{stream}_{name}"
    for stream in ("video", "audio")
    for name in ("cfg_scale", "stg_scale", "stg_blocks", "rescale", "modality_scale", "skip_step")
)


@dataclass(frozen=True)
class Pipeline:
    """One way of making a clip.

    Attributes:
        name: what ``--pipeline`` takes.
        title: one line for people.
        two_stage: made at half size first, then enlarged and refined.
        guided: several passes per step, with a negative prompt; for models that were not distilled.
        unused: fields of the request that it does not use; giving one of them is an error.
        phases: what it will do for a job.
        run: the recipe.
    """

    name: str
    title: str
    two_stage: bool
    guided: bool
    unused: tuple[str, ...]
    phases: Callable[[Job], list[Phase]]
    run: Callable[[Job], Generator[Event, None, Finished]]


def pipelines() -> dict[str, Pipeline]:
    """All pipelines by name."""
    # The recipes import this module's neighbours, which ask for this table.
    from mlx_ltx.pipelines.distilled import PIPELINE as DISTILLED
    from mlx_ltx.pipelines.one_stage import PIPELINE as ONE_STAGE

    return {pipeline.name: pipeline for pipeline in (DISTILLED, ONE_STAGE)}
