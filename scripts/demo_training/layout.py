"""The trained demo's networks: the published LTX-2.3 layout with sizes that train on two CPU cores in hours."""

from __future__ import annotations

import copy
from typing import Any

import make_demo

LATENT_CHANNELS = 64
AUDIO_Z_CHANNELS = 4
HEADS, VIDEO_HEAD, AUDIO_HEAD = 4, 48, 24
LAYERS = 4
TEXT_LENGTH = 128  # tokens and registers of a prompt
GEMMA = make_demo.GEMMA

CONFIG: dict[str, Any] = copy.deepcopy(make_demo.CONFIG)
# A latent is 8 frames of 16x16 pixels: half the published size, because clips are small.
CONFIG["vae"] |= {
    "latent_channels": LATENT_CHANNELS,
    "patch_size": 8,
    "encoder_blocks": [
        ["res_x", {"num_layers": 1}],
        ["compress_time_res", {"multiplier": 1}],
        ["res_x", {"num_layers": 1}],
        ["compress_all_res", {"multiplier": 1}],
        ["res_x", {"num_layers": 1}],
        ["compress_time_res", {"multiplier": 1}],
        ["res_x", {"num_layers": 1}],
    ],
    "decoder_blocks": [
        ["res_x", {"num_layers": 1}],
        ["compress_time", {"multiplier": 1}],
        ["res_x", {"num_layers": 1}],
        ["compress_time", {"multiplier": 1}],
        ["res_x", {"num_layers": 1}],
        ["compress_all", {"multiplier": 1}],
        ["res_x", {"num_layers": 1}],
    ],
    "encoder_base_channels": LATENT_CHANNELS,
    "decoder_base_channels": 64,
}
CONFIG["audio_vae"]["model"]["params"]["ddconfig"] |= {"z_channels": AUDIO_Z_CHANNELS, "ch": 16, "ch_mult": [1, 2, 3]}
CONFIG["transformer"] |= {
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "num_layers": LAYERS,
    "num_attention_heads": HEADS,
    "audio_num_attention_heads": HEADS,
    "attention_head_dim": VIDEO_HEAD,
    "audio_attention_head_dim": AUDIO_HEAD,
    "cross_attention_dim": HEADS * VIDEO_HEAD,
    "audio_cross_attention_dim": HEADS * AUDIO_HEAD,
    "audio_in_channels": AUDIO_Z_CHANNELS * make_demo.LATENT_BINS,
    "audio_out_channels": AUDIO_Z_CHANNELS * make_demo.LATENT_BINS,
    "connector_num_attention_heads": HEADS,
    "connector_attention_head_dim": VIDEO_HEAD,
    "audio_connector_num_attention_heads": HEADS,
    "audio_connector_attention_head_dim": AUDIO_HEAD,
}
# Fewer stages than published ones have, so that four channels are left at the end, two for each side.
CONFIG["vocoder"]["vocoder"] |= {
    "upsample_initial_channel": 128,
    "upsample_rates": [5, 4, 2, 2, 2],
    "upsample_kernel_sizes": [11, 8, 4, 4, 4],
}
UPSAMPLER_CONFIG: dict[str, Any] = copy.deepcopy(make_demo.UPSAMPLER_CONFIG) | {
    "in_channels": LATENT_CHANNELS,
    "mid_channels": 64,
}
