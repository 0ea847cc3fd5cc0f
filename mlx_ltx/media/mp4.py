"""The mp4 file that is being written: its picture encoders, and sound beside the picture."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from mlx_ltx.media.color import hlg_signal, yuv_10bit
from mlx_ltx.media.sound import EncodedSound, SoundTrack, SourceSound, source_track

_BT709 = 1  # codes of ITU-T H.273; this one is for primaries, transfer and matrix alike
_BT2020, _HLG = 9, 18  # primaries and matrix; transfer
# swscale's defaults round down, which darkens a picture by more than a level in each direction. With these, luma is the
# rounded exact value and chroma is the mean of its 2×2 pixels.
_TO_YUV = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP
_X265 = {
    "colorprim": "bt2020",
    "transfer": "arib-std-b67",
    "colormatrix": "bt2020nc",
    "range": "limited",
    "repeat-headers": "1",
    "info": "0",
    "bframes": "0",  # with them, clips of one or two frames come out without times
    "log-level": "none",
}


class SdrPicture:
    """H.264, 8 bits, BT.709 in limited range, from (H, W, 3) uint8 RGB."""

    dtype = np.dtype(np.uint8)

    def __init__(self, container: OutputContainer, width: int, height: int, rate: Fraction, crf: int):
        options = {"preset": "veryfast", "crf": str(crf)}
        if width % 16 or height % 16:
            options["mbtree"] = "0"  # it reads beyond such a picture, so that bytes differ from run to run
        self.stream = container.add_stream("libx264", rate=rate, options=options)
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "yuv420p"
        context = self.stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = ColorRange.MPEG
        self.reformatter = VideoReformatter()

    def convert(self, pixels: np.ndarray) -> VideoFrame:
        return self.reformatter.reformat(
            VideoFrame.from_ndarray(pixels, format="rgb24"),
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            interpolation=_TO_YUV,
        )


class HlgPicture:
    """HEVC, 10 bits, BT.2020 primaries, HLG, in limited range, from (H, W, 3) float32 linear Rec.709.

    Tagged ``hvc1``, without which QuickTime shows no picture.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, container: OutputContainer, width: int, height: int, rate: Fraction, crf: int):
        parameters = ":".join(f"{name}={value}" for name, value in _X265.items())
        options = {"preset": "veryfast", "crf": str(crf), "x265-params": parameters}
        self.stream = container.add_stream("libx265", rate=rate, options=options)
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "yuv420p10le"
        context = self.stream.codec_context
        context.codec_tag = "hvc1"
        context.color_primaries, context.color_trc, context.colorspace = _BT2020, _HLG, _BT2020
        context.color_range = ColorRange.MPEG

    def convert(self, pixels: np.ndarray) -> VideoFrame:
        height, width, _ = pixels.shape
        frame = VideoFrame(width, height, "yuv420p10le")
        for plane, values in zip(frame.planes, yuv_10bit(hlg_signal(pixels)), strict=True):
            rows = np.frombuffer(memoryview(plane), np.uint16).reshape(plane.height, plane.line_size // 2)
            rows[:, : values.shape[1]] = values
        frame.color_primaries, frame.color_trc, frame.colorspace = _BT2020, _HLG, _BT2020
        frame.color_range = ColorRange.MPEG
        return frame


class Mp4:
    """The tracks of a file being written. Not for more than one thread at a time.

    Args:
        hlg: :class:`HlgPicture` instead of :class:`SdrPicture`.
        sound: the rate of sound that will be given, a file whose sound to take, or None for none.
        comment: text to keep inside the file.
    """

    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        rate: Fraction,
        crf: int,
        hlg: bool,
        sound: int | SourceSound | None,
        comment: str | None,
    ):
        self.rate = rate
        self.frames = 0  # encoded so far
        self.container: OutputContainer = av.open(str(path.absolute()), "w", format="mp4")
        try:
            self.picture = (HlgPicture if hlg else SdrPicture)(self.container, width, height, rate, crf)
            self.picture.stream.codec_context.time_base = 1 / rate
            self.sound: SoundTrack | None = None
            if isinstance(sound, SourceSound):
                self.sound = source_track(self.container, sound)
            elif sound is not None:
                self.sound = EncodedSound(self.container, sound)
        except BaseException:
            self.container.close()
            raise
        self.container.options.update(
            {
                "movflags": "+faststart",  # the index in front: playback starts before the whole file has arrived
                "max_interleave_delta": "0",  # hold packets back, however long, until sound and picture can alternate
                # else the sound's length is rounded to milliseconds
                "movie_timescale": str(self.sound.rate if self.sound else rate.numerator),
            }
        )
        if comment is not None:
            self.container.metadata["comment"] = comment

    def add_frame(self, pixels: np.ndarray) -> None:
        frame = self.picture.convert(pixels)
        frame.pts, frame.time_base = self.frames, 1 / self.rate
        self.container.mux(self.picture.stream.encode(frame))
        self.frames += 1
        if self.sound is not None:
            self.sound.advance(self.frames / self.rate)

    def add_sound(self, waveform: np.ndarray) -> None:
        assert isinstance(self.sound, EncodedSound)
        self.sound.add(waveform)
        self.sound.advance(self.frames / self.rate)

    def finish(self) -> None:
        """Flush the encoders and write the index."""
        if self.sound is not None:
            self.sound.finish(self.frames / self.rate)
        self.container.mux(self.picture.stream.encode())
        self.close()

    def close(self) -> None:
        """Close the files, complete or not."""
        if self.sound is not None:
            self.sound.close()
        self.container.close()
