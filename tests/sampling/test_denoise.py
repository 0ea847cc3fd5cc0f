"""Guidance and the denoising loop: parity, events, laziness, cancelling."""

from pathlib import Path

import mlx.core as mx
import pytest

import parity.sampling
from mlx_ltx.checkpoints.components import load_transformer
from mlx_ltx.events import Progress, StepDone
from mlx_ltx.sampling import denoise as loop
from mlx_ltx.sampling.denoise import Denoiser, Grids, States, TextContext, denoise
from mlx_ltx.sampling.geometry import AudioGrid, VideoGrid
from mlx_ltx.sampling.guidance import Guidance, GuidanceParams, Pass
from mlx_ltx.sampling.noise import Noise
from mlx_ltx.sampling.schedules import DISTILLED
from mlx_ltx.sampling.state import add_noise, audio_state, video_state
from parity import GoldenSet

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", ["e2e_19b", "e2e_23", "e2e_25"])
def test_whole_runs_at_parity(name, compare_golden):
    """Measured: at most 4e-6, after four guided steps of four passes each."""
    results = compare_golden(name)
    cases = {result.case for result in results}
    assert cases == {"t2v_distilled", "i2v_distilled", "guided", "stage2", "video_only", "audio_only"}
    for result in results:
        assert result.error < 2e-5, f"{result.case} {result.tensor}"


def test_guidance_at_parity(compare_golden):
    """Measured: at most 1e-7."""
    for result in compare_golden("steps_guiders"):
        assert result.error < 1e-6, result.tensor


@pytest.fixture(scope="module")
def setting():
    """A tiny model with its inputs: (model, states, grids, positive text, negative text)."""
    golden = GoldenSet(GOLDEN, "e2e_23")
    model = load_transformer(GoldenSet(GOLDEN, "transformer_23").checkpoint(), mx.float32)
    grids = Grids(VideoGrid(2, 2, 2, 128, 8, 32, 24.0), AudioGrid(9, 16, 8))
    noise = Noise(0)
    states = States(add_noise(video_state(grids.video), noise), add_noise(audio_state(grids.audio), noise))
    positive = TextContext(golden.mx("ctx.video"), golden.mx("ctx.audio"))
    negative = TextContext(golden.mx("ctx.neg_video"), golden.mx("ctx.neg_audio"))
    return model, states, grids, positive, negative


def finish(generator):
    events = []
    while True:
        try:
            events.append(next(generator))
        except StopIteration as end:
            return events, end.value


def test_events_come_within_steps_and_their_predictions_are_lazy(setting, monkeypatch):
    model, states, grids, positive, _ = setting
    evaluated = []
    evaluate = mx.eval
    monkeypatch.setattr(loop.mx, "eval", lambda *arrays: (evaluated.append(arrays), evaluate(*arrays)))
    events, final = finish(denoise(Denoiser(model, states, positive), states, DISTILLED[:3], grids, "denoise"))
    steps = [event for event in events if isinstance(event, StepDone)]
    assert [(step.step, step.total) for step in steps] == [(1, 2), (2, 2)]
    assert [step.sigma for step in steps] == pytest.approx(DISTILLED[1:3])
    progress = [event.done for event in events if isinstance(event, Progress)]
    assert progress == sorted(progress)
    assert len(progress) == 2 * model.config.layers
    assert progress[-1] == 2
    assert len(evaluated) == 2 * (model.config.layers + 1)  # per block, and once per step: never for x0
    assert steps[-1].video_x0.shape == (1, 2, 2, 2, 128)
    assert steps[-1].audio_x0.shape == (1, 9, 16, 8)
    assert final.video.latent.shape == states.video.latent.shape


def test_the_last_step_to_zero_ends_at_the_prediction(setting):
    model, states, grids, positive, _ = setting
    events, final = finish(denoise(Denoiser(model, states, positive), states, (0.5, 0.0), grids, "denoise"))
    x0 = events[-1].video_x0
    assert mx.allclose(grids.video.unpatchify(final.video.latent), x0, atol=1e-5)


def test_cancelling_is_not_asking_for_more(setting, monkeypatch):
    model, states, grids, positive, _ = setting
    passes = []
    forward = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, *given: (passes.append(1), (yield from forward(self, *given)))[1]
    )
    running = denoise(Denoiser(model, states, positive), states, DISTILLED, grids, "denoise")
    next(running)
    running.close()
    assert len(passes) == 1


def test_guided_passes_are_only_those_needed():
    assert list(Guidance().passes()) == [Pass.CONDITIONAL]
    assert list(Guidance(audio=GuidanceParams(cfg_scale=7)).passes()) == [Pass.CONDITIONAL, Pass.NEGATIVE]
    perturbed = Guidance(GuidanceParams(stg_scale=1, stg_blocks=(2,)), GuidanceParams()).passes()[Pass.PERTURBED]
    assert (perturbed.video_blocks, perturbed.audio_blocks) == (frozenset({2}), frozenset())


def test_skipped_steps_repeat_the_last_prediction(setting):
    model, states, _, positive, negative = setting
    params = GuidanceParams(cfg_scale=3, skip_step=1)
    denoiser = Denoiser(model, states, positive, Guidance(params, params), negative)
    progress, first = finish(denoiser.predict(states, 0.9, 0))
    assert progress
    progress, second = finish(denoiser.predict(states, 0.8, 1))
    assert not progress
    assert second.video is first.video
    _, third = finish(denoiser.predict(states, 0.7, 2))
    assert third.video is not first.video


def test_one_skipped_modality_stays_while_the_other_moves_on(setting):
    model, states, _, positive, _ = setting
    denoiser = Denoiser(model, states, positive, Guidance(GuidanceParams(skip_step=1), GuidanceParams()))
    _, first = finish(denoiser.predict(states, 0.9, 0))
    _, second = finish(denoiser.predict(states, 0.8, 1))
    assert second.video is first.video
    assert not mx.array_equal(second.audio, first.audio)


def test_guidance_without_its_negative_text_is_an_error(setting):
    model, states, _, positive, _ = setting
    with pytest.raises(ValueError, match="negative prompt"):
        Denoiser(model, states, positive, Guidance(GuidanceParams(cfg_scale=3)))


def test_guidance_pushes_away_from_the_negative():
    conditional, negative = mx.ones((1, 2, 2)), mx.zeros((1, 2, 2))
    guided = GuidanceParams(cfg_scale=3).combine({Pass.CONDITIONAL: conditional, Pass.NEGATIVE: negative})
    assert mx.array_equal(guided, 3 * conditional)
    assert parity.sampling.guider_params("cfg_scale=3.0, stg_scale=1.0, rescale_scale=0.7, modality_scale=3.0").rescale
