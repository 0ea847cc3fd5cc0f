"""Which LoRAs a job uses in which stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_ltx.checkpoints.lora import Lora, LoraFile
from mlx_ltx.checkpoints.lora_catalogue import PUBLISHED_LAYERS, camera_lora, distilled_lora, generation_of
from mlx_ltx.checkpoints.lora_resolve import resolve_lora
from mlx_ltx.checkpoints.lora_switch import check_loras
from mlx_ltx.errors import UserError
from mlx_ltx.models.transformer_config import TransformerConfig
from mlx_ltx.request import LoraInput, Request


@dataclass(frozen=True)
class StageLoras:
    """The LoRAs of both stages, opened and found to fit; pipelines of one stage use the first.

    Attributes:
        warnings: what the user should know of them.
    """

    first: tuple[Lora, ...] = ()
    second: tuple[Lora, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def change(self) -> bool:
        """Whether the second stage needs others than the first."""
        return self.first != self.second


def choose_loras(
    request: Request,
    version: tuple[int, ...],
    transformer: TransformerConfig,
    distilled: tuple[float, float] | None,
    first_only: bool,
) -> StageLoras:
    """Find and open what the request names, and the distilled LoRA where the recipe needs it.

    Args:
        version: the checkpoint's model version.
        distilled: strengths of the distilled LoRA in both stages; None if the recipe does without.
        first_only: LoRAs that name no stage are for the first one.

    Raises:
        MissingFiles: one has to be downloaded first.
        UserError: one does not exist or does not fit the model.
    """
    named = list(request.loras)
    if request.camera is not None:
        named.append(LoraInput(camera_lora(request.camera).name))
    first: list[Lora] = []
    second: list[Lora] = []
    for given in named:
        lora = _open(given, version, transformer)
        if given.stage in (None, 1):
            first.append(lora)
        if given.stage == 2 or (given.stage is None and not first_only):
            second.append(lora)
    if distilled is not None:
        given = request.distilled_lora or _published_distilled_lora(version, transformer)
        file = _open(given, version, transformer).file
        first += [Lora(file, distilled[0])] if distilled[0] else []
        second += [Lora(file, distilled[1] * given.strength)]
    warnings = [*_check(first, transformer), *_check(second, transformer)]
    return StageLoras(tuple(first), tuple(second), tuple(dict.fromkeys(warnings)))


def _open(given: LoraInput, version: tuple[int, ...], transformer: TransformerConfig) -> Lora:
    return Lora(LoraFile(resolve_lora(given.source, version, transformer.layers)), given.strength)


def _check(loras: Sequence[Lora], transformer: TransformerConfig) -> list[str]:
    return check_loras(loras, transformer) if loras else []


def _published_distilled_lora(version: tuple[int, ...], transformer: TransformerConfig) -> LoraInput:
    entry = distilled_lora(generation_of(version))
    if entry is None:
        raise UserError("no distilled LoRA is known for this model; give one with --distilled-lora FILE")
    if transformer.layers != PUBLISHED_LAYERS:  # gigabytes that could only be refused once they are here
        raise UserError(
            f"the published distilled LoRA is for {PUBLISHED_LAYERS} transformer blocks, this model has "
            f"{transformer.layers}: give one that fits with --distilled-lora FILE, or use --pipeline distilled or "
            "--no-guided"
        )
    return LoraInput(entry.name)
