"""Whole jobs with the step cache, and with the second stage in tiles of tokens."""

import json

import numpy as np
import pytest

import mlx_ltx
from clips import make
from mlx_ltx.events import Finished, StepDone
from mlx_ltx.generate import main
from mlx_ltx.pipelines.job import prepare
from mlx_ltx.request import LoraInput, VideoInput

GUIDED = {"pipeline": "one-stage", "steps": 4, "width": 64, "height": 64, "num_frames": 9}
SMALL = ["--width", "64", "--height", "64", "-n", "9"]
ONE_STAGE = ["--model", "demo", "-p", "a", "--pipeline", "one-stage", "--num-inference-steps", "4", *SMALL]


def steps_of(tmp_path, **request):
    given = {"model": "demo", "prompt": "a red ball", "output": tmp_path / "a.mp4", "force": True, **GUIDED}
    events = list(mlx_ltx.stream(mlx_ltx.Request(**{**given, **request})))
    return [event for event in events if isinstance(event, StepDone)], events[-1]


def refused(tmp_path, **request) -> str:
    with pytest.raises(mlx_ltx.UserError) as error:
        prepare(mlx_ltx.Request(**{"model": "demo", "prompt": "a", "output": tmp_path / "a.mp4", **request}))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_was_left_out_is_told(tmp_path, capsys):
    output = tmp_path / "a.mp4"
    assert main([*ONE_STAGE, "--step-cache", "1000", "--output", str(output)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.endswith("left out") for line in lines if line.startswith("  step")] == [False, True, True, False]
    assert lines[-1].endswith("2 of 4 steps left out by the step cache")
    assert main(["--show", str(output)]) == 0
    assert "step_cache            1000.0" in capsys.readouterr().out
    assert main([*ONE_STAGE, "--step-cache", "1000", "--output", str(output), "--force", "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["reused_steps"], last["steps"]) == (2, 4)


def test_a_cache_of_nothing_is_no_cache(tmp_path):
    plain, _ = steps_of(tmp_path)
    cached, finished = steps_of(tmp_path, step_cache=0.0)
    assert isinstance(finished, Finished)
    assert finished.reused_steps == 0
    assert all(np.array_equal(a.video_x0, b.video_x0) for a, b in zip(plain, cached, strict=True))


def test_streamed_weights_and_guidance_reuse_the_same(tmp_path):
    guidance = {"video_stg_scale": 1.0, "video_stg_blocks": (1,), "step_cache": 1000.0}
    resident, streamed = (steps_of(tmp_path, weights=weights, **guidance)[0] for weights in ("resident", "streamed"))
    assert [step.reused for step in streamed] == [False, True, True, False]
    assert all(np.array_equal(a.video_x0, b.video_x0) for a, b in zip(resident, streamed, strict=True))


def test_several_clips_have_a_cache_each(tmp_path):
    steps, finished = steps_of(tmp_path, step_cache=1000.0, seeds=(1, 2))
    assert [step.reused for step in steps] == [False, True, True, False] * 2
    assert (finished.reused_steps, finished.steps) == (4, 8)


def test_what_has_no_step_cache_says_so(tmp_path):
    assert refused(tmp_path, pipeline="hq", step_cache=0.1) == "the hq pipeline does not use --step-cache"
    assert refused(tmp_path, step_cache=-0.1) == "--step-cache -0.1: must be 0 or more"


def test_a_second_stage_in_tiles(tmp_path):
    size = {"width": 256, "height": 128, "num_frames": 9, "output": tmp_path / "a.mp4", "force": True}
    whole, tiled = (make(**size, token_tiles=tiles) for tiles in ("none", "2"))
    assert (whole.width, tiled.width) == (256, 256)


def test_tiles_are_for_second_stages_with_room_for_them(tmp_path, clip, lora):
    assert refused(tmp_path, **GUIDED, token_tiles="4") == "the one-stage pipeline does not use --token-tiles"
    size = {"width": 64, "height": 64, "num_frames": 9}
    assert "only 2 rows and 2 columns" in refused(tmp_path, **size, token_tiles="9")
    assert "must be one of auto, none, 2, 4, 9, 16" in refused(tmp_path, token_tiles="3")
    given = {"video_conditionings": (VideoInput(clip),), "loras": (LoraInput(lora()),)}
    request = {"pipeline": "ic-lora", "skip_stage_2": True, "token_tiles": "2", **given}
    assert "no second stage with --skip-stage-2" in refused(tmp_path, **request)
