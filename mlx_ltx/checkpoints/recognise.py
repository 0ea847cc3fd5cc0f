"""What a local file or folder is: an LTX-2 checkpoint, a latent upsampler, a Gemma folder, or something else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlx_ltx.checkpoints.files import SafetensorsFile

TRANSFORMER_PREFIX = "model.diffusion_model."
SHARD = re.compile(r"(?P<stem>.+)-(?P<index>\d+)-of-(?P<count>\d+)\.safetensors")

# A key prefix that gives another model away, below "model.diffusion_model." where the file has that prefix.
# The first match wins, so the more particular marks stand first.
FOREIGN = (
    ("a LoRA", re.compile(r".*\.lora_(A|B|down|up)\b")),
    ("a HunyuanVideo checkpoint", re.compile(r"txt_in\.individual_token_refiner\.|.*\.token_refiner\.")),
    ("a Flux checkpoint", re.compile(r"double_blocks\.|single_transformer_blocks\.")),
    ("a Stable Diffusion 3 checkpoint", re.compile(r"joint_blocks\.")),
    ("a Stable Diffusion checkpoint", re.compile(r"input_blocks\.|cond_stage_model\.|conditioner\.")),
    ("a Wan checkpoint", re.compile(r"blocks\.\d+\.(self_attn|cross_attn)\.")),
    ("a Qwen-Image checkpoint", re.compile(r"transformer_blocks\.\d+\.(img|txt)_mod\.")),
    ("an LTX-2 transformer in the layout of diffusers", re.compile(r"audio_proj_in\.")),
    ("an LTX-Video transformer in the layout of diffusers", re.compile(r"transformer_blocks\.\d+\.attn1\.")),
    ("a latent upsampler", re.compile(r"initial_conv\.")),
    ("a language model (a text encoder?)", re.compile(r"(language_model\.)?model\.(embed_tokens|layers\.\d+)\.")),
    ("a VAE", re.compile(r"(vae\.|audio_vae\.|first_stage_model\.)?(encoder|decoder)\.")),
)

# The same for the layers that a LoRA names, with dots or, as Kohya's tools write them, underscores.
LORA_PREFIX = re.compile(
    r"(base_model\.model\.)?(model\.)?((diffusion_model|transformer|unet)\.|lora_(unet|transformer)_)?"
)
FOREIGN_LAYERS = (
    ("HunyuanVideo", re.compile(r"double_blocks[._]\d+[._]img_attn_|.*token_refiner")),
    ("Flux", re.compile(r"(double|single)_blocks[._]|single_transformer_blocks[._]")),
    ("Stable Diffusion 3", re.compile(r"joint_blocks[._]")),
    ("Stable Diffusion", re.compile(r"(down|up|mid|input|output|middle)_blocks?[._]")),
    ("Wan", re.compile(r"blocks[._]\d+[._](self_attn|cross_attn|ffn)[._]")),
    ("Qwen-Image", re.compile(r"transformer_blocks[._]\d+[._]((img|txt)_(mod|mlp)[._]|attn[._])")),
    ("a language model", re.compile(r"(language_model[._])?(model[._])?layers[._]\d+[._](self_attn|mlp)[._]")),
)


def metadata_config(file: SafetensorsFile) -> dict[str, Any]:
    """The config in the file's metadata, or an empty one."""
    config = file.json_metadata("config")
    return config if isinstance(config, dict) else {}


def what_else(file: SafetensorsFile) -> str | None:
    """None for a whole LTX-2 checkpoint; for any other file what it is, as far as its keys tell.

    A whole checkpoint carries a config with a ``transformer`` section, a transformer with an audio stream below
    ``model.diffusion_model.`` and a video VAE below ``vae.``.
    """
    below = [key.removeprefix(TRANSFORMER_PREFIX) for key in file.tensors]
    if f"{TRANSFORMER_PREFIX}patchify_proj.weight" in file.tensors:
        if not any(name.startswith("audio_patchify_proj.") for name in below):
            return "an LTX-Video checkpoint (0.9, without sound)"
        if not any(key.startswith("vae.") for key in file.tensors):
            return "an LTX transformer without its VAEs (LTX-2.5 and ComfyUI publish them in separate files)"
        if "transformer" not in metadata_config(file):
            return "an LTX-2 checkpoint that lost its config (the metadata that the published file carries)"
        return None
    for description, mark in FOREIGN:
        if any(mark.match(name) for name in below):
            return description
    return "a file of unknown kind"


def is_checkpoint(file: SafetensorsFile) -> bool:
    """Whether ``file`` is a whole LTX-2 checkpoint."""
    return what_else(file) is None


def is_spatial_upsampler(file: SafetensorsFile) -> bool:
    """Whether ``file`` is a latent upsampler for space alone (bare keys, a flat config in its metadata)."""
    config = metadata_config(file)
    return (
        "initial_conv.weight" in file.tensors
        and bool(config.get("spatial_upsample", False))
        and not config.get("temporal_upsample", False)
    )


def is_gemma_folder(folder: Path) -> bool:
    """Whether ``folder`` holds a Gemma 3 model in the Hugging Face layout, as its ``config.json`` says."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and str(config.get("model_type", "")).startswith("gemma3")


def missing_gemma_files(folder: Path) -> list[str]:
    """What a Gemma folder lacks of config, tokenizer and weights.

    Shards are counted by their own names ("model-00001-of-00005"), because the index of a converted pack may still be
    that of the model it was converted from.
    """
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    # A broken link (an interrupted or cleaned cache) is not a file.
    present = {path.name for path in folder.glob("*.safetensors") if path.is_file()}
    if not present:
        return [*missing, "*.safetensors"]
    for match in filter(None, map(SHARD.fullmatch, sorted(present))):
        width, count = len(match["index"]), int(match["count"])
        shards = [f"{match['stem']}-{i:0{width}d}-of-{match['count']}.safetensors" for i in range(1, count + 1)]
        missing += [name for name in shards if name not in present and name not in missing]
    return missing


def what_model(layers: Iterable[str]) -> str:
    """What a LoRA was made for, as far as the names of its layers tell; they may carry a tool's prefix."""
    below = [LORA_PREFIX.sub("", layer, count=1) for layer in layers]
    for description, mark in FOREIGN_LAYERS:
        if any(mark.match(name) for name in below):
            return description
    return "a model of unknown kind"
