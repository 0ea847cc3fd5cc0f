"""Whole jobs with ``--quantize`` and ``--quantize-text``."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_ltx
from mlx_ltx.checkpoints.catalogue import demo_folder
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.checkpoints.packs import write_pack
from mlx_ltx.checkpoints.quantize import Quantization
from mlx_ltx.events import StepDone
from mlx_ltx.generate import main
from mlx_ltx.media.video import read_metadata
from mlx_ltx.models.quantized import QuantizedLinear
from mlx_ltx.pipelines import enhance, stage
from mlx_ltx.pipelines.job import prepare
from mlx_ltx.request import LoraInput

CLIP = {"model": "demo", "prompt": "a red ball", "width": 64, "height": 64, "num_frames": 9, "cache": False}


def request(folder, **changes):
    return mlx_ltx.Request(**{**CLIP, "output": folder / "a.mp4", "force": True, **changes})


def latents(folder, **changes):
    """The video and audio latents of every step."""
    steps = [event for event in prepare(request(folder, **changes)).run() if isinstance(event, StepDone)]
    assert steps
    return [np.array(value) for step in steps for value in (step.video_x0, step.audio_x0)]


def save_pack(folder, kind):
    """The demo with groups of 32."""
    (checkpoint,) = demo_folder().glob("*demo*.safetensors")
    for _ in write_pack(SafetensorsFile(checkpoint), folder, Quantization.parse(kind, 32)):
        pass


def error(found, exact):
    return np.linalg.norm(found[0] - exact[0]) / np.linalg.norm(exact[0])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return latents(tmp_path_factory.mktemp("plain"))


def test_fewer_bits_are_less_exact(tmp_path, plain):
    errors = [error(latents(tmp_path, quantize=kind), plain) for kind in ("q8", "q6", "q5", "q4")]
    assert 0 < errors[0] < 0.05
    assert errors == sorted(errors)


@pytest.mark.parametrize("kind", ["mxfp8", "mxfp4", "nvfp4"])
def test_every_kind_makes_a_clip(tmp_path, plain, kind):
    assert 0 < error(latents(tmp_path, quantize=kind), plain) < 0.2
    settings = read_metadata(tmp_path / "a.mp4")
    assert settings["quantize"] == kind


def test_streamed_and_saved_are_the_same_numbers_as_quantised_on_load(tmp_path):
    save_pack(tmp_path / "demo-q4", "q4")
    guided = {"pipeline": "one-stage", "steps": 2}
    loaded = latents(tmp_path, quantize="q4", group_size=32, **guided)
    streamed = latents(tmp_path, quantize="q4", group_size=32, weights="streamed", **guided)
    gemma = str(demo_folder() / "gemma")
    saved = latents(tmp_path, model=str(tmp_path / "demo-q4"), text_encoder=gemma, **guided)
    for others in (streamed, saved):
        assert all(np.array_equal(a, b) for a, b in zip(loaded, others, strict=True))


def test_loras_work_beside_quantised_layers(tmp_path, lora):
    given = (LoraInput(lora(), 1.0),)
    exact = latents(tmp_path, loras=given)
    found = latents(tmp_path, loras=given, quantize="q8")
    bare = latents(tmp_path, quantize="q8")
    assert error(found, exact) < 0.05
    assert error(bare, exact) > 3 * error(found, exact)


def test_the_layers_are_quantised_in_memory(tmp_path, monkeypatch):
    models = []
    load = stage.load_transformer
    monkeypatch.setattr(stage, "load_transformer", lambda *a, **k: models.append(load(*a, **k)) or models[-1])
    latents(tmp_path, quantize="q4")
    kinds = {type(layer) for _, layer in models[0].blocks[2].named_modules()}
    assert QuantizedLinear in kinds


def test_the_text_model_likewise(tmp_path, plain, monkeypatch):
    models = []
    load = enhance.load_gemma
    monkeypatch.setattr(enhance, "load_gemma", lambda *a: models.append(load(*a)) or models[-1])
    found = latents(tmp_path, quantize_text="q8")
    assert 0 < error(found, plain) < 0.05
    assert models[0].model.layers[0].mlp.up_proj.bits == 8
    assert models[0].model.layers[0].mlp.up_proj.weight.dtype == mx.uint32


def test_kept_embeddings_of_another_text_model_are_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept = [latents(tmp_path, quantize_text=kind, cache=True)[0] for kind in ("none", "q4", "none")]
    assert np.array_equal(kept[0], kept[2])
    assert not np.array_equal(kept[0], kept[1])


def test_refused_before_any_work(tmp_path):
    for changes, message in (
        ({"quantize": "q7"}, "--quantize q7: must be one of auto, none, q8"),
        ({"group_size": 32}, "--group-size 32: is for --quantize q8"),
        ({"quantize": "mxfp4", "group_size": 32}, "--group-size 32: is for --quantize q8"),
        ({"quantize": "q4", "group_size": 48}, "--group-size 48: must be one of 32, 64, 128"),
        ({"pipeline": "upscale", "video_path": "a.mp4", "quantize": "q4"}, "does not use .*--quantize"),
        ({"pipeline": "upscale", "video_path": "a.mp4", "weights": "streamed"}, "does not use .*--weights"),
    ):
        with pytest.raises(mlx_ltx.UserError, match=message):
            prepare(request(tmp_path, **changes))


def test_what_is_quantised_already_is_not_quantised_again(tmp_path):
    folder = demo_folder()
    save_pack(tmp_path / "pack", "q8")
    gemma = str(folder / "gemma")
    with pytest.raises(mlx_ltx.UserError, match="--quantize q4: pack is quantised already"):
        prepare(request(tmp_path, model=str(tmp_path / "pack"), text_encoder=gemma, quantize="q4"))
    shutil.copytree(folder / "gemma", tmp_path / "gemma")
    config = Path(tmp_path / "gemma" / "config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization": {"bits": 4, "group_size": 64}}))
    with pytest.raises(mlx_ltx.UserError, match="--quantize-text q4: gemma is quantised already"):
        prepare(request(tmp_path, text_encoder=str(tmp_path / "gemma"), quantize_text="q4"))


def test_the_command(tmp_path, capsys):
    common = ["--model", "demo", "-p", "a red ball", "--num-frames", "9", "--width", "64", "--height", "64", "--quiet"]
    main([*common, "-o", str(tmp_path / "a.mp4"), "--quantize", "q4", "--quantize-text", "q8", "--group-size", "32"])
    settings = read_metadata(tmp_path / "a.mp4")
    assert (settings["quantize"], settings["quantize_text"], settings["group_size"]) == ("q4", "q8", 32)
    with pytest.raises(SystemExit):
        main([*common, "-o", str(tmp_path / "b.mp4"), "--quantize", "int4"])
    assert "--quantize: invalid choice" in capsys.readouterr().err
