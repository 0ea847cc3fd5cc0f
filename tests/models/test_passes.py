"""Forward passes made together: equal to passes made one by one, with less work."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

import parity.transformer
from mlx_ltx.checkpoints.components import load_transformer
from mlx_ltx.models.attention import Attention
from mlx_ltx.models.passes import PassInput, Perturbation, shared_passes
from mlx_ltx.models.transformer_block import Block
from mlx_ltx.sampling.guidance import Guidance, GuidanceParams
from parity import GoldenSet

GOLDEN = Path(__file__).parents[1] / "golden"
LAST = Perturbation(frozenset({2}), frozenset({2}))
ISOLATED = Perturbation(isolated=True)


@pytest.fixture(scope="module", params=["transformer_19b", "transformer_23"])
def setting(request):
    """(model of three blocks, video, audio): the first generation's text is not modulated, the second's is."""
    golden = GoldenSet(GOLDEN, request.param)
    model = load_transformer(golden.checkpoint(), mx.float32)
    assert model.config.layers == 3
    return model, *parity.transformer.stream_inputs(model, golden, "plain")


def finish(generator):
    yielded = []
    while True:
        try:
            yielded.append(next(generator))
        except StopIteration as end:
            return yielded, end.value


def guided(video, audio):
    """The four passes of a guided step."""
    other = [replace(given, context=given.context + 0.5) for given in (video, audio)]
    return [
        PassInput(video, audio),
        PassInput(*other),
        PassInput(video, audio, (LAST,)),
        PassInput(video, audio, (ISOLATED,)),
    ]


def relative(a, b):
    return float(mx.linalg.norm(a - b) / mx.linalg.norm(b))


def test_passes_together_equal_passes_alone(setting):
    """Measured: bit for bit."""
    model, video, audio = setting
    passes = guided(video, audio)
    _, together = finish(model.forward_passes(passes))
    for given, velocities in zip(passes, together, strict=True):
        alone = model(*given)
        for ours, theirs in zip(velocities, alone, strict=True):
            assert relative(ours, theirs) < 1e-6
    for index in (1, 2, 3):  # and each of them is a different one
        assert relative(together[index].video, together[0].video) > 1e-4


def test_what_is_computed_is_what_was_counted(setting, monkeypatch):
    model, video, audio = setting
    passes = guided(video, audio)
    calls = []
    call = Block.__call__
    monkeypatch.setattr(Block, "__call__", lambda self, *given: (calls.append(given[2]), call(self, *given))[1])
    yielded, _ = finish(model.forward_passes(passes))
    assert calls == [0] * 3 + [1] * 3 + [2] * 4
    assert len(yielded) == len(calls) == model.evaluations(passes)


def test_text_is_read_once_for_all_passes_of_a_prompt(setting, monkeypatch):
    model, video, audio = setting
    calls = []
    project = Attention.keys_values
    monkeypatch.setattr(Attention, "keys_values", lambda self, text: (calls.append(self), project(self, text))[1])
    finish(model.forward_passes(guided(video, audio)))
    assert len(calls) == 3 * 2 * 2  # blocks, streams, prompts; not passes
    assert len(set(map(id, calls))) == 3 * 2


def test_a_fully_guided_step_of_the_full_model_costs_at_most_087(setting):
    """CFG, STG at block 28 of 48 and modality guidance; isolated blocks, cheaper than others, count as full ones."""
    _, video, audio = setting
    params = GuidanceParams(cfg_scale=3, stg_scale=1, stg_blocks=(28,), modality_scale=3)
    kinds = Guidance(params, params).passes()
    texts = (video, audio), (replace(video), replace(audio))
    passes = [PassInput(*texts[index == 1], (perturbation,)) for index, perturbation in enumerate(kinds.values())]
    assert len(passes) == 4
    groups = shared_passes(passes, 48)
    assert [len(group) for group in groups] == [3] * 28 + [4] * 20
    assert sum(map(len, groups)) / (4 * 48) < 0.87


def test_what_a_perturbation_cannot_reach_is_shared_to_the_end(setting):
    _, video, audio = setting
    frozen = replace(audio, frozen=True)

    def parts(video, audio, perturbation):
        passes = [PassInput(video, audio), PassInput(video, audio, (perturbation,))]
        return [len(group) for group in shared_passes(passes, 3)]

    assert parts(video, audio, Perturbation()) == [1, 1, 1]
    assert parts(video, audio, LAST) == [1, 1, 2]
    assert parts(video, frozen, Perturbation(audio_blocks=frozenset({2}))) == [1, 1, 1]
    assert parts(video, None, ISOLATED) == [1, 1, 1]
    assert parts(video, audio, ISOLATED) == [2, 2, 2]


def test_equal_looking_inputs_are_not_taken_for_the_same(setting):
    """Only the very same streams are shared; nobody compares tensors."""
    _, video, audio = setting
    passes = [PassInput(video, audio), PassInput(replace(video), audio)]
    assert [len(group) for group in shared_passes(passes, 3)] == [2, 2, 2]


def test_what_has_parted_stays_apart(setting):
    """Two passes that differ in one block only are different ever after, and so are their velocities."""
    model, video, audio = setting
    first = Perturbation(frozenset({0}))
    passes = [PassInput(video, audio), PassInput(video, audio, (first,)), PassInput(video, audio, (first,))]
    assert shared_passes(passes, 3) == [[[0], [1, 2]]] * 3
    _, (plain, one, two) = finish(model.forward_passes(passes))
    assert one.video is two.video
    assert relative(one.video, plain.video) > 1e-4


def test_samples_perturbed_differently_part(setting):
    _, video, audio = setting
    passes = [PassInput(video, audio, (Perturbation(), LAST)), PassInput(video, audio, (LAST, Perturbation()))]
    assert [len(group) for group in shared_passes(passes, 3)] == [1, 1, 2]


def test_a_source_is_asked_once_for_each_block(setting):
    model, video, audio = setting
    asked = []

    class Source:
        def __iter__(self):
            for index, block in enumerate(model.blocks):
                asked.append(index)
                yield block

    expected = [model(*given) for given in guided(video, audio)]
    model.take_blocks_from(Source())
    try:
        _, velocities = finish(model.forward_passes(guided(video, audio)))
    finally:
        model.take_blocks_from(model.blocks)
    assert asked == [0, 1, 2]
    assert all(mx.array_equal(a.video, b.video) for a, b in zip(velocities, expected, strict=True))
