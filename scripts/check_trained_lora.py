"""Load a LoRA that this package trained with diffusers, check what it changes there, and list that for the tests.

Needs the ``parity`` extra, and PEFT. Usage: python scripts/check_trained_lora.py LORA CHECKPOINT OUTPUT.json

CHECKPOINT is the (small) official checkpoint that the LoRA was trained on; only its config is read. The weights of
diffusers' model are random: what counts is that every matrix finds its layer, and that ``scale * B @ A`` is the change.
"""

from __future__ import annotations

import json
import sys

import torch
from diffusers import LTX2VideoTransformer3DModel
from diffusers.loaders import LTX2LoraLoaderMixin
from safetensors import safe_open
from safetensors.torch import load_file

PREFIX = "diffusion_model."


def build(config: dict) -> LTX2VideoTransformer3DModel:
    """Diffusers' model of the sizes in an official config."""
    return LTX2VideoTransformer3DModel(
        num_attention_heads=config["num_attention_heads"],
        attention_head_dim=config["attention_head_dim"],
        cross_attention_dim=config["cross_attention_dim"],
        audio_num_attention_heads=config["audio_num_attention_heads"],
        audio_attention_head_dim=config["audio_attention_head_dim"],
        audio_cross_attention_dim=config["audio_cross_attention_dim"],
        num_layers=config["num_layers"],
        caption_channels=config["caption_channels"],
        gated_attn=config["apply_gated_attention"],
        audio_gated_attn=config["apply_gated_attention"],
        cross_attn_mod=config["cross_attention_adaln"],
        audio_cross_attn_mod=config["cross_attention_adaln"],
        rope_type=config["rope_type"],
        use_prompt_embeddings=not config["caption_proj_before_connector"],
    )


def main(lora: str, checkpoint: str, output: str) -> None:
    with safe_open(checkpoint, "pt") as file:
        model = build(json.loads(file.metadata()["config"])["transformer"])
    given = load_file(lora)
    state, metadata = LTX2LoraLoaderMixin.lora_state_dict(lora, return_lora_metadata=True)
    assert metadata is None
    assert len(state) == len(given), "diffusers left out keys"
    LTX2LoraLoaderMixin.load_lora_into_transformer(state, model, adapter_name="trained", metadata=metadata)

    changed = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    assert len(changed) * 2 == len(given), (len(changed), len(given))
    deltas = {name: layer.get_delta_weight("trained") for name, layer in changed.items()}
    listing = {}
    for key in sorted(given):
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removesuffix(".lora_A.weight")
        down, up = given[key].float(), given[f"{name}.lora_B.weight"].float()
        expected = up @ down
        (there,) = LTX2LoraLoaderMixin.lora_state_dict({key: down})
        diffusers = there.removeprefix("transformer.").removesuffix(".lora_A.weight")
        assert torch.allclose(deltas[diffusers], expected, rtol=1e-5, atol=1e-7), name
        listing[name.removeprefix(PREFIX)] = {"diffusers": diffusers, "A": list(down.shape), "B": list(up.shape)}
    with open(output, "w", encoding="utf-8") as file:
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(layer)}" for name, layer in listing.items())
        file.write(f"{{\n{lines}\n}}\n")
    print(f"{len(listing)} layers, all loaded by diffusers with the change that was trained")


if __name__ == "__main__":
    main(*sys.argv[1:])
