"""The synthetic scenes: the same for the same seed, captions that fit, sound that belongs to the picture."""

import numpy as np
import pytest

from demo_measures import (
    clicks_of,
    colour_of,
    follows,
    in_sync,
    landings_of,
    look,
    motion_of,
    pitch_of,
    right_pitch,
    shape_of,
)
from demo_scenes import (
    BACKGROUNDS,
    COLOURS,
    FRAMES,
    HEIGHT,
    MOTIONS,
    MOVES,
    PITCHES,
    SAMPLE_RATE,
    SHAPES,
    TONES,
    WIDTH,
    draw,
    make_scene,
    play,
)
from demo_scenes import main as show_scenes
from measure_demo import judge, main, table

SCENES = [make_scene(seed) for seed in range(400)]


def test_a_seed_is_a_scene():
    assert make_scene(7) == make_scene(7)
    assert make_scene(7) != make_scene(8)
    np.testing.assert_array_equal(draw(make_scene(7)), draw(make_scene(7)))
    np.testing.assert_array_equal(play(make_scene(7)), play(make_scene(7)))


def test_everything_occurs_and_captions_vary():
    assert {scene.colour for scene in SCENES} == COLOURS.keys()
    assert {scene.shape for scene in SCENES} == set(SHAPES)
    assert {scene.motion for scene in SCENES} == set(MOTIONS)
    assert {scene.background for scene in SCENES} == BACKGROUNDS.keys()
    assert {scene.size for scene in SCENES} == {"small", "medium", "large"}
    assert len({scene.caption for scene in SCENES}) > 390
    assert not any(scene.motion == "rotate" and scene.shape == "circle" for scene in SCENES)


def test_what_rotates_turns_clockwise_by_about_half_a_turn():
    turning = [scene for scene in SCENES if scene.motion == "rotate"]
    assert {scene.reach for scene in turning} == {0.48, 0.52}
    triangle = next(scene for scene in turning if scene.shape == "triangle")
    frame = round(triangle.frames / 6)  # the corner at the top is 30 degrees on, so another one points to the left
    columns = np.flatnonzero(look(draw(triangle)).masks[frame].any(axis=0)) / HEIGHT
    middle = triangle.centre[0]
    assert middle - columns.min() > columns.max() - middle + 0.02


@pytest.mark.parametrize("scene", SCENES[:100], ids=lambda scene: scene.caption[:40])
def test_captions_say_what_is_there(scene):
    caption = scene.caption.lower()
    assert f"{scene.colour} {scene.shape}" in caption
    assert any(move in caption for move in MOVES[scene.motion])
    assert scene.background in caption
    assert scene.end is None or scene.end in caption
    for shape, tones in TONES.items():
        assert shape == scene.shape or not any(tone in caption for tone in tones)
    for size in ("small", "large"):
        named = f"{size} {scene.colour}" in caption
        assert named == (scene.size == size and scene.motion not in ("grow", "shrink"))


def test_some_of_a_scene_can_be_chosen():
    scene = make_scene(3, colour="red", shape="star", motion="bounce")
    assert (scene.colour, scene.shape, scene.motion) == ("red", "star", "bounce")


def test_frames_and_sound_have_their_sizes():
    scene = make_scene(1)
    assert draw(scene).shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert draw(scene, 64, 48, range(5, 9)).shape == (4, 48, 64, 3)
    np.testing.assert_array_equal(draw(scene, shown=range(5, 9)), draw(scene)[5:9])
    waveform = play(scene)
    assert waveform.shape == (round(FRAMES / 24 * SAMPLE_RATE), 2)
    assert 0.1 < np.abs(waveform).max() < 0.95
    assert len(play(scene, 16_000)) == round(FRAMES / 24 * 16_000)


def test_half_the_size_shows_the_same():
    scene = make_scene(4)
    large = draw(scene).astype(float)
    smaller = large.reshape(FRAMES, HEIGHT // 2, 2, WIDTH // 2, 2, 3).mean(axis=(2, 4))
    assert np.abs(draw(scene, WIDTH // 2, HEIGHT // 2) - smaller).mean() < 1


@pytest.mark.parametrize("motion", ["left", "right"])
def test_the_shape_goes_where_the_caption_says_and_the_sound_with_it(motion):
    scene = make_scene(11, motion=motion)
    seen, waveform = look(draw(scene)), play(scene)
    assert (seen.x[-1] > seen.x[0]) == (motion == "right")
    louder = np.abs(waveform[-9000:-3000]).mean(axis=0) - np.abs(waveform[3000:9000]).mean(axis=0)
    assert (louder[1] > louder[0]) == (motion == "right")
    assert follows(waveform, SAMPLE_RATE, seen, scene.fps)
    assert not follows(waveform[:, ::-1], SAMPLE_RATE, seen, scene.fps)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_its_pitch(shape):
    scene = make_scene(5, shape=shape, motion="up")
    assert pitch_of(play(scene), SAMPLE_RATE) == pytest.approx(PITCHES[shape], abs=1)
    assert [right_pitch(play(scene), SAMPLE_RATE, other) for other in SHAPES] == [other == shape for other in SHAPES]


@pytest.mark.parametrize("seed", range(5))
def test_it_clicks_when_it_lands(seed):
    scene = make_scene(seed, motion="bounce")
    landings = scene.landings()
    assert len(landings) >= 2
    # heard when the formula says
    clicks = clicks_of(play(scene), SAMPLE_RATE)
    np.testing.assert_allclose(clicks, landings, atol=0.02)
    # and seen: its lower edge is on the ground then, and nowhere else
    _, y, radius, _ = scene.place(landings)
    np.testing.assert_allclose(y + radius, 0.94)
    seen = landings_of(look(draw(scene)), scene.fps)
    assert in_sync(clicks, seen, scene.duration)
    assert not in_sync(clicks + 0.2, seen, scene.duration)
    assert not in_sync(clicks[:0], seen, scene.duration)


def test_other_scenes_do_not_click():
    scene = make_scene(5, motion="grow")
    assert not len(scene.landings())
    assert not len(clicks_of(play(scene), SAMPLE_RATE))


def test_measures_are_right_about_the_scenes_themselves():
    results = [judge(scene, draw(scene), play(scene), SAMPLE_RATE) for scene in SCENES[100:120]]
    for name, (right, asked) in table(results).items():
        assert right == asked, name


def test_measures_find_what_is_wrong():
    scene = make_scene(21, colour="red", shape="circle", motion="left")
    other = make_scene(21, colour="blue", shape="star", motion="down")
    assert not any(
        judge(scene, draw(other), play(other), SAMPLE_RATE)[name] for name in ("colour", "shape", "motion", "pitch")
    )
    backwards = judge(scene, draw(scene)[::-1], play(scene), SAMPLE_RATE)
    assert [backwards[name] for name in ("colour", "shape", "motion", "stereo")] == [True, True, False, False]


@pytest.mark.parametrize("frames", [np.zeros((49, 96, 128, 3), np.uint8), None], ids=["black", "noise"])
def test_nothing_and_noise_are_not_taken_for_scenes(frames):
    rng = np.random.default_rng(1)
    frames = rng.integers(0, 255, (49, 96, 128, 3), np.uint8) if frames is None else frames
    seen = look(frames)
    assert motion_of(seen) in (None, "rotate", "still")
    if not seen.found.any():
        assert (colour_of(seen), shape_of(seen)) == (None, None)
    assert pitch_of(np.zeros((48_000, 2)), SAMPLE_RATE) is None


def test_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x", "--sheet", str(tmp_path / "scenes.png"), "--count", "2"])
    show_scenes()
    numbers, sheet = tmp_path / "measures.json", tmp_path / "clips.png"
    monkeypatch.setattr("sys.argv", ["x", "--truth", "--clips", "3", "--json", str(numbers), "--sheet", str(sheet)])
    main()
    assert "colour        3 of    3  100.0%" in capsys.readouterr().out
    assert all(path.stat().st_size > 0 for path in (tmp_path / "scenes.png", numbers, sheet))
