"""Clips as input: rates, rotation, odd sizes, alpha, HDR, animations, and what is refused."""

import itertools
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from mlx_ltx.errors import UserError
from mlx_ltx.media import clips
from mlx_ltx.media.audio import read_audio
from mlx_ltx.media.clips import probe, read_clip, read_frames
from mlx_ltx.media.color import Primaries, convert_primaries
from mlx_ltx.media.video import VideoWriter


def numbered(frames, height=32, width=48):
    """Frames with their number written on them: a white column for each bit of it that is set."""
    bits = (np.arange(frames)[:, None] >> np.arange(7)) & 1
    columns = np.zeros((frames, width, 3), np.uint8)
    columns[:, : width // 7 * 7] = (255 * bits).repeat(width // 7, 1)[:, :, None]
    return np.ascontiguousarray(np.broadcast_to(columns[:, None], (frames, height, width, 3))).astype(np.uint8)


def numbers(frames):
    """Which of :func:`numbered` these are."""
    found = []
    for frame in frames:
        width = frame.shape[1] // 7
        bits = frame[:, : width * 7].reshape(len(frame), 7, width, 3).mean((0, 2, 3)) > 127
        found.append(int((bits << np.arange(7)).sum()))
    return found


def write(path, pixels, times, tick, codec="libx264", pix_fmt="yuv420p", options=None, source="rgb24", **context):
    """A file whose frames appear at exactly these times, in ticks; ``context`` sets more of the encoder."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=context.pop("rate", 25), options=options or {"crf": "5"})
        stream.height, stream.width, stream.pix_fmt = (*pixels.shape[1:3], pix_fmt)
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        stream.codec_context.time_base = tick
        for image, time in zip(pixels, times, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format=source)
            frame.pts, frame.time_base = time, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def constant(tmp_path_factory):
    """100 frames at 24 per second."""
    path = tmp_path_factory.mktemp("clips") / "constant.mp4"
    with VideoWriter(path, 48, 32, 24, crf=5) as writer:
        writer.write_frames(numbered(100))
    return path


@pytest.fixture(scope="module")
def variable(tmp_path_factory):
    """Ten frames of 40 ms, then one of 400 ms, then nine of 20 ms, and a last one (of 40 ms, the muxer says)."""
    path = tmp_path_factory.mktemp("clips") / "variable.mp4"
    times = [*range(0, 440, 40), *range(800, 1000, 20)]
    write(path, numbered(21), times, Fraction(1, 1000))
    return path


def test_the_frames_of_a_constant_rate_come_each_once(constant):
    info = probe(constant)
    assert (info.constant_rate, info.fps, info.frames, info.start, info.hdr) == (True, 24, 100, 0, None)
    assert numbers(read_clip(constant)) == [*range(100)]
    assert numbers(read_clip(constant, frames=7)) == [*range(7)]
    assert numbers(read_clip(constant, frames=9, start=2.5)) == [*range(60, 69)]  # after a seek
    assert numbers(read_clip(constant, fps=24)) == [*range(100)]
    first = next(read_clip(constant))
    assert (first.shape, first.dtype) == ((32, 48, 3), np.uint8)


@pytest.mark.parametrize("start", [0, 1, 1.02, 1.03, 3.5])
def test_other_rates_take_the_nearest_frames(constant, start):
    for fps in (12, 25, 30, 60, 23.976):
        rate = Fraction(24000, 1001) if fps == 23.976 else Fraction(fps)
        shown = numbers(read_clip(constant, fps=fps, start=start))
        assert abs(len(shown) - (Fraction(100, 24) - Fraction(start)) * rate) <= 1
        wanted = [(Fraction(start) + place / rate) * 24 for place in range(len(shown))]
        for number, time in zip(shown, wanted, strict=True):
            assert number <= time + Fraction(1, 2) * 24 / rate
            assert number > time - 1 - Fraction(1, 2) * 24 / rate


@pytest.mark.parametrize("suffix", ["mkv", "mov", "avi", "ts", "webm"])
@pytest.mark.parametrize("rate", [24, Fraction(30000, 1001)])
def test_rounded_times_of_other_containers_are_constant(tmp_path, suffix, rate):
    path = tmp_path / f"clip.{suffix}"
    codec = "libvpx-vp9" if suffix == "webm" else "libx264"
    options = {"crf": "10", "b:v": "0", "cpu-used": "8"} if suffix == "webm" else {"crf": "5"}
    write(path, numbered(30), range(30), 1 / Fraction(rate), codec, options=options, rate=rate)
    info = probe(path)
    assert (info.constant_rate, info.fps, info.frames) == (True, rate, 30)
    assert numbers(read_clip(path)) == [*range(30)]
    if suffix != "avi":  # which has no times of showing: there the first frame appears one frame late
        assert numbers(read_clip(path, fps=rate)) == [*range(30)]


def test_a_variable_rate_is_resampled_or_refused(variable):
    info = probe(variable)
    assert not info.constant_rate
    with pytest.raises(UserError, match="variable frame rate") as caught:
        next(read_clip(variable))
    assert "\n" not in str(caught.value)
    assert numbers(read_clip(variable, fps=25)) == [
        *range(10), *[10] * 10, *range(11, 21, 2), 20
    ]  # fmt: skip
    assert numbers(read_clip(variable, fps=50)) == [
        *itertools.chain(*([n] * 2 for n in range(10))), *[10] * 20, *range(11, 21), 20
    ]  # fmt: skip
    assert numbers(read_clip(variable, fps=25, start=0.6, frames=6)) == [10] * 5 + [11]
    assert numbers(read_frames(variable)) == [*range(21)]  # whenever they are shown


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_start_far_inside_is_sought(tmp_path, suffix):
    path = tmp_path / f"long.{suffix}"
    write(path, numbered(120), range(120), Fraction(1, 12), rate=12, gop_size=12)
    assert next(clips._decode(path, Fraction(6))).start > 4
    for start in (1.5, 3.99, 6, 9.5):
        first = round(start * 12)
        assert numbers(read_clip(path, start=start)) == [*range(first, 120)]
        assert numbers(read_clip(path, fps=12, start=first / 12, frames=5)) == [*range(first, first + 5)]


def test_elementary_streams_without_times(tmp_path):
    path = tmp_path / "raw.m4v"
    write(path, numbered(40), range(40), Fraction(1, 12), "mpeg4", rate=12, gop_size=4, options={"qscale": "3"})
    assert numbers(read_clip(path, fps=12, start=2, frames=5)) == [*range(24, 29)]


def test_a_small_jitter_is_constant(tmp_path):
    times = [40 * number + (number % 3) * 3 for number in range(30)]
    write(tmp_path / "a.mkv", numbered(30), times, Fraction(1, 1000))
    assert probe(tmp_path / "a.mkv").constant_rate
    assert numbers(read_clip(tmp_path / "a.mkv")) == [*range(30)]
    thirds = [time for number in range(15) for time in (number * 80, number * 80 + 27)]  # two frames, then a pause
    write(tmp_path / "b.mkv", numbered(30), thirds, Fraction(1, 1000))
    assert not probe(tmp_path / "b.mkv").constant_rate


def test_a_picture_that_begins_after_the_sound(tmp_path):
    path = tmp_path / "late.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"crf": "5"})
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        audio = container.add_stream("aac", rate=48000, layout="stereo")
        for number, pixels in enumerate(numbered(20)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number + 10, Fraction(1, 25)
            container.mux(video.encode(frame))
        sound = av.AudioFrame.from_ndarray(np.zeros((2, 48000), np.float32), format="fltp", layout="stereo")
        sound.sample_rate, sound.pts, sound.time_base = 48000, 0, Fraction(1, 48000)
        container.mux(audio.encode(sound))
        container.mux([*audio.encode(), *video.encode()])
    assert probe(path).start == pytest.approx(0.4, abs=0.03)
    assert numbers(read_clip(path)) == [*range(20)]  # its own frames, from the first
    synchronous = numbers(read_clip(path, fps=25))
    assert synchronous[:10] == [0] * 10
    assert synchronous[-1] == 19
    assert 29 <= len(synchronous) <= 31


def test_too_short_clips_say_how_long_they_are(constant):
    with pytest.raises(UserError, match="only 100 frames from 0 s on at 24 frames per second, 101 are needed"):
        list(read_clip(constant, frames=101))
    with pytest.raises(UserError, match="only 20 frames"):
        list(read_clip(constant, fps=12, frames=25, start=2.5))
    with pytest.raises(UserError, match="no frames from 5 s on"):
        list(read_clip(constant, start=5))
    with pytest.raises(UserError, match="no frames from 5 s on"):
        list(read_clip(constant, fps=30, start=5))


def test_wrong_arguments(constant):
    for arguments in ({"frames": 0}, {"start": -1}, {"start": float("nan")}, {"fps": 0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            read_clip(constant, **arguments)


def test_one_frame_is_a_clip(tmp_path):
    with VideoWriter(tmp_path / "one.mp4", 48, 32, 24, crf=5) as writer:
        writer.write_frames(numbered(1))
    info = probe(tmp_path / "one.mp4")
    assert (info.frames, info.fps, info.constant_rate) == (1, 24, True)
    assert numbers(read_clip(tmp_path / "one.mp4")) == [0]
    assert numbers(read_clip(tmp_path / "one.mp4", fps=48)) == [0, 0]


def test_odd_sizes_and_pixels_that_are_not_square(tmp_path):
    y, x = np.mgrid[:45, :63]
    image = np.stack([x * 4, y * 5, 128 + 0 * x], -1).astype(np.uint8)
    write(tmp_path / "odd.mkv", image[None], [0], Fraction(1, 25), "ffv1", "bgr0", {"context": "0"})
    assert np.array_equal(next(read_clip(tmp_path / "odd.mkv")), image)
    write(tmp_path / "dv.mp4", image[None, :44, :60], [0], Fraction(1, 25), sample_aspect_ratio=Fraction(3, 2))
    wide = next(read_clip(tmp_path / "dv.mp4"))
    assert wide.shape == (44, 90, 3)
    assert abs(int(wide[20, 45, 0]) - int(image[20, 30, 0])) < 8
    info = probe(tmp_path / "dv.mp4")
    assert (info.width, info.height) == (90, 44)


def test_rotation(tmp_path):
    path = tmp_path / "clip.mp4"
    frames = np.zeros((30, 32, 48, 3), np.uint8)
    frames[:, :16, :24] = 255  # bright at the top left, as stored
    with VideoWriter(path, 48, 32, 24, crf=5) as writer:
        writer.write_frames(frames)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    clockwise = (0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30)
    data[matrix : matrix + 36] = struct.pack(">9i", *clockwise)
    path.write_bytes(data)
    for frame in read_clip(path, fps=12):
        assert frame.shape == (48, 32, 3)
        assert frame[:20, 20:].min() > 240  # now at the top right
        assert frame[:20, :12].max() < 15


def test_alpha_is_dropped(tmp_path):
    pixels = np.dstack([np.full((32, 48, 3), 120, np.uint8), np.tile(np.arange(48, dtype=np.uint8) * 5, (32, 1))])
    write(tmp_path / "a.mov", pixels[None], [0], Fraction(1, 25), "qtrle", "argb", {"x": "0"}, source="rgba")
    assert np.array_equal(next(read_clip(tmp_path / "a.mov")), pixels[..., :3])


@pytest.mark.parametrize("transfer", [16, 18])
def test_hdr_clips_become_sdr(tmp_path, transfer):
    """Written with known PQ and HLG signals of diffuse white, Rec.2020 red, and black."""
    path = tmp_path / "hdr.mp4"
    white, peak = {16: (0.5807, 0.9), 18: (0.75, 1.0)}[transfer]
    red = convert_primaries(np.array([0.5, 0.0, 0.0]), Primaries.REC709, Primaries.REC2020)
    signal = np.zeros((32, 64, 3))
    signal[:, 16:32], signal[:, 32:48], signal[:, 48:] = white, peak, encode_signal(red, transfer)
    levels = (signal @ np.array(BT2020_YUV).T) * [876, 896, 896] + [64, 512, 512]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx265", rate=24, options={"crf": "1", "x265-params": "log-level=none:bframes=0"}
        )
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p10le"
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = 9, transfer, 9, 1
        frame = av.VideoFrame(64, 32, "yuv420p10le")
        for plane, values in zip(frame.planes, np.moveaxis(np.round(levels), -1, 0), strict=True):
            stored = values if plane.width == 64 else values[::2, ::2]
            rows = np.frombuffer(memoryview(plane), np.uint16).reshape(plane.height, -1)
            rows[:, : stored.shape[1]] = stored
        frame.pts, frame.time_base = 0, Fraction(1, 24)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert probe(path).hdr == {16: "PQ", 18: "HLG"}[transfer]
    columns = next(read_clip(path))[16, [8, 24, 40, 56]].astype(int)
    assert columns[0].max() <= 2
    assert columns[1].min() >= 240
    assert columns[2].min() > columns[1].max()
    assert abs(columns[3, 0] - 188) <= 4  # sRGB of one half
    assert columns[3, 1:].max() <= 40


BT2020_YUV = [
    [0.2627, 0.6780, 0.0593],
    [-0.2627 / 1.8814, -0.6780 / 1.8814, 0.5],
    [0.5, -0.6780 / 1.4746, -0.0593 / 1.4746],
]


def encode_signal(light, transfer):
    """The standards' formulas, diffuse white being 203 cd/m² or an HLG signal of 0.75."""
    light = np.maximum(light, 0)
    if transfer == 16:
        power = (light * 203 / 10000) ** (2610 / 16384)
        return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** (2523 / 32)
    scene = light * (np.exp((0.75 - 0.55991073) / 0.17883277) + 0.28466892) / 12
    upper = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), upper)


def animation(path, durations, mode="RGB", **options):
    frames = [Image.fromarray(image).convert(mode) for image in numbered(len(durations), 20, 31)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, **options)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animations(tmp_path, suffix):
    path = tmp_path / f"moving.{suffix}"
    animation(path, [100, 200, 50, 50], **({"lossless": True} if suffix == "webp" else {}))
    info = probe(path)
    assert (info.width, info.height, info.frames, info.constant_rate) == (31, 20, 4, False)
    assert info.duration == pytest.approx(0.4)
    assert numbers(read_clip(path, fps=20)) == [0, 0, 1, 1, 1, 1, 2, 3]
    with pytest.raises(UserError, match="variable frame rate"):
        next(read_clip(path))
    animation(path, [50] * 5, "RGBA" if suffix != "gif" else "P", **({"lossless": True} if suffix == "webp" else {}))
    assert probe(path).fps == 20
    assert numbers(read_clip(path)) == [*range(5)]


def test_an_animation_without_times(tmp_path):
    animation(tmp_path / "a.gif", [0, 0, 0])
    assert probe(tmp_path / "a.gif").fps == 10


def test_a_damaged_animation(tmp_path):
    frames = [
        Image.fromarray(np.random.default_rng(n).integers(0, 255, (64, 64, 3)).astype(np.uint8)) for n in range(4)
    ]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:], duration=100)
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(UserError, match="damaged after frame") as caught:
        list(read_clip(tmp_path / "a.png", fps=10))
    assert "\n" not in str(caught.value)


def test_what_is_no_clip(tmp_path):
    for suffix in ("png", "jpg", "webp", "gif", "bmp", "tiff"):
        Image.fromarray(numbered(1)[0]).save(tmp_path / f"still.{suffix}")
        with pytest.raises(UserError, match="is a still image"):
            list(read_clip(tmp_path / f"still.{suffix}", fps=24))
    (tmp_path / "photo.mp4").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (tmp_path / "text.mp4").write_text("not a film")
    with av.open(str(tmp_path / "song.m4a"), "w") as container:
        stream = container.add_stream("aac", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48000
        container.mux([*stream.encode(frame), *stream.encode()])
    for name, message in {
        "photo.mp4": "is a HEIC photo",
        "text.mp4": "not a video or sound file",
        "song.m4a": "has no picture",
        "none.mp4": "no such file",
        ".": "is a folder",
    }.items():
        for use in (probe, lambda path: list(read_clip(path)), lambda path: list(read_clip(path, fps=24))):
            with pytest.raises(UserError, match=message) as caught:
                use(tmp_path / name)
            assert "\n" not in str(caught.value)


def noisy_clip(path):
    with VideoWriter(path, 48, 32, 24) as writer:
        writer.write_frames(np.random.default_rng(0).integers(0, 255, (30, 32, 48, 3)).astype(np.uint8))
    return path.read_bytes()


@pytest.mark.parametrize("fps", [None, 12])
def test_a_clip_with_damaged_data(tmp_path, fps):
    data = bytearray(noisy_clip(tmp_path / "clip.mp4"))
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    (tmp_path / "clip.mp4").write_bytes(data)
    with pytest.raises(UserError, match="damaged after frame"):
        list(read_clip(tmp_path / "clip.mp4", fps))


@pytest.mark.parametrize("missing", [1, 5000])
def test_a_clip_that_is_cut_off(tmp_path, missing):
    data = noisy_clip(tmp_path / "clip.mp4")
    (tmp_path / "clip.mp4").write_bytes(data[:-missing])
    for use in (probe, lambda path: list(read_clip(path)), read_audio):
        with pytest.raises(UserError, match=f"is cut off, its last {missing} bytes are missing"):
            use(tmp_path / "clip.mp4")
    # A box that goes on to the end, as live recordings have it, has no end to miss.
    start = data.index(b"mdat") - 4
    (tmp_path / "clip.mp4").write_bytes(data[:start] + bytes(4) + data[start + 4 :])
    assert probe(tmp_path / "clip.mp4").frames == 30


def test_files_are_closed_when_reading_stops_early(constant):
    clip = read_clip(constant, fps=30)
    next(clip)
    clip.close()
    assert numbers(itertools.islice(read_clip(constant), 2)) == [0, 1]
