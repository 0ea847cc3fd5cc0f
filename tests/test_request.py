"""Requests: what is refused before any work, and settings that make a clip again."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ltx import ImageInput, Request, UserError
from mlx_ltx.request import MAX_SEED, flag


def request(**changes):
    return Request(**{"prompt": "a kite", "output": "kite.mp4", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "--width 0: must be a positive whole number"),
        ({"height": -32}, "--height -32: must be a positive whole number"),
        ({"num_frames": 0}, "--num-frames 0: must be a positive whole number"),
        ({"steps": 0}, "--steps 0: must be a positive whole number"),
        ({"duration": 0.0}, "--duration 0.0: must be a positive number"),
        ({"fps": -1.0}, "--fps -1.0: must be a positive number"),
        ({"fps": float("nan")}, "--fps nan: must be a positive number"),
        ({"fps": 1000.0}, "--fps 1000.0: must be at most 240"),
        ({"num_frames": 9, "duration": 1.0}, "--num-frames and --duration say the same thing"),
        ({"seed": -1}, "--seed -1: must be a whole number from 0"),
        ({"video_cfg_scale": -1.0}, "--video-cfg-guidance-scale -1.0: must be 0 or more"),
        ({"audio_rescale": 2.0}, "--audio-rescale-scale 2.0: must be from 0 to 1"),
        ({"video_modality_scale": float("inf")}, "--a2v-guidance-scale inf: must be 0 or more"),
        ({"images": (ImageInput(Path("a.png"), 0, 1.5),)}, "--image a.png: strength 1.5 is not from 0 to 1"),
        ({"images": (ImageInput(Path("a.png"), -1),)}, "--image a.png: frame -1 is negative"),
        ({"dtype": "int8"}, "--dtype int8: must be one of auto, bfloat16"),
        ({"audio": False, "output_audio": "a.wav"}, "--output-audio: there is no sound with --no-audio"),
        ({"audio": False, "audio_cfg_scale": 3.0}, "--audio-cfg-guidance-scale: there is no sound"),
        ({"audio": False, "video_modality_scale": 3.0}, "--a2v-guidance-scale: there is no sound"),
        ({"images": (ImageInput("a.png"), ImageInput("b.png"))}, "--image a.png: another image is given for frame 0"),
        ({"output": "clip.avi"}, "--output clip.avi: the name must end in .mp4"),
        ({"output_audio": "a.mp3"}, "--output-audio a.mp3: the name must end in .wav or .flac"),
        ({"contact_sheet": "a.gif"}, "--contact-sheet a.gif: the name must end in .png"),
        ({"output": None}, "nothing to write: give --output"),
    ],
)
def test_mistakes_name_the_flag_and_what_is_allowed(changes, message):
    with pytest.raises(UserError) as error:
        request(**changes).validate()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_plain_request_is_valid():
    request().validate()
    request(output=None, output_audio="a.flac").validate()


def test_every_field_names_a_flag_of_the_command_line():
    from dataclasses import fields

    from mlx_ltx.flags import build_parser

    known = {option for action in build_parser()._actions for option in action.option_strings}
    made_up = {"original_prompt"}  # what --enhance-prompt was given
    assert {flag(field.name) for field in fields(Request) if field.name not in made_up} <= known


@given(
    prompt=st.text(max_size=50),
    seed=st.integers(0, MAX_SEED),
    width=st.none() | st.integers(32, 4096),
    blocks=st.none() | st.lists(st.integers(0, 47), max_size=3).map(tuple),
    audio=st.booleans(),
    frame=st.integers(0, 100),
)
def test_settings_survive_json(prompt, seed, width, blocks, audio, frame):
    image = ImageInput(Path("/tmp/a b.png"), frame, 0.5)
    made = request(prompt=prompt, seed=seed, width=width, video_stg_blocks=blocks, audio=audio, images=(image,))
    again = Request.from_settings(json.loads(json.dumps(made.settings())))
    assert again == made.with_changes(output=None)


def test_settings_do_not_say_where_the_clip_was_written():
    settings = request(output_audio="a.wav", contact_sheet="a.png", force=True).settings()
    assert settings["mlx_ltx"]
    assert not {"output", "output_audio", "contact_sheet", "force"} & settings.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "x", "lens": 1}, "unknown settings lens"),
        ({"seed": 1}, "no prompt"),
        ({"prompt": "x", "images": [1]}, "unknown form"),
    ],
)
def test_settings_of_another_kind_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Request.from_settings(settings)


def test_a_new_length_displaces_the_old_one():
    assert request(num_frames=9).with_changes(duration=2.0).num_frames is None
    assert request(duration=2.0).with_changes(num_frames=9).duration is None
