"""Prompts to tokens: one start token, padding on the left, truncation that is told."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from mlx_ltx.checkpoints.tokenizer import PromptTokenizer, load_tokenizer
from mlx_ltx.errors import UserError

TINY = Path(__file__).parents[1] / "golden" / "gemma3_tiny"
BOS, PAD = 2, 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "model"


def without_start_token(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def padded(folder: Path, prompt: str, config: dict[str, Any] | None = None, length: int = 8) -> list[int]:
    tokens = load_tokenizer(folder, config or {}, length)(prompt)
    ids: list[int] = tokens.input_ids[0].tolist()
    mask: list[int] = tokens.mask[0].tolist()
    assert len(ids) == len(mask) == length
    assert mask == sorted(mask)
    return ids


def test_padding_on_the_left_and_white_space() -> None:
    expected = [PAD, PAD, PAD, PAD, BOS, 5, 6, 8]
    assert padded(TINY, "the cat walks") == padded(TINY, " \n the cat walks\t") == expected


def test_empty_prompt_is_the_start_token() -> None:
    assert padded(TINY, "") == [PAD] * 7 + [BOS]


def test_start_token_exactly_once(folder: Path) -> None:
    with_it = padded(folder, "the cat walks")
    without_start_token(folder)
    assert padded(folder, "the cat walks") == with_it
    assert padded(folder, "") == [PAD] * 7 + [BOS]


@pytest.mark.parametrize("adds_start", [True, False])
def test_truncation(folder: Path, adds_start: bool) -> None:
    if not adds_start:
        without_start_token(folder)
    tokenizer = load_tokenizer(folder, {}, 8)
    for words, dropped in ((7, 0), (8, 1), (30, 23)):
        tokens = tokenizer(" ".join(["cat"] * words))
        assert tokens.input_ids[0].tolist() == [BOS] + [6] * 7
        assert tokens.mask[0].tolist() == [1] * 8
        assert tokens.dropped == dropped


def test_length_of_the_published_models() -> None:
    assert load_tokenizer(TINY, {})("a").mask.shape == (1, 1024)


def test_padding_and_truncation_of_the_file_do_not_count() -> None:
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    tokenizer.enable_padding(length=20)
    tokenizer.enable_truncation(2)
    assert PromptTokenizer(tokenizer, BOS, PAD, 4)("the cat walks").input_ids[0].tolist() == [BOS, 5, 6, 8]


def test_where_special_tokens_are_named(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({"bos_token": {"content": "<bos>"}, "pad_token": "the"}))
    assert padded(folder, "cat", length=4) == [5, 5, BOS, 6]
    path.write_text(json.dumps({"bos_token": "<bos>", "pad_token": None, "eos_token": "<eos>"}))
    assert padded(folder, "cat", length=4) == [1, 1, BOS, 6]
    path.unlink()
    assert padded(folder, "cat", {"text_config": {"bos_token_id": 2, "pad_token_id": 7}}, 4) == [7, 7, BOS, 6]
    assert padded(folder, "cat", {"bos_token_id": 2, "pad_token_id": 9}, 4) == [9, 9, BOS, 6]
    with pytest.raises(UserError, match="start"):
        load_tokenizer(folder, {"pad_token_id": 0})
    with pytest.raises(UserError, match="padding"):
        load_tokenizer(folder, {"bos_token_id": 2})


def test_damaged_files(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="not a JSON object"):
        load_tokenizer(folder, {})
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(folder, {})
