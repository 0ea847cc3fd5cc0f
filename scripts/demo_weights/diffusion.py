"""The demo's transformer, text connectors and text projection.

The weights are random but for one thing that an untrained network would not have: the first block's self-attention
looks at near-by tokens only and takes part of what it finds there away from the token. Denoising then removes what
differs between neighbours and keeps what they share, so clips show large soft shapes instead of noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from demo_weights.tensors import Tensors

PREFIX = "model.diffusion_model."
REGISTERS = 128
SINUSOID = 256

NOISE_REMOVAL = 0.8  # how much of a token's own value the predicted velocity holds
NEIGHBOURHOOD = 1.6  # how much of the neighbourhood's mean is taken away from it
TEXT_MARK = 3.0


def put_transformer(t: Tensors, config: dict[str, Any]) -> None:
    """The transformer for a config's ``transformer`` section."""
    heads = config["num_attention_heads"]
    video, audio = heads * config["attention_head_dim"], heads * config["audio_attention_head_dim"]
    _put_ends(t, PREFIX, video, config["in_channels"])
    _put_ends(t, f"{PREFIX}audio_", audio, config["audio_in_channels"])
    for name, dim, rows in (
        ("video_scale_shift", video, 4),
        ("audio_scale_shift", audio, 4),
        ("a2v_gate", video, 1),
        ("v2a_gate", audio, 1),
    ):
        _put_adaln(t, f"{PREFIX}av_ca_{name}_adaln_single", dim, rows)
    for index in range(config["num_layers"]):
        block = f"{PREFIX}transformer_blocks.{index}."
        smooth = index == 0
        # Where a neighbour's rotary angle differs by 0.2 to 1 radian: see local_places.
        _put_stream(t, block, "", video, heads, local_places(video, heads, 3, (2, 3), 1) if smooth else None)
        _put_stream(
            t, block, "audio_", audio, heads, local_places(audio, heads, 1, (6, 7, 8, 9), 2) if smooth else None
        )
        put_attention(t, f"{block}audio_to_video_attn", video, audio, heads, audio, gain=0.2)
        put_attention(t, f"{block}video_to_audio_attn", audio, video, heads, audio, gain=0.2)
        for name, dim in (("video", video), ("audio", audio)):
            table = f"{block}scale_shift_table_a2v_ca_{name}"
            _put_table(t, table, rows=5, dim=dim, gates=(4,))


def _put_ends(t: Tensors, prefix: str, dim: int, channels: int) -> None:
    """A stream's first and last layers: latents become the first ``channels`` of ``dim`` values and back."""
    into = 0.05 * t.draw(f"{prefix}patchify_proj.weight", dim, channels)
    into[:channels] += np.eye(channels)
    t.put(f"{prefix}patchify_proj.weight", into)
    t.put(f"{prefix}patchify_proj.bias", np.zeros(dim))
    out = 0.02 * t.draw(f"{prefix}proj_out.weight", channels, dim)
    out[:, :channels] += NOISE_REMOVAL * np.sqrt(channels / dim) * np.eye(channels)
    t.put(f"{prefix}proj_out.weight", out)
    t.put(f"{prefix}proj_out.bias", np.zeros(channels))
    _put_adaln(t, f"{prefix}adaln_single", dim, 9)
    _put_adaln(t, f"{prefix}prompt_adaln_single", dim, 2)
    _put_table(t, f"{prefix}scale_shift_table", rows=2, dim=dim)


def _put_adaln(t: Tensors, name: str, dim: int, rows: int) -> None:
    t.linear(f"{name}.emb.timestep_embedder.linear_1", SINUSOID, dim)
    t.linear(f"{name}.emb.timestep_embedder.linear_2", dim, dim, gain=0.2)
    t.linear(f"{name}.linear", dim, rows * dim, gain=0.5)


def _put_table(t: Tensors, name: str, rows: int, dim: int, gates: Sequence[int] = ()) -> None:
    """A modulation table: gates are open, shifts and scales do nothing yet."""
    table = 0.02 * t.draw(name, rows, dim)
    table[list(gates)] += 1
    t.put(name, table)


def _put_stream(t: Tensors, block: str, prefix: str, dim: int, heads: int, local: np.ndarray | None) -> None:
    """One stream's part of a block; ``local`` is the query of a self-attention to near-by tokens."""
    if local is None:
        put_attention(t, f"{block}{prefix}attn1", dim, dim, heads, dim, gain=0.2)
    else:
        _put_local_attention(t, f"{block}{prefix}attn1", dim, heads, local)
    # The connectors mark the tokens of the prompt, so that it is not lost among the registers.
    put_attention(t, f"{block}{prefix}attn2", dim, dim, heads, dim, gain=0.35, marked=True)
    put_feed_forward(t, f"{block}{prefix}ff", dim, gain=0.2)
    _put_table(t, f"{block}{prefix}scale_shift_table", rows=9, dim=dim, gates=(2, 5, 8))
    _put_table(t, f"{block}{prefix}prompt_scale_shift_table", rows=2, dim=dim)


def put_attention(
    t: Tensors, name: str, query: int, context: int, heads: int, inner: int, gain: float, marked: bool = False
) -> None:
    """Random attention whose result has about ``gain`` times the size of its input.

    ``marked``: the first channel of every head finds the mark that :func:`put_connectors` gives to tokens.
    """
    t.linear(f"{name}.to_v", context, inner)
    t.linear(f"{name}.to_out.0", inner, query, gain)
    t.linear(f"{name}.to_gate_logits", query, heads, gain=0.1)
    for part, inputs in (("q", query), ("k", context)):
        weight = t.draw(f"{name}.to_{part}.weight", inner, inputs) / np.sqrt(inputs)
        bias = np.zeros(inner)
        if marked:
            first = np.arange(heads) * (inner // heads)
            weight[first] = 0
            if part == "q":
                bias[first] = TEXT_MARK
            else:
                weight[first, -1] = TEXT_MARK
        t.put(f"{name}.to_{part}.weight", weight)
        t.put(f"{name}.to_{part}.bias", bias)
        t.put(f"{name}.{part}_norm.weight", np.ones(inner))


def _put_local_attention(t: Tensors, name: str, dim: int, heads: int, local: np.ndarray) -> None:
    """Every token asks and answers with the same vector, so that rotary positions alone decide; see local_places."""
    for part in ("q", "k"):
        t.random(f"{name}.to_{part}.weight", dim, dim, std=0.02 / np.sqrt(dim))
        t.put(f"{name}.to_{part}.bias", local)
        t.put(f"{name}.{part}_norm.weight", np.ones(dim))
    t.put(f"{name}.to_v.weight", np.eye(dim))
    t.put(f"{name}.to_v.bias", np.zeros(dim))
    # Tokens come in normalised over ``dim`` values, of which the latent's are the ones that are not small.
    t.put(f"{name}.to_out.0.weight", -NEIGHBOURHOOD * np.diag((np.abs(_head_sums(local, heads)) > 0).astype(float)))
    t.put(f"{name}.to_out.0.bias", np.zeros(dim))
    t.linear(f"{name}.to_gate_logits", dim, heads, gain=0.02)


def _head_sums(values: np.ndarray, heads: int) -> np.ndarray:
    """Each channel's sum over its whole head."""
    return np.repeat(values.reshape(heads, -1).sum(axis=1), len(values) // heads)


def local_places(dim: int, heads: int, axes: int, frequencies: Sequence[int], used_heads: int) -> np.ndarray:
    """The channels of the first ``used_heads`` heads that rotate at these frequencies, on every axis, as ones.

    Attention between two equal vectors of such channels falls with the distance of their tokens, as the cosine of the
    angle between them. Channels are counted as in :func:`mlx_ltx.models.rope.rope_table`, split layout: frequency by
    frequency, and axis by axis within one, after some that do not rotate.
    """
    half, per_head = dim // 2, dim // 2 // heads
    padding = half - half // axes * axes
    result = np.zeros((heads, 2, per_head))
    for frequency in frequencies:
        for axis in range(axes):
            head, place = divmod(padding + frequency * axes + axis, per_head)
            if head < used_heads:
                result[head, 0, place] = 1
    return result.reshape(dim)


def put_feed_forward(t: Tensors, name: str, dim: int, gain: float) -> None:
    t.linear(f"{name}.net.0.proj", dim, 4 * dim)
    t.linear(f"{name}.net.2", 4 * dim, dim, gain)


def put_connectors(t: Tensors, config: dict[str, Any], text_width: int) -> None:
    """Text projection and connectors; ``text_width`` values per token come from the text model.

    The last channel tells tokens of the prompt (positive) from registers (negative).
    """
    for modality, prefix in (("video", ""), ("audio", "audio_")):
        heads = config[f"{prefix}connector_num_attention_heads"]
        dim = heads * config[f"{prefix}connector_attention_head_dim"]
        projection = f"text_embedding_projection.{modality}_aggregate_embed"
        # The features are rescaled by the square root of the widths' ratio, hence not much gain here.
        t.linear(projection, text_width, dim, bias=False)
        mark = np.zeros(dim)
        mark[-1] = TEXT_MARK
        t.put(f"{projection}.bias", mark)
        name = f"{PREFIX}{modality}_embeddings_connector"
        t.put(f"{name}.learnable_registers", t.draw(f"{name}.learnable_registers", REGISTERS, dim) - mark)
        for index in range(config["connector_num_layers"]):
            block = f"{name}.transformer_1d_blocks.{index}"
            put_attention(t, f"{block}.attn1", dim, dim, heads, dim, gain=0.3)
            put_feed_forward(t, f"{block}.ff", dim, gain=0.3)
