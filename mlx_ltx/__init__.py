"""Lightricks' LTX-2 audio-video models on Apple Silicon, in MLX.

import mlx_ltx

request = mlx_ltx.Request(prompt="A red circle moves to the right.", model="demo", output="circle.mp4")
result = mlx_ltx.run(request)                 # or, for progress, previews and cancelling:
for event in mlx_ltx.stream(request): ...
"""

from collections.abc import Iterator

from mlx_ltx.errors import UserError
from mlx_ltx.events import Event, Finished
from mlx_ltx.request import ImageInput, Request
from mlx_ltx.version import __version__


def stream(request: Request) -> Iterator[Event]:
    """Do what ``request`` asks for, event by event (:mod:`mlx_ltx.events`); the last event is :class:`Finished`.

    All MLX work happens on the thread that iterates, while it iterates. To cancel, stop iterating (``close()`` the
    iterator, or let it go): what was not finished leaves nothing behind.

    Raises:
        UserError: something that the user can put right, in one line; before the first event for everything that can
            be known beforehand. :class:`mlx_ltx.checkpoints.resolve.MissingFiles` says what is to be downloaded.
    """
    from mlx_ltx.pipelines.job import prepare

    return prepare(request).run()


def run(request: Request) -> Finished:
    """Do what ``request`` asks for and return its last event; raises as :func:`stream`."""
    *_, last = stream(request)
    assert isinstance(last, Finished)
    return last


__all__ = ["Event", "Finished", "ImageInput", "Request", "UserError", "__version__", "run", "stream"]
