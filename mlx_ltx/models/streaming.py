"""Layers that take a clip in pieces and give exactly what they would give if they met it at once.

A convolutional video network is local: a kernel of 3x3x3 needs a frame and a row on either side, a norm per pixel needs
none. So each layer works on a clip as a :class:`Stage`: pieces come in order, some frames or some rows of a frame at a
time; it keeps the two frames (and two rows) that its kernel meets again, and gives every row of its output once. A
chain of stages has no seams, computes nothing twice and needs memory for a handful of frames, however long the clip is.

Stages are generators over pieces. Whoever asks the last one for frames pulls pieces through all of them, each as soon
as it is ready, so that the wide late stages never hold more than a piece beside what they keep.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import mlx.core as mx

# How many elements a piece has at most, if a row of one frame has no more. Larger ones spend less on what is done again
# at their edges (a residual block activates its input anew for every piece), smaller ones stay in the caches and keep
# the memory beside the kept frames low. See PaddedConv for the limit within a convolution.
ELEMENTS_PER_PIECE = 1 << 20
# How many frames a piece has at most. Below some hundred pixels a piece costs as much as reading the weights; beyond a
# few frames there is nothing to gain, but memory would depend on the length of short clips of small pictures.
FRAMES_PER_PIECE = 4


class Rows(NamedTuple):
    """The rows of a picture that are worked on: from ``first`` to before ``stop``, of ``height``."""

    first: int
    stop: int
    height: int

    def times(self, factor: int) -> Rows:
        return Rows(self.first * factor, self.stop * factor, self.height * factor)


class Piece(NamedTuple):
    """Whole frames, or some rows of one frame.

    Pieces follow each other in the order of their frames, and within a frame from top to bottom.

    Attributes:
        array: (B, n, h, W, C).
        top: the picture's row that the array begins with.
        rows: those that all pieces of a frame have together.
        last: no later frame follows.
    """

    array: mx.array
    top: int
    rows: Rows
    last: bool

    @property
    def bottom(self) -> int:
        """The row after the array's last."""
        return self.top + self.array.shape[2]

    @property
    def ends(self) -> bool:
        return self.bottom == self.rows.stop

    @property
    def whole(self) -> bool:
        return self.top == self.rows.first and self.ends


class Stage(ABC):
    """One layer at work on one clip.

    Attributes:
        factors: how many frames, rows and columns it makes of one.
        growth: how many elements its arrays have at the most for one of the input.
        out_channels: how many channels its output has.
        activates: it normalises its input and passes it through an activation, anew for every piece.
        whole_clip: it gives nothing before it has met all frames.
    """

    factors: tuple[Fraction, Fraction, Fraction] = (Fraction(1), Fraction(1), Fraction(1))
    growth: float = 1
    out_channels: int
    activates = False
    whole_clip = False

    @abstractmethod
    def run(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """Give the output's pieces, evaluated, as soon as the input's have come."""

    @abstractmethod
    def windows(self) -> list[Window]:
        """What keeps frames between pieces."""

    def kept(self) -> list[mx.array]:
        """What is held now for later pieces."""
        return [array for window in self.windows() for array in window.kept()]


def run(
    stages: Sequence[Stage], clip: Iterable[mx.array], elements: int | None = ELEMENTS_PER_PIECE
) -> Iterator[mx.array]:
    """Send a clip through a chain of stages.

    Args:
        stages: fresh ones; a stage serves one clip.
        clip: the frames in order, in arrays (B, n, H, W, C) with n >= 1.
        elements: how many a piece may have; None for all frames that are there at once.

    Yields:
        what the last stage gives, evaluated, (B, n, H', W', C') with n >= 1.
    """
    return frames(chain(stages, feed(clip), elements))


def chain(stages: Sequence[Stage], pieces: Iterator[Piece], elements: int | None) -> Iterator[Piece]:
    """The pieces that the last of the stages gives; the arguments are those of :func:`run`."""
    for stage in stages:
        limited = pieces if elements is None else split(pieces, max(1, int(elements / stage.growth)))
        pieces = stage.run(limited)
    return pieces


def feed(clip: Iterable[mx.array], rows: Rows | None = None) -> Iterator[Piece]:
    """The frames (B, n, H, W, C) as pieces; ``rows`` says which rows of a picture they are, by default all."""
    previous = None
    for array in clip:
        if previous is not None:
            yield previous
        height = array.shape[2]
        previous = Piece(array, rows.first if rows else 0, rows or Rows(0, height, height), False)
        del array
    if previous is not None:
        yield previous._replace(last=True)


def frames(pieces: Iterable[Piece]) -> Iterator[mx.array]:
    """Put rows together to frames (B, n, H, W, C)."""
    parts: list[mx.array] = []
    for piece in pieces:
        parts.append(piece.array)
        ends = piece.ends
        del piece
        if ends:
            parts = [together(parts, 2)]
            mx.eval(parts)
            yield parts.pop()


def crop(pieces: Iterable[Piece], first: int, stop: int) -> Iterator[Piece]:
    """The rows from ``first`` to before ``stop`` of what comes."""
    for array, top, rows, last in pieces:
        a, b = max(first, top), min(stop, top + array.shape[2])
        if a < b:
            yield Piece(array[:, :, a - top : b - top], a, Rows(first, stop, rows.height), last)


def reach(stages: Sequence[Stage]) -> int:
    """How many rows of the input above and below its own an output row can depend on, at most."""
    rows = 0
    for stage in reversed(stages):
        rows = math.ceil(rows / stage.factors[1]) + Window.MARGIN * len(stage.windows())
    return rows


def split(pieces: Iterable[Piece], elements: int) -> Iterator[Piece]:
    """The same frames and rows in pieces of at most so many elements, or of one row. None is held while it is used.

    Rows of several frames, as a layer that doubles time gives them, come out frame by frame: the later frames wait.
    """
    parts: deque[Piece] = deque()
    later: list[deque[Piece]] = []
    for piece in pieces:
        array, top, rows, last = piece
        n = array.shape[1]
        step = min(FRAMES_PER_PIECE, max(1, elements // (array.size // n))) if piece.whole else 1
        sets = [
            _bands(Piece(cut(array, 1, i, i + step), top, rows, last and i + step >= n), elements)
            for i in range(0, n, step)
        ]
        whole, ends = piece.whole, piece.ends
        del piece, array
        if whole:
            parts.extend(part for bands in sets for part in bands)
        else:
            parts.extend(sets[0])
            later = later or [deque() for _ in sets[1:]]
            for queue, bands in zip(later, sets[1:], strict=True):
                queue.extend(bands)
        del sets
        while parts:
            yield parts.popleft()
        if ends:
            for queue in later:
                while queue:
                    yield queue.popleft()
            later = []


def _bands(piece: Piece, elements: int) -> list[Piece]:
    """The piece in pieces of some rows each, if it is a single frame with more elements."""
    array, top, rows, last = piece
    h = array.shape[2]
    step = max(1, elements // (array.size // h)) if array.shape[1] == 1 else h
    step = -(-h // -(-h // step))  # as even as can be
    return [Piece(cut(array, 2, start, start + step), top + start, rows, last) for start in range(0, h, step)]


def together(parts: Sequence[mx.array], axis: int) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(list(parts), axis=axis)


def cut(array: mx.array, axis: int, start: int, stop: int) -> mx.array:
    """A part of the array with memory of its own, so that it does not hold the rest."""
    if start == 0 and stop >= array.shape[axis]:
        return array
    index = [slice(None)] * axis + [slice(start, stop)]
    part = mx.contiguous(array[tuple(index)])
    mx.eval(part)
    return part


class Patch(NamedTuple):
    """What a kernel, applied without padding in time, now runs over, and which part of its output that gives.

    Attributes:
        array: (B, t, h, W, C), the input's frames and rows.
        above, below: whether the picture ends there, so that a row of padding is due.
        first: number of the first output frame.
        frames: how many output frames there are.
        top, bottom: the output's rows.
        rows: those that all patches of an output frame have together.
        last: no later output frame follows.
    """

    array: mx.array
    above: bool
    below: bool
    first: int
    frames: int
    top: int
    bottom: int
    rows: Rows
    last: bool

    def piece(self, y: mx.array, factor: int = 1) -> Piece:
        """The output as a piece, if the layer makes ``factor`` rows of one."""
        return Piece(y, self.top * factor, self.rows.times(factor), self.last)


class Window:
    """The input of a kernel of 3x3x3 that walks over a clip; keeps what the kernel meets again.

    Before the first frame stand copies of it, two for a causal kernel, otherwise one and one of the last behind it.

    Args:
        causal: whether a frame of the output sees no later frame of the input.
        channels: of the input.
        kernels: how many channels the convolution makes.
        step: by how many frames the kernel moves.
        size: how many frames an output frame needs.
        copies: how many copies of the first frame there are, if not as above.
        row_step: by how many rows the kernel moves.
    """

    MARGIN = 1  # rows above and below that an output row needs

    def __init__(
        self,
        causal: bool,
        channels: int,
        kernels: int,
        step: int = 1,
        size: int = 3,
        copies: int | None = None,
        row_step: int = 1,
    ):
        self.channels, self.kernels = channels, kernels
        self.step, self.size, self.row_step = step, size, row_step
        self.start = -copies if copies is not None else (-2 if causal else -1)
        self.after = 0 if causal else 1
        self.strips: dict[int, list[tuple[int, mx.array]]] = {}  # of every kept frame: row and array (B, 1, h, W, C)
        self.count = 0  # frames that have come, or begun to
        self.due: Callable[[], None] | None = None

    def patches(self, pieces: Iterable[Piece]) -> Iterator[Patch]:
        """Give patches as soon as they can be.

        What a patch needed is kept until :meth:`release`, or until the next patch is asked for.
        """
        next_frame, next_row, number = self.start, 0, 0
        for piece in pieces:
            self._store(piece)
            last, ends, whole, bottom, rows = piece.last, piece.ends, piece.whole, piece.bottom, piece.rows
            del piece
            out = self.output_rows(rows)
            after = self.after if last else 0
            if whole:
                count = max(0, (self.count + after - next_frame - self.size) // self.step + 1)
                if count == 0:
                    continue
                self.due = partial(self._drop, next_frame + self.step * count, own=True)
                yield self._patch(next_frame, number, count, out.first, out.stop, rows, last)
                self.release()
                next_frame, number = next_frame + self.step * count, number + count
                continue
            # Rows of one frame: the output frame whose newest input frame this is, as far as it goes; then, at the
            # clip's end, the one that sees a copy of the last frame, in the same bands.
            if next_frame + self.size == self.count:
                final = last and next_frame + self.step + self.size > self.count + after
                stop = out.stop if ends else (bottom - self.MARGIN) // self.row_step
                next_row = max(next_row, out.first)
                if stop > next_row:
                    if ends:
                        self.due = partial(self._drop, next_frame + self.step)
                    else:
                        self.due = partial(self._drop_rows, next_frame, self.row_step * stop - self.MARGIN)
                    yield self._patch(next_frame, number, 1, next_row, stop, rows, final)
                    self.release()
                    next_row = stop
                if ends:
                    next_frame, number, next_row = next_frame + self.step, number + 1, 0
            if last and ends and next_frame + self.size <= self.count + after:
                next_row = out.first
                for bottom in [top + array.shape[2] for top, array in self.strips[self.count - 1]]:
                    stop = out.stop if bottom == rows.stop else (bottom - self.MARGIN) // self.row_step
                    if stop > next_row:
                        yield self._patch(next_frame, number, 1, next_row, stop, rows, True)
                        next_row = stop

    def release(self) -> None:
        """Keep only what later patches need."""
        if self.due is not None:
            self.due()
            self.due = None

    def output_rows(self, rows: Rows) -> Rows:
        """Which rows of the output come of those rows of the input: at the picture's edges all, elsewhere less."""
        step = self.row_step
        first = -(-(rows.first + self.MARGIN) // step) if rows.first > 0 else 0
        stop = (rows.stop - self.MARGIN) // step if rows.stop < rows.height else rows.height // step
        return Rows(first, stop, rows.height // step)

    def take(self, frame: int, count: int, top: int, bottom: int) -> mx.array:
        """Rows of kept frames, (B, count, bottom - top, W, C); outside the clip they are copies of its ends."""
        stacked, latest = [], self.count - 1
        for number in range(frame, frame + count):
            parts = []
            for row, array in self.strips[min(max(number, 0), latest)]:
                a, b = max(top, row), min(bottom, row + array.shape[2])
                if a < b:
                    parts.append(array if b - a == array.shape[2] else array[:, :, a - row : b - row])
            stacked.append(together(parts, 2))
        return together(stacked, 1)

    def kept(self) -> list[mx.array]:
        return [array for strips in self.strips.values() for _, array in strips]

    def clear(self) -> None:
        self.strips.clear()

    def _patch(self, frame: int, index: int, count: int, a: int, b: int, rows: Rows, last: bool) -> Patch:
        step, margin = self.row_step, self.MARGIN
        top, bottom = max(step * a - margin, rows.first), min(step * b + margin, rows.stop)
        array = self.take(frame, self.step * (count - 1) + self.size, top, bottom)
        above, below = step * a - margin < 0, step * b + margin > rows.height
        return Patch(array, above, below, index, count, a, b, self.output_rows(rows), last)

    def _store(self, piece: Piece) -> None:
        n = piece.array.shape[1]
        if piece.top == piece.rows.first:
            self.count += n
        for i in range(n):
            array = piece.array if n == 1 else piece.array[:, i : i + 1]
            self.strips.setdefault(self.count - n + i, []).append((piece.top, array))

    def _drop(self, first: int, own: bool = False) -> None:
        """Keep the frames from ``first`` on, and always the newest; ``own`` if they came with others in one array."""
        first = min(max(first, 0), self.count - 1)
        for number in [number for number in self.strips if number < first]:
            del self.strips[number]
        if own:
            for strips in self.strips.values():
                strips[:] = [(row, mx.contiguous(array)) for row, array in strips]
            mx.eval(self.kept())

    def _drop_rows(self, frame: int, top: int) -> None:
        """Of the frames that the next output frame does not need, keep the rows from ``top`` on."""
        for number in range(frame, min(frame + self.step, self.count - 1)):
            strips = self.strips.get(number, [])
            while strips and strips[0][0] + strips[0][1].shape[2] <= top:
                del strips[0]
            if strips and strips[0][0] < top:
                row, array = strips[0]
                strips[0] = (top, cut(array, 2, top - row, array.shape[2]))
