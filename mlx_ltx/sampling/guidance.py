"""Multi-modal guidance: away from the negative prompt, from perturbed attention and from the isolated modality.

Source: ltx_core/components/guiders.py. All arithmetic is float32 on predictions of x0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import mlx.core as mx

from mlx_ltx.models.passes import Perturbation


class Pass(Enum):
    """The forward passes of a guided step, in the order in which the reference batches them."""

    CONDITIONAL = "conditional"
    NEGATIVE = "negative prompt"
    PERTURBED = "perturbed attention"
    ISOLATED = "isolated modality"


class Momentum:
    """What guidance remembers of the earlier steps of a run, for one modality."""

    def __init__(self) -> None:
        self._sum: mx.array | None = None

    def add(self, difference: mx.array, kept: float) -> mx.array:
        """``difference`` plus what is ``kept`` of the earlier sum."""
        self._sum = difference if self._sum is None else kept * self._sum + difference
        return self._sum


class CfgRule(Protocol):
    """Which way is away from the negative prompt; its result is multiplied by ``cfg_scale - 1``."""

    def direction(self, conditional: mx.array, negative: mx.array, momentum: Momentum) -> mx.array:
        """From predictions, float32 (B, T, C), to a difference of that shape."""
        ...


@dataclass(frozen=True)
class PlainCfg:
    """Classifier-free guidance: straight away from the negative prediction."""

    def direction(self, conditional: mx.array, negative: mx.array, momentum: Momentum) -> mx.array:
        return conditional - negative


@dataclass(frozen=True)
class CfgStar:
    """CFG*: away from the negative prediction scaled to be as close as possible to the conditional one."""

    def direction(self, conditional: mx.array, negative: mx.array, momentum: Momentum) -> mx.array:
        return conditional - projection(conditional, negative) * negative


@dataclass(frozen=True)
class Apg:
    """Adaptive projected guidance (https://arxiv.org/abs/2410.02416): less contrast, more content.

    Attributes:
        eta: how much to keep of the part that is parallel to the conditional prediction; 1 keeps it all.
        norm_threshold: longest difference, over all of a modality; longer ones are shortened to it. 0 is no limit.
        momentum: how much of the sum of earlier steps' differences is added; negative values push away from them.
            (The reference's stateful form counts its scale from 0, not from 1: its scale is ``cfg_scale - 1`` here.)
    """

    eta: float = 1.0
    norm_threshold: float = 0.0
    momentum: float = 0.0

    def direction(self, conditional: mx.array, negative: mx.array, momentum: Momentum) -> mx.array:
        difference = conditional - negative
        if self.momentum != 0:
            difference = momentum.add(difference, self.momentum)
        if self.norm_threshold > 0:
            difference = difference * mx.minimum(1.0, self.norm_threshold / mx.linalg.norm(difference.reshape(-1)))
        parallel = projection(difference, conditional) * conditional
        return difference - (1 - self.eta) * parallel


def projection(x: mx.array, onto: mx.array) -> mx.array:
    """The factors (B, 1, 1) of ``onto`` that come closest to ``x``, per sample."""
    product = mx.sum(x * onto, axis=(1, 2), keepdims=True)
    return product / (mx.sum(onto * onto, axis=(1, 2), keepdims=True) + 1e-8)


@dataclass(frozen=True)
class GuidanceParams:
    """How one modality is guided.

    Attributes:
        cfg_scale: away from the negative prompt; 1 is off.
        stg_scale: away from a pass whose self-attention is perturbed in ``stg_blocks``; 0 is off.
        stg_blocks: indices of transformer blocks.
        rescale: how far the result's standard deviation is pulled back to the conditional one's, 0 to 1.
        modality_scale: away from a pass in which picture and sound do not see each other; 1 is off.
        skip_step: after a guided step, keep its prediction for this many steps; 0 never skips.
        cfg_rule: which way is away from the negative prompt.
    """

    cfg_scale: float = 1.0
    stg_scale: float = 0.0
    stg_blocks: tuple[int, ...] = ()
    rescale: float = 0.0
    modality_scale: float = 1.0
    skip_step: int = 0
    cfg_rule: CfgRule = PlainCfg()

    @property
    def negative(self) -> bool:
        return not math.isclose(self.cfg_scale, 1.0)

    @property
    def perturbed(self) -> bool:
        return not math.isclose(self.stg_scale, 0.0)

    @property
    def isolated(self) -> bool:
        return not math.isclose(self.modality_scale, 1.0)

    def skips(self, step: int) -> bool:
        return self.skip_step != 0 and step % (self.skip_step + 1) != 0

    def combine(self, predictions: dict[Pass, mx.array], momentum: Momentum | None = None) -> mx.array:
        """The guided prediction from those of the passes; a pass that was not made counts as no difference.

        Args:
            predictions: x0 per pass, each float32 (B, T, C); the conditional one is always there.
            momentum: the run's, for rules that remember earlier steps.

        Returns:
            float32 (B, T, C).
        """
        conditional = predictions[Pass.CONDITIONAL]
        guided = conditional
        if Pass.NEGATIVE in predictions and self.negative:
            direction = self.cfg_rule.direction(conditional, predictions[Pass.NEGATIVE], momentum or Momentum())
            guided = guided + (self.cfg_scale - 1) * direction
        if Pass.PERTURBED in predictions and self.perturbed:
            guided = guided + self.stg_scale * (conditional - predictions[Pass.PERTURBED])
        if Pass.ISOLATED in predictions and self.isolated:
            guided = guided + (self.modality_scale - 1) * (conditional - predictions[Pass.ISOLATED])
        if self.rescale != 0:
            # One factor for the whole tensor, from unbiased standard deviations.
            factor = mx.std(conditional, ddof=1) / mx.std(guided, ddof=1)
            guided = guided * (self.rescale * factor + (1 - self.rescale))
        return guided


UNGUIDED = GuidanceParams()


@dataclass(frozen=True)
class Guidance:
    """Guidance of both modalities; the default makes the conditional pass only.

    Attributes:
        video, audio: how each is guided.
        always_negative: make the negative pass even if no ``cfg_scale`` asks for it (CFG++ steps by it).
    """

    video: GuidanceParams = UNGUIDED
    audio: GuidanceParams = UNGUIDED
    always_negative: bool = False

    @property
    def negative(self) -> bool:
        """Whether the negative pass is made."""
        return self.always_negative or self.video.negative or self.audio.negative

    def at(self, sigma: float) -> Guidance:
        """What holds at a noise level: itself."""
        return self

    def passes(self) -> dict[Pass, Perturbation]:
        """The passes that a step needs, each with what it perturbs."""
        both = (self.video, self.audio)
        passes = {Pass.CONDITIONAL: Perturbation()}
        if self.negative:
            passes[Pass.NEGATIVE] = Perturbation()
        if any(params.perturbed for params in both):
            passes[Pass.PERTURBED] = Perturbation(
                video_blocks=frozenset(self.video.stg_blocks if self.video.perturbed else ()),
                audio_blocks=frozenset(self.audio.stg_blocks if self.audio.perturbed else ()),
            )
        if any(params.isolated for params in both):
            passes[Pass.ISOLATED] = Perturbation(isolated=True)
        return passes


@dataclass(frozen=True)
class GuidanceBySigma:
    """Guidance that changes during a run.

    Attributes:
        bins: (sigma, guidance): each holds up to its sigma, from above the next lower one; the highest also above.
    """

    bins: tuple[tuple[float, Guidance], ...]

    def __post_init__(self) -> None:
        if not self.bins or len({sigma for sigma, _ in self.bins}) < len(self.bins):
            raise ValueError("guidance by sigma needs bins of different sigmas")

    @property
    def negative(self) -> bool:
        """Whether the negative pass is made at any noise level."""
        return any(guidance.negative for _, guidance in self.bins)

    def at(self, sigma: float) -> Guidance:
        """What holds at a noise level."""
        above = [entry for entry in self.bins if entry[0] >= sigma]
        if not above:
            return max(self.bins, key=lambda entry: entry[0])[1]
        return min(above, key=lambda entry: entry[0])[1]
