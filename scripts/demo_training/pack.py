"""From trained parts to the demo's files, in the published layout."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

import make_demo
from demo_training import sound, text
from demo_training.diffusion import Upsampler, make_transformer
from demo_training.latents import Encoders
from demo_training.layout import CONFIG, GEMMA, TEXT_LENGTH, UPSAMPLER_CONFIG
from demo_training.stage import use_weights
from demo_weights.autoencoders import put_audio_vae, put_upsampler, put_video_vae
from demo_weights.diffusion import put_connectors, put_transformer
from demo_weights.tensors import Tensors, save
from demo_weights.text import gemma_config, put_gemma, save_tokenizer, write_json
from demo_weights.vocoder import put_vocoder
from mlx_ltx.checkpoints import keymaps
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.checkpoints.gemma import GEMMA as GEMMA_KEYS
from mlx_ltx.checkpoints.keymaps import KeyMap
from mlx_ltx.checkpoints.loading import match_network

LICENCE = "Apache-2.0; made by scripts/train_demo.py of mlx-ltx; trained on synthetic scenes"
NOTHING = "vocoder.bwe_generator.conv_post.weight"  # the band above 8 kHz stays empty, as in the scenes


def published(values: dict[str, np.ndarray], parts: list[tuple[KeyMap, nn.Module]]) -> dict[str, np.ndarray]:
    """``values``, which name every tensor of a file, with those of trained networks put in by their published names."""
    result = dict(values)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "layout.safetensors"
        save(path, values, {}, lambda name: True)
        file = SafetensorsFile(path)
        for keymap, module in parts:
            layout = match_network(module, file, keymap)
            trained = dict(tree_flatten(module.parameters()))
            for module_path, key in layout.keys.items():
                array = np.array(trained[module_path].astype(mx.float32))
                order = layout.axes[module_path]
                result[key] = array if order is None else array.transpose(np.argsort(order))
    return result


def pack(folder: Path, target: Path) -> dict[str, int]:
    """Write the demo's files to ``target``; returns the steps behind each part."""
    steps = {}
    encoders = Encoders(folder)
    side, vocoder, transformer, upsampler = text.TextSide(), sound.Vocoder(), make_transformer(), Upsampler(folder)
    for name, module in (
        ("text", side), ("vocoder", vocoder), ("upsampler", upsampler), ("transformer", transformer),
        ("video-vae", encoders.video), ("audio-vae", encoders.sound),
    ):  # fmt: skip
        steps[name] = use_weights(module, folder, name)
    # 1. every tensor by its published name
    t = Tensors(1)
    put_transformer(t, CONFIG["transformer"])
    put_connectors(t, CONFIG["transformer"], GEMMA["hidden_size"] * (GEMMA["num_hidden_layers"] + 1))
    put_video_vae(t, CONFIG["vae"])
    put_audio_vae(t, CONFIG["audio_vae"])
    put_vocoder(t, CONFIG["vocoder"])
    t.values[NOTHING][:] = 0
    u, g = Tensors(1), Tensors(1)
    put_upsampler(u, UPSAMPLER_CONFIG)
    put_gemma(g, gemma_config(GEMMA))
    # 2. what was trained, in its place; the vocoder's fixed parts are the published ones already
    generator = KeyMap(name="generator", roots=("vocoder.",), parts={"vocoder.": ""})
    encoders.use(dict(mx.load(str(encoders.file))))
    values = published(
        t.values,
        [
            (keymaps.TRANSFORMER, transformer),
            (keymaps.CONNECTORS, side.connectors),
            (keymaps.TEXT_PROJECTION, side.features),
            (keymaps.VIDEO_ENCODER, encoders.video.encoder),
            (keymaps.VIDEO_DECODER, encoders.video.decoder),
            (keymaps.AUDIO_ENCODER, encoders.sound.encoder),
            (keymaps.AUDIO_DECODER, encoders.sound.decoder),
            (generator, sound.both_sides(vocoder)),
        ],
    )
    # 3. files
    shared = {"model_version": make_demo.VERSION, "license": LICENCE}
    metadata = {**shared, "config": json.dumps(CONFIG)}
    save(target / make_demo.CHECKPOINT, values, metadata, make_demo.keeps_float32)
    enlarging = published(u.values, [(keymaps.UPSAMPLER, upsampler.network)])
    save(target / make_demo.UPSAMPLER, enlarging, {**shared, "config": json.dumps(UPSAMPLER_CONFIG)})
    words = published(g.values, [(GEMMA_KEYS, side.gemma)])
    save(target / "gemma" / "model.safetensors", words, {"format": "pt", "license": LICENCE})
    write_json(target / "gemma" / "config.json", gemma_config(GEMMA))
    save_tokenizer(target / "gemma", text.tokenizer(), TEXT_LENGTH)
    return steps
