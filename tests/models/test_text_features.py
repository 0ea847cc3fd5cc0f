"""Feature extractors of both generations: parity, published sizes, norms against NumPy, refusals."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_ltx.checkpoints.keymaps import TEXT_PROJECTION
from mlx_ltx.checkpoints.loading import published_shapes
from mlx_ltx.models import text_features
from mlx_ltx.models.text_features import FeatureConfig, FeatureExtractor, normalise_over_prompt

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIGS: dict[str, Any] = json.loads((GOLDEN / "real_configs.json").read_text())
FIRST = FeatureConfig(8, 3, 8, None, False)
SECOND = FeatureConfig(8, 3, 12, 6, True)


def random_extractor(config: FeatureConfig) -> FeatureExtractor:
    mx.random.seed(0)
    extractor = FeatureExtractor(config)
    extractor.update(tree_map(lambda p: mx.random.normal(p.shape), extractor.parameters()))
    return extractor


def random_states(batch: int = 2, tokens: int = 5) -> list[mx.array]:
    mx.random.seed(1)
    return [mx.random.normal((batch, tokens, 8)) * 10**layer + layer for layer in range(3)]


@pytest.mark.parametrize("version", ["19b", "2.3", "2.5"])
def test_published_keys(version: str) -> None:
    lines = (GOLDEN / "keys" / f"{version}_text_embedding_projection.txt").read_text().splitlines()
    published = {key: tuple(json.loads(shape)) for key, _, shape in (x.partition("\t") for x in lines if x[0] != "#")}
    module = FeatureExtractor(FeatureConfig.from_metadata(CONFIGS[version], 3840, 49))
    expected = {path: published[key] for path, key in TEXT_PROJECTION.select(published).items()}
    assert len(expected) == len(published)
    assert published_shapes(module) == expected


def test_first_generation_against_the_formula() -> None:
    extractor, states = random_extractor(FIRST), random_states()
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    features = extractor(states, mx.array(mask))
    weight = np.array(extractor.aggregate_embed.weight, np.float64).reshape(8, 8, 3)
    expected = np.zeros((2, 5, 8))
    for b in range(2):
        valid = mask[b].astype(bool)
        for layer, state in enumerate(states):
            x = np.array(state, np.float64)[b][valid]
            x = 8 * (x - x.mean()) / (x.max() - x.min() + 1e-6)
            expected[b][valid] += x @ weight[:, :, layer].T
    np.testing.assert_allclose(np.array(features.video), expected, rtol=1e-4, atol=1e-4)
    assert features.audio is features.video


def test_second_generation_against_the_formula() -> None:
    extractor, states = random_extractor(SECOND), random_states()
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    features = extractor(states, mx.array(mask))
    for ours, layer_, dim in (
        (features.video, extractor.video_aggregate_embed, 12),
        (features.audio, extractor.audio_aggregate_embed, 6),
    ):
        weight = np.array(layer_.weight, np.float64).reshape(dim, 8, 3)
        expected = np.zeros((2, 5, dim)) + np.array(layer_.bias, np.float64)
        for layer, state in enumerate(states):
            x = np.array(state, np.float64)
            x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * np.sqrt(dim / 8) * mask[..., None]
            expected += x @ weight[:, :, layer].T
        np.testing.assert_allclose(np.array(ours), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [FIRST, SECOND])
def test_a_prompt_does_not_depend_on_the_batch_or_its_padding(config: FeatureConfig) -> None:
    extractor, states = random_extractor(config), random_states()
    mask = mx.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    together = extractor(states, mask)
    alone = extractor([state[:1, 2:] for state in states], mx.ones((1, 3)))
    for a, t in zip(alone, together, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(t)[:1, 2:], rtol=1e-5, atol=1e-5)


def test_rows_in_slices_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    extractor, states = random_extractor(SECOND), random_states()
    whole = extractor(states, mx.ones((2, 5)))
    monkeypatch.setattr(text_features, "ROWS_AT_ONCE", 5)
    sliced = extractor(states, mx.ones((2, 5)))
    for w, s in zip(whole, sliced, strict=True):
        np.testing.assert_allclose(np.array(w), np.array(s), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [FIRST, SECOND])
def test_bfloat16_weights_are_used_in_float32(config: FeatureConfig) -> None:
    extractor = random_extractor(config)
    rounded = tree_map(lambda p: p.astype(mx.bfloat16), extractor.parameters())
    exact = FeatureExtractor(config)
    exact.update(tree_map(lambda p: p.astype(mx.float32), rounded))
    extractor.update(rounded)
    states = [state.astype(mx.bfloat16) for state in random_states()]
    ours, expected = extractor(states, mx.ones((2, 5))), exact(states, mx.ones((2, 5)))
    assert ours.video.dtype == ours.audio.dtype == mx.float32
    assert {p.dtype for _, p in tree_flatten(extractor.parameters())} == {mx.bfloat16}
    np.testing.assert_array_equal(np.array(ours.video), np.array(expected.video))


def test_constant_states_stay_finite() -> None:
    result = normalise_over_prompt(mx.full((1, 2, 8), 5.0), mx.array([[[False], [True]]]))
    assert np.isfinite(np.array(result)).all()


def test_wrong_states_are_refused() -> None:
    extractor = random_extractor(FIRST)
    with pytest.raises(ValueError, match="2 hidden states"):
        extractor(random_states()[:2], mx.ones((2, 5)))
    with pytest.raises(ValueError, match="width 8"):
        extractor([mx.zeros((1, 2, 7))] * 3, mx.ones((1, 2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption_proj_before_connector": False}, "caption_proj_before_connector is False"),
        ({"caption_proj_input_norm": True}, "caption_proj_input_norm is True"),
        ({"caption_projection_first_linear": None}, "caption_projection_first_linear is None"),
    ],
)
def test_unsupported_projections_are_refused(change: dict[str, object], message: str) -> None:
    config = {"transformer": {**CONFIGS["2.3"]["transformer"], **change}}
    with pytest.raises(ValueError, match=message):
        FeatureConfig.from_metadata(config, 3840, 49)


def test_half_given_settings_are_refused() -> None:
    config = {"transformer": {**CONFIGS["19b"]["transformer"], "caption_proj_before_connector": True}}
    with pytest.raises(ValueError, match="is absent"):
        FeatureConfig.from_metadata(config, 3840, 49)
