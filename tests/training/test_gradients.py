"""The gradients of small transformers are the reference's."""

import pytest

import parity.training  # noqa: F401 (registers its runner)


@pytest.mark.parametrize("layout", ["19b", "23", "25"])
def test_gradients_are_the_references(compare_golden, layout):
    compared = compare_golden(f"training_gradients_{layout}")
    assert len(compared) > 500  # every parameter, and both losses
    worst = max(compared, key=lambda each: each.error)
    assert worst.error <= 1e-4, (worst.tensor, worst.error)
