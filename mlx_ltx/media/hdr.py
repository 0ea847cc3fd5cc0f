"""HDR in and out: what EXR pixels mean, and how they become what the networks see, and back.

The networks work in ACEScct: log codes of ACEScg light, mapped from [0, 1] to [-1, 1] like any picture. Source:
ltx_pipelines/utils/media_io/{color_config,exr,encode}.py. (The HDR LoRA works in LogC3 instead, takes SDR pictures as
they are, and its results become light with :meth:`LogCurve.to_linear <mlx_ltx.media.color.LogCurve.to_linear>`.)
"""

from __future__ import annotations

import enum
import os

import numpy as np

from mlx_ltx.media.color import LogCurve, Primaries
from mlx_ltx.media.exr import ExrFolder, read_exr
from mlx_ltx.media.fit import FitMode, fit_pixels


class HdrSpace(enum.Enum):
    """The colour space of EXR files, given and made."""

    SRGB_LINEAR = "srgb_linear"  # linear light, Rec.709 primaries
    ACESCG = "acescg"  # linear light, ACEScg primaries
    ACESCCT = "acescct"  # ACEScct log codes, which the networks take as they are

    @property
    def primaries(self) -> Primaries:
        return Primaries.REC709 if self is HdrSpace.SRGB_LINEAR else Primaries.ACESCG

    @property
    def tag(self) -> str:
        """What the files' ``colorSpace`` attribute says."""
        return {HdrSpace.SRGB_LINEAR: "sRGB", HdrSpace.ACESCG: "ACEScg", HdrSpace.ACESCCT: "ACEScct"}[self]

    def to_network(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels of an EXR file (..., 3) as a network's input: float32 in [-1, 1].

        Light below 0 or beyond the curve (about 223 times diffuse white) is cut off.
        """
        if self is HdrSpace.ACESCCT:
            codes = np.clip(pixels.astype(np.float32, copy=False), 0, 1)
        else:
            codes = LogCurve.ACESCCT.from_linear(pixels, self.primaries)
        return codes * np.float32(2) - np.float32(1)

    def from_network(self, output: np.ndarray) -> np.ndarray:
        """A decoder's output (..., 3) in [-1, 1] as pixels for an EXR file of this space, float32."""
        codes = working_codes(output)
        return codes if self is HdrSpace.ACESCCT else LogCurve.ACESCCT.to_linear(codes, self.primaries)

    def folder(self, path: str | os.PathLike[str], force: bool = False) -> ExrFolder:
        """A folder for EXR frames, tagged with this space; give it what :meth:`from_network` returns."""
        return ExrFolder(path, self.primaries, self.tag, force)


def working_codes(output: np.ndarray) -> np.ndarray:
    """A decoder's output in [-1, 1] as codes, float32, cut to [0, 1]."""
    return np.clip((output.astype(np.float32, copy=False) + 1) / 2, 0, 1)


def master_light(output: np.ndarray, curve: LogCurve = LogCurve.ACESCCT) -> np.ndarray:
    """A decoder's output (..., 3) in [-1, 1] as linear Rec.709 light, float32, 1 being diffuse white.

    What :class:`~mlx_ltx.media.video.VideoWriter` takes for an HLG master.
    """
    return curve.to_linear(working_codes(output))


def prepare_exr(
    path: str | os.PathLike[str], height: int, width: int, space: HdrSpace, mode: FitMode = "crop"
) -> np.ndarray:
    """An EXR still as the conditioning of a frame: (height, width, 3) float32 in [-1, 1].

    It is fitted before the log curve, as the reference does.

    Raises:
        UserError: as :func:`~mlx_ltx.media.exr.read_exr`.
    """
    return space.to_network(fit_pixels(read_exr(path), height, width, mode))
