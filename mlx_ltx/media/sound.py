"""The sound tracks of a clip that is being written: encoded as it is made, or copied from another file.

A track is told how far the picture has come and writes its sound up to there, so that the two alternate in the file.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.container import InputContainer, OutputContainer
from av.packet import Packet

from mlx_ltx.errors import UserError
from mlx_ltx.media.audio import read_blocks, sound_stream
from mlx_ltx.media.containers import open_media, origin

AUDIO_BITS_PER_SECOND = 192_000
COPIED_CODECS = ("aac", "ac3", "alac", "eac3", "mp3")  # what QuickTime plays from an mp4
_BLOCK = 1024  # samples: one AAC frame
_AAC_RATES = tuple(av.codec.Codec("aac", "w").audio_rates or ())
_FALLBACK_RATE = 48_000
# A decoder gets a packet right once it has seen those before it: one for AAC, up to nine small ones for MP3.
_COPIED_PREROLL = Fraction(1, 4)


@dataclass(frozen=True)
class SourceSound:
    """The sound of an existing file, for a clip's sound track.

    What an mp4 can hold (:data:`COPIED_CODECS`) is copied packet by packet, unchanged. Anything else is decoded and
    encoded again, in stereo and at its own rate.

    Attributes:
        path: any sound or video file.
        start: seconds to leave out at its beginning.
        lossless: what cannot be copied becomes Apple Lossless (24 bits; Macs play it, browsers mostly do not)
            instead of AAC.
    """

    path: str | os.PathLike[str]
    start: float = 0.0
    lossless: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start) and self.start >= 0):
            raise ValueError(f"start must be zero or more seconds, not {self.start}")


class SoundTrack(Protocol):
    """A sound track of a file that is being written."""

    rate: int

    def advance(self, seconds: Fraction) -> None:
        """The picture has come to this time."""

    def finish(self, seconds: Fraction) -> None:
        """The picture ends at this time, and so shall the sound."""

    def close(self) -> None:
        """Let go of the source; nothing more is written."""


class EncodedSound:
    """Stereo sound, encoded; exactly as long as the picture, cut or filled with silence.

    Args:
        rate: Hz.
        blocks: where (samples, 2) float32 blocks come from; None if they are given with :meth:`add`.
        lossless: Apple Lossless instead of AAC.
        source: what the blocks are read from, to close it with the track.
    """

    def __init__(
        self,
        container: OutputContainer,
        rate: int,
        blocks: Iterator[np.ndarray] | None = None,
        lossless: bool = False,
        source: InputContainer | None = None,
    ):
        self.container, self.rate = container, rate
        self.blocks, self.source = blocks, source
        self.samples = 0  # encoded so far
        self.pending = np.zeros((0, 2), np.float32)  # not encoded yet
        self.stream = container.add_stream("alac" if lossless else "aac", rate=rate, layout="stereo")
        self.stream.codec_context.time_base = Fraction(1, rate)
        if lossless:
            self.stream.codec_context.format = "s32p"
        else:
            self.stream.codec_context.bit_rate = AUDIO_BITS_PER_SECOND

    def add(self, waveform: np.ndarray) -> None:
        """Append (samples, 2) float32 in [-1, 1]."""
        self.pending = np.concatenate([self.pending, waveform])

    def advance(self, seconds: Fraction) -> None:
        missing = self._missing(seconds)
        self._encode(min(missing, len(self.pending)) // _BLOCK * _BLOCK)  # only the end may be a part of a block

    def finish(self, seconds: Fraction) -> None:
        missing = self._missing(seconds)
        self.add(np.zeros((max(missing - len(self.pending), 0), 2), np.float32))
        self._encode(max(missing, 0))
        self.container.mux(self.stream.encode())

    def close(self) -> None:
        if self.source is not None:
            self.source.close()

    def _missing(self, seconds: Fraction) -> int:
        """Samples from what is encoded to this time; as many of them as there are become pending."""
        missing = round(seconds * self.rate) - self.samples
        while self.blocks is not None and len(self.pending) < missing:
            block = next(self.blocks, None)
            if block is None:
                break
            self.add(np.clip(block, -1, 1))
        return missing

    def _encode(self, count: int) -> None:
        for start in range(0, count, _BLOCK):
            block = self.pending[start : min(start + _BLOCK, count)]
            frame = AudioFrame.from_ndarray(np.ascontiguousarray(block.T), format="fltp", layout="stereo")
            frame.sample_rate, frame.pts, frame.time_base = self.rate, self.samples, Fraction(1, self.rate)
            self.container.mux(self.stream.encode(frame))
            self.samples += len(block)
        self.pending = self.pending[count:]


class CopiedSound:
    """Packets of another file as they are; the last one's time is cut to the picture's end.

    A start between packets is kept by an edit list, which tells players to skip what comes before. Where the source
    ends before the picture, the track ends too.
    """

    def __init__(self, container: OutputContainer, source: InputContainer, sound: SourceSound):
        self.container, self.source, self.path = container, source, sound.path
        template = sound_stream(source, sound.path)
        assert template.time_base is not None
        self.rate = template.rate
        self.stream = container.add_stream_from_template(template)
        self.tick = template.time_base
        self.start = sound.start
        # The source's own time, in its ticks, at which the clip begins.
        self.first = round((Fraction(self.start) + origin(source)) / self.tick)
        self.packets = (packet for packet in source.demux(template) if packet.size and packet.pts is not None)
        self.waiting: Packet | None = None
        self.copied = False

    def advance(self, seconds: Fraction) -> None:
        while (packet := self._next()) is not None and self._end(packet) <= seconds / self.tick:
            self._write(packet)

    def finish(self, seconds: Fraction) -> None:
        self.advance(seconds)
        last = round(seconds / self.tick)
        packet = self._next()
        if packet is not None and self._begin(packet) < last:
            packet.duration = last - self._begin(packet)
            self._write(packet)
        if not self.copied:
            raise UserError(f"{self.path}: has no sound from {self.start:g} s on")

    def close(self) -> None:
        self.source.close()

    def _next(self) -> Packet | None:
        """The next packet to write, which stays the next until :meth:`_write`."""
        preroll = round(_COPIED_PREROLL / self.tick)
        while self.waiting is None:
            try:
                packet = next(self.packets, None)
            except av.FFmpegError as error:
                raise UserError(f"{self.path}: its sound is damaged ({error.strerror})") from None
            if packet is None:
                return None
            if packet.is_corrupt:
                raise UserError(f"{self.path}: its sound is damaged (the file ends amid a packet)")
            if self._end(packet) > -preroll:
                self.waiting = packet
        return self.waiting

    def _write(self, packet: Packet) -> None:
        self.waiting = None
        self.copied = self.copied or self._end(packet) > 0
        packet.pts = packet.dts = self._begin(packet)
        packet.stream = self.stream
        self.container.mux_one(packet)

    def _begin(self, packet: Packet) -> int:
        assert packet.pts is not None
        return packet.pts - self.first

    def _end(self, packet: Packet) -> int:
        return self._begin(packet) + (packet.duration or 0)


def source_track(container: OutputContainer, sound: SourceSound) -> SoundTrack:
    """Open a file's sound as a track of another.

    Raises:
        UserError: it cannot be read or has no sound.
    """
    source = open_media(sound.path)
    try:
        stream = sound_stream(source, sound.path)
        if stream.codec_context.codec.canonical_name in COPIED_CODECS:
            return CopiedSound(container, source, sound)
        rate = stream.rate if sound.lossless or stream.rate in _AAC_RATES else _FALLBACK_RATE
        blocks = read_blocks(source, sound.path, sound.start, rate, stereo=True)
        first = next(blocks, None)
        if first is None:
            raise UserError(f"{sound.path}: has no sound from {sound.start:g} s on")
        return EncodedSound(container, rate, itertools.chain([first], blocks), sound.lossless, source)
    except BaseException:
        source.close()
        raise
