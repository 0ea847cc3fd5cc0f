"""The gradients of a small transformer are the reference's."""

import parity.training  # noqa: F401 (registers its runner)


def test_gradients_are_the_references(compare_golden):
    compared = compare_golden("training_gradients_23")
    assert len(compared) > 600  # every parameter, and both losses
    worst = max(compared, key=lambda each: each.error)
    assert worst.error <= 1e-4, (worst.tensor, worst.error)
