"""Noise levels, noising and the loss, against the formulas and against numbers worked out by hand."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_ltx.training.flow import FlowLoss, Noised, NoiseLevels, shift_for_tokens, velocity_loss


def test_the_shift_is_a_line_through_the_references_points():
    assert shift_for_tokens(1024) == pytest.approx(0.95)
    assert shift_for_tokens(4096) == pytest.approx(2.05)
    assert shift_for_tokens(100) == pytest.approx(0.95 - 924 * 1.1 / 3072)


def test_levels_follow_the_stretched_logit_normal():
    drawn = np.array(NoiseLevels(uniform_prob=0).draw(mx.random.key(1), 200_000, 1024))
    # The median of a logit-normal is the sigmoid of its mean, here stretched between two quantiles.
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    low, high = sigmoid(0.95 - 2.5758), sigmoid(0.95 + 3.0902)
    assert np.median(drawn) == pytest.approx((sigmoid(0.95) - low) / (high - low), abs=0.005)
    assert drawn.min() >= 0
    assert drawn.max() == 1  # one in a thousand lies above the upper quantile
    assert ((drawn > 0) & (drawn < 1e-3)).mean() < 1e-3  # reflected


# Of 8 million draws of Lightricks' ShiftedLogitNormalTimestepSampler: the quantiles below.
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
REFERENCE = {
    100: (0.0332, 0.2312, 0.4088, 0.6093, 0.7739, 0.8774, 0.9734),
    1024: (0.0396, 0.2748, 0.4698, 0.6687, 0.8161, 0.9026, 0.9788),
    4096: (0.0596, 0.4166, 0.6461, 0.8117, 0.9054, 0.9522, 0.9895),
    9000: (0.0748, 0.5491, 0.7800, 0.8969, 0.9513, 0.9760, 0.9948),
}


@pytest.mark.parametrize("tokens", REFERENCE)
def test_levels_are_distributed_as_the_references(tokens):
    drawn = np.array(NoiseLevels().draw(mx.random.key(0), 1_000_000, tokens))
    assert np.quantile(drawn, QUANTILES) == pytest.approx(REFERENCE[tokens], abs=0.003)


def test_some_levels_are_uniform():
    drawn = np.array(NoiseLevels(uniform_prob=1).draw(mx.random.key(1), 100_000, 4096))
    assert drawn.mean() == pytest.approx(0.5, abs=0.01)
    assert drawn.min() >= 1e-3
    drawn = np.array(NoiseLevels("uniform", min_value=0.25, max_value=0.5).draw(mx.random.key(1), 100_000, 4096))
    assert drawn.min() == pytest.approx(0.25, abs=1e-3)
    assert drawn.max() == pytest.approx(0.5, abs=1e-3)


def test_noise_and_target(transformer, make_batch):
    batch = make_batch()
    video, audio = FlowLoss().noise(transformer, batch, mx.random.key(3))
    for noised, clean in (
        (video, batch.video_grid.patchify(batch.video)),
        (audio, batch.audio_grid.patchify(batch.audio)),
    ):
        sigma = noised.given.sigma[:, None, None]
        noise = noised.target + clean
        assert mx.allclose(noised.given.latent, (1 - sigma) * clean + sigma * noise, atol=1e-6)
        assert abs(noise.std().item() - 1) < 0.1
        assert (noised.weight == 1).all()
    assert mx.array_equal(video.given.sigma, audio.given.sigma)


def test_separate_noise_levels(transformer, make_batch):
    video, audio = FlowLoss(separate_sigmas=True).noise(transformer, make_batch(), mx.random.key(3))
    assert not mx.array_equal(video.given.sigma, audio.given.sigma)


def given_samples(noised, clean, tokens=None):
    """The samples whose first tokens (all if None) are given: those are clean and do not count, all others do."""
    weight, latent, clean = np.array(noised.weight), np.array(noised.given.latent), np.array(clean)
    given = weight[:, 0] == 0
    first = weight.shape[1] if tokens is None else tokens
    assert (weight[:, :first] == (1 - given)[:, None]).all()
    assert (weight[:, first:] == 1).all()
    assert (latent[given, :first] == clean[given, :first]).all()
    assert (latent[~given, :first] != clean[~given, :first]).all()
    return given


def test_a_given_sound_is_clean_without_noise_level_and_does_not_count(transformer, make_batch):
    batch = make_batch(samples=64)
    video, audio = FlowLoss(sound_given_probability=0.5).noise(transformer, batch, mx.random.key(3))
    given = given_samples(audio, batch.audio_grid.patchify(batch.audio))
    assert 16 < given.sum() < 48
    assert (np.array(audio.given.sigma) == np.array(video.given.sigma) * (1 - given)).all()
    assert (audio.given.timesteps == audio.given.sigma[:, None]).all()
    assert (video.weight == 1).all()


def test_a_given_picture_is_clean_without_noise_level_and_does_not_count(transformer, make_batch):
    batch = make_batch(samples=64)
    loss = FlowLoss(sound_given_probability=0.3, picture_given_probability=0.4)
    video, audio = loss.noise(transformer, batch, mx.random.key(3))
    given = given_samples(video, batch.video_grid.patchify(batch.video))
    assert 16 < given.sum() < 36
    assert (np.array(audio.weight)[given] == 1).all()  # never both
    assert (np.array(audio.weight)[:, 0] == 0).any()
    assert (np.array(video.given.sigma)[given] == 0).all()
    assert (np.array(video.given.sigma)[~given] > 0).all()


def test_sound_alone_is_never_given(transformer, make_batch):
    batch = replace(make_batch(samples=16), video=None)
    _, audio = FlowLoss(sound_given_probability=0.5, picture_given_probability=0.5).noise(
        transformer, batch, mx.random.key(3)
    )
    assert (audio.weight == 1).all()


def test_a_given_first_frame_is_clean_without_noise_level_and_does_not_count(transformer, make_batch):
    batch = make_batch(samples=64)
    video, _ = FlowLoss(first_frame_probability=0.5).noise(transformer, batch, mx.random.key(3))
    given = given_samples(video, batch.video_grid.patchify(batch.video), batch.video_grid.tokens_per_frame)
    assert 16 < given.sum() < 48
    level = np.take_along_axis(np.array(video.given.timesteps), np.array(video.given.level_of_token), axis=1)
    assert (level == np.array(video.given.sigma)[:, None] * np.array(video.weight)).all()


def test_a_clip_of_one_frame_is_never_given(transformer, make_batch):
    batch = make_batch(grid=replace(make_batch().video_grid, frames=1))
    video, _ = FlowLoss(first_frame_probability=1).noise(transformer, batch, mx.random.key(3))
    assert (video.weight == 1).all()


def test_a_reference_is_appended_clean_and_does_not_count(transformer, make_batch):
    batch = make_batch()
    batch = replace(batch, reference=batch.video[:, :, :1, :1], downscale=2)
    loss = FlowLoss()
    video, _ = loss.noise(transformer, batch, mx.random.key(3))
    assert video.given.latent.shape[1] == batch.video_grid.tokens + 2
    assert video.target.shape[1] == batch.video_grid.tokens
    assert mx.array_equal(video.given.latent[:, batch.video_grid.tokens :], batch.video_grid.patchify(batch.reference))
    assert (video.given.level_of_token[:, batch.video_grid.tokens :] == 1).all()
    assert (video.given.timesteps[:, 1] == 0).all()
    state, _ = next(iter(loss._tables.values()))
    assert state.positions[0, 1, batch.video_grid.tokens, 1] == 64  # one token of the reference covers two of the clip
    assert set(loss(transformer, batch, mx.random.key(3))) == {"video", "audio"}


def test_the_loss_is_each_samples_mean_over_the_tokens_that_count():
    velocity = mx.array([[[1.0, 1.0], [5.0, 5.0], [9.0, 9.0]], [[2.0, 2.0], [2.0, 2.0], [9.0, 9.0]]])
    noised = Noised(None, mx.zeros((2, 2, 2)), mx.array([[1.0, 0.0], [1.0, 1.0]]))
    assert velocity_loss(velocity, noised).item() == pytest.approx((1 + 4) / 2)  # the third token is a reference's


@pytest.mark.parametrize("stream", ["video", "audio"])
def test_one_stream_alone(transformer, make_batch, stream):
    other = "audio" if stream == "video" else "video"
    losses = FlowLoss()(transformer, make_batch(**{other: None}), mx.random.key(3))
    assert list(losses) == [stream]
