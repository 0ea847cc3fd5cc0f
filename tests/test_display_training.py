"""How trainings are shown."""

import io
from pathlib import Path

from mlx_ltx import display
from mlx_ltx.events import DataSetFinished, Phase, PhaseStarted, TrainingFinished, TrainingStep

FINISHED = TrainingFinished(Path("out/lora.safetensors"), 1000, 0.25, 61.0, 2_000_000_000)


def step(number: int, total: int) -> TrainingStep:
    return TrainingStep(number, total, {"video": 0.25, "audio": 0.5}, 1e-4, 1.0, 0.5, 2, 1_500_000_000)


def test_a_line_for_every_hundredth():
    stream = io.StringIO()
    screen = display.Lines(stream)
    for number in range(1, 1001):
        screen.show(step(number, 1000))
    screen.show(FINISHED)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 101
    assert lines[0] == "  step 10 of 1000: loss 0.7500, 0.50 s, 1.50 GB"
    assert lines[-1] == "out/lora.safetensors: 1000 steps, loss 0.2500: 61.0 s, MLX peak 2.00 GB"


def test_a_bar_shows_loss_speed_and_memory(capsys):
    screen = display.Bars()
    screen.show(PhaseStarted(0, Phase("train", "Training", 4)))
    screen.show(step(4, 4))
    screen.close()
    assert "loss 0.7500, 0.50 s, 1.50 GB" in capsys.readouterr().err


def test_a_data_set_in_one_line():
    assert display.summary(DataSetFinished(Path("latents"), 3, 0, 1.0)) == "latents: 3 samples: 1.0 s"
    assert display.summary(DataSetFinished(Path("latents"), 3, 2, 1.0)) == "latents: 3 samples, 2 files skipped: 1.0 s"
