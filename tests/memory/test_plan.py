"""Predicted against measured peaks of every phase, and what the plan says."""

import json

import mlx.core as mx
import pytest
from PIL import Image

import mlx_ltx
from mlx_ltx.errors import UserError
from mlx_ltx.events import Finished, Planned, Warned
from mlx_ltx.generate import main
from mlx_ltx.memory.limits import memory_limits
from mlx_ltx.memory.plan import PhasePlan, Plan, advise, parse_size
from mlx_ltx.pipelines.job import prepare
from mlx_ltx.pipelines.predict import make_fit, make_plan

GB = 1 << 30

AS_IT_IS = {"quantize": "none", "quantize_text": "none", "weights": "resident"}
SIZES = [
    {"width": 64, "height": 64, "num_frames": 9},
    {"width": 128, "height": 64, "num_frames": 33, "audio": False},
    {"width": 256, "height": 192, "num_frames": 9},
    {"width": 128, "height": 128, "num_frames": 17, "pipeline": "one-stage", "steps": 2},
    {"width": 192, "height": 128, "num_frames": 25, "pipeline": "one-stage", "steps": 2, "negative_prompt": "x"},
    {"width": 128, "height": 128, "num_frames": 9, "weights": "streamed"},
    {"width": 128, "height": 128, "num_frames": 9, "quantize": "q8", "quantize_text": "q4"},
    {"duration": 4.0, "pipeline": "t2a", "guided": False, "output": None},
    {"width": 128, "height": 128, "num_frames": 9, "prompt": "", "prompts": ("a red ball", "a blue ball of light")},
    {"width": 192, "height": 192, "num_frames": 17, "model": "demo"},
    {"width": 64, "height": 1600, "num_frames": 9, "vae_tiling": "bands-2", "audio": False},
    {"width": 832, "height": 64, "num_frames": 25, "vae_tiling": "reference", "audio": False},
]


def request(folder, **changes):
    given = {"prompt": "a lighthouse at dusk, waves and gulls", "output": folder / "clip.mp4", "force": True}
    return mlx_ltx.Request(**{**given, "dtype": "float32", **changes})


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="calibrated on the CPU backend")
@pytest.mark.parametrize("size", SIZES, ids=lambda size: " ".join(f"{k}={v}" for k, v in size.items()))
def test_every_phase_is_predicted(tmp_path, middle_model, wrongly_predicted, size):
    sound = {"output_audio": tmp_path / "sound.wav"} if size.get("pipeline") == "t2a" else {}
    job = prepare(request(tmp_path, **{"model": str(middle_model), **sound, **size}))
    assert wrongly_predicted(job) == []


def test_planning_reads_no_weights_and_draws_no_numbers(tmp_path, middle_model):
    job = prepare(request(tmp_path, model=str(middle_model), width=1920, height=1088, num_frames=121))
    drawn = mx.random.state[0].tolist()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    plan = make_plan(job)
    assert mx.get_peak_memory() - before < 16 << 20
    assert mx.random.state[0].tolist() == drawn
    assert plan.peak_bytes > GB


def test_bfloat16_takes_half(tmp_path, middle_model):
    plans = [
        make_plan(prepare(request(tmp_path, model=str(middle_model), dtype=dtype, width=64, height=64, num_frames=9)))
        for dtype in ("float32", "bfloat16")
    ]
    wide, narrow = ({phase.name: phase for phase in plan.phases} for plan in plans)
    assert narrow["refine"].resident["transformer"] * 2 == wide["refine"].resident["transformer"]
    assert narrow["refine"].works_in == "bfloat16"


def test_the_text_model_is_gone_before_the_transformer_and_that_before_the_decoders(tmp_path, middle_model):
    plan = make_plan(prepare(request(tmp_path, model=str(middle_model), width=64, height=64, num_frames=9)))
    resident = {phase.name: set(phase.resident) for phase in plan.phases}
    assert resident["load-transformer"] == {"text embeddings"}
    assert "transformer" in resident["upsample"]
    assert "transformer" not in resident["decode-audio"] | resident["decode-video"]


def test_what_does_not_fit_is_refused_before_the_work_with_what_would(tmp_path, middle_model, monkeypatch):
    job = prepare(request(tmp_path, model=str(middle_model), width=512, height=512, num_frames=33, **AS_IT_IS))
    peak = make_plan(job).peak_bytes
    monkeypatch.setattr("mlx_ltx.pipelines.predict.total_memory", lambda: int(0.95 * peak))
    with pytest.raises(UserError, match=r"needs .* of memory.*--width \d+ --height \d+") as caught:
        job.run()
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("mlx_ltx.pipelines.predict.total_memory", lambda: 1 << 20)
    with pytest.raises(UserError, match="no single change is enough"):
        job.run()


def test_a_dry_run_shows_the_plan(tmp_path, middle_model, capsys):
    flags = ["--model", str(middle_model), "--prompt", "p", "--width", "128", "--height", "128", "--num-frames", "9"]
    assert main([*flags, "--dry-run", "--assume-memory", "16GB"]) == 0
    text = capsys.readouterr().out
    assert "decode-video" in text
    assert "13.6 GB" in text  # the limit
    assert "does not fit" not in text
    assert main([*flags, "--dry-run", "--assume-memory", "64MB"]) == 0
    assert "does not fit" in capsys.readouterr().out
    assert main([*flags, "--dry-run", "--assume-memory", "16GB", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["fits"] is True
    assert plan["memory_bytes"] == 16 * GB
    assert [phase["name"] for phase in plan["phases"]][:2] == ["read-text", "embed-text"]
    assert all(phase["peak_bytes"] <= plan["limit_bytes"] for phase in plan["phases"])


@pytest.mark.parametrize("flags", [["--dry-run", "--assume-memory", "lots"], ["--assume-memory", "16GB"]])
def test_memory_that_makes_no_sense_is_refused(tmp_path, flags, capsys):
    command = ["--model", "demo", "--prompt", "p", "--output", str(tmp_path / "x.mp4"), *flags]
    assert main(command) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_limits_are_set_for_the_job_and_put_back(tmp_path):
    before = mx.set_memory_limit(5 * GB), mx.set_cache_limit(3 * GB)
    try:
        events = mlx_ltx.stream(request(tmp_path, model="demo", width=64, height=64, num_frames=9))
        next(events)
        assert current_limits() != (5 * GB, 3 * GB)
        events.close()
        assert current_limits() == (5 * GB, 3 * GB)
        with pytest.raises(ZeroDivisionError), memory_limits(plan_of(GB)):
            1 / 0  # noqa: B018
        assert current_limits() == (5 * GB, 3 * GB)
    finally:
        mx.set_memory_limit(before[0])
        mx.set_cache_limit(before[1])


def current_limits() -> tuple[int, int]:
    memory, cache = mx.set_memory_limit(GB), mx.set_cache_limit(GB)
    mx.set_memory_limit(memory)
    mx.set_cache_limit(cache)
    return memory, cache


def plan_of(peak: int, memory: int = 16 * GB) -> Plan:
    return Plan((PhasePlan("denoise", "Denoising", {}, "float32", "blocks", peak),), memory)


def test_advice_names_what_fits_only():
    small, large = plan_of(GB), plan_of(20 * GB)
    assert advise(small, [("--weights streamed", small)]) == ()
    assert advise(large, [("--weights streamed", large), ("--num-frames 9", small)]) == ("--num-frames 9",)
    assert advise(large, [("--weights streamed", large)]) == (
        "no single change is enough; make the clip smaller and shorter",
    )


@pytest.mark.parametrize(
    ("text", "size"), [("16GB", 16 * GB), ("16 GiB", 16 * GB), ("1.5g", GB * 3 // 2), ("512M", 512 << 20), ("7", 7)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "16XB", "1e9"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="not a size"):
        parse_size(text)


def test_a_job_over_the_limit_but_within_the_memory_is_told(tmp_path, monkeypatch):
    small = request(tmp_path, model="demo", width=64, height=64, num_frames=9)
    peak = make_plan(prepare(small)).peak_bytes
    monkeypatch.setattr("mlx_ltx.pipelines.predict.total_memory", lambda: peak + 1)
    first, second, *_, last = mlx_ltx.stream(small)
    assert isinstance(first, Planned)
    assert isinstance(second, Warned)
    assert "what would fit" in second.message
    assert isinstance(last, Finished)


def fitted(folder, model, memory, **changes):
    job = prepare(request(folder, model=str(model), width=64, height=64, num_frames=9, cache=False, **changes))
    return make_fit(job, memory)


def least_memory(plan, *names):
    """For which phases of such names just fit."""
    return int(max(phase.peak_bytes for phase in plan.phases if phase.name in names) / 0.85) + 2


DENOISING = ("load-transformer", "denoise", "refine")


def test_auto_chooses_what_fits(tmp_path, middle_model):
    roomy = fitted(tmp_path, middle_model, 64 * GB)
    assert roomy.choices == ""
    enough = least_memory(roomy.plan, *DENOISING)
    assert fitted(tmp_path, middle_model, enough).choices == ""
    tight = fitted(tmp_path, middle_model, enough - 4)
    assert tight.choices == "--quantize q8"
    assert tight.job.request.settings()["quantize"] == "q8"
    assert all(shot.quantize == "q8" for shot in tight.job.shots)
    assert least_memory(tight.plan, *DENOISING) < 0.8 * enough


def test_auto_of_the_text_model(tmp_path, middle_model):
    reading = {kind: fitted(tmp_path, middle_model, 64 * GB, quantize_text=kind).plan for kind in ("none", "q8")}
    plain, eight = (least_memory(plan, "read-text") for plan in reading.values())
    assert eight < plain
    kinds = [fit.choices for fit in (fitted(tmp_path, middle_model, size) for size in (plain, plain - 4))]
    assert ["--quantize-text" in choices for choices in kinds] == [False, True]


def test_auto_streams_where_nothing_is_to_be_quantised(tmp_path, middle_model):
    streamed = fitted(tmp_path, middle_model, 64 * GB, weights="streamed")
    memory = least_memory(streamed.plan, *DENOISING)
    tight = fitted(tmp_path, middle_model, memory, quantize="none")
    assert tight.choices == "--weights streamed"
    assert tight.job.request.weights == "streamed"


def test_auto_decodes_in_as_few_bands_as_fit(tmp_path, middle_model):
    tall = {"model": str(middle_model), "height": 4096, "width": 64, "num_frames": 9, "cache": False}
    job = prepare(request(tmp_path, **tall))
    peaks = []
    for bands in ("none", "bands-2", "bands-3"):
        plan = make_fit(prepare(request(tmp_path, **tall, vae_tiling=bands)), 64 * GB).plan
        peaks.append(least_memory(plan, "decode-video"))
    assert peaks == sorted(peaks, reverse=True)
    for memory, choice in zip(peaks, ("", "--vae-tiling bands-2", "--vae-tiling bands-3"), strict=True):
        fit = make_fit(job, memory)
        assert fit.choices.endswith(choice)
        assert ("--vae-tiling" in fit.choices) == bool(choice)
        decoding = fit.plan.phases[-1]
        assert decoding.name == "decode-video"
        assert ("bands" in decoding.chunking) == bool(choice)
        assert decoding.peak_bytes <= fit.plan.limit_bytes
    assert "x the work" in decoding.chunking


def test_what_was_typed_is_kept(tmp_path, middle_model):
    for given in ({"quantize": "none", "quantize_text": "none", "weights": "resident"}, {"quantize": "q4"}):
        tight = fitted(tmp_path, middle_model, 1 << 20, **given)
        assert {name: getattr(tight.job.request, name) for name in given} == given
        assert not tight.plan.fits


def test_a_job_says_what_was_chosen_for_it(tmp_path, middle_model, monkeypatch, capsys):
    roomy = fitted(tmp_path, middle_model, 64 * GB)
    memory = least_memory(roomy.plan, *DENOISING) - 2
    monkeypatch.setattr("mlx_ltx.pipelines.predict.total_memory", lambda: memory)
    events = list(roomy.job.run())
    assert any(isinstance(event, Warned) and "asks for" in event.message for event in events)
    finished = events[-1]
    assert isinstance(finished, Finished)
    clip = ["--model", str(middle_model), "-p", "a ball", "--width", "64", "--height", "64", "--num-frames", "9"]
    main([*clip, "--dtype", "float32", "--no-cache", "--dry-run", "--assume-memory", str(memory)])
    assert "chosen to fit: --" in capsys.readouterr().out


def test_references_and_images_beside_the_clip_are_counted(tmp_path):
    picture = tmp_path / "grey.png"
    Image.new("RGB", (64, 64), "grey").save(picture)
    images = (mlx_ltx.ImageInput(picture, 8, 1.0),)
    size = {"model": "demo", "width": 128, "height": 128, "num_frames": 9, "pipeline": "one-stage", "steps": 2}
    bare, given = (make_plan(prepare(request(tmp_path, **size, **more))) for more in ({}, {"images": images}))
    peaks = [next(phase.peak_bytes for phase in plan.phases if phase.name == "denoise") for plan in (bare, given)]
    assert peaks[1] > peaks[0]
