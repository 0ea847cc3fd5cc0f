"""Showing images to the text model: the real mlx-vlm where it is installed, a stand-in for it everywhere."""

import builtins
import json
import shutil
import sys
import types
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_ltx.checkpoints.gemma_vision import NoVision, Vision, load_vision
from mlx_ltx.errors import UserError
from parity import GoldenSet

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = GOLDEN / "gemma3_tiny"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "tiny"))


class Settings:
    """As mlx-vlm's configs: fields of a dictionary, of which others are ignored."""

    def __init__(self, **values: object):
        self.mm_tokens_per_image = 256
        self.layer_norm_eps = 1e-6
        self.__dict__.update(values)

    @classmethod
    def from_dict(cls, values: dict) -> "Settings":
        return cls(**values)


class StandInTower(nn.Module):
    """The parts of mlx-vlm's tower that the adapter names, without attention."""

    def __init__(self, config: Settings):
        super().__init__()
        dim, patch = config.hidden_size, config.patch_size
        self.vision_model = nn.Module()
        self.vision_model.embeddings = nn.Module()
        self.vision_model.embeddings.patch_embedding = nn.Conv2d(3, dim, patch, patch)
        self.vision_model.post_layernorm = nn.LayerNorm(dim)

    def __call__(self, pixels: mx.array) -> tuple[mx.array, None, None]:
        seen = self.vision_model.embeddings.patch_embedding(pixels).flatten(1, 2)
        return self.vision_model.post_layernorm(seen), None, None


class StandInProjector(nn.Module):
    def __init__(self, config: Settings):
        super().__init__()
        self.mm_input_projection_weight = mx.zeros((config.vision_config.hidden_size, config.text_config.hidden_size))
        self.tokens = config.text_config.mm_tokens_per_image

    def __call__(self, seen: mx.array) -> mx.array:
        assert seen.shape[1] == self.tokens
        return seen @ self.mm_input_projection_weight


@pytest.fixture
def stand_in(monkeypatch, folder: Path) -> Path:
    """The tiny folder with the stand-in's weights alone, and the stand-in in the place of mlx-vlm."""
    modules = {
        "config": {"ModelConfig": Settings, "TextConfig": Settings, "VisionConfig": Settings},
        "gemma3": {"Gemma3MultiModalProjector": StandInProjector},
        "vision": {"VisionModel": StandInTower},
    }
    for name in ("mlx_vlm", "mlx_vlm.models", "mlx_vlm.models.gemma3"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, contents in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, f"mlx_vlm.models.gemma3.{name}", module)
    kept = ("patch_embedding", "post_layernorm", "mm_input_projection_weight", "head.probe")
    weights = mx.load(str(folder / "model.safetensors"))
    weights = {key: value for key, value in weights.items() if any(part in key for part in kept)}
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


@pytest.fixture
def without_mlx_vlm(monkeypatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: object) -> object:
        if name.split(".")[0] == "mlx_vlm":
            raise ModuleNotFoundError("No module named 'mlx_vlm'", name="mlx_vlm")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_the_real_mlx_vlm_sees_what_the_reference_sees() -> None:
    pytest.importorskip("mlx_vlm", reason="the vision extra is not installed")
    golden = GoldenSet(GOLDEN, "gemma3_generate")
    vision, token = load_vision(TINY, mx.float32)
    assert token == json.loads((TINY / "config.json").read_text())["image_token_index"]
    compared = golden.compare("image", "features", vision(golden.tensors["image.pixels"]))
    assert compared.error <= 1e-5


def test_the_image_is_squeezed_and_scaled(stand_in: Path) -> None:
    vision, token = load_vision(stand_in, mx.float32)
    assert token == 95
    grey = np.full((50, 21, 3), 255, np.uint8)
    features = np.array(vision(grey))
    assert features.shape == (1, 4, 32)
    weights = mx.load(str(stand_in / "model.safetensors"))
    name = "vision_tower.vision_model.embeddings.patch_embedding"
    white = mx.sum(weights[f"{name}.weight"], axis=(1, 2, 3)) + weights[f"{name}.bias"]  # all pixels are 1
    norm = "vision_tower.vision_model.post_layernorm"
    white = mx.fast.layer_norm(white, weights[f"{norm}.weight"], weights[f"{norm}.bias"], 1e-6)
    expected = np.array(white @ weights["multi_modal_projector.mm_input_projection_weight"])
    np.testing.assert_allclose(features[0], np.broadcast_to(expected, (4, 32)), rtol=1e-4, atol=1e-5)


def test_an_mlx_pack_holds_its_convolution_the_other_way_round(stand_in: Path) -> None:
    published, _ = load_vision(stand_in, mx.float32)
    mx.eval(published.parameters())
    path = stand_in / "model.safetensors"
    weights = mx.load(str(path))
    name = "vision_tower.vision_model.embeddings.patch_embedding.weight"
    weights[name] = mx.contiguous(weights[name].transpose(0, 2, 3, 1))
    mx.eval(weights)
    mx.save_safetensors(str(path), weights)
    pack, _ = load_vision(stand_in, mx.float32)
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    assert np.array_equal(np.array(pack(image)), np.array(published(image)))


def test_bfloat16_stays(stand_in: Path) -> None:
    vision, _ = load_vision(stand_in, mx.bfloat16)
    assert vision(np.zeros((28, 28, 3), np.uint8)).dtype == mx.bfloat16


def test_damaged_vision_weights_are_refused(stand_in: Path) -> None:
    path = stand_in / "model.safetensors"
    weights = mx.load(str(path))
    del weights["multi_modal_projector.mm_input_projection_weight"]
    mx.eval(weights)
    mx.save_safetensors(str(path), weights)
    with pytest.raises(UserError, match="vision tower does not match its config"):
        load_vision(stand_in, mx.float32)


@pytest.mark.usefixtures("without_mlx_vlm")
def test_without_the_extra_it_says_how_to_install_it() -> None:
    with pytest.raises(NoVision, match=r'pip install "mlx-ltx\[vision\]"'):
        load_vision(TINY, mx.float32)


def test_a_text_model_alone_sees_nothing(folder: Path, instruct_gemma: Path) -> None:
    with pytest.raises(NoVision, match="text model alone"):
        load_vision(instruct_gemma, mx.float32)
    path = folder / "model.safetensors"  # its config still describes a vision part
    weights = {key: value for key, value in mx.load(str(path)).items() if key.startswith("language_model")}
    mx.eval(weights)
    mx.save_safetensors(str(path), weights)
    with pytest.raises(NoVision, match="text model alone"):
        load_vision(folder, mx.float32)


def test_a_broken_installation_is_told_apart(monkeypatch) -> None:
    def broken(self: Vision, metadata: dict) -> None:
        raise ModuleNotFoundError("No module named 'cv2'", name="cv2")

    monkeypatch.setattr(Vision, "__init__", broken)
    with pytest.raises(NoVision, match="cv2"):
        load_vision(TINY, mx.float32)
