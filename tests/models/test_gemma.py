"""Gemma 3: every hidden state as the reference's, with and without padding, and what must be refused."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

import parity.text
from mlx_ltx.checkpoints.gemma import load_gemma
from mlx_ltx.models.gemma import FULL, SLIDING, Gemma, GemmaConfig, GemmaNorm, all_hidden_states
from parity import GoldenSet, runner_for

GOLDEN = Path(__file__).parents[1] / "golden"
# google/gemma-3-12b-it, where everything that is Gemma3TextConfig's default is left out
PUBLISHED: dict[str, Any] = {
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "model_type": "gemma3_text",
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}


@pytest.fixture(scope="module")
def tiny() -> Gemma:
    return load_gemma(GOLDEN / "gemma3_tiny", mx.float32).model


def numpy(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))


def test_text_path_equals_the_reference() -> None:
    golden = GoldenSet(GOLDEN, "text_19b")
    runner = runner_for("text_19b")
    assert runner is parity.text.run_text
    comparisons = list(runner(golden))
    recorded = {f"{c.case}.{c.tensor}" for c in comparisons}
    assert recorded >= set(golden.names) - {"input_ids"}
    assert [f"{c.case}.{c.tensor}: {c.error:.1e}" for c in comparisons if not c.error <= 1e-5] == []


def test_runners_exist_only_for_gemma_3() -> None:
    assert runner_for("text_23") is parity.text.run_text
    assert runner_for("text_25") is None


def test_published_config_and_keys() -> None:
    config = GemmaConfig.from_metadata(PUBLISHED)
    assert config.hidden_states == 49
    assert config.layer_types.count(FULL) == 8
    assert config.layer_types[5] == config.layer_types[47] == FULL
    assert (config.full_rope.theta, config.full_rope.factor) == (1e6, 8.0)
    assert (config.sliding_rope.theta, config.sliding_rope.factor) == (1e4, 1.0)
    expected = {}
    for line in (GOLDEN / "keys" / "gemma3_12b.txt").read_text().splitlines():
        key, _, shape = line.partition("\t")
        if key.startswith("language_model.model."):
            expected[key.removeprefix("language_model.model.")] = tuple(json.loads(shape))
    assert {path: tuple(p.shape) for path, p in tree_flatten(Gemma(config).parameters())} == expected


def test_old_and_new_spelling_of_the_rope_settings_agree() -> None:
    new = json.loads(json.dumps(PUBLISHED))
    del new["text_config"]["rope_scaling"]
    new["text_config"]["rope_parameters"] = {
        FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    }
    assert GemmaConfig.from_metadata(new) == GemmaConfig.from_metadata(PUBLISHED)
    assert GemmaConfig.from_metadata(PUBLISHED["text_config"]) == GemmaConfig.from_metadata(PUBLISHED)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_activation", "silu"),
        ("attention_bias", True),
        ("attn_logit_softcapping", 50.0),
        ("use_bidirectional_attention", True),
        ("layer_types", ["chunked_attention"] * 48),
        ("layer_types", [FULL] * 47),
        ("rope_scaling", {"rope_type": "yarn", "factor": 8.0}),
    ],
)
def test_unsupported_values_are_refused(key: str, value: object) -> None:
    config = {**PUBLISHED, "text_config": {**PUBLISHED["text_config"], key: value}}
    with pytest.raises(ValueError, match="rope_type" if key == "rope_scaling" else key):
        GemmaConfig.from_metadata(config)


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="gemma2"):
        GemmaConfig.from_metadata({**PUBLISHED, "model_type": "gemma2"})


def test_padding_changes_nothing_and_is_never_nan(tiny: Gemma) -> None:
    ids = mx.array([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]])
    alone = list(all_hidden_states(tiny, ids, mx.ones(ids.shape), first_position=6))
    left = mx.pad(ids, [(0, 0), (6, 0)], constant_values=3)
    mask = mx.pad(mx.ones(ids.shape), [(0, 0), (6, 0)])
    both = mx.concatenate([left, mx.zeros_like(left)])  # and a prompt that is nothing but padding
    padded = list(all_hidden_states(tiny, both, mx.concatenate([mask, mx.zeros_like(mask)])))
    for a, p in zip(alone, padded, strict=True):
        assert np.isfinite(numpy(p)).all()
        np.testing.assert_allclose(numpy(p)[:1, 6:], numpy(a), rtol=1e-4, atol=1e-4)


def test_the_sliding_window_and_causality(tiny: Gemma) -> None:
    """With the one full layer out, a token reaches (window - 1) back per layer; nothing ever looks ahead."""
    ids = mx.array([[5 + i % 20 for i in range(40)]])
    window = tiny.config.sliding_window
    mask = mx.ones(ids.shape)

    def after_first_layer(tokens: mx.array) -> np.ndarray:
        states = all_hidden_states(tiny, tokens, mask)
        next(states)
        return numpy(next(states))[0]

    changed = mx.where(mx.arange(40) == 20, 33, ids)
    differs = np.abs(after_first_layer(ids) - after_first_layer(changed)).max(axis=-1) > 0
    assert np.flatnonzero(differs).tolist() == list(range(20, 20 + window))


def test_only_the_last_state_is_normalised(tiny: Gemma) -> None:
    states = list(all_hidden_states(tiny, mx.array([[5, 6, 7]]), mx.ones((1, 3))))
    assert len(states) == tiny.config.hidden_states
    power = [((numpy(s) / (1 + numpy(tiny.norm.weight))) ** 2).mean(axis=-1) for s in states]
    np.testing.assert_allclose(power[-1], 1.0, rtol=1e-3)
    assert all(np.abs(p - 1).max() > 0.01 for p in power[:-1])


def test_bfloat16_stays(tiny: Gemma) -> None:
    config = tiny.config
    model = Gemma(config)
    model.update(tree_map(lambda p: p.astype(mx.bfloat16), tiny.parameters()))
    states = list(all_hidden_states(model, mx.array([[5, 6, 7]]), mx.ones((1, 3))))
    assert {state.dtype for state in states} == {mx.bfloat16}
    reference = list(all_hidden_states(tiny, mx.array([[5, 6, 7]]), mx.ones((1, 3))))
    error = np.linalg.norm(numpy(states[-1]) - numpy(reference[-1])) / np.linalg.norm(numpy(reference[-1]))
    assert error < 0.05


def test_norm_adds_one_in_float32() -> None:
    norm = GemmaNorm(64, 1e-6)
    norm.weight = mx.full((64,), 3 / 256, dtype=mx.bfloat16)  # 1 + 3/256 needs more than bfloat16's 8 bits
    mx.random.seed(0)
    x = mx.random.normal((1, 64)).astype(mx.bfloat16)
    exact = mx.fast.rms_norm(x.astype(mx.float32), 1 + norm.weight.astype(mx.float32), 1e-6).astype(mx.bfloat16)
    rounded = mx.fast.rms_norm(x, 1 + norm.weight, 1e-6)
    assert norm(x).dtype == mx.bfloat16
    assert numpy(norm(x)).tolist() == numpy(exact).tolist() != numpy(rounded).tolist()
