"""Gemma 3 as a writer: the reference's next tokens, and the same numbers as without keeping keys and values."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

import parity.enhance
from mlx_ltx.checkpoints.gemma import load_gemma
from mlx_ltx.models.gemma import Gemma, all_hidden_states
from mlx_ltx.models.gemma_generate import Continuation, ImageTokens, ReadStep
from parity import runner_for
from parity.text import finish

GOLDEN = Path(__file__).parents[1] / "golden"
IDS = mx.array([[2, *(4 + 7 * i % 40 for i in range(29))]])


@pytest.fixture(scope="module")
def tiny() -> Gemma:
    return load_gemma(GOLDEN / "gemma3_tiny", mx.float32).model


def recomputed(model: Gemma, ids: mx.array, mask: mx.array) -> np.ndarray:
    """Logits of every place, from the hidden states that the text encoder uses."""
    *_, last = all_hidden_states(model, ids, mask)
    return np.array(model.embed_tokens.as_linear(last))[0]


def test_what_is_written_equals_the_reference_with_and_without_an_image(compare_golden) -> None:
    assert runner_for("gemma3_generate") is parity.enhance.run_generate
    compared = compare_golden("gemma3_generate")
    assert {(c.case, c.tensor) for c in compared} == {("text", "logits"), ("image", "logits")}
    assert [f"{c.case}: {c.error:.1e}" for c in compared if not c.error <= 1e-5] == []


@pytest.mark.parametrize("read", [1, 5, 12, 20, 29])
def test_token_by_token_gives_the_numbers_of_reading_everything_again(tiny: Gemma, read: int) -> None:
    """Also beyond the sliding window (12), from a beginning shorter or longer than it."""
    text = Continuation(tiny, IDS.shape[1])
    logits = [finish(text.read(IDS[:, :read]))]
    logits += [text.step(IDS[0, place : place + 1]) for place in range(read, IDS.shape[1])]
    expected = recomputed(tiny, IDS, mx.ones(IDS.shape))
    np.testing.assert_allclose(np.array(mx.concatenate(logits)), expected[read - 1 :], rtol=1e-4, atol=1e-5)


def test_padding_on_the_left_would_change_nothing(tiny: Gemma) -> None:
    padding = [(0, 0), (3, 0)]
    padded = recomputed(tiny, mx.pad(IDS, padding), mx.pad(mx.ones(IDS.shape), padding))
    np.testing.assert_allclose(np.array(finish(Continuation(tiny, 30).read(IDS))), padded[-1:], rtol=1e-4, atol=1e-5)


def test_the_image_is_read_and_its_tokens_see_each_other(tiny: Gemma) -> None:
    features = mx.random.normal((1, 4, tiny.config.hidden_size), key=mx.random.key(0))
    with_image = np.array(finish(Continuation(tiny, 30).read(IDS, ImageTokens(features, 10))))
    swapped = np.array(finish(Continuation(tiny, 30).read(IDS, ImageTokens(features[:, ::-1], 10))))
    without = np.array(finish(Continuation(tiny, 30).read(IDS)))
    assert np.abs(with_image - without).max() > 1e-3
    assert np.abs(with_image - swapped).max() > 1e-5
    # what the embeddings themselves would give as an "image" differs by the mask alone
    own = tiny.embed(IDS[:, 10:14])
    bidirectional = np.array(finish(Continuation(tiny, 30).read(IDS, ImageTokens(own, 10))))
    assert np.abs(bidirectional - without).max() > 1e-6
    single = np.array(finish(Continuation(tiny, 30).read(IDS, ImageTokens(own[:, :1], 10))))
    np.testing.assert_allclose(single, without, rtol=1e-5, atol=1e-6)


def test_reading_reports_every_layer(tiny: Gemma) -> None:
    layers = tiny.config.num_hidden_layers
    assert list(Continuation(tiny, 3).read(IDS[:, :3])) == [ReadStep(done, layers) for done in range(1, layers + 1)]


def test_bfloat16_stays(tiny: Gemma) -> None:
    model = Gemma(tiny.config)
    model.update(tree_map(lambda p: p.astype(mx.bfloat16), tiny.parameters()))
    text = Continuation(model, 5)
    image = ImageTokens(mx.ones((1, 2, tiny.config.hidden_size)), 0)
    assert finish(text.read(IDS[:, :4], image)).dtype == mx.bfloat16
    assert text.step(IDS[0, :1]).dtype == mx.bfloat16


def test_misuse_is_refused(tiny: Gemma) -> None:
    with pytest.raises(ValueError, match="begins once"):
        finish(Continuation(tiny, 5).read(mx.zeros((1, 0), dtype=mx.int32)))
    with pytest.raises(ValueError, match="begins once"):
        finish(Continuation(tiny, 5).read(mx.zeros((2, 3), dtype=mx.int32)))
    with pytest.raises(ValueError, match="first"):
        Continuation(tiny, 5).step(mx.array([4]))
    with pytest.raises(ValueError, match="not all among"):
        finish(Continuation(tiny, 5).read(IDS[:, :4], ImageTokens(mx.zeros((1, 3, tiny.config.hidden_size)), 2)))
    text = Continuation(tiny, 3)
    finish(text.read(IDS[:, :3]))
    with pytest.raises(ValueError, match="begins once"):
        finish(text.read(IDS[:, :3]))
    with pytest.raises(ValueError, match="room for 3"):
        text.step(mx.array([4]))
