"""Whole jobs with weights that are streamed from disk: the same clips as with resident ones."""

import gc

import mlx.core as mx
import numpy as np
import pytest

import mlx_ltx
from mlx_ltx.events import MemorySeen, Planned, StepDone
from mlx_ltx.generate import main
from mlx_ltx.request import LoraInput

SMALL = {"width": 64, "height": 64, "num_frames": 9}


def run(tmp_path, weights, **request):
    """The events of a job with the demo model."""
    given = {"model": "demo", "prompt": "a red ball", "output": tmp_path / f"{weights}.mp4", **SMALL, **request}
    return list(mlx_ltx.stream(mlx_ltx.Request(weights=weights, **given)))


@pytest.mark.parametrize(
    "request_",
    [
        {"pipeline": "one-stage", "steps": 2, "video_stg_scale": 1.0, "video_stg_blocks": (1,)},
        {"pipeline": "distilled", "width": 128},
    ],
    ids=["guided", "two stages"],
)
def test_the_same_clip_bit_for_bit(tmp_path, request_):
    last = []
    for weights in ("resident", "streamed"):
        steps = [event for event in run(tmp_path, weights, **request_) if isinstance(event, StepDone)]
        assert steps
        last.append([np.array(value) for step in steps for value in (step.video_x0, step.audio_x0)])
    assert all(np.array_equal(a, b) for a, b in zip(*last, strict=True))
    assert (tmp_path / "resident.mp4").stat().st_size == (tmp_path / "streamed.mp4").stat().st_size


def test_loras_that_change_between_stages_are_streamed_too(tmp_path, lora):
    loras = (LoraInput(lora(), 1.0, 1), LoraInput(lora(), -0.5, 2))
    stages = []
    for weights, given in (("resident", loras), ("streamed", loras), ("streamed", ())):
        events = run(tmp_path, weights, pipeline="distilled", width=128, loras=given, force=True)
        steps = [event for event in events if isinstance(event, StepDone)]
        stages.append({step.phase: np.array(step.video_x0) for step in steps})
    resident, streamed, bare = stages
    assert len(resident) == 2
    for phase in resident:
        assert np.array_equal(resident[phase], streamed[phase])
        assert not np.allclose(resident[phase], bare[phase], atol=1e-4)


def test_nothing_of_a_streamed_transformer_is_left_for_the_decoding(tmp_path):
    """No cycle of references keeps it until the garbage collector comes."""
    left = {}
    gc.collect()
    gc.disable()
    try:
        for weights in ("resident", "streamed"):
            seen = [event for event in run(tmp_path, weights, pipeline="one-stage", steps=2) if _is_memory(event)]
            left[weights] = seen[-1].active_bytes
    finally:
        gc.enable()
    assert left["streamed"] <= left["resident"] + (1 << 16)


def _is_memory(event):
    return isinstance(event, MemorySeen)


def test_streamed_weights_take_less_memory_while_denoising(tmp_path):
    peaks = {}
    for weights in ("resident", "streamed"):
        mx.clear_cache()
        events = run(tmp_path, weights, pipeline="one-stage", steps=2)
        peaks[weights] = {event.phase: event.active_bytes for event in events if isinstance(event, MemorySeen)}
    assert peaks["streamed"]["load-transformer"] < 0.8 * peaks["resident"]["load-transformer"]


def test_the_plan_says_that_weights_are_streamed(tmp_path):
    events = run(tmp_path, "streamed", pipeline="one-stage", steps=2)
    (plan,) = (event for event in events if isinstance(event, Planned))
    assert any("streamed from disk" in phase.title for phase in plan.phases)


def test_another_word_is_refused(tmp_path, capsys):
    with pytest.raises(mlx_ltx.UserError, match="--weights paged: must be one of auto, resident, streamed"):
        run(tmp_path, "paged")
    with pytest.raises(SystemExit):
        main(["--prompt", "a", "--weights", "paged", "--output", str(tmp_path / "a.mp4")])
    assert "--weights" in capsys.readouterr().err
