"""The loss of a training as a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mlx_ltx.media.atomic import atomic_output

WIDTH, HEIGHT, MARGIN = 960, 480, 64
BACKGROUND, AXIS, FAINT, LINE, LABEL = "#16181d", "#3a4150", "#41657e", "#6fb3d9", "#c9d1dc"


def smooth(losses: Sequence[float], weight: float = 0.98) -> np.ndarray:
    """The moving average of what has come so far, without a bias to the first value."""
    result, total, norm = np.empty(len(losses)), 0.0, 0.0
    for index, loss in enumerate(losses):
        total, norm = weight * total + (1 - weight) * loss, weight * norm + (1 - weight)
        result[index] = total / norm
    return result


def draw_losses(path: str | os.PathLike[str], losses: Sequence[float], title: str) -> None:
    """Write a PNG with every step's loss, faint, and their moving average.

    Raises:
        UserError: the file cannot be written, or the disk is full.
        ValueError: there are no losses.
    """
    if not losses:
        raise ValueError("no losses to draw")
    image = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(14)
    values = np.asarray(losses, np.float64)
    low, high = _range(values)
    right, bottom = WIDTH - MARGIN // 2, HEIGHT - MARGIN

    def place(step: float, value: float) -> tuple[float, float]:
        x = MARGIN + (right - MARGIN) * (step - 1) / max(len(values) - 1, 1)
        y = bottom - (bottom - MARGIN) * (min(max(value, low), high) - low) / (high - low)
        return x, y

    for value in np.linspace(low, high, 5):
        x, y = place(1, float(value))
        draw.line([(x, y), (right, y)], fill=AXIS)
        draw.text((MARGIN - 8, y), f"{value:.3g}", fill=LABEL, font=font, anchor="rm")
    for step in sorted({1, *(round(1 + (len(values) - 1) * part / 4) for part in range(5))}):
        draw.text((place(step, low)[0], bottom + 8), str(step), fill=LABEL, font=font, anchor="ma")
    draw.text((WIDTH / 2, 16), title, fill=LABEL, font=font, anchor="ma")
    draw.text((WIDTH / 2, HEIGHT - 20), "step", fill=LABEL, font=font, anchor="ma")
    for series, colour, width in ((values, FAINT, 1), (smooth(losses), LINE, 2)):
        points = [place(step, float(value)) for step, value in enumerate(series, 1)]
        draw.line(points * 2 if len(points) == 1 else points, fill=colour, width=width)
    with atomic_output(path, force=True) as partial:
        image.save(partial, format="PNG")


def _range(values: np.ndarray) -> tuple[float, float]:
    """What the axis shows: all but the highest hundredth, which the first steps are."""
    low, high = float(values.min()), float(np.quantile(values, 0.99))
    if not high > low:
        high = max(low + abs(low) * 0.1, math.nextafter(low, math.inf), low + 1e-6)
    return low, high
