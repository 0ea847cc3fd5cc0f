import copy
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

import parity.audio  # noqa: F401
from mlx_ltx.checkpoints.keymaps import AUDIO_DECODER, AUDIO_ENCODER
from mlx_ltx.checkpoints.loading import load_weights, published_shapes
from mlx_ltx.models.audio_vae import AudioDecoder, AudioEncoder, AudioVaeConfig
from parity import Comparison, GoldenSet, runner_for

GOLDEN = Path(__file__).parents[1] / "golden"
REAL = json.loads((GOLDEN / "real_configs.json").read_text())


@pytest.fixture(scope="module")
def golden():
    return GoldenSet(GOLDEN, "audio_vae")


@pytest.fixture(scope="module")
def config(golden):
    return AudioVaeConfig.from_metadata(golden.checkpoint().config)


@pytest.fixture(scope="module")
def encoder(golden, config):
    return load_weights(AudioEncoder(config), golden.checkpoint(), AUDIO_ENCODER)


@pytest.fixture(scope="module")
def decoder(golden, config):
    return load_weights(AudioDecoder(config), golden.checkpoint(), AUDIO_DECODER)


def test_parity(golden):
    results = list(runner_for("audio_vae")(golden))
    assert {f"{r.case}.{r.tensor}" for r in results} == {"encode33.latent", "encode48.latent", "decode.mel"}
    for result in results:
        assert isinstance(result, Comparison)
        assert result.error < 1e-5, (result.case, result.error)


@pytest.mark.parametrize("version", ["19b", "2.3"])
def test_real_config_gives_the_published_keys_and_shapes(version):
    published = {}
    for line in (GOLDEN / "keys" / f"{version}_audio_vae.txt").read_text().splitlines():
        if not line.startswith("#"):
            key, shape = line.split("\t")
            published[key] = tuple(json.loads(shape))
    config = AudioVaeConfig.from_metadata(REAL[version])
    used = set()
    for module, keymap in ((AudioEncoder(config), AUDIO_ENCODER), (AudioDecoder(config), AUDIO_DECODER)):
        selected = keymap.select(published)
        used |= set(selected.values())
        assert published_shapes(module) == {path: published[key] for path, key in selected.items()}
    assert used == set(published)


def test_config_of_the_published_models():
    config = AudioVaeConfig.from_metadata(REAL["2.3"])
    assert (config.sampling_rate, config.hop_length, config.n_fft, config.mel_bins) == (16_000, 160, 1024, 64)
    assert (config.z_channels, config.latent_bins, config.latents_per_second) == (8, 16, 25.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("norm_type", "group"),
        ("causality_axis", "width"),
        ("attn_resolutions", [16]),
        ("mid_block_add_attention", True),
        ("double_z", False),
        ("ch_mult", [1, 2, 4, 8]),
        ("out_ch", 1),
        ("mel_bins", 62),
    ],
)
def test_unsupported_config_values_are_named(key, value):
    config = copy.deepcopy(REAL["2.3"])
    config["audio_vae"]["model"]["params"]["ddconfig"][key] = value
    with pytest.raises(ValueError, match=key) as caught:
        AudioVaeConfig.from_metadata(config)
    assert str(value) in str(caught.value)


def test_what_the_reference_would_assume_for_an_absent_key_counts():
    config = copy.deepcopy(REAL["2.3"])
    del config["audio_vae"]["model"]["params"]["ddconfig"]["mid_block_add_attention"]
    with pytest.raises(ValueError, match="mid_block_add_attention=True"):
        AudioVaeConfig.from_metadata(config)


def test_another_preprocessing_is_refused():
    config = copy.deepcopy(REAL["2.3"])
    config["audio_vae"]["preprocessing"]["mel"]["mel_fmax"] = 7600
    with pytest.raises(ValueError, match="mel_fmax=7600"):
        AudioVaeConfig.from_metadata(config)
    with pytest.raises(ValueError, match="audio_vae"):
        AudioVaeConfig.from_metadata({"vae": {}})


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (2, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_lengths(encoder, decoder, config, frames, latents):
    latent = encoder(mx.zeros((1, frames, config.mel_bins, 2)))
    assert latent.shape == (1, latents, config.latent_bins, config.z_channels)
    assert decoder(latent).shape == (1, 4 * latents - 3, config.mel_bins, 2)


def test_the_future_changes_nothing_before_it(encoder, decoder, config):
    mel = mx.random.normal((1, 21, config.mel_bins, 2), key=mx.random.key(0))
    whole, head = encoder(mel), encoder(mel[:, :13])
    assert mx.allclose(whole[:, :4], head, atol=1e-5).item()
    assert not mx.allclose(encoder(mel[:, 4:])[:, :2], whole[:, 1:3], atol=1e-3).item()
    mel_whole, mel_head = decoder(whole), decoder(whole[:, :4])
    assert mx.allclose(mel_whole[:, :13], mel_head, atol=1e-4).item()


def test_bfloat16_stays_bfloat16(encoder, decoder, golden):
    expected = golden.mx("encode33.latent").transpose(0, 2, 3, 1)
    for module, x, shape in (
        (encoder, golden.mx("encode33.mel").transpose(0, 2, 3, 1), expected.shape),
        (decoder, expected, (1, 33, 32, 2)),
    ):
        full = module.parameters()
        module.update(tree_map(lambda p: p.astype(mx.bfloat16), full))
        result = module(x.astype(mx.bfloat16))
        module.update(full)
        assert result.dtype == mx.bfloat16
        assert result.shape == shape
        exact = np.array(module(x))
        error = np.linalg.norm(np.array(result.astype(mx.float32)) - exact) / np.linalg.norm(exact)
        assert 1e-4 < error < 0.1
