"""Writing and reading sound."""

from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile

from mlx_ltx.errors import UserError
from mlx_ltx.media.audio import read_audio, write_audio
from mlx_ltx.media.video import VideoWriter

RATE = 24000


def noise(seconds=1.0, channels=2):
    return np.random.default_rng(1).uniform(-0.9, 0.9, (round(seconds * RATE), channels)).astype(np.float32)


def encode(path, codec, waveform, rate=RATE, delay=0.0, picture=False):
    """A file in some other program's format, through FFmpeg."""
    layout = "stereo" if waveform.shape[1] == 2 else "mono"
    with av.open(str(path), "w") as container:
        sound = container.add_stream(codec, rate=rate, layout=layout)
        if picture:
            video = container.add_stream("libx264", rate=10, width=32, height=32)
            for number in range(20):
                frame = av.VideoFrame(32, 32, "yuv420p")
                frame.pts, frame.time_base = number, Fraction(1, 10)
                container.mux(video.encode(frame))
            container.mux(video.encode())
        samples = av.AudioFrame.from_ndarray(np.ascontiguousarray(waveform.T), format="fltp", layout=layout)
        samples.sample_rate, samples.time_base, samples.pts = rate, Fraction(1, rate), round(delay * rate)
        container.mux(sound.encode(samples))
        container.mux(sound.encode())


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".WAV"])
@pytest.mark.parametrize("channels", [1, 2])
def test_round_trip(tmp_path, suffix, channels):
    path, sound = tmp_path / f"sound{suffix}", noise(channels=channels)
    write_audio(path, sound, RATE)
    assert soundfile.info(path).subtype == "PCM_24"
    decoded, rate = read_audio(path)
    assert (decoded.shape, decoded.dtype, rate) == (sound.shape, np.float32, RATE)
    assert np.abs(decoded - sound).max() < 2**-22


def test_loud_values_are_clipped(tmp_path):
    write_audio(tmp_path / "loud.wav", np.array([[2.0], [-3.0], [0.5]]), RATE)
    assert read_audio(tmp_path / "loud.wav")[0].ravel() == pytest.approx([1, -1, 0.5], abs=1e-6)


def test_writing_refuses(tmp_path):
    for name in ("sound.mp3", "sound"):
        with pytest.raises(UserError, match=r"\.wav or \.flac"):
            write_audio(tmp_path / name, noise(), RATE)
    for wrong in (np.zeros(10), np.zeros((0, 2)), np.array([[np.nan]])):
        with pytest.raises(ValueError):
            write_audio(tmp_path / "sound.wav", wrong, RATE)
    write_audio(tmp_path / "sound.wav", noise(), RATE)
    with pytest.raises(UserError, match="--force"):
        write_audio(tmp_path / "sound.wav", noise(), RATE)
    write_audio(tmp_path / "sound.wav", noise(0.5), RATE, force=True)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("start", "duration"), [(0, None), (0.25, None), (0, 0.5), (1.7, 0.3), (2.9999, 5), (1, 1e-3)])
def test_a_window_is_exact_to_the_sample(tmp_path, start, duration):
    path, sound = tmp_path / "sound.flac", noise(3)
    write_audio(path, sound, RATE)
    decoded, _ = read_audio(path, start, duration)
    first = round(start * RATE)
    expected = sound[first : None if duration is None else first + round(duration * RATE)]
    assert decoded.shape == expected.shape
    assert np.abs(decoded - expected).max() < 2**-22


@pytest.mark.parametrize(
    ("codec", "name"), [("aac", "a.m4a"), ("libmp3lame", "a.mp3"), ("libopus", "a.ogg"), ("pcm_u8", "a.wav")]
)
def test_a_window_of_a_lossy_file_equals_the_whole(tmp_path, codec, name):
    """Passing over packets must not leave a decoder without what it needs."""
    rate = 48000
    t = np.arange(5 * rate) / rate
    sound = (0.4 * np.sin(2 * np.pi * (200 + 100 * t) * t))[:, None].repeat(2, 1).astype(np.float32)
    encode(tmp_path / name, codec, sound, rate)
    whole, whole_rate = read_audio(tmp_path / name)
    part, part_rate = read_audio(tmp_path / name, 3.2, 1.0)
    assert whole_rate == part_rate == rate
    assert part.shape == (rate, 2)
    assert np.abs(part - whole[round(3.2 * rate) : round(4.2 * rate)]).max() < 1e-4
    assert np.abs(part - sound[round(3.2 * rate) : round(4.2 * rate)]).max() < 0.05  # and in step with the source


def test_the_sound_of_a_video(tmp_path):
    path, sound = tmp_path / "clip.mp4", 0.5 * np.sin(np.arange(RATE) / 20)[:, None].astype(np.float32)
    with VideoWriter(path, 32, 32, 10, RATE) as writer:
        writer.write_frames(np.zeros((7, 32, 32, 3), np.uint8))
        writer.write_audio(sound)
    decoded, rate = read_audio(path)
    assert rate == RATE
    assert decoded.shape == (round(0.7 * RATE), 2)
    assert np.abs(decoded[500:-500, :1] - sound[500 : len(decoded) - 500]).max() < 0.05


def test_a_track_that_begins_later_than_the_picture_stays_in_step(tmp_path):
    path, sound = tmp_path / "late.mkv", noise(1)
    encode(path, "pcm_s16le", sound, delay=0.5, picture=True)
    decoded, _ = read_audio(path)
    late = RATE // 2
    assert decoded.shape == (len(sound) + late, 2)
    assert np.abs(decoded[:late]).max() == 0
    assert np.abs(decoded[late:] - sound).max() < 1e-3
    part, _ = read_audio(path, 0.25, 0.5)
    assert np.abs(part - decoded[RATE // 4 : 3 * RATE // 4]).max() == 0


def test_reading_refuses(tmp_path):
    with VideoWriter(tmp_path / "mute.mp4", 32, 32, 10) as writer:
        writer.write_frames(np.zeros((2, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match="has no sound"):
        read_audio(tmp_path / "mute.mp4")
    write_audio(tmp_path / "short.wav", noise(1), RATE)
    with pytest.raises(UserError, match="no sound from 1 s on"):
        read_audio(tmp_path / "short.wav", 1.0)
    for start, duration in ((-1, None), (float("nan"), None), (0, 0), (0, -1)):
        with pytest.raises(ValueError):
            read_audio(tmp_path / "short.wav", start, duration)
