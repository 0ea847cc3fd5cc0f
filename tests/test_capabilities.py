"""What each pipeline takes is told truly, and what it does not take is refused by name."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from mlx_ltx import ImageInput, Request, UserError
from mlx_ltx.flags import build_parser, capabilities
from mlx_ltx.generate import main
from mlx_ltx.pipelines.job import _check_fields
from mlx_ltx.pipelines.pipeline import pipelines
from mlx_ltx.request import LoraInput, Segment, VideoInput, flag

PIPELINES = pipelines()
OTHER_THAN_DEFAULT = {
    "images": (ImageInput(Path("a.png")),),
    "loras": (LoraInput("a"),),
    "distilled_lora": LoraInput("a"),
    "segments": (Segment("a", 1.0),),
    "video_conditionings": (VideoInput(Path("a.mp4")),),
    "prompts": ("a", "b"),
    "seeds": (1, 2),
    "video_stg_blocks": (1,),
    "audio_stg_blocks": (1,),
}


def another_value(name, default):
    if name in OTHER_THAN_DEFAULT:
        return OTHER_THAN_DEFAULT[name]
    if isinstance(default, bool):
        return not default
    return default + 1 if isinstance(default, int | float) else "x"


@pytest.fixture(scope="module")
def told():
    return capabilities(build_parser())


@pytest.mark.parametrize("name", PIPELINES)
def test_every_flag_is_used_or_refused_by_name(name, told):
    pipeline = PIPELINES[name]
    for entry in fields(Request):
        value = another_value(entry.name, entry.default)
        needed = {need: another_value(need, None) for need in pipeline.needs}
        request = Request(**{**needed, entry.name: value})
        if entry.name in pipeline.accepts:
            _check_fields(request, pipeline)
        else:
            with pytest.raises(UserError, match="does not use") as error:
                _check_fields(request, pipeline)
            assert flag(entry.name) in str(error.value)
    shown = {told["flags"][option]["field"] for option in told["pipelines"][name]["flags"]}
    hidden = {"original_prompt", "seeds"}  # no flag of their own
    assert shown == pipeline.accepts - hidden


@pytest.mark.parametrize("name", [name for name in PIPELINES if PIPELINES[name].needs])
def test_what_a_pipeline_needs_is_asked_for_by_name(name, told):
    with pytest.raises(UserError, match="needs") as error:
        _check_fields(Request(), PIPELINES[name])
    for option in told["pipelines"][name]["needs"]:
        assert option in str(error.value)


def test_the_command_prints_them_as_json(capsys):
    assert main(["--capabilities"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["pipelines"].keys() == PIPELINES.keys()
    assert printed["flags"]["--width"]["type"] == "int"
    assert printed["flags"]["--dtype"]["choices"] == ["auto", "bfloat16", "float16", "float32"]
    assert printed["flags"]["--image"]["repeatable"]


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_says_what_it_does(name):
    pipeline = PIPELINES[name]
    recipe = __import__(pipeline.run.__module__, fromlist=["__doc__"])
    assert recipe.__doc__
    assert 10 < len(pipeline.title) < 80
    assert pipeline.takes <= {entry.name for entry in fields(Request)}
    assert set(pipeline.needs) <= pipeline.accepts
