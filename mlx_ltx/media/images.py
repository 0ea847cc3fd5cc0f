"""Images as conditioning: decoding, and the compression that the models were trained with.

The steps are those of the reference's ``media_io/decode.py``: a picture given to both gives the same numbers.
"""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame
from PIL import Image, ImageCms, ImageOps

from mlx_ltx.errors import UserError
from mlx_ltx.media.fit import FitMode, fit_image

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
            return np.array(to_srgb(ImageOps.exif_transpose(file), profile), np.uint8)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except PermissionError:
        raise UserError(f"{path}: no permission to read it") from None
    except UserError:
        raise
    except Exception as error:  # Pillow raises a dozen types for damaged files, from SyntaxError to zlib.error
        hint = "; save it as PNG or JPEG" if path.suffix.lower() in {".heic", ".heif", ".svg", ".psd"} else ""
        hint = "; EXR is for HDR clips, see --hdr" if path.suffix.lower() == ".exr" else hint
        reason = "unknown format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise UserError(f"{path}: not an image that can be read ({reason}){hint}") from None


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Any picture of Pillow's as 8-bit RGB, its ICC profile applied, transparency dropped."""
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


def prepare_image(
    path: str | os.PathLike[str], height: int, width: int, crf: int, mode: FitMode = "crop"
) -> np.ndarray:
    """An image file as the conditioning of a frame: (height, width, 3) float32 in [-1, 1].

    ``mode`` is how it fits the frame, see :func:`~mlx_ltx.media.fit.fit_pixels`.

    Raises:
        UserError: as :func:`load_image`.
        ValueError: as :func:`recompress`.
    """
    return fit_image(recompress(load_image(path), crf), height, width, mode)
