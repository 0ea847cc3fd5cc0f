"""What pipelines refuse before any work: everything that they would not use, and sources that they cannot use."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mlx_ltx
from clips import make
from mlx_ltx.generate import main
from mlx_ltx.media.video import probe
from mlx_ltx.pipelines.job import prepare
from mlx_ltx.request import ImageInput, LoraInput, Request, VideoInput


def refused(**changes) -> str:
    """The one line that a request is refused with; nothing has been loaded by then."""
    with pytest.raises(mlx_ltx.UserError) as error:
        prepare(Request(**{"prompt": "a red ball", "model": "demo", **changes}))
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture
def still(tmp_path) -> Path:
    path = tmp_path / "still.png"
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(path)
    return path


@pytest.mark.parametrize("name", ["output", "contact_sheet"])
def test_sound_alone_has_no_picture_to_write(name, tmp_path):
    files = {"output": "a.mp4", "contact_sheet": "a.png", "output_audio": "a.wav"}
    request = {"pipeline": "t2a", "duration": 0.5, "output_audio": tmp_path / "a.wav", name: tmp_path / files[name]}
    assert refused(**request) == f"the t2a pipeline does not use --{name.replace('_', '-')}"


def test_sound_alone_is_guided_by_its_own_scales(tmp_path):
    request = {"pipeline": "t2a", "duration": 0.5, "output_audio": tmp_path / "a.wav", "guided": True, "steps": 2}
    assert "does not use --video-cfg-guidance-scale" in refused(**request, video_cfg_scale=3.0)
    assert prepare(Request(prompt="a", model="demo", **request, audio_cfg_scale=3.0)).guidance.audio.cfg_scale == 3


def test_a_given_sound_has_no_guidance(sound, lora, tmp_path):
    request = {"pipeline": "a2v", "audio_path": sound, "guided": True, "distilled_lora": LoraInput(lora())}
    message = refused(**request, audio_cfg_scale=3.0, output=tmp_path / "a.mp4")
    assert message == "the a2v pipeline does not use --audio-cfg-guidance-scale"


def test_silent_pipelines_write_no_sound(silent_clip, lora, clip, tmp_path):
    hdr = {"video_conditionings": (VideoInput(clip),), "loras": (LoraInput(lora(hdr_transform="logc3")),)}
    request = {"pipeline": "hdr-ic-lora", "hdr": "ACESCG", "output_audio": tmp_path / "a.wav", **hdr}
    assert refused(**request) == "the hdr-ic-lora pipeline does not use --output-audio"
    retake = {"pipeline": "retake", "video_path": silent_clip, "start_time": 0.1}
    assert "the source has no sound" in refused(**retake, output_audio=tmp_path / "a.wav")
    assert "has no sound" in refused(**retake, regenerate="audio", output=tmp_path / "a.mp4")


def test_references_and_masks_are_looked_at_before_the_work(clip, lora, still, tmp_path):
    request = {"pipeline": "ic-lora", "loras": (LoraInput(lora()),), "width": 128, "height": 64, "num_frames": 9}
    request["output"] = tmp_path / "a.mp4"
    assert "no such file" in refused(**request, video_conditionings=(VideoInput(tmp_path / "none.mp4"),))
    assert "is a still image" in refused(**request, video_conditionings=(VideoInput(still),))
    fine = (VideoInput(clip),)
    assert "is a still image" in refused(**request, video_conditionings=fine, attention_mask=still)
    assert "need --hdr" in refused(**request, video_conditionings=(VideoInput(tmp_path),))


def test_a_lora_for_a_stage_that_there_is_not(clip, lora, tmp_path):
    loras = (LoraInput(lora(), 1.0, 2),)
    assert "there is only one stage" in refused(pipeline="one-stage", loras=loras, output=tmp_path / "a.mp4")
    request = {"pipeline": "ic-lora", "skip_stage_2": True, "video_conditionings": (VideoInput(clip),)}
    both = (LoraInput(lora()), *loras)
    assert "there is only one stage" in refused(**request, loras=both, output=tmp_path / "a.mp4")


def test_what_would_be_ignored(lora, temporal_upsampler, clip, still, tmp_path):
    output = {"output": tmp_path / "a.mp4"}
    assert "no image or reference video to fit" in refused(fit="contain", **output)
    assert "two seeds are the same" in refused(seeds=(1, 1), **output)
    images = (ImageInput(still), ImageInput(still, 8))
    unguided = {"pipeline": "keyframes", "images": images, "num_frames": 9, "distilled_lora": LoraInput(lora())}
    assert "denoising without guidance does not use --distilled-lora" in refused(**unguided, **output)
    upscale = {"prompt": "", "pipeline": "upscale", "video_path": clip, "temporal_upsampler": str(temporal_upsampler)}
    assert "--upscale spatial does not use it" in refused(**upscale, **output)


def test_odd_sizes_are_refused_where_they_would_stay_odd(temporal_upsampler, tmp_path):
    frames = [Image.fromarray(np.full((71, 101, 3), level, np.uint8)) for level in range(0, 160, 20)]
    frames[0].save(tmp_path / "odd.gif", save_all=True, append_images=frames[1:], duration=40)
    request = {"prompt": "", "pipeline": "upscale", "video_path": tmp_path / "odd.gif", "output": tmp_path / "a.mp4"}
    message = refused(**request, upscale="temporal", temporal_upsampler=str(temporal_upsampler))
    assert message.endswith("is 101x71; H.264 needs even sizes, so crop it first")
    make(**request)
    assert (probe(tmp_path / "a.mp4").width, probe(tmp_path / "a.mp4").height) == (202, 142)


def test_a_clip_is_replayed_as_the_source_of_another_pipeline(tmp_path):
    clip = tmp_path / "a.mp4"
    make(output=clip, width=128, height=64, num_frames=9)
    assert main(["--replay", str(clip), "--quiet", "--pipeline", "retake", "--video-path", str(clip),
                 "--start-time", "0.2", "--output", str(tmp_path / "b.mp4")]) == 0  # fmt: skip
    assert probe(tmp_path / "b.mp4").frames == 9


def test_a_dry_run_of_sound_alone_speaks_of_no_picture(capsys):
    assert main(["--model", "demo", "--prompt", "rain", "--pipeline", "t2a", "--duration", "1", "--dry-run"]) == 0
    assert "no picture (1.042 s), 48000 Hz stereo" in capsys.readouterr().out


def test_help_names_every_pipeline_and_capabilities_what_it_writes(capsys):
    from mlx_ltx.pipelines.pipeline import pipelines

    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and pipeline.title in text for name, pipeline in pipelines().items())
    assert main(["--capabilities"]) == 0
    told = json.loads(capsys.readouterr().out)["pipelines"]
    assert "--output" in told["distilled"]["flags"]
    assert "--output" not in told["t2a"]["flags"]
    assert "--output-audio" not in told["hdr-ic-lora"]["flags"]


def test_a_variable_rate_is_said_in_one_line(tmp_path):
    frames = [Image.fromarray(np.full((64, 64, 3), level, np.uint8)) for level in range(0, 160, 20)]
    times = [40, 40, 90, 40, 130, 40, 40, 70]
    frames[0].save(tmp_path / "v.gif", save_all=True, append_images=frames[1:], duration=times)
    message = refused(pipeline="extend", video_path=tmp_path / "v.gif", extend_after=0.2, output=tmp_path / "a.mp4")
    assert "variable frame rate" in message
    assert message.endswith("convert it to a constant one first")


def test_a_missing_library_for_exr_is_noticed_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    assert 'install it with: pip install "mlx_ltx[hdr]"' in refused(hdr="ACESCG", output_exr=tmp_path / "frames")


def test_an_exr_picture_is_not_compressed_before_it_is_encoded(tmp_path):
    images = (ImageInput(tmp_path / "light.exr", crf=20),)
    assert "crf 20 is for pictures of 8 bits" in refused(images=images, hdr="ACESCG", output=tmp_path / "a.mp4")


def test_a_prompt_that_was_to_be_read_and_is_not_there(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    flags = ["--model", "demo", "--output", str(tmp_path / "a.mp4")]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    for source in (["--prompt-file", str(tmp_path / "empty.txt")], ["--prompt", "-"]):
        assert main([*source, *flags]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("holds no prompt")
    assert not (tmp_path / "a.mp4").exists()
