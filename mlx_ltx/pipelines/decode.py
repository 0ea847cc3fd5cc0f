"""Part of recipes that make a picture: how latents become frames.

- ``none``: the picture is decoded whole, frame by frame. Exact, and nothing is computed twice.
- ``bands-2`` to ``bands-4``: one part of the picture after the other, for machines with little memory. Exact too; the
  finished parts of frames wait in a temporary file.
- ``reference``: overlapping tiles that are blended, as the reference does it. An approximation, needs more memory; for
  results that must be the reference's, and for decoders with a layer that is not local.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from mlx_ltx.errors import UserError
from mlx_ltx.models.video_tiling import Tiling, decode_tiled
from mlx_ltx.models.video_vae import VideoDecoder
from mlx_ltx.request import BANDS
from mlx_ltx.sampling.noise import Noise


class FrameFile:
    """Frames that wait on disk, first in, first out: all are written before the first is read.

    The file has no name, so nothing is left of it, however the program ends.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as this is)
        self._reading = False

    def append(self, frame: mx.array) -> None:
        """Write a frame; all have the same shape and dtype.

        Raises:
            UserError: there is no room.
        """
        self._shape, self._dtype = frame.shape, frame.dtype
        try:
            self._file.write(np.array(frame.view(mx.uint8)).data)
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"parts of frames cannot wait in {tempfile.gettempdir()} ({error.strerror}); make room there, or name "
                "another folder in TMPDIR"
            ) from None

    def popleft(self) -> mx.array:
        if not self._reading:
            self._file.seek(0)
            self._reading = True
        *outer, channels = self._shape
        shape = (*outer, channels * self._dtype.size)
        data = self._file.read(int(np.prod(shape)))
        return mx.array(np.frombuffer(data, np.uint8).reshape(shape)).view(self._dtype)


def decode_frames(decoder: VideoDecoder, latent: mx.array, noise: Noise, tiling: str = "none") -> Iterator[np.ndarray]:
    """Latent (1, F, H, W, C) to frames (1, H, W, 3), float32 nominally in [-1, 1], in order, as soon as they are ready.

    Args:
        tiling: one of :data:`mlx_ltx.request.VAE_TILINGS`; ``auto`` is ``none``.

    Yields:
        with several bands, first an array of no frames (0, H, W, 3) whenever a part of a frame is done.
    """
    latent = latent.astype(decoder.conv_in.conv.weight.dtype)
    if tiling == "reference":
        scale = decoder.config.space_scale
        ways = Tiling.automatic(latent.shape[2] * scale, latent.shape[3] * scale, scale)
        decoded = decode_tiled(decoder, latent, ways, noise=noise)
    else:
        decoded = decoder.stream(latent, noise=noise, bands=BANDS.get(tiling, 1), aside=FrameFile)
    for frames in decoded:
        count = frames.shape[1]
        for index in range(count) if count else [0]:
            yield np.array(frames[0, index : index + 1].astype(mx.float32))
