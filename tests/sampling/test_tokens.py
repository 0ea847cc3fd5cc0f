"""Drawing tokens: what can be drawn, how often, and that a text is its seed's."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_ltx.checkpoints.gemma import load_gemma
from mlx_ltx.models.gemma import Gemma
from mlx_ltx.models.gemma_generate import ReadStep
from mlx_ltx.sampling.tokens import TokenSampling, draw_token, write_tokens

GOLDEN = Path(__file__).parents[1] / "golden"
LOGITS = mx.log(mx.array([[0.05, 0.4, 0.25, 0.2, 0.1]]))
HOT = TokenSampling(temperature=1.5)
IDS = [2, 4, 6, 8]


@pytest.fixture(scope="module")
def tiny() -> Gemma:
    return load_gemma(GOLDEN / "gemma3_tiny", mx.float32).model


def frequencies(sampling: TokenSampling, draws: int = 2000) -> np.ndarray:
    keys = mx.random.split(mx.random.key(1), draws)
    drawn = mx.concatenate([draw_token(LOGITS, sampling, key) for key in keys])
    return np.bincount(np.array(drawn), minlength=LOGITS.shape[1]) / draws


def written(model: Gemma, seed: int = 0, stop: tuple[int, ...] = (), limit: int = 24, **settings: object) -> list[int]:
    steps = write_tokens(model, IDS, stop=stop, limit=limit, seed=seed, **settings)
    return [step for step in steps if not isinstance(step, ReadStep)]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (TokenSampling(1.0, 64, 1.0), [0.05, 0.4, 0.25, 0.2, 0.1]),
        (TokenSampling(0.5, 64, 1.0), np.array([0.05, 0.4, 0.25, 0.2, 0.1]) ** 2 / 0.275),
        (TokenSampling(1.0, 2, 1.0), [0, 0.4 / 0.65, 0.25 / 0.65, 0, 0]),
        (TokenSampling(1.0, 64, 0.5), [0, 0.4 / 0.65, 0.25 / 0.65, 0, 0]),  # the one that reaches 0.5 is in
        (TokenSampling(1.0, 64, 0.0), [0, 1, 0, 0, 0]),
        (TokenSampling(1.0, 1, 1.0), [0, 1, 0, 0, 0]),
        (TokenSampling(0.0), [0, 1, 0, 0, 0]),
        # top-p is counted within what top-k left: 0.4 / 0.65 = 0.615 reaches 0.6 alone
        (TokenSampling(1.0, 2, 0.6), [0, 1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should(sampling: TokenSampling, expected: list[float]) -> None:
    found = frequencies(sampling)
    assert (found[np.array(expected) == 0] == 0).all()
    np.testing.assert_allclose(found, expected, atol=0.04)


def test_bfloat16_logits_are_drawn_from_in_float32() -> None:
    logits = mx.zeros((1, 300), dtype=mx.bfloat16)
    drawn = {
        int(draw_token(logits, TokenSampling(1.0, 300, 0.9), key)) for key in mx.random.split(mx.random.key(0), 400)
    }
    assert 200 < len(drawn) <= 270  # in bfloat16 the sum of probabilities would stop growing


def test_a_seed_writes_one_text(tiny: Gemma) -> None:
    first = written(tiny, seed=3, sampling=HOT)
    mx.random.seed(99)  # the global generator has no say
    assert written(tiny, seed=3, sampling=HOT) == first
    assert len(first) == 24
    assert written(tiny, seed=4, sampling=HOT) != first


def test_the_limit_does_not_change_what_is_written_before_it(tiny: Gemma) -> None:
    long = written(tiny, limit=20, sampling=HOT)
    assert written(tiny, limit=7, sampling=HOT) == long[:7]
    assert written(tiny, limit=1, sampling=HOT) == long[:1]


def test_a_stop_token_ends_the_text_and_is_not_given_out(tiny: Gemma) -> None:
    text = written(tiny, sampling=HOT)
    stop = text[5]
    assert written(tiny, stop=(stop, 9999), sampling=HOT) == text[: text.index(stop)]


def test_without_temperature_the_likeliest_is_taken(tiny: Gemma) -> None:
    assert written(tiny, seed=1, sampling=TokenSampling(0)) == written(tiny, seed=2, sampling=TokenSampling(0))


def test_nothing_runs_before_it_is_asked_for(tiny: Gemma) -> None:
    steps = write_tokens(tiny, IDS, stop=(), limit=4, seed=0)
    assert next(steps) == ReadStep(1, tiny.config.num_hidden_layers)
    steps.close()  # cancelling
