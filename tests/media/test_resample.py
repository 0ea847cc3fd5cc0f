from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import parity.audio
from mlx_ltx.media.resample import resample
from parity import GoldenSet, runner_for

GOLDEN = Path(__file__).parents[1] / "golden"


def test_parity():
    results = {r.tensor: r.error for r in runner_for("audio_mel")(GoldenSet(GOLDEN, "audio_mel"))}
    resampled = {name: error for name, error in results.items() if name.startswith("resampled")}
    assert resampled.keys() == {"resampled_44k1_to_16k", "resampled_48k_to_16k"}
    assert max(resampled.values()) < 1e-5, resampled


def test_rates_as_the_golden_files_write_them():
    assert [parity.audio.hertz(text) for text in ("16k", "44k1", "22k05")] == [16_000, 44_100, 22_050]


@pytest.mark.parametrize(
    "rates", [(44_100, 16_000), (48_000, 16_000), (16_000, 48_000), (44_100, 48_000), (8000, 8001)]
)
def test_a_tone_stays_the_tone_it_was(rates):
    source, target = rates
    tone = lambda rate: np.sin(2 * np.pi * 440 * np.arange(rate) / rate)  # noqa: E731
    wave = np.stack([tone(source), -0.5 * tone(source)], axis=1).astype(np.float32)
    result = resample(wave, source, target)
    assert result.shape == (target, 2)
    assert result.dtype == np.float32
    inner = slice(target // 20, -target // 20)
    np.testing.assert_allclose(result[inner, 0], tone(target)[inner], atol=2e-3)
    np.testing.assert_allclose(result[:, 1], -0.5 * result[:, 0], atol=1e-6)


def test_what_the_lower_rate_cannot_hold_is_removed():
    wave = np.sin(2 * np.pi * 12_000 * np.arange(48_000) / 48_000)[:, None].astype(np.float32)
    assert np.abs(resample(wave, 48_000, 16_000)[1000:-1000]).max() < 0.01


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 300), st.integers(1, 3), st.integers(1, 120), st.integers(1, 120))
def test_any_rates_agree_with_the_formula(samples, channels, source, target):
    wave = np.random.default_rng(samples).standard_normal((samples, channels)).astype(np.float32)
    result = resample(wave, source, target)
    assert result.shape == (-(-samples * target // source), channels)
    cutoff = min(source, target) * 0.99
    time = (np.arange(samples) / source - np.arange(len(result))[:, None] / target) * cutoff
    kernel = np.where(np.abs(time) < 6, np.sinc(time) * np.cos(time * np.pi / 12) ** 2, 0) * cutoff / source
    expected = wave if source == target else kernel @ wave
    np.testing.assert_allclose(result, expected, atol=1e-4)


@pytest.mark.parametrize(("shape", "source", "target"), [((10,), 1, 2), ((10, 1), 0, 2), ((10, 1), 1, -2)])
def test_mistakes_are_refused(shape, source, target):
    with pytest.raises(ValueError):
        resample(np.zeros(shape, np.float32), source, target)
