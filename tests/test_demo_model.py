"""The embedded demo and the small model that most tests use in its place: the published layout, complete, loadable.

What the embedded one makes of prompts is tested in ``tests/demo``.
"""

import json
import re
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

import make_demo
import mlx_ltx
from clips import frames_of
from demo_training import layout
from demo_weights.tensors import bfloat16, interpolation, save
from demo_weights.vocoder import fourier_bases, low_pass
from make_demo import CHECKPOINT, CONFIG, UPSAMPLER, keeps_float32, make
from mlx_ltx.checkpoints import catalogue, components, keymaps
from mlx_ltx.checkpoints.catalogue import MODELS, demo_folder
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.checkpoints.gemma import GEMMA, load_gemma
from mlx_ltx.checkpoints.resolve import resolve_model
from mlx_ltx.checkpoints.tokenizer import load_tokenizer, read_json
from mlx_ltx.pipelines.job import prepare

FOLDER = Path(__file__).parents[1] / "weights" / "demo"
GOLDEN = Path(__file__).parent / "golden"
REAL = json.loads((GOLDEN / "real_configs.json").read_text())
PARTS = ("transformer", "connectors", "text_embedding_projection", "video_vae", "audio_vae", "vocoder")
NETWORKS = (
    keymaps.TRANSFORMER,
    keymaps.CONNECTORS,
    keymaps.TEXT_PROJECTION,
    keymaps.VIDEO_ENCODER,
    keymaps.VIDEO_DECODER,
    keymaps.AUDIO_ENCODER,
    keymaps.AUDIO_DECODER,
    keymaps.VOCODER,
)


def published(name):
    """Key pattern (layer numbers are #) to number of axes, from a list of real keys."""
    lines = (GOLDEN / "keys" / f"{name}.txt").read_text().splitlines()
    pairs = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    return {pattern(key): len(json.loads(shape)) for key, shape in pairs}


def pattern(key):
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", key)


def patterns(file):
    return {pattern(key): len(info.shape) for key, info in file.tensors.items()}


@pytest.fixture(params=["embedded", "small"])
def model(request, small_demo):
    """A model's folder and its config."""
    return (FOLDER, layout) if request.param == "embedded" else (small_demo, make_demo)


def test_all_files_are_there(small_demo):
    made, committed = ({path.relative_to(f) for path in f.rglob("*") if path.is_file()} for f in (small_demo, FOLDER))
    assert made == committed - {Path("README.md")}


def test_the_same_bytes_every_time(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b")
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) == 6
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    make(tmp_path / "c", seed=2)
    assert (tmp_path / "a" / CHECKPOINT).read_bytes() != (tmp_path / "c" / CHECKPOINT).read_bytes()


def test_size_and_label():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 25_000_000
    assert "synthetic scenes" in SafetensorsFile(FOLDER / CHECKPOINT).metadata["license"]


def test_keys_are_the_published_ones(model):
    folder, _ = model
    expected = {key: axes for part in PARTS for key, axes in published(f"2.3_{part}").items()}
    assert patterns(SafetensorsFile(folder / CHECKPOINT)) == expected
    upsampler = SafetensorsFile(folder / UPSAMPLER)
    assert patterns(upsampler) == published("upsampler_23_spatial_x2_1.1")
    text = {
        key.replace("language_model.model.", "model."): axes
        for key, axes in published("gemma3_12b").items()
        if key.startswith("language_model.")
    }
    assert patterns(SafetensorsFile(folder / "gemma" / "model.safetensors")) == text


def test_config_has_the_published_keys(model):
    folder, source = model

    def keys(value, path=""):
        if not isinstance(value, dict):
            return {path}
        return set().union(*(keys(inner, f"{path}/{name}") for name, inner in value.items()))

    extra = keys(source.CONFIG) - keys(REAL["2.3"])
    assert extra == {"/transformer/audio_in_channels"}
    assert not keys(REAL["2.3"]) - keys(source.CONFIG)
    assert keys(source.UPSAMPLER_CONFIG) == keys(REAL["upsamplers"]["23_spatial_x2_1.1"])
    file = SafetensorsFile(folder / CHECKPOINT)
    assert file.config == source.CONFIG
    assert file.version == (2, 3, 0)
    assert SafetensorsFile(folder / UPSAMPLER).config == source.UPSAMPLER_CONFIG


def test_dtypes_are_the_published_ones(model):
    folder, _ = model
    for key, info in SafetensorsFile(folder / CHECKPOINT).tensors.items():
        wide = key.startswith("vocoder.") or "scale_shift_table" in key
        assert info.dtype == ("F32" if wide else "BF16"), key
    assert {info.dtype for info in SafetensorsFile(folder / UPSAMPLER).tensors.values()} == {"BF16"}


@pytest.mark.parametrize("spec", ["demo", str(FOLDER), str(FOLDER / CHECKPOINT)])
def test_it_resolves(spec, monkeypatch):
    monkeypatch.setattr(catalogue, "PACKAGE", FOLDER.parents[1] / "mlx_ltx")
    files = resolve_model(spec)
    assert demo_folder() == FOLDER
    assert files.checkpoint == FOLDER / CHECKPOINT
    assert files.text_encoder == FOLDER / "gemma"
    assert files.spatial_upsampler == FOLDER / UPSAMPLER


def test_every_network_loads_and_every_tensor_has_one(model):
    folder, _ = model
    file = SafetensorsFile(folder / CHECKPOINT)
    gemma = load_gemma(folder / "gemma", mx.float32).model
    modules: list[nn.Module] = [
        gemma,
        components.load_transformer(file),
        components.load_transformer(file, audio=False),
        components.load_text_features(file, gemma.config, mx.float32),
        components.load_connectors(file, mx.float32),
        components.load_video_encoder(file, mx.float32),
        components.load_video_decoder(file, mx.float32),
        components.load_audio_encoder(file, mx.float32),
        components.load_audio_decoder(file, mx.float32),
        components.load_vocoder(file)[0],
        components.load_upsampler(SafetensorsFile(folder / UPSAMPLER), mx.float32),
    ]
    for module in modules:
        mx.eval(module.parameters())
    used = {key for network in NETWORKS for key in network.select(file.tensors).values()}
    assert file.tensors.keys() - used == {"vocoder.mel_stft.stft_fn.inverse_basis"}
    text = SafetensorsFile(folder / "gemma" / "model.safetensors")
    assert set(GEMMA.select(text.tensors).values()) == text.tensors.keys()


def test_a_wrong_config_does_not_load(tmp_path, small_demo):
    """The loaders of the test above are strict: one block fewer in the config, and the file is refused."""
    file = SafetensorsFile(small_demo / CHECKPOINT)
    config = {**CONFIG, "transformer": {**CONFIG["transformer"], "num_layers": 2}}
    arrays = {key: np.zeros(info.shape) for key, info in file.tensors.items() if key.startswith("model.")}
    save(tmp_path / "x.safetensors", arrays, {"config": json.dumps(config)}, keeps_float32)
    with pytest.raises(mlx_ltx.UserError, match="unexpected"):
        components.load_transformer(SafetensorsFile(tmp_path / "x.safetensors"))


def test_default_clip(tmp_path):
    entry = MODELS["demo"]
    for pipeline in entry.pipelines:
        clip = prepare(
            mlx_ltx.Request(prompt="a kite", model="demo", pipeline=pipeline, output=tmp_path / "x.mp4")
        ).clip
        assert ((clip.width, clip.height), clip.frames) == (entry.default_size, entry.default_frames)


def generate(folder, prompt, **changes):
    """A small clip: frames (F, H, W, 3) as float and the waveform (samples, 2)."""
    request = mlx_ltx.Request(
        prompt=prompt,
        model="demo",
        width=128,
        height=128,
        num_frames=9,
        dtype="float32",
        output=folder / "clip.mp4",
        output_audio=folder / "clip.wav",
        force=True,
        **changes,
    )
    mlx_ltx.run(request)
    waveform, rate = soundfile.read(folder / "clip.wav")
    assert rate == 48_000
    return frames_of(folder / "clip.mp4").astype(float), waveform


def test_clips_have_shapes_and_a_quiet_sound_and_follow_the_prompt(tmp_path):
    frames, waveform = generate(tmp_path, "a red kite over dunes, wind")
    assert frames.shape == (9, 128, 128, 3)
    # colours differ across the picture, but hardly from one pixel to the next, and the picture moves
    assert frames.std(axis=(1, 2)).mean() > 20
    assert np.abs(np.diff(frames, axis=2)).mean() < 8
    assert np.abs(frames[0] - frames[-1]).mean() > 3
    assert ((frames > 2) & (frames < 253)).mean() > 0.5
    # audible, not clipped, no constant offset, both channels different
    assert 0.03 < waveform.std() < 0.3
    assert np.abs(waveform).max() < 0.95
    assert np.abs(waveform.mean(axis=0)).max() < 0.02
    assert np.abs(waveform[:, 0] - waveform[:, 1]).max() > 0.01
    other, _ = generate(tmp_path, "a piano in the dark")
    assert np.abs(frames - other).mean() > 3


def test_guidance_changes_the_clip(tmp_path):
    guided, _ = generate(tmp_path, "a red kite", pipeline="one-stage", steps=2)
    without, _ = generate(tmp_path, "a red kite", pipeline="one-stage", steps=2, video_cfg_scale=1.0)
    assert np.abs(guided - without).mean() > 1


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_has_tokens(text):
    tokenizer = tokenizer_json()
    encoding = tokenizer.encode(text, add_special_tokens=False)
    assert 3 not in encoding.ids  # <unk>
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == text


@cache
def tokenizer_json():
    return Tokenizer.from_file(str(FOLDER / "gemma" / "tokenizer.json"))


def test_prompts_start_once_and_are_shorter_than_their_bytes():
    tokenizer = load_tokenizer(FOLDER / "gemma", read_json(FOLDER / "gemma" / "config.json"))
    prompt = "A red kite climbs over the dunes while the wind sings."
    tokens = tokenizer(prompt)
    ids = np.array(tokens.input_ids)[0][np.array(tokens.mask)[0] == 1]
    assert ids[0] == 2
    assert list(ids).count(2) == 1
    assert len(ids) < len(prompt) / 2
    assert (tokenizer.pad, tokenizer.tokenizer.token_to_id("<eos>")) == (0, 1)


def test_filters_are_those_of_the_published_vocoder():
    with safe_open(GOLDEN / "vocoder_23.ckpt.safetensors", "np") as golden:
        taps = golden.get_tensor("vocoder.vocoder.act_post.upsample.filter").reshape(-1)
        basis = golden.get_tensor("vocoder.mel_stft.stft_fn.forward_basis")
    np.testing.assert_allclose(low_pass(), taps, atol=1e-6)
    forward, _ = fourier_bases(basis.shape[-1], 80)
    np.testing.assert_allclose(forward, basis, rtol=2**-8, atol=1e-6)  # the golden file's is rounded to bfloat16


def test_inverse_basis_is_the_pseudo_inverse():
    forward, inverse = fourier_bases(32, 8)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(32) / 32)
    inside = slice(1, None)  # the window is zero at 0
    plain = forward[:, 0, inside] / window[inside]
    full = np.concatenate([np.r_[np.ones(17), np.zeros(17)][:, None], plain], axis=1)
    expected = np.linalg.pinv(full * 4).T * window
    np.testing.assert_allclose(inverse[:, 0], expected, atol=1e-12)


def test_interpolation_is_linear():
    ramp = np.arange(3.0)
    np.testing.assert_allclose(interpolation((2,)) @ ramp, [0.75, 1.25])
    np.testing.assert_allclose(interpolation((4,)) @ ramp, [0.625, 0.875, 1.125, 1.375])
    np.testing.assert_allclose(interpolation((1,)) @ ramp, [1.0])
    both = interpolation((1, 2, 2))
    assert both.shape == (4, 3, 3, 3)
    rows = np.broadcast_to(ramp[None, :, None], (3, 3, 3))
    np.testing.assert_allclose((both * rows).sum(axis=(1, 2, 3)), [0.75, 0.75, 1.25, 1.25])


@given(st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100, allow_subnormal=False))
def test_bfloat16_rounds_as_mlx_does(value):
    given_value = np.array([value], np.float32)
    expected = np.array(mx.array(given_value).astype(mx.bfloat16).view(mx.uint16))
    assert bfloat16(given_value)[0] == expected[0]
