"""Train the embedded demo, part by part.

    python scripts/train_demo.py video-vae [--folder training] [--steps N]

Killed at any moment, the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mlx.core as mx

from demo_training import sound, text, video
from demo_training.loop import Part, Schedule


def video_vae(folder: Path) -> Part:
    module = video.VideoAutoencoder()
    return Part("video-vae", folder, module, module.loss, video.batch, Schedule(steps=3000, rate=1e-3))


def audio_vae(folder: Path) -> Part:
    module = sound.AudioAutoencoder()
    return Part("audio-vae", folder, module, module.loss, sound.mel_batch, Schedule(steps=2000, rate=1e-3))


def vocoder(folder: Path) -> Part:
    module = sound.Vocoder()
    return Part("vocoder", folder, module, module.loss, sound.vocoder_batch, Schedule(steps=1500, rate=1e-3))


def text_side(folder: Path) -> Part:
    module = text.TextSide()
    return Part("text", folder, module, module.loss, text.batch, Schedule(steps=800, rate=1.5e-3))


STAGES = {"text": text_side, "video-vae": video_vae, "audio-vae": audio_vae, "vocoder": vocoder}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--folder", type=Path, default=Path("demo-training"), help="where states and logs are kept")
    parser.add_argument("--steps", type=int, help="stop after so many steps, to go on later")
    arguments = parser.parse_args()
    mx.set_default_device(mx.cpu)
    STAGES[arguments.stage](arguments.folder).run(arguments.steps)


if __name__ == "__main__":
    main()
