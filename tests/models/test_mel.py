from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import parity.audio  # noqa: F401
from mlx_ltx.models.audio_vae import AudioVaeConfig
from mlx_ltx.models.mel import MelSpectrogram, slaney_filterbank
from parity import GoldenSet, runner_for

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def mel():
    return MelSpectrogram.from_config(AudioVaeConfig())


def test_parity():
    results = {r.tensor: r.error for r in runner_for("audio_mel")(GoldenSet(GOLDEN, "audio_mel"))}
    assert results.keys() >= {"hann_window", "mel_filterbank", "mel16k", "mel48k"}
    assert max(results.values()) < 1e-5, results


def test_filters_are_triangles_of_unit_area():
    filters = slaney_filterbank(16_000, 16_384, 64)
    hertz_per_bin = 16_000 / 16_384
    assert filters.min() == 0
    np.testing.assert_allclose(filters.sum(axis=0) * hertz_per_bin, 1, rtol=0.02)
    # Below 1 kHz the centres are equally spaced, above they spread.
    centres = filters.argmax(axis=0) * hertz_per_bin
    spacing = np.diff(centres)
    np.testing.assert_allclose(spacing[centres[1:] < 950], spacing[0], atol=2)
    assert spacing[-1] > 4 * spacing[0]


def test_a_tone_is_where_it_should_be_in_its_own_channel(mel):
    time = np.arange(8000) / 16_000
    wave = np.stack([np.sin(2 * np.pi * 3000 * time), np.zeros(8000)], axis=1)
    result = np.array(mel(mx.array(wave[None].astype(np.float32))))
    assert result.shape == (1, 51, 64, 2)
    expected = slaney_filterbank(16_000, 1024, 64)[3000 * 1024 // 16_000].argmax()
    assert (result[0, 5:-5, :, 0].argmax(axis=1) == expected).all()
    np.testing.assert_allclose(result[..., 1], np.log(1e-5), rtol=1e-6)


@pytest.mark.parametrize(("samples", "frames"), [(513, 4), (1599, 10), (1600, 11), (1601, 11)])
def test_frames(mel, samples, frames):
    wave = mx.random.normal((2, samples, 1), key=mx.random.key(0))
    result = mel(wave.astype(mx.bfloat16))
    assert result.shape == (2, frames, 64, 1)
    assert result.dtype == mx.float32


def test_too_short_to_mirror(mel):
    with pytest.raises(ValueError, match="512"):
        mel(mx.zeros((1, 512, 2)))
