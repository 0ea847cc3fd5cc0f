"""The plan of what denoising can do beside the usual: tokens in tiles, and the step cache."""

import gc

import mlx.core as mx
import pytest

import mlx_ltx
from mlx_ltx.events import MemorySeen
from mlx_ltx.pipelines.job import prepare
from mlx_ltx.pipelines.predict import make_fit, make_plan

TOLERANCE = 0.15
SLACK = 8 << 20
CLIP = {"width": 256, "height": 256, "num_frames": 9, "audio": False, "cache": False, "dtype": "float32"}


def job_of(folder, model, **changes):
    given = {"prompt": "a lighthouse at dusk", "output": folder / "clip.mp4", "force": True, "model": str(model)}
    return prepare(mlx_ltx.Request(**{**given, **CLIP, **changes}))


def denoising(plan):
    return {phase.name: phase for phase in plan.phases if phase.name in ("denoise", "refine")}


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="calibrated on the CPU backend")
@pytest.mark.parametrize(
    "changes",
    [
        {"token_tiles": "4"},
        {"step_cache": 1000.0, "pipeline": "one-stage", "steps": 3, "audio": True, "width": 192, "height": 192},
    ],
    ids=str,
)
def test_denoising_is_predicted(tmp_path, middle_model, changes):
    job = job_of(tmp_path, middle_model, **changes)
    predicted = denoising(make_plan(job))
    for _ in range(4):  # when MLX frees what was read varies from run to run
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        seen = {event.phase: event.peak_bytes - before for event in job.run() if isinstance(event, MemorySeen)}
        apart = {name: (phase.peak_bytes, seen[name]) for name, phase in predicted.items()}
        if all(abs(ours - theirs) <= max(TOLERANCE * theirs, SLACK) for ours, theirs in apart.values()):
            return
    raise AssertionError(apart)


def test_what_is_kept_is_counted(tmp_path, middle_model):
    guided = {"pipeline": "one-stage", "steps": 3}
    plain, cached = (
        denoising(make_plan(job_of(tmp_path, middle_model, **guided, **more)))["denoise"].peak_bytes
        for more in ({}, {"step_cache": 0.1})
    )
    assert cached > plain
    whole, tiled = (
        denoising(make_plan(job_of(tmp_path, middle_model, **more)))["refine"] for more in ({}, {"token_tiles": "4"})
    )
    assert tiled.peak_bytes < whole.peak_bytes
    assert "4 tiles" in tiled.chunking


def test_tiles_are_chosen_only_where_nothing_exact_fits(tmp_path, middle_model):
    def least(**changes):
        plan = make_plan(job_of(tmp_path, middle_model, **changes))
        names = ("load-transformer", "denoise", "refine")
        return int(max(phase.peak_bytes for phase in plan.phases if phase.name in names) / 0.85) + 2

    given = {"quantize": "none", "width": 512, "height": 512}
    streamed = least(**given, weights="streamed")
    tiled = least(**given, weights="streamed", token_tiles="4")
    assert tiled < streamed
    chosen = {memory: make_fit(job_of(tmp_path, middle_model, **given), memory) for memory in (streamed, tiled)}
    assert chosen[streamed].choices.startswith("--weights streamed")
    assert "--token-tiles" not in chosen[streamed].choices
    assert "--weights streamed --token-tiles 4" in chosen[tiled].choices
    assert chosen[tiled].job.request.settings()["token_tiles"] == "4"
    untouched = make_fit(job_of(tmp_path, middle_model, **given, token_tiles="none"), tiled)
    assert "--token-tiles" not in untouched.choices
