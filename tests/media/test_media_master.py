"""The HDR master: linear light in, 10-bit HEVC in BT.2020 and HLG out."""

import av
import numpy as np
import pytest

from mlx_ltx.media.audio import read_audio
from mlx_ltx.media.color import hlg_signal
from mlx_ltx.media.video import VideoWriter, probe, read_frames, read_metadata


def light(frames=3, height=48, width=64):
    """Smooth linear Rec.709 light from 0 to 6, different in every frame."""
    y, x = np.mgrid[:height, :width]
    shades = [
        np.stack([6 * (x / width) ** 3 + 0 * y, 2 * y / height + 0 * x, 0.5 + 0.1 * n + 0 * x], -1)
        for n in range(frames)
    ]
    return np.array(shades, np.float32)


def test_the_signal_and_its_tags(tmp_path):
    path, frames = tmp_path / "master.mp4", light()
    with VideoWriter(path, 64, 48, 24, 48000, metadata={"seed": 1}, hlg=True) as writer:
        writer.write_audio(np.zeros((6000, 2), np.float32))
        writer.write_frames(frames[:1])
        writer.write_frames(frames[1:])
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.codec_tag, context.pix_fmt) == ("hevc", "hvc1", "yuv420p10le")
        # BT.2020, HLG, BT.2020 non-constant luminance, limited range (ITU-T H.273)
        assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (9, 18, 9, 1)
        decoded = [frame.to_ndarray(format="gbrp16le") / 65535 for frame in container.decode(video=0)]
    assert len(decoded) == 3
    for signal, linear in zip(decoded, frames, strict=True):
        difference = np.abs(signal - hlg_signal(linear))
        assert difference.mean() < 0.006
        assert np.quantile(difference, 0.99) < 0.04  # colours have a quarter of the pixels
    data = path.read_bytes()
    assert data[data.index(b"colr") + 4 :][:10] == b"nclx" + bytes([0, 9, 0, 18, 0, 9])  # what QuickTime looks at
    assert 0 < data.index(b"moov") < data.index(b"mdat")
    assert read_metadata(path) == {"seed": 1}
    info = probe(path)
    assert (info.hdr, info.frames, info.constant_rate, info.audio_rate) == ("HLG", 3, True, 48000)
    assert len(read_audio(path)[0]) == 6000


@pytest.mark.parametrize("level", [0.0, 0.05, 0.18, 0.6])
def test_read_back_as_sdr_it_looks_the_same(tmp_path, level):
    with VideoWriter(tmp_path / "a.mp4", 64, 48, 24, hlg=True) as writer:
        writer.write_frames(np.full((1, 48, 64, 3), level, np.float32))
    srgb = 12.92 * level if level <= 0.0031308 else 1.055 * level ** (1 / 2.4) - 0.055
    assert np.abs(next(read_frames(tmp_path / "a.mp4")) - 255 * srgb).max() <= 3


@pytest.mark.parametrize("frames", [1, 2, 3, 11])
def test_every_length_has_its_times(tmp_path, frames):
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 64, 48, 30, hlg=True) as writer:
        writer.write_frames(light(frames))
    with av.open(str(path)) as container:
        assert [frame.pts * frame.time_base * 30 for frame in container.decode(video=0)] == [*range(frames)]


def test_strange_light(tmp_path):
    frames = light(2)
    frames[0, :4, :4] = np.nan
    frames[0, 4:8, :4] = np.inf
    frames[1] = -3
    with VideoWriter(tmp_path / "a.mp4", 64, 48, 24, hlg=True) as writer:
        writer.write_frames(frames)
    assert list(read_frames(tmp_path / "a.mp4"))[1].max() <= 2


def test_what_a_master_takes(tmp_path):
    path = tmp_path / "a.mp4"
    with pytest.raises(ValueError, match="float32"), VideoWriter(path, 64, 48, 24, hlg=True) as writer:
        writer.write_frames(np.zeros((1, 48, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="uint8"), VideoWriter(path, 64, 48, 24) as writer:
        writer.write_frames(np.zeros((1, 48, 64, 3), np.float32))
    with pytest.raises(ValueError, match="at least 16"):
        VideoWriter(path, 64, 14, 24, hlg=True)
    with pytest.raises(RuntimeError), VideoWriter(path, 64, 48, 24, hlg=True) as writer:  # noqa: PT012
        writer.write_frames(light())
        raise RuntimeError
    assert not list(tmp_path.iterdir())
