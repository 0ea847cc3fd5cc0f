"""Colour in light: primaries, the log curves of HDR working spaces, HLG and PQ.

Pixels are float32 (..., 3). *Linear* values are proportional to light, 1 being diffuse white, without an upper end;
*codes* and *signals* are in [0, 1].

Sources: ltx_core/hdr.py and ltx_core/color/{primaries,hlg,yuv}.py; ARRI LogC3 at EI 800; AMPAS S-2016-001 (ACEScct);
ITU-R BT.2087 (Rec.709 to Rec.2020); ITU-R BT.2100 (HLG and PQ); ITU-R BT.2408 (diffuse white).
"""

from __future__ import annotations

import enum
import math
from typing import Literal

import numpy as np

HdrTransfer = Literal["HLG", "PQ"]

HLG_WHITE = 0.75  # the HLG signal of diffuse white (BT.2408)
PQ_WHITE_NITS = 203.0  # and its luminance under PQ
_HLG_A, _HLG_B, _HLG_C = 0.17883277, 0.28466892, 0.55991073
_SDR_KNEE = 0.8  # linear light above this is rolled off when an HDR picture becomes SDR


class Primaries(enum.Enum):
    """The red, green and blue that linear pixels are amounts of."""

    REC709 = "Rec.709"
    ACESCG = "ACEScg"
    REC2020 = "Rec.2020"

    @property
    def chromaticities(self) -> tuple[float, ...]:
        """x and y of red, green, blue and white, as OpenEXR's ``chromaticities`` attribute holds them."""
        return _CHROMATICITIES[self]


_CHROMATICITIES = {
    Primaries.REC709: (0.64, 0.33, 0.30, 0.60, 0.15, 0.06, 0.3127, 0.3290),
    Primaries.ACESCG: (0.713, 0.293, 0.165, 0.830, 0.128, 0.044, 0.32168, 0.33767),
    Primaries.REC2020: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, 0.3127, 0.3290),
}
# The reference's numbers, five digits and all; the ways back are their exact inverses.
_FORWARD = {
    (Primaries.ACESCG, Primaries.REC709): [
        [1.70505, -0.62179, -0.08326],
        [-0.13026, 1.1408, -0.01055],
        [-0.024, -0.12897, 1.15297],
    ],
    (Primaries.REC709, Primaries.REC2020): [
        [0.62740389, 0.32928304, 0.04331307],
        [0.06909729, 0.91954040, 0.01136232],
        [0.01639144, 0.08801331, 0.89559525],
    ],
    (Primaries.ACESCG, Primaries.REC2020): [
        [1.02582475, -0.02005319, -0.00577156],
        [-0.00223437, 1.00458650, -0.00235213],
        [-0.00501335, -0.02529007, 1.03030342],
    ],
}
_MATRICES = {
    **{pair: np.array(matrix, np.float32) for pair, matrix in _FORWARD.items()},
    **{
        (target, source): np.linalg.inv(np.array(np.array(matrix, np.float32), np.float64)).astype(np.float32)
        for (source, target), matrix in _FORWARD.items()
    },
}


def convert_primaries(pixels: np.ndarray, source: Primaries, target: Primaries) -> np.ndarray:
    """Linear pixels (..., 3) of one set of primaries in another; values may become negative."""
    pixels = pixels.astype(np.float32, copy=False)
    return pixels if source is target else pixels @ _MATRICES[source, target].T


class LogCurve(enum.Enum):
    """A log working space: what the networks see instead of linear light."""

    LOGC3 = "LogC3"
    ACESCCT = "ACEScct"

    @property
    def primaries(self) -> Primaries:
        """What the curve's linear side is measured in."""
        return Primaries.REC709 if self is LogCurve.LOGC3 else Primaries.ACESCG

    def compress(self, linear: np.ndarray) -> np.ndarray:
        """Linear light in the curve's own primaries to codes; below 0 and beyond code 1 is cut off."""
        x = np.maximum(linear.astype(np.float32, copy=False), 0)
        if self is LogCurve.LOGC3:
            log = _LOGC3_C * np.log10(_LOGC3_A * x + _LOGC3_B) + _LOGC3_D
            codes = np.where(x >= _LOGC3_CUT, log, _LOGC3_E * x + _LOGC3_F)
        else:
            log = (np.log2(np.maximum(x, np.float32(1e-12))) + _ACESCCT_OFFSET) / _ACESCCT_SCALE
            codes = np.where(x > _ACESCCT_CUT, log, _ACESCCT_A * x + _ACESCCT_B)
        return np.clip(codes, 0, 1).astype(np.float32, copy=False)

    def decompress(self, codes: np.ndarray) -> np.ndarray:
        """Codes (cut to [0, 1]) to linear light in the curve's own primaries; the lowest codes give values below 0."""
        y = np.clip(codes.astype(np.float32, copy=False), 0, 1)
        if self is LogCurve.LOGC3:
            exponential = (np.float32(10) ** ((y - _LOGC3_D) / _LOGC3_C) - _LOGC3_B) / _LOGC3_A
            linear = np.where(y >= _LOGC3_E * _LOGC3_CUT + _LOGC3_F, exponential, (y - _LOGC3_F) / _LOGC3_E)
        else:
            exponential = np.float32(2) ** (y * _ACESCCT_SCALE - _ACESCCT_OFFSET)
            linear = np.where(y > _ACESCCT_CODE_CUT, exponential, (y - _ACESCCT_B) / _ACESCCT_A)
        return linear.astype(np.float32, copy=False)

    def from_linear(self, linear: np.ndarray, source: Primaries = Primaries.REC709) -> np.ndarray:
        """Linear pixels in any primaries to codes."""
        return self.compress(convert_primaries(linear, source, self.primaries))

    def to_linear(self, codes: np.ndarray, target: Primaries = Primaries.REC709) -> np.ndarray:
        """Codes to linear pixels in any primaries; what falls outside them is cut off at 0."""
        return np.maximum(convert_primaries(self.decompress(codes), self.primaries, target), 0)


_LOGC3_A, _LOGC3_B, _LOGC3_C, _LOGC3_D = 5.555556, 0.052272, 0.247190, 0.385537
_LOGC3_E, _LOGC3_F, _LOGC3_CUT = 5.367655, 0.092809, 0.010591
_ACESCCT_A, _ACESCCT_B = 10.5402377416545, 0.0729055341958355
_ACESCCT_CUT, _ACESCCT_CODE_CUT = 0.0078125, 0.155251141552511
_ACESCCT_SCALE, _ACESCCT_OFFSET = 17.52, 9.72


def hlg_signal(linear: np.ndarray) -> np.ndarray:
    """Linear Rec.709 pixels as the HLG signal of Rec.2020 pixels.

    Diffuse white (1.0) becomes :data:`HLG_WHITE`; what is brighter is rolled off exponentially, without a corner at
    white, and never reaches a signal of 1.
    """
    light = np.maximum(np.nan_to_num(convert_primaries(linear, Primaries.REC709, Primaries.REC2020), posinf=1e6), 0)
    white = _hlg_light(HLG_WHITE)
    highlights = 1 - (1 - white) * np.exp(-white / (1 - white) * (np.maximum(light, 1) - 1))
    scene = np.where(light <= 1, light * np.float32(white), highlights)
    upper = _HLG_A * np.log(np.maximum(12 * scene - _HLG_B, 1e-12)) + _HLG_C
    signal = np.where(scene <= 1 / 12, np.sqrt(3 * scene), upper)
    return np.clip(signal, 0, 1).astype(np.float32, copy=False)


def _hlg_light(signal: float) -> float:
    """BT.2100's inverse OETF: a signal in [0, 1] to scene light in [0, 1]."""
    return signal**2 / 3 if signal <= 0.5 else (math.exp((signal - _HLG_C) / _HLG_A) + _HLG_B) / 12


def _pq_nits(signal: float) -> float:
    """BT.2100's PQ EOTF: a signal in [0, 1] to cd/m²."""
    root = signal ** (32 / 2523)
    return 10000 * (max(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (8192 / 1305)


def yuv_10bit(signal: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rec.2020 R'G'B' (H, W, 3), even sizes, as 10-bit limited-range 4:2:0: uint16 Y (H, W), U and V (H/2, W/2).

    BT.2020's non-constant-luminance matrix; a colour sample is the mean of its 2×2 pixels.
    """
    height, width, _ = signal.shape
    luma = signal @ np.array([0.2627, 0.6780, 0.0593], np.float32)
    blue, red = (signal[..., 2] - luma) / np.float32(1.8814), (signal[..., 0] - luma) / np.float32(1.4746)

    def chroma(plane: np.ndarray) -> np.ndarray:
        mean = plane.reshape(height // 2, 2, width // 2, 2).mean((1, 3))
        return np.clip(np.round(896 * mean + 512), 0, 1023).astype(np.uint16)

    return np.clip(np.round(876 * luma + 64), 0, 1023).astype(np.uint16), chroma(blue), chroma(red)


def sdr_from_hdr(signal: np.ndarray, transfer: HdrTransfer) -> np.ndarray:
    """An HLG or PQ picture as SDR: 16-bit Rec.2020 R'G'B' (..., 3) uint16 → sRGB (..., 3) uint8.

    Diffuse white comes out a little below the brightest value, so that highlights keep some shape; the roll-off acts on
    a pixel's largest component, so hues stay.
    """
    linear = convert_primaries(_linear_table(transfer)[signal], Primaries.REC2020, Primaries.REC709)
    linear = np.maximum(linear, 0)
    peak = np.maximum(linear.max(-1, keepdims=True), _SDR_KNEE)
    rest = np.float32(1 - _SDR_KNEE)
    rolled = _SDR_KNEE + rest * (1 - np.exp(-(peak - _SDR_KNEE) / rest))
    linear = linear * (rolled / peak)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** np.float32(1 / 2.4) - 0.055)
    return np.clip(np.round(255 * encoded), 0, 255).astype(np.uint8)


def _linear_table(transfer: HdrTransfer) -> np.ndarray:
    """Linear light, 1 being diffuse white, of each 16-bit signal."""
    if transfer not in _TABLES:
        signals = (step / 65535 for step in range(65536))
        if transfer == "HLG":
            white = _hlg_light(HLG_WHITE)
            values = [_hlg_light(signal) / white for signal in signals]
        else:
            values = [_pq_nits(signal) / PQ_WHITE_NITS for signal in signals]
        _TABLES[transfer] = np.array(values, np.float32)
    return _TABLES[transfer]


_TABLES: dict[str, np.ndarray] = {}
