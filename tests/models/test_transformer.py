"""The transformer: parity with the reference, full-size keys, and what must not change a result."""

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import parity.transformer
from mlx_ltx.checkpoints.components import load_transformer
from mlx_ltx.checkpoints.keymaps import TRANSFORMER
from mlx_ltx.checkpoints.loading import published_shapes
from mlx_ltx.models.attention import Attention, FeedForward
from mlx_ltx.models.passes import Perturbation
from mlx_ltx.models.transformer import Transformer
from mlx_ltx.models.transformer_config import TransformerConfig
from parity import GoldenSet

GOLDEN = Path(__file__).parents[1] / "golden"
SETS = [
    "transformer_19b",
    "transformer_19b_interleaved_f32",
    "transformer_23",
    "transformer_23_single_modality",
    "transformer_25",
    "transformer_noprompt_adaln",
]
CONFIGS = json.loads((GOLDEN / "real_configs.json").read_text())


@pytest.mark.parametrize("name", SETS)
def test_parity(name, compare_golden):
    """Measured: at most 5e-6, in the timestep embeddings (angles of 1000 radians in float32)."""
    for result in compare_golden(name):
        assert result.error < 1e-5, f"{result.case} {result.tensor}"


@pytest.mark.parametrize("generation", ["19b", "2.3", "2.5"])
def test_full_size_keys_and_shapes(generation):
    lines = (GOLDEN / "keys" / f"{generation}_transformer.txt").read_text().splitlines()
    published = dict(line.split("\t") for line in lines if not line.startswith("#"))
    paths = TRANSFORMER.select(published)
    expected = published_shapes(Transformer(TransformerConfig.from_metadata(CONFIGS[generation])))
    assert paths.keys() == expected.keys()
    assert {key: json.loads(published[key]) for key in paths.values()} == {
        key: list(expected[path]) for path, key in paths.items()
    }
    assert len(paths) == len([key for key in published if "embeddings_connector" not in key])


@pytest.mark.parametrize(
    ("key", "value"),
    [("rope_type", "spiral"), ("qk_norm", "layer_norm"), ("share_ff", True), ("audio_num_attention_heads", 16)],
)
def test_unsupported_config_is_refused(key, value):
    config = {"transformer": {**CONFIGS["2.3"]["transformer"], key: value}}
    with pytest.raises(ValueError, match=r"not supported|same number"):
        TransformerConfig.from_metadata(config)


@pytest.fixture(scope="module")
def golden():
    return GoldenSet(GOLDEN, "transformer_23")


@pytest.fixture(scope="module")
def model(golden):
    return load_transformer(golden.checkpoint(), mx.float32)


def inputs(model, golden, case="plain"):
    return parity.transformer.stream_inputs(model, golden, case)


def relative(a, b):
    return float(mx.linalg.norm((a - b).astype(mx.float32)) / mx.linalg.norm(b.astype(mx.float32)))


@pytest.mark.parametrize("name", SETS)
def test_activations_stay_bfloat16(name, monkeypatch):
    """Float32 tables, norms and noise levels must not promote activations (pitfall 16), in any recorded case."""
    golden = GoldenSet(GOLDEN, name)
    single = name.endswith("single_modality")
    checkpoint = golden.checkpoint("transformer_23" if single else None)
    model = load_transformer(checkpoint, mx.bfloat16)
    seen = {}

    def watch(owner, method):
        original = getattr(owner, method)

        def watched(*given, **options):
            result = original(*given, **options)
            arrays = [array for _, array in tree_flatten([given, result]) if isinstance(array, mx.array)]
            seen.setdefault(method, set()).update(array.dtype for array in arrays)
            return result

        monkeypatch.setattr(owner, method, watched)

    for owner, method in (
        (mx.fast, "scaled_dot_product_attention"),
        (mx.fast, "rms_norm"),
        (mx.fast, "layer_norm"),
        (Attention, "_output"),
        (FeedForward, "__call__"),
    ):
        watch(owner, method)
    for case in parity.transformer.case_names(golden):
        video, audio = inputs(model, golden, case)
        batch = (video or audio).latent.shape[0]
        perturbed = parity.transformer.perturbations(golden, case, batch)
        steps = model.forward(video, audio, perturbed)
        while True:
            try:
                assert {x.dtype for x in next(steps)} == {mx.bfloat16}
            except StopIteration as end:
                velocities = [velocity for velocity in end.value if velocity is not None]
                break
        assert {velocity.dtype for velocity in velocities} == {mx.bfloat16}
    assert set(seen) == {"scaled_dot_product_attention", "rms_norm", "layer_norm", "_output", "__call__"}
    assert all(dtypes == {mx.bfloat16} for dtypes in seen.values()), seen


def test_bfloat16_is_close_to_float32(golden, model):
    narrow = load_transformer(golden.checkpoint(), mx.bfloat16)
    given = inputs(model, golden, "per_token")
    assert relative(narrow(*given).video, model(*given).video) < 0.05


def test_levels_of_tokens_equal_one_timestep_each(model, golden):
    """Modulation per distinct noise level gives what modulation per token gives."""
    per_token = inputs(model, golden, "per_token")
    by_level = []
    for given in per_token:
        values, index = np.unique(np.array(given.timesteps), return_inverse=True)
        assert len(values) > 1
        by_level.append(
            replace(
                given,
                timesteps=mx.array(values)[None],
                level_of_token=mx.array(index.reshape(given.timesteps.shape).astype(np.int32)),
            )
        )
    expected, actual = model(*per_token), model(*by_level)
    assert relative(actual.video, expected.video) < 1e-6
    assert relative(actual.audio, expected.audio) < 1e-6


def test_a_frozen_stream_only_serves_the_other(model, golden):
    """A stream that is skipped keeps its tokens; the other one still attends to it."""
    video, audio = inputs(model, golden)
    blocks = list(model.forward(video, replace(audio, frozen=True)))
    assert mx.array_equal(blocks[0][1], blocks[-1][1])
    with_audio = model(video, replace(audio, frozen=True)).video
    assert relative(with_audio, model(video, None).video) > 1e-3


def test_perturbation_starts_at_its_block(model, golden):
    """Up to the perturbed block both passes are the same; from there on they differ."""
    video, audio = inputs(model, golden)
    plain = list(model.forward(video, audio))
    perturbed = list(model.forward(video, audio, [Perturbation(frozenset({1}), frozenset())]))
    assert mx.array_equal(plain[0][0], perturbed[0][0])
    assert relative(perturbed[1][0], plain[1][0]) > 1e-4


def test_isolation_makes_the_other_stream_irrelevant(model, golden):
    video, audio = inputs(model, golden)
    other = replace(audio, latent=audio.latent + 1)
    isolated = [Perturbation(isolated=True)]
    assert mx.array_equal(model(video, audio, isolated).video, model(video, other, isolated).video)
    assert relative(model(video, other).video, model(video, audio).video) > 1e-5


def test_no_stream_is_an_error(model):
    with pytest.raises(ValueError, match="at least one stream"):
        list(model.forward(None, None))


def test_a_model_without_audio_has_no_audio_parameters(golden):
    model = load_transformer(golden.checkpoint(), mx.float32, audio=False)
    names = {name for name, _ in model.named_modules()}
    assert not any(part in name for name in names for part in ("audio", "cross"))
