"""The convolutional video autoencoder of LTX-2: video to latents and back (ltx_core/model/video_vae).

Both directions are chains of stages (``mlx_ltx.models.streaming``), so decoding frame by frame and decoding at once
are the same computation; see :meth:`VideoDecoder.stream`.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_ltx.models.statistics import ChannelStatistics
from mlx_ltx.models.streaming import (
    ELEMENTS_PER_PIECE,
    Rows,
    Stage,
    chain,
    crop,
    cut,
    feed,
    frames,
    reach,
    run,
    together,
)
from mlx_ltx.models.timestep import TimestepEmbedder
from mlx_ltx.models.video_vae_blocks import (
    Conditions,
    ConvStage,
    Downsample,
    Factors,
    Modulation,
    Noise,
    PaddedConv,
    ResnetBlock,
    ResnetGroup,
    Upsample,
    activate,
    modulations,
    patchify,
    unpatchify,
)

DECODE_TIMESTEP = 0.05
DECODE_NOISE_SCALE = 0.025

FACTORS: dict[str, Factors] = {"compress_time": (2, 1, 1), "compress_space": (1, 2, 2), "compress_all": (2, 2, 2)}
# Which kinds of block there are, with the options that each reads and their defaults (None: it has to be given).
ENCODER_BLOCKS: dict[str, dict[str, Any]] = {
    "res_x": {"num_layers": None},
    "res_x_y": {"multiplier": 2},
    **{kind: {} for kind in FACTORS},
    "compress_all_x_y": {"multiplier": 2},
    **{f"{kind}_res": {"multiplier": 2} for kind in FACTORS},
}
DECODER_BLOCKS: dict[str, dict[str, Any]] = {
    "res_x": {"num_layers": None, "inject_noise": False},
    "res_x_y": {"multiplier": 2},
    "compress_time": {"multiplier": 1},
    "compress_space": {"multiplier": 1},
    "compress_all": {"multiplier": 1, "residual": False},
}


@dataclass(frozen=True)
class Block:
    """One entry of a block list: its kind and those options that the kind reads."""

    kind: str
    layers: int = 1
    multiplier: int = 1
    inject_noise: bool = False
    residual: bool = False

    @property
    def factors(self) -> Factors:
        """How many frames, rows and columns the block turns into one (encoder) or makes of one (decoder)."""
        return next((factors for name, factors in FACTORS.items() if self.kind.startswith(name)), (1, 1, 1))

    @classmethod
    def parse(cls, where: str, entry: Any, known: Mapping[str, Mapping[str, Any]]) -> Block:
        """``[kind, options]``, or ``[kind, layers]``.

        Raises:
            ValueError: the kind or an option is not supported.
        """
        kind, given = entry
        options = {"num_layers": given} if isinstance(given, int) else dict(given)
        if kind not in known:
            raise ValueError(f"{where}: block {kind!r} is not supported (known: {', '.join(known)})")
        layers = options.get("num_layers", known[kind].get("num_layers", 1))
        if not isinstance(layers, int):
            raise ValueError(f"{where}: num_layers = {layers!r} of block {kind!r} is not supported")
        options.pop("num_layers", None)  # the short form of an entry, [kind, 1], gives it to any kind
        for name, value in options.items():
            nothing = value is None or value is False or (name, value) == ("multiplier", 1)
            if name not in known[kind] and not nothing:
                raise ValueError(f"{where}: {name} = {value!r} of block {kind!r} is not supported")
        values = {name: options.get(name, default) for name, default in known[kind].items() if name != "num_layers"}
        return cls(kind, layers, **values)


@dataclass(frozen=True)
class VideoVaeConfig:
    """What a checkpoint says of its convolutional video autoencoder.

    Attributes:
        latent_channels: channels of a latent.
        encoder_blocks, decoder_blocks: in the order in which they run (files list the decoder's from the pixel side).
        encoder_padding, decoder_padding: what surrounds frames in space: ``"zeros"``, ``"reflect"``, ``"replicate"``.
        causal_decoder: whether the decoder sees no later frame.
        timestep_conditioning: whether the decoder removes a little noise that is added to its input.
        decoder_base_channels: width of the decoder's last blocks.
        variance_channels: what the encoder gives beside the means, and we ignore.
        patch_size: pixels of a patch's side that become channels around the blocks.
    """

    latent_channels: int
    encoder_blocks: tuple[Block, ...]
    decoder_blocks: tuple[Block, ...]
    encoder_padding: str = "zeros"
    decoder_padding: str = "reflect"
    causal_decoder: bool = False
    timestep_conditioning: bool = True
    decoder_base_channels: int = 128
    variance_channels: int = 1
    patch_size: int = 4
    image_channels: int = 3

    @classmethod
    def from_metadata(cls, config: Mapping[str, Any]) -> VideoVaeConfig:
        """Read the section ``vae`` of a checkpoint's config.

        Raises:
            ValueError: it is missing, or asks for something that is not supported.
        """
        vae = config.get("vae")
        if not isinstance(vae, Mapping):
            raise ValueError("vae is missing from the config")
        only = {
            "_class_name": "CausalVideoAutoencoder",
            "dims": 3,
            "norm_layer": "pixel_norm",
            "scaling_factor": 1.0,
            "use_quant_conv": False,
            "normalize_latent_channels": False,
            "in_channels": 3,
            "out_channels": 3,
        }
        for name, value in only.items():
            _choose(vae, name, value, [value])
        paddings = ["zeros", "reflect", "replicate"]
        latent_channels = vae.get("latent_channels", 128)
        variances = {"uniform": 1, "constant": 1, "per_channel": latent_channels}
        encoder_default = vae.get("encoder_spatial_padding_mode", "zeros")
        result = cls(
            latent_channels=latent_channels,
            encoder_blocks=_blocks(vae, "encoder_blocks", ENCODER_BLOCKS),
            decoder_blocks=_blocks(vae, "decoder_blocks", DECODER_BLOCKS)[::-1],
            encoder_padding=_choose(vae, "spatial_padding_mode", encoder_default, paddings),
            decoder_padding=_choose(vae, "spatial_padding_mode", "reflect", paddings),
            causal_decoder=vae.get("causal_decoder", False),
            timestep_conditioning=vae.get("timestep_conditioning", True),
            decoder_base_channels=vae.get("decoder_base_channels", 128),
            variance_channels=variances[_choose(vae, "latent_log_var", "uniform", list(variances))],
            patch_size=vae.get("patch_size", 4),
        )
        if _product(result.encoder_blocks) != _product(result.decoder_blocks):
            raise ValueError("vae.encoder_blocks and vae.decoder_blocks do not have the same scale")
        return result

    @property
    def time_scale(self) -> int:
        """Frames per latent frame, after the first: 1 + k * time_scale frames have 1 + k latent frames."""
        return _product(self.encoder_blocks)[0]

    @property
    def local_decoder(self) -> bool:
        """Whether a frame depends on the latents near it only; a block ``res_x_y`` has a norm over the whole clip."""
        return all(block.kind != "res_x_y" for block in self.decoder_blocks)

    @property
    def space_scale(self) -> int:
        """Pixels of a latent's side."""
        return _product(self.encoder_blocks)[1] * self.patch_size


def _choose(section: Mapping[str, Any], name: str, default: Any, allowed: list[Any]) -> Any:
    value = section.get(name, default)
    if value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ValueError(f"vae.{name} = {value!r} is not supported (supported: {choices})")
    return value


def _blocks(section: Mapping[str, Any], name: str, known: Mapping[str, Mapping[str, Any]]) -> tuple[Block, ...]:
    if not section.get(name):
        raise ValueError(f"vae.{name} is missing from the config")
    return tuple(Block.parse(f"vae.{name}", entry, known) for entry in section[name])


def _product(blocks: Iterable[Block]) -> Factors:
    time, height, width = zip(*(block.factors for block in blocks), strict=True)
    return math.prod(time), math.prod(height), math.prod(width)


class VideoEncoder(nn.Module):
    """Video to normalised latents: the means of the distribution that the network predicts."""

    def __init__(self, config: VideoVaeConfig):
        super().__init__()
        self.config = config
        padding = config.encoder_padding
        # The first width is the latent's, not encoder_base_channels (ltx_core/model/video_vae/video_vae.py).
        channels = config.latent_channels
        self.conv_in = PaddedConv(config.image_channels * config.patch_size**2, channels, padding)
        self.down_blocks: list[ResnetGroup | ResnetBlock | PaddedConv | Downsample] = []
        for block in config.encoder_blocks:
            wider = channels * block.multiplier
            if block.kind == "res_x":
                self.down_blocks.append(ResnetGroup(channels, block.layers, padding))
            elif block.kind == "res_x_y":
                self.down_blocks.append(ResnetBlock(channels, wider, padding))
            elif block.kind.endswith("_res"):
                self.down_blocks.append(Downsample(channels, wider, block.factors, padding))
            else:
                self.down_blocks.append(PaddedConv(channels, wider, padding, stride=block.factors))
            channels = wider
        self.conv_out = PaddedConv(channels, config.latent_channels + config.variance_channels, padding)
        self.statistics = ChannelStatistics(config.latent_channels)

    def __call__(self, video: mx.array) -> mx.array:
        """Encode a clip that is there as one array; see :meth:`stream`.

        Returns:
            (B, 1 + k, H / space_scale, W / space_scale, latent_channels), normalised, in the dtype of the weights.
        """
        self.check_frames(video.shape[1])
        return mx.concatenate(list(self.stream([video])), axis=1)

    def stream(self, clip: Iterable[mx.array], *, elements: int | None = ELEMENTS_PER_PIECE) -> Iterator[mx.array]:
        """Encode a clip while it comes.

        Memory does not grow with the number of frames, except that a block ``res_x_y``, whose norm covers the whole
        clip, waits for all of them.

        Args:
            clip: arrays (B, n, H, W, 3) in [-1, 1] with n >= 1; together they have 1 + k * time_scale frames, and H and
                W are multiples of ``space_scale``. For small pictures a latent frame's worth at a time is faster than
                single frames.
            elements: see :func:`mlx_ltx.models.streaming.run`.

        Yields:
            the next latents, (B, n, H / space_scale, W / space_scale, latent_channels), evaluated, normalised, in the
            dtype of the weights.

        Raises:
            ValueError: the clip has another size or, as soon as it is over, another number of frames.
        """
        stages = list(itertools.chain.from_iterable(self.chains()))
        return run(stages, self._patches(clip), elements)

    def _patches(self, clip: Iterable[mx.array]) -> Iterator[mx.array]:
        frames = 0
        for video in clip:
            self.check_size(*video.shape[2:4])
            frames += video.shape[1]
            yield patchify(video.astype(self.conv_in.conv.weight.dtype), self.config.patch_size)
        self.check_frames(frames)

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError if such frames cannot be encoded."""
        space = self.config.space_scale
        if height % space or width % space or not height * width:
            raise ValueError(f"frames of {width}x{height} cannot be encoded, only multiples of {space}")
        if self.config.encoder_padding == "reflect" and min(height, width) < 2 * space:
            raise ValueError(f"frames of {width}x{height} are too small, {2 * space}x{2 * space} is the least")

    def check_frames(self, frames: int) -> None:
        """Raise ValueError if a clip of so many frames cannot be encoded."""
        time = self.config.time_scale
        if frames % time != 1 % time or frames < 1:
            raise ValueError(f"{frames} frames cannot be encoded, only 1 + a multiple of {time}")

    def chains(self) -> list[list[Stage]]:
        """Fresh stages for one clip, from patches to normalised latents: first convolution, blocks, last one."""
        conditions = Conditions(causal=True)
        last = ConvStage(self.conv_out, True, before=activate, after=self._means)
        return [
            self.conv_in.stages(conditions),
            *(block.stages(conditions) for block in self.down_blocks),
            [last],
        ]

    def _means(self, x: mx.array) -> mx.array:
        return self.statistics.normalize(x[..., : self.config.latent_channels])


class FrameQueue(Protocol):
    """Where frames wait; first in, first out."""

    def append(self, frame: mx.array, /) -> None: ...

    def popleft(self) -> mx.array: ...


class VideoDecoder(nn.Module):
    """Normalised latents to video."""

    def __init__(self, config: VideoVaeConfig):
        super().__init__()
        self.config = config
        padding, timed = config.decoder_padding, config.timestep_conditioning
        channels = config.decoder_base_channels * math.prod(block.multiplier for block in config.decoder_blocks)
        self.conv_in = PaddedConv(config.latent_channels, channels, padding)
        self.up_blocks: list[ResnetGroup | ResnetBlock | Upsample] = []
        for block in config.decoder_blocks:
            narrower = channels // block.multiplier
            if block.kind == "res_x":
                self.up_blocks.append(ResnetGroup(channels, block.layers, padding, block.inject_noise, timed))
            elif block.kind == "res_x_y":
                self.up_blocks.append(ResnetBlock(channels, narrower, padding))
            else:
                self.up_blocks.append(Upsample(channels, block.factors, block.multiplier, padding, block.residual))
            channels = narrower
        self.conv_out = PaddedConv(channels, config.image_channels * config.patch_size**2, padding)
        self.statistics = ChannelStatistics(config.latent_channels)
        if timed:
            self.timestep_scale_multiplier = mx.array(1000.0)
            self.last_time_embedder = TimestepEmbedder(2 * channels)
            self.last_scale_shift_table = mx.zeros((2, channels))

    def __call__(
        self, latent: mx.array, timestep: mx.array | float | None = None, noise: Noise | None = None
    ) -> mx.array:
        """Decode a clip into one array; see :meth:`stream` for the arguments and for large clips.

        Returns:
            (B, 1 + (F - 1) * time_scale, H * space_scale, W * space_scale, 3), nominally in [-1, 1].
        """
        return mx.concatenate(list(self.stream(latent, timestep, noise)), axis=1)

    def stream(
        self,
        latent: mx.array,
        timestep: mx.array | float | None = None,
        noise: Noise | None = None,
        *,
        bands: int = 1,
        aside: Callable[[], FrameQueue] = deque,
        elements: int | None = ELEMENTS_PER_PIECE,
    ) -> Iterator[mx.array]:
        """Decode a clip from its first frame to its last.

        The result depends neither on ``elements`` nor on ``bands``. Memory does not grow with the number of frames,
        except that a block ``res_x_y``, whose norm covers the whole clip, waits for all of them (no published decoder
        has one). Nothing is computed twice with a single band.

        Several bands are for small machines: the picture's upper part is decoded first, from the first frame to the
        last, then the next, so that the layers keep frames of a band only. Each band reads as many more rows of latents
        as its pixels depend on (:attr:`halo`), which is work done twice. What is ready waits in a queue for the rest.

        Args:
            latent: (B, F, H, W, latent_channels), normalised, of any floating-point dtype.
            timestep: in [0, 1], one or (B,); how much noise a decoder with timestep conditioning takes its input to
                have (default 0.05, as in the reference).
            noise: draws standard normal values; called with (B, F, H, W, latent_channels) under timestep
                conditioning, then with (h, w) for every layer that adds noise, in order.
            bands: into how many parts, one above the other, the picture is split.
            aside: makes a queue for single frames (B, 1, h, W * space_scale, 3) of every band but the last; by default
                in memory.
            elements: see :func:`mlx_ltx.models.streaming.run`.

        Yields:
            the next frames, (B, n, H * space_scale, W * space_scale, 3), evaluated, in the dtype of the weights. With
            several bands, first an array of no frames for every frame that goes aside: a sign of life.

        Raises:
            ValueError: noise is needed and not given, a timestep is given and not needed, frames are too small, or the
                picture cannot be split into so many bands.
        """
        x, conditions = self.prepare(latent, timestep, noise)
        if bands == 1:
            return run(list(itertools.chain.from_iterable(self.chains(conditions))), [x], elements)
        if not 1 <= bands <= x.shape[2]:
            raise ValueError(f"{x.shape[2]} rows of latents cannot be split into {bands} bands")
        if not self.config.local_decoder:
            raise ValueError("a decoder with a norm over the whole clip cannot decode the picture in bands")
        return self._stream_bands(x, conditions, bands, aside, elements)

    @property
    def halo(self) -> int:
        """How many rows of latents above and below its own a row of pixels depends on, at most."""
        return reach(list(itertools.chain.from_iterable(self.chains(self.no_conditions()))))

    def band_rows(self, height: int, bands: int) -> list[tuple[Rows, Rows]]:
        """For each band of a picture of ``height`` rows of latents, the rows that it gives and those that it reads."""
        edges = [height * i // bands for i in range(bands + 1)]
        return [
            (Rows(a, b, height), Rows(max(0, a - self.halo), min(height, b + self.halo), height))
            for a, b in itertools.pairwise(edges)
        ]

    def _stream_bands(
        self,
        x: mx.array,
        conditions: Conditions,
        bands: int,
        aside: Callable[[], FrameQueue],
        elements: int | None,
    ) -> Iterator[mx.array]:
        draws: list[mx.array] = []
        queues = [aside() for _ in range(bands - 1)]
        for band, (given, read) in enumerate(self.band_rows(x.shape[2], bands)):
            noise = None if conditions.noise is None else _replayed(conditions.noise, draws)
            stages = itertools.chain.from_iterable(self.chains(conditions._replace(noise=noise)))
            pieces = chain(list(stages), feed([x[:, :, read.first : read.stop]], read), elements)
            pixels = given.times(self.config.space_scale)
            for part in frames(crop(pieces, pixels.first, pixels.stop)):
                count = part.shape[1]
                if band < bands - 1:
                    for index in range(count):
                        queues[band].append(cut(part, 1, index, index + 1))
                        yield mx.zeros((x.shape[0], 0, pixels.height, *part.shape[3:]), part.dtype)
                else:
                    above = [together([queue.popleft() for _ in range(count)], 1) for queue in queues]
                    whole = together([*above, part], 2)
                    mx.eval(whole)
                    del part, above
                    yield whole
                    del whole

    def prepare(
        self, latent: mx.array, timestep: mx.array | float | None = None, noise: Noise | None = None
    ) -> tuple[mx.array, Conditions]:
        """What the first stage is given, and what all stages share; the arguments are those of :meth:`stream`."""
        config = self.config
        draws = config.timestep_conditioning or any(block.inject_noise for block in config.decoder_blocks)
        if draws and noise is None:
            raise ValueError("this decoder adds noise, so it needs a source of noise")
        if timestep is not None and not config.timestep_conditioning:
            raise ValueError("this decoder has no timestep conditioning")
        if config.decoder_padding == "reflect" and min(latent.shape[2:4]) < 2:
            raise ValueError("latents with a side of 1 cannot be decoded with padding by reflection")
        if config.timestep_conditioning:
            assert noise is not None
            added = noise(tuple(latent.shape)).astype(latent.dtype)
            latent = DECODE_NOISE_SCALE * added + (1 - DECODE_NOISE_SCALE) * latent
            times = mx.array(DECODE_TIMESTEP if timestep is None else timestep, dtype=mx.float32)
            scaled = mx.broadcast_to(times, (latent.shape[0],)) * self.timestep_scale_multiplier.astype(mx.float32)
        else:
            scaled = None
        x = self.statistics.denormalize(latent).astype(self.conv_in.conv.weight.dtype)
        return x, Conditions(config.causal_decoder, scaled, noise)

    def no_conditions(self) -> Conditions:
        """For stages that are built to be counted, not run."""
        timed = self.config.timestep_conditioning
        return Conditions(self.config.causal_decoder, mx.zeros(1) if timed else None)

    def chains(self, conditions: Conditions) -> list[list[Stage]]:
        """Fresh stages for one clip, from latents to pixels: first convolution, blocks, last one."""
        before: Callable[[mx.array], mx.array] = activate
        if conditions.timestep is not None:
            embedding = self.last_time_embedder(conditions.timestep)
            modulation: Modulation = modulations(self.last_scale_shift_table, embedding)[0]
            before = partial(activate, modulation=modulation)
        after = partial(unpatchify, size=self.config.patch_size)
        return [
            self.conv_in.stages(conditions),
            *(block.stages(conditions) for block in self.up_blocks),
            [ConvStage(self.conv_out, conditions.causal, before, after, self.config.patch_size)],
        ]


def _replayed(noise: Noise, draws: list[mx.array]) -> Noise:
    """The draws of a run before in their order, then new ones, which are remembered."""
    begun = iter(list(draws))

    def draw(shape: tuple[int, ...]) -> mx.array:
        drawn = next(begun, None)
        if drawn is None:
            drawn = noise(shape)
            draws.append(drawn)
        return drawn

    return draw
