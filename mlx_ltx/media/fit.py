"""Fitting pictures of any size to a frame.

The formulas are those of the reference's ``media_io/resize.py``: a picture given to both gives the same numbers.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import numpy as np

FitMode = Literal["crop", "contain", "stretch", "reflect"]
FIT_MODES: tuple[FitMode, ...] = get_args(FitMode)


class Fit(NamedTuple):
    """How a picture fills a frame: its size after resizing, and the corner of the frame inside it."""

    height: int
    width: int
    top: int
    left: int


def fit_mode(name: str | None, default: FitMode = "crop") -> FitMode:
    """The request's way of fitting, or a default."""
    return next((mode for mode in FIT_MODES if mode == name), default)


def fit_geometry(source_height: int, source_width: int, height: int, width: int) -> Fit:
    """The smallest picture of the source's proportions that covers ``height`` × ``width``, and its middle.

    Sizes round up so that a rounding error never leaves the frame uncovered.
    """
    scale = max(height / source_height, width / source_width)
    resized_height, resized_width = math.ceil(source_height * scale), math.ceil(source_width * scale)
    return Fit(resized_height, resized_width, (resized_height - height) // 2, (resized_width - width) // 2)


def fit_pixels(image: np.ndarray, height: int, width: int, mode: FitMode = "crop") -> np.ndarray:
    """Fit pictures to a frame: (..., H, W, C) real → (..., height, width, C) float32, in the values that came.

    Resizing is bilinear between pixel centres without antialiasing.

    Args:
        mode: ``crop`` covers the frame and keeps the middle; ``contain`` keeps the whole picture between black (zero)
            bars; ``stretch`` gives up its proportions; ``reflect`` keeps it whole at the top left, shrunk if it is too
            large but never enlarged, and mirrors it into what is left (the reference's padding for HDR clips).

    Raises:
        ValueError: an empty picture or frame, or another mode.
    """
    if min(height, width, *image.shape[-3:-1]) < 1:
        raise ValueError(f"cannot fit an image of shape {image.shape} to {height}x{width}")
    match mode:
        case "crop":
            return resize_and_crop(image, height, width)
        case "contain":
            return resize_and_contain(image, height, width)
        case "stretch":
            return resize(image, height, width)
        case "reflect":
            return resize_and_reflect(image, height, width)
    raise ValueError(f"fit mode must be one of {', '.join(FIT_MODES)}, not {mode!r}")


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(..., H, W, C) → (..., height, width, C) float32, bilinear between pixel centres without antialiasing.

    PyTorch's ``interpolate(mode="bilinear", align_corners=False)``.
    """
    return _interpolate(_interpolate(image, -3, height, 0, height), -2, width, 0, width)


def resize_and_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize to cover the frame and keep the middle; only what the crop keeps is computed."""
    if min(height, width, *image.shape[-3:-1]) < 1:
        raise ValueError(f"cannot fit an image of shape {image.shape} to {height}x{width}")
    fit = fit_geometry(image.shape[-3], image.shape[-2], height, width)
    rows = _interpolate(image, -3, fit.height, fit.top, height)
    return _interpolate(rows, -2, fit.width, fit.left, width)


def resize_and_contain(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize until the whole picture just fits, and put it in the middle of black (zero)."""
    fitted_height, fitted_width = _inside(image, height, width)
    bars_y, bars_x = height - fitted_height, width - fitted_width
    margins = [(0, 0)] * (image.ndim - 3) + [(bars_y // 2, bars_y - bars_y // 2), (bars_x // 2, bars_x - bars_x // 2)]
    return np.pad(resize(image, fitted_height, fitted_width), [*margins, (0, 0)])


def resize_and_reflect(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Shrink what is too large until it fits, and mirror the bottom and right edges into the rest of the frame.

    Where more is missing than there is to mirror, the edge is repeated instead.
    """
    fitted = image.astype(np.float32)
    if height < image.shape[-3] or width < image.shape[-2]:
        fitted = resize(image, *_inside(image, height, width))
    bottom, right = height - fitted.shape[-3], width - fitted.shape[-2]
    if bottom == right == 0:
        return fitted
    margins = [(0, 0)] * (image.ndim - 3) + [(0, bottom), (0, right), (0, 0)]
    enough = bottom < fitted.shape[-3] and right < fitted.shape[-2]
    return np.pad(fitted, margins, mode="reflect" if enough else "edge")


def _inside(image: np.ndarray, height: int, width: int) -> tuple[int, int]:
    """The largest (height, width) of the picture's proportions inside the frame."""
    scale = min(height / image.shape[-3], width / image.shape[-2])
    return max(round(image.shape[-3] * scale), 1), max(round(image.shape[-2] * scale), 1)


def aligned_size(width: int, height: int, mode: Literal["crop", "reflect"], divisor: int = 64) -> tuple[int, int]:
    """The (width, height) to generate at for a source of any size: multiples of ``divisor``.

    ``crop`` rounds down; ``reflect`` rounds up, and the result is cut back to the source's size in the end.

    Raises:
        ValueError: rounding down leaves nothing.
    """
    extra = divisor - 1 if mode == "reflect" else 0
    aligned = (width + extra) // divisor * divisor, (height + extra) // divisor * divisor
    if 0 in aligned:
        raise ValueError(f"{width}x{height} is smaller than {divisor} pixels on a side")
    return aligned


def fit_image(image: np.ndarray, height: int, width: int, mode: FitMode = "crop") -> np.ndarray:
    """Pixels of 0 to 255, (..., H, W, 3), as a network's input: (..., height, width, 3) float32 in [-1, 1].

    :func:`fit_pixels`, then ``x / 127.5 - 1``.
    """
    return fit_pixels(image, height, width, mode) / np.float32(127.5) - np.float32(1)


def fit_long_side(image: np.ndarray, long_side: int) -> np.ndarray:
    """Resize (..., H, W, C) in proportion until its longer side is ``long_side``: float32, values as they were."""
    height, width = image.shape[-3:-1]
    scale = long_side / max(height, width)
    return resize_and_crop(image, max(int(height * scale), 1), max(int(width * scale), 1))


def _interpolate(image: np.ndarray, axis: int, resized: int, offset: int, length: int) -> np.ndarray:
    """Elements ``offset`` to ``offset + length`` of ``axis`` after resizing it to ``resized`` elements."""
    source = image.shape[axis]
    centres = np.arange(offset, offset + length, dtype=np.float32) + np.float32(0.5)
    # float32 throughout, because PyTorch computes the places and weights in it
    places = np.maximum(np.float32(source) / np.float32(resized) * centres - np.float32(0.5), np.float32(0))
    low = np.minimum(places.astype(np.int64), source - 1)
    high = np.minimum(low + 1, source - 1)
    weight = np.clip(places - low.astype(np.float32), 0, 1).reshape(-1, *(1,) * (-axis - 1))
    below = np.take(image, low, axis).astype(np.float32)
    above = np.take(image, high, axis).astype(np.float32)
    return below * (1 - weight) + above * weight
