"""The step cache: which steps are left out, and what they are predicted to be."""

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_ltx.checkpoints.components import load_transformer
from mlx_ltx.events import StepDone
from mlx_ltx.models.passes import PassInput, Perturbation
from mlx_ltx.models.step_memory import StepMemory
from mlx_ltx.models.transformer_block import Block
from mlx_ltx.sampling.denoise import Denoiser, Grids, TextContext, denoise
from mlx_ltx.sampling.geometry import AudioGrid, VideoGrid
from mlx_ltx.sampling.guidance import Guidance, GuidanceBySigma, GuidanceParams
from mlx_ltx.sampling.noise import Noise
from mlx_ltx.sampling.schedules import DISTILLED
from mlx_ltx.sampling.state import States, add_noise, audio_state, video_state
from mlx_ltx.sampling.step_cache import StepCache
from mlx_ltx.sampling.token_tiles import token_tiles
from parity import GoldenSet

GOLDEN = Path(__file__).parents[1] / "golden"
GRIDS = Grids(VideoGrid(2, 4, 4, 128, 8, 32, 24.0), AudioGrid(9, 16, 8))
STEPS = len(DISTILLED) - 1
PARAMS = GuidanceParams(cfg_scale=2, stg_scale=1, stg_blocks=(1,), modality_scale=2)
GUIDED = Guidance(PARAMS, PARAMS)


@pytest.fixture(scope="module", params=["transformer_19b", "transformer_23"])
def setting(request):
    model = load_transformer(GoldenSet(GOLDEN, request.param).checkpoint(), mx.float32)
    states = States(add_noise(video_state(GRIDS.video), Noise(0)), add_noise(audio_state(GRIDS.audio), Noise(1)))
    streams = (model.config.video, model.config.audio)
    texts = [
        TextContext(
            *(
                mx.random.normal((1, 5, stream.caption_channels or stream.context_dim), key=mx.random.key(key + index))
                for index, stream in enumerate(streams)
            )
        )
        for key in (1, 3)
    ]
    return model, states, texts


def run(setting, threshold, guidance=GUIDED, states=None, tiles=None):
    """(cache, steps, states at the end)."""
    model, given, (positive, negative) = setting
    states = states or given
    cache = None if threshold is None else StepCache(threshold, STEPS)
    denoiser = Denoiser(model, states, positive, guidance, negative, tiles=tiles, cache=cache)
    work = denoise(denoiser, states, DISTILLED, GRIDS, "denoise", cache=cache)
    steps = []
    while True:
        try:
            event = next(work)
        except StopIteration as end:
            return cache, steps, end.value
        if isinstance(event, StepDone):
            steps.append(event)


def test_a_threshold_of_zero_changes_nothing(setting):
    _, plain_steps, plain = run(setting, None)
    cache, steps, cached = run(setting, 0.0)
    assert cache.reused == 0
    assert not any(step.reused for step in [*steps, *plain_steps])
    for ours, expected in zip(cached, plain, strict=True):
        assert mx.array_equal(ours.latent, expected.latent)


def test_a_large_threshold_leaves_out_all_but_the_ends_and_says_so(setting, monkeypatch):
    calls = []
    call = Block.__call__
    monkeypatch.setattr(Block, "__call__", lambda self, *given: (calls.append(1), call(self, *given))[1])
    cache, steps, states = run(setting, 1e9)
    assert [step.reused for step in steps] == [False, *[True] * (STEPS - 2), False]
    assert [step.to_json()["reused"] for step in steps] == [step.reused for step in steps]
    assert cache.reused == STEPS - 2
    evaluations = 3 + 4 + 4  # of a guided step of three blocks, STG at the second
    assert len(calls) == 2 * evaluations
    assert all(mx.isfinite(state.latent).all() for state in states)


def test_changes_add_up_to_the_threshold(setting):
    """A larger threshold leaves out as many steps or more, and somewhere between it leaves out some."""
    counts = [run(setting, threshold)[0].reused for threshold in (0.0, 0.02, 0.1, 0.5, 10.0)]
    assert counts == sorted(counts)
    assert any(0 < count < STEPS - 2 for count in counts)


def test_small_thresholds_stay_close(setting):
    plain = run(setting, None)[2].video.latent
    apart = [
        float(mx.linalg.norm(run(setting, threshold)[2].video.latent - plain) / mx.linalg.norm(plain))
        for threshold in (0.02, 1e9)
    ]
    assert apart[0] < apart[1]


def test_what_is_reused_for_the_same_input_is_what_was_computed(setting):
    model, states, (positive, negative) = setting
    denoiser = Denoiser(model, states, positive, GUIDED, negative)
    inputs = denoiser._inputs(states, denoiser.parts[0].tables, 0.9, (False, False), False)
    passes = [PassInput(*inputs), PassInput(*inputs, (Perturbation(isolated=True),))]
    memory = StepMemory()
    forward = model.forward_passes(passes, memory)
    while True:
        try:
            next(forward)
        except StopIteration as end:
            computed = end.value
            break
    for ours, expected in zip(model.reuse(passes, memory), computed, strict=True):
        assert mx.allclose(ours.video, expected.video, atol=1e-5)
        assert mx.allclose(ours.audio, expected.audio, atol=1e-5)


def test_other_passes_are_computed(setting):
    """When guidance changes there is nothing to reuse for the passes that begin."""
    guidance = GuidanceBySigma(((0.98, Guidance()), (1.0, GUIDED)))
    _, steps, _ = run(setting, 1e9, guidance)
    changed = next(index for index, sigma in enumerate(DISTILLED) if sigma <= 0.98)
    assert [step.reused for step in steps] == [0 < i < STEPS - 1 and i != changed for i in range(STEPS)]


@pytest.mark.parametrize("left_out", [0, 1])
def test_one_modality_alone(setting, left_out):
    states = States(*(None if index == left_out else state for index, state in enumerate(setting[1])))
    cache, _, _ = run(setting, 1e9, states=states)
    assert cache.reused == STEPS - 2


def test_with_tiles(setting):
    tiles = token_tiles(setting[1].video, GRIDS.video, 1, 2)
    cache, _, states = run(setting, 1e9, tiles=tiles)
    assert cache.reused == STEPS - 2
    assert mx.isfinite(states.video.latent).all()
    assert mx.array_equal(
        run(setting, 0.0, tiles=tiles)[2].video.latent, run(setting, None, tiles=tiles)[2].video.latent
    )
