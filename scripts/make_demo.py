"""Make the small model that most tests use: a complete, untrained LTX-2.3 checkpoint in the official layout.

    python scripts/make_demo.py FOLDER [--seed 1]

Needs only what the package itself needs. The same script and seed give the same bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from demo_weights.autoencoders import put_audio_vae, put_upsampler, put_video_vae
from demo_weights.diffusion import put_connectors, put_transformer
from demo_weights.tensors import Tensors, save
from demo_weights.text import gemma_config, put_gemma, save_tokenizer, write_json
from demo_weights.vocoder import put_vocoder

CHECKPOINT = "ltx-2.3-demo.safetensors"
UPSAMPLER = "spatial-upscaler-x2.safetensors"
VERSION = "2.3.0"
SEED = 1
SIZE, FRAMES = (256, 192), 33  # of its clips
LICENCE = "Apache-2.0; made by scripts/make_demo.py of mlx-ltx; untrained"

# Scale, frame rates and sampling rates are those of the published models; only widths and depths are small.
LATENT_CHANNELS = 32
AUDIO_Z_CHANNELS, MEL_BINS, LATENT_BINS = 2, 64, 16
HEADS, VIDEO_HEAD, AUDIO_HEAD = 2, 32, 16
GEMMA = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}

TRANSFORMER: dict[str, Any] = {
    "_class_name": "AVTransformer3DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": VIDEO_HEAD,
    "attention_type": "default",
    "caption_channels": GEMMA["hidden_size"],
    "cross_attention_dim": HEADS * VIDEO_HEAD,
    "double_self_attention": False,
    "dropout": 0.0,
    "in_channels": LATENT_CHANNELS,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "num_attention_heads": HEADS,
    "num_embeds_ada_norm": 1000,
    "num_layers": 3,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "cross_attention_norm": True,
    "out_channels": LATENT_CHANNELS,
    "upcast_attention": False,
    "use_linear_projection": False,
    "qk_norm": "rms_norm",
    "standardization_norm": "rms_norm",
    "positional_embedding_type": "rope",
    "positional_embedding_theta": 10000.0,
    "positional_embedding_max_pos": [20, 2048, 2048],
    "timestep_scale_multiplier": 1000,
    "av_ca_timestep_scale_multiplier": 1000.0,
    "causal_temporal_positioning": True,
    "audio_num_attention_heads": HEADS,
    "audio_attention_head_dim": AUDIO_HEAD,
    "use_audio_video_cross_attention": True,
    "share_ff": False,
    # Published files leave audio_in_channels out, because theirs is the default (128).
    "audio_in_channels": AUDIO_Z_CHANNELS * LATENT_BINS,
    "audio_out_channels": AUDIO_Z_CHANNELS * LATENT_BINS,
    "audio_cross_attention_dim": HEADS * AUDIO_HEAD,
    "audio_positional_embedding_max_pos": [20],
    "av_cross_ada_norm": True,
    "use_middle_indices_grid": True,
    "rope_type": "split",
    "frequencies_precision": "float64",
    "use_embeddings_connector": True,
    "connector_attention_head_dim": VIDEO_HEAD,
    "connector_num_attention_heads": HEADS,
    "connector_num_layers": 1,
    "connector_positional_embedding_max_pos": [4096],
    "connector_num_learnable_registers": 128,
    "connector_norm_output": True,
    "apply_gated_attention": True,
    "connector_apply_gated_attention": True,
    "caption_projection_first_linear": False,
    "caption_projection_second_linear": False,
    "caption_proj_input_norm": False,
    "connector_learnable_registers_std": 1,
    "caption_proj_before_connector": True,
    "audio_connector_attention_head_dim": AUDIO_HEAD,
    "audio_connector_num_attention_heads": HEADS,
    "cross_attention_adaln": True,
    "text_encoder_norm_type": "per_token_rms",
}
VAE: dict[str, Any] = {
    "_class_name": "CausalVideoAutoencoder",
    "dims": 3,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": LATENT_CHANNELS,
    "encoder_blocks": [
        ["res_x", {"num_layers": 1}],
        ["compress_space_res", {"multiplier": 1}],
        ["res_x", {"num_layers": 1}],
        ["compress_time_res", {"multiplier": 1}],
        ["res_x", {"num_layers": 1}],
        ["compress_all_res", {"multiplier": 1}],
        ["res_x", {"num_layers": 1}],
        ["compress_all_res", {"multiplier": 1}],
        ["res_x", {"num_layers": 1}],
    ],
    "decoder_blocks": [
        ["res_x", {"num_layers": 1}],
        ["compress_space", {"multiplier": 2}],
        ["res_x", {"num_layers": 1}],
        ["compress_time", {"multiplier": 2}],
        ["res_x", {"num_layers": 1}],
        ["compress_all", {"multiplier": 1}],
        ["res_x", {"num_layers": 1}],
        ["compress_all", {"multiplier": 1}],
        ["res_x", {"num_layers": 1}],
    ],
    "scaling_factor": 1.0,
    "norm_layer": "pixel_norm",
    "patch_size": 4,
    "latent_log_var": "uniform",
    "use_quant_conv": False,
    "causal_decoder": False,
    "timestep_conditioning": False,
    "normalize_latent_channels": False,
    "encoder_base_channels": LATENT_CHANNELS,
    "decoder_base_channels": 8,
    "spatial_padding_mode": "zeros",
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "RectifiedFlowScheduler",
    "_diffusers_version": "0.25.1",
    "num_train_timesteps": 1000,
    "shifting": None,
    "base_resolution": None,
    "sampler": "LinearQuadratic",
}
AUDIO_VAE: dict[str, Any] = {
    "model": {
        "params": {
            "ddconfig": {
                "double_z": True,
                "mel_bins": MEL_BINS,
                "z_channels": AUDIO_Z_CHANNELS,
                "resolution": 256,
                "downsample_time": False,
                "in_channels": 2,
                "out_ch": 2,
                "ch": 12,
                "ch_mult": [1, 2, 4],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "dropout": 0.0,
                "mid_block_add_attention": False,
                "norm_type": "pixel",
                "causality_axis": "height",
            },
            "sampling_rate": 16000,
        }
    },
    "preprocessing": {
        "audio": {
            "sampling_rate": 16000,
            "max_wav_value": 32768.0,
            "duration": 5.12,
            "stereo": True,
            "causal_padding": 3,
        },
        "stft": {"filter_length": 1024, "hop_length": 160, "win_length": 1024, "causal": True},
        "mel": {"n_mel_channels": MEL_BINS, "mel_fmin": 0, "mel_fmax": 8000},
    },
}
GENERATOR: dict[str, Any] = {
    "resblock": "AMP1",
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3, 5]],
    "stereo": True,
    "use_tanh_at_final": False,
    "activation": "snakebeta",
    "use_bias_at_final": False,
}
VOCODER: dict[str, Any] = {
    "vocoder": {
        "upsample_initial_channel": 128,
        "upsample_rates": [5, 2, 2, 2, 2, 2],
        "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
        **GENERATOR,
    },
    "bwe": {
        "upsample_initial_channel": 64,
        "upsample_rates": [6, 5, 2, 2, 2],
        "upsample_kernel_sizes": [12, 11, 4, 4, 4],
        **GENERATOR,
        "apply_final_activation": False,
        "input_sampling_rate": 16000,
        "output_sampling_rate": 48000,
        "hop_length": 80,
        "n_fft": 256,
        "win_size": 256,
        "num_mels": MEL_BINS,
    },
}
CONFIG = {
    "transformer": TRANSFORMER,
    "vae": VAE,
    "scheduler": SCHEDULER,
    "audio_vae": AUDIO_VAE,
    "vocoder": VOCODER,
}
UPSAMPLER_CONFIG: dict[str, Any] = {
    "in_channels": LATENT_CHANNELS,
    "mid_channels": 32,
    "num_blocks_per_stage": 1,
    "dims": 3,
    "spatial_upsample": True,
    "temporal_upsample": False,
    "spatial_scale": 2.0,
    "rational_resampler": False,
}


def checkpoint(seed: int) -> dict[str, np.ndarray]:
    """Every tensor of the checkpoint, by its published name."""
    t = Tensors(seed)
    put_transformer(t, TRANSFORMER)
    put_connectors(t, TRANSFORMER, GEMMA["hidden_size"] * (GEMMA["num_hidden_layers"] + 1))
    put_video_vae(t, VAE)
    put_audio_vae(t, AUDIO_VAE)
    put_vocoder(t, VOCODER)
    return t.values


def upsampler(seed: int) -> dict[str, np.ndarray]:
    t = Tensors(seed)
    put_upsampler(t, UPSAMPLER_CONFIG)
    return t.values


def gemma(seed: int) -> dict[str, np.ndarray]:
    t = Tensors(seed)
    put_gemma(t, gemma_config(GEMMA))
    return t.values


def keeps_float32(name: str) -> bool:
    """As in published files: the vocoder, and the tables that modulations are added to."""
    return name.startswith("vocoder.") or "scale_shift_table" in name


def make(folder: Path, seed: int = SEED) -> None:
    """Write all files into ``folder``."""
    shared = {"model_version": VERSION, "license": LICENCE}
    metadata = {**shared, "config": json.dumps(CONFIG)}
    save(folder / CHECKPOINT, checkpoint(seed), metadata, keeps_float32)
    save(folder / UPSAMPLER, upsampler(seed), {**shared, "config": json.dumps(UPSAMPLER_CONFIG)})
    save(folder / "gemma" / "model.safetensors", gemma(seed), {"format": "pt", "license": LICENCE})
    write_json(folder / "gemma" / "config.json", gemma_config(GEMMA))
    save_tokenizer(folder / "gemma")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("output", type=Path, metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    make(arguments.output, arguments.seed)
    for path in sorted(arguments.output.rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size:>10,}  {path.relative_to(arguments.output)}")


if __name__ == "__main__":
    main()
