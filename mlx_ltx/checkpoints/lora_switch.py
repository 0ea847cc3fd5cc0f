"""LoRAs on a transformer, and going from one set of them to another.

Plain weights are fused: ``W`` is replaced by ``W + sum(strength * scale * up @ down)``. That costs nothing in the
steps and no memory. To go to another set, the layers that were changed are read from the checkpoint again, so that
without LoRAs the model is bit for bit the freshly loaded one; subtracting what was added would leave rounding errors
behind, and an untouched copy would double 38 GB. Quantised weights are left alone and get a branch beside them
(:class:`mlx_ltx.models.lora.LoraLinear`), which is exact as well and comes and goes without reading anything.

Measured for a layer of 4096x4096 with rank 384, the distilled LoRA's (float32, 2048 tokens, two CPU cores): 0.70 s bare
or fused, 0.84 s with a branch, 0.17 s once for fusing. So fusing pays from about 2000 tokens on, all steps of a stage
counted (o * i / (o + i), as the multiplications say), and a stage has tens of thousands. Branches on all layers of
LTX-2.3 would also take 7.6 GB. What fusing costs instead is to read 38 GB again when the set changes: about 10 s at the
4 GB/s of a fast disk (reckoned, not measured). A branch rounds less (error of a bfloat16 layer's result beside the same
in float32: 7e-4, fused 1.8e-3), but the reference fuses.
Memory while a set changes: the model and one block more (or what stands outside the blocks).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_ltx.checkpoints.components import left_out
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.checkpoints.keymaps import TRANSFORMER
from mlx_ltx.checkpoints.loading import read_array
from mlx_ltx.checkpoints.lora import Lora, LoraFile
from mlx_ltx.models.lora import LoraLinear
from mlx_ltx.models.transformer import Transformer
from mlx_ltx.models.transformer_config import TransformerConfig


class LoraStack:
    """LoRAs that have been matched to a transformer's layers, to be applied together.

    Attributes:
        warnings: one line for each thing that a LoRA holds and the model does not take.

    Raises:
        UserError: a LoRA does not fit the model.
    """

    def __init__(
        self, loras: Sequence[Lora], shapes: Mapping[str, tuple[int, int]], absent: Sequence[str] = ()
    ) -> None:
        self.loras = tuple(loras)
        self.warnings: list[str] = []
        self._changes: dict[str, list[tuple[LoraFile, float]]] = {}
        for file, strength in loras:
            match = file.match(shapes, absent)
            self.warnings += match.warnings
            for path in match.paths if strength else ():
                self._changes.setdefault(path, []).append((file, strength * file.layers[path].scale))

    @property
    def paths(self) -> set[str]:
        """The module paths of the layers that are changed."""
        return set(self._changes)

    def fuse(self, path: str, weight: mx.array, aggregate: mx.Dtype | None = None) -> mx.array:
        """The changed weight of a layer, lazily.

        Args:
            weight: (outputs, inputs), as the checkpoint has it.
            aggregate: the dtype in which the products are summed. None takes bfloat16 for bfloat16 weights, as the
                reference does (ltx_core/loader/fuse_loras.py), and float32 for others, where the reference's bfloat16
                would throw away what their dtype keeps.
        """
        dtype = aggregate or (mx.bfloat16 if weight.dtype == mx.bfloat16 else mx.float32)
        delta: mx.array | None = None
        for file, scale in self._changes.get(path, ()):
            down, up = file.factors(path, dtype)
            if delta is None:
                # Scaled in float32: a scale rounded to bfloat16 would be another strength.
                delta = (up.astype(mx.float32) * scale).astype(dtype) @ down
            else:
                delta = mx.addmm(delta, up, down, alpha=scale)
        return weight if delta is None else (delta + weight).astype(dtype).astype(weight.dtype)

    def branch(self, path: str, base: nn.Module, dtype: mx.Dtype) -> LoraLinear:
        """The layer ``base`` with the changes beside it: one branch for all LoRAs, their ranks side by side."""
        downs, ups = [], []
        for file, scale in self._changes[path]:
            down, up = file.factors(path, mx.float32)
            downs.append(down.astype(dtype))
            ups.append((up * scale).astype(dtype))
        return LoraLinear(base, mx.concatenate(downs, axis=0), mx.concatenate(ups, axis=1))


class LoraSwitch:
    """Puts LoRAs on a transformer that was loaded from a checkpoint, takes them off, and goes from set to set.

    ``use`` only makes the new weights known; they are read and computed when they are evaluated. Evaluate them block
    by block, as after loading: then no more than one block's old and new weights are in memory at a time.

    Args:
        model: the transformer, with plain or quantised layers, without any LoRA.
        checkpoint: the file that its plain weights came from.
    """

    def __init__(self, model: Transformer, checkpoint: SafetensorsFile):
        self.model = model
        self.checkpoint = checkpoint
        self.keys = TRANSFORMER.select(checkpoint.tensors)
        self.layers = linear_layers(model)
        self.shapes = {path: layer_shape(layer) for path, layer in self.layers.items()}
        self.stack = LoraStack((), self.shapes)
        self.fused: set[str] = set()

    def use(self, loras: Sequence[Lora]) -> list[str]:
        """Replace the LoRAs in use by ``loras``, in this order; an empty sequence gives the bare model.

        Returns:
            Warnings, one line each, about layers that a LoRA holds and the model does not.

        Raises:
            UserError: a LoRA does not fit the model, which stays as it was.
        """
        if tuple(loras) == self.stack.loras:
            return list(self.stack.warnings)
        stack = LoraStack(loras, self.shapes, left_out(self.model.config))
        replaced: list[tuple[str, nn.Module]] = []
        for path in sorted(stack.paths | self.stack.paths):
            layer = self.layers[path]
            if not isinstance(layer, nn.Linear):
                replaced.append((path, stack.branch(path, layer, self.model.dtype) if path in stack.paths else layer))
                continue
            layer.weight = stack.fuse(path, self._original(path, layer))
            if path in stack.paths:
                self.fused.add(path)
            else:
                self.fused.discard(path)
        if replaced:
            modules = tree_unflatten(replaced)
            assert isinstance(modules, dict)
            self.model.update_modules(modules)
        self.stack = stack
        return list(stack.warnings)

    def _original(self, path: str, layer: nn.Linear) -> mx.array:
        if path not in self.fused:
            return layer.weight
        return read_array(self.checkpoint, self.keys[f"{path}.weight"], layer.weight.dtype)


def check_loras(loras: Sequence[Lora], config: TransformerConfig) -> list[str]:
    """Match LoRAs with a transformer of which only the config is known, before anything is loaded.

    Returns:
        The warnings of :meth:`LoraSwitch.use`.

    Raises:
        UserError: a LoRA does not fit.
    """
    # Parameters are lazy: the module has its shapes without the memory.
    shapes = {path: layer_shape(layer) for path, layer in linear_layers(Transformer(config)).items()}
    return LoraStack(loras, shapes, left_out(config)).warnings


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Module path to layer, for every layer that multiplies by a matrix, plain or quantised."""
    return {path: layer for path, layer in model.named_modules() if "weight" in layer and layer.weight.ndim == 2}


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer; quantised weights lie packed in words of 32 bits."""
    outputs, columns = layer.weight.shape
    return outputs, columns * 32 // layer.bits if layer.weight.dtype == mx.uint32 else columns
