"""Training passes of the autoencoders are those of the networks, and their losses say what they should."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_ltx.models.audio_vae import AudioEncoder, AudioVaeConfig
from mlx_ltx.models.video_vae import VideoDecoder, VideoEncoder, VideoVaeConfig
from mlx_ltx.training.autoencoders import Moments, decode_video, encode_sound, encode_video, picture_loss
from mlx_ltx.training.sound_losses import magnitudes, spectral_loss

KINDS = [("res_x", 1), ("compress_all_res", 2), ("compress_time_res", 2), ("res_x", 2), ("compress_space_res", 1)]
RATE = 16_000


def config(**changes):
    vae = {
        "latent_channels": 8,
        "encoder_blocks": [[kind, {"num_layers" if kind == "res_x" else "multiplier": n}] for kind, n in KINDS],
        "decoder_blocks": [
            ["res_x", {"num_layers": 1}],
            ["compress_all", {"multiplier": 2}],
            ["compress_time", {"multiplier": 2}],
            ["res_x", {"num_layers": 2}],
            ["compress_space", {"multiplier": 1}],
        ],
        "timestep_conditioning": False,
        "decoder_base_channels": 4,
        "spatial_padding_mode": "zeros",
    }
    return VideoVaeConfig.from_metadata({"vae": vae | changes})


def clip(frames=9, height=32, width=48):
    return mx.random.uniform(-1, 1, (2, frames, height, width, 3), key=mx.random.key(1))


def test_video_goes_through_as_in_the_streamed_networks():
    encoder, decoder = VideoEncoder(config()), VideoDecoder(config())
    encoded = encode_video(encoder, clip())
    assert encoded.log_variance.shape == (*encoded.mean.shape[:-1], 1)
    np.testing.assert_allclose(encoded.mean, encoder(clip()), atol=1e-5)
    np.testing.assert_allclose(decode_video(decoder, encoded.mean), decoder(encoded.mean), atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"spatial_padding_mode": "reflect"},
        {"encoder_blocks": [["compress_space", {}], *[["compress_time", {}]] * 2, ["compress_space", {}]]},
        {"encoder_blocks": [["res_x_y", {"multiplier": 2}], *([k, {}] for k, _ in KINDS if k != "res_x")]},
    ],
)  # fmt: skip
def test_encoders_that_cannot_be_trained_are_refused(changes):
    with pytest.raises(ValueError, match=r"can.* be trained"):
        encode_video(VideoEncoder(config(**changes)), clip())


@pytest.mark.parametrize("changes", [{"causal_decoder": True}, {"timestep_conditioning": True}])
def test_decoders_that_cannot_be_trained_are_refused(changes):
    with pytest.raises(ValueError, match="cannot be trained"):
        decode_video(VideoDecoder(config(**changes)), mx.zeros((1, 2, 2, 2, 8)))


def test_sound_goes_through_as_in_the_network():
    encoder = AudioEncoder(AudioVaeConfig(channels=4, blocks=1, z_channels=2))
    mel = mx.random.normal((2, 13, 64, 2), key=mx.random.key(2))
    moments = encode_sound(encoder, mel)
    assert moments.log_variance.shape == moments.mean.shape
    np.testing.assert_allclose(moments.mean, encoder(mel), atol=1e-5)


def test_gradients_reach_every_layer():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = VideoEncoder(config()), VideoDecoder(config())

    both = Both()
    both.encoder.statistics.freeze()
    both.decoder.statistics.freeze()

    def loss(video):
        moments = encode_video(both.encoder, video)
        return picture_loss(decode_video(both.decoder, moments.sample(mx.random.key(3))), video) + moments.divergence()

    _, gradients = nn.value_and_grad(both, loss)(clip(9, 16, 16))
    for name, gradient in nn.utils.tree_flatten(gradients):
        assert mx.abs(gradient).max() > 0, name


def test_divergence_is_that_of_two_normal_distributions():
    zero = mx.zeros((3, 4))
    assert Moments(zero, zero).divergence().item() == 0
    # KL(N(1, e) || N(0, 1)) = (1 + e - 1 - 1) / 2
    assert Moments(zero + 1, zero + 1).divergence().item() == pytest.approx((np.e - 1) / 2)
    wide = Moments(mx.zeros(200_000) + 2, mx.full((200_000,), 2 * np.log(3.0))).sample(mx.random.key(1))
    assert wide.mean().item() == pytest.approx(2, abs=0.05)
    assert mx.std(wide).item() == pytest.approx(3, abs=0.05)


def test_picture_loss_grows_with_the_error_and_minds_edges():
    video = clip()
    assert picture_loss(video, video).item() == 0
    assert picture_loss(video + 0.1, video).item() == pytest.approx(0.1 + 2 * 0.01, rel=1e-2)
    stripes = mx.where(mx.arange(48)[:, None] % 2 == 0, 0.1, -0.1)
    assert picture_loss(video + stripes, video).item() > picture_loss(video + 0.1, video).item() + 0.15
    half = mx.array([1.0, 0.0])[:, None, None, None, None]
    assert picture_loss(video + 0.1, video, 2 * half).item() == pytest.approx(0.12, rel=1e-2)
    assert picture_loss(video + 0.1 * (1 - half), video, half).item() < 1e-5


def sine(frequency, seconds=0.5, amplitude=1.0):
    time = np.arange(round(seconds * RATE)) / RATE
    return mx.array(np.repeat(amplitude * np.sin(2 * np.pi * frequency * time)[None, :, None], 2, axis=2), mx.float32)


@pytest.mark.parametrize("window", [128, 512, 2048])
def test_a_sine_has_its_amplitude_where_its_frequency_is(window):
    bin_ = window // 8
    spectrum = np.array(magnitudes(sine(RATE * bin_ / window, amplitude=0.5), window))
    assert spectrum.shape == (1, 2, (8000 - window) * 4 // window + 1, window // 2 + 1)
    assert spectrum.argmax(axis=-1).min() == spectrum.argmax(axis=-1).max() == bin_
    np.testing.assert_allclose(spectrum.max(axis=-1), 0.5, rtol=0.01)
    with pytest.raises(ValueError, match="fewer"):
        magnitudes(mx.zeros((1, window - 1, 2)), window)


def test_spectral_loss_hears_pitch_time_and_loudness_but_not_phase():
    wanted = sine(400)
    assert spectral_loss(wanted, wanted).item() < 1e-5
    assert spectral_loss(-wanted, wanted).item() < 1e-5
    assert spectral_loss(0.9 * wanted, wanted).item() < spectral_loss(0.5 * wanted, wanted).item()
    assert spectral_loss(sine(500), wanted).item() > 1
    click, later = np.zeros((1, 8000, 2), np.float32), np.zeros((1, 8000, 2), np.float32)
    click[:, 3000:3010], later[:, 4000:4010] = 1, 1
    assert spectral_loss(mx.array(click), mx.array(later)).item() > 1


def test_the_gradient_of_silence_is_finite():
    gradient = mx.grad(lambda made: spectral_loss(made, sine(400)))(mx.zeros((1, 8000, 2)))
    assert mx.isfinite(gradient).all()
