"""Connectors and the encoder that ties the text path together."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

import parity.text
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.checkpoints.gemma import load_gemma
from mlx_ltx.checkpoints.keymaps import CONNECTORS
from mlx_ltx.checkpoints.loading import published_shapes
from mlx_ltx.models.connectors import Connector, ConnectorConfig, TextConnectors, right_padded_order
from mlx_ltx.models.text_encoder import TextEncoder, embed_prompt, read_prompt
from parity import GoldenSet, runner_for
from parity.text import finish, load_connectors, load_features

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIGS: dict[str, Any] = json.loads((GOLDEN / "real_configs.json").read_text())
SMALL = ConnectorConfig(2, 8, 2, 4096, False, "float64", True, True)


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    text = load_gemma(GOLDEN / "gemma3_tiny", mx.float32)
    checkpoint = SafetensorsFile(GOLDEN / "text_23.ckpt.safetensors")
    config = text.model.config
    features = load_features(checkpoint, checkpoint, config.hidden_size, config.hidden_states)
    return TextEncoder(text.model, features, load_connectors(checkpoint))


def random_connector(config: ConnectorConfig) -> Connector:
    mx.random.seed(0)
    connector = Connector(config)
    connector.update(tree_map(lambda p: mx.random.normal(p.shape) * 0.3, connector.parameters()))
    return connector


def test_connectors_equal_the_reference() -> None:
    golden = GoldenSet(GOLDEN, "connectors_23")
    runner = runner_for("connectors_23")
    assert runner is parity.text.run_connectors
    comparisons = list(runner(golden))
    inputs = {name for name in golden.names if name.startswith("hidden.") or name == "attention_mask"}
    assert {c.tensor for c in comparisons} == set(golden.names) - inputs
    assert [f"{c.tensor}: {c.error:.1e}" for c in comparisons if not c.error <= 1e-5] == []


@pytest.mark.parametrize("version", ["19b", "2.3", "2.5"])
def test_published_keys(version: str) -> None:
    lines = (GOLDEN / "keys" / f"{version}_connectors.txt").read_text().splitlines()
    published = {key: tuple(json.loads(shape)) for key, _, shape in (x.partition("\t") for x in lines if x[0] != "#")}
    expected = {path: published[key] for path, key in CONNECTORS.select(published).items()}
    assert len(expected) == len(published)
    assert published_shapes(TextConnectors.from_metadata(CONFIGS[version])) == expected


def test_audio_sizes_fall_back_to_video() -> None:
    first = CONFIGS["19b"]
    assert ConnectorConfig.from_metadata(first, "audio") == ConnectorConfig.from_metadata(first, "video")
    assert ConnectorConfig.from_metadata(CONFIGS["2.3"], "audio").dim == 2048
    assert ConnectorConfig.from_metadata(CONFIGS["2.3"], "video").dim == 4096


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_embeddings_connector", False),
        ("connector_num_learnable_registers", 64),
        ("connector_norm_output", False),
        ("rope_type", "spiral"),
        ("connector_positional_embedding_max_pos", [20, 2048]),
    ],
)
def test_unsupported_values_are_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key):
        ConnectorConfig.from_metadata({"transformer": {**CONFIGS["2.3"]["transformer"], key: value}}, "video")


def test_feed_forward_bias_is_configured() -> None:
    config = {"transformer": {**CONFIGS["2.3"]["transformer"], "connector_ff_bias": False}}
    shapes = published_shapes(TextConnectors.from_metadata(config))
    assert not any("ff.up.bias" in path or "ff.down.bias" in path for path in shapes)


def test_right_padded_order_is_stable() -> None:
    mask = mx.array([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    assert right_padded_order(mask).tolist() == [[1, 3, 4, 0, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]


def test_side_of_padding_and_its_contents_do_not_matter() -> None:
    connectors = TextConnectors(SMALL, SMALL)
    connectors.video = connectors.audio = random_connector(SMALL)
    mx.random.seed(2)
    tokens = mx.random.normal((1, 5, 16))
    left = mx.concatenate([mx.full((1, 123, 16), 7.0), tokens], axis=1)
    right = mx.concatenate([tokens, mx.full((1, 123, 16), -3.0)], axis=1)
    of_left = connectors(left, left, mx.array([[0] * 123 + [1] * 5]))
    of_right = connectors(right, right, mx.array([[1] * 5 + [0] * 123]))
    np.testing.assert_allclose(np.array(of_left.video), np.array(of_right.video), atol=1e-6)
    rms = np.sqrt((np.array(of_left.audio) ** 2).mean(axis=-1))
    np.testing.assert_allclose(rms, 1.0, atol=1e-3)  # normalised at the end, and no place is masked to zero


def test_registers_repeat_along_the_sequence() -> None:
    """Without blocks' attention a place of padding shows its own register: the one of its place modulo 128."""
    connector = random_connector(SMALL)
    for block in connector.transformer_1d_blocks:
        for layer in (block.attn1.to_out, block.ff.down):
            layer.weight, layer.bias = mx.zeros_like(layer.weight), mx.zeros_like(layer.bias)
    mask = mx.array([[1] * 3 + [0] * 253])
    out = np.array(connector(mx.ones((1, 256, 16)), mask))[0]
    registers = np.array(connector.learnable_registers)
    registers = registers / np.sqrt((registers**2).mean(axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(out[:3], 1.0, atol=1e-3)
    np.testing.assert_allclose(out[3:128], registers[3:], atol=1e-4)
    np.testing.assert_allclose(out[128:], registers, atol=1e-4)


def test_lengths_that_registers_cannot_fill_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple"):
        random_connector(SMALL)(mx.zeros((1, 100, 16)), mx.ones((1, 100)))


def test_bfloat16_stays() -> None:
    connector = random_connector(SMALL)
    connector.update(tree_map(lambda p: p.astype(mx.bfloat16), connector.parameters()))
    features = mx.random.normal((1, 128, 16))  # the extractor gives float32
    steps = list(connector.blocks(features, mx.array([[1] * 9 + [0] * 119])))
    assert {step.dtype for step in steps} == {mx.bfloat16}
    assert len(steps) == SMALL.layers


def test_encoder_reports_every_step_and_equals_the_padded_run(encoder: TextEncoder) -> None:
    ids = mx.array([[0] * 250 + [2, 5, 6, 8, 9, 10]])
    mask = (ids != 0).astype(mx.int32)
    steps = list(encoder.encode(ids, mask))
    reading = encoder.gemma.config.hidden_states
    embedding = 1 + 2 * len(encoder.connectors.video.transformer_1d_blocks)
    assert [s.done for s in steps] == [*range(1, reading + 1), *range(1, embedding + 1)]
    assert {(s.part, s.total) for s in steps} == {("read", reading), ("embed", embedding)}
    states = finish(read_prompt(encoder.gemma, ids, mask))
    assert {tuple(state.shape) for state in states.states} == {(1, 6, encoder.gemma.config.hidden_size)}
    apart = finish(embed_prompt(encoder.features, encoder.connectors, states))
    whole = finish(encoder.encode(ids, mask))
    np.testing.assert_array_equal(np.array(apart.video), np.array(whole.video))
    assert whole.audio.shape == (1, 256, encoder.connectors.audio.config.dim)


def test_encoder_refuses_what_it_cannot_trim(encoder: TextEncoder) -> None:
    ids = mx.array([[2, 5, 6, 7]])
    with pytest.raises(ValueError, match="one run"):
        finish(read_prompt(encoder.gemma, ids, mx.array([[1, 0, 1, 1]])))
    with pytest.raises(ValueError, match="one run"):
        finish(read_prompt(encoder.gemma, ids, mx.zeros((1, 4))))
    with pytest.raises(ValueError, match="one prompt"):
        finish(read_prompt(encoder.gemma, mx.tile(ids, (2, 1)), mx.ones((2, 4))))
