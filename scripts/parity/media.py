"""Pictures in: fitting, the CRF round trip, and the curves and primaries of HDR, compared with the reference.

The round trip is what one build of FFmpeg and x264 does, so it is compared only where the recorded versions run;
elsewhere its cases count as not covered.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import av
import numpy as np

from mlx_ltx.media.color import LogCurve
from mlx_ltx.media.fit import aligned_size, fit_image, fit_long_side, fit_pixels
from mlx_ltx.media.images import recompress
from parity import Comparison, GoldenSet, NotCovered, runner


def same_codecs(golden: GoldenSet) -> bool:
    """Whether the libraries that made the CRF cases are the ones running here."""
    made_with = {name: tuple(version) for name, version in golden.cases["crf"]["libs"].items()}
    return made_with == av.library_versions


@runner("media")
def media(golden: GoldenSet) -> Iterator[Comparison | NotCovered]:
    image = golden.tensors["image_u8"].astype(np.uint8)
    for name in golden.names:
        expected = golden.tensors[name]
        if name in {"image_u8", "hdr.linear", "hdr.video"}:  # inputs
            continue
        if name.startswith("center_crop_"):
            yield golden.compare("", name, torch_order(fit_image(image, *expected.shape[-2:])))
        elif name.startswith("reflect_pad_"):
            yield golden.compare("", name, torch_order(fit_pixels(image, *expected.shape[-2:], "reflect")))
        elif match := re.fullmatch(r"aspect_(\d+)", name):
            yield golden.compare("", name, fit_long_side(image, int(match[1])))
        elif match := re.fullmatch(r"crf(\d+)_u8", name):
            if int(match[1]) == 0 or same_codecs(golden):
                yield golden.compare("", name, recompress(image, int(match[1])))
            else:
                yield NotCovered(f"{name} (made with another FFmpeg than the one here)")
        elif match := re.fullmatch(r"hdr\.(\w+)\.(\w+)", name):
            yield golden.compare("", name, hdr(golden, CURVES[match[1]], match[2], expected))
        else:
            yield NotCovered(name)
    yield from aligned(golden)


CURVES = {curve.name.lower(): curve for curve in LogCurve}


def hdr(golden: GoldenSet, curve: LogCurve, case: str, expected: np.ndarray) -> np.ndarray:
    video = np.moveaxis(golden.tensors["hdr.video"], 1, -1)  # read as linear Rec.709 and as codes alike
    match case:
        case "compress":
            return curve.compress(golden.tensors["hdr.linear"])
        case "decompress":  # recorded for evenly spaced codes from 0 to 1
            return curve.decompress(np.linspace(0, 1, expected.size, dtype=np.float32).reshape(expected.shape))
        case "from_rec709":
            return np.moveaxis(curve.from_linear(video), -1, 1)
        case "to_rec709":
            codes = curve.from_linear(video) if f"hdr.{curve.name.lower()}.from_rec709" in golden.tensors else video
            return np.moveaxis(curve.to_linear(codes), -1, 1)
    raise ValueError(f"unknown case {case!r} of {curve.value}")


def aligned(golden: GoldenSet) -> Iterator[Comparison]:
    """Recorded as numbers beside the tensors: the size to generate at, and the one to cut back to (the source's)."""
    for name, recorded in golden.cases["align"].items():
        size, mode = name.split(":")
        width, height = map(int, size.split("x"))
        ours = aligned_size(width, height, "reflect" if mode == "reflect_pad" else "crop")
        yield Comparison("align", name, np.array([*ours, width, height]), np.array(recorded))


def torch_order(picture: np.ndarray) -> np.ndarray:
    """(H, W, C) to (1, C, 1, H, W)."""
    return picture.transpose(2, 0, 1)[None, :, None]
