"""A whole clip in one picture: evenly spaced frames with their times, and the sound's waveform below."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mlx_ltx.errors import UserError
from mlx_ltx.media.atomic import atomic_output

THUMBNAIL_LONG_SIDE = 320  # pixels
_SMALLEST = 128  # tiny test clips are shown enlarged, so that their labels have room
_GAP = 8
_WAVEFORM_HEIGHT = 96
_BACKGROUND, _PANEL, _AXIS, _WAVE, _LABEL = "#16181d", "#1f232b", "#3a4150", "#6fb3d9", "#c9d1dc"


class ContactSheet:
    """Collects thumbnails from a stream of frames; holds no more of the clip than those.

    Args:
        frames: how many frames will come.
        fps: frames per second, for the times on the labels.
        cells: how many frames to show at most; the first and the last are always among them.
        title: what stands above the frames; None for nothing.
        waveform: sound to draw below, (samples, channels) in [-1, 1], over the length of the picture.
        rate: its samples per second.
    """

    def __init__(
        self,
        frames: int,
        fps: float | Fraction,
        cells: int = 12,
        title: str | None = None,
        waveform: np.ndarray | None = None,
        rate: int | None = None,
    ):
        if frames < 1 or cells < 1 or not fps > 0:
            raise ValueError(f"need at least one frame and one cell and a positive fps, not {frames}, {cells}, {fps}")
        if waveform is not None and (rate is None or waveform.ndim != 2):
            raise ValueError("a waveform must be (samples, channels) and needs its rate")
        self.fps = float(fps)
        self.title, self._waveform, self._rate = title, waveform, rate
        self._wanted = set(evenly_spaced(frames, cells))
        self._seen = 0
        self._thumbnails: list[tuple[int, Image.Image]] = []

    def add(self, frames: np.ndarray | Iterable[np.ndarray]) -> None:
        """Take the next frames, (n, H, W, 3) uint8 RGB, and keep thumbnails of those that will be shown."""
        for frame in frames:
            if self._seen in self._wanted:
                self._thumbnails.append((self._seen, _thumbnail(Image.fromarray(frame))))
            self._seen += 1

    def draw(self, columns: int | None = None, labels: bool = True) -> Image.Image:
        """The sheet as an RGB image.

        Args:
            columns: thumbnails side by side; None makes the sheet about as wide as 16:9.
            labels: write each frame's time under it.
        """
        if not self._thumbnails:
            raise ValueError("no frames were added")
        count = len(self._thumbnails)
        cell_width = max(image.width for _, image in self._thumbnails)
        cell_width = max(cell_width, 60) if labels else cell_width  # a narrow picture still needs room for its time
        font = ImageFont.load_default(14)
        label_height = 20 if labels else 0
        cell_height = max(image.height for _, image in self._thumbnails) + label_height
        if columns is None:
            columns = min(count, max(1, round(math.sqrt(count * 16 / 9 * cell_height / cell_width))))
            columns = math.ceil(count / math.ceil(count / columns))  # no wider than the rows really are
        elif columns < 1:
            raise ValueError(f"columns must be at least 1, not {columns}")
        columns = min(columns, count)
        rows = math.ceil(count / columns)
        width = columns * (cell_width + _GAP) + _GAP
        height = rows * (cell_height + _GAP) + _GAP
        title_height = 24 if self.title else 0
        strip_height = _WAVEFORM_HEIGHT + _GAP if self._waveform is not None else 0
        sheet = Image.new("RGB", (width, title_height + height + strip_height), _BACKGROUND)
        draw = ImageDraw.Draw(sheet)
        if self.title:
            title = _shortened(self.title, width - 2 * _GAP, font)
            draw.text((_GAP + 2, _GAP + title_height / 2), title, fill=_LABEL, font=font, anchor="lm")
        for cell, (index, image) in enumerate(self._thumbnails):
            left = _GAP + cell % columns * (cell_width + _GAP)
            top = title_height + _GAP + cell // columns * (cell_height + _GAP)
            sheet.paste(image, (left, top))
            if labels:
                text = f"{index / self.fps:.2f} s"
                draw.text((left + 2, top + image.height + label_height / 2), text, fill=_LABEL, font=font, anchor="lm")
        if self._waveform is not None and self._rate is not None:
            samples = round(self._seen / self.fps * self._rate)
            strip = _draw_waveform(self._waveform[:samples], samples, width - 2 * _GAP, _WAVEFORM_HEIGHT)
            sheet.paste(strip, (_GAP, title_height + height))
        return sheet


def save_sheets(sheets: Sequence[ContactSheet], path: str | os.PathLike[str], force: bool = False) -> None:
    """Write one or more sheets, below each other, as PNG.

    Raises:
        UserError: another suffix, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: a contact sheet is written as .png; give a name that ends in .png")
    images = [sheet.draw() for sheet in sheets]
    whole = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), _BACKGROUND)
    top = 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height
    with atomic_output(path, force) as partial:
        whole.save(partial, format="PNG")


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """One line of text that is at most so many pixels wide."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def evenly_spaced(frames: int, cells: int) -> list[int]:
    """Up to ``cells`` different frame numbers from the first to the last of ``frames``; the middle one for one cell."""
    if cells == 1:
        return [frames // 2]
    cells = min(cells, frames)
    return [round(cell * (frames - 1) / max(cells - 1, 1)) for cell in range(cells)]


def _thumbnail(image: Image.Image) -> Image.Image:
    if max(image.size) < _SMALLEST:
        times = math.ceil(_SMALLEST / max(image.size))
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    image.thumbnail((THUMBNAIL_LONG_SIDE, THUMBNAIL_LONG_SIDE), Image.Resampling.LANCZOS)
    return image


def _draw_waveform(waveform: np.ndarray, samples: int, width: int, height: int) -> Image.Image:
    """Per column the range of the sound, drawn at double width and height and reduced, for smooth edges.

    ``samples`` is the length that the width stands for; sound that ends before leaves the rest empty.
    """
    strip = Image.new("RGB", (2 * width, 2 * height), _PANEL)
    draw = ImageDraw.Draw(strip)
    draw.line((0, height, 2 * width, height), fill=_AXIS, width=2)
    borders = np.linspace(0, samples, 2 * width + 1).astype(int)
    for x, (begin, end) in enumerate(itertools.pairwise(borders)):
        part = waveform[begin : max(end, begin + 1)]
        if part.size:
            low, high = np.clip((part.min(), part.max()), -1, 1)
            scale = height - 8
            draw.line((x, height - high * scale, x, height - low * scale + 1), fill=_WAVE)
    return strip.resize((width, height), Image.Resampling.BOX)
