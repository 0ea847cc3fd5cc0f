"""How much memory MLX takes to evaluate a function, found out without evaluating it.

MLX is lazy: a function of arrays can be recorded as a list of primitives with their shapes (``mx.export_function``),
which costs no memory whatever the sizes. :func:`record` makes such a list of the networks' own code, so it is right
when that code changes, and :class:`Tape` goes through it as MLX's evaluation does: which primitives need a new
buffer, which write into that of an input that nobody else needs, which are another view of the same buffer, and which
need room of their own while they work.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

# Another view of their first input's buffer.
VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "Copy", "CustomTransforms", "Depends", "ExpandDims", "Slice", "Split",
    "Squeeze", "StopGradient", "Transpose", "View",
}  # fmt: skip
# May be views, if the input lies in memory as the result must.
CONTIGUOUS = {"Contiguous", "Flatten", "Reshape", "Unflatten"}
# One value from those in the same place, so that an input's buffer can take the result.
ELEMENTWISE = {
    "Abs", "Add", "AsType", "Ceil", "Compiled", "Cos", "Divide", "Equal", "Erf", "Exp", "Expm1", "Floor", "Greater",
    "GreaterEqual", "Less", "LessEqual", "Log", "Log1p", "LogicalAnd", "LogicalNot", "LogicalOr", "Maximum", "Minimum",
    "Multiply", "Negative", "NotEqual", "Power", "Remainder", "Round", "Rsqrt", "Select", "Sigmoid", "Sign", "Sin",
    "Softmax", "Sqrt", "Square", "Subtract", "Tanh", "LayerNorm", "RMSNorm",
}  # fmt: skip
# MLX's evaluation does not wait for each primitive: so many that were begun may still hold what they read.
IN_FLIGHT = 50


@dataclass
class Buffer:
    """A piece of memory, and how many arrays and running primitives need it."""

    size: int
    users: int = 0


@dataclass(frozen=True)
class Value:
    """An array: where it lies, and how."""

    buffer: Buffer
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    view: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def row_contiguous(self) -> bool:
        return all(n == 1 or a == b for n, a, b in zip(self.shape, self.strides, packed(self.shape), strict=True))

    @property
    def dense(self) -> bool:
        """Its elements fill the buffer, in any order of the axes."""
        return self.buffer.size == self.size * self.itemsize and 0 not in self.strides


def packed(shape: Iterable[int]) -> tuple[int, ...]:
    """The strides of a row-contiguous array."""
    strides, step = [], 1
    for n in reversed(tuple(shape)):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


@dataclass
class Tape:
    """A recorded function.

    Attributes:
        inputs: names of its inputs.
        outputs: names of its results.
        steps: its primitives as ``mx.export_function`` describes them, in an order of evaluation.
        constants: bytes of the constants in it.
    """

    inputs: list[tuple[str, tuple[int, ...], mx.Dtype]] = field(default_factory=list)
    outputs: list[tuple[str, tuple[int, ...], mx.Dtype]] = field(default_factory=list)
    constants: list[tuple[str, mx.array]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)

    def peak(self, in_flight: int = IN_FLIGHT) -> int:
        """The most bytes that evaluating it takes beside its inputs, results included."""
        return _Evaluation(self, in_flight).peak


def parameters(module: nn.Module) -> list[tuple[str, mx.array]]:
    """Path and array of each of a module's parameters."""
    flat = tree_flatten(module.parameters())
    assert isinstance(flat, list)
    return flat


def record(function: Callable[..., Any], *arrays: mx.array, module: nn.Module | None = None) -> Tape:
    """Record a function of arrays; nothing is evaluated.

    Args:
        function: takes ``arrays`` (of any sizes, lazy) and gives an array or a sequence of them.
        module: whose parameters it uses beside; do not use the module afterwards.
    """
    tape = Tape()
    flat = parameters(module) if module is not None else []
    names = [name for name, _ in flat]

    def traced(*given: mx.array) -> Any:
        if module is not None:
            weights = given[len(arrays) :]
            tree = tree_unflatten(list(zip(names, weights, strict=True)))
            assert isinstance(tree, dict)
            module.update(tree)
        return function(*given[: len(arrays)])

    def take(entry: dict[str, Any]) -> None:
        if entry["type"] == "primitive":
            tape.steps.append(entry)
        elif entry["type"] in ("inputs", "outputs", "constants"):
            setattr(tape, entry["type"], entry[entry["type"]])

    mx.export_function(take, traced, *arrays, *(weight for _, weight in flat))
    tape.steps = _with_activations(tape)
    return tape


def _with_activations(tape: Tape) -> list[dict[str, Any]]:
    """The steps with activation functions as one primitive each.

    MLX compiles its activations (``nn.gelu_approx``), and recording takes them apart again. A value that two or more
    elementwise primitives read, and from which with constants alone one result comes, was the input of such a one.
    """
    readers: dict[str, list[int]] = {}
    for index, step in enumerate(tape.steps):
        for name in {name for name, _, _ in step["inputs"]}:
            readers.setdefault(name, []).append(index)
    for name, _, _ in tape.outputs:
        readers.setdefault(name, []).append(len(tape.steps))
    constant = {name for name, _ in tape.constants}
    for step in tape.steps:
        if step["name"] == "Broadcast" and step["inputs"][0][0] in constant:
            constant.add(step["outputs"][0][0])
    steps: list[dict[str, Any] | None] = list(tape.steps)
    for name in [name for name, indices in readers.items() if len(indices) >= 2 and name not in constant]:
        group: list[int] = []
        made = {name}
        ahead = sorted(set(readers[name]))  # rising, and so a heap
        while ahead:
            index = heappop(ahead)
            here = steps[index] if index < len(steps) else None
            if here is None or index in group[-1:]:
                continue
            sources = {source for source, _, _ in here["inputs"]} - constant
            if here["name"] not in ELEMENTWISE or not sources or not sources <= made:
                continue
            group.append(index)
            made.add(here["outputs"][0][0])
            for reader in readers.get(here["outputs"][0][0], ()):
                heappush(ahead, reader)
        inside = set(group)
        results = [i for i in group if set(readers.get(tape.steps[i]["outputs"][0][0], ())) - inside]
        if len(results) != 1 or not set(readers[name]) <= inside:
            continue
        inputs = [entry for i in group for entry in tape.steps[i]["inputs"] if entry[0] == name][:1]
        for index in group:
            steps[index] = None
        steps[results[0]] = {**tape.steps[results[0]], "name": "Compiled", "activation": True, "inputs": inputs}
    return [step for step in steps if step is not None]


class _Evaluation:
    """Goes through a tape and counts."""

    def __init__(self, tape: Tape, in_flight: int):
        self.now = self.peak = 0
        self.values: dict[str, Value] = {}
        self.running: deque[list[Buffer]] = deque()
        uses: dict[str, int] = {}
        for step in tape.steps:
            for name, _, _ in step["inputs"]:
                uses[name] = uses.get(name, 0) + 1
        for name, _, _ in tape.outputs:
            uses[name] = uses.get(name, 0) + 1
        for name, shape, dtype in tape.inputs:
            self._hold(name, Value(Buffer(0, 1), tuple(shape), packed(shape), dtype.size))
            self.values[name].buffer.users += 1  # somebody else's
        for name, array in tape.constants:
            self._hold(name, Value(Buffer(array.nbytes, 1), array.shape, packed(array.shape), array.itemsize))
        for step in tape.steps:
            inputs = [self.values[name] for name, _, _ in step["inputs"]]
            for name, _, _ in step["inputs"]:
                uses[name] -= 1
            spent = [uses[name] == 0 for name, _, _ in step["inputs"]]
            temporary = Buffer(temporaries(step, inputs), 1)
            self._add(temporary.size)
            results = self._results(step, inputs, spent)
            for (name, _, _), value in zip(step["outputs"], results, strict=True):
                self._hold(name, value)
            made = {id(value.buffer) for value in results}
            reading = [value.buffer for value in inputs if id(value.buffer) not in made]
            for buffer in reading:
                buffer.users += 1
            self.running.append([*reading, temporary])
            for name in {name for name, _, _ in step["inputs"]}:
                if uses[name] == 0:
                    self._release(self.values.pop(name).buffer)
            for name, _, _ in step["outputs"]:
                if uses.get(name, 0) == 0:
                    self._release(self.values.pop(name).buffer)
            while len(self.running) > in_flight:
                for buffer in self.running.popleft():
                    self._release(buffer)

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def _hold(self, name: str, value: Value) -> None:
        value.buffer.users += 1
        self.values[name] = value

    def _release(self, buffer: Buffer) -> None:
        buffer.users -= 1
        if buffer.users == 0:
            self.now -= buffer.size

    def _new(self, shape: tuple[int, ...], dtype: mx.Dtype, strides: tuple[int, ...] | None = None) -> Value:
        buffer = Buffer(math.prod(shape) * dtype.size)
        self._add(buffer.size)
        return Value(buffer, tuple(shape), strides or packed(shape), dtype.size)

    def _results(self, step: dict[str, Any], inputs: list[Value], spent: list[bool]) -> list[Value]:
        name, outputs = step["name"], step["outputs"]
        if name in VIEWS and inputs:
            return [_view(step, inputs[0], tuple(shape), index) for index, (_, shape, _) in enumerate(outputs)]
        if name in CONTIGUOUS and inputs:
            (_, shape, dtype) = outputs[0]
            strides = inputs[0].strides if name == "Contiguous" else reshaped(inputs[0], tuple(shape))
            if strides is None or (name == "Contiguous" and not inputs[0].row_contiguous):
                return [self._new(tuple(shape), dtype)]
            return [Value(inputs[0].buffer, tuple(shape), strides, inputs[0].itemsize, view=True)]
        if name in ELEMENTWISE:
            (_, shape, dtype) = outputs[0]
            if step.get("activation") and inputs[0].view:  # measured: compiled functions do not take over views
                return [self._new(tuple(shape), dtype)]
            full = [value for value in inputs if value.size == math.prod(shape) and value.dense]
            for value, last in zip(inputs, spent, strict=True):
                free = last and value.buffer.users == 1 and value.dense
                if free and value.itemsize == dtype.size and value.size == math.prod(shape):
                    return [Value(value.buffer, tuple(shape), value.strides, dtype.size)]
            layouts = {value.strides for value in full}
            strides = layouts.pop() if len(layouts) == 1 and len(full) == len(inputs) else None
            return [self._new(tuple(shape), dtype, strides)]
        return [self._new(tuple(shape), dtype) for _, shape, dtype in outputs]


def _view(step: dict[str, Any], value: Value, shape: tuple[int, ...], index: int) -> Value:
    name, arguments = step["name"], step["arguments"]
    strides: tuple[int, ...] | None = None
    if name == "Transpose":
        strides = tuple(value.strides[axis] for axis in arguments[0])
    elif name == "Broadcast":
        lead = len(shape) - len(value.shape)
        own = [0 if n == 1 and m != 1 else s for n, m, s in zip(value.shape, shape[lead:], value.strides, strict=True)]
        strides = (0,) * lead + tuple(own)
    elif name == "Slice":
        strides = tuple(s * every for s, every in zip(value.strides, arguments[2], strict=True))
    elif name in ("ExpandDims", "Squeeze"):
        strides = reshaped(value, shape)
    elif len(shape) == len(value.shape):
        strides = value.strides
    return Value(value.buffer, shape, strides or packed(shape), value.itemsize, view=True)


def reshaped(value: Value, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The strides of a view of another shape, or None if the elements do not lie so."""
    if value.size == 0 or value.row_contiguous:
        return packed(shape)
    # axes that follow each other in memory are one run; a new axis must lie within a run
    runs: list[tuple[int, int]] = []
    for n, stride in zip(value.shape, value.strides, strict=True):
        if n == 1:
            continue
        if runs and runs[-1][1] == n * stride:
            runs[-1] = runs[-1][0] * n, stride
        else:
            runs.append((n, stride))
    strides: list[int] = []
    left, stride = 1, 0
    for n in shape:
        if n == 1:
            strides.append(0)
            continue
        if left == 1:
            if not runs:
                return None
            left, stride = runs.pop(0)
        if left % n:
            return None
        left //= n
        strides.append(stride * left)
    return tuple(strides)


def temporaries(step: dict[str, Any], inputs: list[Value]) -> int:
    """Bytes of what a primitive needs while it works beside inputs and outputs, on the default device."""
    if step["name"] == "Convolution" and mx.default_device() == mx.Device(mx.cpu):
        return _unfolded(step, inputs)
    if step["name"] in ("Matmul", "AddMM", "GatherMM"):
        return sum(value.size * value.itemsize for value in inputs[:2] if not _multipliable(value))
    if step["name"] == "Softmax" and not inputs[0].dense:
        return inputs[0].size * inputs[0].itemsize
    return 0


def _multipliable(value: Value) -> bool:
    """Whether matrix products take the array as it lies: rows or columns without gaps."""
    (rows, columns), (down, along) = value.shape[-2:], value.strides[-2:]
    return (along == 1 and (down == columns or rows == 1)) or (down == 1 and (along == rows or columns == 1))


def _unfolded(step: dict[str, Any], inputs: list[Value]) -> int:
    """MLX's CPU convolution copies its input where it pads it, and then every pixel's neighbourhood."""
    (_, result, dtype), weight = step["outputs"][0], inputs[1]
    if any(n != 1 for n in step["arguments"][4]):  # a transposed one is done pixel by pixel
        return 0
    neighbourhoods = math.prod(result[:-1]) * math.prod(weight.shape[1:])
    _, before, after, *_ = step["arguments"]
    B, *sizes, C = inputs[0].shape
    padded = B * C * math.prod(n + a + b for n, a, b in zip(sizes, before, after, strict=True))
    return (neighbourhoods + padded * any(before + after)) * dtype.size
