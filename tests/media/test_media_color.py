"""Curves and primaries. Equality with the reference is tested in test_media_images."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ltx.media.color import (
    HLG_WHITE,
    LogCurve,
    Primaries,
    convert_primaries,
    hlg_signal,
    sdr_from_hdr,
    yuv_10bit,
)


@pytest.mark.parametrize("curve", LogCurve)
def test_log_curves_round_trip_and_rise(curve):
    light = np.geomspace(1e-3, 50, 500, dtype=np.float32)
    codes = curve.compress(light)
    assert (np.diff(codes) > 0).all()
    assert np.abs(curve.decompress(codes) / light - 1).max() < 1e-3  # LogC3's two parts meet to four digits
    assert codes.dtype == curve.decompress(codes).dtype == np.float32
    assert curve.compress(np.array([-5, 1e9])).tolist() == pytest.approx([curve.compress(np.zeros(1))[0], 1])
    assert np.array_equal(curve.decompress(np.array([-1, 2])), curve.decompress(np.array([0, 1])))


def test_known_values_of_the_curves():
    """18% grey: 0.391 in LogC3 EI 800 (ARRI's table), 0.4135884 in ACEScct (S-2016-001)."""
    assert LogCurve.LOGC3.compress(np.array([0.18])) == pytest.approx(0.391007, abs=1e-5)
    assert LogCurve.ACESCCT.compress(np.array([0.18])) == pytest.approx(0.4135884, abs=1e-6)


@pytest.mark.parametrize("source", Primaries)
@pytest.mark.parametrize("target", Primaries)
def test_primaries_keep_white_and_lead_back(source, target):
    white = convert_primaries(np.ones((1, 3)), source, target)
    assert np.abs(white - 1).max() < 2e-3  # the reference's ACEScg matrix has five digits
    pixels = np.random.default_rng(0).uniform(0, 4, (5, 7, 3)).astype(np.float32)
    there = convert_primaries(pixels, source, target)
    assert np.abs(convert_primaries(there, target, source) - pixels).max() < 1e-5
    assert (source is target) == np.array_equal(there, pixels)


@given(st.lists(st.floats(0, 200, width=32), min_size=3, max_size=3))
def test_light_survives_a_log_space(values):
    pixels = np.array([values], np.float32)
    for curve in LogCurve:
        kept = np.minimum(pixels, 50)
        back = curve.to_linear(curve.from_linear(kept))
        assert np.abs(back - kept).max() <= 2e-3 * (kept.max() + 0.1)


def test_hlg_puts_white_at_three_quarters_and_rolls_off():
    grey = np.geomspace(1e-3, 100, 400, dtype=np.float32)[:, None] * np.ones(3, np.float32)
    signal = hlg_signal(grey)
    assert np.abs(signal - signal[:, :1]).max() < 1e-5
    assert (np.diff(signal[grey[:, 0] < 8, 0]) > 0).all()
    assert signal.max() <= 1
    assert hlg_signal(np.ones((1, 3)))[0] == pytest.approx(HLG_WHITE, abs=1e-5)
    assert 0.8 < hlg_signal(np.full((1, 3), 3.0))[0, 0] < 1
    below, above = hlg_signal(np.array([[0.999] * 3, [1.001] * 3]))  # no corner at white
    assert above[0] - HLG_WHITE == pytest.approx(HLG_WHITE - below[0], rel=0.01)
    strange = hlg_signal(np.array([[np.nan, np.inf, -np.inf], [0, 0, 0]]))
    assert np.isfinite(strange).all()
    assert np.array_equal(strange[1], [0, 0, 0])


def test_ten_bit_levels():
    white, black = yuv_10bit(np.ones((2, 2, 3), np.float32)), yuv_10bit(np.zeros((2, 2, 3), np.float32))
    assert [plane.max() for plane in white] == [940, 512, 512]
    assert [plane.max() for plane in black] == [64, 512, 512]
    blue = np.zeros((4, 6, 3), np.float32)
    blue[..., 2] = 1
    luma, u, v = yuv_10bit(blue)
    assert (luma.shape, u.shape, v.shape, u.dtype) == ((4, 6), (2, 3), (2, 3), np.uint16)
    assert (luma[0, 0], u[0, 0]) == (round(64 + 876 * 0.0593), 960)
    mixed = blue.copy()
    mixed[::2] = 0
    assert yuv_10bit(mixed)[1][0, 0] == 736  # the mean of two black and two blue pixels


@pytest.mark.parametrize("transfer", ["HLG", "PQ"])
def test_hdr_becomes_sdr(transfer):
    ramp = np.arange(0, 65536, 64, dtype=np.uint16)[:, None] * np.ones(3, np.uint16)
    sdr = sdr_from_hdr(ramp, transfer).astype(int)
    assert sdr[0].tolist() == [0, 0, 0]
    assert (np.diff(sdr[:, 1]) >= 0).all()
    assert np.abs(sdr - sdr[:, :1]).max() <= 1  # grey stays grey
    white = {"HLG": HLG_WHITE, "PQ": 0.5807}[transfer]  # 203 cd/m² under PQ
    level = int(sdr_from_hdr(np.full((1, 3), round(white * 65535), np.uint16), transfer)[0, 0])
    assert 240 < level < 255
    assert sdr.max() > level  # highlights keep some shape
    mid = sdr_from_hdr(np.round(hlg_signal(np.full((1, 3), 0.18)) * 65535).astype(np.uint16), "HLG")
    assert abs(int(mid[0, 0]) - 118) <= 1  # below the knee the picture is what it was: sRGB of 18% is 117.7


def test_hdr_colours_are_converted():
    red = np.array([[1.0, 0, 0]]) * 0.5
    sdr = sdr_from_hdr(np.round(hlg_signal(red) * 65535).astype(np.uint16), "HLG")[0]
    assert abs(int(sdr[0]) - 188) <= 1  # sRGB of one half
    assert sdr[1:].max() <= 6
