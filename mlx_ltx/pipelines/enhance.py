"""Part of every recipe: let the text model rewrite the prompt before it encodes it (ltx_core/text_encoders).

1. Load the text model; it stays for the encoding that follows.
2. With a given image and the ``vision`` extra, look at the first image.
3. Continue the conversation of instructions and prompt, token by token, giving out the text as it comes.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
from tokenizers.decoders import DecodeStream

from mlx_ltx.checkpoints.chat import Chat, load_chat
from mlx_ltx.checkpoints.gemma import TextModel, load_gemma
from mlx_ltx.checkpoints.gemma_vision import NoVision, load_vision
from mlx_ltx.errors import UserError
from mlx_ltx.events import Event, Phase, Progress, PromptEnhanced, TextStreamed, Warned
from mlx_ltx.media.exr import is_exr
from mlx_ltx.media.images import load_image
from mlx_ltx.models.gemma_generate import ImageTokens, ReadStep
from mlx_ltx.pipelines.instructions import IMAGE_INSTRUCTIONS, TEXT_INSTRUCTIONS, user_message
from mlx_ltx.pipelines.job import Job
from mlx_ltx.pipelines.run import Run, Shot
from mlx_ltx.sampling.tokens import write_tokens

ENHANCE = "enhance-prompt"
LIMIT = 512  # tokens that are written at most, as in the reference

_PLAIN = str.maketrans(
    {"‘": "'", "’": "'", "′": "'", "“": '"', "”": '"', "–": "-", "—": "-", "−": "-", "\N{NO-BREAK SPACE}": " "}
)


class Cleaner:
    """Makes plain text of what a chat model writes, piece by piece: all results joined are the cleaned text.

    Curly quotes and long dashes become those of a keyboard, everything before the first letter goes (quotes, bullets,
    asterisks), and so does white space at the end.
    """

    def __init__(self) -> None:
        self._begun = False
        self._space = ""  # held back until it is known not to be the end

    def __call__(self, piece: str) -> str:
        text = piece.translate(_PLAIN)
        if not self._begun:
            first = next((place for place, letter in enumerate(text) if letter.isalpha()), None)
            if first is None:
                return ""
            self._begun, text = True, text[first:]
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        return kept


class SeenImage(NamedTuple):
    """What the text model reads of an image: (1, n, hidden_size), and the id of the token that each stands for."""

    features: mx.array
    token: int


def text_model_dtype(job: Job) -> mx.Dtype:
    """What the text model runs in: Gemma's hidden states leave float16's range."""
    return mx.float32 if job.dtype == mx.float32 else mx.bfloat16


def load_text_model(job: Job) -> TextModel:
    """The text model as the job holds it."""
    return load_gemma(job.model.files.text_encoder, text_model_dtype(job), job.text_quantization)


def enhance_phases(job: Job) -> list[Phase]:
    """The phase in which the prompts are rewritten, if that was asked for."""
    return [_phase(job)] if job.request.enhance_prompt else []


def enhance_prompts(run: Run) -> Generator[Event, None, TextModel]:
    """Rewrite the prompts of all clips; in their settings the new ones then stand beside the originals.

    A prompt that several clips share is rewritten once, with the first one's seed.

    Returns:
        The text model, for the encoding.

    Raises:
        UserError: the text model is not an instruction-tuned one, or it wrote nothing.
    """
    text_model, enhanced = yield from run.phase(ENHANCE, _enhance_all(run.job))
    job = run.job
    shots = [
        replace(shot, prompt=enhanced[shot.prompt], original_prompt=shot.prompt, enhance_prompt=False)
        for shot in job.shots
    ]
    request = replace(
        job.request,
        prompt=enhanced.get(job.request.prompt, ""),  # there is none beside several
        prompts=tuple(enhanced[prompt] for prompt in job.request.prompts),
        enhance_prompt=False,
    )
    run.job = replace(job, request=request, shots=shots)
    run.shots = [Shot(request, shot.noise) for request, shot in zip(shots, run.shots, strict=True)]
    return text_model


def enhance_only(job: Job) -> Generator[Event, None, list[str]]:
    """Rewrite the prompts and do nothing else: ``--enhance-only``. Returns them, in the order of the job's clips."""
    run = Run(replace(job, pipeline=replace(job.pipeline, phases=lambda job: [_phase(job)])))
    yield from run.begin()
    yield from enhance_prompts(run)
    return list(dict.fromkeys(shot.prompt for shot in run.job.shots))


def look(folder: Path, image: Path, dtype: mx.Dtype) -> SeenImage:
    """Let the vision part of a text model's folder look at an image file; it is gone from memory afterwards.

    Raises:
        NoVision: it cannot.
        UserError: the image or the folder cannot be read.
    """
    if is_exr(image):
        raise NoVision("EXR holds linear light, which it was not trained to see")
    vision, token = load_vision(folder, dtype)
    features = vision(load_image(image))
    mx.eval(features)
    return SeenImage(features, token)


def enhance(
    text_model: TextModel, chat: Chat, prompt: str, seed: int, image: SeenImage | None = None, limit: int = LIMIT
) -> Generator[float | str, None, str]:
    """Rewrite one prompt.

    Args:
        seed: the same seed gives the same text.
        image: the first frame of the clip.
        limit: the most tokens that are written.

    Yields:
        Pieces of clean text as they come, and, as floats, how many tokens were written so far. The first one's fraction
        grows while the prompt is read.

    Returns:
        The new prompt, which all pieces joined are; empty if the model wrote nothing but quotes and white space.
    """
    if image is None:
        tokens, shown = chat.tokens(TEXT_INSTRUCTIONS, user_message(prompt)), None
    else:
        count = image.features.shape[1]
        tokens = chat.tokens(IMAGE_INSTRUCTIONS, user_message(prompt), count, image.token)
        assert tokens.image is not None
        shown = ImageTokens(image.features, tokens.image)
    tokenizer = text_model.tokenizer.tokenizer
    pieces, clean = DecodeStream(skip_special_tokens=True), Cleaner()
    texts: list[str] = []
    written = 0
    for step in write_tokens(text_model.model, tokens.ids, stop=chat.stop, limit=limit, seed=seed, image=shown):
        if isinstance(step, ReadStep):  # the first token is there when all layers have read
            yield step.done / step.total
            continue
        text = clean(pieces.step(tokenizer, step) or "")
        if text:
            texts.append(text)
            yield text
        written += 1
        yield float(written)
    return "".join(texts)


def _phase(job: Job) -> Phase:
    prompts = _prompts(job)
    title = "prompt" if len(prompts) == 1 else f"{len(prompts)} prompts"
    name = job.model.files.text_encoder.name
    return Phase(ENHANCE, f"Enhancing the {title} with {name}", len(prompts) * LIMIT, "tokens")


def _prompts(job: Job) -> dict[str, int]:
    """Each different prompt, with the seed of the first clip that it makes."""
    prompts: dict[str, int] = {}
    for shot in job.shots:
        prompts.setdefault(shot.prompt, shot.seed)
    return prompts


def _enhance_all(job: Job) -> Generator[Event, None, tuple[TextModel, dict[str, str]]]:
    folder, dtype = job.model.files.text_encoder, text_model_dtype(job)
    text_model = load_text_model(job)
    chat = load_chat(folder, text_model.tokenizer)
    image = None
    if job.request.images:
        try:
            image = look(folder, job.request.images[0].path, dtype)
        except NoVision as reason:
            yield Warned(f"the prompt is enhanced without its image: {reason}")
    prompts = _prompts(job)
    enhanced = {}
    for index, (prompt, seed) in enumerate(prompts.items()):
        written, writing = 0.0, enhance(text_model, chat, prompt, seed, image, LIMIT)
        while True:
            try:
                step = next(writing)
            except StopIteration as end:
                enhanced[prompt] = end.value
                break
            if isinstance(step, str):
                yield TextStreamed(ENHANCE, step)
            else:
                written = step
                yield Progress(ENHANCE, index * LIMIT + written, len(prompts) * LIMIT)
        if not enhanced[prompt]:
            raise UserError(
                "the text model wrote no enhanced prompt; try another --seed, or leave out --enhance-prompt"
            )
        yield PromptEnhanced(enhanced[prompt], prompt)
        if written == LIMIT:
            yield Warned(f"the enhanced prompt was cut off after {LIMIT} tokens")
    return text_model, enhanced
