"""Record the reference's gradients of a training step, for ``parity.training``.

Needs the ``parity`` extra and Lightricks' ltx-core (github.com/Lightricks/LTX-2, packages/ltx-core/src) on PYTHONPATH.
Usage: python scripts/make_training_golden.py tests/golden/transformer_23 OUTPUT.io.safetensors

The inputs are those of a recorded case with two samples. Of each parameter's gradient the norm is kept, and every
n-th entry, so many that a thousand at most are left.
"""

from __future__ import annotations

import json
import sys

import torch
from ltx_core.model.transformer.modality import Modality
from ltx_core.model.transformer.model_configurator import LTXModelConfigurator
from safetensors import safe_open
from safetensors.torch import load_file, save_file

CASE = "batch2"
PREFIX = "model.diffusion_model."
ENTRIES = 1000


def main(recorded: str, output: str) -> None:
    with safe_open(f"{recorded}.ckpt.safetensors", "pt") as file:
        model = LTXModelConfigurator.from_metadata({"config": json.loads(file.metadata()["config"])})
    weights = load_file(f"{recorded}.ckpt.safetensors")
    weights = {key.removeprefix(PREFIX): value.float() for key, value in weights.items() if key.startswith(PREFIX)}
    model.load_state_dict(weights, strict=True, assign=True)

    inputs = load_file(f"{recorded}.io.safetensors")
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    given = {}
    for stream in ("video", "audio"):
        fields = {key.split(".")[-1]: value for key, value in inputs.items() if key.startswith(f"{CASE}.{stream}.")}
        names = ("latent", "sigma", "timesteps", "positions", "context")
        given[stream] = Modality(**{name: fields[name] for name in names})
        tensors |= {f"{CASE}.{stream}.{name}": fields[name] for name in names}
        shape = fields["latent"].shape
        tensors[f"{CASE}.{stream}.target"] = torch.randn(shape, generator=generator)
        tensors[f"{CASE}.{stream}.weight"] = (torch.rand(shape[:2], generator=generator) < 0.7).float()

    velocities = dict(zip(given, model(given["video"], given["audio"], perturbations=None), strict=True))
    losses = {}
    for stream, velocity in velocities.items():
        weight = tensors[f"{CASE}.{stream}.weight"]
        error = (velocity - tensors[f"{CASE}.{stream}.target"]).square().mean(dim=-1)
        losses[stream] = ((error * weight).sum(dim=1) / weight.sum(dim=1)).mean()
        tensors[f"{stream}.loss"] = losses[stream].detach()
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        # The mark of keyframes takes no part without any.
        flat = (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten()
        step = -(-len(flat) // ENTRIES)
        tensors[f"gradient.{name}"] = flat[::step].clone()
        tensors[f"norm.{name}"] = flat.norm()
    save_file({key: value.contiguous() for key, value in tensors.items()}, output, {"entries": str(ENTRIES)})


if __name__ == "__main__":
    main(*sys.argv[1:])
