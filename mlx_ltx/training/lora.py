"""LoRA training: low-rank changes beside a transformer's layers, and the file that they become.

https://arxiv.org/abs/2106.09685. The file has the layout of Lightricks' trainer and of ComfyUI: names of the official
checkpoint below ``diffusion_model.``, with the scale alpha / rank multiplied into B, so that nobody has to know it.
"""

from __future__ import annotations

import fnmatch
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.checkpoints.keymaps import TRANSFORMER
from mlx_ltx.checkpoints.lora_switch import layer_shape, linear_layers
from mlx_ltx.checkpoints.writing import write_safetensors
from mlx_ltx.errors import UserError
from mlx_ltx.models.lora import LoraLinear
from mlx_ltx.models.transformer import Transformer
from mlx_ltx.training.loop import Data, Loss

PREFIX = "diffusion_model."


@dataclass(frozen=True)
class LoraSettings:
    """A LoRA's shape; the names are those of Lightricks' trainer.

    Attributes:
        rank: of the two matrices of each layer.
        alpha: the change is scaled by alpha / rank.
        dropout: so many of a layer's inputs are left out of its change in each step.
        target_modules: which layers are changed: the end of an official name from a dot on ("to_k",
            "audio_ff.net.2"), or all of it; ``*`` and ``?`` stand for anything.
    """

    rank: int = 64
    alpha: float = 64
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("to_k", "to_q", "to_v", "to_out.0")


class TrainedLora(LoraLinear):
    """A frozen layer, plain or quantised, with a change that is learnt; it begins as no change.

    Args:
        key: for the beginning of ``down``, uniform in ±1 / sqrt(inputs) as PEFT has it; ``up`` begins at zero.
    """

    def __init__(self, base: nn.Module, settings: LoraSettings, key: mx.array):
        outputs, inputs = layer_shape(base)
        limit = 1 / math.sqrt(inputs)
        down = mx.random.uniform(-limit, limit, (settings.rank, inputs), key=key)
        super().__init__(base, down, mx.zeros((outputs, settings.rank)))
        self._scale = settings.alpha / settings.rank
        self._dropout = settings.dropout
        self._key: mx.array | None = None

    def draw(self, key: mx.array | None) -> None:
        """Choose the inputs that are left out from now on; None leaves nothing out.

        The key is kept, not the choice: gradient checkpointing computes the same choice twice.
        """
        self._key = key

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base(x)
        if self._dropout and self._key is not None:
            kept = mx.random.bernoulli(1 - self._dropout, x.shape, key=self._key)
            x = mx.where(kept, x / (1 - self._dropout), 0).astype(x.dtype)
        down, up = self.down.astype(x.dtype), self.up.astype(x.dtype)
        return y + (((x @ down.T) @ up.T) * self._scale).astype(y.dtype)


class LoraTraining:
    """The layers of a transformer that a LoRA changes; everything else of it is frozen.

    Args:
        model: loaded from ``checkpoint``; its layers are replaced.
        seed: of the beginning.

    Attributes:
        layers: by module path.
        names: module path to official name.

    Raises:
        UserError: a target names no layer.
    """

    def __init__(self, model: Transformer, checkpoint: SafetensorsFile, settings: LoraSettings, seed: int):
        self.settings = settings
        keys = TRANSFORMER.select(checkpoint.tensors)
        official = {
            path: keys[f"{path}.weight"].removeprefix(TRANSFORMER.roots[0]).removesuffix(".weight")
            for path in linear_layers(model)
        }
        self.names = {path: official[path] for path in choose_layers(official, settings.target_modules)}
        plain = linear_layers(model)
        random = mx.random.split(mx.random.key(seed), len(self.names))
        self.layers = {
            path: TrainedLora(plain[path], settings, key) for path, key in zip(self.names, random, strict=True)
        }
        modules = tree_unflatten(list(self.layers.items()))
        assert isinstance(modules, dict)
        model.update_modules(modules)
        model.freeze()
        for layer in self.layers.values():
            layer.unfreeze(keys=["down", "up"], recurse=False)

    def with_dropout(self, loss: Loss[Data]) -> Loss[Data]:
        """The loss with a new choice of what is left out in every step."""
        if not self.settings.dropout:
            return loss

        def dropped(model: nn.Module, batch: Data, key: mx.array) -> dict[str, mx.array]:
            own, key = mx.random.split(key)
            for layer, layer_key in zip(self.layers.values(), mx.random.split(own, len(self.layers)), strict=True):
                layer.draw(layer_key)
            return loss(model, batch, key)

        return dropped

    def save(
        self,
        path: str | os.PathLike[str],
        parameters: Mapping[str, mx.array],
        metadata: Mapping[str, str],
        dtype: mx.Dtype = mx.bfloat16,
    ) -> None:
        """Write the LoRA file.

        Args:
            parameters: by module path, as a training has them.
            metadata: beside what LoRA files always have.

        Raises:
            UserError: the file cannot be written, or the disk is full.
        """
        scale = self.settings.alpha / self.settings.rank
        tensors = {}
        for layer, name in self.names.items():
            tensors[f"{PREFIX}{name}.lora_A.weight"] = parameters[f"{layer}.down"].astype(dtype)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = (parameters[f"{layer}.up"] * scale).astype(dtype)
        # "pt" is what other tools expect of a file that they can load.
        write_safetensors(path, tensors, {"format": "pt", **metadata}, force=True)


def choose_layers(official: Mapping[str, str], targets: Sequence[str]) -> list[str]:
    """The module paths whose official names the targets mean, in order.

    Args:
        official: module path to official name of every layer.

    Raises:
        UserError: a target means none of them.
    """
    chosen: dict[str, None] = {}
    for target in targets:
        found = [
            p for p, name in official.items() if any(fnmatch.fnmatchcase(name, t) for t in (target, f"*.{target}"))
        ]
        if not found:
            kinds = sorted({name.rpartition(".")[2] for name in official.values() if not name[-1].isdigit()})
            raise UserError(f"lora.target_modules: {target!r} is no layer of the model; try one of {', '.join(kinds)}")
        chosen |= dict.fromkeys(found)
    return [path for path in official if path in chosen]
