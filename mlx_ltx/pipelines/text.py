"""Part of every recipe: prompts, rewritten first if that was asked for, to what the transformer attends to."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple

from mlx_ltx.checkpoints.components import load_connectors, load_text_features
from mlx_ltx.checkpoints.gemma import TextModel, read_gemma_config
from mlx_ltx.events import Event, Phase, Progress, Warned
from mlx_ltx.models.text_encoder import PromptStates, embed_prompt, read_prompt
from mlx_ltx.pipelines.enhance import enhance_phases, enhance_prompts, load_text_model
from mlx_ltx.pipelines.job import Job
from mlx_ltx.pipelines.prompt_cache import Embedded
from mlx_ltx.pipelines.run import Run, Shot
from mlx_ltx.sampling.denoise import TextContext

READ, EMBED = "read-text", "embed-text"
SHOWN = 40  # characters of a prompt in a message


@dataclass(frozen=True)
class Texts:
    """The embedded texts of a job.

    Attributes:
        contexts: each different text's embedding.
        job: tells which texts a clip goes by.
    """

    contexts: dict[str, TextContext]
    job: Job

    def positive(self, shot: Shot) -> TextContext:
        """What a clip is to follow: its prompt, or its segments, each for its part of the time."""
        segments = shot.request.segments
        if not segments:
            return self.contexts[shot.request.prompt]
        return TextContext.timed([(self.contexts[segment.text], segment.seconds) for segment in segments])

    @property
    def negative(self) -> TextContext | None:
        """What to steer away from, in guided denoising."""
        if self.job.guidance is None or self.job.request.negative_prompt is None:
            return None
        return self.contexts[self.job.request.negative_prompt]


def text_phases(job: Job) -> list[Phase]:
    """What is to be read; nothing where all embeddings were kept from before."""
    count = len(job.unread)
    if count == 0 and not job.request.enhance_prompt:
        return []
    title = "prompt" if count == 1 else f"{count} prompts"
    layers = count * read_gemma_config(job.model.files.text_encoder)[0].hidden_states
    return [
        *enhance_phases(job),
        Phase(READ, f"Reading the {title} with {job.model.files.text_encoder.name}", layers, "layers"),
        Phase(EMBED, f"Embedding the {title}", None, "layers"),
    ]


def encode_prompts(run: Run) -> Generator[Event, None, Texts]:
    """Encode every text of the job; the text model is gone from memory before its successors come in."""
    loaded: list[TextModel] = []
    if run.job.request.enhance_prompt:
        loaded.append((yield from enhance_prompts(run)))
    job = run.job
    contexts = {text: kept.context() for text, kept in job.embedded.items()}
    if job.unread:
        read = yield from run.phase(READ, _read(job, loaded))
        embedded = yield from run.phase(EMBED, _embed(job, [prompt.states for prompt in read]))
        for prompt, context in zip(read, embedded, strict=True):
            contexts[prompt.text] = context
            if job.cache is not None and prompt.whole:
                job.cache.put(prompt.text, Embedded.of(context))
    return Texts(contexts, job)


class _Read(NamedTuple):
    """A text that the text model has read, and whether that was all of it."""

    text: str
    states: PromptStates
    whole: bool


def _read(job: Job, loaded: list[TextModel]) -> Generator[Event, None, list[_Read]]:
    """``loaded``: the text model if it is in memory already; it is taken, so that it is free again afterwards."""
    model, tokenizer = loaded.pop() if loaded else load_text_model(job)
    results = []
    for index, prompt in enumerate(job.unread):
        tokens = tokenizer(prompt)
        if tokens.dropped:
            text = prompt if len(prompt) <= SHOWN else prompt[:SHOWN] + "…"
            yield Warned(f'{tokens.dropped} tokens at the end of a prompt are more than the model reads: "{text}"')
        reading = read_prompt(model, tokens.input_ids, tokens.mask)
        while True:
            try:
                step = next(reading)
            except StopIteration as end:
                results.append(_Read(prompt, end.value, whole=not tokens.dropped))
                break
            yield Progress(READ, index * step.total + step.done, len(job.unread) * step.total)
    return results


def _embed(job: Job, prompts: list[PromptStates]) -> Generator[Event, None, list[TextContext]]:
    gemma, _ = read_gemma_config(job.model.files.text_encoder)
    features = load_text_features(job.model.checkpoint, gemma, job.dtype)
    connectors = load_connectors(job.model.checkpoint, job.dtype)
    results = []
    for index, prompt in enumerate(prompts):
        embedding = embed_prompt(features, connectors, prompt)
        while True:
            try:
                step = next(embedding)
            except StopIteration as end:
                results.append(TextContext(end.value.video, end.value.audio))
                break
            yield Progress(EMBED, index * step.total + step.done, len(prompts) * step.total)
    return results
