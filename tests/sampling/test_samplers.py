"""Samplers: parity on a toy model, and what their arithmetic promises."""

import itertools
import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import parity.sampling  # noqa: F401  (registers the runners)
from mlx_ltx.events import Progress, StepDone
from mlx_ltx.sampling.denoise import Grids, denoise
from mlx_ltx.sampling.noise import Noise
from mlx_ltx.sampling.res2s import Res2s, normalised, refined_anchor, res2s_coefficients, sde_step
from mlx_ltx.sampling.samplers import (
    Euler,
    EulerAncestral,
    EulerCfgPlusPlus,
    GradientEstimating,
    Prediction,
    Step,
    euler_step,
)
from mlx_ltx.sampling.schedules import DISTILLED, ltx2_schedule
from mlx_ltx.sampling.state import Latents, LatentState, States

SAMPLERS = {
    "euler": Euler,
    "gradient": GradientEstimating,
    "ancestral": lambda: EulerAncestral.seeded(1),
    "cfg++": lambda: EulerCfgPlusPlus.seeded(1),
    "res2s": Res2s.seeded,
    "res2s per token": lambda: Res2s(Noise(1), Noise(2), per_token=True),
}
SIGMAS = st.tuples(st.floats(0.05, 1), st.floats(0.02, 0.99)).filter(lambda pair: pair[0] > pair[1] + 1e-3)


def test_parity(compare_golden):
    """Measured: at most 6e-7, where the reference computes in float64."""
    results = compare_golden("samplers")
    assert len({result.case for result in results}) == 8
    for result in results:
        assert result.error < 2e-6, f"{result.case} {result.tensor}"


def state(seed, mask, tokens=6, channels=4):
    latent, clean = (mx.random.normal((1, tokens, channels), key=mx.random.key(seed + i)) for i in range(2))
    return LatentState(latent, clean, np.array(mask, np.float32), np.zeros((1, 1, tokens, 2), np.float32))


class Perfect:
    """Always predicts the same, and counts."""

    def __init__(self, x0: Latents):
        self.x0, self.asked = x0, []

    def predict(self, states, sigma, step):
        self.asked.append((sigma, step))
        yield 0.5
        yield 1.0
        return Prediction(self.x0, self.x0)


def run(sampler, sigmas, states, model):
    """All events, and the states at the end."""
    events = []
    loop = denoise(model, states, sigmas, Grids(None, None), "denoise", sampler)
    while True:
        try:
            events.append(next(loop))
        except StopIteration as end:
            return events, end.value


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("audio", [True, False])
def test_every_sampler_ends_at_a_prediction_that_never_changes(name, audio):
    states = States(state(0, [1.0] * 6), state(5, [1.0] * 3, tokens=3) if audio else None)
    x0 = Latents(mx.full((1, 6, 4), 0.5), mx.full((1, 3, 4), -1.0) if audio else None)
    model = Perfect(x0)
    events, final = run(SAMPLERS[name](), DISTILLED, states, model)
    assert mx.allclose(final.video.latent, x0.video, atol=1e-4)
    assert (final.audio is None) if not audio else mx.allclose(final.audio.latent, x0.audio, atol=1e-4)
    steps = [event for event in events if isinstance(event, StepDone)]
    progress = [event.done for event in events if isinstance(event, Progress)]
    assert [(step.step, step.total) for step in steps] == [(i, 8) for i in range(1, 9)]
    assert progress == sorted(progress)
    assert progress[-1] == pytest.approx(8)
    sampler = SAMPLERS[name]()
    pairs = itertools.pairwise(DISTILLED)
    assert len(model.asked) == sum(sampler.evaluations(Step(0, *pair)) for pair in pairs)
    assert len(progress) == 2 * len(model.asked)


@pytest.mark.parametrize("name", SAMPLERS)
def test_given_tokens_stay_at_every_step(name):
    mask = [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    states = States(state(0, mask), None)
    states = States(states.video.noised(states.video.latent), None)
    seen = []

    class Watching(Perfect):
        def predict(self, states, sigma, step):
            seen.append(states.video.latent[:, :2])
            return super().predict(states, sigma, step)

    model = Watching(Latents(mx.zeros((1, 6, 4)), None))
    run(SAMPLERS[name](), ltx2_schedule(5), states, model)
    assert all(mx.allclose(latent, states.video.clean[:, :2], atol=1e-5) for latent in seen)


@pytest.mark.parametrize("name", ["ancestral", "cfg++", "res2s"])
def test_noise_repeats_with_its_seed_only(name):
    states, x0 = States(state(0, [1.0] * 6), None), Latents(mx.zeros((1, 6, 4)), None)
    made = {"ancestral": EulerAncestral, "cfg++": EulerCfgPlusPlus, "res2s": Res2s}[name]
    first, again, other = (
        run(made.seeded(seed), (1.0, 0.7, 0.4), states, Perfect(x0))[1].video.latent for seed in (3, 3, 4)
    )
    assert mx.array_equal(first, again)
    assert not mx.allclose(first, other, atol=1e-2)


def test_noise_within_a_run_is_not_the_initial_noise():
    shape = (1, 4, 4)
    drawn = [EulerAncestral.seeded(7).noise(shape), Res2s.seeded().noise(shape), Res2s.seeded().substep_noise(shape)]
    for noise in drawn:
        assert not mx.allclose(noise, Noise(7)(shape), atol=1e-2)
    assert not mx.allclose(drawn[1], drawn[2], atol=1e-2)


def test_the_sampler_for_gradients_without_its_factor_is_euler():
    rising = Latents(mx.ones((1, 6, 4)), None)
    states = States(state(0, [1.0] * 6), None)

    class Moving(Perfect):
        def predict(self, states, sigma, step):
            yield 1.0
            return Prediction(Latents(0.5 * states.video.latent + sigma, None), rising)

    def end(sampler):
        return run(sampler, DISTILLED, states, Moving(rising))[1].video.latent

    assert mx.allclose(end(GradientEstimating(gamma=1.0)), end(Euler()), atol=1e-5)
    assert not mx.allclose(end(GradientEstimating()), end(Euler()), atol=1e-2)


@given(sigmas=SIGMAS)
def test_without_noise_an_ancestral_step_is_euler(sigmas):
    latent, x0, noise = (mx.random.normal((1, 3, 2), key=mx.random.key(seed)) for seed in range(3))
    moved = EulerAncestral(lambda _: noise, eta=0.0).move(latent, x0, noise, *sigmas)
    assert mx.allclose(moved, euler_step(latent, x0, *sigmas), atol=1e-4)


@given(sigmas=SIGMAS, eta=st.floats(0.05, 1))
def test_new_noise_replaces_old_noise_and_no_signal(sigmas, eta):
    """On the straight line between signal and noise, a step with new noise stays at the next level's mix."""
    sigma, next_sigma = sigmas
    unit = [mx.array(row).reshape(1, 1, 3) for row in np.eye(3, dtype=np.float32)]  # signal, old noise, new noise
    start, latent = ((1 - s) * unit[0] + s * unit[1] for s in sigmas)
    stepped = {
        "ancestral": EulerAncestral(lambda _: unit[2], eta).move(start, unit[0], unit[2], sigma, next_sigma),
        "sde": sde_step(start, latent, np.array(sigma), np.array(next_sigma), unit[2], eta),
    }
    for name, result in stepped.items():
        signal, old, new = result.reshape(-1).tolist()
        assert signal == pytest.approx(1 - next_sigma, abs=1e-4), name
        assert math.hypot(old, new) == pytest.approx(next_sigma, abs=1e-4), name
        assert new > 0, name


# res_2s


def test_parity_of_coefficients(compare_golden):
    """Measured: at most 1e-15."""
    (result,) = (r for r in compare_golden("schedules") if r.tensor == "res2s_coefficients")
    assert result.error < 1e-12


@given(h=st.floats(1e-4, 5))
def test_coefficients_are_exact_for_a_prediction_that_never_changes(h):
    a21, b1, b2 = res2s_coefficients(h)
    assert h * a21 == pytest.approx(1 - math.exp(-h / 2), rel=1e-9)
    assert h * (b1 + b2) == pytest.approx(1 - math.exp(-h), rel=1e-9)


@given(share=st.floats(0.001, 0.25), times=st.integers(0, 12))
def test_the_refined_anchor_is_the_iteration_in_closed_form(share, times):
    start, halfway, x0 = (mx.random.normal((1, 3, 2), key=mx.random.key(seed)) for seed in range(3))
    iterated = start
    for _ in range(times):
        iterated = halfway - share * (x0 - iterated)
    assert mx.allclose(refined_anchor(start, halfway, x0, share, times), iterated, atol=1e-5)


def test_noise_is_normalised_per_sample():
    noise = normalised(3 + 2 * mx.random.normal((2, 5, 7), key=mx.random.key(0)))
    assert np.allclose(np.array(noise).mean(axis=(1, 2)), 0, atol=1e-6)
    assert np.allclose(np.array(noise).std(axis=(1, 2), ddof=1), 1, atol=1e-6)


def test_the_last_noise_goes_in_a_third_prediction():
    states, x0 = States(state(0, [1.0] * 6), None), Latents(mx.zeros((1, 6, 4)), None)
    model = Perfect(x0)
    run(Res2s.seeded(), (0.8, 0.2, 0.0), states, model)
    expected = [0.8, 0.4, 0.2, math.sqrt(0.2 * 0.0011), 0.0011]
    assert [sigma for sigma, _ in model.asked] == pytest.approx(expected)
    assert [index for _, index in model.asked] == [0, 0, 1, 0, 2]  # predictions halfway are never skipped
    model = Perfect(x0)
    run(Res2s.seeded(), (0.8, 0.2), states, model)
    assert len(model.asked) == 2


def test_fully_given_tokens_end_noise_by_token():
    """As in the reference: one token without noise keeps a run "per token" without any."""
    start, latent, noise = (mx.random.normal((1, 3, 2), key=mx.random.key(seed)) for seed in range(3))
    levels = np.array([1.0, 0.5, 0.0])[None, :, None]
    assert sde_step(start, latent, 0.9 * levels, 0.8 * levels, noise, 0.5) is latent
    levels[0, 2] = 0.1
    changed = sde_step(start, latent, 0.9 * levels, 0.8 * levels, noise, 0.5)
    assert not mx.allclose(changed, latent, atol=1e-3)
