"""Talking to an instruction-tuned Gemma 3: its turns, and the tokens that end its answer.

Gemma 3 knows two roles. What a system message says stands at the head of the user's first turn, as the chat template of
Google's folders writes it. That template is not run (it would need Jinja); it is what tells a tuned model from a base
one, whose tokeniser knows the same turn tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mlx_ltx.checkpoints.files import read_json
from mlx_ltx.checkpoints.gemma import read_gemma_config
from mlx_ltx.checkpoints.tokenizer import PromptTokenizer
from mlx_ltx.errors import UserError

TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"
IMAGE, END_OF_IMAGE = "<start_of_image>", "<end_of_image>"


class ChatTokens(NamedTuple):
    """The tokens of a conversation up to where the model answers.

    Attributes:
        ids: all of them, the start token once.
        image: place of the first token that stands for the image; None without an image.
    """

    ids: list[int]
    image: int | None


@dataclass(frozen=True)
class Chat:
    """How one text model is talked to.

    Attributes:
        tokenizer: the text model's.
        stop: the tokens that end an answer.
    """

    tokenizer: PromptTokenizer
    stop: frozenset[int]

    def tokens(self, system: str, user: str, image_tokens: int = 0, image_id: int | None = None) -> ChatTokens:
        """One question with instructions.

        Args:
            system: the instructions.
            user: the question; white space around it goes, as in the template.
            image_tokens: how many tokens stand for an image that is shown before the question; 0 for no image.
            image_id: the id of such a token.

        Raises:
            ValueError: an image without ``image_id``.
        """
        head, tail = f"{TURN}user\n{system.strip()}\n\n", f"{user.strip()}{END_OF_TURN}\n{TURN}model\n"
        bos = [self.tokenizer.bos]
        if not image_tokens:
            return ChatTokens(bos + self.tokenizer.verbatim(head + tail), None)
        if image_id is None:
            raise ValueError("an image needs the id of its tokens")
        # Gemma's processor puts the image between blank lines.
        before = bos + self.tokenizer.verbatim(f"{head}\n\n{IMAGE}")
        after = self.tokenizer.verbatim(f"{END_OF_IMAGE}\n\n{tail}")
        return ChatTokens(before + [image_id] * image_tokens + after, len(before))


def check_chat(folder: Path) -> None:
    """Refuse a Gemma folder that cannot be talked to, without reading weights or tokeniser.

    Raises:
        UserError: it has no chat template with Gemma's turns, so is no instruction-tuned model; or the model has a head
            that is not built.
    """
    template = _chat_template(folder)
    if template is None or TURN not in template or END_OF_TURN not in template:
        missing = "no chat template" if template is None else "a chat template without Gemma's turns"
        raise UserError(
            f"{folder}: has {missing}, so it is not an instruction-tuned Gemma 3 and cannot enhance prompts; "
            'use one (its name says "-it"), or do without'
        )
    _, config = read_gemma_config(folder)
    text = config.get("text_config", config)
    if text.get("final_logit_softcapping") is not None:
        raise UserError(f"{folder / 'config.json'}: final_logit_softcapping is not supported for enhancing prompts")
    if not text.get("tie_word_embeddings", config.get("tie_word_embeddings", True)):
        raise UserError(f"{folder / 'config.json'}: a head of its own (tie_word_embeddings is false) is not supported")


def load_chat(folder: Path, tokenizer: PromptTokenizer) -> Chat:
    """How the text model in ``folder`` is talked to.

    An answer ends with the end of the turn, or with an end token that ``generation_config.json`` or ``config.json``
    names.

    Raises:
        UserError: as :func:`check_chat`, or the tokeniser lacks the turn tokens.
    """
    check_chat(folder)
    _, config = read_gemma_config(folder)
    end = tokenizer.tokenizer.token_to_id(END_OF_TURN)
    if end is None or tokenizer.tokenizer.token_to_id(TURN) is None:
        raise UserError(f"{folder}: its tokenizer.json lacks {TURN} or {END_OF_TURN}, so it cannot enhance prompts")
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    stop = {end}
    for source in (generation, config, config.get("text_config", {})):
        stop |= _identities(source.get("eos_token_id"))
    return Chat(tokenizer, frozenset(stop))


def _identities(value: Any) -> set[int]:
    values = value if isinstance(value, list) else [value]
    return {identity for identity in values if isinstance(identity, int)}


def _chat_template(folder: Path) -> str | None:
    """The template, from any of the three places where Hugging Face has kept it."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise UserError(f"{path}: cannot be read; download it again") from None
    for name in ("chat_template.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        template = read_json(folder / name).get("chat_template")
        if isinstance(template, list):  # several by name
            template = next((t.get("template") for t in template if t.get("name") == "default"), None)
        if isinstance(template, str):
            return template
    return None
