"""Train the embedded demo, part by part.

    python scripts/train_demo.py all [--folder demo-training]
    python scripts/train_demo.py video-vae --steps 500

Killed at any moment, the same command goes on from the last checkpoint; ``--steps`` stops earlier, to go on later.
The parts in order: ``text``, ``video-vae``, ``audio-vae``, ``vocoder``, ``latents`` (all scenes encoded once),
``upsampler``, ``transformer``, and ``pack``, which writes the files of the demo.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from demo_training import diffusion, latents, pack, sound, text, video
from demo_training.stage import Stage, optimization, train

TRAININGS: dict[str, Callable[[Path], Stage]] = {
    "text": lambda folder: Stage("text", text.TextSide(), text.loss, text.batch, optimization(300, 1.5e-3)),
    "video-vae": lambda folder: Stage(
        "video-vae", video.VideoAutoencoder(), video.loss, video.batch, optimization(8000, 5e-4, 0.99, muon=5e-3)
    ),
    "audio-vae": lambda folder: Stage(
        "audio-vae", sound.AudioAutoencoder(), sound.sound_loss, sound.mel_batch, optimization(1500, 1e-3, muon=5e-3)
    ),
    "vocoder": lambda folder: Stage(
        "vocoder", sound.Vocoder(), sound.vocoder_loss, sound.vocoder_batch, optimization(2700, 1e-3, 0.99, muon=5e-3)
    ),
    "upsampler": diffusion.upsampler_stage,
    "transformer": diffusion.transformer_stage,
}
ORDER = ("text", "video-vae", "audio-vae", "vocoder", "latents", "upsampler", "transformer", "pack")


def run(stage: str, folder: Path, steps: int | None, scenes: int) -> None:
    if stage == "latents":
        latents.encode(folder, scenes)
    elif stage == "pack":
        print(pack.pack(folder, folder / "demo"))
    else:
        train(TRAININGS[stage](folder), folder, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("stage", choices=[*ORDER, "all"])
    parser.add_argument("--folder", type=Path, default=Path("demo-training"), help="where states and logs are kept")
    parser.add_argument("--steps", type=int, help="stop after so many steps, to go on later")
    parser.add_argument("--scenes", type=int, default=latents.SCENES, help="how many scenes are encoded")
    arguments = parser.parse_args()
    mx.set_default_device(mx.cpu)
    for stage in ORDER if arguments.stage == "all" else (arguments.stage,):
        run(stage, arguments.folder, arguments.steps, arguments.scenes)


if __name__ == "__main__":
    main()
