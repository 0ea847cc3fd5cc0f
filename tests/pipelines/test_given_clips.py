"""Pipelines that start from a clip: what they keep is the source's, what they make is not."""

import numpy as np
import pytest

import mlx_ltx
from clips import RATE, frames_of, make, psnr
from mlx_ltx.media.audio import read_audio
from mlx_ltx.media.video import VideoWriter, probe
from mlx_ltx.request import LoraInput, VideoInput

KEPT, CHANGED = 34, 24  # dB: H.264 alone, and another picture


def levels(path, clip):
    """PSNR of each frame against the source's."""
    return [psnr(a, b) for a, b in zip(frames_of(path), frames_of(clip), strict=False)]


def test_a_retake_changes_its_range_only(clip, tmp_path):
    make(pipeline="retake", video_path=clip, start_time=0.5, end_time=0.9, output=tmp_path / "a.mp4")
    info = probe(tmp_path / "a.mp4")
    assert (info.width, info.height, info.frames, info.audio_rate) == (100, 70, 30, RATE)
    quality = levels(tmp_path / "a.mp4", clip)
    inside = [n for n in range(30) if 0.5 < (n + 0.5) / 24 < 0.9]
    assert min(q for n, q in enumerate(quality) if n not in inside) > KEPT
    assert min(quality[n] for n in inside[3:-3]) < CHANGED
    # the seams are blended: the range's first frame is nearer to the source than its middle
    assert quality[inside[0]] > quality[inside[len(inside) // 2]]
    made, source = (read_audio(path)[0] for path in (tmp_path / "a.mp4", clip))
    apart = np.abs(made - source[: len(made)]).mean(axis=1)
    assert apart[: round(0.45 * RATE)].mean() < 0.01
    assert apart[round(0.55 * RATE) : round(0.85 * RATE)].mean() > 0.05


def test_a_retake_of_the_sound_leaves_the_picture(clip, tmp_path):
    make(pipeline="retake", video_path=clip, start_time=0.5, regenerate="audio", output=tmp_path / "a.mp4")
    assert min(levels(tmp_path / "a.mp4", clip)) > KEPT
    made, source = (read_audio(path)[0] for path in (tmp_path / "a.mp4", clip))
    assert np.abs(made[RATE:] - source[RATE : len(made)]).mean() > 0.05


def test_a_retake_of_the_picture_keeps_the_sound_as_it_is(clip, tmp_path):
    make(pipeline="retake", video_path=clip, end_time=0.6, regenerate="video", output=tmp_path / "a.mp4")
    quality = levels(tmp_path / "a.mp4", clip)
    assert min(quality[16:]) > KEPT
    assert min(quality[:10]) < CHANGED
    made, source = (read_audio(path)[0] for path in (tmp_path / "a.mp4", clip))
    assert np.array_equal(made, source[: len(made)])


def test_a_retake_can_take_everything_from_the_decoder(clip, tmp_path):
    edit = {"pipeline": "retake", "video_path": clip, "start_time": 0.5, "end_time": 0.9, "regenerate": "video"}
    make(**edit, whole_decode=True, output=tmp_path / "a.mp4")
    assert max(levels(tmp_path / "a.mp4", clip)[:10]) < KEPT


def test_a_guided_retake(silent_clip, tmp_path):
    """A silent source stays silent; guidance works without a distilled model too."""
    edit = {"pipeline": "retake", "video_path": silent_clip, "start_time": 0.3, "guided": True, "steps": 2}
    make(**edit, output=tmp_path / "a.mp4")
    assert probe(tmp_path / "a.mp4").audio_rate is None
    quality = levels(tmp_path / "a.mp4", silent_clip)
    assert min(quality[:7]) > KEPT
    assert min(quality[10:]) < CHANGED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_time": 5.0}, "--start-time 5: .* ends at 1.25 s"),
        ({"end_time": 2.0}, "--end-time 2: .* ends at 1.25 s"),
        ({"start_time": 0.5, "end_time": 0.501}, "there is no frame between them"),
        ({"start_time": 0.9, "end_time": 0.5}, "--end-time 0.5: must be after --start-time 0.9"),
        ({}, "needs --start-time or --end-time"),
        ({"width": 64}, "the retake pipeline does not use --width"),
        ({"steps": 3, "start_time": 0.1}, "denoising without guidance does not use --steps; --guided turns it on"),
    ],
)
def test_bad_ranges(clip, changes, message, tmp_path):
    with pytest.raises(mlx_ltx.UserError, match=message):
        make(pipeline="retake", video_path=clip, output=tmp_path / "a.mp4", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("before", "after"), [(0.3, None), (None, 0.3), (0.2, 0.4)])
def test_an_extension_keeps_the_source(clip, before, after, tmp_path):
    make(pipeline="extend", video_path=clip, extend_before=before, extend_after=after, output=tmp_path / "a.mp4")
    first = int(np.ceil((before or 0) * 24))
    total = first + 30 + int(np.ceil((after or 0) * 24))
    info = probe(tmp_path / "a.mp4")
    assert (info.width, info.height, info.frames) == (100, 70, total)
    made, source = frames_of(tmp_path / "a.mp4")[first : first + 30], frames_of(clip)
    quality = [psnr(a, b) for a, b in zip(made, source, strict=True)]
    assert min(quality[4:-4]) > KEPT  # the outermost frames are blended
    if before is None:
        assert min(quality[:4]) > KEPT
    if after is None:
        assert min(quality[-4:]) > KEPT
    heard, original = read_audio(tmp_path / "a.mp4")[0], read_audio(clip)[0]
    offset = round(first / 24 * RATE)
    middle = slice(round(0.2 * RATE), RATE)
    assert np.abs(heard[offset:][middle] - original[middle]).mean() < 0.01
    assert len(heard) == round(total / 24 * RATE)


def test_an_extension_needs_a_length(clip, tmp_path):
    with pytest.raises(mlx_ltx.UserError, match="needs --extend-before or --extend-after"):
        make(pipeline="extend", video_path=clip, output=tmp_path / "a.mp4")


def test_upscaling_in_space(clip, tmp_path):
    make(pipeline="upscale", prompt="", video_path=clip, output=tmp_path / "a.mp4")
    info = probe(tmp_path / "a.mp4")
    assert (info.width, info.height, info.frames, info.fps) == (200, 140, 30, 24)
    assert np.array_equal(read_audio(tmp_path / "a.mp4")[0], read_audio(clip)[0])


def test_upscaling_in_time(clip, temporal_upsampler, tmp_path):
    upscale = {"pipeline": "upscale", "prompt": "", "video_path": clip, "upscale": "temporal"}
    make(**upscale, temporal_upsampler=str(temporal_upsampler), output=tmp_path / "a.mp4")
    info = probe(tmp_path / "a.mp4")
    assert (info.width, info.height, info.frames, info.fps) == (100, 70, 59, 48)
    with pytest.raises(mlx_ltx.UserError, match="needs --temporal-upsampler"):
        make(**upscale, output=tmp_path / "b.mp4")


def test_a_reference_video_is_followed(clip, lora, tmp_path):
    def made(**changes):
        name = tmp_path / f"{len(list(tmp_path.iterdir()))}.mp4"
        request = {"pipeline": "ic-lora", "loras": (LoraInput(lora()),), "output": name, "width": 128, "height": 64}
        references = (VideoInput(clip, changes.pop("strength", 1.0)),)
        make(**request, num_frames=9, video_conditionings=references, **changes)
        return frames_of(name)

    full, weaker, ignored = made(), made(attention_strength=0.5), made(attention_strength=0.0)
    assert full.shape == (9, 64, 128, 3)
    assert psnr(full, weaker) < 60
    assert psnr(weaker, ignored) < 60
    half = made(skip_stage_2=True)
    assert half.shape == (9, 64, 128, 3)


def test_an_attention_mask_weakens_part_of_the_reference(clip, lora, tmp_path):
    black = np.zeros((9, 64, 128, 3), np.uint8)
    with VideoWriter(tmp_path / "black.mp4", 128, 64, 24) as writer:
        writer.write_frames(black)
    request = {
        "pipeline": "ic-lora", "loras": (LoraInput(lora()),), "width": 128, "height": 64, "num_frames": 9,
        "video_conditionings": (VideoInput(clip),),
    }  # fmt: skip
    make(**request, attention_mask=tmp_path / "black.mp4", output=tmp_path / "masked.mp4")
    make(**request, attention_strength=0.0, output=tmp_path / "zero.mp4")
    make(**request, output=tmp_path / "full.mp4")
    masked, zero, full = (frames_of(tmp_path / f"{name}.mp4") for name in ("masked", "zero", "full"))
    assert psnr(masked, zero) > psnr(masked, full)


def test_a_smaller_reference_by_the_loras_own_word(clip, lora, tmp_path):
    path = lora(reference_downscale_factor="2", reference_temporal_scale_factor="2")
    request = {"pipeline": "ic-lora", "loras": (LoraInput(path),), "video_conditionings": (VideoInput(clip),)}
    make(**request, width=128, height=128, num_frames=17, output=tmp_path / "a.mp4")
    assert probe(tmp_path / "a.mp4").frames == 17
    with pytest.raises(mlx_ltx.UserError, match="--width 64: the LoRA's references are 2 times smaller"):
        make(**request, width=64, height=128, num_frames=17, output=tmp_path / "b.mp4")


def test_dubbing_needs_one_lora_and_a_voice(clip, silent_clip, lora, tmp_path):
    one = {"pipeline": "dub-it", "loras": (LoraInput(lora()),)}
    make(**one, reference_video=clip, output=tmp_path / "a.mp4")
    info = probe(tmp_path / "a.mp4")
    assert (info.width, info.height, info.frames, info.fps, info.audio_rate) == (128, 64, 25, 24, RATE)
    with pytest.raises(mlx_ltx.UserError, match="has no sound to take the voice from"):
        make(**one, reference_video=silent_clip, output=tmp_path / "b.mp4")
    with pytest.raises(mlx_ltx.UserError, match="exactly one LoRA, not 2"):
        make(pipeline="dub-it", loras=(*one["loras"], *one["loras"]), reference_video=clip, output=tmp_path / "b.mp4")


def test_sdr_to_hdr(clip, lora, tmp_path):
    from mlx_ltx.media.exr import read_exr

    request = {
        "pipeline": "hdr-ic-lora", "video_conditionings": (VideoInput(clip),), "hdr": "ACESCG",
        "width": 128, "height": 64, "num_frames": 9,
    }  # fmt: skip
    hdr_lora = (LoraInput(lora(hdr_transform="logc3")),)
    make(**request, loras=hdr_lora, output_exr=tmp_path / "frames", output=tmp_path / "a.mp4")
    frames = [read_exr(path) for path in sorted((tmp_path / "frames").iterdir())]
    assert len(frames) == 9
    assert max(frame.max() for frame in frames) > 1
    assert probe(tmp_path / "a.mp4").audio_rate is None
    with pytest.raises(mlx_ltx.UserError, match="none of those given says that it makes HDR"):
        make(**request, loras=(LoraInput(lora()),), output=tmp_path / "b.mp4")


def test_a_clip_with_a_variable_rate_is_refused_in_one_line(tmp_path):
    import av

    path = tmp_path / "variable.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.time_base = mlx_ltx.media.video.frame_rate(1000) ** -1
        for number in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), number * 20, np.uint8))
            frame.pts, frame.time_base = number**2 * 10, stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(mlx_ltx.UserError, match="variable frame rate"):
        make(pipeline="retake", video_path=path, start_time=0.1, output=tmp_path / "a.mp4")


def test_a_folder_of_exr_frames_is_a_reference(lora, tmp_path):
    from mlx_ltx.media.hdr import HdrSpace

    with HdrSpace.ACESCG.folder(tmp_path / "light") as folder:
        folder.write_frames(np.random.default_rng(0).random((9, 64, 128, 3), np.float32) * 4)
    request = {
        "pipeline": "ic-lora", "loras": (LoraInput(lora()),), "video_conditionings": (VideoInput(tmp_path / "light"),),
        "width": 128, "height": 64, "num_frames": 9,
    }  # fmt: skip
    make(**request, hdr="ACESCG", output_exr=tmp_path / "made")
    assert len(list((tmp_path / "made").iterdir())) == 9
    with pytest.raises(mlx_ltx.UserError, match="EXR frames need --hdr"):
        make(**request, output=tmp_path / "b.mp4")
