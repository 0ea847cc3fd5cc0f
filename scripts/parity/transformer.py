"""The transformer against the reference: whole passes, every block, and everything prepared before the blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_ltx.checkpoints.components import load_transformer
from mlx_ltx.models.attention_bias import logits_of
from mlx_ltx.models.passes import Perturbation, StreamInput
from mlx_ltx.models.transformer import Transformer
from mlx_ltx.models.transformer_block import StreamState
from parity import Comparison, GoldenSet, runner

SINGLE_MODALITY_CHECKPOINT = "transformer_23"


@dataclass(frozen=True)
class Table:
    """A recorded mask as :class:`AttentionBias`: (B, 1, T, S), or (B, 1, 1, S) where it is the same for all."""

    logits: mx.array

    def rows(self, first: int, last: int) -> mx.array:
        return self.logits[:, :, first:last] if self.logits.shape[2] > 1 else self.logits


def stream_inputs(model: Transformer, golden: GoldenSet, case: str) -> tuple[StreamInput | None, StreamInput | None]:
    """The recorded modality fields of a case as inputs of the model."""

    def field(stream: str, name: str) -> mx.array | None:
        key = f"{case}.{stream}.{name}"
        return golden.mx(key) if key in golden.tensors else None

    def positions(stream: str) -> np.ndarray | None:
        return golden.tensors.get(f"{case}.{stream}.positions")

    ropes = model.rope(positions("video"), positions("audio"))

    def given(stream: str, rope) -> StreamInput | None:
        if rope is None:
            return None
        keyframes = field(stream, "keyframes_mask")
        strengths, seen = field(stream, "attention_mask"), field(stream, "context_mask")
        return StreamInput(
            latent=field(stream, "latent"),
            sigma=field(stream, "sigma"),
            timesteps=field(stream, "timesteps")[..., 0],
            context=field(stream, "context"),
            rope=rope,
            context_bias=None if seen is None else Table(logits_of(seen, model.dtype)[:, None, None]),
            attention_bias=None if strengths is None else Table(logits_of(strengths, model.dtype)[:, None]),
            keyframes_mask=None if keyframes is None else keyframes[..., 0],
        )

    return given("video", ropes[0]), given("audio", ropes[1])


def perturbations(golden: GoldenSet, case: str, batch: int) -> list[Perturbation]:
    """What the named case perturbs, as its description in the set's metadata says."""
    block_1 = frozenset({1})
    if block := re.fullmatch(r"stg_block(\d+)", case):
        blocks = frozenset({int(block[1])})
        return [Perturbation(video_blocks=blocks, audio_blocks=blocks)]
    if case.startswith("isolated"):
        return [Perturbation(isolated=True)]
    if case.startswith("batched_guidance"):
        # sample 0 plain, 1 video STG of block 1, 2 isolated
        return [Perturbation(), Perturbation(video_blocks=block_1), Perturbation(isolated=True)][:batch]
    return [Perturbation()]


def compare_case(model: Transformer, golden: GoldenSet, case: str) -> Iterator[Comparison]:
    video, audio = stream_inputs(model, golden, case)
    batch = (video or audio).latent.shape[0]
    recorded = {key.removeprefix(f"{case}.") for key in golden.names if key.startswith(f"{case}.")}
    for stream, given, other in (("video", video, audio), ("audio", audio, video)):
        if given is not None and f"prep.{stream}.x" in recorded:
            yield from compare_preparation(getattr(model, stream).prepare(given, other), golden, case, stream, recorded)

    steps = model.forward(video, audio, perturbations(golden, case, batch))
    streams = [name for name, given in (("video", video), ("audio", audio)) if given is not None]
    index = 0
    while True:
        try:
            hidden = next(steps)
        except StopIteration as end:
            velocities = end.value
            break
        for stream, x in zip(streams, hidden, strict=True):
            if f"block{index}.{stream}" in recorded:
                yield golden.compare(case, f"block{index}.{stream}", x)
        index += 1
    for stream, given in (("video", video), ("audio", audio)):
        if given is None:
            continue
        velocity = getattr(velocities, stream)
        if f"{stream}.velocity" in recorded:
            yield golden.compare(case, f"{stream}.velocity", velocity)
        if f"{stream}.x0" in recorded:
            x0 = given.latent - given.timesteps[..., None] * velocity
            yield golden.compare(case, f"{stream}.x0", x0)


def compare_preparation(
    state: StreamState, golden: GoldenSet, case: str, stream: str, recorded: set[str]
) -> Iterator[Comparison]:
    flat = lambda x: x.reshape(*x.shape[:2], -1)  # noqa: E731
    prepared = {"x": state.x, "context": state.context, "timesteps": flat(state.modulation.values)}
    prepared["embedded_timestep"] = flat(state.embedded_timestep.values)
    prepared["rope_cos"], prepared["rope_sin"] = state.rope.own.cos, state.rope.own.sin
    if state.rope.cross is not None:
        prepared["cross_rope_cos"], prepared["cross_rope_sin"] = state.rope.cross.cos, state.rope.cross.sin
    if state.prompt_modulation is not None:
        prepared["prompt_timestep"] = flat(state.prompt_modulation)
    if state.cross_modulation is not None:
        prepared["cross_scale_shift_timestep"] = flat(state.cross_modulation.values)
        prepared["cross_gate_timestep"] = flat(state.cross_gate.values)
    for name, value in prepared.items():
        if f"prep.{stream}.{name}" in recorded:
            yield golden.compare(case, f"prep.{stream}.{name}", value)


def case_names(golden: GoldenSet) -> list[str]:
    suffixes = (".video.latent", ".audio.latent")
    return sorted({key.removesuffix(s) for key in golden.names for s in suffixes if key.endswith(s)})


@runner("transformer_*_single_modality")
def run_single_modality(golden: GoldenSet) -> Iterator[Comparison]:
    """Models of one stream, and the whole model given one (``av_NAME_alone``, on the inputs of ``NAME_only``)."""
    checkpoint = golden.checkpoint(SINGLE_MODALITY_CHECKPOINT)
    for stream, other in (("video", "audio"), ("audio", "video")):
        case = f"{stream}_only"
        yield from compare_case(load_transformer(checkpoint, mx.float32, **{other: False}), golden, case)
        model = load_transformer(checkpoint, mx.float32)
        given = dict(zip(("video", "audio"), stream_inputs(model, golden, case), strict=True))
        velocity = getattr(model(**given), stream)
        yield golden.compare(f"av_{stream}_alone", f"{stream}.velocity", velocity)


@runner("transformer_*")
def run_transformer(golden: GoldenSet) -> Iterator[Comparison]:
    model = load_transformer(golden.checkpoint(), mx.float32)
    for case in case_names(golden):
        yield from compare_case(model, golden, case)
