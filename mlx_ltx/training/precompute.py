"""Media and captions to latents and text embeddings, once; what is there already is kept."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_ltx.checkpoints.components import (
    load_audio_encoder,
    load_connectors,
    load_text_features,
    load_video_encoder,
)
from mlx_ltx.checkpoints.files import SafetensorsFile, read_json
from mlx_ltx.checkpoints.gemma import load_gemma
from mlx_ltx.checkpoints.writing import write_safetensors
from mlx_ltx.errors import UserError
from mlx_ltx.events import DataSetFinished, Event, Phase, PhaseStarted, Planned, Progress, Warned
from mlx_ltx.media.atomic import atomic_output
from mlx_ltx.media.audio import read_sound
from mlx_ltx.media.clips import read_clip
from mlx_ltx.media.fit import fit_image
from mlx_ltx.media.images import load_image
from mlx_ltx.models.audio_vae import DOWNSAMPLING, AudioVaeConfig
from mlx_ltx.models.text_encoder import TextEncoder
from mlx_ltx.models.video_vae import VideoVaeConfig
from mlx_ltx.pipelines.encode import encode_whole
from mlx_ltx.pipelines.job import Model, open_model
from mlx_ltx.pipelines.sources import sound_latent
from mlx_ltx.request import Request
from mlx_ltx.sampling.geometry import AudioGrid, nearest_frame_counts, nearest_multiples
from mlx_ltx.training.captions import IMAGES, Item, find_items
from mlx_ltx.training.config import TrainingConfig
from mlx_ltx.training.dataset import DESCRIPTION, LATENTS, TEXTS, text_name

READ, ENCODE = "embed-captions", "encode-media"


@dataclass(frozen=True)
class Bucket:
    """A size that clips are brought to, in pixels and frames."""

    width: int
    height: int
    frames: int

    def distance(self, height: int, width: int) -> tuple[float, int, int]:
        """How badly a clip of this size fits: its proportions first; then fewer frames, then a smaller area."""
        proportions = abs(math.log(width / height) - math.log(self.width / self.height))
        return proportions, -self.frames, -self.width * self.height


def parse_buckets(texts: tuple[str, ...], vae: VideoVaeConfig, downscale: int = 1) -> list[Bucket]:
    """The buckets of ``data.resolution_buckets``.

    Args:
        downscale: how many times smaller references are, which have to be on the model's grid, too.

    Raises:
        UserError: one is not "WIDTHxHEIGHTxFRAMES", or not on the model's grid.
    """
    name = "data.resolution_buckets"
    multiple = vae.space_scale * downscale
    buckets = []
    for text in texts:
        sizes = text.lower().split("x")
        if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
            raise UserError(f"{name}: {text} must be WIDTHxHEIGHTxFRAMES, as 768x512x49")
        bucket = Bucket(*map(int, sizes))
        for what, value in (("width", bucket.width), ("height", bucket.height)):
            if value % multiple:
                nearest = " or ".join(map(str, nearest_multiples(value, multiple)))
                raise UserError(f"{name}: {text}: its {what} must be a multiple of {multiple}, as {nearest}")
        if (bucket.frames - 1) % vae.time_scale:
            nearest = " or ".join(map(str, nearest_frame_counts(bucket.frames, vae.time_scale)))
            raise UserError(f"{name}: {text}: its frames must be {vae.time_scale}k + 1, as {nearest}")
        buckets.append(bucket)
    if not buckets:
        raise UserError(f"{name}: must hold at least one size")
    return buckets


def choose_bucket(buckets: list[Bucket], frames: int, height: int, width: int) -> Bucket | None:
    """The bucket that a clip fits best; None if it is too short for all."""
    return min(
        (bucket for bucket in buckets if bucket.frames <= frames),
        key=lambda bucket: bucket.distance(height, width),
        default=None,
    )


def precompute(config: TrainingConfig, strict: bool = False) -> Iterator[Event]:
    """Fill ``data.preprocessed_data_root``; interrupted, it goes on where it stopped.

    Args:
        strict: refuse the first file that cannot be used, instead of leaving such files out with a warning.

    Raises:
        UserError: before the first event, for mistakes in the config; then for files and the disk.
    """
    if config.data.dataset is None:
        raise UserError("data.dataset: is missing; precompute needs the folder of media")
    model = open_model(Request(model=config.model.model_path, text_encoder=config.model.text_encoder_path))
    strategy = config.training_strategy
    buckets = (
        parse_buckets(config.data.resolution_buckets, model.video_vae, config.data.reference_downscale_factor)
        if strategy.video
        else []
    )
    items = find_items(Path(config.data.dataset), not strategy.video, strategy.name == "video_to_video")
    return _Preparing(config, model, buckets, items, strict).run()


class _Preparing:
    def __init__(
        self, config: TrainingConfig, model: Model, buckets: list[Bucket], items: list[Item], strict: bool
    ) -> None:
        self.config, self.model, self.buckets, self.items, self.strict = config, model, buckets, items, strict
        self.dtype = config.acceleration.dtype
        self.folder = Path(config.data.preprocessed_data_root)
        self.skipped = 0

    def run(self) -> Iterator[Event]:
        started = time.perf_counter()
        self._describe()
        captions = list(dict.fromkeys(item.caption for item in self.items))
        unread = [caption for caption in captions if not (self.folder / TEXTS / text_name(caption)).is_file()]
        missing = [item for item in self.items if not self._is_done(item)]
        phases = [
            Phase(READ, f"Embedding {len(unread)} of {len(captions)} captions", len(unread), "captions"),
            Phase(ENCODE, f"Encoding {len(missing)} of {len(self.items)} files", len(missing), "files"),
        ]
        yield Planned(tuple(phases))
        yield PhaseStarted(0, phases[0])
        yield from self._embed(unread)
        mx.clear_cache()
        yield PhaseStarted(1, phases[1])
        yield from self._encode(missing)
        known = {self._path(item).name for item in self.items}
        stale = [path for path in (self.folder / LATENTS).glob("*.safetensors") if path.name not in known]
        for path in stale:
            path.unlink()
        if stale:
            what = "1 sample that is" if len(stale) == 1 else f"{len(stale)} samples that are"
            yield Warned(f"deleted {what} no longer in {self.config.data.dataset}")
        if self.skipped:
            yield Warned(f"{self.skipped} of {len(self.items)} files were skipped")
        samples = sum(self._path(item).is_file() for item in self.items)
        if samples == 0:
            raise UserError(
                f"data.dataset: none of the {len(self.items)} files in {self.config.data.dataset} is usable"
            )
        yield DataSetFinished(self.folder, samples, self.skipped, time.perf_counter() - started)

    def _describe(self) -> None:
        """Write what the data set is made with, or check that it is what it was."""
        vae, audio, data = self.model.video_vae, self.model.audio_vae, self.config.data
        description: dict[str, Any] = {
            "model": self.model.checkpoint.path.name,
            "text_encoder": self.model.files.text_encoder.name,
            "dtype": self.config.acceleration.mixed_precision_mode,
            "strategy": self.config.training_strategy.name,
            "video": {
                "time_scale": vae.time_scale,
                "space_scale": vae.space_scale,
                "frame_rate": data.frame_rate,
                "buckets": [f"{each.width}x{each.height}x{each.frames}" for each in self.buckets],
            },
            "audio": {
                "rate": audio.sampling_rate,
                "hop": audio.hop_length,
                "scale": DOWNSAMPLING,
                "duration": None if self.config.training_strategy.video else data.audio_duration,
                "with_video": self.config.training_strategy.with_audio,
            },
            "reference_downscale_factor": data.reference_downscale_factor,
        }
        path = self.folder / DESCRIPTION
        if path.is_file():
            before = read_json(path)
            different = next((key for key in description if before.get(key) != description[key]), None)
            if different is not None:
                raise UserError(
                    f"data.preprocessed_data_root: {self.folder} holds a data set that was made with another "
                    f"{different}; give another folder, or delete that one"
                )
            return
        with atomic_output(path) as partial:
            partial.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    def _path(self, item: Item) -> Path:
        """The file of a sample: named after its source, and told from others of that name or with another caption."""
        digest = hashlib.sha256(f"{item.path.absolute()}\n{item.caption}".encode()).hexdigest()[:12]
        return self.folder / LATENTS / f"{item.path.stem[:80]}-{digest}.safetensors"

    @staticmethod
    def _metadata(item: Item) -> dict[str, str]:
        files = [path for path in (item.path, item.reference) if path is not None]
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return {"text": text_name(item.caption), "source": json.dumps(stats)}

    def _is_done(self, item: Item) -> bool:
        path = self._path(item)
        if not path.is_file():
            return False
        metadata = SafetensorsFile(path).metadata
        return all(metadata.get(name) == value for name, value in self._metadata(item).items())

    def _embed(self, captions: list[str]) -> Iterator[Event]:
        if not captions:
            return
        dtype = self.dtype
        gemma, tokenizer = load_gemma(self.model.files.text_encoder, dtype)
        features = load_text_features(self.model.checkpoint, gemma.config, dtype)
        encoder = TextEncoder(gemma, features, load_connectors(self.model.checkpoint, dtype))
        for done, caption in enumerate(captions, 1):
            tokens = tokenizer(caption)
            if tokens.dropped:
                yield Warned(f"a caption is {tokens.dropped} tokens longer than the model reads: {caption[:60]}…")
            reading = encoder.encode(tokens.input_ids, tokens.mask)
            while True:
                try:
                    next(reading)
                except StopIteration as end:
                    texts = {"video": end.value.video[0].astype(dtype), "audio": end.value.audio[0].astype(dtype)}
                    break
            write_safetensors(self.folder / TEXTS / text_name(caption), texts, {"caption": caption}, force=True)
            yield Progress(READ, done, len(captions))

    def _encode(self, items: list[Item]) -> Iterator[Event]:
        if not items:
            return
        strategy, checkpoint = self.config.training_strategy, self.model.checkpoint
        pictures = load_video_encoder(checkpoint, self.dtype) if strategy.video else None
        sounds = load_audio_encoder(checkpoint, self.dtype) if strategy.audio else None
        for done, item in enumerate(items, 1):
            try:
                pixels, waveform, reference = self._read(item)
            except UserError as error:
                if self.strict:
                    raise
                self.skipped += 1
                yield Warned(f"skipped: {error}")
                yield Progress(ENCODE, done, len(items))
                continue
            tensors = {}
            if pictures is not None:
                tensors["video"] = encode_whole(pictures, pixels)[0]
            if sounds is not None:
                seconds = len(pixels) / self.config.data.frame_rate if pictures else self.config.data.audio_duration
                grid = audio_grid(self.model.audio_vae, seconds)
                tensors["audio"] = sound_latent(sounds, self.model.audio_vae, waveform, grid, self.dtype)[0]
            if reference is not None and pictures is not None:
                tensors["reference"] = encode_whole(pictures, reference)[0]
            write_safetensors(self._path(item), tensors, self._metadata(item), force=True)
            mx.clear_cache()
            yield Progress(ENCODE, done, len(items))

    def _read(self, item: Item) -> tuple[list[np.ndarray], np.ndarray, list[np.ndarray] | None]:
        """What the encoders need of an item: frames in [-1, 1], a waveform, frames of its reference.

        Raises:
            UserError: it cannot be read, or fits no bucket.
        """
        data, strategy = self.config.data, self.config.training_strategy
        rate = self.model.audio_vae.sampling_rate
        nothing = np.zeros((0, 2), np.float32)
        if not strategy.video:
            return [], read_sound(item.path, rate, 0.0, data.audio_duration), None
        most = max(bucket.frames for bucket in self.buckets)
        frames = self._frames(item.path, most)
        height, width = frames[0].shape[:2]
        bucket = choose_bucket(self.buckets, len(frames), height, width)
        if bucket is None:
            least = min(each.frames for each in self.buckets)
            raise UserError(f"{item.path}: has {len(frames)} frames, too few for any bucket (at least {least})")
        pixels = [fit_image(frame, bucket.height, bucket.width) for frame in frames[: bucket.frames]]
        waveform = nothing
        if strategy.audio:
            waveform = read_sound(item.path, rate, 0.0, bucket.frames / data.frame_rate)
        reference = None
        if item.reference is not None:
            frames = self._frames(item.reference, bucket.frames)
            if len(frames) < bucket.frames:
                raise UserError(f"{item.reference}: has {len(frames)} frames, its clip needs {bucket.frames}")
            scale = data.reference_downscale_factor
            reference = [fit_image(frame, bucket.height // scale, bucket.width // scale) for frame in frames]
        return pixels, waveform, reference

    def _frames(self, path: Path, most: int) -> list[np.ndarray]:
        """The first frames of a video at the data set's rate, or an image as the only one."""
        if path.suffix.lower() in IMAGES:
            return [load_image(path)]
        frames = []
        for frame in read_clip(path, fps=self.config.data.frame_rate):
            frames.append(frame)
            if len(frames) == most:
                break
        return frames


def audio_grid(vae: AudioVaeConfig, seconds: float) -> AudioGrid:
    """The latent grid of a sound of this length, as clips of this length have it."""
    frames = max(round(seconds * vae.latents_per_second), 1)
    return AudioGrid(frames, vae.latent_bins, vae.z_channels, vae.sampling_rate, vae.hop_length, DOWNSAMPLING)
