"""A LoRA that is trained on a colour which the demo does not know makes it appear."""

import numpy as np
import pytest

import demo_scenes
from demo_measures import look, motion_of
from mlx_ltx.events import TrainingFinished
from mlx_ltx.request import LoraInput
from mlx_ltx.training.config import config_from
from mlx_ltx.training.precompute import precompute
from mlx_ltx.training.trainer import train

TURQUOISE = (40, 200, 190)
CLIPS, STEPS = 12, 200


def apart(colour, other):
    return float(np.linalg.norm(np.subtract(colour, other)))


@pytest.mark.slow
def test_a_new_colour(make, film, embedded, tmp_path, monkeypatch):
    nearest = min(apart(colour, TURQUOISE) for colour in demo_scenes.COLOURS.values())
    monkeypatch.setitem(demo_scenes.COLOURS, "turquoise", TURQUOISE)
    dataset = tmp_path / "clips"
    dataset.mkdir()
    for number in range(CLIPS):
        scene = demo_scenes.make_scene(7_000_000 + number, colour="turquoise")
        film(scene).rename(dataset / f"{number}.mp4")
        (dataset / f"{number}.txt").write_text(scene.caption)
    config = config_from(
        {
            "model": {"model_path": str(embedded)},
            "lora": {"rank": 8, "alpha": 16},
            "training_strategy": {"with_audio": True},
            "optimization": {"learning_rate": 3e-3, "steps": STEPS, "batch_size": 4, "scheduler_type": "cosine"},
            "acceleration": {"mixed_precision_mode": "no"},
            "data": {
                "preprocessed_data_root": str(tmp_path / "latents"),
                "dataset": str(dataset),
                "resolution_buckets": ["128x96x49"],
            },
            "checkpoints": {"interval": STEPS},
            "output_dir": str(tmp_path / "out"),
        }
    )
    list(precompute(config))
    finished = list(train(config))[-1]
    assert isinstance(finished, TrainingFinished)
    prompt = "A turquoise circle moves to the right on a black background."
    plain = make(prompt=prompt)
    trained = make(prompt=prompt, loras=(LoraInput(str(finished.weights_path)),))
    seen = look(trained.frames)
    # Nearer than every colour that the demo knows; the video autoencoder, which has not seen it either, keeps it to 70.
    assert apart(seen.colour, TURQUOISE) < 0.8 * nearest
    assert apart(seen.colour, TURQUOISE) < 0.7 * apart(look(plain.frames).colour, TURQUOISE)
    assert motion_of(seen) == "right"
