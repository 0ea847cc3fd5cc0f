"""Pipelines that make new clips: each keeps what it promises, in the file that it wrote."""

import json
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

import mlx_ltx
from clips import RATE, frames_of, make, psnr
from mlx_ltx.events import StepDone
from mlx_ltx.generate import main
from mlx_ltx.media.audio import read_audio
from mlx_ltx.media.video import probe, read_metadata

SMALL = {"width": 128, "height": 64, "num_frames": 9}


def steps_of(**request):
    """The denoising steps of a run, by phase."""
    steps: dict[str, list[StepDone]] = {}
    for event in mlx_ltx.stream(mlx_ltx.Request(**{"model": "demo", "prompt": "p", **SMALL, **request})):
        if isinstance(event, StepDone):
            steps.setdefault(event.phase, []).append(event)
    return steps


@pytest.mark.parametrize("pipeline", ["two-stage", "hq"])
def test_two_guided_stages(pipeline, lora, tmp_path):
    distilled = mlx_ltx.request.LoraInput(lora())
    steps = steps_of(pipeline=pipeline, steps=2, distilled_lora=distilled, output=tmp_path / "a.mp4")
    assert {phase: len(done) for phase, done in steps.items()} == {"denoise": 2, "refine": 3}
    assert steps["denoise"][0].video_x0.shape[2:4] == (1, 2)
    assert steps["refine"][0].video_x0.shape[2:4] == (2, 4)
    info = probe(tmp_path / "a.mp4")
    assert (info.width, info.height, info.frames, info.audio_rate) == (128, 64, 9, RATE)
    assert frames_of(tmp_path / "a.mp4").std() > 1
    assert read_metadata(tmp_path / "a.mp4")["distilled_lora"]["source"] == distilled.source


def test_the_distilled_lora_works_in_the_second_stage_only(lora, tmp_path):
    """Its strength changes what the second stage predicts, and not what the first one does."""

    def predictions(strength):
        distilled = mlx_ltx.request.LoraInput(lora(), strength)
        output = tmp_path / f"{strength}.mp4"
        steps = steps_of(pipeline="two-stage", steps=2, distilled_lora=distilled, output=output)
        return {phase: np.array(done[-1].video_x0) for phase, done in steps.items()}

    weak, strong = predictions(0.2), predictions(1.0)
    assert np.array_equal(weak["denoise"], strong["denoise"])
    assert not np.allclose(weak["refine"], strong["refine"], atol=1e-3)


def test_the_hq_pipeline_asks_twice_per_step(lora, tmp_path):
    from mlx_ltx.events import Progress

    distilled = mlx_ltx.request.LoraInput(lora())
    request = mlx_ltx.Request(
        prompt="p", model="demo", pipeline="hq", steps=2, distilled_lora=distilled, output=tmp_path / "a.mp4", **SMALL
    )
    events = [e for e in mlx_ltx.stream(request) if isinstance(e, Progress) and e.phase == "refine"]
    blocks = 3
    assert len(events) == blocks * (2 + 2 + 3)  # the last step also asks at the end of the schedule


@pytest.mark.parametrize("pipeline", ["two-stage", "hq"])
def test_two_guided_stages_need_the_distilled_lora(pipeline, tmp_path, monkeypatch):
    """The published one, unless it could only be refused after its download."""
    request = {"pipeline": pipeline, "output": tmp_path / "a.mp4", **SMALL}
    with pytest.raises(mlx_ltx.UserError, match=r"is for 48 transformer blocks, this model has 3: .* --distilled-lora"):
        make(**request)
    for module in (mlx_ltx.pipelines.loras, mlx_ltx.checkpoints.lora_resolve):
        monkeypatch.setattr(module, "PUBLISHED_LAYERS", 3)
    with pytest.raises(mlx_ltx.UserError, match=r"ltx-2\.3-distilled-lora: not on this machine yet"):
        make(**request)


def test_gradient_estimation_is_another_way_to_the_same_prompt(tmp_path):
    for sampler in ("euler", "gradient-estimation"):
        make(pipeline="one-stage", steps=3, sampler=sampler, output=tmp_path / f"{sampler}.mp4", **SMALL)
    euler, other = (frames_of(tmp_path / f"{name}.mp4") for name in ("euler", "gradient-estimation"))
    assert not np.array_equal(euler, other)


def test_keyframes_pull_the_clip_towards_them(tmp_path, picture):
    """With the keyframes, the latents at their frames end nearer to them than without."""
    for number, image in enumerate(picture(2, 64, 128) // 2 + np.array([[[[0]]], [[[120]]]], np.uint8)):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    images = tuple(mlx_ltx.ImageInput(tmp_path / f"{n}.png", frame, crf=0) for n, frame in ((0, 0), (1, 16)))
    size = {**SMALL, "num_frames": 17}
    with_keys = steps_of(pipeline="keyframes", images=images, output=tmp_path / "a.mp4", **size)
    without = steps_of(pipeline="distilled", output=tmp_path / "b.mp4", **size)
    assert with_keys.keys() == without.keys()
    assert not np.allclose(with_keys["refine"][-1].video_x0, without["refine"][-1].video_x0, atol=1e-3)
    assert probe(tmp_path / "a.mp4").frames == 17


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([(0, 0)], "two images or more"),
        ([(0, 4), (1, 4)], "another image is given for frame 4 too"),
    ],
)
def test_keyframes_need_two_places(images, message, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "0.png")
    given = tuple(mlx_ltx.ImageInput(tmp_path / "0.png", frame) for _, frame in images)
    with pytest.raises(mlx_ltx.UserError, match=message):
        make(pipeline="keyframes", images=given, output=tmp_path / "a.mp4", **SMALL)


def test_the_sound_of_a_video_for_a_sound_is_the_sound(sound, tone, tmp_path):
    make(pipeline="a2v", audio_path=sound, audio_start=0.25, output=tmp_path / "a.mp4", **SMALL)
    info = probe(tmp_path / "a.mp4")
    assert (info.frames, info.audio_channels) == (9, 2)
    heard, rate = read_audio(tmp_path / "a.mp4")
    expected = tone(2.0)[round(0.25 * RATE) :][: len(heard)]
    assert rate == RATE
    assert len(heard) == round(9 / 24 * RATE)
    assert np.abs(heard - expected).max() < 1e-4


def test_a_contact_sheet_shows_a_given_sound(sound, tmp_path):
    make(pipeline="a2v", audio_path=sound, output=tmp_path / "a.mp4", contact_sheet=tmp_path / "a.png", **SMALL)
    make(audio=False, output=tmp_path / "b.mp4", contact_sheet=tmp_path / "b.png", **SMALL)
    (width, heard), (same, silent) = (Image.open(tmp_path / name).size for name in ("a.png", "b.png"))
    assert width == same
    assert heard > silent


def test_the_picture_follows_the_sound(sound, tmp_path):
    def predicted(start):
        request = {"pipeline": "a2v", "audio_path": sound, "audio_start": start}
        steps = steps_of(**request, output=tmp_path / f"{start}.mp4")
        return steps["denoise"]

    early, late = predicted(0.0), predicted(1.2)
    assert np.array_equal(early[0].audio_x0, early[-1].audio_x0)  # it stays as it is
    assert not np.array_equal(early[0].audio_x0, late[0].audio_x0)
    assert not np.allclose(early[-1].video_x0, late[-1].video_x0, atol=1e-4)


def test_a_given_sound_is_not_guided(sound, lora, tmp_path, monkeypatch):
    """As in the reference: no negative prompt for it, and no perturbed self-attention."""
    from mlx_ltx.pipelines import stage

    made = []
    monkeypatch.setattr(
        stage,
        "Denoiser",
        lambda *given, **more: (made.append(given), mlx_ltx.sampling.denoise.Denoiser(*given, **more))[1],
    )
    distilled = mlx_ltx.request.LoraInput(lora())
    guided = {"guided": True, "steps": 2, "distilled_lora": distilled}
    make(pipeline="a2v", audio_path=sound, **guided, output=tmp_path / "a.mp4", **SMALL)
    _, _, positive, guidance, negative = made[0]
    assert guidance.video.negative
    assert not guidance.audio.negative
    assert not guidance.audio.perturbed
    assert negative.audio is positive.audio
    assert negative.video is not positive.video


def test_a_clip_for_a_sound_is_as_long_as_the_sound(sound, tmp_path):
    result = make(pipeline="a2v", audio_path=sound, audio_start=1.0, width=64, height=64, output=tmp_path / "a.mp4")
    assert result.frames == 17  # one second is left; the demo's clips have at most 33 frames
    with pytest.raises(mlx_ltx.UserError, match=r"--audio-max-duration 0\.2: is shorter than the clip"):
        make(pipeline="a2v", audio_path=sound, audio_length=0.2, output=tmp_path / "b.mp4", **SMALL)


def test_a_short_sound_is_followed_by_silence(sound, tmp_path):
    request = mlx_ltx.Request(
        prompt="p", model="demo", pipeline="a2v", audio_path=sound, audio_start=1.8, output=tmp_path / "a.mp4", **SMALL
    )
    events = list(mlx_ltx.stream(request))
    warnings = [event.message for event in events if type(event).__name__ == "Warned"]
    assert warnings == ["the sound is shorter than the clip (0.38 s); silence follows it"]


@pytest.mark.parametrize("guided", [False, True])
def test_sound_alone(guided, tmp_path):
    steps = {"steps": 2} if guided else {}
    result = make(pipeline="t2a", guided=guided, duration=1.0, output_audio=tmp_path / "a.flac", **steps)
    waveform, rate = soundfile.read(tmp_path / "a.flac")
    assert (rate, waveform.shape) == (RATE, (round(25 / 24 * RATE), 2))
    assert np.sqrt(np.mean(waveform**2)) > 1e-4
    assert result.video_path is None


def test_sound_alone_loads_no_picture_stream(tmp_path, monkeypatch):
    from mlx_ltx.pipelines import stage

    seen = {}
    load = stage.load_transformer
    monkeypatch.setattr(stage, "load_transformer", lambda *a, **k: (seen.update(k), load(*a, **k))[1])
    make(pipeline="t2a", duration=0.4, output_audio=tmp_path / "a.wav")
    assert seen["video"] is False


def test_hdr_in_and_out(tmp_path):
    """An EXR image with light above 1 in; EXR frames, an HLG master and a preview out of one decode."""
    from mlx_ltx.media.color import Primaries
    from mlx_ltx.media.exr import read_exr, write_exr

    light = np.linspace(0, 12, 64 * 128 * 3, dtype=np.float32).reshape(64, 128, 3)
    write_exr(tmp_path / "light.exr", light, Primaries.REC709, "sRGB")
    make(
        hdr="SRGB_LINEAR",
        images=(mlx_ltx.ImageInput(tmp_path / "light.exr"),),
        output=tmp_path / "a.mp4",
        output_exr=tmp_path / "frames",
        output_hdr=tmp_path / "master.mp4",
        **SMALL,
    )
    frames = sorted((tmp_path / "frames").iterdir())
    assert [path.name for path in frames] == [f"frame_{n:05d}.exr" for n in range(9)]
    assert max(read_exr(path).max() for path in frames) > 1.0
    master = probe(tmp_path / "master.mp4")
    assert (master.hdr, master.frames, master.audio_rate) == ("HLG", 9, RATE)
    with av.open(str(tmp_path / "master.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "hevc"
    preview = probe(tmp_path / "a.mp4")
    assert (preview.hdr, preview.frames) == (None, 9)


def test_hdr_needs_its_colour_space(tmp_path):
    with pytest.raises(mlx_ltx.UserError, match="need --hdr"):
        make(output_exr=tmp_path / "frames", **SMALL)


def test_a_lora_changes_the_clip_and_a_strength_of_zero_does_not(lora, tmp_path):
    plain = steps_of(output=tmp_path / "a.mp4")["denoise"][-1].video_x0
    for strength, equal in ((0.0, True), (1.0, False)):
        given = (mlx_ltx.request.LoraInput(lora(), strength),)
        changed = steps_of(loras=given, output=tmp_path / f"{strength}.mp4")["denoise"][-1].video_x0
        assert np.array_equal(plain, changed) == equal


def test_a_lora_can_be_for_one_stage(lora, tmp_path):
    plain = steps_of(output=tmp_path / "a.mp4")
    second = steps_of(loras=(mlx_ltx.request.LoraInput(lora(), 1.0, 2),), output=tmp_path / "b.mp4")
    assert np.array_equal(plain["denoise"][-1].video_x0, second["denoise"][-1].video_x0)
    assert not np.allclose(plain["refine"][0].video_x0, second["refine"][0].video_x0, atol=1e-4)


def test_a_camera_move_is_a_published_lora(tmp_path, monkeypatch):
    with pytest.raises(mlx_ltx.UserError, match="camera-dolly-in: is for 48 transformer blocks, but this model has 3"):
        make(camera="dolly-in", output=tmp_path / "a.mp4", **SMALL)
    monkeypatch.setattr(mlx_ltx.checkpoints.lora_resolve, "PUBLISHED_LAYERS", 3)
    with pytest.raises(mlx_ltx.UserError, match="camera-dolly-in: not on this machine yet"):
        make(camera="dolly-in", output=tmp_path / "a.mp4", **SMALL)
    with pytest.raises(mlx_ltx.UserError, match="--camera sideways: must be one of dolly-in"):
        make(camera="sideways", output=tmp_path / "a.mp4", **SMALL)


def test_segments_follow_each_other(tmp_path):
    """What is said of the second part leaves the first part's beginning nearly alone and changes the end."""
    parts = mlx_ltx.request.Segment

    def predicted(second):
        segments = (parts("a red ball", 0.7), parts(second, 0.7))
        request = {"prompt": "", "segments": segments, "num_frames": None, "output": tmp_path / f"{second[:4]}.mp4"}
        return np.array(steps_of(**request)["denoise"][0].video_x0)

    one, other = predicted("night falls"), predicted("snow, wind and bells")
    assert one.shape[1] == 5  # 1.4 s at 24 fps are 33 frames
    change = np.abs(one - other).mean(axis=(0, 2, 3, 4))
    assert change[-1] > 2 * change[0]
    assert read_metadata(tmp_path / "nigh.mp4")["segments"][1] == {"text": "night falls", "seconds": 0.7}


def test_several_prompts_and_seeds_are_one_job(tmp_path, capsys, monkeypatch):
    from mlx_ltx.pipelines import stage

    loads = []
    load = stage.load_transformer
    monkeypatch.setattr(stage, "load_transformer", lambda *a, **k: (loads.append(1), load(*a, **k))[1])
    (tmp_path / "prompts.txt").write_text("a red ball\n\na blue cube\n")
    command = ["--model", "demo", "--width", "64", "--height", "64", "-n", "9", "--prompts-file"]
    command += [tmp_path / "prompts.txt", "--seed", 1, 2, "--contact-sheet", tmp_path / "all.png"]
    assert main([*map(str, command), "--output", str(tmp_path / "a.mp4"), "--json"]) == 0
    assert len(loads) == 1
    names = [f"a-0{prompt}-seed-{seed}.mp4" for prompt in (1, 2) for seed in (1, 2)]
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["path"] for event in events if event["event"] == "FileWritten"] == [
        *(str(tmp_path / name) for name in names),
        str(tmp_path / "all.png"),
    ]
    assert [clip["video_path"] for clip in events[-1]["clips"]] == [str(tmp_path / name) for name in names]
    settings = [read_metadata(tmp_path / name) for name in names]
    assert [(s["prompt"], s["seed"]) for s in settings] == [
        ("a red ball", 1), ("a red ball", 2), ("a blue cube", 1), ("a blue cube", 2),
    ]  # fmt: skip
    assert all("seeds" not in s and "prompts" not in s for s in settings)
    assert Image.open(tmp_path / "all.png").height > 4 * 100
    # each is what it would be alone
    alone = make(prompt="a blue cube", seed=2, width=64, height=64, num_frames=9, output=tmp_path / "b.mp4")
    assert alone.clips[0].seed == 2
    # Not compared bit by bit: x264's tree of macroblocks differs from run to run at sizes this small.
    assert psnr(frames_of(tmp_path / "b.mp4"), frames_of(tmp_path / names[-1])) > 28
    assert psnr(frames_of(tmp_path / "b.mp4"), frames_of(tmp_path / names[-2])) < 25


def test_odd_frame_rates_survive(tmp_path):
    make(fps=23.976, output=tmp_path / "a.mp4", **SMALL)
    assert probe(tmp_path / "a.mp4").fps == Fraction(24000, 1001)


def test_fits(tmp_path, picture):
    """The three ways of fitting a tall image into a wide picture give three different first latents."""
    Image.fromarray(picture(1, 200, 60)[0]).save(tmp_path / "tall.png")
    image = (mlx_ltx.ImageInput(tmp_path / "tall.png"),)
    first = {
        fit: np.array(steps_of(images=image, fit=fit, output=tmp_path / f"{fit}.mp4")["refine"][-1].video_x0[:, 0])
        for fit in ("crop", "contain", "stretch")
    }
    assert not np.allclose(first["crop"], first["contain"], atol=1e-2)
    assert not np.allclose(first["crop"], first["stretch"], atol=1e-2)
    default = steps_of(images=image, output=tmp_path / "default.mp4")["refine"][-1].video_x0[:, 0]
    assert np.array_equal(default, first["crop"])
    assert psnr(np.zeros(3), np.zeros(3)) == 99


def test_rules_of_guidance(tmp_path):
    """Three ways of steering away from the negative prompt give three predictions; APG's knobs turn it."""

    def predicted(name, **rule):
        steps = steps_of(pipeline="one-stage", steps=2, output=tmp_path / f"{name}.mp4", **rule)
        return np.array(steps["denoise"][-1].video_x0)

    plain, star = predicted("plain"), predicted("star", cfg_rule="star")
    projected = predicted("apg", cfg_rule="apg", apg_eta=0.2, apg_norm_threshold=5.0)
    assert np.array_equal(plain, predicted("again", cfg_rule="plain"))
    assert not np.allclose(plain, star, atol=1e-4)
    assert not np.allclose(plain, projected, atol=1e-4)
    assert read_metadata(tmp_path / "apg.mp4")["apg_eta"] == 0.2
    with pytest.raises(mlx_ltx.UserError, match="--apg-eta is for --cfg-rule apg"):
        predicted("bad", apg_eta=0.2)
