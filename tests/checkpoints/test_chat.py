"""Gemma 3's turns, and telling an instruction-tuned folder from others."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_ltx.checkpoints.chat import Chat, check_chat, load_chat
from mlx_ltx.checkpoints.gemma import load_gemma
from mlx_ltx.checkpoints.tokenizer import LENGTH
from mlx_ltx.errors import UserError

TEMPLATE = "{{ bos_token }}{% for m in messages %}<start_of_turn>...<end_of_turn>{% endfor %}"


@pytest.fixture(scope="module")
def chat(instruct_gemma) -> Chat:
    return load_chat(instruct_gemma, load_gemma(instruct_gemma, mx.float32).tokenizer)


@pytest.fixture
def folder(instruct_gemma, tmp_path) -> Path:
    """A folder to damage."""
    return Path(shutil.copytree(instruct_gemma, tmp_path / "tiny-it"))


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def text_of(chat: Chat, ids: list[int]) -> str:
    return chat.tokenizer.tokenizer.decode(ids, skip_special_tokens=False)


def test_a_question_is_rendered_as_gemma_3_was_trained(chat: Chat) -> None:
    tokens = chat.tokens("Be brief.\n", "  user prompt: a cat ")
    expected = "<bos><start_of_turn>user\nBe brief.\n\nuser prompt: a cat<end_of_turn>\n<start_of_turn>model\n"
    assert text_of(chat, tokens.ids) == expected
    assert tokens.image is None
    assert tokens.ids.count(chat.tokenizer.bos) == 1
    turns = [chat.tokenizer.tokenizer.token_to_id(name) for name in ("<start_of_turn>", "<end_of_turn>")]
    assert [identity for identity in tokens.ids if identity in turns] == [turns[0], turns[1], turns[0]]


def test_the_image_stands_before_the_question(chat: Chat) -> None:
    tokens = chat.tokens("Be brief.", "a cat", image_tokens=3, image_id=7)
    assert tokens.image is not None
    assert tokens.ids[tokens.image : tokens.image + 3] == [7, 7, 7]
    before, after = tokens.ids[: tokens.image], tokens.ids[tokens.image + 3 :]
    assert text_of(chat, before) == "<bos><start_of_turn>user\nBe brief.\n\n\n\n<start_of_image>"
    assert text_of(chat, after) == "<end_of_image>\n\na cat<end_of_turn>\n<start_of_turn>model\n"
    with pytest.raises(ValueError, match="id"):
        chat.tokens("Be brief.", "a cat", image_tokens=3)


def test_long_questions_are_whole_and_prompts_still_cut(chat: Chat) -> None:
    prompt = "a red kite over dunes " * 400
    assert len(chat.tokens("Be brief.", prompt).ids) > 2 * LENGTH
    encoded = chat.tokenizer(prompt)
    assert encoded.input_ids.shape == (1, LENGTH)
    assert encoded.dropped > 0


def test_the_tokens_that_end_an_answer(chat: Chat, folder: Path) -> None:
    end = chat.tokenizer.tokenizer.token_to_id("<end_of_turn>")
    assert chat.stop == {end, 1}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 106]}))
    change(folder / "config.json", eos_token_id=None)
    assert load_chat(folder, chat.tokenizer).stop == {end, 1, 106}


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json", "named"])
def test_the_template_may_stand_in_any_of_its_places(folder: Path, place: str) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        check_chat(folder)
    if place == "chat_template.jinja":
        (folder / place).write_text(TEMPLATE)
    elif place == "chat_template.json":
        (folder / place).write_text(json.dumps({"chat_template": TEMPLATE}))
    else:
        named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
        change(folder / "tokenizer_config.json", chat_template=named if place == "named" else TEMPLATE)
    check_chat(folder)


def test_models_that_cannot_be_talked_to_are_refused_in_one_line(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("<|im_start|>{{ messages }}<|im_end|>")
    with pytest.raises(UserError, match=r"without Gemma's turns.*not an instruction-tuned"):
        check_chat(folder)
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        check_chat(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    change(folder / "config.json", final_logit_softcapping=30.0)
    with pytest.raises(UserError, match="final_logit_softcapping"):
        check_chat(folder)
    change(folder / "config.json", final_logit_softcapping=None, tie_word_embeddings=False)
    with pytest.raises(UserError, match="tie_word_embeddings"):
        check_chat(folder)


def test_a_tokeniser_without_turns_is_refused(folder: Path, chat: Chat) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<end_of_turn>", "<other>"))
    with pytest.raises(UserError, match="lacks <start_of_turn> or <end_of_turn>"):
        load_chat(folder, load_gemma(folder, mx.float32).tokenizer)
