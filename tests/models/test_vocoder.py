import copy
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map_with_path

import parity.audio
from mlx_ltx.checkpoints.keymaps import VOCODER
from mlx_ltx.checkpoints.loading import load_weights, published_shapes
from mlx_ltx.models import vocoder as vocoder_module
from mlx_ltx.models.anti_alias import BLOCK, AntiAliasedSnake, SincResampler, fir_downsample, fir_upsample
from mlx_ltx.models.vocoder import DilatedConv1d, Upsample, VocoderConfig, build_vocoder
from parity import GoldenSet, runner_for

GOLDEN = Path(__file__).parents[1] / "golden"
REAL = json.loads((GOLDEN / "real_configs.json").read_text())
TENSORS = {
    "vocoder_19b": {"wave"},
    "vocoder_23": {
        "wave",
        "vocoder_low",
        "bwe_mel",
        "bwe_residual",
        "bwe_skip",
        "resampler_filter",
    },
}


def load(name):
    checkpoint = GoldenSet(GOLDEN, name).checkpoint()
    config = VocoderConfig.from_metadata(checkpoint.config)
    return load_weights(build_vocoder(config), checkpoint, VOCODER, mx.float32)


@pytest.mark.parametrize("name", TENSORS)
def test_parity(name):
    results = {r.tensor: r.error for r in runner_for(name)(GoldenSet(GOLDEN, name))}
    assert results.keys() == TENSORS[name]
    # The tiny random BigVGAN amplifies a rounding of its input a hundredfold, so 2e-5 rather than 1e-6.
    assert max(results.values()) < 2e-5, results


@pytest.mark.parametrize(("version", "rate"), [("19b", 24_000), ("2.3", 48_000)])
def test_real_config_gives_the_published_keys_and_shapes(version, rate):
    published = {}
    for line in (GOLDEN / "keys" / f"{version}_vocoder.txt").read_text().splitlines():
        if not line.startswith("#"):
            key, shape = line.split("\t")
            published[key] = tuple(json.loads(shape))
    config = VocoderConfig.from_metadata(REAL[version])
    assert config.sample_rate == rate
    selected = VOCODER.select(published)
    assert set(published) - set(selected.values()) <= {"vocoder.mel_stft.stft_fn.inverse_basis"}
    assert published_shapes(build_vocoder(config)) == {path: published[key] for path, key in selected.items()}


@pytest.mark.parametrize(
    ("version", "part", "key", "value"),
    [
        ("19b", None, "resblock", "2"),
        ("19b", None, "stereo", False),
        ("19b", None, "output_sampling_rate", 16_000),
        ("19b", None, "upsample_initial_channel", 1000),
        ("19b", None, "upsample_kernel_sizes", [15, 15, 8, 4, 4]),
        ("2.3", "vocoder", "activation", "snake"),
        ("2.3", "vocoder", "resblock", "1"),
        ("2.3", "bwe", "num_mels", 80),
        ("2.3", "bwe", "hop_length", 96),
        ("2.3", "bwe", "win_size", 400),
        ("2.3", "bwe", "output_sampling_rate", 44_100),
        ("2.3", "bwe", "apply_final_activation", True),
    ],
)
def test_unsupported_config_values_are_named(version, part, key, value):
    config = copy.deepcopy(REAL[version])
    section = config["vocoder"] if part is None else config["vocoder"][part]
    section[key] = value
    with pytest.raises(ValueError, match=key):
        VocoderConfig.from_metadata(config)


def test_a_config_without_a_vocoder_is_refused():
    with pytest.raises(ValueError, match="vocoder"):
        VocoderConfig.from_metadata({"audio_vae": {}})


@pytest.mark.parametrize("name", TENSORS)
def test_chunks_give_what_the_whole_gives(name, monkeypatch):
    model = load(name)
    mel = mx.random.normal((1, 131, 64, 2), key=mx.random.key(1))
    whole = np.array(model(mel))
    monkeypatch.setattr(vocoder_module, "CHUNK_FRAMES", 40)
    chunked = np.array(model(mel))
    assert chunked.shape == whole.shape
    assert np.linalg.norm(chunked - whole) / np.linalg.norm(whole) < 2e-5


def test_the_reach_is_not_smaller_than_what_an_impulse_touches():
    model = load("vocoder_23").vocoder
    T, factor, reach = 150, model._config.factor, model._config.reach
    mel = mx.random.normal((1, T, 64, 2), key=mx.random.key(2))
    changed = mx.concatenate([mel[:, :75], mel[:, 75:76] + 5, mel[:, 76:]], axis=1)
    touched = np.flatnonzero(np.any(np.array(model(mel) != model(changed))[0], axis=1)) / factor
    assert touched.min() >= 75 - reach
    assert touched.max() <= 76 + reach
    assert touched.max() - touched.min() > 20


def test_weights_that_are_not_float32_are_refused():
    checkpoint = GoldenSet(GOLDEN, "vocoder_19b").checkpoint()
    model = build_vocoder(VocoderConfig.from_metadata(checkpoint.config))
    load_weights(model, checkpoint, VOCODER, mx.bfloat16)
    with pytest.raises(ValueError, match="float32"):
        model(mx.zeros((1, 3, 64, 2)))


def test_a_bfloat16_spectrogram_gives_a_float32_waveform():
    wave = load("vocoder_23")(mx.zeros((2, 3, 64, 2), mx.bfloat16))
    assert wave.dtype == mx.float32
    assert wave.shape == (2, 3 * 480, 2)
    assert mx.abs(wave).max().item() <= 1


@pytest.mark.parametrize("samples", [1, 5, BLOCK, BLOCK + 1, 100])
def test_filters_leave_a_constant_constant(samples):
    """Also at the edges: padding after the zeros are inserted, as other ports do, gives 1.79 there."""
    filters = load("vocoder_23").vocoder.act_post
    up, down = filters.upsample.filter.reshape(-1), filters.downsample.lowpass.filter.reshape(-1)
    x = mx.full((1, samples, 3), 2.5)
    upsampled = fir_upsample(x, up, ratio=2, pad=5, crop=15)
    assert upsampled.shape == (1, 2 * samples, 3)
    np.testing.assert_allclose(np.array(upsampled), 2.5, rtol=0.01)
    downsampled = fir_downsample(mx.full((1, 2 * samples, 3), 2.5), down, ratio=2, left=5)
    assert downsampled.shape == x.shape
    np.testing.assert_allclose(np.array(downsampled), 2.5, rtol=1e-5)


@pytest.mark.parametrize("samples", [1, 31, 32, 33, 77])
def test_filters_agree_with_convolutions(samples):
    rng = np.random.default_rng(samples)
    x, taps = rng.standard_normal((2, samples, 3)), rng.standard_normal(12)
    padded = np.pad(x, ((0, 0), (5, 5), (0, 0)), mode="edge")
    zeros = np.zeros((2, 2 * padded.shape[1], 3))
    zeros[:, ::2] = padded
    full = np.apply_along_axis(np.convolve, 1, zeros, taps)
    up = fir_upsample(mx.array(x.astype(np.float32)), mx.array(taps.astype(np.float32)), ratio=2, pad=5, crop=15)
    np.testing.assert_allclose(np.array(up), 2 * full[:, 15 : 15 + 2 * samples], atol=1e-4)

    wide = rng.standard_normal((2, 2 * samples, 3))
    padded = np.pad(wide, ((0, 0), (5, 6), (0, 0)), mode="edge")
    full = np.apply_along_axis(np.convolve, 1, padded, taps[::-1], mode="valid")
    down = fir_downsample(mx.array(wide.astype(np.float32)), mx.array(taps.astype(np.float32)), ratio=2, left=5)
    np.testing.assert_allclose(np.array(down), full[:, ::2], atol=1e-4)


def test_snake_reaches_five_samples():
    activation = load("vocoder_23").vocoder.act_post
    channels = activation.act.alpha.size
    x = np.random.default_rng(0).standard_normal((1, 101, channels)).astype(np.float32)
    changed = x.copy()
    changed[:, 50] += 1
    difference = np.array(activation(mx.array(x)) - activation(mx.array(changed)))
    touched = np.flatnonzero(np.abs(difference).max(axis=(0, 2)) > 0)
    assert (touched.min(), touched.max()) == (50 - AntiAliasedSnake.REACH, 50 + AntiAliasedSnake.REACH)


def test_sinc_resampler_follows_a_sine():
    time = np.arange(400)
    x = np.sin(2 * np.pi * 0.03 * time)[None, :, None].astype(np.float32)
    y = np.array(SincResampler(3)(mx.array(x)))
    assert y.shape == (1, 1200, 1)
    np.testing.assert_allclose(y[0, 60:-60, 0], np.sin(2 * np.pi * 0.01 * np.arange(1200))[60:-60], atol=2e-3)


@pytest.mark.parametrize(("kernel", "dilation", "samples"), [(3, 3, 10), (11, 5, 7), (7, 1, 20), (3, 5, 1)])
def test_dilated_convolution_agrees_with_mlx(kernel, dilation, samples):
    conv = DilatedConv1d(4, kernel, dilation)
    x = mx.random.normal((2, samples, 4), key=mx.random.key(0))
    expected = mx.conv1d(x, conv.weight, padding=dilation * (kernel // 2), dilation=dilation) + conv.bias
    assert mx.allclose(conv(x), expected, atol=1e-5).item()


@pytest.mark.parametrize(("kernel", "rate"), [(16, 6), (15, 5), (8, 2), (4, 2), (11, 5), (12, 6), (2, 2), (3, 1)])
@pytest.mark.parametrize("samples", [1, 9])
def test_upsampling_agrees_with_the_transposed_convolution(kernel, rate, samples):
    conv = Upsample(4, 3, kernel, rate)
    x = mx.random.normal((2, samples, 4), key=mx.random.key(0))
    result = conv(x)
    assert result.shape == (2, samples * rate, 3)
    assert mx.allclose(result, nn.ConvTranspose1d.__call__(conv, x), atol=1e-5).item()


def test_parity_notices_one_wrong_weight():
    golden = GoldenSet(GOLDEN, "vocoder_23")
    model = load("vocoder_23")
    nudge = lambda path, p: p * 1.01 if path == "bwe_generator.resblocks.3.acts1.0.act.beta" else p  # noqa: E731
    model.update(tree_map_with_path(nudge, model.parameters()))
    wave = model(parity.audio.images_last(golden.mx("mel"))).transpose(0, 2, 1)
    assert golden.compare("", "wave", wave).error > 2e-5
