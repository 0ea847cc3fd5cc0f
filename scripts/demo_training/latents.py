"""All training scenes, encoded once: what the upsampler and the transformer learn from.

A file per fifty scenes, so that encoding goes on where it stopped: normalised latents of both sizes of the picture, of
the same with another shape, and of the sound, and embeddings of the captions, all float16.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

import demo_scenes
from demo_training import sound, text, video
from demo_training.layout import CONFIG
from demo_training.stage import use_weights
from mlx_ltx.checkpoints.writing import write_safetensors
from mlx_ltx.models.audio_vae import AudioVaeConfig
from mlx_ltx.sampling.geometry import AudioGrid, ClipShape, VideoGrid
from mlx_ltx.training.autoencoders import encode_sound, encode_video

AT_ONCE = 50
# So many of all motions, and then of one: there is most to learn about the moments of landings, and outlines that turn
# have most forms, so of few scenes they would be learnt by heart.
POOLS = {"varied": 2000, "bounce": 300, "rotate": 1000}
SCENES = sum(POOLS.values())
STATISTICS_SCENES = 48
FIRST_SEED = 5_000_000
SMALLEST_STD = 1e-3  # of a channel that says nothing

FULL = ClipShape(demo_scenes.FRAMES, demo_scenes.HEIGHT, demo_scenes.WIDTH, demo_scenes.FPS)
SIZES = {"full": FULL, "half": FULL.halved()}  # of the two stages of the two-stage pipelines


def grids(clip: ClipShape) -> tuple[VideoGrid, AudioGrid]:
    """The latents of a clip."""
    audio = AudioVaeConfig.from_metadata(CONFIG)
    patch = CONFIG["vae"]["patch_size"]
    space = patch * 2 ** sum("all" in kind or "space" in kind for kind, _ in CONFIG["vae"]["encoder_blocks"])
    return (
        VideoGrid.of_clip(clip, CONFIG["vae"]["latent_channels"], space_scale=space),
        AudioGrid.of_clip(clip, audio.latent_bins, audio.z_channels, audio.sampling_rate, audio.hop_length, 4),
    )


class Encoders:
    """The trained autoencoders' encoders, with the statistics of their latents if they are known."""

    def __init__(self, folder: Path):
        self.video, self.sound = video.VideoAutoencoder(), sound.AudioAutoencoder()
        use_weights(self.video, folder, "video-vae")
        use_weights(self.sound, folder, "audio-vae")
        self.file = folder / "latents" / "statistics.safetensors"
        if self.file.exists():
            self.use(dict(mx.load(str(self.file))))

    def use(self, statistics: dict[str, mx.array]) -> None:
        for name, module in (("video", self.video), ("audio", self.sound)):
            for side in (module.encoder, module.decoder):
                side.statistics.mean, side.statistics.std = statistics[f"{name}.mean"], statistics[f"{name}.std"]

    def picture(self, frames: np.ndarray) -> mx.array:
        """Latents of one clip (F, H, W, 3), not normalised, (F', H', W', C)."""
        return encode_video(self.video.encoder, video.pixels(frames[None])).mean[0]

    def waveform(self, samples: np.ndarray) -> mx.array:
        """Latents of one clip's sound at 16 kHz (samples, 2), not normalised, (T, M, C)."""
        mel = sound.spectrogram(samples[None])
        _, grid = grids(FULL)
        return encode_sound(self.sound.encoder, mel).mean[0, : grid.frames]

    def measure(self) -> None:
        """Mean and standard deviation of every channel over some scenes, kept in a file."""
        pictures, sounds = [], []
        for seed in range(FIRST_SEED - STATISTICS_SCENES, FIRST_SEED):
            scene = demo_scenes.make_scene(seed)
            for clip in SIZES.values():
                pictures.append(np.array(self.picture(demo_scenes.draw(scene, clip.width, clip.height))))
            sounds.append(np.array(self.waveform(demo_scenes.play(scene, sound.RATE))))
        # The two sizes count alike, although one has four times as many latents.
        weighted = [latent.reshape(-1, latent.shape[-1]) for latent in pictures]
        flat = np.concatenate([np.repeat(each, 4 if index % 2 else 1, axis=0) for index, each in enumerate(weighted)])
        tokens = np.stack(sounds).transpose(0, 1, 3, 2).reshape(-1, sounds[0].shape[1] * sounds[0].shape[2])
        statistics = {}
        for name, values in (("video", flat), ("audio", tokens)):
            statistics[f"{name}.mean"] = mx.array(values.mean(axis=0).astype(np.float32))
            statistics[f"{name}.std"] = mx.array(np.maximum(values.std(axis=0), SMALLEST_STD).astype(np.float32))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(self.file, statistics, force=True)
        self.use(statistics)


def pools(scenes: int) -> dict[str, range]:
    """The numbers of the scenes of every pool, as far as there are so many scenes."""
    found, first = {}, 0
    for name, size in POOLS.items():
        found[name] = range(first, max(first, min(first + size, scenes)))
        first += size
    return found


def training_scene(index: int) -> demo_scenes.Scene:
    """The scene with this number."""
    pool = next(name for name, numbers in pools(SCENES).items() if index in numbers)
    return demo_scenes.make_scene(FIRST_SEED + index, motion=None if pool == "varied" else pool)


def with_another_shape(scene: demo_scenes.Scene, index: int) -> demo_scenes.Scene:
    """The same with a circle, or, if it is one, with any of the others; the sound and the caption stay the shape's."""
    others = demo_scenes.SHAPES[1:]
    return replace(scene, shape="circle" if scene.shape in others else others[index % len(others)])


def encode(folder: Path, scenes: int = SCENES) -> None:
    """Encode what is not encoded yet."""
    encoders = Encoders(folder)
    if not encoders.file.exists():
        encoders.measure()
    side = text.TextSide()
    use_weights(side, folder, "text")
    for first in range(0, scenes, AT_ONCE):
        path = encoders.file.with_name(f"scenes-{first:05}.safetensors")
        if path.exists():
            continue
        found: dict[str, list[np.ndarray]] = defaultdict(list)
        batch = [training_scene(index) for index in range(first, first + AT_ONCE)]
        for index, scene in enumerate(batch, first):
            for kind, drawn in (("", scene), ("other.", with_another_shape(scene, index))):
                for name, clip in SIZES.items():
                    frames = demo_scenes.draw(drawn, clip.width, clip.height)
                    latent = encoders.video.encoder.statistics.normalize(encoders.picture(frames))
                    found[kind + name].append(_half(latent))
            latent = encoders.waveform(demo_scenes.play(scene, sound.RATE))
            found["audio"].append(_half(_normalize_sound(encoders, latent)))
        arrays = {name: mx.array(np.stack(values)) for name, values in found.items()}
        texts = text.embed_captions(side, [scene.caption for scene in batch])
        arrays |= {f"text.{name}": mx.array(values) for name, values in zip(("video", "audio"), texts, strict=True)}
        write_safetensors(path, arrays, force=True)
        print(path.name, flush=True)
    empty = text.embed_captions(side, ["", text.NEGATIVE_PROMPT])
    nothing = {f"text.{name}": mx.array(values) for name, values in zip(("video", "audio"), empty, strict=True)}
    write_safetensors(encoders.file.with_name("no-caption.safetensors"), nothing, force=True)


def _half(latent: mx.array) -> np.ndarray:
    return np.array(latent.astype(mx.float16))


def _normalize_sound(encoders: Encoders, latent: mx.array) -> mx.array:
    """(T, M, C): the statistics are those of tokens."""
    _, grid = grids(FULL)
    tokens = encoders.sound.encoder.statistics.normalize(grid.patchify(latent[None]))
    return grid.unpatchify(tokens)[0]


class EncodedScenes:
    """All encoded scenes in memory, float16, by kind: ``full``, ``half``, ``other.full``, ``other.half``, ``audio``,
    ``text.video``, ``text.audio``."""

    def __init__(self, folder: Path):
        files = sorted((folder / "latents").glob("scenes-*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{folder}: no encoded scenes; run the stage latents first")
        loaded = [mx.load(str(path)) for path in files]
        self.arrays = {name: np.concatenate([np.array(part[name]) for part in loaded]) for name in loaded[0]}
        nothing = mx.load(str(folder / "latents" / "no-caption.safetensors"))
        self.no_caption = {name: np.array(array) for name, array in nothing.items()}

    def __len__(self) -> int:
        return len(self.arrays["full"])

    def take(self, name: str, indices: np.ndarray) -> mx.array:
        return mx.array(self.arrays[name][indices].astype(np.float32))
