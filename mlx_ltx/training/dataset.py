"""A data set as training reads it: latents and text embeddings, one file each, and batches of them.

The folder holds ``data_set.json``, which says what it was made with; ``latents/NAME.safetensors`` with the clean
latents of a sample and, in its metadata, the text that belongs to it; and ``texts/HASH.safetensors``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_ltx.checkpoints.files import SafetensorsFile, read_json
from mlx_ltx.errors import UserError
from mlx_ltx.sampling.denoise import TextContext
from mlx_ltx.sampling.geometry import AudioGrid, VideoGrid
from mlx_ltx.training.flow import Batch

DESCRIPTION = "data_set.json"
LATENTS, TEXTS = "latents", "texts"


def text_name(caption: str) -> str:
    """The file of a caption's embedding."""
    return hashlib.sha256(caption.encode()).hexdigest()[:32] + ".safetensors"


@dataclass(frozen=True)
class Sample:
    """A sample's files, and what of them has to be alike in a batch.

    Attributes:
        shape: of each tensor, by name.
    """

    latents: SafetensorsFile
    text: Path
    shape: tuple[tuple[str, tuple[int, ...]], ...]


class DataSet:
    """The samples in a folder that ``precompute`` has filled.

    Args:
        folder: ``data.preprocessed_data_root``.
        video, audio, reference: what of a sample is wanted.

    Attributes:
        description: what the samples were made with.
        samples: in the order of their names.

    Raises:
        UserError: there is no such folder, or nothing in it, or a sample lacks what is wanted.
    """

    def __init__(self, folder: str | Path, video: bool, audio: bool, reference: bool = False):
        self.folder = Path(folder)
        if not (self.folder / DESCRIPTION).is_file():
            raise UserError(
                f"data.preprocessed_data_root: {folder} holds no data set; make one with "
                "python -m mlx_ltx.train precompute CONFIG"
            )
        self.description = read_json(self.folder / DESCRIPTION)
        self.wanted = [name for name, want in (("video", video), ("audio", audio), ("reference", reference)) if want]
        files = sorted((self.folder / LATENTS).glob("*.safetensors"))
        if not files:
            raise UserError(f"data.preprocessed_data_root: the data set in {folder} is empty")
        self.samples = [self._open(path) for path in files]

    def _open(self, path: Path) -> Sample:
        file = SafetensorsFile(path)
        for name in self.wanted:
            if name not in file.tensors:
                raise UserError(
                    f"{path}: holds no {name}, which this training needs; run precompute with this config, into "
                    "another preprocessed_data_root"
                )
        text = self.folder / TEXTS / file.metadata.get("text", "-")
        if not text.is_file():
            raise UserError(f"{path}: its text embedding is missing; run precompute again")
        return Sample(file, text, tuple((name, file.tensors[name].shape) for name in self.wanted))

    def __len__(self) -> int:
        return len(self.samples)

    def identity(self) -> dict[str, Any]:
        """What tells this data set from another: a resumed training has to have the same."""
        names = [(sample.latents.path.name, sample.text.name, sample.shape) for sample in self.samples]
        digest = hashlib.sha256(json.dumps([self.description, names], sort_keys=True).encode()).hexdigest()
        return {"samples": len(names), "digest": digest[:16]}

    def video_grid(self, shape: tuple[int, ...]) -> VideoGrid:
        made = self.description["video"]
        frames, height, width, channels = shape
        return VideoGrid(frames, height, width, channels, made["time_scale"], made["space_scale"], made["frame_rate"])

    def audio_grid(self, shape: tuple[int, ...]) -> AudioGrid:
        made = self.description["audio"]
        frames, bins, channels = shape
        return AudioGrid(frames, bins, channels, made["rate"], made["hop"], made["scale"])


class Shuffled:
    """The batches of a data set, by their number: epoch after epoch, each in an order of its own.

    A batch holds samples of one shape. Where a shape's samples do not fill the last batch, its first ones come again.
    """

    def __init__(self, data: DataSet, batch_size: int, seed: int):
        self.data, self.batch_size, self.seed = data, batch_size, seed
        groups: dict[Any, list[int]] = {}
        for index, sample in enumerate(data.samples):
            groups.setdefault(sample.shape, []).append(index)
        self.groups = list(groups.values())
        self.per_epoch = sum(-(-len(group) // batch_size) for group in self.groups)
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def indices(self, number: int) -> list[int]:
        """Which samples are in a batch."""
        epoch, place = divmod(number, self.per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._order(epoch)
        return self._epoch[1][place]

    def _order(self, epoch: int) -> list[list[int]]:
        random = np.random.default_rng((self.seed, epoch))
        batches = []
        for group in self.groups:
            order = random.permutation(group).tolist()
            for first in range(0, len(order), self.batch_size):
                chosen = order[first : first + self.batch_size]
                batches.append((chosen + order * self.batch_size)[: self.batch_size])
        return [batches[place] for place in random.permutation(len(batches))]

    def __call__(self, number: int) -> Batch:
        """The batch, float32."""
        samples = [self.data.samples[index] for index in self.indices(number)]
        texts = [SafetensorsFile(sample.text).arrays for sample in samples]
        video, audio, reference = (self._stacked(samples, name) for name in ("video", "audio", "reference"))
        video_grid = None if video is None else self.data.video_grid(video.shape[1:])
        audio_grid = None if audio is None else self.data.audio_grid(audio.shape[1:])
        return Batch(
            TextContext(_stack(texts, "video"), _stack(texts, "audio")),
            video,
            audio,
            video_grid,
            audio_grid,
            reference,
            self.data.description.get("reference_downscale_factor", 1),
        )

    def _stacked(self, samples: list[Sample], name: str) -> mx.array | None:
        if name not in self.data.wanted:
            return None
        return _stack([sample.latents.arrays for sample in samples], name)


def _stack(files: list[Mapping[str, mx.array]], name: str) -> mx.array:
    return mx.stack([file[name] for file in files]).astype(mx.float32)
