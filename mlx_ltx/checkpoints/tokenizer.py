"""From a prompt to the tokens that the text model reads, with Hugging Face's ``tokenizers`` alone.

transformers would give the same tokens and takes a second to import.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer

from mlx_ltx.checkpoints.files import read_json
from mlx_ltx.errors import UserError

LENGTH = 1024


class Tokens(NamedTuple):
    """One prompt.

    Attributes:
        input_ids: int32, (1, length), padded on the left.
        mask: int32, (1, length), 1 for tokens and 0 for padding.
        dropped: how many tokens the prompt was too long by.
    """

    input_ids: mx.array
    mask: mx.array
    dropped: int


class PromptTokenizer:
    """Tokenise prompts for one text model.

    Args:
        tokenizer: as read from ``tokenizer.json``; its truncation and padding are set here.
        bos: id of the token that starts every prompt.
        pad: id of the token that fills it up.
        length: tokens and padding together. The models were trained with 1024.
    """

    def __init__(self, tokenizer: Tokenizer, bos: int, pad: int, length: int = LENGTH):
        tokenizer.no_padding()
        tokenizer.enable_truncation(length)
        self.tokenizer, self.bos, self.pad, self.length = tokenizer, bos, pad, length

    def __call__(self, prompt: str) -> Tokens:
        """Tokens of ``prompt`` without surrounding white space: a start token exactly once, no end token."""
        encoding = self.tokenizer.encode(prompt.strip())
        dropped = sum(piece.special_tokens_mask.count(0) for piece in encoding.overflowing)
        ids = list(encoding.ids)
        if ids[:1] != [self.bos]:  # not every tokenizer.json adds it
            ids.insert(0, self.bos)
            dropped += len(ids[self.length :])
            ids = ids[: self.length]
        padding = self.length - len(ids)
        return Tokens(
            mx.array(np.array([[self.pad] * padding + ids], np.int32)),
            mx.array(np.array([[0] * padding + [1] * len(ids)], np.int32)),
            dropped,
        )

    def verbatim(self, text: str) -> list[int]:
        """All tokens of ``text`` as it stands, special ones by their names: nothing is added, cut or stripped."""
        self.tokenizer.no_truncation()
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        self.tokenizer.enable_truncation(self.length)
        return list(ids)


def load_tokenizer(folder: Path, config: dict[str, Any], length: int | None = None) -> PromptTokenizer:
    """The tokeniser of a Hugging Face folder.

    Its length is 1024, or the folder's ``model_max_length`` where that is shorter (Gemma's own is not). Start and
    padding tokens are those of ``tokenizer_config.json``, or else of the model's ``config``. A tokeniser
    without a padding token pads with its end token.

    Raises:
        UserError: ``tokenizer.json`` is missing or unreadable, or the start token is unknown.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder}: tokenizer.json is missing; the text model's folder must hold it")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path}: not a tokenizer ({error})") from None
    declared = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    text = config.get("text_config", {})

    def token(name: str) -> int | None:
        value = declared.get(f"{name}_token")
        value = value.get("content") if isinstance(value, dict) else value
        identity = tokenizer.token_to_id(value) if isinstance(value, str) else None
        if identity is None:
            identity = text.get(f"{name}_token_id", config.get(f"{name}_token_id"))
        return identity if isinstance(identity, int) else None

    bos, pad = token("bos"), token("pad")
    pad = token("eos") if pad is None else pad
    if bos is None or pad is None:
        missing = "start (bos)" if bos is None else "padding (pad)"
        raise UserError(f"{folder}: neither tokenizer_config.json nor config.json names a {missing} token")
    longest = declared.get("model_max_length", LENGTH)
    return PromptTokenizer(tokenizer, bos, pad, min(LENGTH, int(longest)) if length is None else length)
