"""Default parameters per model generation, against those that the reference recorded."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from mlx_ltx.pipelines.defaults import FULL_DEPTH, NEGATIVE_PROMPT, defaults_for, hq

GOLDEN = Path(__file__).parents[1] / "golden"
VERSIONS = {"2.0": (2, 0), "2.3": (2, 3, 0), "2.4+": (2, 5, 0), "hq": (2, 3, 0)}


@pytest.fixture(scope="module")
def recorded():
    with safe_open(GOLDEN / "schedules.io.safetensors", framework="np") as file:
        return json.loads(file.metadata()["cases"])["params"]


@pytest.mark.parametrize("name", VERSIONS)
def test_defaults_are_the_references(name, recorded):
    expected = recorded[name]
    ours = defaults_for(VERSIONS[name], FULL_DEPTH)
    if name == "hq":
        ours = hq(ours)
    assert (ours.steps, ours.num_frames) == (expected["num_inference_steps"], expected["num_frames"])
    assert (ours.width, ours.height) == (expected["stage_1_width"], expected["stage_1_height"])
    if name != "hq":  # there the checkpoint's generation decides
        assert ours.image_crf == expected["default_image_crf"]
    for stream in ("video", "audio"):
        params, theirs = getattr(ours.guidance, stream), expected[f"{stream}_guider_params"]
        assert list(params.stg_blocks) == theirs["stg_blocks"]
        for mine, name_there in (
            ("cfg_scale", "cfg_scale"), ("stg_scale", "stg_scale"), ("rescale", "rescale_scale"),
            ("modality_scale", "modality_scale"), ("skip_step", "skip_step"),
        ):  # fmt: skip
            assert getattr(params, mine) == theirs[name_there], f"{stream} {mine}"


def test_a_shallow_model_is_perturbed_at_the_same_relative_depth():
    assert defaults_for((2, 3), 3).guidance.video.stg_blocks == (1,)
    assert defaults_for((2, 0), 1).guidance.audio.stg_blocks == (0,)


def test_the_negative_prompt_fits_the_text_model():
    assert 20 < len(NEGATIVE_PROMPT.split()) < 200
