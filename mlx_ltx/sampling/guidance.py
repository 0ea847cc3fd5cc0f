"""Multi-modal guidance: away from the negative prompt, from perturbed attention and from the isolated modality.

Source: ltx_core/components/guiders.py (MultiModalGuider). All arithmetic is float32 on predictions of x0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import mlx.core as mx

from mlx_ltx.models.transformer import Perturbation


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
    """

    cfg_scale: float = 1.0
    stg_scale: float = 0.0
    stg_blocks: tuple[int, ...] = ()
    rescale: float = 0.0
    modality_scale: float = 1.0
    skip_step: int = 0

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

    def combine(self, predictions: dict[Pass, mx.array]) -> mx.array:
        """The guided prediction from those of the passes; a pass that was not made counts as no difference.

        Args:
            predictions: x0 per pass, each float32 (B, T, C); the conditional one is always there.

        Returns:
            float32 (B, T, C).
        """
        conditional = predictions[Pass.CONDITIONAL]
        scales = {
            Pass.NEGATIVE: self.cfg_scale - 1,
            Pass.PERTURBED: self.stg_scale,
            Pass.ISOLATED: self.modality_scale - 1,
        }
        guided = conditional
        for kind, scale in scales.items():
            if kind in predictions and not math.isclose(scale, 0.0):
                guided = guided + scale * (conditional - predictions[kind])
        if self.rescale != 0:
            # One factor for the whole tensor, from unbiased standard deviations.
            factor = mx.std(conditional, ddof=1) / mx.std(guided, ddof=1)
            guided = guided * (self.rescale * factor + (1 - self.rescale))
        return guided


UNGUIDED = GuidanceParams()


class Pass(Enum):
    """The forward passes of a guided step, in the order in which the reference batches them."""

    CONDITIONAL = "conditional"
    NEGATIVE = "negative prompt"
    PERTURBED = "perturbed attention"
    ISOLATED = "isolated modality"


@dataclass(frozen=True)
class Guidance:
    """Guidance of both modalities; the default makes the conditional pass only."""

    video: GuidanceParams = UNGUIDED
    audio: GuidanceParams = UNGUIDED

    def passes(self) -> dict[Pass, Perturbation]:
        """The passes that a step needs, each with what it perturbs."""
        both = (self.video, self.audio)
        passes = {Pass.CONDITIONAL: Perturbation()}
        if any(params.negative for params in both):
            passes[Pass.NEGATIVE] = Perturbation()
        if any(params.perturbed for params in both):
            passes[Pass.PERTURBED] = Perturbation(
                video_blocks=frozenset(self.video.stg_blocks if self.video.perturbed else ()),
                audio_blocks=frozenset(self.audio.stg_blocks if self.audio.perturbed else ()),
            )
        if any(params.isolated for params in both):
            passes[Pass.ISOLATED] = Perturbation(isolated=True)
        return passes
