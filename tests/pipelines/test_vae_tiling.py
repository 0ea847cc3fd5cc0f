"""How the picture is decoded: bands give what the whole picture gives, the reference's tiles something near it."""

import errno
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

import mlx_ltx
from clips import frames_of
from mlx_ltx.checkpoints.components import load_video_decoder
from mlx_ltx.events import Planned, Progress
from mlx_ltx.generate import main
from mlx_ltx.media.video import read_metadata
from mlx_ltx.models.video_vae import Block
from mlx_ltx.pipelines import output
from mlx_ltx.pipelines.decode import FrameFile, decode_frames
from mlx_ltx.pipelines.job import check_tiling, prepare
from mlx_ltx.pipelines.predict import make_plan
from mlx_ltx.sampling.noise import Noise

GB = 1 << 30
TILINGS = ("none", "auto", "reference")


def run(path, **request):
    """The events of a clip of the demo model."""
    given = {"model": "demo", "prompt": "a red ball", "num_frames": 9, "audio": False, **request}
    return list(mlx_ltx.stream(mlx_ltx.Request(output=path, **given)))


def test_bands_make_the_same_clip_and_say_how_far_they_are(tmp_path):
    frames = {}
    for tiling in ("none", "bands-2", "bands-3"):
        path = tmp_path / f"{tiling}.mp4"
        events = run(path, width=64, height=128, vae_tiling=tiling)
        (planned,) = (event for event in events if isinstance(event, Planned))
        done = [event for event in events if isinstance(event, Progress) and event.phase == "decode-video"]
        bands = 1 if tiling == "none" else int(tiling[-1])
        assert planned.phases[-1].total == 9 * bands
        assert [event.done for event in done] == list(range(1, 9 * bands + 1))
        assert {event.total for event in done} == {9 * bands}
        assert read_metadata(path)["vae_tiling"] == tiling
        frames[tiling] = frames_of(path)
    assert np.array_equal(frames["none"], frames["bands-2"])
    assert np.array_equal(frames["none"], frames["bands-3"])


def test_bands_of_a_source_that_is_not_on_the_grid(clip, tmp_path):
    """70 rows are three of latents; 30 frames are decoded as 33."""
    edit = {"pipeline": "retake", "video_path": clip, "start_time": 0.5, "model": "demo", "prompt": "a"}
    for tiling in ("none", "bands-3"):
        mlx_ltx.run(mlx_ltx.Request(**edit, vae_tiling=tiling, output=tmp_path / f"{tiling}.mp4"))
    made, expected = (frames_of(tmp_path / f"{tiling}.mp4").astype(int) for tiling in ("none", "bands-3"))
    assert np.abs(made - expected).mean() < 0.5  # encoding this size varies a little from run to run


def test_the_reference_tiles_are_used_where_they_are_asked_for(tmp_path, monkeypatch):
    asked = []

    def spy(decoder, latent, noise, tiling):
        asked.append(tiling)
        return decode_frames(decoder, latent, noise, tiling)

    monkeypatch.setattr(output, "decode_frames", spy)
    run(tmp_path / "a.mp4", width=64, height=64, vae_tiling="reference")
    assert asked == ["reference"]


def test_tiles_differ_from_the_whole_picture_where_they_meet(tmp_path):
    job = prepare(mlx_ltx.Request(model="demo", prompt="a", output=tmp_path / "a.mp4"))
    decoder = load_video_decoder(job.model.checkpoint, mx.float32)
    latent = mx.random.normal((1, 2, 2, 26, job.model.video_vae.latent_channels), key=mx.random.key(1))
    noise = Noise(1)
    whole, auto, tiled = (np.concatenate(list(decode_frames(decoder, latent, noise, t))) for t in TILINGS)
    assert whole.shape == (9, 64, 832, 3)
    assert np.array_equal(whole, auto)
    apart = np.abs(whole - tiled).mean(axis=(0, 1, 3))
    assert apart[704:].min() > 1e-4  # where the tiles, of 768 columns, overlap
    assert apart[: 768 - 32 * decoder.halo].max() < 1e-5  # what never saw their edges


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_frames_wait_in_a_file_as_they_are(dtype):
    queue = FrameFile()
    frames = [mx.random.normal((1, 1, 4, 6, 3), key=mx.random.key(index)).astype(dtype) for index in range(3)]
    for frame in frames:
        queue.append(frame)
    for frame in frames:
        found = queue.popleft()
        assert found.dtype == dtype
        assert mx.array_equal(found, frame)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    def without_room(self):
        self._file, self._reading = Full(), False

    monkeypatch.setattr(FrameFile, "__init__", without_room)
    output = tmp_path / "a.mp4"
    flags = ["--model", "demo", "-p", "a", "--width", "64", "--height", "64", "-n", "9", "--vae-tiling", "bands-2"]
    assert main([*flags, "--output", str(output)]) == 1
    assert "cannot wait in" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"vae_tiling": "bands-4"}, "--vae-tiling bands-4: the picture has only 2 rows"),
        (
            {"vae_tiling": "tiles"},
            "--vae-tiling tiles: must be one of auto, none, bands-2, bands-3, bands-4, reference",
        ),
        ({"vae_tiling": "none", "pipeline": "t2a", "output_audio": "a.wav"}, "does not use .*--vae-tiling"),
    ],
)
def test_what_cannot_be(tmp_path, flags, message):
    size = {} if "pipeline" in flags else {"width": 64, "height": 64, "output": tmp_path / "a.mp4"}
    with pytest.raises(mlx_ltx.UserError, match=message):
        prepare(mlx_ltx.Request(model="demo", prompt="a", **size, **flags))


def with_norm_over_the_clip(job):
    """The same job with another block list in its decoder, for planning only."""
    vae = job.model.video_vae
    blocks = (Block("res_x_y", multiplier=1), *vae.decoder_blocks)
    return replace(job, model=replace(job.model, video_vae=replace(vae, decoder_blocks=blocks)))


def test_a_decoder_that_is_not_local_has_no_bands_and_the_plan_says_so(tmp_path):
    request = mlx_ltx.Request(
        model="demo", prompt="a", width=128, height=128, num_frames=121, output=tmp_path / "a.mp4"
    )
    job = prepare(request)
    other = with_norm_over_the_clip(job)
    bands = other.with_changes(vae_tiling="bands-2")
    with pytest.raises(mlx_ltx.UserError, match="norm over the whole clip"):
        check_tiling(bands)
    local, whole = (make_plan(each, 64 * GB).phases[-1] for each in (job, other))
    assert "whole clip" in whole.chunking
    assert "whole clip" not in local.chunking
    assert whole.peak_bytes > local.peak_bytes
