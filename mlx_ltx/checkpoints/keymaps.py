"""Where each network's tensors stand in a published checkpoint: one key map per network, and nothing else.

The modules of ``mlx_ltx.models`` carry the official names wherever they can, so that a map says only where they differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class KeyMap:
    """How checkpoint keys become module parameter paths.

    Attributes:
        name: what the network is called in messages.
        roots: alternative prefixes of the whole component; the first under which any part occurs is used.
        parts: for each prefix below the root, what replaces it in the module ("" for the module itself).
        exclude: prefixes below the root that belong to another network.
        renames: (regular expression, replacement) pairs applied in order to the module path.
        unused: regular expressions of keys that real files hold and that no network reads.
    """

    name: str
    roots: tuple[str, ...]
    parts: dict[str, str] = field(default_factory=lambda: {"": ""})
    exclude: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()

    def select(self, keys: Iterable[str]) -> dict[str, str]:
        """Module path to checkpoint key, for every key of this network among ``keys``."""
        keys = list(keys)
        for root in self.roots:
            selected = {path: key for key in keys if (path := self.path(key, root)) is not None}
            if selected:
                return selected
        return {}

    def path(self, key: str, root: str) -> str | None:
        """The module path of one key below ``root``, or None if this network does not own it."""
        if not key.startswith(root):
            return None
        below = key[len(root) :]
        if below.startswith(self.exclude) or any(re.fullmatch(pattern, below) for pattern in self.unused):
            return None
        for prefix, replacement in self.parts.items():
            if below.startswith(prefix):
                path = replacement + below[len(prefix) :]
                for pattern, substitute in self.renames:
                    path = re.sub(pattern, substitute, path)
                return path
        return None


CONNECTORS_BELOW = ("video_embeddings_connector.", "audio_embeddings_connector.")
ATTENTION = ((r"\bto_out\.0\.", "to_out."), (r"\bff\.net\.0\.proj\.", "ff.up."), (r"\bff\.net\.2\.", "ff.down."))
STATISTICS = ((r"\bmean-of-means$", "mean"), (r"\bstd-of-means$", "std"))
UNUSED_STATISTICS = (r"per_channel_statistics\.(?!mean-of-means$|std-of-means$).*",)

# The official names tell the streams apart by an ``audio_`` prefix; the modules, by ``video.`` and ``audio.``.
BLOCK_PARTS = r"(attn1|attn2|ff|scale_shift_table|prompt_scale_shift_table)\b"
END_PARTS = (
    r"(patchify_proj|proj_out|adaln_single|prompt_adaln_single|scale_shift_table|caption_projection"
    r"|keyframes_abs_pos_embedding)\b"
)
TRANSFORMER = KeyMap(
    name="transformer",
    roots=("model.diffusion_model.",),
    exclude=CONNECTORS_BELOW,
    renames=(
        (r"^transformer_blocks\.(\d+)\.", r"blocks.\1."),
        (r"^(blocks\.\d+\.)audio_to_video_attn\b", r"\1video.cross_attn"),
        (r"^(blocks\.\d+\.)video_to_audio_attn\b", r"\1audio.cross_attn"),
        (r"^(blocks\.\d+\.)scale_shift_table_a2v_ca_(video|audio)$", r"\1\2.cross_scale_shift_table"),
        (rf"^(blocks\.\d+\.)audio_{BLOCK_PARTS}", r"\1audio.\2"),
        (rf"^(blocks\.\d+\.){BLOCK_PARTS}", r"\1video.\2"),
        (r"^av_ca_(video|audio)_scale_shift_adaln_single\b", r"\1.cross_adaln"),
        (r"^av_ca_a2v_gate_adaln_single\b", "video.cross_gate_adaln"),
        (r"^av_ca_v2a_gate_adaln_single\b", "audio.cross_gate_adaln"),
        (rf"^audio_{END_PARTS}", r"audio.\1"),
        (rf"^{END_PARTS}", r"video.\1"),
        *ATTENTION,
    ),
)
# Layers as other tools spell them in LoRA files, and the official spelling; both sides below the prefix. Diffusers:
# scripts/convert_ltx2_to_diffusers.py (its renamed norms and tables are no layers, so no LoRA can change them).
DIFFUSERS_LAYERS = (
    (r"^(audio_)?proj_in\b", r"\1patchify_proj"),
    (r"^(audio_)?time_embed\b", r"\1adaln_single"),
    (r"^(audio_)?prompt_adaln\b", r"\1prompt_adaln_single"),
    (r"^av_cross_attn_(video|audio)_scale_shift\b", r"av_ca_\1_scale_shift_adaln_single"),
    (r"^av_cross_attn_(?:video|audio)_(a2v|v2a)_gate\b", r"av_ca_\1_gate_adaln_single"),
)
# Kohya's tools write every dot as an underscore.
FLATTENED_LAYERS = (
    (r"^transformer_blocks_(\d+)_", r"transformer_blocks.\1."),
    (r"_to_out_0$", ".to_out.0"),
    (r"_(to_(?:q|k|v|gate_logits))$", r".\1"),
    (r"ff_net_0_proj$", "ff.net.0.proj"),
    (r"ff_net_2$", "ff.net.2"),
    (r"_emb_timestep_embedder_(linear_[12])$", r".emb.timestep_embedder.\1"),
    (r"_linear$", ".linear"),
    (r"(caption_projection)_(linear_[12])$", r"\1.\2"),
)
CONNECTORS = KeyMap(
    name="text connectors",
    roots=("model.diffusion_model.",),
    parts={"video_embeddings_connector.": "video.", "audio_embeddings_connector.": "audio."},
    renames=ATTENTION,
)
TEXT_PROJECTION = KeyMap(name="text projection", roots=("text_embedding_projection.",))
VIDEO_ENCODER = KeyMap(
    name="video encoder",
    roots=("vae.", ""),
    parts={"encoder.": "", "per_channel_statistics.": "statistics."},
    renames=STATISTICS,
    unused=UNUSED_STATISTICS,
)
VIDEO_DECODER = KeyMap(
    name="video decoder",
    roots=("vae.", ""),
    parts={"decoder.": "", "per_channel_statistics.": "statistics."},
    renames=STATISTICS,
    unused=UNUSED_STATISTICS,
)
VIDEO_STATISTICS = KeyMap(
    name="video latent statistics",
    roots=("vae.", ""),
    parts={"per_channel_statistics.": ""},
    renames=STATISTICS,
    unused=UNUSED_STATISTICS,
)
AUDIO_ENCODER = KeyMap(
    name="audio encoder",
    roots=("audio_vae.",),
    parts={"encoder.": "", "per_channel_statistics.": "statistics."},
    renames=STATISTICS,
    unused=UNUSED_STATISTICS,
)
AUDIO_DECODER = KeyMap(
    name="audio decoder",
    roots=("audio_vae.",),
    parts={"decoder.": "", "per_channel_statistics.": "statistics."},
    renames=STATISTICS,
    unused=UNUSED_STATISTICS,
)
VOCODER = KeyMap(name="vocoder", roots=("vocoder.",), unused=(r"mel_stft\.stft_fn\.inverse_basis",))
UPSAMPLER = KeyMap(name="latent upsampler", roots=("",))
