"""The command line from end to end, with the embedded demo model: every file that it writes is opened and checked."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

import mlx_ltx
from mlx_ltx.checkpoints.catalogue import demo_folder
from mlx_ltx.generate import main
from mlx_ltx.media.video import probe, read_frames, read_metadata

SIZE = ["--width", "128", "--height", "64", "--num-frames", "9"]
DISTILLED = ["--model", "demo", "--pipeline", "distilled", *SIZE]
ONE_STAGE = ["--model", "demo", "--pipeline", "one-stage", *SIZE, "--steps", "2"]
PIPELINES = {"distilled": DISTILLED, "one-stage": ONE_STAGE}


def generate(*flags: str | Path) -> int:
    return main(["--prompt", "a red ball rolls over grass", "--quiet", *map(str, flags)])


def failed(capsys, *flags: str | Path, code: int = 1) -> str:
    """The one line on stderr of a command that fails."""
    with pytest.raises(SystemExit) if code == 2 else _nothing() as exit:
        result = main([str(flag) for flag in flags])
    assert (exit.value.code if code == 2 else result) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("mlx_ltx.generate: ")
    return lines[0].removeprefix("mlx_ltx.generate: ")


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False


@pytest.fixture(scope="module", params=PIPELINES)
def clip(request, tmp_path_factory):
    """A clip of each pipeline with everything that can be written beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = [
        "--output",
        folder / "clip.mp4",
        "--output-audio",
        folder / "clip.wav",
        "--contact-sheet",
        folder / "a.png",
    ]
    assert generate(*PIPELINES[request.param], *flags) == 0
    return folder / "clip.mp4"


def test_the_clip_has_the_frames_size_rate_and_sound_that_were_asked_for(clip):
    info = probe(clip)
    assert (info.width, info.height, info.frames) == (128, 64, 9)
    assert float(info.fps) == 24
    assert info.duration == pytest.approx(9 / 24, abs=0.01)
    assert (info.audio_rate, info.audio_channels) == (48_000, 2)
    frames = np.concatenate([frame[None] if frame.ndim == 3 else frame for frame in read_frames(clip)])
    assert frames.shape == (9, 64, 128, 3)
    assert frames.std() > 1, "the picture is one flat colour"


def test_the_sound_file_is_as_long_as_the_picture(clip):
    waveform, rate = soundfile.read(clip.with_suffix(".wav"))
    assert rate == 48_000
    assert waveform.shape == (round(9 / 24 * rate), 2)
    assert 1e-4 < np.sqrt(np.mean(waveform**2)) < 0.7
    assert np.abs(waveform).max() <= 1


def test_the_contact_sheet_shows_frames(clip):
    sheet = np.array(Image.open(clip.parent / "a.png"))
    assert sheet.ndim == 3
    assert sheet.std() > 5


def test_nothing_else_is_left_in_the_folder(clip):
    assert sorted(path.name for path in clip.parent.iterdir()) == ["a.png", "clip.mp4", "clip.wav"]


def test_the_settings_are_inside_and_make_the_same_clip_again(clip, tmp_path, capsys):
    settings = read_metadata(clip)
    assert settings["prompt"] == "a red ball rolls over grass"
    assert (settings["width"], settings["height"], settings["num_frames"], settings["seed"]) == (128, 64, 9, 10)
    assert main(["--show", str(clip)]) == 0
    shown = capsys.readouterr().out
    assert "a red ball rolls over grass" in shown
    assert settings["pipeline"] in shown

    again, other = tmp_path / "again.mp4", tmp_path / "other.mp4"
    assert main(["--replay", str(clip), "--output", str(again), "--quiet"]) == 0
    assert main(["--replay", str(clip), "--seed", "11", "--output", str(other), "--quiet"]) == 0
    frames = [np.array(list(read_frames(path))) for path in (clip, again, other)]
    # Not compared bit by bit: x264's tree of macroblocks differs from run to run at sizes this small.
    errors = [np.square(frames[0].astype(float) - other).mean() for other in frames[1:]]
    assert errors[0] < 60
    assert errors[1] > 200
    assert read_metadata(other)["seed"] == 11


def test_a_replay_with_another_pipeline_drops_what_that_one_does_not_use(tmp_path):
    guided, again = tmp_path / "a.mp4", tmp_path / "b.mp4"
    assert generate(*ONE_STAGE, "--negative-prompt", "fog", "--output", guided) == 0
    assert read_metadata(guided)["negative_prompt"] == "fog"
    replay = ["--replay", guided, "--pipeline", "distilled", *SIZE, "--quiet", "--output", again]
    assert main([str(flag) for flag in replay]) == 0
    assert "negative_prompt" not in read_metadata(again)


def test_a_silent_replay_drops_what_guides_the_sound(tmp_path):
    clips = [tmp_path / f"{name}.mp4" for name in "abc"]
    assert generate(*ONE_STAGE, "--v2a-guidance-scale", "2", "--output", clips[0]) == 0
    assert read_metadata(clips[0])["audio_modality_scale"] == 2
    for made, again in itertools.pairwise(clips):  # the second time, the settings are those of a silent clip
        assert main([*map(str, ["--replay", made, "--no-audio", "--quiet", "--output", again])]) == 0
        assert not {"audio_cfg_scale", "audio_modality_scale", "video_modality_scale"} & read_metadata(again).keys()


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_an_image_is_kept_at_its_frame(pipeline, tmp_path):
    """The predicted latent at frame 0 is the encoded image itself, at every step of every stage."""
    image = tmp_path / "image.png"
    gradient = np.linspace(0, 255, 64 * 128 * 3).reshape(64, 128, 3).astype(np.uint8)
    Image.fromarray(gradient).save(image)
    steps = {"steps": 2} if pipeline == "one-stage" else {}
    request = mlx_ltx.Request(
        prompt="p", model="demo", pipeline=pipeline, width=128, height=64, num_frames=9, output=tmp_path / "a.mp4",
        images=(mlx_ltx.ImageInput(image), mlx_ltx.ImageInput(image, 8, 0.5)), **steps,
    )  # fmt: skip
    predictions: dict[str, list[np.ndarray]] = {}
    for event in mlx_ltx.stream(request):
        if isinstance(event, mlx_ltx.events.StepDone):
            predictions.setdefault(event.phase, []).append(np.array(event.video_x0))
    assert len(predictions) == (2 if pipeline == "distilled" else 1)
    for steps_of_stage in predictions.values():
        first, last = steps_of_stage[0], steps_of_stage[-1]
        assert np.allclose(first[:, 0], last[:, 0], atol=1e-5)
        assert first[:, 0].std() > 0
        assert not np.allclose(first[:, 1], last[:, 1], atol=1e-3)
    assert probe(tmp_path / "a.mp4").frames == 9


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_silent_clip_has_no_sound_track(pipeline, tmp_path):
    assert generate(*PIPELINES[pipeline], "--no-audio", "--output", tmp_path / "a.mp4") == 0
    info = probe(tmp_path / "a.mp4")
    assert info.frames == 9
    assert info.audio_rate is None


def test_sound_alone_needs_no_picture(tmp_path):
    assert generate(*DISTILLED, "--output-audio", tmp_path / "a.flac") == 0
    waveform, rate = soundfile.read(tmp_path / "a.flac")
    assert waveform.shape == (round(9 / 24 * rate), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["a.flac"]


@pytest.mark.parametrize(
    ("flags", "frames", "fps"), [(["--duration", "1.0"], 25, 24), (["--fps", "30", "-n", "17"], 17, 30)]
)
def test_length_and_rate(flags, frames, fps, tmp_path):
    command = ["--model", "demo", "--width", "64", "--height", "64", *flags, "--output", tmp_path / "a.mp4"]
    assert generate(*command) == 0
    info = probe(tmp_path / "a.mp4")
    assert (info.frames, float(info.fps)) == (frames, fps)


def test_prompts_from_standard_input_and_from_a_file(tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("a blue cube\n")
    monkeypatch.setattr("sys.stdin", open(tmp_path / "prompt.txt"))  # noqa: SIM115
    assert main(["--prompt", "-", *DISTILLED, "--quiet", "--output", str(tmp_path / "a.mp4")]) == 0
    prompt = ["--prompt-file", str(tmp_path / "prompt.txt")]
    assert main([*prompt, *DISTILLED, "--quiet", "--output", str(tmp_path / "b.mp4")]) == 0
    assert [read_metadata(tmp_path / name)["prompt"] for name in ("a.mp4", "b.mp4")] == ["a blue cube"] * 2


def test_json_lines_tell_the_whole_story(tmp_path, capsys):
    command = ["--prompt", "p", *DISTILLED, "--json", "--output", str(tmp_path / "a.mp4")]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    events = [json.loads(line) for line in captured.out.splitlines()]
    assert events[0]["event"] == "Planned"
    planned = [phase["name"] for phase in events[0]["phases"]]
    assert [e["phase"]["name"] for e in events if e["event"] == "PhaseStarted"] == planned
    assert [e["phase"] for e in events if e["event"] == "MemorySeen"] == planned
    assert [e["step"] for e in events if e["event"] == "StepDone"] == [*range(1, 9), *range(1, 4)]
    for name in planned:
        done = [e["done"] for e in events if e["event"] == "Progress" and e["phase"] == name]
        assert done, f"no progress in {name}"
        assert done == sorted(done)
    assert [e["path"] for e in events if e["event"] == "FileWritten"] == [str(tmp_path / "a.mp4")]
    assert events[-1]["event"] == "Finished"
    assert events[-1]["video_path"] == str(tmp_path / "a.mp4")


def test_json_reports_failures_too(tmp_path, capsys):
    output = str(tmp_path / "a.mp4")
    assert main(["--prompt", "p", "--model", "demo", "--width", "100", "--output", output, "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["event"] == "Failed"
    assert "--width 100" in captured.err


def test_a_dry_run_writes_nothing_and_counts_everything(tmp_path, capsys):
    command = ["--prompt", "p", *ONE_STAGE, "--dry-run", "--output", str(tmp_path / "a.mp4")]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "128x64, 9 frames" in text
    assert main([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["video_tokens"], plan["audio_tokens"]) == (16, 9)
    assert plan["settings"]["steps"] == 2
    assert list(tmp_path.iterdir()) == []


def test_files_are_never_overwritten_unasked(tmp_path, capsys):
    output = tmp_path / "a.mp4"
    output.write_text("precious")
    message = failed(capsys, "--prompt", "p", *DISTILLED, "--output", output)
    assert message == f"{output}: already exists; give another name, or replace it with --force"
    assert output.read_text() == "precious"
    assert generate(*DISTILLED, "--output", output, "--force") == 0
    assert probe(output).frames == 9


def test_plain_lines_without_a_terminal(tmp_path, capsys):
    assert main(["--prompt", "p", *DISTILLED, "--output", str(tmp_path / "a.mp4")]) == 0
    err = capsys.readouterr().err
    assert "step 8 of 8" in err
    assert f"wrote {tmp_path / 'a.mp4'} (video)" in err
    assert "\r" not in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--width", "100"], "--width 100: the distilled pipeline makes multiples of 64; the nearest are 64 and 128"),
        (["--height", "0"], "--height 0: must be a positive whole number"),
        (["--num-frames", "10"], "--num-frames 10: must be 8k + 1; the nearest are 9 and 17"),
        (["--pipeline", "three-stage"], "--pipeline three-stage: must be one of distilled, one-stage"),
        (["--steps", "4"], "the distilled pipeline does not use --steps"),
        (["--negative-prompt", "x"], "the distilled pipeline does not use --negative-prompt"),
        (["--a2v-guidance-scale", "2"], "the distilled pipeline does not use --a2v-guidance-scale"),
        (["--image", "{tmp}/none.png"], "{tmp}/none.png: "),
        (["--image", "{tmp}/bad.png"], "{tmp}/bad.png: "),
        (["--image", "{tmp}/good.png", "99"], "--image {tmp}/good.png: frame 99 is beyond the clip's last, 8"),
        (["--image", "{tmp}/good.png", "0", "7"], "--image {tmp}/good.png: strength 7 is not from 0 to 1"),
        (["--model", "{tmp}/nothing.safetensors"], "--model {tmp}/nothing.safetensors: there is nothing at that path"),
        (["--model", "dmo"], "--model dmo: no model of that name, and no such file or folder; did you mean demo?"),
        (["--model", "{tmp}/cut.safetensors"], "{tmp}/cut.safetensors: "),
        (["--text-encoder", "{tmp}"], "--text-encoder {tmp}: "),
        (["--spatial-upsampler", "{tmp}/cut.safetensors"], "{tmp}/cut.safetensors: "),
        (["--output", "{tmp}/good.png/a.mp4"], "{tmp}/good.png/a.mp4: cannot be written"),
        (["--output", "/proc/a.mp4"], "/proc/a.mp4: cannot be written"),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(flags, message, tmp_path, capsys):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"not an image")
    from mlx_ltx.checkpoints.catalogue import demo_folder

    whole = next(demo_folder().glob("*demo*.safetensors")).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    before = sorted(tmp_path.rglob("*"))
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    output = [] if "--output" in flags else ["--output", tmp_path / "a.mp4"]
    said = failed(capsys, "--prompt", "p", *DISTILLED, *output, *flags)
    assert said.startswith(message.format(tmp=tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


def test_unknown_flags_and_a_missing_prompt(capsys, tmp_path):
    assert "--frobnicate" in failed(capsys, "--frobnicate", code=2)
    assert failed(capsys, "--model", "demo", "--output", tmp_path / "a.mp4").startswith("no prompt")
    assert failed(capsys, "--prompt-file", tmp_path / "none").startswith(f"--prompt-file {tmp_path / 'none'}: ")
    assert failed(capsys, "--show", tmp_path / "none.mp4")


def run_command(*flags: str | Path, **options) -> subprocess.Popen:
    # Another process has the embedded demo by that name.
    flags = [str(demo_folder() if flag == "demo" else flag) for flag in flags]
    command = [sys.executable, "-m", "mlx_ltx.generate", "--prompt", "p", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


PHASES = [
    "read-text",
    "embed-text",
    "load-transformer",
    "denoise",
    "upsample",
    "refine",
    "decode-audio",
    "decode-video",
]


@pytest.mark.parametrize("phase", PHASES)
def test_an_interrupt_in_any_phase_leaves_nothing(phase, tmp_path):
    """Ctrl-C arrives while the phase runs: the process is told so by its own first event of the phase."""
    longer = ["--num-frames", "41"] if phase.startswith("decode") else []  # or it is over before the signal comes
    process = run_command(*DISTILLED, *longer, "--json", "--output", tmp_path / "a.mp4")
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "PhaseStarted" and event["phase"]["name"] == phase:
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines() == ["mlx_ltx.generate: stopped; nothing was written"]
    assert json.loads(out.splitlines()[-1])["event"] == "Failed"
    assert list(tmp_path.iterdir()) == []


def test_a_termination_signal_leaves_nothing(tmp_path):
    process = run_command(*DISTILLED, "--json", "--output", tmp_path / "a.mp4")
    for line in process.stdout:
        if json.loads(line)["event"] == "StepDone":
            process.send_signal(signal.SIGTERM)
            break
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err.splitlines() == ["mlx_ltx.generate: stopped; nothing was written"]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path):
    """A limit on file sizes stands in for a disk that fills up."""
    import resource

    process = run_command(
        *DISTILLED,
        "--quiet",
        "--output",
        tmp_path / "a.mp4",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert len(err.splitlines()) == 1, err
    assert "a.mp4" in err
    assert list(tmp_path.iterdir()) == []
