"""Fused LoRAs against the reference: every weight that it changed, and the inventory of what is changed."""

from __future__ import annotations

import re
from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from mlx_ltx.checkpoints.components import load_transformer
from mlx_ltx.checkpoints.keymaps import TRANSFORMER
from mlx_ltx.checkpoints.lora import Lora, LoraFile
from mlx_ltx.checkpoints.lora_switch import LoraStack, layer_shape, linear_layers
from parity import Comparison, GoldenSet, runner

BASE = re.compile(r"base (\w+)\.ckpt")
TERM = re.compile(r"([+-]?)\s*(\d+(?:\.\d+)?)\s*\*\s*(lora_\w+)")


@runner("lora_*")
def run_lora(golden: GoldenSet) -> Iterator[Comparison]:
    """The set's description names the checkpoint, the LoRAs and their strengths: "base NAME.ckpt + 0.8*lora_0 ..."."""
    note = " ".join(map(str, golden.cases.values()))
    base = BASE.search(note)
    assert base is not None, f"{golden.name}: no checkpoint in {note!r}"
    checkpoint = golden.checkpoint(base[1])
    loras = [
        Lora(LoraFile(golden.folder / f"{name}.safetensors"), float(f"{sign}{strength}"))
        for sign, strength, name in TERM.findall(note)
    ]
    assert loras, f"{golden.name}: no LoRAs in {note!r}"
    layers = linear_layers(load_transformer(checkpoint, mx.float32))
    stack = LoraStack(loras, {path: layer_shape(layer) for path, layer in layers.items()})
    assert not stack.warnings
    expected = {path.removesuffix(".weight"): key for path, key in TRANSFORMER.select(golden.names).items()}
    for path, key in sorted(expected.items()):
        yield golden.compare("", key, stack.fuse(path, layers[path].weight, aggregate=mx.bfloat16))
    both = sorted(expected.keys() | stack.paths)
    yield Comparison(
        "-",
        "changed layers",
        np.array([path in stack.paths for path in both], np.float32),
        np.array([path in expected for path in both], np.float32),
    )
