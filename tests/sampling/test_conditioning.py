"""Given content: regions, masks, references, attention strengths, keyframe slots."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import parity.sampling  # noqa: F401  (registers the runners)
from mlx_ltx.sampling.conditioning import (
    AttentionStrength,
    AudioReference,
    GeneratedKeyframes,
    Keyframe,
    MaskedLatent,
    Reference,
    ReplacedLatent,
    TemporalRegion,
    evenly_spaced_frames,
    generated_keyframes,
)
from mlx_ltx.sampling.geometry import AudioGrid, VideoGrid
from mlx_ltx.sampling.state import AttentionGroups, audio_state, video_state

GRID = VideoGrid(3, 2, 3, 4, 8, 32, 24.0)
SOUND = AudioGrid(17, 2, 3)
IMAGE = mx.random.normal((1, 1, 2, 3, 4), key=mx.random.key(0))
VIDEO = mx.random.normal((1, 3, 2, 3, 4), key=mx.random.key(1))


def test_parity(compare_golden):
    """Measured: at most 7e-8."""
    results = compare_golden("conditioning")
    recorded = {"temporal_region", "audio_temporal_region", "mask", "reference", "reference_down2_temporal4_s0.9"}
    recorded |= {"reference_att0.5", "two_refs_att", "gen_keyframes", "audio_reference_negpos", "keyframe24_multi"}
    assert recorded <= {result.case for result in results}
    assert "attention_mask" in {result.tensor for result in results}
    for result in results:
        assert result.error < 1e-6, f"{result.case} {result.tensor}"


# Regions


@given(
    frames=st.integers(1, 6),
    fps=st.sampled_from([8.0, 24.0, 50.0]),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)).filter(lambda c: c[1] - c[0] > 1e-3),
)
def test_a_region_takes_whole_frames_that_it_touches(frames, fps, cut):
    grid = replace(GRID, frames=frames, fps=fps)
    duration = ((frames - 1) * 8 + 1) / fps
    start, end = cut[0] * duration, cut[1] * duration
    mask = grid.unpatchify(mx.array(video_state(grid, [TemporalRegion(start, end)]).mask)[None, :, None])
    per_frame = np.array(mask[0, :, 0, 0, 0])
    assert mx.array_equal(mask, mx.broadcast_to(mask[:, :, :1, :1], mask.shape))
    for frame in range(frames):
        first, last = max(frame * 8 - 7, 0) / fps, (frame * 8 + 1) / fps
        if start + 1e-4 < last and end - 1e-4 > first:
            assert per_frame[frame] == 1
        elif start - 1e-4 > last or end + 1e-4 < first:
            assert per_frame[frame] == 0
    changes = np.flatnonzero(np.diff(per_frame))
    assert per_frame.max() == 1
    assert len(changes) <= 2  # one run of frames


def test_a_region_over_everything_generates_everything():
    assert (video_state(GRID, [TemporalRegion(0, 100)]).mask == 1).all()
    assert (audio_state(SOUND, [TemporalRegion(-1, 100)]).mask == 1).all()


def test_the_end_is_not_part_of_a_region():
    mask = audio_state(SOUND, [TemporalRegion(0.01, 0.05)]).mask  # edges of the second token
    assert mask.tolist() == [0, 1] + [0] * 15


def test_a_region_leaves_appended_tokens_alone():
    state = video_state(GRID, [Keyframe(IMAGE, 8, 0.25), TemporalRegion(0, 0.01)])
    assert state.mask.tolist() == [1] * 6 + [0] * 12 + [0.75] * 6


@pytest.mark.parametrize("region", [(5.0, 6.0), (-2.0, -1.0), (0.5, 0.2), (0.3, 0.3)])
def test_a_region_without_anything_in_it_is_an_error(region):
    with pytest.raises(ValueError, match="no part of"):
        video_state(GRID, [TemporalRegion(*region)])
    with pytest.raises(ValueError, match="no part of"):
        audio_state(SOUND, [TemporalRegion(*region)])


# Masks


@given(strength=st.floats(0, 1), seed=st.integers(0, 5))
def test_a_mask_gives_some_tokens_and_leaves_the_others(strength, seed):
    chosen = np.random.default_rng(seed).integers(0, 2, (3, 2, 3))
    before = video_state(GRID, [ReplacedLatent(IMAGE, 1, 0.5), Keyframe(IMAGE, 8)])
    state = MaskedLatent(VIDEO, chosen, strength).apply(before, GRID)
    inside = np.append(chosen.reshape(-1) == 1, np.zeros(6, bool))
    assert np.allclose(state.mask[inside], 1 - strength, atol=1e-6)
    assert (state.mask[~inside] == before.mask[~inside]).all()
    clean, given = np.array(state.clean[0]), np.array(GRID.patchify(VIDEO)[0])
    assert np.allclose(clean[inside], given[inside[:18]], atol=1e-6)
    assert (clean[~inside] == np.array(before.clean[0])[~inside]).all()


def test_a_mask_of_another_size_is_an_error():
    with pytest.raises(ValueError, match="does not fit"):
        video_state(GRID, [MaskedLatent(VIDEO, np.ones((3, 2, 2)))])
    with pytest.raises(ValueError, match="does not fit"):
        video_state(GRID, [MaskedLatent(IMAGE, np.ones((3, 2, 3)))])


# References


@given(scale=st.integers(1, 4), frames=st.integers(1, 4), downscale=st.integers(1, 3), fps=st.sampled_from([8.0, 25.0]))
def test_a_reference_covers_the_time_and_area_of_its_clip(scale, frames, downscale, fps):
    clip = VideoGrid((frames - 1) * scale + 1, 2 * downscale, downscale, 4, 8, 32, fps)
    latent = mx.zeros((1, frames, 2, 1, 4))
    state = video_state(clip, [Reference(latent, 1.0, downscale, scale)])
    own, appended = state.positions[0, :, : clip.tokens], state.positions[0, :, clip.tokens :]
    assert appended.shape[1] == frames * 2
    assert np.allclose(own.min(axis=(1, 2)), appended.min(axis=(1, 2)), atol=1e-5)
    assert np.allclose(own.max(axis=(1, 2)), appended.max(axis=(1, 2)), rtol=1e-5)
    assert np.allclose(appended[0, :2], [0, 1 / fps], atol=1e-6)  # its first frame is the clip's first
    assert (state.mask[clip.tokens :] == 0).all()
    assert (state.keyframes[clip.tokens :] == 0).all()


def test_a_preceding_sound_ends_before_the_clip():
    state = audio_state(SOUND, [AudioReference.preceding(mx.ones((1, 5, 2, 3)), SOUND, gap=0.5)])
    positions = state.positions[0, 0, SOUND.tokens :]
    assert positions[-1, 1] == pytest.approx(-0.5, abs=1e-6)
    assert positions[0, 0] == pytest.approx(-0.5 - 0.17, abs=1e-6)
    assert np.allclose(np.diff(positions[1:, 0]), 0.04, atol=1e-6)
    assert SOUND.unpatchify(state.latent).shape == (1, 17, 2, 3)


def test_positions_for_another_sound_are_an_error():
    with pytest.raises(ValueError, match="positions of shape"):
        audio_state(SOUND, [AudioReference(mx.ones((1, 5, 2, 3)), SOUND.positions())])


# Attention strengths


def table_by_blocks(clip, items):
    """The rule as it is stated: a block table that grows item by item; None until an item has a strength."""
    table, total = None, clip
    for count, strength in items:
        if strength is not None or table is not None:
            grown = np.zeros((total + count, total + count))
            grown[:total, :total] = 1 if table is None else table
            grown[total:, total:] = 1
            grown[:clip, total:] = grown[total:, :clip] = 1 if strength is None else strength
            table = grown
        total += count
    return table


def strengths_of(state):
    """(T, T), from what attention adds to its logits, made in two pieces."""
    bias = state.groups.bias(mx.float32)
    pieces = [bias.rows(0, 5), bias.rows(5, state.tokens)]
    return np.exp(np.array(mx.concatenate(pieces, axis=2)[0, 0]))


@given(items=st.lists(st.tuples(st.integers(1, 3), st.none() | st.floats(0, 1, width=16)), max_size=5))
def test_attention_follows_the_blocks_of_the_items(items):
    def item(frames, strength):
        reference = Reference(mx.zeros((1, frames, 1, 1, 4)))
        return reference if strength is None else AttentionStrength(reference, strength)

    state = video_state(GRID, [item(*spec) for spec in items])
    expected = table_by_blocks(GRID.tokens, items)
    if expected is None:
        assert state.groups is None
        return
    table = strengths_of(state)
    assert table.shape == (state.tokens, state.tokens)
    assert np.allclose(table, expected, atol=1e-7)
    assert (table == table.T).all()
    assert (np.diag(table) == 1).all()


def test_every_token_can_have_its_own_strength():
    strengths = np.linspace(0, 1, 6, dtype=np.float32).reshape(1, 2, 3)
    state = video_state(GRID, [AttentionStrength(Keyframe(IMAGE, 8), strengths)])
    assert np.allclose(strengths_of(state)[:18, 18:], strengths.reshape(1, -1))


@pytest.mark.parametrize(
    ("item", "strength", "message"),
    [
        (ReplacedLatent(IMAGE), 0.5, "appends no tokens"),
        (Keyframe(IMAGE, 8), np.ones(5, np.float32), "5 attention strengths for 6 tokens"),
        (Keyframe(IMAGE, 8), 1.5, "between 0 and 1"),
        (Keyframe(IMAGE, 8), -0.1, "between 0 and 1"),
        (Keyframe(IMAGE, 8), float("nan"), "between 0 and 1"),
    ],
)
def test_strengths_that_mean_nothing_are_errors(item, strength, message):
    with pytest.raises(ValueError, match=message):
        video_state(GRID, [AttentionStrength(item, strength)])


def test_full_attention_is_one_everywhere():
    assert (AttentionGroups.before_any(4, 3).bias(mx.float32).rows(0, 7) == 0).all()


# Keyframe slots


@given(frames=st.lists(st.integers(0, 16), min_size=1, max_size=4, unique=True).map(sorted))
def test_slots_start_from_what_they_are_given_and_give_it_back(frames):
    initial = mx.random.normal((1, len(frames), 2, 3, 4), key=mx.random.key(2))
    items = [Keyframe(IMAGE, 4), GeneratedKeyframes(tuple(frames), initial), Keyframe(IMAGE, 8)]
    state = video_state(GRID, items)
    assert mx.array_equal(generated_keyframes(state, GRID), initial)
    slots = state.positions[0, 0, 24 : 24 + 6 * len(frames) : 6]
    assert np.allclose(slots * 24, [[frame, frame + 1] for frame in frames], atol=1e-4)
    assert state.mask[24 : 24 + 6 * len(frames)].tolist() == [1] * 6 * len(frames)
    assert state.keyframes.sum() == 6 * (1 + len(frames))
    assert generated_keyframes(video_state(GRID, [Keyframe(IMAGE, 4)]), GRID) is None


@pytest.mark.parametrize("frames", [(), (-1,), (17,), (5, 5), (8, 3)])
def test_slots_off_the_clip_are_errors(frames):
    with pytest.raises(ValueError, match="not rising frame numbers from 0 to 16"):
        video_state(GRID, [GeneratedKeyframes(frames)])


def test_slots_are_for_pictures_of_their_size_once():
    with pytest.raises(ValueError, match="initial keyframes of shape"):
        video_state(GRID, [GeneratedKeyframes((3, 4), IMAGE)])
    with pytest.raises(ValueError, match="once only"):
        video_state(GRID, [GeneratedKeyframes((3,)), GeneratedKeyframes((4,))])
    with pytest.raises(ValueError, match="only a picture"):
        generated_keyframes(audio_state(SOUND), GRID)


@given(count=st.integers(0, 20), frames=st.integers(22, 200))
def test_evenly_spaced_frames_lie_inside(count, frames):
    chosen = evenly_spaced_frames(count, frames)
    edges = np.diff([0, *chosen, frames - 1])
    assert len(chosen) == count
    assert (edges > 0).all()
    assert edges.max() - edges.min() <= 2


def test_more_keyframes_than_frames_are_an_error():
    assert evenly_spaced_frames(7, 9) == tuple(range(1, 8))
    with pytest.raises(ValueError, match="no room for 8 keyframes"):
        evenly_spaced_frames(8, 9)
