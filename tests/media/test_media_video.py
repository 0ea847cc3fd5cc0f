"""What VideoWriter writes, read back."""

import json
import struct
import threading
import time
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ltx.errors import UserError
from mlx_ltx.media.audio import read_audio
from mlx_ltx.media.video import VideoWriter, frame_rate, probe, read_frames, read_metadata


def moving(frames, height=48, width=64):
    """Smooth frames that all differ."""
    y, x = np.mgrid[:height, :width]
    shades = [np.stack([127 + 100 * np.sin(x / 20 + n / 3), 4 * y + n, 120 + 2 * n + 0 * x], -1) for n in range(frames)]
    return np.clip(shades, 0, 255).astype(np.uint8)


def tone(seconds, rate, frequency=440.0):
    t = np.arange(round(seconds * rate)) / rate
    left, right = np.sin(2 * np.pi * frequency * t), np.sin(4 * np.pi * frequency * t)
    return (0.5 * np.stack([left, right], 1)).astype(np.float32)


def test_frames_come_back_in_order_and_close(tmp_path):
    path, frames = tmp_path / "clip.mp4", moving(20)
    with VideoWriter(path, 64, 48, 24, crf=10) as writer:
        writer.write_frames(frames[:9])
        writer.write_frames(frames[9:10])
        writer.write_frames(frames[10:])
    decoded = np.stack(list(read_frames(path)))
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(int) - frames).mean() < 3
    for number in (0, 9, 10, 19):  # each is nearest to itself
        distance = np.abs(decoded[number].astype(int) - frames).mean((1, 2, 3))
        assert distance.argmin() == number


@pytest.mark.parametrize("fps", [24, 25.0, 12.5, 23.976, 29.97, 59.94, Fraction(24000, 1001), Fraction(50)])
@pytest.mark.parametrize("rate", [24000, 48000])
def test_rate_and_lengths(tmp_path, fps, rate):
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, 32, 32, fps, rate) as writer:
        writer.write_frames(moving(17, 32, 32))
        writer.write_audio(tone(2, rate))
    info = probe(path)
    assert (info.width, info.height, info.frames, info.fps) == (32, 32, 17, frame_rate(fps))
    assert (info.audio_rate, info.audio_channels) == (rate, 2)
    assert info.duration == pytest.approx(float(17 / frame_rate(fps)), abs=1e-6)
    assert info.audio_duration == round(17 / frame_rate(fps) * rate) / rate  # to the sample
    with av.open(str(path)) as container:
        times = [frame.pts * frame.time_base for frame in container.decode(video=0)]
    assert times == [number / frame_rate(fps) for number in range(17)]


@pytest.mark.parametrize("seconds", [0.3, 3.0])
@pytest.mark.parametrize("order", ["before", "after", "between"])
def test_sound_is_padded_or_cut_to_the_picture(tmp_path, seconds, order):
    path, sound, frames = tmp_path / "clip.mp4", tone(seconds, 48000), moving(25)
    with VideoWriter(path, 64, 48, 25, 48000) as writer:
        if order == "before":
            writer.write_audio(sound)
        writer.write_frames(frames[:10])
        if order == "between":
            for part in np.array_split(sound, 7):
                writer.write_audio(part)
        writer.write_frames(frames[10:])
        if order == "after":
            writer.write_audio(sound)
    decoded, rate = read_audio(path)
    assert decoded.shape == (48000, 2)
    assert rate == 48000
    kept = min(len(sound), 48000)
    error = decoded[1000 : kept - 1000] - sound[1000 : kept - 1000]
    assert np.sqrt((error**2).mean()) < 0.015  # one sample out of step would be 0.03
    assert np.abs(decoded[kept + 2000 :]).max(initial=0) < 1e-3


def test_one_channel_is_put_on_both_sides(tmp_path):
    with VideoWriter(tmp_path / "clip.mp4", 64, 48, 25, 48000) as writer:
        writer.write_audio(tone(1, 48000)[:, :1])
        writer.write_frames(moving(25))
    decoded, _ = read_audio(tmp_path / "clip.mp4")
    assert np.abs(decoded[:, 0]).max() > 0.4
    assert np.abs(decoded[:, 0] - decoded[:, 1]).max() < 1e-3


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128), (0, 0, 0), (255, 255, 255)])
def test_colours_are_bt709_limited(tmp_path, colour):
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, 64, 48, 24) as writer:
        writer.write_frames(np.tile(np.array(colour, np.uint8), (3, 48, 64, 1)))
    for frame in read_frames(path):
        assert np.abs(frame.astype(int) - colour).max() <= 3
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.color_primaries, context.color_trc, context.colorspace) == (1, 1, 1)
        assert context.color_range == 1
        planes = next(container.decode(video=0)).to_ndarray()  # the stored values, by the standard's formula
    red, green, blue = (value / 255 for value in colour)
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    stored = [planes[:48].mean(), planes[48:60].mean(), planes[60:].mean()]
    expected = [16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748]
    assert stored == pytest.approx(expected, abs=1.1)
    assert b"colr" in path.read_bytes()  # what QuickTime looks at


def test_conversion_to_yuv_has_no_bias(tmp_path):
    path, frames = tmp_path / "clip.mp4", moving(1, 96, 128)
    with VideoWriter(path, 128, 96, 24, crf=0) as writer:
        writer.write_frames(frames)
    difference = next(read_frames(path)).astype(int) - frames[0]
    assert abs(difference.mean()) < 0.2
    assert np.abs(difference).mean() < 1.0


def test_the_index_comes_first(tmp_path):
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, 64, 48, 24) as writer:
        writer.write_frames(moving(5))
    data = path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_sound_and_picture_alternate_in_the_file(tmp_path):
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, 64, 48, 24, 48000) as writer:
        writer.write_frames(moving(72))
        writer.write_audio(tone(3, 48000))
    with av.open(str(path)) as container:
        at = {"video": [], "audio": []}
        for packet in container.demux():
            if packet.size:
                at[packet.stream.type].append(packet.pos)
    middle = sorted(at["audio"])[len(at["audio"]) // 2]
    assert 0.2 < np.mean(np.array(at["video"]) < middle) < 0.8


SETTINGS = {
    "prompt": 'héron 猫 🦆 "quoted" \\ \n' * 400,
    "seed": 2**53,
    "nested": {"a": [1, 2.5, None, True]},
    "x": "\ud83e",
}


def test_settings_are_kept_inside_the_file(tmp_path):
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, 64, 48, 24, metadata=SETTINGS) as writer:
        writer.write_frames(moving(3))
    assert read_metadata(path) == SETTINGS
    with av.open(str(path)) as container:  # readable by other tools too
        assert json.loads(container.metadata["comment"])["mlx_ltx"]["seed"] == 2**53
        assert "héron 猫" in container.metadata["comment"]


def test_files_without_our_settings(tmp_path):
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, 64, 48, 24) as writer:
        writer.write_frames(moving(3))
    with pytest.raises(UserError, match="no mlx_ltx settings"):
        read_metadata(path)
    for comment in ("holiday", "[1]", '{"mlx_ltx": 3}'):
        with av.open(str(tmp_path / "other.mp4"), "w") as container:
            container.metadata["comment"] = comment
            stream = container.add_stream("libx264", rate=24, width=64, height=48)
            container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
            container.mux(stream.encode())
        with pytest.raises(UserError, match="no mlx_ltx settings"):
            read_metadata(tmp_path / "other.mp4")


@pytest.mark.parametrize("read", [probe, read_metadata, read_audio, lambda path: next(read_frames(path))])
def test_what_is_no_media_file(tmp_path, read):
    (tmp_path / "notes.mp4").write_text("not a film")
    for path, message in [
        ("notes.mp4", "not a video or sound file"),
        ("none.mp4", "no such file"),
        (".", "is a folder"),
    ]:
        with pytest.raises(UserError, match=message):
            read(tmp_path / path)


def test_a_damaged_file_is_reported(tmp_path):
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, 64, 48, 24) as writer:
        writer.write_frames(np.random.default_rng(0).integers(0, 255, (30, 48, 64, 3)).astype(np.uint8))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    with pytest.raises(UserError, match=r"damaged after frame \d+"):
        list(read_frames(path))


def test_a_picture_that_was_filmed_lying_down(tmp_path):
    path, frames = tmp_path / "clip.mp4", moving(2, 48, 64)
    with VideoWriter(path, 64, 48, 24, crf=5) as writer:
        writer.write_frames(frames)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    assert data[matrix : matrix + 4] == struct.pack(">i", 1 << 16)
    data[matrix : matrix + 36] = struct.pack(
        ">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30
    )  # 90° clockwise
    path.write_bytes(data)
    info = probe(path)
    assert (info.width, info.height) == (48, 64)
    upright = np.rot90(frames[0], -1)
    assert np.abs(next(read_frames(path)).astype(int) - upright).mean() < 4


@pytest.mark.parametrize("size", [(63, 48), (64, 47), (0, 48), (64, -2)])
def test_odd_sizes_are_refused(tmp_path, size):
    with pytest.raises(ValueError, match="even"):
        VideoWriter(tmp_path / "clip.mp4", *size, 24)


def test_wrong_arguments(tmp_path):
    path = tmp_path / "clip.mp4"
    for fps in (0, 1e-4, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="fps"):
            VideoWriter(path, 64, 48, fps)
    with pytest.raises(ValueError, match="crf"):
        VideoWriter(path, 64, 48, 24, crf=52)
    with pytest.raises(ValueError, match="sample_rate"):
        VideoWriter(path, 64, 48, 24, 0)
    for name in ("clip", "clip.mov", "clip.gif"):
        with pytest.raises(UserError, match=r"\.mp4"):
            VideoWriter(tmp_path / name, 64, 48, 24)
    with pytest.raises(ValueError, match="not open"):
        VideoWriter(path, 64, 48, 24).write_frames(moving(1))


@pytest.mark.parametrize(
    "misuse",
    [
        lambda writer: writer.write_frames(moving(1).astype(np.float32)),
        lambda writer: writer.write_frames(moving(1)[0]),
        lambda writer: writer.write_frames(moving(1, 48, 32)),
        lambda writer: writer.write_audio(np.zeros(100, np.float32)),
        lambda writer: writer.write_audio(np.zeros((100, 6), np.float32)),
        lambda writer: writer.write_audio(np.full((100, 2), np.nan, np.float32)),
        lambda writer: writer.write_audio(np.zeros((100, 2), np.float32)),  # no frames at all
        lambda writer: writer.write_frames(moving(1)),  # no sound, though it was announced
    ],
)
def test_misuse_leaves_no_file(tmp_path, misuse):
    with pytest.raises(ValueError), VideoWriter(tmp_path / "clip.mp4", 64, 48, 24, 48000) as writer:
        misuse(writer)
    assert not list(tmp_path.iterdir())


def test_sound_without_a_track_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sample_rate"), VideoWriter(tmp_path / "clip.mp4", 64, 48, 24) as writer:
        writer.write_audio(tone(1, 48000))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_cancelling_is_quick_and_leaves_nothing(tmp_path, error):
    before = threading.active_count()
    with pytest.raises(error), VideoWriter(tmp_path / "clip.mp4", 640, 480, 24) as writer:  # noqa: PT012
        writer.write_frames(np.zeros((600, 480, 640, 3), np.uint8))
        started = time.perf_counter()
        raise error
    assert time.perf_counter() - started < 2  # the 600 frames were not encoded first
    assert not list(tmp_path.iterdir())
    assert threading.active_count() == before


def test_an_error_of_the_encoder_reaches_the_caller(tmp_path, monkeypatch):
    """No space after some frames: the next write says so, and a caller that goes on writing never hangs."""

    def full(self, pixels):
        raise av.error.OSError(28, "No space left on device")

    monkeypatch.setattr("mlx_ltx.media.video.Mp4.add_frame", full)
    path = tmp_path / "clip.mp4"
    with pytest.raises(UserError, match="disk is full"), VideoWriter(path, 64, 48, 24) as writer:  # noqa: PT012
        for _ in range(100):
            writer.write_frames(moving(1))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_at_the_very_end(tmp_path, monkeypatch):
    def full(self):
        raise av.error.OSError(28, "No space left on device")

    monkeypatch.setattr("mlx_ltx.media.video.Mp4.finish", full)
    with pytest.raises(UserError, match="disk is full"), VideoWriter(tmp_path / "clip.mp4", 64, 48, 24) as writer:
        writer.write_frames(moving(1))
    assert not list(tmp_path.iterdir())


def test_the_queue_is_bounded(tmp_path, monkeypatch):
    """A slow encoder holds the caller back: at most one chunk is being encoded and one waits."""
    release, encoded = threading.Event(), []

    def slow(self, pixels):
        release.wait(10)
        encoded.append(1)
        raise RuntimeError("enough")

    monkeypatch.setattr("mlx_ltx.media.video.Mp4.add_frame", slow)
    threading.Timer(0.3, release.set).start()
    started = time.perf_counter()
    path = tmp_path / "clip.mp4"
    with pytest.raises(RuntimeError, match="enough"), VideoWriter(path, 64, 48, 24) as writer:  # noqa: PT012
        for _ in range(3):
            writer.write_frames(moving(1))
        assert time.perf_counter() - started > 0.2
    assert encoded == [1]


def test_replaces_only_with_force(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    with pytest.raises(UserError, match="--force"):
        VideoWriter(path, 64, 48, 24).__enter__()
    with VideoWriter(path, 64, 48, 24, force=True) as writer:
        writer.write_frames(moving(1))
    assert probe(path).frames == 1


@given(st.integers(1, 240))
def test_whole_and_ntsc_rates(fps):
    assert frame_rate(fps) == fps
    assert frame_rate(fps * 1000 / 1001) == Fraction(fps * 1000, 1001)
    assert frame_rate(round(fps * 1000 / 1001, 3)) == Fraction(fps * 1000, 1001)
