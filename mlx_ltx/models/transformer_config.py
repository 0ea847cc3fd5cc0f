"""The shape of the transformer, read from a checkpoint's config (ltx_core/model/transformer/model_configurator.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# What every published checkpoint says and this implementation takes for granted (model_configurator.py).
REQUIRED = {
    "dropout": 0.0, "attention_bias": True, "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000,
    "num_vector_embeds": None, "use_linear_projection": False, "only_cross_attention": False,
    "cross_attention_norm": True, "double_self_attention": False, "upcast_attention": False,
    "standardization_norm": "rms_norm", "norm_elementwise_affine": False, "qk_norm": "rms_norm",
    "positional_embedding_type": "rope", "use_audio_video_cross_attention": True, "share_ff": False,
    "av_cross_ada_norm": True, "use_middle_indices_grid": True, "causal_temporal_positioning": True,
}  # fmt: skip
PRECISIONS = {"float64": "float64", "float32": "float32", False: "float32", None: "float32"}


@dataclass(frozen=True)
class StreamConfig:
    """One modality's sizes.

    Attributes:
        heads, head_dim: self-attention; their product is the stream's width.
        in_channels, out_channels: channels of a latent token.
        context_dim: width of the text tokens that the blocks attend to.
        max_positions: per position axis, what counts as 1 (seconds, pixels, pixels; or seconds).
        ff_bias: whether the feed-forward layers have biases.
        prompt_adaln: whether the timestep also modulates the text tokens.
        caption_channels: width of text embeddings before the stream's own projection, or None without one.
        keyframe_embedding: whether tokens of single pixel frames carry a learned mark.
    """

    heads: int
    head_dim: int
    in_channels: int
    out_channels: int
    context_dim: int
    max_positions: tuple[float, ...]
    ff_bias: bool
    prompt_adaln: bool
    caption_channels: int | None
    keyframe_embedding: bool = False

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class TransformerConfig:
    """The transformer's shape; ``video`` or ``audio`` is None in a model of one modality.

    Attributes:
        text_modulation: cross-attention to the text has its own scale, shift and gate (``cross_attention_adaln``).
        timestep_scale: sigma times this is the timestep of AdaLN.
        gate_timestep_scale: the same for the gates between the streams.
    """

    layers: int
    video: StreamConfig | None
    audio: StreamConfig | None
    norm_eps: float
    rope_theta: float
    rope_interleaved: bool
    rope_precision: str
    timestep_scale: float
    gate_timestep_scale: float
    gated_attention: bool
    text_modulation: bool

    @classmethod
    def from_metadata(cls, config: dict[str, Any], video: bool = True, audio: bool = True) -> TransformerConfig:
        """Read the config of a checkpoint; ``video`` and ``audio`` choose the streams to build.

        Raises:
            ValueError: the config asks for something that is not implemented; the message names it.
        """
        if "transformer" not in config:
            raise ValueError("the config has no transformer section")
        values = config["transformer"]
        for key, required in REQUIRED.items():
            if values.get(key, required) != required:
                raise ValueError(f"transformer config {key}={values[key]!r} is not supported, only {required!r}")
        if values.get("rope_type", "split") not in ("split", "interleaved"):
            raise ValueError(f"transformer config rope_type={values['rope_type']!r} is not supported")
        if values.get("frequencies_precision", False) not in PRECISIONS:
            raise ValueError(
                f"transformer config frequencies_precision={values['frequencies_precision']!r} is not supported"
            )
        heads = values.get("num_attention_heads", 32)
        if video and audio and heads != values.get("audio_num_attention_heads", 32):
            raise ValueError("transformer config: video and audio must have the same number of attention heads")
        text_modulation = values.get("cross_attention_adaln", False)
        prompt_adaln = text_modulation and values.get("use_prompt_adaln_single", True)
        # With the caption projection before the connectors, text arrives at each stream's own width.
        own_projection = not values.get("caption_proj_before_connector", False)
        caption_channels = values.get("caption_channels", 3840) if own_projection else None
        return cls(
            layers=values.get("num_layers", 48),
            video=StreamConfig(
                heads=heads,
                head_dim=values.get("attention_head_dim", 128),
                in_channels=values.get("in_channels", 128),
                out_channels=values.get("out_channels", 128),
                context_dim=values.get("cross_attention_dim", 4096),
                max_positions=tuple(values.get("positional_embedding_max_pos", [20, 2048, 2048])),
                ff_bias=values.get("ff_bias", True),
                prompt_adaln=prompt_adaln,
                caption_channels=caption_channels,
                keyframe_embedding=values.get("use_keyframes_abs_pos_embedding", False),
            )
            if video
            else None,
            audio=StreamConfig(
                heads=values.get("audio_num_attention_heads", 32),
                head_dim=values.get("audio_attention_head_dim", 64),
                in_channels=values.get("audio_in_channels", 128),
                out_channels=values.get("audio_out_channels", 128),
                context_dim=values.get("audio_cross_attention_dim", 2048),
                max_positions=tuple(values.get("audio_positional_embedding_max_pos", [20])),
                ff_bias=values.get("audio_ff_bias", True),
                prompt_adaln=prompt_adaln,
                caption_channels=caption_channels,
            )
            if audio
            else None,
            norm_eps=values.get("norm_eps", 1e-6),
            rope_theta=values.get("positional_embedding_theta", 10_000.0),
            rope_interleaved=values.get("rope_type", "split") == "interleaved",
            rope_precision=PRECISIONS[values.get("frequencies_precision", False)],
            timestep_scale=values.get("timestep_scale_multiplier", 1000),
            gate_timestep_scale=values.get("av_ca_timestep_scale_multiplier", 1),
            gated_attention=values.get("apply_gated_attention", False),
            text_modulation=text_modulation,
        )
