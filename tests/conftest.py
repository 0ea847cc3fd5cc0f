"""What all tests share."""

from pathlib import Path

import pytest
from hypothesis import settings

from parity import Comparison, GoldenSet, runner_for

# The first call of anything in MLX compiles or loads something: no deadlines. The same examples on every machine.
settings.register_profile("mlx_ltx", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("mlx_ltx")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def compare_golden():
    """Run the parity runner of a recorded set; gives its comparisons."""

    def compare(name: str) -> list[Comparison]:
        run = runner_for(name)
        assert run is not None, f"no runner for {name}"
        compared = [result for result in run(GoldenSet(GOLDEN, name)) if isinstance(result, Comparison)]
        assert compared, f"the runner of {name} compared nothing"
        return compared

    return compare
