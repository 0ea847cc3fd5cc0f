"""The sound of an existing file in a new clip: copied unchanged where an mp4 can hold it, encoded otherwise."""

from fractions import Fraction

import av
import numpy as np
import pytest

from mlx_ltx.errors import UserError
from mlx_ltx.media.audio import fit_length, read_audio, read_sound, stereo_mix
from mlx_ltx.media.resample import resample
from mlx_ltx.media.video import SourceSound, VideoWriter, probe, read_frames


def tone(seconds, rate, channels=2):
    t = np.arange(round(seconds * rate)) / rate
    waves = [0.3 * np.sin(2 * np.pi * (300 + 170 * channel) * t * (1 + t / 5)) for channel in range(channels)]
    return np.stack(waves, 1).astype(np.float32)


def record(path, codec, rate, seconds=3.0, layout="stereo", picture=False):
    waveform = tone(seconds, rate, av.AudioLayout(layout).nb_channels)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, width=32, height=32, pix_fmt="yuv420p") if picture else None
        stream = container.add_stream(codec, rate=rate, layout=layout)
        if video is not None:
            for number in range(round(seconds * 25)):
                frame = av.VideoFrame(32, 32, "yuv420p")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                container.mux(video.encode(frame))
            container.mux(video.encode())
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(waveform.T), format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return waveform


def clip(path, sound, frames=24, fps=24):
    """One second of grey with this sound."""
    with VideoWriter(path, 64, 48, fps, sound=sound, force=True) as writer:
        writer.write_frames(np.full((frames, 48, 64, 3), 99, np.uint8))


def packets(path):
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


def codec_of(path):
    with av.open(str(path)) as container:
        return container.streams.audio[0].codec_context.codec.canonical_name


COPIED = [("a.m4a", "aac", 44100), ("a.mp3", "libmp3lame", 48000), ("a.ac3", "ac3", 48000), ("a.caf", "alac", 32000)]


@pytest.mark.parametrize(("name", "codec", "rate"), [*COPIED, ("a.aac", "aac", 48000), ("a.mov", "eac3", 48000)])
@pytest.mark.parametrize("start", [0, 0.7])
def test_what_an_mp4_can_hold_is_copied(tmp_path, name, codec, rate, start):
    source, target = tmp_path / name, tmp_path / "clip.mp4"
    record(source, codec, rate)
    clip(target, SourceSound(source, start))
    copied, original = packets(target), packets(source)
    if name == "a.aac":
        original = [packet[7:] for packet in original]  # without the headers, which an mp4 keeps elsewhere
    first = original.index(copied[0])
    assert original[first : first + len(copied)] == copied  # byte for byte
    assert (first == 0) == (start == 0)
    expected, _ = read_audio(source, start, 1.0)
    heard, heard_rate = read_audio(target)
    assert heard_rate == rate
    assert len(heard) == pytest.approx(rate, abs=1)  # exactly the picture's length
    assert np.abs(heard - expected[: len(heard)]).max() < 1e-4  # decoders add noise of 1e-5 that depends on the past
    assert probe(target).audio_duration == pytest.approx(1.0, abs=1e-4)
    assert len(list(read_frames(target))) == 24


def test_the_sound_of_a_video_of_any_rate(tmp_path):
    record(tmp_path / "film.mp4", "aac", 48000, layout="5.1", picture=True)
    clip(tmp_path / "clip.mp4", SourceSound(tmp_path / "film.mp4"), frames=30, fps=29.97)
    info = probe(tmp_path / "clip.mp4")
    assert (info.audio_channels, info.audio_rate) == (6, 48000)
    assert info.audio_duration == pytest.approx(30 * 1001 / 30000, abs=1e-4)
    heard, _ = read_audio(tmp_path / "clip.mp4")
    assert np.abs(heard - read_audio(tmp_path / "film.mp4")[0][: len(heard)]).max() < 1e-4


@pytest.mark.parametrize(("name", "codec", "rate"), [("a.wav", "pcm_s16le", 44100), ("a.flac", "flac", 22050)])
def test_the_rest_is_encoded_at_its_own_rate(tmp_path, name, codec, rate):
    source, target = tmp_path / name, tmp_path / "clip.mp4"
    record(source, codec, rate)
    expected, _ = read_audio(source, 0.25, 1.0)
    clip(target, SourceSound(source, 0.25))
    heard, heard_rate = read_audio(target)
    assert (codec_of(target), heard_rate, heard.shape) == ("aac", rate, expected.shape)
    assert np.sqrt(((heard - expected)[2000:-2000] ** 2).mean()) < 0.01
    clip(target, SourceSound(source, 0.25, lossless=True))
    heard, heard_rate = read_audio(target)
    assert (codec_of(target), heard_rate) == ("alac", rate)
    assert np.array_equal(heard, expected)


def test_24_bits_at_a_high_rate(tmp_path):
    record(tmp_path / "a.wav", "pcm_s24le", 192000)
    clip(tmp_path / "clip.mp4", SourceSound(tmp_path / "a.wav", 0.5, lossless=True))
    expected, rate = read_audio(tmp_path / "a.wav", 0.5, 1.0)
    assert rate == 192000
    assert np.array_equal(read_audio(tmp_path / "clip.mp4")[0], expected)
    clip(tmp_path / "clip.mp4", SourceSound(tmp_path / "a.wav", 0.5))  # AAC ends at 96 kHz
    heard, rate = read_audio(tmp_path / "clip.mp4")
    assert rate == 48000
    wanted = resample(expected, 192000, 48000)
    assert np.sqrt(((heard - wanted)[2000:-2000] ** 2).mean()) < 0.01


def test_one_channel_is_heard_on_both_sides(tmp_path):
    waveform = record(tmp_path / "a.wav", "pcm_s16le", 48000, layout="mono")
    clip(tmp_path / "clip.mp4", SourceSound(tmp_path / "a.wav", lossless=True))
    heard, _ = read_audio(tmp_path / "clip.mp4")
    assert np.abs(heard - waveform[:48000]).max() < 1e-4


@pytest.mark.parametrize("codec", ["pcm_s16le", "libopus"])
def test_sound_that_ends_early(tmp_path, codec):
    source = tmp_path / ("a.wav" if codec == "pcm_s16le" else "a.opus")
    record(source, codec, 48000, seconds=0.4)
    clip(tmp_path / "clip.mp4", SourceSound(source))
    heard, _ = read_audio(tmp_path / "clip.mp4")
    assert len(heard) == 48000  # silence to the end
    assert np.abs(heard[3000:18000]).max() > 0.2
    assert np.abs(heard[22000:]).max() < 1e-3
    record(tmp_path / "a.m4a", "aac", 48000, seconds=0.4)
    clip(tmp_path / "clip.mp4", SourceSound(tmp_path / "a.m4a"))
    assert len(read_audio(tmp_path / "clip.mp4")[0]) == pytest.approx(19200, abs=1024)  # players are silent after it
    assert len(list(read_frames(tmp_path / "clip.mp4"))) == 24


def test_sound_alternates_with_the_picture(tmp_path):
    record(tmp_path / "a.m4a", "aac", 48000)
    clip(tmp_path / "clip.mp4", SourceSound(tmp_path / "a.m4a"), frames=60)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        at = {"video": [], "audio": []}
        for packet in container.demux():
            if packet.size:
                at[packet.stream.type].append(packet.pos)
    middle = sorted(at["audio"])[len(at["audio"]) // 2]
    assert 0.2 < np.mean(np.array(at["video"]) < middle) < 0.8


def test_what_has_no_sound(tmp_path):
    clip(tmp_path / "silent.mp4", None)
    (tmp_path / "text.wav").write_text("no sound")
    record(tmp_path / "a.m4a", "aac", 48000, seconds=1)
    record(tmp_path / "a.wav", "pcm_s16le", 48000, seconds=1)
    for name, start, message in [
        ("silent.mp4", 0, "has no sound"),
        ("text.wav", 0, "not a video or sound file"),
        ("none.wav", 0, "no such file"),
        ("a.m4a", 5, "has no sound from 5 s on"),
        ("a.wav", 5, "has no sound from 5 s on"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            clip(tmp_path / "clip.mp4", SourceSound(tmp_path / name, start))
        assert "\n" not in str(caught.value)
    assert not [file for file in tmp_path.iterdir() if "clip" in file.name]


def test_a_truncated_source(tmp_path):
    record(tmp_path / "a.m4a", "aac", 48000)
    with (
        av.open(str(tmp_path / "a.m4a")) as original,
        av.open(str(tmp_path / "b.mp4"), "w", options={"movflags": "+faststart"}) as copy,
    ):
        stream = copy.add_stream_from_template(original.streams.audio[0])
        for packet in original.demux(audio=0):
            if packet.size:
                packet.stream = stream
                copy.mux(packet)
    whole = (tmp_path / "b.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is cut off"):
        clip(tmp_path / "clip.mp4", SourceSound(tmp_path / "b.mp4"), frames=72)
    record(tmp_path / "a.mp3", "libmp3lame", 48000)
    whole = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "a.mp3").write_bytes(whole[: len(whole) // 2])
    clip(tmp_path / "clip.mp4", SourceSound(tmp_path / "a.mp3"), frames=72)  # an MP3 has no end that could be missing
    assert probe(tmp_path / "clip.mp4").audio_duration == pytest.approx(1.5, abs=0.1)


def test_a_packet_that_is_cut_off(tmp_path):
    """An FLV file says nowhere how long it should be, so only the packet tells."""
    record(tmp_path / "a.flv", "aac", 48000)
    whole = (tmp_path / "a.flv").read_bytes()
    (tmp_path / "a.flv").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.flv: its sound is damaged \(the file ends amid a packet\)"):
        clip(tmp_path / "clip.mp4", SourceSound(tmp_path / "a.flv"), frames=72)
    assert not (tmp_path / "clip.mp4").exists()


def test_wrong_arguments(tmp_path):
    for start in (-1, float("nan")):
        with pytest.raises(ValueError, match="start"):
            SourceSound(tmp_path / "a.wav", start)
    with pytest.raises(ValueError, match="not both"):
        VideoWriter(tmp_path / "clip.mp4", 64, 48, 24, 48000, sound=SourceSound(tmp_path / "a.wav"))
    record(tmp_path / "a.m4a", "aac", 48000)
    with (
        pytest.raises(ValueError, match="sample_rate"),
        VideoWriter(tmp_path / "clip.mp4", 64, 48, 24, sound=SourceSound(tmp_path / "a.m4a")) as writer,
    ):
        writer.write_audio(tone(1, 48000))


def test_stereo_from_any_number_of_channels(tmp_path):
    half = 0.5**0.5
    assert stereo_mix(["FC"]).tolist() == [[1, 1]]
    assert stereo_mix(["FL", "FR"]).tolist() == stereo_mix(["?", "?"]).tolist() == [[1, 0], [0, 1]]
    surround = stereo_mix(["FL", "FR", "FC", "LFE", "BL", "BR"]) * (1 + 2 * half)
    expected = [[1, 0], [0, 1], [half, half], [0, 0], [half, 0], [0, half]]
    assert np.abs(surround - expected).max() < 1e-6
    assert np.array_equal(stereo_mix(["?"] * 6), stereo_mix(["FL", "FR", "FC", "LFE", "BL", "BR"]))
    assert stereo_mix(["?"] * 20).sum(0) == pytest.approx([1, 1])  # unheard of, but never louder
    waveform = record(tmp_path / "a.wav", "pcm_s16le", 48000, 0.5, "5.1")
    mixed, _ = read_audio(tmp_path / "a.wav", stereo=True)
    assert np.abs(mixed - waveform @ stereo_mix(["FL", "FR", "FC", "LFE", "BL", "BR"])).max() < 1e-4


@pytest.mark.parametrize(("codec", "suffix"), [("pcm_s16le", "wav"), ("libopus", "webm"), ("aac", "mp4")])
def test_sound_for_a_network(tmp_path, codec, suffix):
    waveform = record(tmp_path / f"a.{suffix}", codec, 48000, layout="mono")
    read = read_sound(tmp_path / f"a.{suffix}", 16000, start=0.5, duration=1.25)
    assert (read.shape, read.dtype) == ((20000, 2), np.float32)
    expected = resample(waveform[24000:84000], 48000, 16000)
    error = (read - expected)[100:-100]
    assert np.sqrt((error**2).mean()) < (1e-4 if codec == "pcm_s16le" else 0.03)
    assert read_sound(tmp_path / f"a.{suffix}", 16000, start=2.5, duration=5).shape[0] == pytest.approx(8000, abs=300)


def test_fit_length():
    waveform = tone(0.01, 1000)
    assert np.array_equal(fit_length(waveform, 4), waveform[:4])
    padded = fit_length(waveform, 14)
    assert padded.shape == (14, 2)
    assert np.array_equal(padded[:10], waveform)
    assert not padded[10:].any()
