"""Where denoising evaluates."""

import pytest

from mlx_ltx.sampling.evaluation import EvaluationPolicy


def test_every_so_many_blocks_and_after_the_last():
    assert [done for done in range(1, 8) if EvaluationPolicy(3).due(done, 7)] == [3, 6, 7]
    assert all(EvaluationPolicy().due(done, 5) for done in range(1, 6))


@pytest.mark.parametrize("numbers", [(0, 1), (1, -1)])
def test_impossible_numbers_are_refused(numbers):
    with pytest.raises(ValueError, match="evaluation policy"):
        EvaluationPolicy(*numbers)
