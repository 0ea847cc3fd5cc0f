"""The demo's training: every part learns, goes on where it stopped, and ends in files that make clips."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_ltx
import train_demo
from demo_measures import look
from demo_scenes import draw, make_scene, play
from demo_training import diffusion, latents, sound, text, video
from demo_training.layout import CONFIG
from demo_training.stage import Stage, optimization, train, use_weights
from mlx_ltx.checkpoints.tokenizer import load_tokenizer, read_json
from mlx_ltx.models.transformer import Transformer, TransformerConfig, Velocities

POOLS = {"varied": 2, "bounce": 1, "rotate": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All parts after one step, and four encoded scenes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents, "AT_ONCE", 4)
        patch.setattr(latents, "STATISTICS_SCENES", 2)
        patch.setattr(latents, "POOLS", POOLS)
        patch.setattr(diffusion, "HALF_BATCH", 2)
        patch.setattr(diffusion, "FULL_BATCH", 1)
        path = tmp_path_factory.mktemp("training")
        for stage in train_demo.ORDER:
            train_demo.run(stage, path, 1, sum(POOLS.values()))
        yield path


def improves(stage, steps):
    """The sum of losses on one batch before and after some steps on it."""
    batch = stage.batches(0)
    stage = replace(stage, batches=lambda number: batch, optimization=optimization(steps, 2e-3))

    def value():
        return sum(part.item() for part in stage.loss(stage.module, batch, mx.random.key(5)).values())

    before = value()
    return before, stage, value


@pytest.mark.parametrize("name", train_demo.TRAININGS)
def test_a_few_steps_make_it_better(name, folder, tmp_path):
    stage = train_demo.TRAININGS[name](folder)
    use_weights(stage.module, folder, name)
    before, stage, value = improves(stage, 4)
    train(stage, tmp_path)
    assert value() < before


def test_an_interrupted_training_is_the_same(tmp_path):
    def stage():
        return Stage("vocoder", sound.Vocoder(), sound.vocoder_loss, sound.vocoder_batch, optimization(2, 1e-3))

    train(stage(), tmp_path / "whole")
    train(stage(), tmp_path / "parts", until=1)
    train(stage(), tmp_path / "parts")
    whole, parts = (mx.load(str(tmp_path / name / "vocoder" / "weights.safetensors")) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], parts[name], err_msg=name)
    assert len((tmp_path / "parts" / "vocoder" / "losses.jsonl").read_text().splitlines()) == 2


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="train video-vae first"):
        latents.Encoders(tmp_path)
    with pytest.raises(FileNotFoundError, match="run the stage latents first"):
        latents.EncodedScenes(tmp_path)


def test_latents_have_about_unit_variance(folder):
    scenes = latents.EncodedScenes(folder)
    assert len(scenes) == 4
    assert [latents.training_scene(index).motion for index in (2, 3)] == ["bounce", "rotate"]
    assert scenes.arrays["full"].shape == (4, 7, 6, 8, 64)
    assert scenes.arrays["half"].shape == (4, 7, 3, 4, 64)
    assert scenes.arrays["audio"].shape == (4, 51, 16, 4)
    for name in ("full", "audio"):
        values = scenes.arrays[name].astype(np.float32)
        assert abs(values.mean()) < 0.5
        assert 0.5 < values.std() < 2
    shape = latents.grids(latents.FULL)
    assert (shape[0].tokens, shape[1].tokens) == (7 * 48, 51)


def test_half_of_the_clips_and_some_more_bounce_when_the_video_autoencoder_learns():
    motions = [video.training_scene(seed).motion for seed in range(400)]
    assert abs(motions.count("bounce") / 400 - (video.BOUNCING + (1 - video.BOUNCING) / 8)) < 0.06
    assert len(set(motions)) == 8


def test_captions_are_left_out_now_and_then(folder, monkeypatch):
    monkeypatch.setattr(diffusion, "HALF_BATCH", 200)
    scenes = latents.EncodedScenes(folder)
    batch = diffusion.SceneBatches(scenes)(0)
    empty, negative = (mx.array(scenes.no_caption["text.video"][row].astype(np.float32)) for row in range(2))
    left_out = (mx.abs(batch.text.video - empty).max(axis=(1, 2)) == 0).sum().item()
    replaced = (mx.abs(batch.text.video - negative).max(axis=(1, 2)) == 0).sum().item()
    assert 5 < left_out < 30
    assert 2 < replaced < 20


def test_the_transformer_begins_with_nothing_and_its_gates_stay_open():
    model = diffusion.make_transformer()
    learnt = dict(tree_flatten(model.trainable_parameters()))
    gates = {path: array for path, array in tree_flatten(model.parameters()) if "to_gate_logits" in path}
    assert len(gates) == 4 * 2 * 3 * 2  # layers, streams, attentions, weight and bias
    assert all((array == 0).all() for array in gates.values())
    assert not gates.keys() & learnt.keys()
    assert all((learnt[f"{stream}.proj_out.weight"] == 0).all() for stream in ("video", "audio"))


def share_of(scenes, indices, batch):
    """How much of a batch is taken from some scenes, told by their sounds."""
    same = mx.all(batch.audio[:, None] == scenes.take("audio", np.array(indices))[None], axis=(2, 3, 4))
    return mx.any(same, axis=1).astype(mx.float32).mean().item()


@pytest.mark.parametrize("number", [0, 1])
def test_one_batch_in_three_is_of_half_size_and_some_motions_have_more(number, folder, monkeypatch):
    monkeypatch.setattr(diffusion, "HALF_BATCH", 200)
    scenes = latents.EncodedScenes(folder)
    batches = diffusion.SceneBatches(scenes)
    assert [batches(number).video.shape[2:4] for number in range(4)] == [(3, 4), (6, 8), (6, 8), (3, 4)]
    monkeypatch.setattr(diffusion, "FULL_BATCH", 200)
    for index, motion in ((2, "bounce"), (3, "rotate")):
        assert abs(share_of(scenes, [index], batches(number)) - diffusion.ONE_MOTION[motion]) < 0.1


def test_shapes_with_more_corners_are_taken_more_often(folder):
    shapes = [latents.training_scene(index).shape for index in range(2)]
    assert shapes[0] != shapes[1]
    chances = diffusion.SceneBatches(latents.EncodedScenes(folder)).chances
    often = [diffusion.OFTEN[shape] for shape in shapes]
    assert abs(chances[0] / chances[1] - often[0] / often[1]) < 1e-9
    assert abs(chances.sum() - 1) < 1e-9
    assert diffusion.OFTEN["circle"] < diffusion.OFTEN["square"] < diffusion.OFTEN["star"]


def test_of_few_scenes_only_the_pools_that_there_are_are_used(folder):
    assert latents.pools(4) == {"varied": range(2), "bounce": range(2, 3), "rotate": range(3, 4)}
    assert latents.pools(3) == {"varied": range(2), "bounce": range(2, 3), "rotate": range(3, 3)}
    shares = diffusion.chances(3)
    assert shares.shape == (3,)
    assert abs(shares[2] - diffusion.ONE_MOTION["bounce"]) < 1e-9
    assert abs(shares.sum() - 1) < 1e-9


def test_some_noise_levels_are_those_of_the_second_stage():
    levels = diffusion.StepLevels().draw(mx.random.key(1), 300, 336)
    drawn, counts = np.unique(np.array(levels), return_counts=True)
    np.testing.assert_array_equal(drawn, np.array(sorted(diffusion.REFINEMENT[:-1]), np.float32))
    assert counts.min() > 70


class Asked(Transformer):
    """Keeps what it was asked, and predicts nothing."""

    def __init__(self):
        super().__init__(TransformerConfig.from_metadata(CONFIG))

    def __call__(self, video, audio):
        self.video_input, self.audio_input = video, audio
        return Velocities(mx.zeros_like(video.latent), mx.zeros_like(audio.latent))


@pytest.mark.parametrize("number", [0, 1])
def test_few_steps_lead_from_other_shapes_to_the_scene(number, folder, monkeypatch):
    """Of scenes under the same noise; how far they are distorted shows in what is seen, and in the target."""
    batch = diffusion.SceneBatches(latents.EncodedScenes(folder))(number)
    batch = replace(batch, other=batch.video + mx.random.normal(batch.video.shape, key=mx.random.key(9)))
    asked, losses = [], []
    for distortion in ((0, 1e-9), (0.5, 0.5 + 1e-6)):
        monkeypatch.setattr(diffusion, "DISTORTION", distortion)
        model = Asked()
        losses.append(diffusion.FewSteps(diffusion.StepLevels())(model, batch, mx.random.key(3)))
        asked.append(model)
    plain, distorted = asked
    assert (plain.audio_input.latent == distorted.audio_input.latent).all()
    assert set(np.array(plain.video_input.sigma).tolist()) <= set(np.array(diffusion.REFINEMENT, np.float32).tolist())
    change = batch.video_grid.patchify(batch.other - batch.video)
    level = plain.video_input.sigma[:, None, None]
    expected = plain.video_input.latent + 0.5 * (1 - level) * change
    assert mx.allclose(distorted.video_input.latent, expected, atol=1e-4)
    clean = batch.video_grid.patchify(batch.video)
    for model, loss in zip(asked, losses, strict=True):  # nothing was predicted, so the loss is that of the target
        assert abs(loss["video"].item() - mx.mean(mx.square((model.video_input.latent - clean) / level)).item()) < 1e-4


def test_a_given_first_frame_is_never_distorted(folder, monkeypatch):
    monkeypatch.setattr(diffusion, "DISTORTION", (0.5, 0.8))
    batch = diffusion.SceneBatches(latents.EncodedScenes(folder))(1)
    batch = replace(batch, other=batch.video + 1)
    model = Asked()
    diffusion.FewSteps(diffusion.StepLevels(), 1.0)(model, batch, mx.random.key(3))
    frame = batch.video_grid.tokens_per_frame
    clean = batch.video_grid.patchify(batch.video)
    assert (model.video_input.latent[:, :frame] == clean[:, :frame]).all()
    assert mx.abs(model.video_input.latent[:, frame:] - clean[:, frame:]).max() > 0.1


def test_other_latents_are_those_of_the_same_scene_with_another_shape(folder):
    scenes, encoders = latents.EncodedScenes(folder), latents.Encoders(folder)
    for index in range(4):
        scene = latents.training_scene(index)
        other = latents.with_another_shape(scene, index)
        assert (other.shape == "circle") == (scene.shape != "circle")
        assert replace(other, shape=scene.shape) == scene
        wanted = encoders.video.encoder.statistics.normalize(encoders.picture(draw(other)))
        assert mx.allclose(scenes.take("other.full", np.array([index]))[0], wanted, atol=2e-2)


def test_the_packed_vocoder_makes_each_side_of_its_own_spectrogram():
    vocoder = sound.Vocoder()
    mel = -8 + 2 * mx.random.normal((1, 12, 64, 2), key=mx.random.key(1))
    whole = sound.both_sides(vocoder)(mel)
    for side in range(2):
        alone = vocoder.generator(mel[..., side : side + 1])
        assert mx.abs(alone).max() > 0.01
        assert mx.allclose(whole[..., side : side + 1], alone, atol=1e-6)


def test_what_is_packed_loads_and_makes_a_clip(folder, tmp_path):
    demo = folder / "demo"
    tokenizer = load_tokenizer(demo / "gemma", read_json(demo / "gemma" / "config.json"))
    assert tokenizer("a red circle moves left").mask.shape == (1, 128)
    size = {"width": 64, "height": 32, "num_frames": 9}
    request = mlx_ltx.Request(prompt="a star", model=str(demo), pipeline="distilled", output=tmp_path / "a.mp4", **size)
    result = mlx_ltx.run(request)
    assert result.frames == 9


def test_the_packed_text_side_is_the_trained_one(folder):
    """What the pipelines make of a caption is what the transformer was trained with."""
    from mlx_ltx.checkpoints.components import load_connectors, load_text_features
    from mlx_ltx.checkpoints.files import SafetensorsFile
    from mlx_ltx.checkpoints.gemma import load_gemma
    from mlx_ltx.models.text_encoder import TextEncoder

    demo, caption = folder / "demo", make_scene(1).caption
    side = text.TextSide()
    use_weights(side, folder, "text")
    trained = text.embed_captions(side, [caption])
    model, tokenizer = load_gemma(demo / "gemma", mx.float32)
    file = SafetensorsFile(demo / "ltx-2.3-demo.safetensors")
    features, connectors = load_text_features(file, model.config, mx.float32), load_connectors(file, mx.float32)
    tokens = tokenizer(caption)
    encoding = TextEncoder(model, features, connectors).encode(tokens.input_ids, tokens.mask)
    while True:
        try:
            next(encoding)
        except StopIteration as end:
            packed = end.value
            break
    for wanted, got in zip(trained, packed, strict=True):
        # files hold bfloat16
        error = np.linalg.norm(np.array(got[0]) - wanted[0]) / np.linalg.norm(wanted[0])
        assert error < 0.03


def test_shapes_weigh_more():
    scene = make_scene(21, motion="grow", end="navy", background="black")
    frames = draw(scene)
    mask = np.array(video.shape_mask(video.pixels(frames[None])))[0, ..., 0]
    inside = look(frames).masks
    assert mask[inside].mean() > 0.9
    assert mask[~inside].mean() < 0.1


def test_batches_are_the_same_for_the_same_number():
    np.testing.assert_array_equal(video.batch(3), video.batch(3))
    np.testing.assert_array_equal(sound.mel_batch(3), sound.mel_batch(3))
    pair = sound.vocoder_batch(2)
    assert pair.mel.shape == (4, 50, 64, 2)
    assert pair.waveform.shape == (4, 8000, 2)
    mel = sound.spectrogram(play(make_scene(1), sound.RATE)[None])
    assert mel.shape[1] == 205


def test_the_vocoder_learns_ends_where_decoded_sounds_end():
    """Before that, it ended one clip in six with a click."""
    latent = mx.zeros((1, latents.grids(latents.FULL)[1].frames, 16, 4))
    assert sound.AudioAutoencoder().decoder(latent).shape[1] == sound.CLIP_FRAMES
    pair = sound.vocoder_batch(2)
    mel = sound.spectrogram(play(make_scene(3_000_008), sound.RATE)[None])
    np.testing.assert_array_equal(pair.mel[0], mel[0, sound.CLIP_FRAMES - 50 : sound.CLIP_FRAMES])
    assert pair.counted.stop == 50
