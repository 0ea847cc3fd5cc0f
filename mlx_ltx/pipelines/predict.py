"""From a job to its memory plan: every phase's peak, from file headers and configs, before any work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_ltx.checkpoints import keymaps
from mlx_ltx.checkpoints.components import left_out, read_config
from mlx_ltx.checkpoints.files import SafetensorsFile, SafetensorsFolder
from mlx_ltx.checkpoints.gemma import GEMMA, read_gemma_config
from mlx_ltx.checkpoints.keymaps import KeyMap
from mlx_ltx.checkpoints.lora import Lora
from mlx_ltx.checkpoints.quantize import GEMMA_RULES, choose_formats, transformer_rules
from mlx_ltx.checkpoints.tokenizer import PromptTokenizer, load_tokenizer
from mlx_ltx.errors import UserError
from mlx_ltx.events import Phase
from mlx_ltx.memory import networks
from mlx_ltx.memory.machine import total_memory
from mlx_ltx.memory.networks import Kept, Tokens, Weights, module_bytes, weights
from mlx_ltx.memory.plan import PhasePlan, Plan, advise
from mlx_ltx.memory.video_vae import band_cost, decoding_work, encoding_work, tiled_decoding_work
from mlx_ltx.models.connectors import TextConnectors
from mlx_ltx.models.gemma import Gemma, GemmaConfig
from mlx_ltx.models.text_features import ROWS_AT_ONCE
from mlx_ltx.models.transformer import Transformer
from mlx_ltx.models.transformer_config import TransformerConfig
from mlx_ltx.models.upsampler import UpsamplerConfig
from mlx_ltx.models.vocoder import CHUNK_FRAMES
from mlx_ltx.pipelines import ic_lora, upscale
from mlx_ltx.pipelines.encode import frames_at_once
from mlx_ltx.pipelines.enhance import ENHANCE, LIMIT, text_model_dtype
from mlx_ltx.pipelines.images import ENCODE
from mlx_ltx.pipelines.job import Job, check_quantization, check_tiling
from mlx_ltx.pipelines.output import PICTURE
from mlx_ltx.pipelines.output import SOUND as DECODE_SOUND
from mlx_ltx.pipelines.references import REFERENCES, reference_scale
from mlx_ltx.pipelines.sources import SOUND, VIDEO
from mlx_ltx.pipelines.stage import CHANGE, LOAD, UPSAMPLE, streams_weights
from mlx_ltx.pipelines.text import EMBED, READ
from mlx_ltx.pipelines.two_stages import DENOISE, REFINE
from mlx_ltx.request import BANDS, TOKEN_TILES, flag
from mlx_ltx.sampling.geometry import ClipShape, VideoGrid
from mlx_ltx.sampling.token_tiles import largest_tile

DTYPES = {mx.bfloat16: "bfloat16", mx.float16: "float16", mx.float32: "float32"}
STREAMED_BLOCKS = 2  # one that computes, and one that is read meanwhile
TEXTS, TRANSFORMER, LATENTS = "text embeddings", "transformer", "latents"
SOUND_DECODER, PICTURE_DECODER = "sound decoder", "picture decoder"


def make_plan(job: Job, memory: int | None = None) -> Plan:
    """Predict every phase of a job; no weights are read.

    Args:
        memory: bytes of the machine; None asks it.
    """
    memory = total_memory() if memory is None else memory
    with _same_random_numbers():
        return _with_advice(job, _plan(job, memory))


class Fit(NamedTuple):
    """A job with its plan, and the flags that were chosen for it to fit; none if it fits as it is."""

    job: Job
    plan: Plan
    choices: str


TEXT_PHASES = (ENHANCE, READ)
TRANSFORMER_PHASES = (LOAD, CHANGE, DENOISE, REFINE)
# What "auto" tries for the phases of each, in this order. Never less than 8 bits for the transformer: streaming, which
# is slower, gives the numbers of the whole weights.
TEXT_WAYS: tuple[dict[str, str], ...] = ({"quantize_text": "q8"}, {"quantize_text": "q4"})
TRANSFORMER_WAYS: tuple[dict[str, str], ...] = (
    {"quantize": "q8"},
    {"weights": "streamed"},
    # Tiles change the picture: as few as fit, and only where nothing else does.
    *({"weights": "streamed", "token_tiles": number} for number in TOKEN_TILES),
)
# As few bands as fit, since each adds work. The reference's tiles change the picture: only where there are no bands.
PICTURE_WAYS: tuple[dict[str, str], ...] = tuple({"vae_tiling": bands} for bands in BANDS)
TILED_WAYS: tuple[dict[str, str], ...] = ({"vae_tiling": "reference"},)


def make_fit(job: Job, memory: int | None = None) -> Fit:
    """Choose what a job leaves to "auto", so that each phase stays under the limit; without a way, it stays as it is.

    Args:
        memory: as for :func:`make_plan`.
    """
    memory = total_memory() if memory is None else memory
    with _same_random_numbers():
        return _fit_job(job, memory)


def _fit_job(job: Job, memory: int) -> Fit:
    plan = _plan(job, memory)
    chosen: dict[str, str] = {}
    picture_ways = PICTURE_WAYS if job.model.video_vae.local_decoder else TILED_WAYS
    for phases, ways in (
        (TEXT_PHASES, TEXT_WAYS),
        (TRANSFORMER_PHASES, TRANSFORMER_WAYS),
        ((PICTURE,), picture_ways),
    ):
        for way in ways if not _fit(plan, phases) else ():
            if not all(name in job.pipeline.accepts and getattr(job.request, name) == "auto" for name in way):
                continue
            try:
                changed = job.with_changes(**chosen, **way)
                check_quantization(changed)
                check_tiling(changed)
                changed_plan = _plan(changed, memory)
            except UserError:  # quantised already, layers too narrow, or too few rows for bands
                continue
            if _fit(changed_plan, phases):
                chosen |= way
                job, plan = changed, changed_plan
                break
    return Fit(job, _with_advice(job, plan), " ".join(f"{flag(name)} {value}" for name, value in chosen.items()))


def _fit(plan: Plan, phases: Sequence[str]) -> bool:
    return all(phase.peak_bytes <= plan.limit_bytes for phase in plan.phases if phase.name in phases)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """New layers, which nobody evaluates, draw first weights; afterwards random numbers go on as if they had not."""
    state: Any = mx.random.state
    high, low = state[0].tolist()
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)


def _with_advice(job: Job, plan: Plan) -> Plan:
    return plan if plan.fits else replace(plan, advice=advise(plan, _ways(job, plan.memory_bytes)))


def _plan(job: Job, memory: int) -> Plan:
    predictor = _Predictor(job)
    return Plan(tuple(predictor.phase(phase) for phase in job.phases()), memory)


def _ways(job: Job, memory: int) -> list[tuple[str, Plan]]:
    """Changes of the request that take less, with their plans."""
    ways = []
    if "quantize" in job.pipeline.takes and job.quantization is None and job.model.checkpoint.quantization is None:
        for kind in ("q8", "q4"):
            smaller = replace(job, request=replace(job.request, quantize=kind, quantize_text=kind))
            with suppress(UserError):  # layers too narrow for it
                ways.append((f"--quantize {kind} --quantize-text {kind}", _plan(smaller, memory)))
    if "weights" in job.pipeline.takes and not streams_weights(job):
        streamed = replace(job, request=replace(job.request, weights="streamed"))
        ways.append(("--weights streamed", _plan(streamed, memory)))
    if "token_tiles" in job.pipeline.takes and job.token_tiles is None:
        in_tiles = replace(job, request=replace(job.request, weights="streamed", token_tiles="4"))
        with suppress(UserError):  # too few rows
            check_tiling(in_tiles)
            ways.append(("--weights streamed --token-tiles 4", _plan(in_tiles, memory)))
    if job.pipeline.makes_picture and job.bands == 1:
        for bands in BANDS:
            in_bands = replace(job, request=replace(job.request, vae_tiling=bands))
            with suppress(UserError):  # too few rows, or not local
                check_tiling(in_bands)
                ways.append((f"--vae-tiling {bands}", _plan(in_bands, memory)))
    if job.pipeline.clip is None and job.pipeline.makes_picture:
        vae = job.model.video_vae
        multiple = vae.space_scale * (2 if job.pipeline.two_stage else 1)
        for part in (0.75, 0.5):
            size = [
                max(multiple, int(side * part) // multiple * multiple) for side in (job.clip.width, job.clip.height)
            ]
            made_smaller = replace(job, clip=replace(job.clip, width=size[0], height=size[1]))
            with suppress(UserError):  # too few rows or columns for the bands or tiles that are asked for
                check_tiling(made_smaller)
                ways.append((f"--width {size[0]} --height {size[1]}", _plan(made_smaller, memory)))
        frames = max(1, (job.clip.frames - 1) // 2 // vae.time_scale * vae.time_scale + 1)
        shorter = replace(job, clip=replace(job.clip, frames=frames))
        ways.append((f"--num-frames {frames}", _plan(shorter, memory)))
    return ways


def _on_grid(job: Job) -> ClipShape:
    """The clip as the networks see it: of a given clip's size, the next larger one that latents can have."""
    clip, vae = job.clip, job.model.video_vae
    return ClipShape(
        math.ceil((clip.frames - 1) / vae.time_scale) * vae.time_scale + 1,
        math.ceil(clip.height / vae.space_scale) * vae.space_scale,
        math.ceil(clip.width / vae.space_scale) * vae.space_scale,
        clip.fps,
    )


class Need(NamedTuple):
    """What a phase takes beside what is in memory already.

    Attributes:
        peak: at the most.
        works_in, chunking: see :class:`PhasePlan`.
    """

    peak: int
    works_in: str
    chunking: str


class _Predictor:
    """Goes through a job's phases in order and remembers what stays in memory."""

    def __init__(self, job: Job):
        self.job, self.config = job, job.model.checkpoint.config
        self.dtype = job.dtype
        self.clip = _on_grid(job)
        self.resident: dict[str, int] = {}
        held = [job.quantization.name] if job.quantization is not None else []
        held += ["as packed"] if job.model.checkpoint.quantization is not None else []
        self.transformer_kind = ", ".join([DTYPES[job.dtype], *held])
        held = [job.text_quantization.name] if job.text_quantization is not None else []
        self.text_kind = ", ".join([DTYPES[text_model_dtype(job)], *held])
        self.names = [phase.name for phase in job.phases()]
        self.needs: dict[str, Callable[[], Need]] = {
            ENHANCE: self.enhance,
            READ: self.read,
            EMBED: self.embed,
            ENCODE: lambda: self.encode(replace(self.clip, frames=1)),
            VIDEO: lambda: self.encode(self.source(), given=1),
            REFERENCES: self.references,
            SOUND: self.encode_sound,
            LOAD: self.load,
            CHANGE: self.change,
            DENOISE: lambda: self.denoise(self.clip.halved() if REFINE in self.names else self.clip, True),
            REFINE: lambda: self.denoise(self.clip, False, job.token_tiles),
            UPSAMPLE: self.upsample,
            DECODE_SOUND: self.decode_sound,
            PICTURE: self.decode_picture,
        }

    def phase(self, phase: Phase) -> PhasePlan:
        self.begin(phase.name)
        resident = dict(self.resident)
        need = self.needs[phase.name]()
        own = {DECODE_SOUND: SOUND_DECODER, PICTURE: PICTURE_DECODER}.get(phase.name, "")
        peak = sum(resident.values()) - resident.get(own, 0) + need.peak  # a decoder is loaded for the first clip only
        self.end(phase.name)
        return PhasePlan(phase.name, phase.title, resident, need.works_in, need.chunking, peak)

    def begin(self, name: str) -> None:
        """What was freed before the phase."""
        if name in (DECODE_SOUND, PICTURE):
            self.resident.pop(TRANSFORMER, None)
            self.resident[LATENTS] = self.latents(self.clip)

    def end(self, name: str) -> None:
        """What the phase leaves in memory."""
        if name == READ:
            self.resident[TEXTS] = sum(
                networks.states_bytes(self.gemma, tokens, self.text_dtype) for tokens in self.tokens
            )
        elif name == EMBED:
            self.resident[TEXTS] = len(self.job.prompts) * self.text_bytes
        elif name in (LOAD, CHANGE):
            self.resident[TRANSFORMER] = self.transformer_bytes
        elif name in (DENOISE, UPSAMPLE, REFINE):
            self.resident[LATENTS] = self.latents(self.clip)
        elif name == DECODE_SOUND and len(self.job.shots) > 1:
            self.resident[SOUND_DECODER] = self.audio_decoder.total + self.vocoder.total
        elif name == PICTURE:
            self.resident[PICTURE_DECODER] = self.video_decoder.total

    # Weights, from headers

    def weights(self, keymap: KeyMap, dtype: mx.Dtype | None = None, file: SafetensorsFile | None = None) -> Weights:
        file = self.job.model.checkpoint if file is None else file
        keys = keymap.select(file.tensors)
        return weights(((path, file.tensors[key]) for path, key in keys.items()), dtype or self.dtype)

    @cached_property
    def audio_decoder(self) -> Weights:
        return self.weights(keymaps.AUDIO_DECODER)

    @cached_property
    def vocoder(self) -> Weights:
        return self.weights(keymaps.VOCODER, mx.float32)

    @cached_property
    def video_decoder(self) -> Weights:
        return self.weights(keymaps.VIDEO_DECODER, mx.float32 if self.job.request.hdr is not None else self.dtype)

    @cached_property
    def gemma_weights(self) -> Weights:
        folder = SafetensorsFolder(self.job.model.files.text_encoder)
        keys, formats = GEMMA.select(folder.tensors), None
        if self.job.text_quantization is not None:
            formats = choose_formats(Gemma(self.gemma), GEMMA_RULES, self.job.text_quantization)
        return weights(((path, folder.tensors[key]) for path, key in keys.items()), self.text_dtype, formats)

    @cached_property
    def blocks(self) -> tuple[Weights, Weights]:
        """The transformer's blocks, and what is around them."""
        file, skipped = self.job.model.checkpoint, networks.patterns(left_out(self.transformer))
        keys = keymaps.TRANSFORMER.select(file.tensors)
        tensors = [(path, file.tensors[key]) for path, key in keys.items() if not skipped(path)]
        inside = [pair for pair in tensors if pair[0].startswith("blocks.")]
        around = [pair for pair in tensors if not pair[0].startswith("blocks.")]
        formats = None
        if self.job.quantization is not None:
            rules = transformer_rules(self.transformer.layers)
            formats = choose_formats(Transformer(self.transformer), rules, self.job.quantization)
        return weights(inside, self.dtype, formats), weights(around, self.dtype)

    @cached_property
    def transformer(self) -> TransformerConfig:
        job = self.job
        return read_config(
            job.model.checkpoint,
            lambda values: TransformerConfig.from_metadata(values, video=job.pipeline.makes_picture, audio=job.sound),
        )

    @property
    def transformer_bytes(self) -> int:
        """What is resident; streamed blocks are not."""
        blocks, around = self.blocks
        return around.total + (0 if streams_weights(self.job) else blocks.total)

    # Text

    @cached_property
    def gemma(self) -> GemmaConfig:
        return read_gemma_config(self.job.model.files.text_encoder)[0]

    @property
    def text_dtype(self) -> mx.Dtype:
        return text_model_dtype(self.job)

    @cached_property
    def tokenizer(self) -> PromptTokenizer:
        folder = self.job.model.files.text_encoder
        return load_tokenizer(folder, read_gemma_config(folder)[1])

    @cached_property
    def tokens(self) -> list[int]:
        """Of every text; of one that is yet to be written, as many as may be."""
        if self.job.request.enhance_prompt:
            return [LIMIT] * len(self.job.prompts)
        return [int(np.array(self.tokenizer(prompt).mask).sum()) for prompt in self.job.prompts]

    @cached_property
    def connectors(self) -> TextConnectors:
        return read_config(self.job.model.checkpoint, TextConnectors.from_metadata)

    @property
    def text_bytes(self) -> int:
        """One embedded text."""
        dims = self.connectors.video.config.dim + self.connectors.audio.config.dim
        return self.tokenizer.length * dims * self.dtype.size

    def enhance(self) -> Need:
        layer = networks.reading_work(self.gemma, self.tokenizer.length, self.text_dtype)
        return Need(self.gemma_weights.total + layer, self.text_kind, "layers, tokens")

    def read(self) -> Need:
        states = sum(networks.states_bytes(self.gemma, tokens, self.text_dtype) for tokens in self.tokens)
        layer = networks.reading_work(self.gemma, max(self.tokens), self.text_dtype)
        peak = self.gemma_weights.total + self.gemma_weights.reading + states + layer
        return Need(peak, self.text_kind, "layers")

    def embed(self) -> Need:
        gemma, tokens = self.gemma, max(self.tokens)
        features, connectors = self.weights(keymaps.TEXT_PROJECTION), self.weights(keymaps.CONNECTORS)
        wide = 4 * tokens * gemma.hidden_size * gemma.hidden_states
        rows = 0 if self.dtype == mx.float32 else 4 * ROWS_AT_ONCE * gemma.hidden_size * gemma.hidden_states
        peak = features.total + features.reading + max(2 * wide, wide + rows)
        done = 0
        for connector in (self.connectors.video, self.connectors.audio):
            done += module_bytes(connector, self.dtype)
            reading = connectors.reading
            work = networks.connector_work(connector, self.tokenizer.length, self.dtype)
            peak = max(peak, features.total + done + reading + work)
        others = (len(self.job.prompts) - 1) * self.text_bytes
        return Need(peak + others, DTYPES[self.dtype], "blocks")

    # Encoding

    def encode(self, clip: ClipShape, given: int = 4) -> Need:
        """Frames of a clip, read as the encoder takes them; ``given`` are the bytes of a number that comes."""
        vae = self.job.model.video_vae
        own = self.weights(keymaps.VIDEO_ENCODER)
        work = encoding_work(vae, clip.height, clip.width, self.dtype, frames=clip.frames)
        count = min(clip.frames, frames_at_once(clip.height, clip.width, vae.time_scale))
        # the frames that came last, and those before them as patches
        held = count * 3 * clip.height * clip.width * (given + self.dtype.size)
        return Need(own.total + work + held, DTYPES[self.dtype], "frames, rows")

    def source(self) -> ClipShape:
        """The clip that is worked on, on the grid."""
        request, model = self.job.request, self.job.model
        if self.job.pipeline is upscale.PIPELINE:
            return upscale.canvas(upscale.source_of(request), model)
        return self.clip

    def references(self) -> Need:
        scale = reference_scale(self.job)
        clip = ic_lora.stages(self.job)[0] if self.job.pipeline is ic_lora.PIPELINE else self.clip
        frames = (clip.frames - 1) // scale.time + 1
        return self.encode(ClipShape(frames, clip.height // scale.size, clip.width // scale.size, clip.fps))

    def encode_sound(self) -> Need:
        config = self.job.model.audio_vae
        own = self.weights(keymaps.AUDIO_ENCODER)
        seconds = self.clip.duration
        mel = math.ceil(seconds * config.sampling_rate / config.hop_length) + 4
        samples = round(seconds * config.sampling_rate)
        spectrum = 4 * 2 * mel * (config.n_fft + 3 * (config.n_fft // 2 + 1)) + 3 * 8 * samples
        encoding = networks.audio_encoding_work(config, mel, self.dtype)
        return Need(max(spectrum, own.total + own.reading + encoding), DTYPES[self.dtype], "-")

    # Denoising

    def load(self) -> Need:
        blocks, around = self.blocks
        if streams_weights(self.job):
            return Need(around.total + around.reading, self.transformer_kind, "-")
        reading = max(blocks.reading, around.reading) + self.fusing(self.job.loras.first)
        return Need(blocks.total + around.total + reading, self.transformer_kind, "blocks")

    def change(self) -> Need:
        # what changes is given up before it is read anew
        work = self.blocks[0].reading + self.fusing(self.job.loras.second)
        return Need(work, self.transformer_kind, "blocks")

    def fusing(self, loras: Sequence[Lora]) -> int:
        """What changing a block takes beside its weights: the low-rank factors, and the change of one layer."""
        layers = [layer for lora in loras for layer in lora.file.layers.values()]
        largest = max((layer.inputs * layer.outputs for layer in layers), default=0)
        factors = sum(layer.rank * (layer.inputs + layer.outputs) for layer in layers)
        return self.dtype.size * largest + 4 * factors // self.job.model.transformer.layers

    def denoise(self, clip: ClipShape, guided: bool, tiles: tuple[int, int] | None = None) -> Need:
        job, grids = self.job, self.job.grids(clip)
        video = audio = None
        if grids.video is not None:
            video = self.video_tokens(clip, grids.video)
        if grids.audio is not None:
            audio = Tokens(grids.audio.frames, timed=bool(job.request.segments))
        passes = len(job.guidance.passes()) if job.guidance is not None and guided else 1
        segments = max(1, len(job.request.segments))
        chunking = "blocks, streamed" if streams_weights(job) else "blocks"
        kept = Kept(cached=bool(job.request.step_cache))
        if tiles is not None and video is not None and grids.video is not None:
            whole = video.number
            largest = largest_tile(grids.video.height, grids.video.width, *tiles) * grids.video.frames
            video = video._replace(number=whole - grids.video.tokens + largest)
            kept = kept._replace(tiles=math.prod(tiles), latents=whole * grids.video.channels)
            chunking = f"{kept.tiles} tiles, {chunking}"
        text = segments * self.tokenizer.length
        work = networks.denoising_work(self.transformer, video, audio, text, passes, self.dtype, kept)
        streamed = 0
        if streams_weights(job):
            streamed = STREAMED_BLOCKS * self.blocks[0].total // job.model.transformer.layers + self.blocks[0].reading
        return Need(work + streamed, self.transformer_kind, chunking)

    def video_tokens(self, clip: ClipShape, grid: VideoGrid) -> Tokens:
        """Of the clip, of images that stand beside it, and of references."""
        request, frame = self.job.request, grid.height * grid.width
        beside = [image for image in request.images if image.frame or self.job.pipeline.name == "keyframes"]
        given = len(beside) * frame
        count = len(request.video_conditionings) + (request.reference_video is not None)
        if count and REFERENCES in self.names:
            scale = reference_scale(self.job)
            frames = math.ceil((clip.frames - 1) / (scale.time * self.job.model.video_vae.time_scale)) + 1
            given += count * frames * (grid.height // scale.size) * (grid.width // scale.size)
        levels = 2 if request.images or count or request.video_path else 1
        weaker = request.attention_mask is not None or request.attention_strength not in (None, 1.0)
        return Tokens(grid.tokens + given, levels, weaker, bool(request.segments))

    def latents(self, clip: ClipShape) -> int:
        grids = self.job.grids(clip)
        video = grids.video.tokens * grids.video.channels if grids.video else 0
        audio = grids.audio.frames * grids.audio.bins * grids.audio.channels if grids.audio else 0
        return 4 * (video + audio) * len(self.job.shots)

    def upsample(self) -> Need:
        request, model = self.job.request, self.job.model
        if self.job.pipeline is upscale.PIPELINE:
            file = upscale.upsampler_file(request, model)
            given = self.source()
        else:
            assert model.files.spatial_upsampler is not None
            file, given = SafetensorsFile(model.files.spatial_upsampler), self.clip.halved()
        config = read_config(file, UpsamplerConfig.from_metadata)
        own = self.weights(keymaps.UPSAMPLER, file=file)
        grid = self.job.grids(given).video
        assert grid is not None
        work = networks.upsampling_work(config, grid, self.dtype)
        return Need(own.total + own.reading + work, DTYPES[self.dtype], "-")

    # Decoding

    def decode_sound(self) -> Need:
        config = self.job.model
        grid = self.job.grids(self.clip).audio
        assert grid is not None
        mel = 4 * grid.frames - 3
        decoding = self.audio_decoder.total + networks.audio_decoding_work(config.audio_vae, grid, self.dtype)
        vocoding = self.audio_decoder.total + self.vocoder.total + networks.vocoding_work(config.vocoder, mel)
        seconds = CHUNK_FRAMES * config.audio_vae.hop_length / config.audio_vae.sampling_rate
        return Need(max(decoding, vocoding), "float32", f"{seconds:g} s")

    def decode_picture(self) -> Need:
        job, clip = self.job, self.clip
        dtype, vae = mx.float32 if job.request.hdr is not None else self.dtype, job.model.video_vae
        if job.request.vae_tiling == "reference":
            work = tiled_decoding_work(vae, clip.height, clip.width, dtype, clip.frames)
            chunking = "blended tiles"
        else:
            work = decoding_work(vae, clip.height, clip.width, dtype, bands=job.bands, frames=clip.frames)
            chunking = "frames, rows" if vae.local_decoder else "rows, up to a norm of the whole clip"
            if job.bands > 1:
                chunking = f"{job.bands} bands ({band_cost(vae, clip.height, job.bands):.2f} x the work), {chunking}"
        # frames go out as float32
        outgoing = 2 * 4 * 3 * clip.height * clip.width
        return Need(self.video_decoder.total + work + outgoing, DTYPES[dtype], chunking)
