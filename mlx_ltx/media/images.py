"""Images as conditioning: decoding, the compression that the models were trained with, and fitting to the frame.

The formulas are those of the reference's ``media_io/decode.py`` and ``media_io/resize.py``: a picture given to both
gives the same numbers.
"""

from __future__ import annotations

import math
import os
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.frame import VideoFrame
from PIL import Image, ImageCms, ImageOps

from mlx_ltx.errors import UserError

_SIXTEEN_BIT_MODES = {"I", "I;16", "I;16L", "I;16B", "I;16N"}  # a grey PNG of 16 bits opens as one of these


def load_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Decode an image as a viewer shows it: (H, W, 3) uint8 sRGB, EXIF orientation and ICC profile applied.

    Transparency is dropped, not blended, as in the reference: the colours stored under it appear. Of an animation, the
    first frame is taken. Grey images of 16 bits are scaled to 8.

    Raises:
        UserError: the file is missing or no image that Pillow can decode.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, not an image")
    try:
        with Image.open(path) as file:
            profile = file.info.get("icc_profile")
            file.load()
            return np.array(_to_srgb(ImageOps.exif_transpose(file), profile), np.uint8)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except PermissionError:
        raise UserError(f"{path}: no permission to read it") from None
    except UserError:
        raise
    except Exception as error:  # Pillow raises a dozen types for damaged files, from SyntaxError to zlib.error
        hint = "; save it as PNG or JPEG" if path.suffix.lower() in {".heic", ".heif", ".svg", ".psd", ".exr"} else ""
        reason = "unknown format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise UserError(f"{path}: not an image that can be read ({reason}){hint}") from None


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if image.mode in _SIXTEEN_BIT_MODES:
        levels = np.clip(np.asarray(image).astype(np.float64), 0, 65535)
        image = Image.fromarray(np.round(levels / 257).astype(np.uint8), "L")
    elif image.mode == "F":
        raise ValueError("floating-point pixels")
    elif image.mode in {"LA", "La"}:
        image = image.convert("L")
    elif image.mode not in {"L", "RGB", "CMYK", "LAB"}:  # the modes that a profile can describe
        image = image.convert("RGB")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            assert converted is not None  # it is only for inPlace=True
            return converted
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass  # profiles are often damaged or meant for another colour model; viewers ignore those too
    return image.convert("RGB")


def recompress(image: np.ndarray, crf: int) -> np.ndarray:
    """Encode one frame as H.264 and decode it again: the models expect the traces that this leaves.

    Args:
        image: (H, W, 3) uint8. The result is cut to even sizes.
        crf: x264's constant rate factor up to 51; 0 returns the image as it is, and so does a side of one pixel.

    Raises:
        ValueError: ``crf`` is out of range.
    """
    if not 0 <= crf <= 51:
        raise ValueError(f"crf must be between 0 and 51, not {crf}")
    if crf == 0 or min(image.shape[:2]) < 2:
        return image
    height, width = image.shape[0] // 2 * 2, image.shape[1] // 2 * 2
    file = BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=1, options={"crf": str(crf), "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # swscale's default conversion, without a colour matrix of our own: the reference's, rounding included.
        frame = VideoFrame.from_ndarray(np.ascontiguousarray(image[:height, :width]), format="rgb24")
        container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file, "r") as written:
        return next(written.decode(video=0)).to_ndarray(format="rgb24")


class Fit(NamedTuple):
    """How a picture fills a frame: its size after resizing, and the corner of the frame inside it."""

    height: int
    width: int
    top: int
    left: int


def fit_geometry(source_height: int, source_width: int, height: int, width: int) -> Fit:
    """The smallest picture of the source's proportions that covers ``height`` × ``width``, and its middle.

    Sizes round up so that a rounding error never leaves the frame uncovered.
    """
    scale = max(height / source_height, width / source_width)
    resized_height, resized_width = math.ceil(source_height * scale), math.ceil(source_width * scale)
    return Fit(resized_height, resized_width, (resized_height - height) // 2, (resized_width - width) // 2)


def resize_and_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize to cover the frame and keep the middle: (..., H, W, C) real → (..., height, width, C) float32.

    Bilinear between pixel centres without antialiasing: PyTorch's ``interpolate(mode="bilinear",
    align_corners=False)``. Only what the crop keeps is computed.
    """
    if min(height, width, *image.shape[-3:-1]) < 1:
        raise ValueError(f"cannot fit an image of shape {image.shape} to {height}x{width}")
    fit = fit_geometry(image.shape[-3], image.shape[-2], height, width)
    rows = _interpolate(image, -3, fit.height, fit.top, height)
    return _interpolate(rows, -2, fit.width, fit.left, width)


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


def fit_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pixels of 0 to 255, (..., H, W, 3), as a network's input: (..., height, width, 3) float32 in [-1, 1].

    :func:`resize_and_crop`, then ``x / 127.5 - 1``.
    """
    return resize_and_crop(image, height, width) / np.float32(127.5) - np.float32(1)


def fit_long_side(image: np.ndarray, long_side: int) -> np.ndarray:
    """Resize (..., H, W, C) in proportion until its longer side is ``long_side``: float32, values as they were."""
    height, width = image.shape[-3:-1]
    scale = long_side / max(height, width)
    return resize_and_crop(image, max(int(height * scale), 1), max(int(width * scale), 1))


def prepare_image(path: str | os.PathLike[str], height: int, width: int, crf: int) -> np.ndarray:
    """An image file as the conditioning of a frame: (height, width, 3) float32 in [-1, 1].

    Raises:
        UserError: as :func:`load_image`.
        ValueError: as :func:`recompress`.
    """
    return fit_image(recompress(load_image(path), crf), height, width)
