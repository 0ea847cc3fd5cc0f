"""Images in: resizing, cropping and the CRF round trip, compared with the reference.

The round trip is what one build of FFmpeg and x264 does, so it is compared only where the recorded versions run;
elsewhere its cases count as not covered.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import av
import numpy as np

from mlx_ltx.media.images import fit_image, fit_long_side, recompress
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
        if name == "image_u8":
            continue
        if name.startswith("center_crop_"):
            actual = fit_image(image, *expected.shape[-2:]).transpose(2, 0, 1)[None, :, None]
            yield golden.compare("", name, actual)
        elif match := re.fullmatch(r"aspect_(\d+)", name):
            yield golden.compare("", name, fit_long_side(image, int(match[1])))
        elif match := re.fullmatch(r"crf(\d+)_u8", name):
            if int(match[1]) == 0 or same_codecs(golden):
                yield golden.compare("", name, recompress(image, int(match[1])))
            else:
                yield NotCovered(f"{name} (made with another FFmpeg than the one here)")
        else:  # reflect padding and HDR: not built yet
            yield NotCovered(name)
