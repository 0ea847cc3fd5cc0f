"""What every pipeline does to a clip, by what is seen and heard in it: the demo is trained, so this can be told."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from clips import psnr
from demo_measures import clicks_of, colour_of, follows, in_sync, landings_of, look, motion_of, right_pitch, shape_of
from demo_scenes import FPS, SAMPLE_RATE, draw, make_scene, play
from mlx_ltx.media.audio import write_audio
from mlx_ltx.request import ImageInput


@pytest.mark.parametrize(
    ("prompt", "colour", "motion", "shape"),
    [
        ("A red circle moves to the right on a black background.", "red", "right", "circle"),
        ("A blue square moves to the left.", "blue", "left", "square"),
        ("A yellow triangle rises over a plain navy background.", "yellow", "up", "triangle"),
        ("A yellow star moves to the right on a black background.", "yellow", "right", "star"),
    ],
)
def test_a_clip_does_what_its_prompt_says(make, prompt, colour, motion, shape):
    clip = make(prompt=prompt)
    assert colour_of(clip.seen) == colour
    assert shape_of(clip.seen) == shape
    assert motion_of(clip.seen) == motion
    assert right_pitch(clip.waveform, SAMPLE_RATE, shape)
    assert not len(clicks_of(clip.waveform, SAMPLE_RATE))
    if motion in ("left", "right"):
        assert follows(clip.waveform, SAMPLE_RATE, clip.seen, FPS)


def test_a_bouncing_shape_clicks_when_it_lands(make):
    clip = make(prompt="A white square bounces up and down on a black background.")
    assert motion_of(clip.seen) == "bounce"
    clicks = clicks_of(clip.waveform, SAMPLE_RATE)
    assert 2 <= len(clicks) <= 4
    assert in_sync(clicks, landings_of(clip.seen, FPS), len(clip.frames) / FPS)


def test_guided_and_distilled_agree_on_content(make):
    prompt = "A blue square moves to the left on a black background."
    clips = [make(prompt=prompt), make(prompt=prompt, pipeline="one-stage", steps=8)]
    for clip in clips:
        assert (colour_of(clip.seen), motion_of(clip.seen)) == ("blue", "left")
        assert right_pitch(clip.waveform, SAMPLE_RATE, "square")


def test_a_given_first_frame_is_kept(make, tmp_path):
    scene = make_scene(7, colour="purple", shape="square", motion="right", background="grey")
    first = draw(scene)[0]
    Image.fromarray(first).save(tmp_path / "first.png")
    clip = make(prompt=scene.caption, images=(ImageInput(tmp_path / "first.png", 0, crf=0),))
    without = make(prompt=scene.caption)
    assert psnr(clip.frames[0], first) > 24
    assert psnr(clip.frames[0], first) > psnr(without.frames[0], first) + 3
    assert colour_of(clip.seen) == "purple"


def test_keyframes_are_hit(make, tmp_path):
    scene = make_scene(3, colour="white", shape="circle", motion="down", background="navy")
    frames = draw(scene)
    for index in (0, 48):
        Image.fromarray(frames[index]).save(tmp_path / f"{index}.png")
    images = tuple(ImageInput(tmp_path / f"{index}.png", index, crf=0) for index in (0, 48))
    seen = make(prompt=scene.caption, pipeline="keyframes", guided=False, images=images).seen
    wanted = look(frames)
    for index in (0, 48):
        assert np.hypot(seen.x[index] - wanted.x[index], seen.y[index] - wanted.y[index]) < 0.12


def test_a_retake_changes_its_range_only(make, film):
    scene = make_scene(5, colour="green", shape="circle", motion="left", background="black")
    frames, prompt = draw(scene), "A red circle moves left on a black background."
    clip = make(prompt=prompt, pipeline="retake", guided=False, video_path=film(scene), start_time=0.8, end_time=1.3)
    quality = [psnr(a, b) for a, b in zip(clip.frames, frames, strict=True)]
    inside = [n for n in range(49) if 0.8 < (n + 0.5) / FPS < 1.3]
    assert min(q for n, q in enumerate(quality) if n not in inside) > 30
    assert min(quality[n] for n in inside[3:-3]) < 25


def test_an_extended_clip_goes_on(make, film):
    scene = make_scene(5, colour="yellow", shape="circle", motion="right", background="black")
    scene = replace(scene, reach=0.5 * scene.reach, centre=(0.45, scene.centre[1]))
    clip = make(prompt=scene.caption, pipeline="extend", guided=False, video_path=film(scene), extend_after=16 / 24)
    seen = clip.seen
    assert len(clip.frames) == 65
    assert colour_of(look(clip.frames[49:])) == "yellow"
    # it is where it was at the seam, and goes on to the right
    assert abs(seen.x[50] - seen.x[48]) < 0.1
    assert seen.x[-1] > seen.x[48] + 0.04


def test_a_picture_for_a_sound_keeps_the_sound_and_follows_the_prompt(make, tmp_path):
    scene = make_scene(11, motion="right", shape="circle", colour="white", background="navy")
    sound = play(scene)
    write_audio(tmp_path / "tone.wav", sound, SAMPLE_RATE)
    clip = make(prompt=scene.caption, pipeline="a2v", guided=False, audio_path=tmp_path / "tone.wav")
    assert np.abs(clip.waveform[: len(sound)] - sound[: len(clip.waveform)]).max() < 1e-3
    assert colour_of(clip.seen) == "white"
    assert motion_of(clip.seen) == "right"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_picture_for_a_sound_lands_when_it_clicks(make, tmp_path, seed):
    scene = make_scene(9_500_000 + seed, motion="bounce")
    write_audio(tmp_path / "clicks.wav", play(scene), SAMPLE_RATE)
    clip = make(prompt=scene.caption, pipeline="a2v", guided=False, audio_path=tmp_path / "clicks.wav")
    assert motion_of(clip.seen) == "bounce"
    assert in_sync(scene.landings(), landings_of(clip.seen, FPS), scene.duration)


def test_quantised_clips_keep_their_content(make):
    prompt = "A red square moves to the right on a grey background."
    plain = make(prompt=prompt)
    for setting, least in (("q8", 25), ("q4", 16)):
        clip = make(prompt=prompt, quantize=setting, group_size=32)
        assert (colour_of(clip.seen), motion_of(clip.seen)) == ("red", "right")
        assert right_pitch(clip.waveform, SAMPLE_RATE, "square")
        assert psnr(clip.frames, plain.frames) > least


def test_streamed_weights_make_the_same_clip(make):
    prompt = "A white star spins on a brown background."
    resident, streamed = (make(prompt=prompt, weights=weights) for weights in ("resident", "streamed"))
    assert np.array_equal(resident.frames, streamed.frames)
    assert np.array_equal(resident.waveform, streamed.waveform)


@pytest.mark.parametrize("prompt", ["", "A red circle moves to the right on a black background. " * 30])
def test_the_shortest_and_a_very_long_prompt(make, warnings, prompt):
    clip = make(prompt=prompt)
    assert bool(warnings) is bool(prompt)
    assert all("at the end of a prompt are more than the model reads" in text for text in warnings)
    assert clip.frames.shape == (49, 96, 128, 3)
    assert np.isfinite(clip.waveform).all()
    assert np.abs(clip.waveform).max() > 0.01
