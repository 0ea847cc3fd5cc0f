"""Loading the text model from the layouts in which it is published, and what is said of folders that are not whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_ltx.checkpoints.files import INDEX, SafetensorsFile
from mlx_ltx.checkpoints.gemma import check_text_width, load_gemma, read_gemma_config
from mlx_ltx.errors import UserError
from mlx_ltx.models.gemma import Gemma, all_hidden_states

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = GOLDEN / "gemma3_tiny"
TEXT = "language_model.model."
Weights = dict[str, mx.array]


def weights() -> Weights:
    loaded = mx.load(str(TINY / "model.safetensors"))
    assert isinstance(loaded, dict)
    return loaded


def write(folder: Path, tensors: Weights, **config: Any) -> Path:
    """A folder like the tiny model's with other tensors and changed config keys."""
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    (folder / "config.json").write_text(json.dumps({**json.loads((TINY / "config.json").read_text()), **config}))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return folder


def last_state(model: Gemma) -> np.ndarray:
    *_, state = all_hidden_states(model, mx.array([[2, 5, 6, 7]]), mx.ones((1, 4)))
    return np.array(state.astype(mx.float32))


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return last_state(load_gemma(TINY, mx.float32).model)


def test_dtype_is_what_was_asked_for() -> None:
    assert {p.dtype for _, p in tree_flatten(load_gemma(TINY).model.parameters())} == {mx.bfloat16}
    assert {p.dtype for _, p in tree_flatten(load_gemma(TINY, mx.float32).model.parameters())} == {mx.float32}
    with pytest.raises(ValueError, match="float16"):
        load_gemma(TINY, mx.float16)


def test_the_result_unpacks() -> None:
    model, tokenizer = load_gemma(TINY)
    assert isinstance(model, Gemma)
    assert tokenizer("a cat").mask.sum().item() == 3


@pytest.mark.parametrize(
    ("rename", "extra"),
    [
        (lambda key: "model.language_model." + key, ["model.vision_tower.x", "model.multi_modal_projector.x"]),
        (lambda key: "model." + key, ["lm_head.weight"]),
        (lambda key: TEXT + key, ["language_model.lm_head.weight"]),
    ],
)
def test_other_layouts(tmp_path: Path, expected: np.ndarray, rename: Callable[[str], str], extra: list[str]) -> None:
    tensors = {rename(key.removeprefix(TEXT)): value for key, value in weights().items() if key.startswith(TEXT)}
    folder = write(tmp_path / "layout", tensors | {key: mx.zeros((2,)) for key in extra})
    np.testing.assert_array_equal(last_state(load_gemma(folder, mx.float32).model), expected)


def test_text_only_config(tmp_path: Path, expected: np.ndarray) -> None:
    folder = write(tmp_path / "text", weights())
    text = json.loads((TINY / "config.json").read_text())["text_config"]
    (folder / "config.json").write_text(json.dumps(text))
    np.testing.assert_array_equal(last_state(load_gemma(folder, mx.float32).model), expected)


def shards(folder: Path) -> Path:
    tensors = weights()
    half = len(tensors) // 2
    write(folder, {})
    (folder / "model.safetensors").unlink()
    names, place = list(tensors), {}
    for index, part in enumerate((names[:half], names[half:])):
        name = f"model-{index + 1:05}-of-00002.safetensors"
        mx.save_safetensors(str(folder / name), {key: tensors[key] for key in part})
        place |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return folder


def test_shards(tmp_path: Path, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(last_state(load_gemma(shards(tmp_path / "shards"), mx.float32).model), expected)


def test_missing_and_truncated_shards(tmp_path: Path) -> None:
    folder = shards(tmp_path / "shards")
    second = folder / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"00002-of-00002.*truncated, 100 bytes"):
        load_gemma(folder)
    second.unlink()
    with pytest.raises(UserError, match="1 of 2 shards are missing, first model-00002"):
        load_gemma(folder)
    (folder / INDEX).write_text("{}")
    with pytest.raises(UserError, match="weight_map"):
        load_gemma(folder)
    (folder / INDEX).unlink()
    (folder / "model-00003.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="2 weight files but no"):
        load_gemma(folder)


def packed(tensors: Weights, keep: str, **own: Any) -> tuple[Weights, dict[str, Any]]:
    """As mlx-lm and mlx-vlm quantise: 4 bits in general, 8 for one layer, and one that stays plain."""
    settings: dict[str, Any] = {"group_size": 32, "bits": 4, **own}
    result: Weights = {}
    for key, value in tensors.items():
        path = key.removesuffix(".weight")
        if not key.startswith(TEXT) or value.ndim < 2 or path.endswith(keep):
            result[key] = value
            continue
        bits = 8 if "layers.1." in path else 4
        if bits == 8:
            settings[path] = {"group_size": 32, "bits": 8}
        result[key], result[f"{path}.scales"], result[f"{path}.biases"] = mx.quantize(value, 32, bits)
    return result, settings


def test_quantised_pack(tmp_path: Path, expected: np.ndarray) -> None:
    tensors, settings = packed(weights(), keep="layers.0.mlp.up_proj")
    model = load_gemma(write(tmp_path / "pack", tensors, quantization=settings), mx.float32).model
    assert isinstance(model.embed_tokens, nn.QuantizedEmbedding)
    assert model.layers[0].mlp.gate_proj.bits == 4
    assert model.layers[1].mlp.gate_proj.bits == 8
    assert type(model.layers[0].mlp.up_proj) is nn.Linear
    # the same numbers as with the weights dequantised beforehand
    plain = dict(tensors)
    for path in [key.removesuffix(".scales") for key in tensors if key.endswith(".scales")]:
        bits = settings.get(path, settings)["bits"]
        scales, biases = plain.pop(f"{path}.scales"), plain.pop(f"{path}.biases")
        plain[f"{path}.weight"] = mx.dequantize(plain[f"{path}.weight"], scales, biases, 32, bits)
    reference = last_state(load_gemma(write(tmp_path / "plain", plain), mx.float32).model)
    np.testing.assert_allclose(last_state(model), reference, rtol=1e-3, atol=1e-3)
    assert np.abs(reference - expected).max() > 1e-2
    assert last_state(load_gemma(tmp_path / "pack").model).shape == expected.shape


def test_quantised_pack_whose_config_does_not_fit(tmp_path: Path) -> None:
    tensors, settings = packed(weights(), keep="-")
    with pytest.raises(UserError, match="has no quantization"):
        load_gemma(write(tmp_path / "none", tensors))
    with pytest.raises(UserError, match="of another shape"):
        load_gemma(write(tmp_path / "bits", tensors, quantization={**settings, "bits": 8}))
    with pytest.raises(UserError, match="quantization is not supported"):
        load_gemma(write(tmp_path / "mode", tensors, quantization={**settings, "mode": "dozenal"}))
    del tensors[f"{TEXT}layers.2.mlp.up_proj.biases"]
    with pytest.raises(UserError, match=r"1 missing \(layers.2.mlp.up_proj.biases\)"):
        load_gemma(write(tmp_path / "part", tensors, quantization=settings))


def test_folders_that_are_not_whole(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_gemma(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_gemma(tmp_path)
    folder = write(tmp_path / "model", weights())
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        load_gemma(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        load_gemma(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        load_gemma(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(f"{TEXT}layers.3.mlp.up_proj.weight"), r"1 missing \(layers.3.mlp.up_proj.weight\)"),
        (lambda w: w.update({f"{TEXT}layers.7.mlp.up_proj.weight": mx.zeros((64, 32))}), "1 unexpected"),
        (lambda w: w.update({f"{TEXT}norm.weight": mx.zeros((33,))}), r"norm.weight is \[33\], not \[32\]"),
        (lambda w: w.update({f"{TEXT}norm.weight": mx.zeros((32,), dtype=mx.int32)}), "norm.weight is I32"),
        (lambda w: w.update({f"{TEXT}norm.weight": mx.zeros((32,), dtype=mx.uint8)}), "norm.weight is U8"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, change: Callable[[Weights], object], message: str) -> None:
    tensors = weights()
    change(tensors)
    with pytest.raises(UserError, match=message) as error:
        load_gemma(write(tmp_path / "model", tensors))
    assert "\n" not in str(error.value)


def test_other_models_are_refused(tmp_path: Path) -> None:
    for model_type in ("gemma4_unified", None):
        with pytest.raises(UserError, match="model_type is"):
            read_gemma_config(write(tmp_path / "other", {}, model_type=model_type))


def test_the_width_of_the_text_model_is_checked() -> None:
    config, _ = read_gemma_config(TINY)
    for name in ("text_19b", "text_23"):
        check_text_width(config, SafetensorsFile(GOLDEN / f"{name}.ckpt.safetensors"))
    narrow = type(config)(**{**config.__dict__, "hidden_size": 24})
    with pytest.raises(UserError, match=r"reads 256 values.*gives 192 \(8 hidden states of 24\)"):
        check_text_width(narrow, SafetensorsFile(GOLDEN / "text_19b.ckpt.safetensors"))
    with pytest.raises(UserError, match="holds no text projection"):
        check_text_width(config, SafetensorsFile(TINY / "model.safetensors"))
