"""Data sets: what is found, what becomes of it, and what is wrong with it."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_ltx.checkpoints.catalogue import demo_folder
from mlx_ltx.checkpoints.components import load_video_encoder
from mlx_ltx.checkpoints.files import SafetensorsFile
from mlx_ltx.errors import UserError
from mlx_ltx.events import DataSetFinished, PhaseStarted, Warned
from mlx_ltx.media.audio import write_audio
from mlx_ltx.media.clips import read_clip
from mlx_ltx.training.captions import find_items
from mlx_ltx.training.config import config_from
from mlx_ltx.training.dataset import DataSet, Shuffled
from mlx_ltx.training.precompute import Bucket, choose_bucket, precompute


@pytest.fixture
def folder(media, tmp_path, settings):
    """A copy of the media, which a test may change."""
    copy = tmp_path / "media"
    shutil.copytree(media, copy)
    settings["data"]["dataset"] = str(copy)
    return copy


def run(settings, **options):
    return list(precompute(config_from(settings), **options))


def test_a_data_set_becomes_batches(settings):
    *_, finished = run(settings)
    assert (finished.samples, finished.skipped) == (3, 0)
    data = DataSet(settings["data"]["preprocessed_data_root"], video=True, audio=True)
    batches = Shuffled(data, 2, seed=0)
    assert batches.per_epoch == 2
    batch = batches(0)
    assert batch.video.shape == (2, 3, 2, 3, batch.video_grid.channels)
    assert batch.audio.shape[:2] == (2, round(17 / 24 * 25))
    assert batch.text.video.shape[0] == 2
    assert batch.video_grid.fps == 24.0
    assert batch.samples == 2
    assert data.identity() == DataSet(settings["data"]["preprocessed_data_root"], True, True).identity()
    # All samples in each epoch, one of them twice to fill a batch; another order in another epoch.
    epochs = [[batches.indices(2 * epoch + place) for place in range(2)] for epoch in range(8)]
    assert all({index for batch in epoch for index in batch} == {0, 1, 2} for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) > 2
    assert epochs[3] == [Shuffled(data, 2, seed=0).indices(6), Shuffled(data, 2, seed=0).indices(7)]


def test_the_latents_are_the_pipelines(settings, media):
    """What training sees of a clip is what the encoders give of its frames and its sound."""
    run(settings)
    checkpoint = SafetensorsFile(next(demo_folder().glob("*demo*.safetensors")))
    pixels = np.stack(list(read_clip(media / "clip1.mp4", frames=17)))
    expected = load_video_encoder(checkpoint, mx.float32)(mx.array(pixels)[None] / 127.5 - 1)[0]
    (path,) = (tmp for tmp in latents(settings) if tmp.name.startswith("clip1-"))
    assert mx.allclose(mx.load(str(path))["video"], expected, atol=1e-4)


def latents(settings):
    return sorted(Path(settings["data"]["preprocessed_data_root"], "latents").glob("*.safetensors"))


def test_it_goes_on_where_it_stopped(settings, folder):
    stopped = []
    for event in precompute(config_from(settings)):
        stopped.append(event)
        if len(latents(settings)) == 1:
            break
    times = {path: path.stat().st_mtime_ns for path in latents(settings)}
    events = run(settings)
    titles = [event.phase.title for event in events if isinstance(event, PhaseStarted)]
    assert titles == ["Embedding 0 of 3 captions", "Encoding 2 of 3 files"]
    assert len(latents(settings)) == 3
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    (folder / "clip0.txt").write_text("another caption")
    (folder / "clip2.mp4").unlink()
    events = run(settings)
    titles = [event.phase.title for event in events if isinstance(event, PhaseStarted)]
    assert titles == ["Embedding 1 of 2 captions", "Encoding 1 of 2 files"]
    assert any("deleted 2 samples that are no longer in" in e.message for e in events if isinstance(e, Warned))
    assert len(latents(settings)) == 2


def test_files_that_cannot_be_used_are_counted(settings, folder, make_clip):
    (folder / "broken.mp4").write_bytes(b"not a video")
    make_clip(folder / "short.mp4", frames=9)
    make_clip(folder / "silent.mp4", sound=False)
    for name in ("broken", "short", "silent"):
        (folder / f"{name}.txt").write_text("a wave")
    events = run(settings)
    warnings = [event.message for event in events if isinstance(event, Warned)]
    assert len(warnings) == 4
    assert "broken.mp4" in warnings[0]
    assert "short.mp4: has 9 frames, too few for any bucket (at least 17)" in warnings[1]
    assert "silent.mp4" in warnings[2]
    assert warnings[3] == "3 of 6 files were skipped"
    assert isinstance(events[-1], DataSetFinished)
    assert (events[-1].samples, events[-1].skipped) == (3, 3)
    settings["data"]["preprocessed_data_root"] += "-strict"
    with pytest.raises(UserError, match=r"broken.mp4"):
        run(settings, strict=True)


def test_nothing_usable(settings, folder):
    for path in folder.glob("*.mp4"):
        path.write_bytes(b"not a video")
    with pytest.raises(UserError, match=r"none of the 3 files in .* is usable"):
        run(settings)


def test_images_and_references(settings, folder, make_clip):
    for path in folder.iterdir():
        path.unlink()
    Image.fromarray(np.full((50, 50, 3), 200, np.uint8)).save(folder / "still.png")
    make_clip(folder / "moving.mp4", sound=False)
    (folder / "references").mkdir()
    Image.fromarray(np.full((50, 50, 3), 100, np.uint8)).save(folder / "references" / "still.png")
    make_clip(folder / "references" / "moving.mp4", sound=False)
    (folder / "captions.json").write_text(json.dumps({"still.png": "a grey wall", "moving.mp4": "waves"}))
    settings["data"] |= {"resolution_buckets": ["128x64x17", "64x64x1"], "reference_downscale_factor": 2}
    settings["training_strategy"] = {"name": "video_to_video"}
    run(settings)
    data = DataSet(settings["data"]["preprocessed_data_root"], video=True, audio=False, reference=True)
    shapes = {sample.latents.path.name.partition("-")[0]: dict(sample.shape) for sample in data.samples}
    assert shapes["still"]["video"][:3] == (1, 2, 2)
    assert shapes["still"]["reference"][:3] == (1, 1, 1)
    assert shapes["moving"]["video"][:3] == (3, 2, 4)
    assert shapes["moving"]["reference"][:3] == (3, 1, 2)
    assert Shuffled(data, 2, 0)(0).downscale == 2


def test_sounds(settings, folder):
    for path in folder.iterdir():
        path.unlink()
    write_audio(folder / "tone.wav", np.sin(np.arange(20_000) / 20)[:, None].repeat(2, 1) * 0.3, 16_000)
    (folder / "captions.csv").write_text("media_path,caption\ntone.wav,a tone\n")
    settings["training_strategy"] = {"name": "text_to_audio"}
    settings["data"]["audio_duration"] = 2.0
    run(settings)
    data = DataSet(settings["data"]["preprocessed_data_root"], video=False, audio=True)
    assert dict(data.samples[0].shape)["audio"][0] == 50
    with pytest.raises(UserError, match="holds no video, which this training needs"):
        DataSet(settings["data"]["preprocessed_data_root"], video=True, audio=True)


def test_a_clip_with_two_captions_is_two_samples(settings, folder):
    rows = [{"media_path": "clip0.mp4", "caption": caption} for caption in ("a wave", "a red wave")]
    (folder / "captions.json").write_text(json.dumps(rows))
    assert run(settings)[-1].samples == 2


def test_buckets():
    buckets = [Bucket(64, 64, 9), Bucket(64, 64, 17), Bucket(128, 64, 17), Bucket(256, 128, 9), Bucket(32, 32, 1)]
    assert choose_bucket(buckets, 20, 100, 100) == Bucket(64, 64, 17)
    assert choose_bucket(buckets, 12, 100, 100) == Bucket(64, 64, 9)
    assert choose_bucket(buckets, 12, 100, 210) == Bucket(256, 128, 9)
    assert choose_bucket(buckets, 1, 100, 210) == Bucket(32, 32, 1)
    assert choose_bucket(buckets[:2], 8, 100, 100) is None


@pytest.mark.parametrize(
    ("bucket", "message"),
    [
        ("96x64", "96x64 must be WIDTHxHEIGHTxFRAMES"),
        ("100x64x9", "100x64x9: its width must be a multiple of 32, as 96 or 128"),
        ("96x64x10", r"96x64x10: its frames must be 8k \+ 1, as 9 or 17"),
    ],
)
def test_buckets_off_the_grid(settings, bucket, message):
    settings["data"]["resolution_buckets"] = [bucket]
    with pytest.raises(UserError, match=f"data.resolution_buckets: {message}"):
        run(settings)


def test_another_config_for_the_same_folder(settings):
    run(settings)
    settings["data"]["resolution_buckets"] = ["64x64x17"]
    with pytest.raises(UserError, match="made with another video; give another folder"):
        run(settings)


def test_mistakes_in_a_data_set(tmp_path, folder):
    empty = tmp_path / "empty"
    with pytest.raises(UserError, match="empty does not exist"):
        find_items(empty)
    empty.mkdir()
    with pytest.raises(UserError, match="empty holds no videos or images"):
        find_items(empty)
    (folder / "clip1.txt").unlink()
    (folder / "clip2.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"2 of 3 files have no caption \(clip1.mp4, clip2.mp4\); put a .txt"):
        find_items(folder)
    with pytest.raises(UserError, match="2 of 3 files have no caption"):
        find_items(folder, references=True)
    (folder / "captions.json").write_text('[{"media_path": "clip0.mp4", "caption": "a"}, {"media_path": "x.mp4"}]')
    with pytest.raises(UserError, match=r"1 of 2 files do not exist \(x.mp4\)"):
        find_items(folder)
    (folder / "captions.json").write_text('[{"caption": "a"}]')
    with pytest.raises(UserError, match="entry 1 has no media_path"):
        find_items(folder)
    (folder / "captions.json").write_text("[")
    with pytest.raises(UserError, match=r"captions.json: is not JSON"):
        find_items(folder)
    (folder / "captions.json").write_text('{"clip0.mp4": "a wave"}')
    assert [item.caption for item in find_items(folder)] == ["a wave"]
    with pytest.raises(UserError, match="1 of 1 files have no reference video"):
        find_items(folder, references=True)
    with pytest.raises(UserError, match=r"neither a folder nor a .json or .csv list"):
        find_items(folder / "clip0.txt")


def test_training_without_a_data_set(tmp_path):
    with pytest.raises(UserError, match=r"holds no data set; make one with python -m mlx_ltx.train precompute"):
        DataSet(tmp_path, video=True, audio=False)
    (tmp_path / "data_set.json").write_text("{}")
    with pytest.raises(UserError, match="is empty"):
        DataSet(tmp_path, video=True, audio=False)
