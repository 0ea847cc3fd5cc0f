"""Leave out steps in which the transformer would do nearly what it did before (TeaCache, arxiv.org/abs/2411.19108).

What enters the first block is compared from step to step, which costs next to nothing. While its relative changes add
up to less than a threshold, the blocks are not computed: what they added to the tokens in the last computed step is
added again. The paper rescales the changes by a polynomial fitted to each model; there is none for this family, so the
threshold is on the changes themselves. The first and the last step of a run are always computed.
"""

from __future__ import annotations

from collections.abc import Hashable

import mlx.core as mx

from mlx_ltx.models.passes import PassInput
from mlx_ltx.models.step_memory import StepMemory
from mlx_ltx.models.transformer import Transformer


class StepCache:
    """Decides which steps of one run reuse the last computed one.

    Args:
        threshold: how far the changes may add up, relative to the mean magnitude; 0 reuses nothing.
        steps: of the run, each of which asks for one prediction.

    Attributes:
        reused: how many steps did.
    """

    def __init__(self, threshold: float, steps: int):
        self.threshold, self.steps = threshold, steps
        self.reused = 0
        self._seen: mx.array | None = None
        self._kind: Hashable = None
        self._changed = 0.0

    def reuses(self, model: Transformer, given: PassInput, memory: StepMemory, step: int, kind: Hashable) -> bool:
        """Whether a step is to reuse the last computed one; to be asked once per step, before it.

        Args:
            given: the step's first pass.
            memory: what the last computed step left.
            step: counted from 0.
            kind: of the step's passes; only steps of one kind have the same to add.
        """
        if self._seen is None:
            return False
        before, same = self._seen, kind == self._kind
        self.see(model, given, memory, kind)
        self._changed += float(mx.mean(mx.abs(self._seen - before)) / mx.mean(mx.abs(before)))
        if same and 0 < step < self.steps - 1 and self._changed < self.threshold:
            self.reused += 1
            return True
        self._changed = 0.0
        return False

    def see(self, model: Transformer, given: PassInput, memory: StepMemory, kind: Hashable) -> None:
        """Remember what enters the first block; to be told after the first step, which leaves what this needs."""
        self._seen, self._kind = model.first_input(given, memory).astype(mx.float32), kind
        mx.eval(self._seen)

    @property
    def begun(self) -> bool:
        """Whether a step was seen."""
        return self._seen is not None
