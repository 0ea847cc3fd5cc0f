"""What each network takes: bytes of its weights from the file's header, bytes of its work from its recorded code."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from itertools import islice
from typing import NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlx_ltx.checkpoints.files import TensorInfo
from mlx_ltx.memory.trace import parameters, record
from mlx_ltx.models.attention_bias import GroupBias
from mlx_ltx.models.audio_vae import AudioDecoder, AudioEncoder, AudioVaeConfig
from mlx_ltx.models.connectors import Connector
from mlx_ltx.models.gemma import Gemma, GemmaConfig, all_hidden_states
from mlx_ltx.models.passes import StreamInput, StreamRope
from mlx_ltx.models.quantized import WeightFormat
from mlx_ltx.models.rope import RopeTable
from mlx_ltx.models.transformer import Transformer
from mlx_ltx.models.transformer_config import StreamConfig, TransformerConfig
from mlx_ltx.models.upsampler import LatentUpsampler, UpsamplerConfig
from mlx_ltx.models.vocoder import CHANNELS, CHUNK_FRAMES, MEL_BINS, Generator, VocoderConfig
from mlx_ltx.sampling.geometry import AudioGrid, VideoGrid

Module = TypeVar("Module", bound=nn.Module)
remembered = lru_cache(maxsize=64)  # a plan is made anew for every way to make a job fit; most of it stays the same
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U64": 8, "I64": 8, "U32": 4, "I32": 4, "U16": 2, "I16": 2}
FLOATING = ("F32", "F16", "BF16", "F8_E4M3")


class Weights(NamedTuple):
    """A network's weights in bytes.

    Attributes:
        total: when all of them are in memory.
        reading: what reading a part of it (a block, at most) holds beside, where it becomes another dtype.
    """

    total: int
    reading: int


def weights(
    tensors: Iterable[tuple[str, TensorInfo]],
    dtype: mx.Dtype,
    formats: Mapping[str, WeightFormat] | None = None,
    groups: str = r".*?\.\d+\.",
) -> Weights:
    """Of tensors by their module path.

    Args:
        dtype: what floating-point tensors become; packed ones stay as they are.
        formats: layers that are quantised while they are read, by module path.
        groups: regular expression of the parts that are read together, at the beginning of a path.
    """
    total = 0
    parts: dict[str, int] = {}
    for path, info in tensors:
        size = math.prod(info.shape)
        stored = size * DTYPE_BYTES.get(info.dtype, 1)
        used = size * dtype.size if info.dtype in FLOATING else stored
        layer, _, name = path.rpartition(".")
        if formats and name == "weight" and layer in formats:
            used = quantised_bytes(size, formats[layer], dtype)
        total += used
        if used != stored:
            match = re.match(groups, path)
            key = match.group() if match else ""
            parts[key] = parts.get(key, 0) + stored
    return Weights(total, max(parts.values(), default=0))


def quantised_bytes(size: int, form: WeightFormat, dtype: mx.Dtype) -> int:
    """Of a weight with so many numbers: the packed numbers, and a scale (affine: and a bias) for every group."""
    scales = size // form.group_size
    return size * form.bits // 8 + scales * (2 * dtype.size if form.mode == "affine" else 1)


def patterns(skipped: Iterable[str]) -> Callable[[str], bool]:
    """Whether a path begins with one of these regular expressions."""
    expressions = [re.compile(pattern) for pattern in skipped]
    return lambda path: any(expression.match(path) for expression in expressions)


def module_bytes(module: nn.Module, dtype: mx.Dtype) -> int:
    """Of a module's parameters as ``dtype``, without evaluating them."""
    return sum(array.size for _, array in parameters(module)) * dtype.size


def _cast(module: Module, dtype: mx.Dtype) -> Module:
    module.set_dtype(dtype)
    return module


def _zeros(shape: Iterable[int], dtype: mx.Dtype) -> mx.array:
    return mx.zeros(tuple(shape), dtype=dtype)  # lazy: costs nothing


# Text


@remembered
def reading_work(config: GemmaConfig, tokens: int, dtype: mx.Dtype) -> int:
    """One layer of the text model over a prompt, beside the hidden states."""
    small = dataclasses.replace(config, num_hidden_layers=1, layer_types=config.layer_types[-1:])
    model = _cast(Gemma(dataclasses.replace(small, vocab_size=8)), dtype)

    def layer(ids: mx.array, mask: mx.array) -> mx.array:
        return list(all_hidden_states(model, ids, mask))[-1]

    ones = _zeros((1, tokens), mx.int32)
    return record(layer, ones, ones, module=model).peak()


def states_bytes(config: GemmaConfig, tokens: int, dtype: mx.Dtype) -> int:
    return config.hidden_states * tokens * config.hidden_size * dtype.size


def connector_work(connector: Connector, length: int, dtype: mx.Dtype) -> int:
    """One block over all places, tables and input included."""
    connector = _cast(connector, dtype)
    config = connector.config
    block = connector.transformer_1d_blocks[0]
    x = _zeros((1, length, config.dim), dtype)
    table = (1, length, config.dim) if config.interleaved else (1, config.heads, length, config.head_dim // 2)
    cos = _zeros(table, mx.float32)

    def run(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        return block(x, RopeTable(cos, sin, config.interleaved))

    return record(run, x, cos, cos, module=block).peak() + 2 * cos.nbytes + 2 * x.nbytes


# Denoising


def _rope(stream: StreamConfig, tokens: int, dim: int, interleaved: bool) -> RopeTable:
    shape = (1, tokens, dim) if interleaved else (1, stream.heads, tokens, dim // 2 // stream.heads)
    return RopeTable(_zeros(shape, mx.float32), _zeros(shape, mx.float32), interleaved)


def _stream_input(
    config: TransformerConfig, stream: StreamConfig, given: Tokens, text: int, dtype: mx.Dtype
) -> StreamInput:
    tokens, levels = given.number, given.levels
    cross = None
    if config.video and config.audio:
        cross = _rope(stream, tokens, config.audio.dim, config.rope_interleaved)
    return StreamInput(
        latent=_zeros((1, tokens, stream.in_channels), mx.float32),
        sigma=_zeros((1,), mx.float32),
        timesteps=_zeros((1, levels), mx.float32),
        context=_zeros((1, text, stream.caption_channels or stream.context_dim), dtype),
        rope=StreamRope(_rope(stream, tokens, stream.dim, config.rope_interleaved), cross),
        level_of_token=_zeros((1, tokens), mx.int32) if levels > 1 else None,
        attention_bias=_group_bias(tokens, tokens, dtype) if given.grouped else None,
        context_bias=_group_bias(tokens, text, dtype) if given.timed else None,
    )


def _group_bias(queries: int, keys: int, dtype: mx.Dtype) -> GroupBias:
    return GroupBias(*(_zeros((number,), kind) for number in (queries, keys) for kind in (mx.int32, dtype)))


def _arrays(given: StreamInput | None) -> list[mx.array]:
    if given is None:
        return []
    own, cross = given.rope
    tables = [own.cos, own.sin, *([cross.cos, cross.sin] if cross else [])]
    biases = [
        array for bias in (given.attention_bias, given.context_bias) if isinstance(bias, GroupBias) for array in bias
    ]
    levels = [given.level_of_token] if given.level_of_token is not None else []
    return [given.latent, given.sigma, given.timesteps, given.context, *tables, *levels, *biases]


def _with_arrays(given: StreamInput | None, arrays: list[mx.array]) -> StreamInput | None:
    """The same with other arrays, in the order of :func:`_arrays`."""
    if given is None:
        return None
    left = iter(arrays)
    latent, sigma, timesteps, context = (next(left) for _ in range(4))
    own, cross = given.rope
    tables = StreamRope(
        RopeTable(next(left), next(left), own.interleaved),
        RopeTable(next(left), next(left), cross.interleaved) if cross else None,
    )
    return dataclasses.replace(
        given,
        latent=latent,
        sigma=sigma,
        timesteps=timesteps,
        context=context,
        rope=tables,
        level_of_token=next(left) if given.level_of_token is not None else None,
        attention_bias=GroupBias(*islice(left, 4)) if given.attention_bias is not None else None,
        context_bias=GroupBias(*islice(left, 4)) if given.context_bias is not None else None,
    )


class Tokens(NamedTuple):
    """What one modality's stream runs over.

    Attributes:
        number: tokens, given ones included.
        levels: how many different noise levels they have.
        grouped: whether not all of them attend to each other fully.
        timed: whether not all of them attend to the whole text.
    """

    number: int
    levels: int = 1
    grouped: bool = False
    timed: bool = False


@remembered
class Kept(NamedTuple):
    """What denoising holds beside the usual.

    Attributes:
        tiles: in how many the picture is predicted; ``video`` is then the largest one.
        latents: numbers in the whole picture's latent, where it is split.
        cached: what a step leaves for those that reuse it.
    """

    tiles: int = 1
    latents: int = 0
    cached: bool = False


def denoising_work(
    config: TransformerConfig,
    video: Tokens | None,
    audio: Tokens | None,
    text: int,
    passes: int,
    dtype: mx.Dtype,
    kept: Kept = Kept(),  # noqa: B008 (a tuple)
) -> int:
    """A step, beside weights and text embeddings: one block of one pass, what the other passes hold, and the tables.

    The first block is the largest evaluation, because what is prepared for all blocks is computed with it.
    """
    model = _cast(Transformer(dataclasses.replace(config, layers=1)), dtype)
    given: list[StreamInput | None] = []
    held, streams = 0, []
    for stream, tokens in ((config.video, video), (config.audio, audio)):
        if stream is None or tokens is None:
            given.append(None)
            continue
        streams.append((stream, tokens))
        given.append(_stream_input(config, stream, tokens, text, dtype))
        held += (passes - 1) * tokens.number * stream.dim * dtype.size
        # the state's latents (noisy, clean), its next value, and one prediction per pass, in float32
        held += (2 + passes) * tokens.number * stream.in_channels * 4
        if kept.cached:
            # what the blocks added in each pass and tile, and what two texts' tokens were before them
            held += (kept.tiles * passes + min(passes, 2)) * tokens.number * stream.dim * dtype.size
    arrays = [_arrays(each) for each in given]
    split = len(arrays[0])

    def block(*flat: mx.array) -> list[mx.array]:
        both = _with_arrays(given[0], list(flat[:split])), _with_arrays(given[1], list(flat[split:]))
        return next(model.forward(*both))

    tape = record(block, *arrays[0], *arrays[1], module=model)
    tables = [sum(array.nbytes for array in [*each[:3], *each[4:]]) for each in arrays]
    if kept.cached:  # what enters the first block, of this step and of the last
        held += 2 * 4 * max(tokens.number * stream.dim for stream, tokens in streams)
    if kept.tiles > 1:  # the latents once more, whole, and predictions of all tiles
        held += (2 + 3 * passes) * kept.latents * 4
    return tape.peak() + kept.tiles * sum(tables) + held


# Convolutions


@remembered
def upsampling_work(config: UpsamplerConfig, grid: VideoGrid, dtype: mx.Dtype) -> int:
    """Enlarging one latent, its own size included."""
    model = _cast(LatentUpsampler(config), dtype)
    latent = _zeros((1, grid.frames, grid.height, grid.width, config.in_channels), mx.float32)
    return record(model, latent, module=model).peak() + 2 * latent.nbytes


@remembered
def audio_decoding_work(config: AudioVaeConfig, grid: AudioGrid, dtype: mx.Dtype) -> int:
    decoder = _cast(AudioDecoder(config), dtype)
    return record(decoder, _zeros((1, grid.frames, grid.bins, config.z_channels), dtype), module=decoder).peak()


@remembered
def audio_encoding_work(config: AudioVaeConfig, mel_frames: int, dtype: mx.Dtype) -> int:
    encoder = _cast(AudioEncoder(config), dtype)
    mel = _zeros((1, mel_frames, config.mel_bins, config.audio_channels), dtype)
    return record(encoder, mel, module=encoder).peak() + mel.nbytes


@remembered
def vocoding_work(config: VocoderConfig, mel_frames: int) -> int:
    """The larger of the two generators at the chunk it works on, the low-rate waveform included."""
    peak = _generator_work(Generator(config.generator), mel_frames)
    if config.extension is None:
        return peak
    samples = mel_frames * config.generator.factor
    frames = math.ceil(samples / config.extension.hop_length)
    waveform = 4 * CHANNELS * samples
    # the frames of the analysis, real and imaginary parts, magnitudes
    analysis = 4 * CHANNELS * frames * (2 * config.extension.n_fft + 3 * (config.extension.n_fft // 2 + 1))
    result = waveform * config.extension.ratio
    extension = max(analysis, _generator_work(Generator(config.extension.generator), frames)) + waveform
    return max(peak, extension, waveform + 4 * result)


def _generator_work(model: Generator, mel_frames: int) -> int:
    """A chunk goes through stage by stage."""
    config = model._config
    chunk = min(mel_frames, CHUNK_FRAMES + 2 * config.reach)
    given = mel_frames * CHANNELS * MEL_BINS * 4
    blocks, length, peak = len(config.block_kernels), chunk, 0
    for index, upsample in enumerate(model.ups):
        width = CHANNELS * MEL_BINS if index == 0 else config.width // 2**index
        x = _zeros((1, length, width), mx.float32)

        def stage(x: mx.array, index: int = index, upsample: nn.Module = upsample) -> mx.array:
            x = upsample(model.conv_pre(x) if index == 0 else x)
            outputs = [block(x) for block in model.resblocks[index * blocks : (index + 1) * blocks]]
            return mx.mean(mx.stack(outputs), axis=0)

        peak = max(peak, record(stage, x, module=model).peak() + x.nbytes)
        length *= config.upsample_rates[index]
    waveform = 4 * CHANNELS * mel_frames * config.factor
    return given + peak + waveform
