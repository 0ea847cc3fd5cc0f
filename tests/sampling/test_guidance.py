"""What steers a prediction: formulas at parity, and what they promise."""

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import parity.sampling
from mlx_ltx.sampling.guidance import (
    Apg,
    CfgStar,
    Guidance,
    GuidanceBySigma,
    GuidanceParams,
    Momentum,
    Pass,
    projection,
)

CONDITIONAL, NEGATIVE = (mx.random.normal((1, 5, 4), key=mx.random.key(seed)) for seed in (0, 1))
PASSES = {Pass.CONDITIONAL: CONDITIONAL, Pass.NEGATIVE: NEGATIVE}


def test_parity(compare_golden):
    """Measured: at most 5e-7 (steps and guiders)."""
    results = compare_golden("steps_guiders")
    assert {result.tensor.split(".")[0] for result in results} >= {
        "guider",
        "multimodal",
        "ancestral",
        "cfgpp",
        "res2s",
    }
    assert {"factory_cfg_by_sigma", "skip_step2"} <= {result.case for result in results}
    for result in results:
        assert result.error < 2e-6, result.tensor


def test_passes_are_only_those_needed():
    assert list(Guidance().passes()) == [Pass.CONDITIONAL]
    assert list(Guidance(always_negative=True).passes()) == [Pass.CONDITIONAL, Pass.NEGATIVE]
    assert list(Guidance(audio=GuidanceParams(cfg_scale=7)).passes()) == [Pass.CONDITIONAL, Pass.NEGATIVE]
    perturbed = Guidance(GuidanceParams(stg_scale=1, stg_blocks=(2,)), GuidanceParams()).passes()[Pass.PERTURBED]
    assert (perturbed.video_blocks, perturbed.audio_blocks) == (frozenset({2}), frozenset())


def test_guidance_pushes_away_from_the_negative():
    conditional, negative = mx.ones((1, 2, 2)), mx.zeros((1, 2, 2))
    guided = GuidanceParams(cfg_scale=3).combine({Pass.CONDITIONAL: conditional, Pass.NEGATIVE: negative})
    assert mx.array_equal(guided, 3 * conditional)
    assert parity.sampling.guider_params("cfg_scale=3.0, stg_scale=1.0, rescale_scale=0.7, modality_scale=3.0").rescale


def test_a_negative_pass_that_guidance_does_not_use_changes_nothing():
    for rule in (CfgStar(), Apg(momentum=0.5)):
        assert mx.array_equal(GuidanceParams(cfg_scale=1.0, cfg_rule=rule).combine(PASSES), CONDITIONAL)


@given(scale=st.floats(1.5, 8))
def test_apg_without_its_settings_is_plain(scale):
    plain = GuidanceParams(cfg_scale=scale).combine(PASSES)
    assert mx.allclose(GuidanceParams(cfg_scale=scale, cfg_rule=Apg()).combine(PASSES), plain, atol=1e-4)


@given(threshold=st.floats(0.1, 20), eta=st.floats(0, 1))
def test_apg_shortens_the_difference_and_its_parallel_part(threshold, eta):
    direction = Apg(eta, threshold).direction(CONDITIONAL, NEGATIVE, Momentum())
    assert mx.linalg.norm(direction).item() <= threshold * 1.0001
    parallel = projection(direction, CONDITIONAL).item()
    whole = projection(Apg(1.0, threshold).direction(CONDITIONAL, NEGATIVE, Momentum()), CONDITIONAL).item()
    assert parallel == pytest.approx(eta * whole, abs=1e-4)


def test_momentum_adds_up_over_a_run_and_starts_anew_without_one():
    params, momentum = GuidanceParams(cfg_scale=2, cfg_rule=Apg(momentum=0.5)), Momentum()
    first, second = (params.combine(PASSES, momentum) - CONDITIONAL for _ in range(2))
    assert mx.allclose(second, 1.5 * first, atol=1e-5)
    assert mx.allclose(params.combine(PASSES) - CONDITIONAL, first, atol=1e-5)


@given(factor=st.floats(0.1, 10))
def test_cfg_star_ignores_the_length_of_the_negative(factor):
    rule = CfgStar()
    same = rule.direction(CONDITIONAL, NEGATIVE, Momentum())
    assert mx.allclose(rule.direction(CONDITIONAL, factor * NEGATIVE, Momentum()), same, atol=1e-4)
    assert mx.sum(same * NEGATIVE).item() == pytest.approx(0, abs=1e-4)


def test_projections_are_per_sample():
    twice = mx.concatenate([CONDITIONAL, 3 * CONDITIONAL])
    assert projection(twice, mx.concatenate([CONDITIONAL, CONDITIONAL])).reshape(-1).tolist() == pytest.approx([1, 3])


def test_bins_hold_down_to_the_next_and_the_highest_also_above():
    low, high = Guidance(GuidanceParams(cfg_scale=2)), Guidance(GuidanceParams(cfg_scale=5))
    for bins in (((0.5, low), (0.9, high)), ((0.9, high), (0.5, low))):
        guidance = GuidanceBySigma(bins)
        assert [guidance.at(sigma) for sigma in (1.0, 0.9, 0.51)] == [high] * 3
        assert [guidance.at(sigma) for sigma in (0.5, 0.1, 0.0)] == [low] * 3


@pytest.mark.parametrize("bins", [(), ((0.5, Guidance()), (0.5, Guidance(always_negative=True)))])
def test_bins_without_meaning_are_an_error(bins):
    with pytest.raises(ValueError, match="bins of different sigmas"):
        GuidanceBySigma(bins)
