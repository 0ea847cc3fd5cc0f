"""Noise schedules against the reference's numbers, and where they have no meaning."""

import numpy as np
import pytest

import parity.sampling  # noqa: F401  (registers the runners)
from mlx_ltx.sampling.schedules import (
    DISTILLED,
    REFINEMENT,
    beta_schedule,
    linear_quadratic_schedule,
    ltx2_schedule,
)


def test_parity(compare_golden):
    """Measured: at most 2e-6."""
    for result in compare_golden("schedules"):
        assert result.error < 5e-6, result.tensor


def test_distilled_is_linear_quadratic_with_eight_steps():
    assert np.allclose(linear_quadratic_schedule(8), DISTILLED, atol=1e-7)
    assert set(REFINEMENT) <= set(DISTILLED)


@pytest.mark.parametrize("schedule", [ltx2_schedule, linear_quadratic_schedule, beta_schedule])
@pytest.mark.parametrize("steps", [2, 3, 8, 40])
def test_every_schedule_falls_from_one_to_zero(schedule, steps):
    sigmas = schedule(steps)
    assert sigmas.dtype == np.float32
    assert sigmas[0] == pytest.approx(1, abs=1e-6)
    assert sigmas[-1] == 0
    assert (np.diff(sigmas) < 0).all()


@pytest.mark.parametrize("schedule", [ltx2_schedule, linear_quadratic_schedule, beta_schedule])
def test_no_steps_are_an_error(schedule):
    with pytest.raises(ValueError, match="at least one step"):
        schedule(0)


def test_too_many_tokens_are_an_error_instead_of_nan():
    with pytest.raises(ValueError, match="degenerates at 200000 tokens"):
        ltx2_schedule(8, tokens=200_000)
