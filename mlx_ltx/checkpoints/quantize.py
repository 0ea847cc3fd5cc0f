"""Which layers are held in how few bits: the policy, in one table per network."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import NamedTuple

import mlx.nn as nn

from mlx_ltx.checkpoints.catalogue import similar_names
from mlx_ltx.errors import UserError
from mlx_ltx.models.quantized import WeightFormat


@dataclass(frozen=True)
class Quantization:
    """A setting of ``--quantize``.

    Attributes:
        name: as it is typed.
        usual: how most layers are held.
        sensitive: how the layers are held that do most harm when they are coarse.
    """

    name: str
    usual: WeightFormat
    sensitive: WeightFormat

    @classmethod
    def parse(cls, name: str, group_size: int | None = None) -> Quantization:
        """A setting by name; see :data:`SETTINGS`.

        Args:
            group_size: numbers that share a scale, for the affine settings: 32, 64 or 128.

        Raises:
            UserError: there is no such setting, or its groups have one size only.
        """
        setting = SETTINGS.get(name.strip().lower())
        if setting is None:
            similar = similar_names(name, list(SETTINGS))
            known = f"did you mean {' or '.join(similar)}?" if similar else f"it can be {', '.join(SETTINGS)}"
            raise UserError(f"--quantize {name}: no such setting; {known}")
        if group_size is None:
            return setting
        try:
            usual = replace(setting.usual, group_size=group_size)
            return replace(setting, usual=usual, sensitive=replace(setting.sensitive, group_size=group_size))
        except ValueError as error:
            raise UserError(f"--group-size {group_size}: {error}") from None


AFFINE_8 = WeightFormat("affine", 8)
# Sensitive layers are affine in all settings: with 8 bits, groups of affine numbers lie at a third of mxfp8's error
# (scripts/benchmark.py quantize).
SETTINGS = {
    name: Quantization(name, usual, AFFINE_8)
    for name, usual in {
        "q8": AFFINE_8,
        "q6": WeightFormat("affine", 6),
        "q5": WeightFormat("affine", 5),
        "q4": WeightFormat("affine", 4),
        "mxfp8": WeightFormat("mxfp8", 8, 32),
        "mxfp4": WeightFormat("mxfp4", 4, 32),
        "nvfp4": WeightFormat("nvfp4", 4, 16),
    }.items()
}


class Level(Enum):
    """How coarse a layer may be."""

    PLAIN = auto()
    SENSITIVE = auto()
    USUAL = auto()


class Rule(NamedTuple):
    """Layers, by a regular expression of their whole module path; the first rule that matches counts."""

    layers: str
    level: Level


# The published fp8 checkpoints leave 4 or 5 of 48 blocks in bfloat16; here the outermost two on each side get 8 bits.
EDGE_BLOCKS = 2
ATTENTIONS = r"(video|audio)\.(attn1|attn2|cross_attn)"  # to itself, to the text, to the other stream
PROJECTIONS = rf"({ATTENTIONS}\.to_(q|k|v|out)|(video|audio)\.ff\.(up|down))"


def transformer_rules(blocks: int) -> tuple[Rule, ...]:
    """The policy for a transformer with so many blocks. What no rule names stays plain.

    That is: AdaLN (coarse modulation adds up from step to step), the projections of patches and of captions, the output
    projections, norms and tables. All of them together are 0.5 of 19 billion weights. The text connectors, the VAEs
    and the vocoder are other networks, and are never quantised.
    """
    outer = [str(index) for index in range(blocks) if index < EDGE_BLOCKS or index >= blocks - EDGE_BLOCKS]
    return (
        Rule(rf"blocks\.\d+\.{ATTENTIONS}\.to_gate_logits", Level.PLAIN),  # 32 numbers that scale whole heads
        Rule(rf"blocks\.({'|'.join(outer)})\.{PROJECTIONS}", Level.SENSITIVE),
        Rule(rf"blocks\.\d+\.{PROJECTIONS}", Level.USUAL),
    )


GEMMA_RULES = (
    Rule(r"embed_tokens", Level.SENSITIVE),  # it is a hidden state of its own, and goes into all others
    Rule(r"layers\.\d+\.self_attn\.(q|k|v|o)_proj", Level.USUAL),
    Rule(r"layers\.\d+\.mlp\.(gate|up|down)_proj", Level.USUAL),
)


def choose_formats(
    module: nn.Module, rules: tuple[Rule, ...], setting: Quantization, flag: str = "--quantize"
) -> dict[str, WeightFormat]:
    """The formats of the layers that ``setting`` quantises, by module path.

    A layer whose width is not a multiple of the group size stays plain (only very small models have such).

    Raises:
        UserError: that leaves none.
    """
    formats = {}
    for path, layer in module.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Embedding)):
            continue
        level = next((rule.level for rule in rules if re.fullmatch(rule.layers, path)), Level.PLAIN)
        if level is Level.PLAIN:
            continue
        chosen = setting.usual if level is Level.USUAL else setting.sensitive
        if layer.weight.shape[1] % chosen.group_size == 0:
            formats[path] = chosen
    if not formats:
        raise UserError(f"{flag} {setting.name}: this model has no layer that {setting.usual.group_size} divides")
    return formats
