"""Layers that take a clip in pieces and give exactly what they would give if they met it at once.

A convolutional video network is local in time: a kernel of three frames needs two frames of past, a norm per pixel
needs none. So each layer works on a clip as a :class:`Stage`: frames are pushed into it in order, it keeps the few
that it needs again, and gives every frame of its output once. A chain of stages has no seams, computes nothing twice
and needs memory for a handful of frames, however long the clip is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx

# How many pixels (of all frames together) a stage is given at a time; one frame if that alone has more. Measured on
# two CPU cores with random weights of LTX-2.3's widths: below some hundred pixels a push costs as much as reading the
# weights, and above them one frame at a time is the fastest (1.7 times as fast as eight at 128 channels of 32 x 48,
# where the unfolded input of a convolution leaves the cache).
PIXELS_PER_PUSH = 256


class Stage(ABC):
    """One layer at work on one clip.

    Frames are pushed in order, each once; ``last`` says that no more follow. A push always brings at least one frame,
    and the last push always gives at least one.
    """

    @abstractmethod
    def push(self, x: mx.array, last: bool) -> mx.array | None:
        """Take the next frames (B, n, H, W, C) and give those that are ready, (B, m, H', W', C'), or None."""

    @abstractmethod
    def kept(self) -> list[mx.array]:
        """What is held for later pushes; evaluated with every push, or it would hold the graph behind it too."""


def run(stages: Sequence[Stage], clip: Iterable[mx.array], pixels: int | None = PIXELS_PER_PUSH) -> Iterator[mx.array]:
    """Push a clip through a chain of stages.

    Depth first: what a stage gives goes all the way down before the stage is given more, so that the wide late stages
    never hold more than a push. The only place where evaluation happens, once per push of a stage: this frees what
    the push has used, and keeps GPU command buffers short.

    Args:
        stages: fresh ones; a stage serves one clip.
        clip: the frames in order, in arrays (B, n, H, W, C) with n >= 1.
        pixels: how many pixels a stage is given at a time (at least one frame); None for all that is there.

    Yields:
        what the last stage gives, evaluated, (B, n, H', W', C') with n >= 1.
    """
    for piece, final in _with_last(clip):
        waiting = [(0, piece, final)]
        while waiting:
            depth, x, last = waiting.pop()
            if depth == len(stages):
                yield x
                continue
            frames = x.shape[1] if pixels is None else max(1, pixels // (x.shape[2] * x.shape[3]))
            if x.shape[1] > frames:
                waiting.append((depth, x[:, frames:], last))
                x, last = x[:, :frames], False
            y = stages[depth].push(x, last)
            mx.eval(y, stages[depth].kept())
            if y is not None:
                waiting.append((depth + 1, y, last))


def _with_last(clip: Iterable[mx.array]) -> Iterator[tuple[mx.array, bool]]:
    previous = None
    for piece in clip:
        if previous is not None:
            yield previous, False
        previous = piece
    if previous is not None:
        yield previous, True


class Frames(NamedTuple):
    """A run of frames (B, n, H, W, C) of a clip; ``first`` is the clip's index of the first of them."""

    array: mx.array
    first: int

    def at(self, index: int, count: int) -> mx.array:
        """``count`` frames from the clip's frame ``index`` on."""
        start = index - self.first
        return self.array[:, start : start + count]


class Window:
    """The frames that a kernel of three taps in time needs, with two of them kept from push to push.

    Before the first frame stand copies of it: two if ``causal``, otherwise one, and one copy of the last behind it.

    Args:
        causal: whether a frame of the output sees no later frame of the input.
        step: the kernel's stride in time.
    """

    def __init__(self, causal: bool, step: int = 1):
        self.causal, self.step = causal, step
        self.array: mx.array | None = None
        self.first = -2 if causal else -1

    def push(self, x: mx.array, last: bool) -> Frames | None:
        """Take the next frames; give all that the kernel, applied without padding in time, now runs over."""
        before = [x[:, :1]] * -self.first if self.array is None else [self.array]
        after = [x[:, -1:]] if last and not self.causal else []
        x = mx.concatenate([*before, x, *after], axis=1)
        outputs = max(0, (x.shape[1] - 3) // self.step + 1)
        frames = Frames(x, self.first) if outputs else None
        self.first += self.step * outputs
        self.array = None if last else mx.contiguous(x[:, self.step * outputs :])
        return frames

    def kept(self) -> list[mx.array]:
        return [] if self.array is None else [self.array]


class WholeClip(Stage):
    """Keeps all frames until the last has come: for a layer that needs statistics of the whole clip."""

    def __init__(self, stage: Stage):
        self.stage = stage
        self.pieces: list[mx.array] = []

    def push(self, x: mx.array, last: bool) -> mx.array | None:
        self.pieces.append(x)
        if not last:
            return None
        clip, self.pieces = mx.concatenate(self.pieces, axis=1), []
        return self.stage.push(clip, True)

    def kept(self) -> list[mx.array]:
        return [*self.pieces, *self.stage.kept()]
