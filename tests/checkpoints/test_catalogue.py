"""The catalogue: names that do not clash, sizes that agree with the checkpoints, and recognising files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mlx_ltx.checkpoints import catalogue
from mlx_ltx.checkpoints.catalogue import (
    DEFAULT_TEXT_ENCODER,
    MODELS,
    TEXT_ENCODERS,
    RemoteFile,
    demo_folder,
    find_checkpoint,
    find_model,
    is_distilled,
    model_names,
    similar_names,
)
from mlx_ltx.errors import UserError
from mlx_ltx.memory.machine import total_memory

KEYS = Path(__file__).parents[1] / "golden" / "keys"
PUBLISHED = [entry for entry in MODELS.values() if not entry.embedded]


def test_names_and_aliases_are_unique_and_found_whatever_the_case():
    names = model_names()
    assert len(names) == len(set(names))
    for name in names:
        assert name == name.lower()
        assert find_model(name.upper()) is find_model(name) is not None
    assert find_model(" ltx-2.3-distilled ") is MODELS["ltx-2.3-distilled"]
    assert find_model("ltx-2.4") is None


def test_the_expected_models_are_there():
    assert {"ltx-2.3-distilled", "ltx-2.3-dev", "ltx-2-distilled", "ltx-2-dev", "demo"} == MODELS.keys()
    assert {key: entry.name for key, entry in MODELS.items()} == {key: key for key in MODELS}
    assert {key: entry.name for key, entry in TEXT_ENCODERS.items()} == {key: key for key in TEXT_ENCODERS}


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda e: e.name)
def test_an_entry_is_consistent(entry):
    assert entry.distilled == ("distilled" in entry.name) == ("distilled" in entry.checkpoint.name)
    assert entry.pipelines == (("distilled",) if entry.distilled else ("one-stage",))
    # The distilled pipeline has two stages with the upsampler between them; the one-stage pipeline needs none.
    assert (entry.spatial_upsampler is not None) == entry.distilled
    assert entry.text_encoder is DEFAULT_TEXT_ENCODER
    assert not entry.gated
    assert entry.generation in entry.name.split("-")
    assert entry.licence.url.startswith("https://")
    assert find_checkpoint(entry.checkpoint.repo, entry.checkpoint.name) is entry


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda e: e.name)
def test_sizes_agree_with_the_published_keys(entry):
    name = {"2": "19b", "2.3": "2.3"}[entry.generation]
    lines = (KEYS / f"{name}_transformer.txt").read_text().splitlines()
    shapes = [line.split("\t")[1] for line in lines if line and not line.startswith("#")]
    parameters = sum(math.prod(int(n) for n in shape.strip("[]").split(",") if n.strip()) for shape in shapes)
    assert entry.transformer_nbytes == 2 * parameters
    assert entry.checkpoint.nbytes > entry.transformer_nbytes


def test_only_what_could_be_confirmed_is_called_exact():
    exact = {e.checkpoint.name: e.checkpoint.nbytes for e in PUBLISHED if not e.checkpoint.approximate}
    assert exact == {
        "ltx-2.3-22b-distilled-1.1.safetensors": 46_149_345_334,
        "ltx-2.3-22b-dev.safetensors": 46_149_344_974,
    }


def test_a_text_encoder_selects_weights_and_tokeniser_only():
    entry = DEFAULT_TEXT_ENCODER
    for name in ("model-00001-of-00003.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert entry.selects(name)
    for name in ("README.md", ".gitattributes", "pytorch_model.bin", "model.gguf", "optimizer.pt"):
        assert not entry.selects(name)
    assert RemoteFile("a/b", "x.safetensors", 1).selects("x.safetensors")
    assert not RemoteFile("a/b", "x.safetensors", 1).selects("y/x.safetensors")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (MODELS["ltx-2.3-distilled"], True),
        (MODELS["ltx-2.3-dev"], False),
        ("/models/My-Distilled-v2.safetensors", True),
        (Path("/models/distilled/ltx-2.3-22b-dev.safetensors"), False),
    ],
)
def test_distilled_is_told_by_the_entry_or_the_file_name(model, expected):
    assert is_distilled(model) is expected


@pytest.mark.parametrize(
    ("typed", "first"),
    [("ltx2.3-distilled", "ltx-2.3-distilled"), ("LTX-2.3-dsitilled", "ltx-2.3-distilled"), ("dmeo", "demo")],
)
def test_misspelt_names_find_their_neighbours(typed, first):
    assert similar_names(typed, model_names())[0] == first


def test_nothing_is_suggested_for_something_else():
    assert similar_names("stable-diffusion", model_names()) == []


def test_the_demo_is_found_in_a_checkout_and_in_a_wheel(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "PACKAGE", tmp_path / "mlx_ltx")
    with pytest.raises(UserError, match="no demo weights"):
        demo_folder()
    (tmp_path / "mlx_ltx" / "_demo").mkdir(parents=True)
    assert demo_folder() == tmp_path / "mlx_ltx" / "_demo"
    (tmp_path / "weights" / "demo").mkdir(parents=True)
    assert demo_folder() == tmp_path / "weights" / "demo"


def test_memory_is_counted_in_bytes(monkeypatch):
    assert total_memory() > 100_000_000
    monkeypatch.setattr("mlx.core.device_info", lambda: {"memory_size": 64 << 30})
    assert total_memory() == 64 << 30
